//! A program that writes an archive to its standard output: mmdebstrap, tar.
//!
//! It is killed when the value is dropped before its end, and its last lines of error output are
//! kept for messages.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::{Scope, ScopedJoinHandle};

use crate::progress::one_line;

const KEPT_LINES: usize = 12;
const SHOWN_ERRORS: usize = 3;
const LINE_MAX_BYTES: u64 = 4096;
const LINE_MAX_CHARS: usize = 300;

/// A program that runs.
pub(crate) struct Tool<'scope> {
    child: Child,
    errors: Option<ScopedJoinHandle<'scope, VecDeque<String>>>,
}

impl<'scope> Tool<'scope> {
    /// Starts it without standard input. `line` hears of every line of its error output.
    pub(crate) fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        command: &mut Command,
        line: impl Fn(&str) + Send + 'scope,
    ) -> io::Result<(Self, ChildStdout)> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (output, errors) = match (child.stdout.take(), child.stderr.take()) {
            (Some(output), Some(errors)) => (output, errors),
            _ => return Err(io::Error::other("the program's output is not a pipe")),
        };
        let errors = scope.spawn(move || last_lines(errors, &line));
        Ok((
            Self {
                child,
                errors: Some(errors),
            },
            output,
        ))
    }

    /// Waits for its end and returns how it ended and its last lines. Call it when its output has
    /// ended; else it may wait for somebody to read it.
    pub(crate) fn wait(mut self) -> io::Result<(ExitStatus, Vec<String>)> {
        let status = self.child.wait()?;
        let lines = self
            .errors
            .take()
            .and_then(|errors| errors.join().ok())
            .unwrap_or_default();
        Ok((status, lines.into()))
    }
}

impl Drop for Tool<'_> {
    fn drop(&mut self) {
        // SIGKILL would keep mmdebstrap from unmounting and removing what it made; the broken pipe
        // of its output or SIGTERM let it clean up. Its end is waited for.
        if let Ok(None) = self.child.try_wait() {
            if let Some(pid) = i32::try_from(self.child.id())
                .ok()
                .and_then(rustix::process::Pid::from_raw)
            {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
            let _ = self.child.wait();
        }
    }
}

fn last_lines(errors: ChildStderr, line: &dyn Fn(&str)) -> VecDeque<String> {
    let mut reader = BufReader::new(errors);
    let mut kept = VecDeque::new();
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        // A longer line counts as several.
        match reader
            .by_ref()
            .take(LINE_MAX_BYTES)
            .read_until(b'\n', &mut bytes)
        {
            Ok(0) | Err(_) => return kept,
            Ok(_) => {}
        }
        // Of progress bars drawn over each other, the last one.
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end().rsplit('\r').next().unwrap_or_default();
        let text = one_line(text, LINE_MAX_CHARS);
        if text.is_empty() {
            continue;
        }
        line(&text);
        if kept.len() == KEPT_LINES {
            kept.pop_front();
        }
        kept.push_back(text);
    }
}

/// The lines that say what went wrong: those marked as errors where there are any, on one line.
pub(crate) fn explain(lines: &[String]) -> String {
    let is_error = |line: &&String| line.starts_with("E:") || line.contains("rror:");
    // The first is the reason, the others follow from it.
    let errors = lines.iter().filter(is_error).take(SHOWN_ERRORS);
    let errors: Vec<&str> = errors.map(String::as_str).collect();
    if errors.is_empty() {
        lines
            .last()
            .cloned()
            .unwrap_or_else(|| "it did not say why".into())
    } else {
        errors.join("; ")
    }
}
