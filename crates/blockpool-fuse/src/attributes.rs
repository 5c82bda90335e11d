//! What a file tells of itself: stat, changes of it, statfs, and space as extended attributes.

use std::time::{Duration, SystemTime};

use blockpool::{Kind, ObjectSpace};
use rustix::io::Errno;

use crate::filesystem::{Answer, FileSystem, errno};
use crate::node::{Node, Target};
use crate::wire::{Arguments, Attributes, Reply, set};

/// How long the kernel may believe what it was told; nobody else changes the pool.
const VALID_S: u64 = 60;
const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
/// Prefix of the extended attributes.
const PREFIX: &str = "user.blockpool.";

fn since_epoch(time: SystemTime) -> (u64, u32) {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    (since.as_secs(), since.subsec_nanos())
}

fn time(seconds: u64, nanoseconds: u32) -> SystemTime {
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::new(seconds, nanoseconds.min(999_999_999)))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

impl FileSystem {
    pub(crate) fn attributes(&self, node: &Node) -> Result<Attributes, Errno> {
        let (size_bytes, blocks, kind) = match &node.target {
            Target::File(object) => (
                object.size_bytes().map_err(errno)?,
                self.blocks(node)?,
                FILE,
            ),
            Target::Root | Target::Dataset(_) => (0, 0, DIRECTORY),
        };
        let memory = node.memory();
        let link_count = match (kind, memory.is_nameless) {
            (DIRECTORY, _) => 2,
            (_, true) => 0,
            (_, false) => 1,
        };
        let writable = if node.is_snapshot { 0o555 } else { 0o777 };
        Ok(Attributes {
            node: node.number,
            size_bytes,
            blocks,
            times: [memory.accessed, memory.modified, memory.changed].map(since_epoch),
            mode: kind | (memory.mode & writable),
            link_count,
            uid: memory.uid.unwrap_or(self.uid),
            gid: memory.gid.unwrap_or(self.gid),
        })
    }

    /// Blocks of 512 bytes that hold anything.
    fn blocks(&self, node: &Node) -> Result<u64, Errno> {
        let version = node.version();
        if let Some((of, blocks)) = node.memory().blocks
            && of == version
        {
            return Ok(blocks);
        }
        let blocks = self.space(node)?.written_bytes / 512;
        node.memory().blocks = Some((version, blocks));
        Ok(blocks)
    }

    fn space(&self, node: &Node) -> Result<ObjectSpace, Errno> {
        let spaces = self.pool.object_space(&[node.id()]).map_err(errno)?;
        Ok(spaces.first().copied().unwrap_or_default())
    }

    pub(crate) fn getattr(&self, node: &Node) -> Answer {
        let attributes = self.attributes(node)?;
        let mut reply = Reply::default();
        reply.u64(VALID_S).u32(0).u32(0);
        attributes.put(&mut reply);
        Ok(Some(reply))
    }

    /// The answer of a lookup.
    pub(crate) fn put_entry(&self, node: &Node, reply: &mut Reply) -> Result<(), Errno> {
        let attributes = self.attributes(node)?;
        // Numbers are never used again: every node is the first of its number.
        reply.u64(node.number).u64(0);
        reply.u64(VALID_S).u64(VALID_S).u32(0).u32(0);
        attributes.put(reply);
        Ok(())
    }

    pub(crate) fn setattr(&self, node: &Node, mut arguments: Arguments<'_>) -> Answer {
        let (valid, size_bytes, times, mode, owner) =
            read_setattr(&mut arguments).ok_or(Errno::INVAL)?;
        let owner = [(set::UID, owner.0, self.uid), (set::GID, owner.1, self.gid)]
            .map(|(bit, wanted, own)| (valid & bit != 0).then_some((wanted, own)));
        if self.uid != 0 && owner.iter().flatten().any(|(wanted, own)| wanted != own) {
            // Nobody else could use it.
            return Err(Errno::PERM);
        }
        if valid & set::SIZE != 0 {
            let Target::File(object) = &node.target else {
                return Err(Errno::ISDIR);
            };
            let _growth = crate::node::lock(&node.growth);
            object.set_size(size_bytes).map_err(errno)?;
            node.touch();
        }
        {
            let mut memory = node.memory();
            if valid & set::MODE != 0 {
                memory.mode = mode & 0o777;
            }
            let [uid, gid] = owner.map(|owner| owner.map(|(wanted, _)| wanted));
            memory.uid = uid.or(memory.uid);
            memory.gid = gid.or(memory.gid);
            let now = SystemTime::now();
            if valid & set::ATIME != 0 {
                let is_now = valid & set::ATIME_NOW != 0;
                memory.accessed = if is_now { now } else { times[0] };
            }
            if valid & set::MTIME != 0 {
                let is_now = valid & set::MTIME_NOW != 0;
                memory.modified = if is_now { now } else { times[1] };
            }
            memory.changed = now;
        }
        self.getattr(node)
    }

