//! What each request of the kernel does to the pool.

use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

use blockpool::{Object, Pool, PoolError, RECORD_BYTES};
use rustix::io::Errno;

use crate::copy::Place;
use crate::namespace::put_open;
use crate::node::{NAMELESS, Node, Nodes, Target};
use crate::serve::Options;
use crate::wire::{Arguments, Init, MAJOR, Reply, Request, capability, opcode};

/// Bytes of one write or read.
pub(crate) const REQUEST_BYTES_MAX: u32 = 1 << 20;
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;
const KEEP_SIZE: u32 = 1;
const PUNCH_HOLE: u32 = 2;
const ZERO_RANGE: u32 = 16;

/// What is answered; none where nothing is to be.
pub(crate) type Answer = Result<Option<Reply>, Errno>;

/// A pool as a file system.
#[derive(Debug)]
pub(crate) struct FileSystem {
    pub(crate) pool: Pool,
    pub(crate) nodes: Nodes,
    pub(crate) options: Options,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Tells the names that this process gives from those of others.
    pub(crate) run: u64,
    pub(crate) nameless: AtomicU64,
}

/// What a failure of the pool is to a program.
pub(crate) fn errno(error: PoolError) -> Errno {
    match &error {
        PoolError::Io { source, .. } | PoolError::File { source, .. } => {
            Errno::from_io_error(source).unwrap_or(Errno::IO)
        }
        PoolError::NotFound { .. } => Errno::NOENT,
        PoolError::Exists { .. } => Errno::EXIST,
        PoolError::Full => Errno::NOSPC,
        PoolError::Size { .. } => Errno::FBIG,
        PoolError::ReadOnly { .. } => Errno::PERM,
        PoolError::HasDependents { .. } => Errno::NOTEMPTY,
        PoolError::Name { .. } | PoolError::Range { .. } | PoolError::OutOfRange { .. } => {
            Errno::INVAL
        }
        PoolError::TooManyReferences => Errno::MLINK,
        other => {
            tracing::error!("{other}");
            Errno::IO
        }
    }
}

