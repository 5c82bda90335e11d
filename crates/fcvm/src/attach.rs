//! This process's own standard streams as the ends of a stream's channels.
//!
//! Reads and writes of terminals and pipes may block for ever, so threads do them; the asynchronous
//! side sees queues. Flow control bounds the queues: credit is given back when a write has happened.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;

use fcvm_types::guest::TerminalSize;
use fcvm_wire::Channel;
use rustix::termios::{OptionalActions, Termios};
use tokio::sync::mpsc;

/// Bytes of standard input read at once.
const READ_BYTES: usize = 32 * 1024;

/// Standard input, output and error of this process.
pub(crate) struct LocalIo {
    stdin: Option<mpsc::Receiver<Vec<u8>>>,
    stdout: std::sync::mpsc::Sender<Vec<u8>>,
    stderr: std::sync::mpsc::Sender<Vec<u8>>,
    written: mpsc::UnboundedReceiver<Written>,
    unwritten_bytes: usize,
    raw_mode: Option<RawMode>,
}

/// What a thread reports.
struct Written {
    channel: Channel,
    bytes: usize,
    broken: bool,
}

/// What happened on this side.
pub(crate) enum LocalEvent {
    /// Bytes were read from standard input.
    Stdin(Vec<u8>),
    /// Standard input has ended.
    StdinEnd,
    /// Bytes of a channel reached their reader: credit can be given.
    Taken(Channel, usize),
    /// Nobody reads that channel any more.
    Broken,
}

impl LocalIo {
    /// Takes over the standard streams; `raw` puts the terminal into raw mode until dropped.
    pub(crate) fn start(interactive: bool, raw: bool) -> anyhow::Result<Self> {
        let raw_mode = if raw && interactive {
            RawMode::enter()?
        } else {
            None
        };
        let (report, written) = mpsc::unbounded_channel();
        Ok(Self {
            stdin: interactive.then(spawn_stdin),
            stdout: spawn_output(Channel::Stdout, std::io::stdout(), report.clone()),
            stderr: spawn_output(Channel::Stderr, std::io::stderr(), report),
            written,
            unwritten_bytes: 0,
            raw_mode,
        })
    }

    /// Hands bytes to the writer of a channel.
    pub(crate) fn write(&mut self, channel: Channel, bytes: Vec<u8>) {
        self.unwritten_bytes += bytes.len();
        let writer = if channel == Channel::Stderr {
            &self.stderr
        } else {
            &self.stdout
        };
        // The threads live as long as their senders.
        let _ = writer.send(bytes);
    }

    /// What happens next; standard input is read only while `accept_stdin`.
    pub(crate) async fn next(&mut self, accept_stdin: bool) -> LocalEvent {
        let stdin = async {
            match &mut self.stdin {
                Some(stdin) if accept_stdin => stdin.recv().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some(written) = self.written.recv() => {
                self.unwritten_bytes -= written.bytes;
                if written.broken { LocalEvent::Broken } else { LocalEvent::Taken(written.channel, written.bytes) }
            }
            bytes = stdin => match bytes {
                Some(bytes) => LocalEvent::Stdin(bytes),
                None => {
                    self.stdin = None;
                    LocalEvent::StdinEnd
                }
            }
        }
    }

    /// Waits until all that was handed over is written, and restores the terminal.
    pub(crate) async fn finish(mut self) {
        while self.unwritten_bytes > 0 {
            let Some(written) = self.written.recv().await else {
                break;
            };
            self.unwritten_bytes -= written.bytes;
        }
        self.raw_mode = None;
    }
}

fn spawn_stdin() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(2);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin();
        loop {
            let mut buffer = vec![0; READ_BYTES];
            match stdin.read(&mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    buffer.truncate(length);
                    if sender.blocking_send(buffer).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}

fn spawn_output(
    channel: Channel,
    mut output: impl Write + Send + 'static,
    report: mpsc::UnboundedSender<Written>,
) -> std::sync::mpsc::Sender<Vec<u8>> {
    let (sender, receiver) = std::sync::mpsc::channel::<Vec<u8>>();
    std::thread::spawn(move || {
        let mut broken = false;
        for bytes in receiver {
            if !broken {
                broken = output
                    .write_all(&bytes)
                    .and_then(|()| output.flush())
                    .is_err();
            }
            if report
                .send(Written {
                    channel,
                    bytes: bytes.len(),
                    broken,
                })
                .is_err()
            {
                return;
            }
        }
    });
    sender
}

/// The terminal in raw mode.
struct RawMode(Termios);

impl RawMode {
    /// `None` when standard input is no terminal.
    fn enter() -> anyhow::Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = rustix::termios::tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ =
            rustix::termios::tcsetattr(std::io::stdin().as_fd(), OptionalActions::Flush, &self.0);
    }
}

/// The size of the terminal that this process writes to, else 24 x 80.
pub(crate) fn terminal_size() -> TerminalSize {
    let size = rustix::termios::tcgetwinsize(std::io::stdout().as_fd())
        .or_else(|_| rustix::termios::tcgetwinsize(std::io::stdin().as_fd()));
    match size {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => TerminalSize {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        _ => TerminalSize {
            rows: 24,
            columns: 80,
        },
    }
}
