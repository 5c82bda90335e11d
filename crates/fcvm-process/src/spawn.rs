//! Starting a helper: what it inherits and what ends it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;
use rustix::process::{PidfdFlags, Resource, Rlimit, Signal};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::helper::HelperProcess;

/// A helper about to be started.
///
/// The helper gets an empty environment, "/" as its directory and `/dev/null` as standard input and
/// output where nothing else is said, a pipe to the owner as standard error, the descriptors given with [`inherit`](Self::inherit) and no other, a
/// session of its own (so that Ctrl-C on the owner's terminal reaches the owner alone) and no core
/// dumps (they would hold guest memory).
///
/// The kernel kills it when the owner's *thread* that called [`spawn`](Self::spawn) ends
/// (`PR_SET_PDEATHSIG`, prctl(2)): call it on a thread that lives as long as the helper has to,
/// best the main thread.
#[derive(Debug)]
pub struct HelperCommand {
    role: &'static str,
    program: PathBuf,
    arguments: Vec<OsString>,
    inherited: Vec<OwnedFd>,
    no_new_privileges: bool,
    directory: PathBuf,
    stdout: Option<OwnedFd>,
    namespaces: Vec<OwnedFd>,
    new_pid_namespace: bool,
}

impl HelperCommand {
    /// `program` is a path, not looked up anywhere; `role` names the helper in logs and errors.
    pub fn new(role: &'static str, program: &Path) -> Self {
        Self {
            role,
            program: program.to_owned(),
            arguments: Vec::new(),
            inherited: Vec::new(),
            no_new_privileges: false,
            directory: PathBuf::from("/"),
            stdout: None,
            namespaces: Vec::new(),
            new_pid_namespace: false,
        }
    }

    /// Adds an argument.
    pub fn arg(&mut self, argument: impl Into<OsString>) -> &mut Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    pub fn args<A: Into<OsString>>(&mut self, arguments: impl IntoIterator<Item = A>) -> &mut Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Hands a descriptor over to the helper and returns the number it has there. The owner's side
    /// of it is closed when the helper has started.
    ///
    /// # Errors
    ///
    /// The descriptor is one of the standard three and could not be duplicated.
    pub fn inherit(&mut self, fd: OwnedFd) -> io::Result<RawFd> {
        // The number stays what it is in the owner, so numbers can not collide; only the standard
        // three are taken already.
        let fd = if fd.as_raw_fd() > 2 {
            fd
        } else {
            rustix::io::fcntl_dupfd_cloexec(&fd, 3)?
        };
        let number = fd.as_raw_fd();
        self.inherited.push(fd);
        Ok(number)
    }

    /// The helper and its children can gain no privileges through setuid programs.
    pub fn no_new_privileges(&mut self) -> &mut Self {
        self.no_new_privileges = true;
        self
    }

    /// The directory that the helper works in.
    pub fn directory(&mut self, path: &Path) -> &mut Self {
        path.clone_into(&mut self.directory);
        self
    }

    /// Where the helper's standard output goes.
    pub fn stdout(&mut self, fd: OwnedFd) -> &mut Self {
        self.stdout = Some(fd);
        self
    }

    /// Namespaces that the helper is in, entered in this order, setns(2): a user namespace comes before
    /// those that belong to it.
    pub fn namespaces(&mut self, namespaces: Vec<OwnedFd>) -> &mut Self {
        self.namespaces = namespaces;
        self
    }

    /// The helper is the first process of a new PID namespace, pid_namespaces(7): with its end all that it
    /// has started ends, whatever that has become. Needs root.
    pub fn new_pid_namespace(&mut self) -> &mut Self {
        self.new_pid_namespace = true;
        self
    }

