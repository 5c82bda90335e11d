//! The kernel's side of userfaultfd: ioctl_userfaultfd(2) with safe signatures, and who is at the other
//! end of a socket.
//!
//! Numbers and structures are those of `linux-raw-sys`. What is done with faults is decided elsewhere.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use linux_raw_sys::general as abi;
use linux_raw_sys::ioctl;
use rustix::io::{Errno, ReadWriteFlags};

/// `_IO(USERFAULTFD_IOC, 0)`: a new userfaultfd by /dev/userfaultfd (Linux 6.1).
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
/// The device that gives userfaultfds to whom its mode allows.
const DEVICE: &str = "/dev/userfaultfd";
/// What /proc shows of a descriptor that is one.
const LINK: &str = "anon_inode:[userfaultfd]";
/// `struct uffd_msg`
const MESSAGE_BYTES: usize = size_of::<abi::uffd_msg>();
/// Events that are read at a time.
const EVENTS_MAX: usize = 64;
/// Socket option: a pidfd of the peer (Linux 6.5).
const SO_PEERPIDFD: libc::c_int = 77;

/// What the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A thread waits for the page of this address.
    Fault { address: u64 },
    /// The range has been discarded or unmapped: it reads as zeros from now on.
    Removed { start: u64, end: u64 },
    /// Something that nobody should have asked the kernel to tell.
    Other { event: u8 },
}

/// Room for events.
pub(super) struct EventBuffer([u8; EVENTS_MAX * MESSAGE_BYTES]);

impl EventBuffer {
    pub(super) fn new() -> Self {
        Self([0; EVENTS_MAX * MESSAGE_BYTES])
    }
}

/// Which faults a new userfaultfd tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// All of them, also those of the kernel on behalf of the process, as KVM's are: root, access to
    /// /dev/userfaultfd, or the sysctl vm.unprivileged_userfaultfd.
    All,
    /// Those of the process's own instructions: any user.
    OfUserMode,
}

/// When those who wait for pages are woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wake {
    /// As soon as the pages are there.
    Now,
    /// By a call of its own.
    Later,
}

