//! Reading requests and writing answers, in several threads.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};

use blockpool::Pool;
use rustix::io::Errno;

use crate::error::MountError;
use crate::filesystem::{FileSystem, REQUEST_BYTES_MAX};
use crate::wire::{Request, notify_invalidate, notify_resend, opcode, out_header};

/// Room for a write and what comes before its bytes.
const BUFFER_BYTES: usize = REQUEST_BYTES_MAX as usize + 4096;

/// How a mount is served.
#[derive(Debug, Clone)]
pub struct Options {
    /// Threads that answer.
    pub thread_count: usize,
    /// The kernel gathers writes and sends them later, or when they are flushed.
    pub writeback_cache: bool,
    /// The directory that the pool's file is in: what is free there bounds what is free in the pool.
    pub host_directory: Option<PathBuf>,
}

/// Answers the kernel until the file system is unmounted. With `is_takeover` another process did until now, and was killed;
/// the pool must have been opened with its journal.
///
/// # Errors
///
/// The pool or the kernel's side failed.
pub fn serve(
    device: impl AsFd,
    pool: &Pool,
    options: Options,
    is_takeover: bool,
) -> Result<(), MountError> {
    let device = device.as_fd();
    let thread_count = options.thread_count.max(1);
    let file_system = FileSystem::new(pool.clone(), options, is_takeover)?;
    let failed = |source: Errno| MountError::Device {
        action: "talk to the kernel's side of the mount",
        source: source.into(),
    };
    if is_takeover {
        match rustix::io::write(device, &notify_resend()) {
            Ok(_) => {}
            // Before Linux 6.9 what was not answered waits until it is interrupted.
            Err(Errno::INVAL | Errno::NOSYS) => {
                tracing::warn!("this kernel cannot ask again what was not answered");
            }
            Err(errno) => return Err(failed(errno)),
        }
    }
    let result = std::thread::scope(|scope| {
        let (later, waiting) = mpsc::channel();
        let file_system = &file_system;
        scope.spawn(move || answer_later(device, file_system, &waiting));
        let others: Vec<_> = (1..thread_count)
            .map(|_| {
                let later = later.clone();
                scope.spawn(move || answer_all(device, file_system, &later))
            })
            .collect();
        let first = answer_all(device, file_system, &later);
        drop(later);
        others.into_iter().fold(first, |result, other| {
            result.and(other.join().unwrap_or(Err(Errno::IO)))
        })
    });
    result.map_err(failed)?;
    // Nobody is left who could use what has no name.
    file_system.remove_nameless()?;
    Ok(())
}

/// Answers requests that need what the kernel has not sent yet: what was written through a mapping is data, no hole.
/// The kernel sends it while this thread waits, for others to take.
fn answer_later(device: BorrowedFd<'_>, file_system: &FileSystem, waiting: &Receiver<Vec<u8>>) {
    for bytes in waiting {
        let Some(request) = Request::parse(&bytes) else {
            continue;
        };
        // It fails where the kernel has nothing of the file.
        let _ = rustix::io::write(device, &notify_invalidate(request.node));
        // After an unmount nobody waits.
        let _ = answer(device, file_system, request);
    }
}

fn answer(
    device: BorrowedFd<'_>,
    file_system: &FileSystem,
    request: Request<'_>,
) -> Result<(), Errno> {
    match file_system.answer(request) {
        Ok(None) => Ok(()),
        Ok(Some(reply)) => send(device, request.unique, &reply.0),
        Err(errno) => send_error(device, request.unique, errno),
    }
}

