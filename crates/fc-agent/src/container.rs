//! The running container: what the agent keeps to reach into it.

use std::os::fd::{AsFd, OwnedFd};

use fcvm_types::guest::{GuestIdentity, GuestPlan};
use fcvm_wire::Failure;
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
