//! The bytes between the kernel and a file system in a process: include/uapi/linux/fuse.h, version 7.31 and later.
//!
//! Nothing is done here. What the kernel sends is read with bounds: a request that is shorter than it says, or has a name
//! that does not end, is none.

/// Bytes before the arguments of a request.
const IN_HEADER: usize = 40;
/// Bytes before what a reply tells.
pub(crate) const OUT_HEADER: usize = 16;
/// This version is spoken; the kernel must know it or a later one.
pub(crate) const MAJOR: u32 = 7;
/// See [`MAJOR`].
pub(crate) const MINOR: u32 = 36;
/// The kernel asks again what the process before this one did not answer.
const UNIQUE_RESEND: u64 = 1 << 63;
/// The notification that makes it ask again.
const NOTIFY_RESEND: i32 = 7;

/// Numbers of the operations.
pub(crate) mod opcode {
    macro_rules! numbers {
        ($($name:ident = $number:literal),* $(,)?) => {
            $(pub(crate) const $name: u32 = $number;)*
        };
    }
    numbers! {
        LOOKUP = 1, FORGET = 2, GETATTR = 3, SETATTR = 4, MKNOD = 8, MKDIR = 9, UNLINK = 10,
        RMDIR = 11, RENAME = 12, LINK = 13, OPEN = 14, READ = 15, WRITE = 16, STATFS = 17,
        RELEASE = 18, FSYNC = 20, GETXATTR = 22, LISTXATTR = 23, INIT = 26, OPENDIR = 27,
        READDIR = 28, RELEASEDIR = 29, FSYNCDIR = 30, CREATE = 35, INTERRUPT = 36, DESTROY = 38,
        BATCH_FORGET = 42, FALLOCATE = 43, RENAME2 = 45, LSEEK = 46, COPY_FILE_RANGE = 47,
        TMPFILE = 51, COPY_FILE_RANGE_64 = 53,
    }
}

/// What both sides can do, from the two words of flags of INIT.
pub(crate) mod capability {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub(crate) const HAS_RESEND: u64 = 1 << 39;
}

/// Flags of an opened file.
pub(crate) mod open {
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    pub(crate) const NOFLUSH: u32 = 1 << 5;
    pub(crate) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// What SETATTR changes.
pub(crate) mod set {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
}

/// A request of the kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    /// It was sent before, to a process that ended before it answered; it may have been done.
    pub(crate) is_resent: bool,
    pub(crate) node: u64,
    /// Who asks.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    arguments: &'a [u8],
}

impl<'a> Request<'a> {
    /// Reads what one read from the device gave. None where that is no request.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut header = Arguments(bytes.get(..IN_HEADER)?);
        let length = header.u32()? as usize;
        let opcode = header.u32()?;
        let unique = header.u64()?;
        let node = header.u64()?;
        Some(Self {
            opcode,
            unique,
            is_resent: unique & UNIQUE_RESEND != 0,
            node,
            uid: header.u32()?,
            gid: header.u32()?,
            arguments: bytes.get(IN_HEADER..length)?,
        })
    }

    pub(crate) fn arguments(&self) -> Arguments<'a> {
        Arguments(self.arguments)
    }
}

/// Arguments that are left to read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arguments<'a>(&'a [u8]);

