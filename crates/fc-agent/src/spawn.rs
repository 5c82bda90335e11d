//! Starting processes: the container's first one, further ones in its namespaces, and helpers of
//! the agent's own. The parent's side prepares descriptors; the child's side ends in the
//! workload's program, or in a report of what failed.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use fcvm_types::guest::{GuestPlan, ProcessPlan, TerminalSize};
use fcvm_wire::{Failure, Outcome};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use rustix::thread::ThreadNameSpaceType;

use crate::command::{Command, variable};
use crate::container::Container;
use crate::failure::{Context, bad_request, guest};
use crate::rootfs::{self, RootOptions};
use crate::sys::{self, Fork};
use crate::{privileges, users};

/// Largest passwd or group file that is read.
const MAX_USERS_BYTES: u64 = 4 * 1024 * 1024;

/// The parent's side of a new process.
pub(crate) struct Spawned {
    /// Its id in the agent's namespace.
    pub(crate) pid: Pid,
    /// Ends when the program runs or the process is gone; what it holds tells what went wrong.
    pub(crate) report: OwnedFd,
    /// Where its input goes; non-blocking.
    pub(crate) stdin: Option<OwnedFd>,
    /// Where its output comes from; non-blocking.
    pub(crate) stdout: Option<OwnedFd>,
    /// Where its error output comes from; non-blocking.
    pub(crate) stderr: Option<OwnedFd>,
    /// The three are one terminal.
    pub(crate) terminal: bool,
}

/// Standard descriptors: the parent's ends and the child's.
struct Stdio {
    parent: [Option<OwnedFd>; 3],
    child: [OwnedFd; 3],
    terminal: bool,
}

impl Stdio {
    fn pipes(stdin: bool) -> Result<Self, Errno> {
        let (input, ours) = if stdin {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            (read, Some(nonblocking(write)?))
        } else {
            (open_null()?, None)
        };
        let (stdout, output) = pipe_with(PipeFlags::CLOEXEC)?;
        let (stderr, error) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok(Self {
            parent: [ours, Some(nonblocking(stdout)?), Some(nonblocking(stderr)?)],
            child: [input, output, error],
            terminal: false,
        })
    }

    /// A terminal of the container's devpts instance, and its name there.
    fn terminal(terminals: &OwnedFd, size: TerminalSize) -> Result<(Self, String), Errno> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let master = rustix::fs::openat(terminals, "ptmx", flags, Mode::empty())?;
        rustix::pty::unlockpt(&master)?;
        set_terminal_size(&master, size)?;
        let name = rustix::pty::ptsname(&master, Vec::new())?;
        let name = name.to_string_lossy().replace("/dev/pts/", "");
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
        let master = nonblocking(master)?;
        let stdio = Self {
            parent: [Some(master.try_clone().map_err(errno)?), Some(master), None],
            child: [
                slave.try_clone().map_err(errno)?,
                slave.try_clone().map_err(errno)?,
                slave,
            ],
            terminal: true,
        };
        Ok((stdio, name))
    }

    fn open(plan: &ProcessPlan, terminals: &OwnedFd) -> Result<(Self, Option<String>), Failure> {
        match plan.terminal {
            Some(size) => Self::terminal(terminals, size)
                .map(|(stdio, name)| (stdio, Some(name)))
                .context("opening a terminal"),
            None => Self::pipes(plan.stdin)
                .map(|stdio| (stdio, None))
                .context("opening pipes"),
        }
    }

    /// The child's three become its standard descriptors.
    fn install(&self) -> Result<(), Errno> {
        let [stdin, stdout, stderr] = &self.child;
        rustix::stdio::dup2_stdin(stdin)?;
        rustix::stdio::dup2_stdout(stdout)?;
        rustix::stdio::dup2_stderr(stderr)
    }

    fn into_spawned(self, pid: Pid, report: OwnedFd) -> Spawned {
        let [stdin, stdout, stderr] = self.parent;
        Spawned {
            pid,
            report,
            stdin,
            stdout,
            stderr,
            terminal: self.terminal,
        }
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn nonblocking(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

fn open_null() -> Result<OwnedFd, Errno> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// Sets a terminal's size.
pub(crate) fn set_terminal_size(terminal: impl AsFd, size: TerminalSize) -> Result<(), Errno> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    rustix::termios::tcsetwinsize(terminal, size)
}

/// A devpts instance of the container's own, not mounted anywhere yet.
pub(crate) fn new_terminals() -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen("devpts", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")] {
        rustix::mount::fsconfig_set_string(&context, key, value)?;
    }
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Starts the container's first process, in new namespaces.
pub(crate) fn first_process(
    plan: &GuestPlan,
    cgroup: &OwnedFd,
) -> Result<(Spawned, OwnedFd, OwnedFd), Failure> {
    let terminals = new_terminals().context("making the container's terminals")?;
    let (stdio, console) = Stdio::open(&plan.process, &terminals)?;
    let (report, write) = pipe_with(PipeFlags::CLOEXEC).context("opening a pipe")?;
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWCGROUP;
    let fork = sys::fork(namespaces, Some(cgroup.as_fd())).context("starting the container")?;
    let Fork::Parent(pid) = fork else {
        let options = RootOptions {
            read_only: plan.read_only,
            privileged: plan.privileged,
            terminals,
            console,
        };
        child(&write, || {
            let _ = std::fs::write("/proc/self/oom_score_adj", "0");
            rootfs::enter(&options)?;
            execute(&plan.process, plan.privileged, &stdio, &write)
        });
    };
    let pidfd =
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).context("watching the container")?;
    let report = nonblocking(report).context("opening a pipe")?;
    Ok((stdio.into_spawned(pid, report), pidfd, terminals))
}