impl FileSystem {
    /// `is_takeover`: another process served before, and the kernel knows files by their nodes.
    pub(crate) fn new(pool: Pool, options: Options, is_takeover: bool) -> Result<Self, PoolError> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let file_system = Self {
            nodes: Nodes::new(pool.clone(), is_takeover),
            pool,
            options,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            run: since.map_or(0, |since| since.as_nanos() as u64),
            nameless: AtomicU64::new(0),
        };
        if !is_takeover {
            file_system.remove_nameless()?;
            match file_system.pool.create_dataset(&NAMELESS.parse()?) {
                Ok(_) | Err(PoolError::Exists { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(file_system)
    }

    /// Removes what no name and no open file leads to.
    pub(crate) fn remove_nameless(&self) -> Result<(), PoolError> {
        match self.pool.destroy(&NAMELESS.parse()?, true) {
            Ok(_) | Err(PoolError::NotFound { .. }) => self.pool.checkpoint(),
            Err(error) => Err(error),
        }
    }

    /// Does what the kernel asks for, but for reads.
    pub(crate) fn answer(&self, request: Request<'_>) -> Answer {
        let node = || self.nodes.get(request.node).map_err(errno);
        let arguments = request.arguments();
        match request.opcode {
            opcode::INIT => self.init(arguments),
            opcode::LOOKUP => self.lookup(request.node, arguments),
            opcode::FORGET => self.forget(request.node, arguments),
            opcode::BATCH_FORGET => self.batch_forget(arguments),
            opcode::GETATTR => self.getattr(&*node()?),
            opcode::SETATTR => self.setattr(&*node()?, arguments),
            opcode::MKNOD => self.mknod(request),
            opcode::MKDIR => self.mkdir(request),
            opcode::UNLINK => self.unlink(request),
            opcode::RMDIR => self.rmdir(request),
            opcode::RENAME => self.rename(request, false),
            opcode::RENAME2 => self.rename(request, true),
            opcode::LINK => self.link(request),
            opcode::CREATE => self.create(request, false),
            opcode::TMPFILE => self.create(request, true),
            opcode::OPEN => open(&*node()?, arguments),
            opcode::OPENDIR => {
                let mut reply = Reply::default();
                put_open(&mut reply, 0);
                Ok(Some(reply))
            }
            opcode::WRITE => self.write(&*node()?, arguments),
            opcode::STATFS => self.statfs(),
            opcode::RELEASE | opcode::RELEASEDIR => Ok(Some(Reply::default())),
            opcode::FSYNC | opcode::FSYNCDIR => {
                self.pool.flush().map_err(errno)?;
                Ok(Some(Reply::default()))
            }
            opcode::GETXATTR => self.getxattr(&*node()?, arguments),
            opcode::LISTXATTR => list_no_attributes(arguments),
            opcode::READDIR => self.readdir(request),
            opcode::FALLOCATE => self.fallocate(&*node()?, arguments),
            opcode::LSEEK => self.lseek(&*node()?, arguments),
            opcode::COPY_FILE_RANGE => self.copy_file_range(&*node()?, arguments, false),
            opcode::COPY_FILE_RANGE_64 => self.copy_file_range(&*node()?, arguments, true),
            opcode::DESTROY => Ok(Some(Reply::default())),
            opcode::INTERRUPT => Ok(None),
            _ => Err(Errno::NOSYS),
        }
    }

    fn init(&self, arguments: Arguments<'_>) -> Answer {
        let init = Init::parse(arguments).ok_or(Errno::PROTO)?;
        if init.major > MAJOR {
            // It asks again, in this version.
            let mut reply = Reply::default();
            reply.u32(MAJOR).u32(0).zeros(56);
            return Ok(Some(reply));
        }
        if init.major < MAJOR || init.minor < 31 {
            return Err(Errno::PROTO);
        }
        let mut capabilities = capability::ASYNC_READ
            | capability::BIG_WRITES
            | capability::ASYNC_DIO
            | capability::PARALLEL_DIROPS
            | capability::MAX_PAGES
            | capability::HANDLE_KILLPRIV_V2
            | capability::INIT_EXT
            | capability::DIRECT_IO_ALLOW_MMAP
            | capability::HAS_RESEND;
        if self.options.writeback_cache {
            capabilities |= capability::WRITEBACK_CACHE;
        }
        Ok(Some(init.reply(capabilities, REQUEST_BYTES_MAX)))
    }

    fn forget(&self, node: u64, mut arguments: Arguments<'_>) -> Answer {
        if let Some(lookups) = arguments.u64() {
            self.nodes.forget(node, lookups);
        }
        Ok(None)
    }

    fn batch_forget(&self, mut arguments: Arguments<'_>) -> Answer {
        let count = arguments.u32().unwrap_or(0);
        arguments.u32();
        for _ in 0..count {
            let (Some(node), Some(lookups)) = (arguments.u64(), arguments.u64()) else {
                break;
            };
            self.nodes.forget(node, lookups);
        }
        Ok(None)
    }

    /// READ into `buffer`; how many bytes.
    pub(crate) fn read(&self, request: Request<'_>, buffer: &mut Vec<u8>) -> Result<usize, Errno> {
        let node = self.nodes.get(request.node).map_err(errno)?;
        let object = file(&node)?;
        let mut arguments = request.arguments();
        arguments.u64().ok_or(Errno::INVAL)?;
        let offset_bytes = arguments.u64().ok_or(Errno::INVAL)?;
        let length = arguments.u32().ok_or(Errno::INVAL)?.min(REQUEST_BYTES_MAX);
        let left = object
            .size_bytes()
            .map_err(errno)?
            .saturating_sub(offset_bytes);
        let length = u64::from(length).min(left) as usize;
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        if length > 0 {
            object
                .read_at(&mut buffer[..length], offset_bytes)
                .map_err(errno)?;
        }
        Ok(length)
    }

    fn write(&self, node: &Node, mut arguments: Arguments<'_>) -> Answer {
        let object = file(node)?;
        arguments.u64().ok_or(Errno::INVAL)?;
        let offset_bytes = arguments.u64().ok_or(Errno::INVAL)?;
        let length = arguments.u32().ok_or(Errno::INVAL)?;
        arguments.take(20).ok_or(Errno::INVAL)?;
        let bytes = arguments.take(length as usize).ok_or(Errno::INVAL)?;
        let end = offset_bytes
            .checked_add(u64::from(length))
            .ok_or(Errno::FBIG)?;
        if node.is_snapshot {
            return Err(Errno::PERM);
        }
        let mut written = object.write_at(bytes, offset_bytes);
        if matches!(written, Err(PoolError::OutOfRange { .. })) {
            self.grow(node, object, end)?;
            written = object.write_at(bytes, offset_bytes);
        }
        node.touch();
        written.map_err(errno)?;
        let mut reply = Reply::default();
        reply.u32(length).u32(0);
        Ok(Some(reply))
    }

    fn fallocate(&self, node: &Node, mut arguments: Arguments<'_>) -> Answer {
        let object = file(node)?;
        arguments.u64().ok_or(Errno::INVAL)?;
        let offset_bytes = arguments.u64().ok_or(Errno::INVAL)?;
        let length_bytes = arguments.u64().ok_or(Errno::INVAL)?;
        let mode = arguments.u32().ok_or(Errno::INVAL)?;
        let end = offset_bytes.checked_add(length_bytes).ok_or(Errno::FBIG)?;
        let keeps_size = mode & KEEP_SIZE != 0;
        let zeroes = match mode & !KEEP_SIZE {
            0 => false,
            PUNCH_HOLE if keeps_size => true,
            ZERO_RANGE => true,
            _ => return Err(Errno::OPNOTSUPP),
        };
        if node.is_snapshot {
            return Err(Errno::PERM);
        }
        if end > blockpool::OBJECT_MAX_BYTES {
            return Err(Errno::FBIG);
        }
        if zeroes {
            let size_bytes = object.size_bytes().map_err(errno)?;
            let length_bytes = end.min(size_bytes).saturating_sub(offset_bytes);
            if length_bytes > 0 {
                object
                    .punch_hole(offset_bytes, length_bytes)
                    .map_err(errno)?;
            }
        } else if length_bytes > self.pool.space().free_bytes {
            // Space is given to what is written; what cannot come true is not promised.
            return Err(Errno::NOSPC);
        }
        if !keeps_size {
            self.grow(node, object, end)?;
        }
        node.touch();
        Ok(Some(Reply::default()))
    }

    /// Whether the kernel may have bytes of the file that it did not send yet.
    pub(crate) fn may_have_unsent(&self, request: Request<'_>) -> bool {
        let node = self.nodes.get(request.node);
        node.is_ok_and(|node| node.memory().may_be_mapped)
    }

    /// Data and holes in whole records: what `cp` finds so can be cloned.
    fn lseek(&self, node: &Node, mut arguments: Arguments<'_>) -> Answer {
        let object = file(node)?;
        arguments.u64().ok_or(Errno::INVAL)?;
        let offset_bytes = arguments.u64().ok_or(Errno::INVAL)?;
        let whence = arguments.u32().ok_or(Errno::INVAL)?;
        let size_bytes = object.size_bytes().map_err(errno)?;
        if offset_bytes >= size_bytes {
            return Err(Errno::NXIO);
        }
        let next = |from| object.next_data(from).map_err(errno);
        let found = match whence {
            SEEK_DATA => {
                let (begin, _) =
                    next(offset_bytes / RECORD_BYTES * RECORD_BYTES)?.ok_or(Errno::NXIO)?;
                (begin / RECORD_BYTES * RECORD_BYTES).max(offset_bytes)
            }
            SEEK_HOLE => {
                let mut at = offset_bytes;
                while at < size_bytes
                    && let Some((begin, end)) = next(at / RECORD_BYTES * RECORD_BYTES)?
                    && begin / RECORD_BYTES * RECORD_BYTES <= at
                {
                    at = end.next_multiple_of(RECORD_BYTES).min(size_bytes);
                }
                at
            }
            _ => return Err(Errno::INVAL),
        };
        let mut reply = Reply::default();
        reply.u64(found);
        Ok(Some(reply))
    }

    fn copy_file_range(
        &self,
        source: &Node,
        mut arguments: Arguments<'_>,
        is_long: bool,
    ) -> Answer {
        let mut number = || arguments.u64().ok_or(Errno::INVAL);
        number()?;
        let source_offset_bytes = number()?;
        let target_number = number()?;
        number()?;
        let target_offset_bytes = number()?;
        let length_bytes = number()?;
        let target = self.nodes.get(target_number).map_err(errno)?;
        let source = Place {
            node: source,
            offset_bytes: source_offset_bytes,
        };
        let target = Place {
            node: &target,
            offset_bytes: target_offset_bytes,
        };
        // The shorter answer has 32 bits.
        let limit = if is_long {
            u64::MAX
        } else {
            u64::from(u32::MAX)
        };
        let copied = self.copy_range(source, target, length_bytes.min(limit))?;
        let mut reply = Reply::default();
        if is_long {
            reply.u64(copied);
        } else {
            reply.u32(copied as u32).u32(0);
        }
        Ok(Some(reply))
    }
}

fn file(node: &Node) -> Result<&Object, Errno> {
    match &node.target {
        Target::File(object) => Ok(object),
        Target::Root | Target::Dataset(_) => Err(Errno::ISDIR),
    }
}

fn open(node: &Node, mut arguments: Arguments<'_>) -> Answer {
    const O_ACCMODE: u32 = 3;
    let flags = arguments.u32().ok_or(Errno::INVAL)?;
    if flags & O_ACCMODE != 0 {
        node.memory().may_be_mapped = true;
    }
    let mut reply = Reply::default();
    put_open(&mut reply, flags);
    Ok(Some(reply))
}

fn list_no_attributes(mut arguments: Arguments<'_>) -> Answer {
    let limit = arguments.u32().ok_or(Errno::INVAL)?;
    let mut reply = Reply::default();
    if limit == 0 {
        reply.u64(0);
    }
    Ok(Some(reply))
}
