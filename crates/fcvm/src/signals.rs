//! Signals: their names and the stream of those that a command gets.

use anyhow::{Context as _, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

const NAMES: [(&str, i32); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];
/// Largest signal number of Linux.
const MAX_SIGNAL: i32 = 64;

pub(crate) const SIGHUP: i32 = 1;
pub(crate) const SIGINT: i32 = 2;
pub(crate) const SIGQUIT: i32 = 3;
pub(crate) const SIGKILL: i32 = 9;
/// What a program is ended by that writes where nobody reads.
pub(crate) const SIGPIPE: i32 = 13;
pub(crate) const SIGTERM: i32 = 15;

/// Reads a signal's name (with or without SIG), number, or RTMIN+N.
pub(crate) fn parse(text: &str) -> anyhow::Result<i32> {
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    let offset = |rest: &str| {
        if rest.is_empty() {
            Some(0)
        } else {
            rest.parse::<i32>().ok()
        }
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        offset(rest).map(|offset| 34 + offset)
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        offset(rest).map(|offset| 64 + offset)
    } else {
        name.parse().ok()
    };
    match number {
        Some(number) if (1..=MAX_SIGNAL).contains(&number) => Ok(number),
        _ => bail!(
            "'{text}' is no signal: write a name like TERM or a number from 1 to {MAX_SIGNAL}"
        ),
    }
}

/// The signals that a command passes to its process in the guest.
pub(crate) struct Forwarded {
    streams: Vec<(i32, Signal)>,
}

/// What arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// A signal to pass on.
    Signal(i32),
    /// The terminal has a new size.
    Resized,
}

const SIGWINCH: i32 = 28;

impl Forwarded {
    /// Takes the signals over from their default actions.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let numbers = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, 10, 12, SIGWINCH];
        let streams = numbers.map(|number| Ok((number, signal(SignalKind::from_raw(number))?)));
        let streams = streams
            .into_iter()
            .collect::<std::io::Result<_>>()
            .context("cannot listen for signals")?;
        Ok(Self { streams })
    }

    /// The next signal.
    pub(crate) async fn next(&mut self) -> Arrived {
        std::future::poll_fn(|context| {
            for (number, stream) in &mut self.streams {
                if stream.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(match *number {
                        SIGWINCH => Arrived::Resized,
                        number => Arrived::Signal(number),
                    });
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings() {
        for (text, number) in [
            ("KILL", 9),
            ("sigterm", 15),
            ("SIGUSR1", 10),
            ("1", 1),
            ("RTMIN+3", 37),
            ("RTMAX-1", 63),
        ] {
            assert_eq!(parse(text).unwrap(), number, "{text}");
        }
        for bad in ["", "0", "65", "NOPE", "SIG", "RTMAX+1", "-9"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
