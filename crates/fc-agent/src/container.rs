//! The running container: what the agent keeps to reach into it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use fcvm_types::guest::{GuestIdentity, GuestPlan};
use fcvm_wire::Failure;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::process::Pid;
use rustix::thread::{
    LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces,
};

use crate::failure::{Context, guest};
use crate::spawn::{self, Spawned};
use crate::sys::{self, Fork};
use crate::{console, disks, files, network};

const CGROUP: &str = "/cgroup";
/// How long the container's processes are waited for that are to stand still.
const FREEZE_LIMIT: Duration = Duration::from_secs(1);

/// The container after its first process has been started.
pub(crate) struct Container {
    /// Its first process, in the agent's namespace.
    pub(crate) pid: Pid,
    /// The same process: where its namespaces are found.
    pub(crate) pidfd: OwnedFd,
    /// Its devpts instance.
    pub(crate) terminals: OwnedFd,
    /// It runs with all capabilities.
    pub(crate) privileged: bool,
    /// Its first process has ended, and with it all others.
    pub(crate) ended: bool,
    /// Its processes stand still.
    frozen: bool,
    own_processes: OwnedFd,
    cgroup: OwnedFd,
}

impl Container {
    /// Sets the guest up as planned and starts the first process.
    pub(crate) fn start(plan: &GuestPlan) -> Result<(Self, Spawned), Failure> {
        set_clock(plan.realtime_ns)?;
        let identity = &plan.identity;
        set_host_name(identity)?;
        disks::mount_container(plan.read_only)?;
        files::write(identity)?;
        network::configure(identity.network.as_ref())?;
        let cgroup = make_cgroup()?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let own_processes = rustix::fs::open("/proc/self/ns/pid", flags, Mode::empty())
            .context("opening the agent's namespace")?;
        let (spawned, pidfd, terminals) = spawn::first_process(plan, &cgroup)?;
        let container = Self {
            pid: spawned.pid,
            pidfd,
            terminals,
            privileged: plan.privileged,
            ended: false,
            frozen: false,
            own_processes,
            cgroup,
        };
        Ok((container, spawned))
    }

    /// Forks a child of the agent that is a process of the container's PID namespace.
    ///
    /// A PID namespace is entered by children only (setns(2)), so the agent itself enters it for
    /// the moment of the fork.
    pub(crate) fn fork_inside(&self) -> Result<Fork, Failure> {
        self.check_running()?;
        move_into_thread_name_spaces(self.pidfd.as_fd(), ThreadNameSpaceType::PROCESS_ID)
            .context("entering the container")?;
        // A privileged container may have made its control group one that takes no processes.
        let fork = sys::fork(0, Some(self.cgroup.as_fd())).or_else(|_| sys::fork(0, None));
        if matches!(fork, Ok(Fork::Child)) {
            return fork.context("starting a process");
        }
        let own = LinkNameSpaceType::ProcessID;
        if let Err(errno) = move_into_link_name_space(self.own_processes.as_fd(), Some(own)) {
            // Cannot happen: the namespace is the agent's. Helpers would be visible inside.
            console::limited(&format!(
                "the agent's namespace cannot be restored: {errno}"
            ));
        }
        fork.context("starting a process")
    }

    /// Enters the container's other namespaces; called in a child.
    pub(crate) fn join(&self) -> Result<(), Failure> {
        let _ = std::fs::write("/proc/self/oom_score_adj", "0");
        move_into_thread_name_spaces(self.pidfd.as_fd(), spawn::joined_namespaces())
            .context("entering the container")
    }

    /// Makes the container's root "/" of a helper: in its own mount namespace while it runs, in
    /// what its overlay holds afterwards. Called in a child.
    pub(crate) fn enter_files(&self) -> Result<(), Failure> {
        let what = "entering the container's files";
        if self.ended {
            rustix::process::chroot(disks::CONTAINER).context(what)?;
            return rustix::process::chdir("/").context(what);
        }
        move_into_thread_name_spaces(self.pidfd.as_fd(), ThreadNameSpaceType::MOUNT).context(what)
    }

    /// A failure where the container has ended.
    pub(crate) fn check_running(&self) -> Result<(), Failure> {
        if self.ended {
            return Err(guest("the container has ended"));
        }
        Ok(())
    }

    /// Stops all of its processes, and waits until they stand still. One that waits for a device cannot
    /// stop, and is not waited for long: it cannot do anything else either.
    pub(crate) fn freeze(&mut self) -> Result<(), Failure> {
        if self.ended {
            return Ok(());
        }
        self.frozen = true;
        let what = "stopping the container's processes";
        let events = openat(&self.cgroup, "cgroup.events", OFlags::RDONLY).context(what)?;
        self.write_freezer(b"1").context(what)?;
        let deadline = Instant::now() + FREEZE_LIMIT;
        loop {
            let mut text = [0_u8; 128];
            let length = rustix::io::pread(&events, &mut text, 0).context(what)?;
            if text[..length].windows(8).any(|part| part == b"frozen 1") {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(guest(
                    "some of the container's processes cannot be stopped now",
                ));
            }
            let left = Timespec::try_from(left).ok();
            let mut polled = [PollFd::new(&events, PollFlags::PRI)];
            poll(&mut polled, left.as_ref()).context(what)?;
        }
    }

    /// Lets them go on, where they were stopped.
    pub(crate) fn thaw(&mut self) -> Result<(), Failure> {
        if !std::mem::take(&mut self.frozen) {
            return Ok(());
        }
        self.write_freezer(b"0")
            .context("letting the container's processes go on")
    }

    fn write_freezer(&self, state: &[u8]) -> Result<(), Errno> {
        let freezer = openat(&self.cgroup, "cgroup.freeze", OFlags::WRONLY)?;
        rustix::io::write(&freezer, state).map(drop)
    }

    /// Sends a signal to the first process, or to all.
    pub(crate) fn signal(&self, signal: i32, all: bool) -> Result<(), Failure> {
        self.check_running()?;
        if all && let Fork::Child = self.fork_inside()? {
            // All others that this process can see; the first one follows from outside.
            let _ = sys::kill(-1, signal);
            sys::exit_now(0);
        }
        match sys::kill(self.pid.as_raw_nonzero().get(), signal) {
            Err(Errno::INVAL) => Err(crate::failure::bad_request(format!(
                "there is no signal {signal}"
            ))),
            result => result.context("sending the signal"),
        }
    }
}

fn openat(directory: &OwnedFd, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(directory, name, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Sets the host name of the UTS namespace that the agent is in.
pub(crate) fn set_host_name(identity: &GuestIdentity) -> Result<(), Failure> {
    rustix::system::sethostname(identity.hostname.as_bytes()).context("setting the host name")
}

/// Sets the realtime clock.
pub(crate) fn set_clock(realtime_ns: u64) -> Result<(), Failure> {
    const SECOND_NS: u64 = 1_000_000_000;
    let time = rustix::time::Timespec {
        tv_sec: (realtime_ns / SECOND_NS).cast_signed(),
        tv_nsec: (realtime_ns % SECOND_NS).cast_signed(),
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, time).context("setting the clock")
}

/// The control group that is the root of the container's own hierarchy.
fn make_cgroup() -> Result<OwnedFd, Failure> {
    let what = "making the container's control group";
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("cgroup2", CGROUP, "cgroup2", flags, None).context(what)?;
    let path = format!("{CGROUP}/container");
    rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755)).context(what)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(&path, flags, Mode::empty()).context(what)
}
