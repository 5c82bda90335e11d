//! The least that a FUSE file system can do: one file, `file`, whose reads and writes are those of another file.
//!
//! What a pool's mount costs beyond FUSE itself is measured against it (`fcvm pool bench`).

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::error::MountError;
use crate::namespace::put_open;
use crate::wire::{Attributes, Init, Reply, Request, capability, opcode, out_header};

const ROOT: u64 = 1;
const FILE: u64 = 2;
const WRITE_BYTES: u32 = 1 << 20;

/// Answers the kernel until the file system is unmounted.
///
/// # Errors
///
/// The kernel's side failed.
pub fn serve_passthrough(
    device: impl AsFd,
    file: &File,
    thread_count: usize,
) -> Result<(), MountError> {
    let device = device.as_fd();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..thread_count.max(1))
            .map(|_| scope.spawn(|| answer_all(device, file)))
            .collect();
        let mut result = Ok(());
        for thread in threads {
            result = result.and(thread.join().unwrap_or(Err(Errno::IO)));
        }
        result
    })
    .map_err(|source: Errno| MountError::Device {
        action: "talk to the kernel's side of the mount",
        source: source.into(),
    })
}

fn answer_all(device: BorrowedFd<'_>, file: &File) -> Result<(), Errno> {
    let mut buffer = vec![0; WRITE_BYTES as usize + 4096];
    loop {
        let length = match rustix::io::read(device, &mut buffer[..]) {
            Ok(length) => length,
            Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => continue,
            Err(Errno::NODEV) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        let Some(request) = Request::parse(&buffer[..length]) else {
            continue;
        };
        if matches!(
            request.opcode,
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT
        ) {
            continue;
        }
        let (error, bytes) = match answer(request, file) {
            Ok(reply) => (0, reply.0),
            Err(errno) => (-errno.raw_os_error(), Vec::new()),
        };
        let header = out_header(request.unique, error, bytes.len());
        match rustix::io::writev(device, &[IoSlice::new(&header), IoSlice::new(&bytes)]) {
            Ok(_) | Err(Errno::NOENT) => {}
            Err(Errno::NODEV) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
}

fn answer(request: Request<'_>, file: &File) -> Result<Reply, Errno> {
    let mut arguments = request.arguments();
    let mut reply = Reply::default();
    let io = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    match request.opcode {
        opcode::INIT => {
            let init = Init::parse(arguments).ok_or(Errno::PROTO)?;
            let capabilities = capability::ASYNC_READ
                | capability::BIG_WRITES
                | capability::ASYNC_DIO
                | capability::MAX_PAGES
                | capability::HANDLE_KILLPRIV_V2
                | capability::INIT_EXT;
            return Ok(init.reply(capabilities, WRITE_BYTES));
        }
        opcode::LOOKUP if arguments.name() == Some(b"file") => {
            reply.u64(FILE).u64(0).u64(60).u64(60).u32(0).u32(0);
            attributes(FILE, file).map_err(io)?.put(&mut reply);
        }
        opcode::LOOKUP => return Err(Errno::NOENT),
        opcode::GETATTR => {
            reply.u64(60).u32(0).u32(0);
            attributes(request.node, file).map_err(io)?.put(&mut reply);
        }
        opcode::OPEN | opcode::OPENDIR => put_open(&mut reply, arguments.u32().unwrap_or(0)),
        opcode::READ | opcode::WRITE => {
            arguments.u64().ok_or(Errno::INVAL)?;
            let offset_bytes = arguments.u64().ok_or(Errno::INVAL)?;
            let length = arguments.u32().ok_or(Errno::INVAL)?;
            if request.opcode == opcode::READ {
                reply.zeros(length.min(WRITE_BYTES) as usize);
                let read = file.read_at(&mut reply.0, offset_bytes).map_err(io)?;
                reply.0.truncate(read);
            } else {
                arguments.take(20).ok_or(Errno::INVAL)?;
                let bytes = arguments.take(length as usize).ok_or(Errno::INVAL)?;
                file.write_all_at(bytes, offset_bytes).map_err(io)?;
                reply.u32(length).u32(0);
            }
        }
        opcode::FSYNC => file.sync_data().map_err(io)?,
        opcode::RELEASE | opcode::RELEASEDIR | opcode::DESTROY => {}
        opcode::STATFS => {
            reply.zeros(80);
        }
        _ => return Err(Errno::NOSYS),
    }
    Ok(reply)
}

fn attributes(node: u64, file: &File) -> std::io::Result<Attributes> {
    let is_root = node == ROOT;
    Ok(Attributes {
        node,
        size_bytes: if is_root { 0 } else { file.metadata()?.len() },
        blocks: 0,
        times: [(0, 0); 3],
        mode: if is_root { 0o040_700 } else { 0o100_600 },
        link_count: 1,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    })
}