fn answer_all(
    device: BorrowedFd<'_>,
    file_system: &FileSystem,
    later: &Sender<Vec<u8>>,
) -> Result<(), Errno> {
    // Not zero, so that the kernel gives the memory now. Where it has to find some while it copies a request to a
    // process that is being killed it gives up, and answers EIO in our place: nobody could send that one again.
    let mut buffer = vec![1; BUFFER_BYTES];
    let mut read = Vec::new();
    loop {
        let length = match rustix::io::read(device, &mut buffer[..]) {
            Ok(length) => length,
            // A request that was interrupted before it was read.
            Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
            // Unmounted.
            Err(Errno::NODEV) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        let Some(request) = Request::parse(&buffer[..length]) else {
            continue;
        };
        let sent = if request.opcode == opcode::READ {
            match file_system.read(request, &mut read) {
                Ok(length) => send(device, request.unique, &read[..length]),
                Err(errno) => send_error(device, request.unique, errno),
            }
        } else if request.opcode == opcode::LSEEK && file_system.may_have_unsent(request) {
            // Its thread lives as long as this one.
            let _ = later.send(buffer[..length].to_vec());
            continue;
        } else {
            answer(device, file_system, request)
        };
        match sent {
            // The process that asked is gone.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NODEV) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
}

fn send(device: BorrowedFd<'_>, unique: u64, bytes: &[u8]) -> Result<(), Errno> {
    let header = out_header(unique, 0, bytes.len());
    rustix::io::writev(device, &[IoSlice::new(&header), IoSlice::new(bytes)])?;
    Ok(())
}

fn send_error(device: BorrowedFd<'_>, unique: u64, errno: Errno) -> Result<(), Errno> {
    rustix::io::write(device, &out_header(unique, -errno.raw_os_error(), 0))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use blockpool::FileDisk;

    use super::*;

    /// Numbers without a pattern, the same at every run.
    struct Numbers(u64);

    impl Numbers {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        /// Mostly numbers that mean something.
        fn telling(&mut self) -> u64 {
            match self.next() % 4 {
                0 => self.next() % 8,
                1 => {
                    [0, 4096, 65_536, 1 << 20, 1 << 44, 1 << 63, u64::MAX][self.next() as usize % 7]
                }
                2 => self.next() % 200_000,
                _ => self.next(),
            }
        }
    }

    #[test]
    fn whatever_is_asked_is_answered_or_refused() {
        let directory = tempfile::tempdir().unwrap();
        let disk = FileDisk::create(&directory.path().join("pool"), 64 << 20).unwrap();
        let pool = Pool::create(Arc::new(disk), 64 << 20, [1; 16]).unwrap();
        pool.create_dataset(&"set".parse().unwrap()).unwrap();
        pool.create_object(&"set/object".parse().unwrap(), 1 << 20)
            .unwrap();
        let options = Options {
            thread_count: 1,
            writeback_cache: false,
            host_directory: None,
        };
        let file_system = FileSystem::new(pool.clone(), options, false).unwrap();
        let mut numbers = Numbers(0x1234_5678_9abc_def1);
        let mut buffer = Vec::new();
        let mut answered = 0;
        for _ in 0..50_000 {
            let mut bytes = vec![0; 40];
            bytes[4..8].copy_from_slice(&((numbers.next() % 56) as u32).to_le_bytes());
            bytes[8..16].copy_from_slice(&(numbers.next() & !(1 << 62)).to_le_bytes());
            bytes[16..24].copy_from_slice(&numbers.telling().to_le_bytes());
            for _ in 0..numbers.next() % 9 {
                bytes.extend_from_slice(&numbers.telling().to_le_bytes());
            }
            if numbers.next().is_multiple_of(2) {
                bytes.extend_from_slice(
                    b"object\0a\0set\0\xff\0@"
                        .get(..numbers.next() as usize % 17)
                        .unwrap(),
                );
            }
            let length = bytes.len() as u32;
            bytes[..4].copy_from_slice(&length.to_le_bytes());
            let request = Request::parse(&bytes).unwrap();
            answered += match request.opcode {
                opcode::READ => usize::from(file_system.read(request, &mut buffer).is_ok()),
                _ => usize::from(file_system.answer(request).is_ok()),
            };
        }
        assert!(answered > 1000, "{answered}");
        assert_eq!(pool.check().unwrap().problems, Vec::<String>::new());
    }
}