/// A userfaultfd, never blocking.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Makes a new one for the memory of this process, which tells of removed ranges.
    ///
    /// # Errors
    ///
    /// The user may not, or the kernel has none.
    pub fn create(faults: Faults) -> io::Result<Self> {
        let mut flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        if faults == Faults::OfUserMode {
            flags |= abi::UFFD_USER_MODE_ONLY.cast_signed();
        }
        let number = match File::options().read(true).write(true).open(DEVICE) {
            // SAFETY: the argument of this request is a number, and nothing is written.
            Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) },
            Err(_) => {
                // SAFETY: the call takes a number.
                let number = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
                i32::try_from(number).unwrap_or(-1)
            }
        };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it for us.
        let own = Self(unsafe { OwnedFd::from_raw_fd(number) });
        let mut api = abi::uffdio_api {
            api: u64::from(abi::UFFD_API),
            features: u64::from(abi::UFFD_FEATURE_EVENT_REMOVE),
            ioctls: 0,
        };
        // SAFETY: the argument is the request's own structure.
        unsafe { own.ioctl(ioctl::UFFDIO_API, &mut api) }?;
        Ok(own)
    }

    /// Takes one that another process has sent.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub(super) fn adopt(fd: OwnedFd) -> io::Result<Self> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if link.as_os_str() != LINK {
            return Err(io::Error::other(format!(
                "the descriptor is {}, no userfaultfd",
                link.display()
            )));
        }
        // poll(2) reports an error of one that blocks.
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self(fd))
    }

    /// A descriptor of it, to send.
    pub(super) fn as_sent(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Has faults on missing pages of a range told.
    ///
    /// # Safety
    ///
    /// Whoever has a descriptor of this userfaultfd can fill the missing pages of the range. It must be
    /// memory that no safe code takes for its own: of a mapping made for this.
    ///
    /// # Errors
    ///
    /// The range is not in whole pages of one kind of memory, or another one has it.
    pub(super) unsafe fn register(&self, start: u64, bytes: u64) -> io::Result<()> {
        let mut argument = abi::uffdio_register {
            range: range(start, bytes),
            mode: u64::from(abi::UFFDIO_REGISTER_MODE_MISSING),
            ioctls: 0,
        };
        // SAFETY: the argument is the request's own structure.
        Ok(unsafe { self.ioctl(ioctl::UFFDIO_REGISTER, &mut argument) }?)
    }

    /// Reads what has happened, without waiting.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(super) fn read(
        &self,
        buffer: &mut EventBuffer,
        mut take: impl FnMut(Event),
    ) -> Result<usize, Errno> {
        // Not even where the other process has made it one that waits (Linux 6.10).
        let mut rooms = [IoSliceMut::new(&mut buffer.0)];
        let read = match rustix::io::preadv2(&self.0, &mut rooms, u64::MAX, ReadWriteFlags::NOWAIT)
        {
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::SPIPE) => {
                rustix::io::read(&self.0, &mut buffer.0)
            }
            read => read,
        };
        let length = match read {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(errno) => return Err(errno),
        };
        let messages = buffer.0[..length].as_chunks::<MESSAGE_BYTES>().0;
        for message in messages {
            take(decode(message));
        }
        Ok(messages.len())
    }

    /// Fills missing pages with these bytes and wakes who waits for them, now or by [`wake`](Self::wake).
    /// Says how many bytes were filled: all, or those before a page that could not be.
    ///
    /// # Errors
    ///
    /// `EEXIST`: the first page is there; `EAGAIN`: an event must be read before; `ESRCH`: the process
    /// has gone; others of ioctl_userfaultfd(2).
    pub(super) fn copy(&self, address: u64, bytes: &[u8], wake: Wake) -> Result<u64, Errno> {
        let length = bytes.len() as u64;
        let mut argument = abi::uffdio_copy {
            dst: address,
            src: bytes.as_ptr() as u64,
            len: length,
            mode: match wake {
                Wake::Now => 0,
                Wake::Later => u64::from(abi::UFFDIO_COPY_MODE_DONTWAKE),
            },
            copy: 0,
        };
        // SAFETY: the argument is the request's own structure; `src` and `len` are a slice that
        // outlives the call and is only read. What is written is missing pages of a range that its
        // owner has registered for this.
        let done = unsafe { self.ioctl(ioctl::UFFDIO_COPY, &mut argument) };
        filled(done, argument.copy, length)
    }

    /// Fills missing pages of registered memory, for measurements of what that takes.
    ///
    /// # Errors
    ///
    /// They are there, or not registered.
    pub fn fill(&self, address: u64, bytes: &[u8]) -> io::Result<u64> {
        Ok(self.copy(address, bytes, Wake::Now)?)
    }

    /// Fills missing pages with zeros and wakes who waits for them; as [`copy`](Self::copy) otherwise.
    pub(super) fn zero(&self, address: u64, length: u64, wake: Wake) -> Result<u64, Errno> {
        let mut argument = abi::uffdio_zeropage {
            range: range(address, length),
            mode: match wake {
                Wake::Now => 0,
                Wake::Later => u64::from(abi::UFFDIO_ZEROPAGE_MODE_DONTWAKE),
            },
            zeropage: 0,
        };
        // SAFETY: as for `copy`.
        let done = unsafe { self.ioctl(ioctl::UFFDIO_ZEROPAGE, &mut argument) };
        filled(done, argument.zeropage, length)
    }

    /// Wakes who waits for pages of a range, to look again.
    pub(super) fn wake(&self, address: u64, length: u64) -> Result<(), Errno> {
        let mut argument = range(address, length);
        // SAFETY: the argument is the request's own structure.
        unsafe { self.ioctl(ioctl::UFFDIO_WAKE, &mut argument) }
    }

    /// # Safety
    ///
    /// `argument` is what the request takes.
    unsafe fn ioctl<T>(&self, request: u32, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: the caller's.
        let done = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                request as libc::Ioctl,
                std::ptr::from_mut(argument),
            )
        };
        match done {
            0.. => Ok(()),
            _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
        }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn range(start: u64, len: u64) -> abi::uffdio_range {
    abi::uffdio_range { start, len }
}