/// Starts another process in the container's namespaces.
pub(crate) fn further_process(
    plan: &ProcessPlan,
    container: &Container,
) -> Result<Spawned, Failure> {
    let (stdio, _) = Stdio::open(plan, &container.terminals)?;
    let (report, write) = pipe_with(PipeFlags::CLOEXEC).context("opening a pipe")?;
    let fork = container.fork_inside()?;
    let Fork::Parent(pid) = fork else {
        child(&write, || {
            container.join()?;
            execute(plan, container.privileged, &stdio, &write)
        });
    };
    let report = nonblocking(report).context("opening a pipe")?;
    Ok(stdio.into_spawned(pid, report))
}

/// What a helper works with.
pub(crate) struct HelperIo {
    /// The stream's input.
    pub(crate) stdin: Option<File>,
    /// The stream's output.
    pub(crate) stdout: Option<File>,
}

/// Runs a function of the agent in a process of its own; its outcome comes through the report.
///
/// The helper may live long, so of the agent's descriptors it has none but `kept`: a pipe that it held
/// open would hide the end of another stream.
pub(crate) fn helper(
    stdin: bool,
    stdout: bool,
    kept: Option<&OwnedFd>,
    work: impl FnOnce(HelperIo) -> Outcome,
) -> Result<Spawned, Failure> {
    let pipe = |wanted: bool| match wanted {
        true => pipe_with(PipeFlags::CLOEXEC).map(Some),
        false => Ok(None),
    };
    let input = pipe(stdin).context("opening a pipe")?;
    let output = pipe(stdout).context("opening a pipe")?;
    let (report, write) = pipe_with(PipeFlags::CLOEXEC).context("opening a pipe")?;
    let Fork::Parent(pid) = sys::fork(0, None).context("starting a helper")? else {
        sys::reset_signals();
        let _ = std::fs::write("/proc/self/oom_score_adj", "0");
        let stdin = input.map(|(read, _)| File::from(read));
        let stdout = output.map(|(_, write)| File::from(write));
        drop(report);
        let own = [stdin.as_ref(), stdout.as_ref()];
        let kept: Vec<_> = own
            .into_iter()
            .flatten()
            .map(AsRawFd::as_raw_fd)
            .chain(kept.map(AsRawFd::as_raw_fd))
            .chain([write.as_raw_fd()])
            .collect();
        sys::close_all_but(&kept);
        let outcome = work(HelperIo { stdin, stdout });
        let bytes = serde_json::to_vec(&outcome).unwrap_or_default();
        let _ = std::io::Write::write_all(&mut File::from(write), &bytes);
        sys::exit_now(0);
    };
    let ours = |fd: Option<OwnedFd>| fd.map(nonblocking).transpose().context("opening a pipe");
    Ok(Spawned {
        pid,
        report: nonblocking(report).context("opening a pipe")?,
        stdin: ours(input.map(|(_, write)| write))?,
        stdout: ours(output.map(|(read, _)| read))?,
        stderr: None,
        terminal: false,
    })
}