    /// Starts the helper. Must be called within a tokio runtime, which reads its standard error.
    ///
    /// # Errors
    ///
    /// The program could not be started; [`io::ErrorKind::NotFound`] where it does not exist.
    pub fn spawn(self) -> io::Result<HelperProcess> {
        let (stderr_reader, stderr_writer) = io::pipe()?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(self.stdout.map_or_else(Stdio::null, Stdio::from))
            .stderr(stderr_writer);
        let owner = rustix::process::getpid();
        // Seen from anywhere, unlike a number.
        let owner_fd = rustix::process::pidfd_open(owner, PidfdFlags::empty())?;
        let setup = ChildSetup {
            owner: owner_fd.as_raw_fd(),
            inherited: self.inherited.iter().map(AsRawFd::as_raw_fd).collect(),
            namespaces: self.namespaces.iter().map(AsRawFd::as_raw_fd).collect(),
            no_new_privileges: self.no_new_privileges,
        };
        // SAFETY: `ChildSetup::run` makes system calls only: it takes no lock and allocates
        // nothing, which is what is allowed between fork and exec. The descriptors whose numbers
        // it uses are open: those of `self` and `owner_fd` live until the child has been started.
        unsafe {
            command.pre_exec(move || setup.run());
        }
        let child = match self.new_pid_namespace {
            true => NewPidNamespace::enter().and_then(|_namespace| command.spawn()),
            false => command.spawn(),
        }?;
        drop(command);
        HelperProcess::adopt(self.role, child, stderr_reader.into())
    }
}

/// While it is there, children of this thread begin a PID namespace.
struct NewPidNamespace {
    own: File,
}

impl NewPidNamespace {
    fn enter() -> io::Result<Self> {
        let own = File::open("/proc/thread-self/ns/pid")?;
        // SAFETY: this flag changes nothing of descriptors, and nothing of this process but which
        // namespace its next child is in.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
        Ok(Self { own })
    }
}

impl Drop for NewPidNamespace {
    fn drop(&mut self) {
        let own = self.own.as_fd();
        let kind = Some(LinkNameSpaceType::ProcessID);
        if let Err(errno) = rustix::thread::move_into_link_name_space(own, kind) {
            // No child could be started any more: the kernel takes the namespace's first one's end for
            // that of all.
            tracing::error!("cannot leave a PID namespace: {errno}");
        }
    }
}

/// What the child does between fork and exec.
struct ChildSetup {
    /// A pidfd.
    owner: RawFd,
    inherited: Vec<RawFd>,
    namespaces: Vec<RawFd>,
    no_new_privileges: bool,
}

impl ChildSetup {
    fn run(&self) -> io::Result<()> {
        for &number in &self.namespaces {
            // SAFETY: the caller of `run` promises that the number is an open descriptor.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::thread::move_into_link_name_space(fd, None)?;
        }
        // After that: a change of credentials takes the signal back.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The owner may have died before the line above; its death sends nothing then. A pidfd is
        // readable when its process has ended.
        // SAFETY: the caller of `run` promises that the number is an open descriptor.
        let owner = unsafe { BorrowedFd::borrow_raw(self.owner) };
        let mut owner = [PollFd::from_borrowed_fd(owner, PollFlags::IN)];
        if rustix::event::poll(&mut owner, Some(&Timespec::default()))? > 0 {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        rustix::process::setsid()?;
        rustix::process::setrlimit(
            Resource::Core,
            Rlimit {
                current: Some(0),
                maximum: Some(0),
            },
        )?;
        if self.no_new_privileges {
            rustix::thread::set_no_new_privs(true)?;
        }
        close_others_on_exec()?;
        for &number in &self.inherited {
            // SAFETY: the caller of `run` promises that the number is an open descriptor.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(fd.as_fd(), FdFlags::empty())?;
        }
        Ok(())
    }
}

/// Marks every descriptor but the standard three to be closed by exec, close_range(2).
fn close_others_on_exec() -> io::Result<()> {
    // SAFETY: close_range with CLOSE_RANGE_CLOEXEC takes three integers, touches no memory and
    // closes nothing now.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3 as libc::c_uint,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // Before Linux 5.11. Rust marks every descriptor it opens; what is missed are descriptors
        // that the owner itself inherited.
        Some(libc::ENOSYS | libc::EINVAL) => Ok(()),
        _ => Err(error),
    }
}
