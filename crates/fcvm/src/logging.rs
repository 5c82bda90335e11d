//! What fcvm itself says on stderr: tracing events with nested targets (`web: qemu: ...`).
//!
//! A VM's events happen inside the span `vm` whose field `name` is the VM's; the part is the event's
//! target: `vm`, `qemu`, `agent`, `network`. Colours appear on terminals only. Processes in the background say it in a
//! file ([`ProcessLog`]).

use std::fmt;
use std::fs::File;
use std::io::IsTerminal;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use anyhow::Context as _;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// A log that is longer is begun anew by the next process.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// What a process in the background has to say, in a file.
pub(crate) struct ProcessLog {
    file: File,
    /// Where the next process's begins.
    start: u64,
}

impl ProcessLog {
    /// A log that goes on; one that has become long begins anew.
    pub(crate) fn open(path: PathBuf) -> anyhow::Result<Self> {
        let open = || {
            let file = File::options()
                .read(true)
                .append(true)
                .create(true)
                .mode(0o600)
                .open(&path)?;
            let mut start = file.metadata()?.len();
            if start > LOG_BYTES_MAX {
                file.set_len(0)?;
                start = 0;
            }
            Ok::<_, std::io::Error>(Self { file, start })
        };
        open().with_context(|| format!("cannot open {}", path.display()))
    }

    /// For the process to write to.
    pub(crate) fn file(&self) -> std::io::Result<File> {
        self.file.try_clone()
    }

    /// What a process said last, as its reason to end.
    pub(crate) fn last_line(&self) -> String {
        let mut said = vec![0; LOG_BYTES_MAX as usize];
        let length = self.file.read_at(&mut said, self.start).unwrap_or(0);
        let said = String::from_utf8_lossy(&said[..length]);
        let reason = said.lines().rfind(|line| !line.trim().is_empty());
        let reason = reason.unwrap_or("the process ended");
        crate::errors::printable(reason.strip_prefix("Error: ").unwrap_or(reason))
    }
}

/// Starts logging to stderr.
pub(crate) fn start(directives: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::builder().parse(directives).with_context(|| {
        format!("'{directives}' is no log level: write error, warn, info, debug or trace")
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .event_format(Lines)
        .fmt_fields(NameOnly)
        .init();
    Ok(())
}

/// The targets that are shown: parts of a VM, in place of Rust's module paths.
const PARTS: [&str; 7] = [
    "vm", "qemu", "agent", "network", "console", "health", "memory",
];

struct Lines;

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = *event.metadata().level();
        if writer.has_ansi_escapes() {
            let colour = match level {
                Level::ERROR => 31,
                Level::WARN => 33,
                Level::INFO => 32,
                Level::DEBUG => 34,
                Level::TRACE => 35,
            };
            write!(writer, "\x1b[{colour}m{level:>5}\x1b[0m ")?;
        } else {
            write!(writer, "{level:>5} ")?;
        }
        if let Some(scope) = context.event_scope() {
            for span in scope.from_root() {
                if let Some(fields) = span.extensions().get::<FormattedFields<N>>()
                    && !fields.is_empty()
                {
                    write!(writer, "{fields}: ")?;
                }
            }
        }
        let target = event.metadata().target();
        if PARTS.contains(&target) {
            write!(writer, "{target}: ")?;
        }
        let mut message = Message {
            writer: writer.by_ref(),
            result: Ok(()),
        };
        event.record(&mut message);
        message.result?;
        writeln!(writer)
    }
}

/// Writes the message, then other fields as `name=value`.
struct Message<'a> {
    writer: Writer<'a>,
    result: fmt::Result,
}

impl Visit for Message<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.result.is_ok() {
            self.result = match field.name() {
                "message" => write!(self.writer, "{value:?}"),
                name => write!(self.writer, " {name}={value:?}"),
            };
        }
    }
}

/// Formats the span's `name` as its bare text.
struct NameOnly;

impl<'w> FormatFields<'w> for NameOnly {
    fn format_fields<R: tracing_subscriber::field::RecordFields>(
        &self,
        writer: Writer<'w>,
        fields: R,
    ) -> fmt::Result {
        struct Name<'a>(Writer<'a>, fmt::Result);
        impl Visit for Name<'_> {
            fn record_str(&mut self, field: &Field, value: &str) {
                if field.name() == "name" {
                    self.1 = write!(self.0, "{value}");
                }
            }
            fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
                if field.name() == "name" {
                    self.1 = write!(self.0, "{value:?}");
                }
            }
        }
        let mut name = Name(writer, Ok(()));
        fields.record(&mut name);
        name.1
    }
}
