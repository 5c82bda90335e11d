//! The system calls for which the libraries have no safe form: clone, execve, signalfd, kill with any
//! signal number, connecting over vsock. Raw calls and their safety reasons only; what they are used for is elsewhere.

use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::process::Pid;

/// `clone3(2)`; libc's constant of this name is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Random bytes that a clone gets: twice what the kernel's generator holds.
pub(crate) const ENTROPY_BYTES: usize = 64;

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Which side of a fork this is.
pub(crate) enum Fork {
    /// The process that forked, with its child.
    Parent(Pid),
    /// The new process.
    Child,
}

/// Makes a child with copied memory, in new namespaces (`CLONE_NEW...` flags) and, where given, in a
/// control group.
///
/// The agent has one thread, so the child may do whatever the parent may.
pub(crate) fn fork(namespaces: libc::c_int, cgroup: Option<BorrowedFd<'_>>) -> Result<Fork, Errno> {
    // SAFETY: clone_args is a plain record of integers, for which zeroes are valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = namespaces as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM and with no stack given this is fork(2): the child gets a copy of
    // this thread's stack and memory. No other thread exists whose locks the copy could hold.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<libc::clone_args>(),
        )
    };
    match pid {
        0 => Ok(Fork::Child),
        pid => i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .filter(|pid| pid.as_raw_nonzero().get() > 0)
            .map(Fork::Parent)
            .ok_or_else(last_error),
    }
}

/// Ends a child without running what the parent registered for its own exit.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Replaces the program; returns only where that fails.
pub(crate) fn execve(program: &CStr, arguments: &[CString], environment: &[CString]) -> Errno {
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([ptr::null()])
            .collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: both lists are terminated by a null pointer and point to strings that outlive the call.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    last_error()
}

/// Blocks SIGCHLD and gives a descriptor that becomes readable when a child has ended.
pub(crate) fn child_signals() -> Result<OwnedFd, Errno> {
    // SAFETY: the set is initialised by sigemptyset before it is read; the descriptor that
    // signalfd returns is new and owned by nobody else.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) != 0 {
            return Err(last_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(last_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Gives a child the signal mask and the dispositions that a program expects to start with: nothing
/// blocked, everything at its default (Rust's runtime ignores SIGPIPE).
pub(crate) fn reset_signals() {
    // SAFETY: the set is initialised before it is read, and SIG_DFL is a valid disposition.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, ptr::null_mut());
    }
}

/// Adds random bytes to the kernel's pool, credits them, and makes the kernel use them at once
/// (random(4)).
pub(crate) fn reseed(random: BorrowedFd<'_>, entropy: &[u8; ENTROPY_BYTES]) -> Result<(), Errno> {
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        buffer_bytes: libc::c_int,
        buffer: [u8; ENTROPY_BYTES],
    }
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203_u32 as libc::Ioctl;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
    let info = PoolInfo {
        entropy_bits: 8 * ENTROPY_BYTES as libc::c_int,
        buffer_bytes: ENTROPY_BYTES as libc::c_int,
        buffer: *entropy,
    };
    // SAFETY: RNDADDENTROPY reads a rand_pool_info, which PoolInfo is, with as many bytes as it
    // says it has; RNDRESEEDCRNG takes no argument.
    let done = unsafe {
        libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) == 0
            && libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) == 0
    };
    if done { Ok(()) } else { Err(last_error()) }
}

/// Lets the agent run before every process of the container, from the instant in which it has
/// something to do. Its children do not inherit that, sched_setscheduler(2).
pub(crate) fn run_first() -> Result<(), Errno> {
    // SAFETY: the parameter is a plain record that outlives the call; 0 is this thread.
    let set = unsafe {
        let mut parameter: libc::sched_param = std::mem::zeroed();
        parameter.sched_priority = 1;
        let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
        libc::sched_setscheduler(0, policy, &raw const parameter)
    };
    if set == 0 { Ok(()) } else { Err(last_error()) }
}

/// Sends a signal of any number (1..=64) to a process, to a group (negative), or to all (-1).
pub(crate) fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    if !(1..=64).contains(&signal) {
        return Err(Errno::INVAL);
    }
    // SAFETY: kill has no memory preconditions.
    if unsafe { libc::kill(pid, signal) } == 0 {
        Ok(())
    } else {
        Err(last_error())
    }
}

/// Closes every descriptor but the given ones and the three standard ones.
///
/// What owns a closed descriptor in this process must not be used or dropped any more.
pub(crate) fn close_all_but(kept: &[i32]) {
    let mut kept: Vec<u32> = kept
        .iter()
        .filter_map(|fd| u32::try_from(*fd).ok())
        .collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept.into_iter().filter(|fd| *fd >= 3).chain([u32::MAX]) {
        if fd > first {
            // SAFETY: descriptors are closed, memory is not touched; the caller does not use them.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1);
    }
}

/// Makes every descriptor from 3 on close when the program is replaced.
pub(crate) fn close_rest_on_exec() {
    // SAFETY: the call changes flags of descriptors only.
    unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        );
    }
}

/// Connects to a port of the host over vsock(7).
pub(crate) fn connect_host(port: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: socket takes three integers; what it returns, unless -1, is a descriptor of nobody else.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(last_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: sockaddr_vm is a plain record of integers, for which zeroes are valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    // SAFETY: the address is a whole sockaddr_vm, which outlives the call and is told with its size.
    let connected = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    match connected {
        0 => Ok(socket),
        _ => Err(last_error()),
    }
}