    pub(crate) fn statfs(&self) -> Answer {
        let space = self.pool.space();
        let host_free_bytes = self.options.host_directory.as_ref().and_then(|directory| {
            let found = rustix::fs::statvfs(directory).ok()?;
            Some(found.f_bavail.saturating_mul(found.f_frsize))
        });
        let free_bytes = space.free_bytes.min(host_free_bytes.unwrap_or(u64::MAX));
        let mut reply = Reply::default();
        // What is used is the pool's, also where the host has less left than the pool.
        let size_bytes = space.size_bytes - space.free_bytes + free_bytes;
        let [all, free] = [size_bytes, free_bytes].map(|bytes| bytes / 4096);
        reply.u64(all).u64(free).u64(free);
        // As many files as there is space for.
        reply.u64(all).u64(free);
        reply.u32(4096).u32(255).u32(4096).u32(0).zeros(24);
        Ok(Some(reply))
    }

    pub(crate) fn getxattr(&self, node: &Node, mut arguments: Arguments<'_>) -> Answer {
        let limit = arguments.u32().ok_or(Errno::INVAL)? as usize;
        arguments.u32().ok_or(Errno::INVAL)?;
        let name = arguments.name().ok_or(Errno::INVAL)?;
        let name = std::str::from_utf8(name).map_err(|_| Errno::NODATA)?;
        let field = name.strip_prefix(PREFIX).ok_or(Errno::NODATA)?;
        let value = match &node.target {
            Target::File(_) => {
                let space = self.space(node)?;
                match field {
                    "exclusive_bytes" => space.exclusive_bytes,
                    "referenced_bytes" => space.referenced_bytes,
                    "written_bytes" => space.written_bytes,
                    _ => return Err(Errno::NODATA),
                }
            }
            Target::Root => self.pool_value(field)?,
            Target::Dataset(_) => return Err(Errno::NODATA),
        };
        let text = value.to_string();
        let mut reply = Reply::default();
        if limit == 0 {
            reply.u32(text.len() as u32).u32(0);
        } else if limit < text.len() {
            return Err(Errno::RANGE);
        } else {
            reply.0.extend_from_slice(text.as_bytes());
        }
        Ok(Some(reply))
    }

    fn pool_value(&self, field: &str) -> Result<u64, Errno> {
        let space = self.pool.space();
        Ok(match field {
            "size_bytes" => space.size_bytes,
            "data_bytes" => space.data_bytes,
            "metadata_bytes" => space.metadata_bytes,
            "free_bytes" => space.free_bytes,
            "referenced_bytes" | "saved_bytes" => {
                let listed = self.pool.list(None).map_err(errno)?;
                let ids: Vec<_> = listed
                    .iter()
                    .filter(|entry| entry.kind != Kind::Dataset)
                    .map(|entry| entry.id)
                    .collect();
                let mut all = ObjectSpace::default();
                for space in self.pool.object_space(&ids).map_err(errno)? {
                    all += space;
                }
                match field {
                    "saved_bytes" => all.referenced_bytes.saturating_sub(space.data_bytes),
                    _ => all.referenced_bytes,
                }
            }
            _ => return Err(Errno::NODATA),
        })
    }
}

type Wanted = (u32, u64, [SystemTime; 2], u32, (u32, u32));

fn read_setattr(arguments: &mut Arguments<'_>) -> Option<Wanted> {
    let valid = arguments.u32()?;
    arguments.u32()?;
    arguments.u64()?;
    let size_bytes = arguments.u64()?;
    arguments.u64()?;
    let seconds = [arguments.u64()?, arguments.u64()?, arguments.u64()?];
    let nanoseconds = [arguments.u32()?, arguments.u32()?, arguments.u32()?];
    let mode = arguments.u32()?;
    arguments.u32()?;
    let owner = (arguments.u32()?, arguments.u32()?);
    let times = [0, 1].map(|index| time(seconds[index], nanoseconds[index]));
    Some((valid, size_bytes, times, mode, owner))
}
