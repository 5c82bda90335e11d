//! How a failure becomes one line on stderr and an exit code.

use std::fmt;
use std::process::ExitCode;

use fcvm_wire::{Failure, FailureKind};

/// fcvm itself failed, as Podman's 125.
pub(crate) const EXIT_FCVM_FAILED: u8 = 125;
/// The command exists and cannot be executed.
pub(crate) const EXIT_NOT_EXECUTABLE: u8 = 126;
/// The command does not exist.
pub(crate) const EXIT_NOT_FOUND: u8 = 127;

/// A failure with an exit code of its own.
#[derive(Debug)]
pub(crate) struct ExitError {
    /// The exit code.
    pub(crate) code: u8,
    /// What failed, why and what to do.
    pub(crate) message: String,
}

impl fmt::Display for ExitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ExitError {}

/// A failure that the guest reported.
pub(crate) fn guest_failure(failure: Failure) -> anyhow::Error {
    let code = match failure.kind {
        FailureKind::CommandNotFound => EXIT_NOT_FOUND,
        FailureKind::CommandNotExecutable => EXIT_NOT_EXECUTABLE,
        _ => EXIT_FCVM_FAILED,
    };
    ExitError {
        code,
        message: printable(&failure.message),
    }
    .into()
}

/// Guest text made safe for a terminal: one line, no control characters, bounded.
pub(crate) fn printable(text: &str) -> String {
    const MAX_CHARS: usize = 500;
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    text.trim().chars().take(MAX_CHARS).map(shown).collect()
}

/// The refusal of what comes in a later version.
pub(crate) fn refuse_later(verb: &str) -> anyhow::Result<u8> {
    anyhow::bail!("'fcvm {verb}' is not in this version yet; 'fcvm --help' lists what is")
}

/// Output that cannot be written ends the process: quietly where nobody reads it any more, as a pipe's
/// signal would, else with one line. `println!` has no other way to tell.
pub(crate) fn end_with_lost_output() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload_as_str().unwrap_or_default();
        let Some(reason) = message.strip_prefix("failed printing to stdout: ") else {
            return usual(panic);
        };
        let broken_pipe = std::io::Error::from(rustix::io::Errno::PIPE);
        if reason == broken_pipe.to_string() {
            std::process::exit(128 + crate::signals::SIGPIPE);
        }
        eprintln!("Error: cannot write to standard output: {reason}");
        std::process::exit(EXIT_FCVM_FAILED.into());
    }));
}

/// Prints an error and gives its exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    let code = error
        .downcast_ref::<ExitError>()
        .map_or(EXIT_FCVM_FAILED, |exit| exit.code);
    eprintln!("Error: {}", one_line(error));
    ExitCode::from(code)
}

/// An error and its causes as one line.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // Library errors often repeat their source in their own text.
        if !line.is_empty() && line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line.split('\n')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

/// Prints a usage error (or the help that was asked for) and gives its exit code.
pub(crate) fn report_usage(error: &clap::Error) -> ExitCode {
    // A closed stdout leaves nobody to tell.
    let _ = error.print();
    if error.use_stderr() {
        ExitCode::from(EXIT_FCVM_FAILED)
    } else {
        ExitCode::SUCCESS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_joined_and_not_repeated() {
        let inner = anyhow::anyhow!("no such file");
        let error = inner
            .context("cannot open x: no such file\nline two")
            .context("run failed");
        assert_eq!(
            one_line(&error),
            "run failed: cannot open x: no such file; line two"
        );
    }

    #[test]
    fn guest_text_cannot_move_the_cursor() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a [2Jb c");
        assert_eq!(printable(&"x".repeat(10_000)).len(), 500);
    }
}
