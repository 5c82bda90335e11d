//! Programs that a test starts: output collected as it comes, waits that end.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How long a test waits for anything that has to happen. Far more than it takes: this only turns a
/// hang into a failure that says what was waited for. `FCVM_TEST_LIMIT` has the seconds for a host that is slow.
pub(crate) fn limit() -> Duration {
    const USUAL: Duration = Duration::from_secs(240);
    std::env::var("FCVM_TEST_LIMIT").map_or(USUAL, |seconds| {
        let seconds = seconds.parse();
        Duration::from_secs(seconds.expect("FCVM_TEST_LIMIT is a number of seconds"))
    })
}

/// How a program ended, and what it wrote.
#[derive(Debug)]
pub(crate) struct Output {
    /// Exit code; 128 + N when signal N ended it.
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Output {
    /// Standard output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// What came out of a pipe or terminal so far.
#[derive(Clone, Default)]
pub(crate) struct Collected(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

impl Collected {
    /// Reads to the end in a thread.
    pub(crate) fn from(mut source: impl Read + Send + 'static) -> Self {
        let collected = Self::default();
        let writer = collected.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                // A terminal whose other side is closed gives an error at its end.
                let length = source.read(&mut buffer).unwrap_or(0);
                // A test that failed while it looked is no reason to stop reading.
                let mut state = writer.0.0.lock().unwrap_or_else(PoisonError::into_inner);
                state.bytes.extend_from_slice(&buffer[..length]);
                state.ended = length == 0;
                writer.0.1.notify_all();
                if length == 0 {
                    return;
                }
            }
        });
        collected
    }

    fn wait(&self, what: &str, mut done: impl FnMut(&State) -> bool) -> Vec<u8> {
        let (state, changed) = &*self.0;
        let (state, wait) = changed
            .wait_timeout_while(state.lock().unwrap(), limit(), |state| !done(state))
            .unwrap();
        let tail = &state.bytes[state.bytes.len().saturating_sub(4000)..];
        assert!(
            !wait.timed_out(),
            "waited in vain for {what}; the output ends with:\n{}",
            String::from_utf8_lossy(tail)
        );
        state.bytes.clone()
    }

    /// Waits until the text has come.
    pub(crate) fn wait_for(&self, text: &str) -> String {
        let found = |state: &State| {
            let found = state
                .bytes
                .windows(text.len())
                .any(|part| part == text.as_bytes());
            assert!(
                found || !state.ended,
                "the output ended without {text:?}:\n{}",
                String::from_utf8_lossy(&state.bytes)
            );
            found
        };
        let bytes = self.wait(&format!("{text:?}"), found);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits for the end.
    pub(crate) fn wait_for_end(&self) -> Vec<u8> {
        self.wait("the end of the output", |state| state.ended)
    }

    /// Something has come.
    pub(crate) fn has_begun(&self) -> bool {
        !self.0.0.lock().unwrap().bytes.is_empty()
    }

    /// Forgets what came so far.
    pub(crate) fn clear(&self) {
        self.0.0.lock().unwrap().bytes.clear();
    }
}

/// A program that runs.
pub(crate) struct Running {
    child: Child,
    pub(crate) stdin: Option<ChildStdin>,
    pub(crate) stdout: Collected,
    pub(crate) stderr: Collected,
    shown: String,
}

impl Running {
    /// Starts a program with its output collected and its input a pipe.
    pub(crate) fn start(mut command: Command) -> Self {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let shown = format!("{command:?}");
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{shown}: {error}"));
        Self {
            stdin: child.stdin.take(),
            stdout: Collected::from(child.stdout.take().unwrap()),
            stderr: Collected::from(child.stderr.take().unwrap()),
            child,
            shown,
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Writes to its standard input.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("standard input is open");
        stdin.write_all(bytes).and_then(|()| stdin.flush()).unwrap();
    }

    /// Closes its standard input and waits for its end.
    pub(crate) fn finish(mut self) -> Output {
        self.stdin = None;
        self.wait()
    }

    /// Waits for its end.
    pub(crate) fn wait(mut self) -> Output {
        let code = code(wait_for_child(&mut self.child, &self.shown));
        let stderr = String::from_utf8_lossy(&self.stderr.wait_for_end()).into_owned();
        Output {
            code,
            stdout: self.stdout.wait_for_end(),
            stderr,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A failing test must not leave it; one that was waited for is gone.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Waits for the end of a child.
pub(crate) fn wait_for_child(child: &mut Child, shown: &str) -> ExitStatus {
    if !wait_gone(Pid::from_child(child)) {
        let _ = child.kill();
        let _ = child.wait();
        panic!("waited in vain for the end of {shown}");
    }
    child.wait().unwrap()
}

/// The exit code as a shell has it.
pub(crate) fn code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap())
}

/// Runs a program with `input` to its end.
pub(crate) fn run_with_input(command: Command, input: &[u8]) -> Output {
    let mut running = Running::start(command);
    let mut stdin = running.stdin.take().unwrap();
    std::thread::scope(|scope| {
        // The program may end without having read it all.
        scope.spawn(move || {
            let _ = stdin.write_all(input);
        });
        running.wait()
    })
}

/// Runs a program without input to its end.
pub(crate) fn run(mut command: Command) -> Output {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let shown = format!("{command:?}");
    let mut child = command
        .spawn()
        .unwrap_or_else(|error| panic!("{shown}: {error}"));
    let stdout = Collected::from(child.stdout.take().unwrap());
    let stderr = Collected::from(child.stderr.take().unwrap());
    let code = code(wait_for_child(&mut child, &shown));
    let stderr = String::from_utf8_lossy(&stderr.wait_for_end()).into_owned();
    Output {
        code,
        stdout: stdout.wait_for_end(),
        stderr,
    }
}

/// Runs a tool of the host that has to succeed.
pub(crate) fn must(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments);
    let output = run(command);
    assert!(output.code == 0, "{program} {arguments:?}: {output:?}");
    output
}

/// Waits until a process is gone (or is a zombie); `false` after the time limit.
pub(crate) fn wait_gone(pid: Pid) -> bool {
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return true;
    };
    let deadline = Instant::now() + limit();
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).unwrap();
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.unwrap() > 0,
        }
    }
}
