//! `fcvm zfs-send`: shows the progress of a resumable send.

use std::time::Duration;

use fcvm_image::progress::{Progress, Task};
use fcvm_kernel::send::{self, Event, Request};
use fcvm_types::ByteSize;

use crate::EXIT_SUCCESS;
use crate::args::zfs_send::ZfsSendArguments;
use crate::commands::kernel::search_path;
use crate::progress::Shown;

/// Doubles with each failure, up to about a minute.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

pub(crate) fn run(arguments: &ZfsSendArguments) -> anyhow::Result<u8> {
    let request = Request {
        source: arguments.source.parse()?,
        destination: arguments.destination.parse()?,
        ssh_host: arguments.ssh.clone(),
        raw: arguments.raw,
        attempts_max: arguments.attempts,
        pause: FIRST_PAUSE,
        search_path: search_path(),
    };
    let shown = Shown::new(arguments.quiet);
    let mut stream: Option<Box<dyn Task>> = None;
    let summary = send::send(&request, &mut |event| match event {
        Event::Start {
            resumed,
            size_bytes,
        } => {
            if resumed {
                shown.message("going on with an interrupted stream");
            }
            stream = Some(shown.start(&arguments.source, size_bytes));
        }
        Event::Passed(bytes) => {
            if let Some(stream) = &mut stream {
                stream.advance(bytes);
            }
        }
        Event::Retry { reason, pause } => {
            stream = None;
            shown.message(&format!("{reason}; again in {} s", pause.as_secs()));
        }
        Event::Stale(reason) => {
            stream = None;
            shown.message(&format!(
                "{reason}; its state is thrown away, all begins again"
            ));
        }
    })?;
    if !arguments.quiet {
        let bytes = ByteSize::from_bytes(summary.passed_bytes);
        match summary.stream_count {
            0 => println!("{} is there already", arguments.source),
            count => println!("{} is there: {bytes} in {count} streams", arguments.source),
        }
    }
    Ok(EXIT_SUCCESS)
}