impl<'a> Arguments<'a> {
    pub(crate) fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        let bytes = self.take(4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        let bytes = self.take(8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    /// A name, up to the zero byte that ends it.
    pub(crate) fn name(&mut self) -> Option<&'a [u8]> {
        let length = self.0.iter().position(|byte| *byte == 0)?;
        let name = self.take(length)?;
        self.take(1)?;
        Some(name)
    }
}

/// What a reply tells, or an array in one.
#[derive(Debug, Default)]
pub(crate) struct Reply(pub(crate) Vec<u8>);

impl Reply {
    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(crate) fn zeros(&mut self, length: usize) -> &mut Self {
        self.0.resize(self.0.len() + length, 0);
        self
    }
}

/// The header of a reply.
pub(crate) fn out_header(unique: u64, error: i32, length: usize) -> [u8; OUT_HEADER] {
    let mut bytes = [0; OUT_HEADER];
    bytes[..4].copy_from_slice(&((OUT_HEADER + length) as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&error.to_le_bytes());
    bytes[8..].copy_from_slice(&unique.to_le_bytes());
    bytes
}

/// Asks the kernel to send again what nobody answered.
pub(crate) fn notify_resend() -> [u8; OUT_HEADER] {
    out_header(0, NOTIFY_RESEND, 0)
}

/// Has the kernel write out and forget what it keeps of a file. The answer to the write comes when that is done.
pub(crate) fn notify_invalidate(node: u64) -> Vec<u8> {
    const NOTIFY_INVAL_INODE: i32 = 2;
    let mut bytes = out_header(0, NOTIFY_INVAL_INODE, 24).to_vec();
    // From the beginning, without end.
    for number in [node, 0, 0] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// What the kernel says first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Init {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) readahead_bytes: u32,
    pub(crate) capabilities: u64,
}

impl Init {
    pub(crate) fn parse(mut arguments: Arguments<'_>) -> Option<Self> {
        let (major, minor) = (arguments.u32()?, arguments.u32()?);
        let readahead_bytes = arguments.u32()?;
        let low = u64::from(arguments.u32()?);
        let has_more = low & capability::INIT_EXT != 0;
        let high = if has_more { arguments.u32()? } else { 0 };
        Some(Self {
            major,
            minor,
            readahead_bytes,
            capabilities: low | u64::from(high) << 32,
        })
    }

    pub(crate) fn reply(&self, capabilities: u64, write_bytes: u32) -> Reply {
        let mut reply = Reply::default();
        let agreed = self.capabilities & capabilities;
        reply.u32(MAJOR).u32(self.minor.min(MINOR));
        reply.u32(self.readahead_bytes).u32(agreed as u32);
        // Requests in the background, and how many of them are too many.
        reply.u16(64).u16(48);
        reply
            .u32(write_bytes)
            .u32(1)
            .u16((write_bytes / 4096) as u16)
            .u16(0);
        reply.u32((agreed >> 32) as u32).zeros(28);
        reply
    }
}

/// What stat(2) tells.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes {
    pub(crate) node: u64,
    pub(crate) size_bytes: u64,
    pub(crate) blocks: u64,
    /// Access, modification, change: seconds and nanoseconds.
    pub(crate) times: [(u64, u32); 3],
    pub(crate) mode: u32,
    pub(crate) link_count: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Attributes {
    pub(crate) fn put(&self, reply: &mut Reply) {
        reply.u64(self.node).u64(self.size_bytes).u64(self.blocks);
        for (seconds, _) in self.times {
            reply.u64(seconds);
        }
        for (_, nanoseconds) in self.times {
            reply.u32(nanoseconds);
        }
        reply.u32(self.mode).u32(self.link_count);
        reply.u32(self.uid).u32(self.gid).u32(0);
        reply.u32(4096).u32(0);
    }
}

/// One name of a directory; false where `limit` bytes would be passed.
pub(crate) fn put_directory_entry(
    reply: &mut Reply,
    limit: usize,
    node: u64,
    next_offset: u64,
    is_directory: bool,
    name: &[u8],
) -> bool {
    let length = (24 + name.len()).next_multiple_of(8);
    if reply.0.len() + length > limit {
        return false;
    }
    let kind = if is_directory { 4 } else { 8 };
    reply.u64(node).u64(next_offset);
    reply.u32(name.len() as u32).u32(kind);
    reply.0.extend_from_slice(name);
    reply.zeros(length - 24 - name.len());
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(length: u32, arguments: &[u8]) -> Vec<u8> {
        let mut bytes = Reply::default();
        bytes.u32(length).u32(opcode::LOOKUP).u64(7 | UNIQUE_RESEND);
        bytes.u64(3).zeros(16);
        bytes.0.extend_from_slice(arguments);
        bytes.0
    }

    #[test]
    fn requests_are_read_and_cut_ones_are_none() {
        let bytes = request(45, b"name\0");
        let parsed = Request::parse(&bytes).unwrap();
        assert_eq!((parsed.opcode, parsed.node), (opcode::LOOKUP, 3));
        assert!(parsed.is_resent);
        assert_eq!(parsed.arguments().name(), Some(&b"name"[..]));
        for length in 0..bytes.len() {
            assert!(Request::parse(&bytes[..length]).is_none(), "{length}");
        }
        let lies = [0, 39, 46, u32::MAX];
        assert!(
            lies.into_iter()
                .all(|length| { Request::parse(&request(length, b"name\0")).is_none() })
        );
        let bytes = request(44, b"name");
        assert!(Request::parse(&bytes).unwrap().arguments().name().is_none());
        assert!(Request::parse(&bytes).unwrap().arguments().u64().is_none());
    }

    #[test]
    fn structures_have_the_kernels_lengths() {
        let init = Init {
            major: 7,
            minor: 40,
            readahead_bytes: 0,
            capabilities: u64::MAX,
        };
        assert_eq!(init.reply(0, 1 << 20).0.len(), 64);
        let attributes = Attributes {
            node: 1,
            size_bytes: 0,
            blocks: 0,
            times: [(0, 0); 3],
            mode: 0,
            link_count: 1,
            uid: 0,
            gid: 0,
        };
        let mut reply = Reply::default();
        attributes.put(&mut reply);
        assert_eq!(reply.0.len(), 88);
        let mut entries = Reply::default();
        assert!(put_directory_entry(&mut entries, 64, 1, 1, true, b"."));
        assert!(put_directory_entry(
            &mut entries,
            64,
            2,
            2,
            false,
            b"12345678"
        ));
        assert_eq!(entries.0.len(), 64);
        assert!(!put_directory_entry(&mut entries, 64, 2, 2, false, b"x"));
    }
}