/// The kernel answers `EAGAIN` also where it has filled a part, and tells how much.
fn filled(result: Result<(), Errno>, done: i64, length: u64) -> Result<u64, Errno> {
    match (result, u64::try_from(done)) {
        (Ok(()), _) => Ok(length),
        (Err(Errno::AGAIN), Ok(done)) if done > 0 => Ok(done.min(length)),
        (Err(errno), _) => Err(errno),
    }
}

/// `struct uffd_msg`: the event at 0, what belongs to it from 8 on.
fn decode(message: &[u8; MESSAGE_BYTES]) -> Event {
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    match u32::from(message[0]) {
        abi::UFFD_EVENT_PAGEFAULT => Event::Fault {
            address: number(16),
        },
        abi::UFFD_EVENT_REMOVE | abi::UFFD_EVENT_UNMAP => Event::Removed {
            start: number(8),
            end: number(16),
        },
        event => {
            if event == abi::UFFD_EVENT_FORK {
                // The kernel has put a descriptor for the child into this process.
                let number = number(8) as u32 as RawFd;
                // SAFETY: it came with this message, which is decoded once, and nobody else knows it.
                drop(unsafe { OwnedFd::from_raw_fd(number) });
            }
            Event::Other { event: message[0] }
        }
    }
}

/// A pidfd of the process at the other end of a socket.
///
/// Before Linux 6.5 it is looked up by number, so that it can be another's where the peer has ended
/// already and its number was given away in that instant.
///
/// # Errors
///
/// The process has ended.
pub(super) fn peer_process(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut number: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option's value is an int, and `length` says so.
    let done = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut number).cast(),
            &raw mut length,
        )
    };
    if done == 0 && number >= 0 {
        // SAFETY: the kernel has just made it for us.
        return Ok(unsafe { OwnedFd::from_raw_fd(number) });
    }
    if let Some(error) = explained(io::Error::last_os_error()) {
        return Err(error);
    }
    let peer = rustix::net::sockopt::socket_peercred(&socket)?;
    let flags = rustix::process::PidfdFlags::empty();
    Ok(rustix::process::pidfd_open(peer.pid, flags)?)
}

/// Why the kernel gives no pidfd of a peer; `None` where it knows no such option. The number of a process that
/// has ended may be another's by now.
fn explained(error: io::Error) -> Option<io::Error> {
    match Errno::from_io_error(&error) {
        Some(Errno::NOPROTOOPT) => None,
        Some(Errno::INVAL | Errno::SRCH | Errno::NODATA) => {
            Some(io::Error::other("the process has ended"))
        }
        _ => Some(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Command, Stdio};

    use rustix::event::{PollFd, PollFlags, Timespec};

    use super::*;

    #[test]
    fn a_peer_that_has_ended_is_not_looked_up_by_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let client = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "uffd::raw::tests::connecting_process",
            ])
            .env("FCVM_TEST_SOCKET", &path)
            .stdout(Stdio::null())
            .status();
        assert!(client.unwrap().success());
        let (socket, _) = listener.accept().unwrap();
        match peer_process(&socket) {
            // Since Linux 6.16: it can be read, as of each that has ended.
            Ok(process) => {
                let mut polled = [PollFd::new(&process, PollFlags::IN)];
                let now = Timespec::default();
                assert_eq!(rustix::event::poll(&mut polled, Some(&now)), Ok(1));
            }
            Err(error) => assert_eq!(error.to_string(), "the process has ended"),
        }
        let ended = explained(Errno::INVAL.into()).unwrap();
        assert_eq!(ended.to_string(), "the process has ended");
        assert!(explained(Errno::NOPROTOOPT.into()).is_none());
        // One that is there is found.
        let (one, _other) = UnixStream::pair().unwrap();
        peer_process(&one).unwrap();
    }

    #[test]
    #[ignore = "the peer of the other test: a process of its own"]
    fn connecting_process() {
        if let Some(path) = std::env::var_os("FCVM_TEST_SOCKET") {
            UnixStream::connect(path).unwrap();
        }
    }
}