/// The child's side: does the work, which ends in another program, or reports why not.
fn child(report: &OwnedFd, work: impl FnOnce() -> Result<Failure, Failure>) -> ! {
    sys::reset_signals();
    let failure = match work() {
        Ok(failure) | Err(failure) => failure,
    };
    let bytes = serde_json::to_vec(&failure).unwrap_or_default();
    let _ = rustix::io::write(report, &bytes);
    sys::exit_now(127)
}

/// From the container's namespaces on to the program. Gives the failure of `execve`.
fn execute(
    plan: &ProcessPlan,
    privileged: bool,
    stdio: &Stdio,
    report: &OwnedFd,
) -> Result<Failure, Failure> {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    rustix::io::write(report, &pid.to_le_bytes()).context("reporting the process")?;
    rustix::process::setsid().context("starting a session")?;
    stdio
        .install()
        .context("installing the standard descriptors")?;
    let identity = identify(&plan.user)?;
    if stdio.terminal {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).context("taking the terminal")?;
        let owner = rustix::fs::Uid::from_raw(identity.uid);
        rustix::fs::fchown(rustix::stdio::stdin(), Some(owner), None)
            .context("taking the terminal")?;
    }
    let mut environment = plan.env.clone();
    if variable(&environment, "HOME").is_none_or(str::is_empty) {
        environment.push(format!("HOME={}", identity.home));
    }
    if stdio.terminal && variable(&environment, "TERM").is_none() {
        environment.push("TERM=xterm".into());
    }
    let command = Command::new(&plan.args, &environment)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rootfs::enter_working_directory(&plan.cwd)?;
    privileges::limit_resources(&privileges::default_limits())?;
    privileges::limit_resources(&plan.rlimits)?;
    become_user(&identity, &plan.capabilities, privileged)?;
    if plan.no_new_privileges {
        rustix::thread::set_no_new_privs(true).context("giving up new privileges")?;
    }
    sys::close_rest_on_exec();
    Ok(command.execute())
}

fn become_user(
    identity: &users::Identity,
    capabilities: &[String],
    privileged: bool,
) -> Result<(), Failure> {
    let mask = privileges::capability_mask(capabilities)?;
    if !privileged {
        privileges::bound_capabilities(mask)?;
    }
    let group = rustix::fs::Gid::from_raw(identity.gid);
    let groups: Vec<_> = identity
        .groups
        .iter()
        .map(|gid| rustix::fs::Gid::from_raw(*gid))
        .collect();
    let user = rustix::fs::Uid::from_raw(identity.uid);
    let what = "becoming the container's user";
    rustix::thread::set_thread_groups(&groups).context(what)?;
    rustix::thread::set_thread_res_gid(group, group, group).context(what)?;
    rustix::thread::set_thread_res_uid(user, user, user).context(what)?;
    if identity.uid == 0 && !privileged {
        privileges::keep_capabilities(mask)?;
    }
    Ok(())
}

/// Looks the user up in the container's own files.
fn identify(user: &str) -> Result<users::Identity, Failure> {
    let passwd = read_users("/etc/passwd")?;
    let group = read_users("/etc/group")?;
    users::resolve(user, &passwd, &group).map_err(bad_request)
}

/// Text of a file of users; empty where there is none. Other than regular files are not read.
pub(crate) fn read_users(path: &str) -> Result<String, Failure> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(String::new()),
        Err(errno) => return Err(errno).context(&format!("opening the container's {path}")),
    };
    let metadata = file.metadata().context("reading the container's users")?;
    if !metadata.is_file() || metadata.len() > MAX_USERS_BYTES {
        return Err(guest(format!(
            "the container's {path} is no ordinary file of users"
        )));
    }
    let mut bytes = Vec::new();
    file.take(MAX_USERS_BYTES)
        .read_to_end(&mut bytes)
        .context(&format!("reading the container's {path}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Namespaces of the container that a further process joins besides the one for process ids.
pub(crate) fn joined_namespaces() -> ThreadNameSpaceType {
    ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::CONTROL_GROUP
}
