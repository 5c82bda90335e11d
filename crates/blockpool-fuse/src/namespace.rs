//! Names: finding, making, renaming and removing files and directories.

use std::sync::Arc;

use blockpool::{Kind, Listed, Name, PoolError};
use rustix::io::Errno;

use crate::filesystem::{Answer, FileSystem, errno};
use crate::node::{NAMELESS, Node, ROOT, Target};
use crate::wire::{Arguments, Reply, Request, open, put_directory_entry};

/// The largest list of names in one answer.
const LIST_BYTES_MAX: usize = 64 << 10;
/// Flag of RENAME2: fail where the new name exists.
const RENAME_NOREPLACE: u32 = 1;
const KIND_MASK: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
const O_EXCL: u32 = 0o200;

impl FileSystem {
    /// The name in a directory.
    fn name_in(&self, parent: &Node, name: &[u8]) -> Result<Name, Errno> {
        if name.len() > 255 {
            return Err(Errno::NAMETOOLONG);
        }
        let name = std::str::from_utf8(name).map_err(|_| Errno::INVAL)?;
        let text = match &parent.target {
            Target::Root if name.contains('@') || name == NAMELESS => return Err(Errno::INVAL),
            Target::Root => name.to_owned(),
            Target::Dataset(dataset) => format!("{dataset}/{name}"),
            Target::File(_) => return Err(Errno::NOTDIR),
        };
        text.parse().map_err(errno)
    }

    /// The name of a file that is made, moved or removed.
    fn file_name_in(&self, parent: u64, name: &[u8]) -> Result<Name, Errno> {
        let parent = self.nodes.get(parent).map_err(errno)?;
        let name = self.name_in(&parent, name)?;
        if name.object().is_none() {
            // There are files in datasets only.
            return Err(Errno::PERM);
        }
        if name.snapshot().is_some() {
            return Err(Errno::INVAL);
        }
        Ok(name)
    }

    pub(crate) fn entry(&self, listed: &Listed) -> Result<(Arc<Node>, Reply), Errno> {
        let node = self.nodes.enter(listed, 1).map_err(errno)?;
        let mut reply = Reply::default();
        match self.put_entry(&node, &mut reply) {
            Ok(()) => Ok((node, reply)),
            Err(error) => {
                self.nodes.forget(node.number, 1);
                Err(error)
            }
        }
    }

    pub(crate) fn lookup(&self, parent: u64, mut arguments: Arguments<'_>) -> Answer {
        let name = arguments.name().ok_or(Errno::INVAL)?;
        let parent = self.nodes.get(parent).map_err(errno)?;
        let name = match self.name_in(&parent, name) {
            // What cannot be a name is none.
            Err(Errno::INVAL) => return Err(Errno::NOENT),
            other => other?,
        };
        let listed = self.pool.find(&name).map_err(errno)?;
        Ok(Some(self.entry(&listed)?.1))
    }

    pub(crate) fn mkdir(&self, request: Request<'_>) -> Answer {
        let mut arguments = request.arguments();
        arguments.take(8).ok_or(Errno::INVAL)?;
        let parent = self.nodes.get(request.node).map_err(errno)?;
        let name = self.name_in(&parent, arguments.name().ok_or(Errno::INVAL)?)?;
        if name.object().is_some() {
            return Err(Errno::PERM);
        }
        match self.pool.create_dataset(&name) {
            Err(PoolError::Exists { .. }) if request.is_resent => {}
            other => drop(other.map_err(errno)?),
        }
        let listed = self.pool.find(&name).map_err(errno)?;
        Ok(Some(self.made(&listed, request, None)?.1))
    }

    /// The answer to who made something, with its mode, where that is kept.
    fn made(
        &self,
        listed: &Listed,
        request: Request<'_>,
        mode: Option<u32>,
    ) -> Result<(Arc<Node>, Reply), Errno> {
        let node = self.nodes.enter(listed, 0).map_err(errno)?;
        {
            let mut memory = node.memory();
            memory.mode = mode.map_or(memory.mode, |mode| mode & 0o777);
            (memory.uid, memory.gid) = (Some(request.uid), Some(request.gid));
        }
        self.entry(listed)
    }

    /// MKNOD, with its mode first, of a regular file.
    pub(crate) fn mknod(&self, request: Request<'_>) -> Answer {
        let mut arguments = request.arguments();
        let mode = arguments.u32().ok_or(Errno::INVAL)?;
        arguments.take(12).ok_or(Errno::INVAL)?;
        if mode & KIND_MASK != REGULAR {
            return Err(Errno::PERM);
        }
        let name = self.file_name_in(request.node, arguments.name().ok_or(Errno::INVAL)?)?;
        let listed = self.make(&name, !request.is_resent)?;
        Ok(Some(self.made(&listed, request, Some(mode))?.1))
    }

    fn make(&self, name: &Name, is_exclusive: bool) -> Result<Listed, Errno> {
        match self.pool.create_object(name, 0) {
            Err(PoolError::Exists { .. }) if !is_exclusive => {}
            other => drop(other.map_err(errno)?),
        }
        self.pool.find(name).map_err(errno)
    }

    /// CREATE, and TMPFILE, which gives no name.
    pub(crate) fn create(&self, request: Request<'_>, is_nameless: bool) -> Answer {
        let mut arguments = request.arguments();
        let flags = arguments.u32().ok_or(Errno::INVAL)?;
        let mode = arguments.u32().ok_or(Errno::INVAL)?;
        arguments.take(8).ok_or(Errno::INVAL)?;
        let listed = if is_nameless {
            // Files are where their directory is a dataset.
            self.file_name_in(request.node, b"nameless")?;
            self.make(&self.next_nameless()?, true)?
        } else {
            let name = self.file_name_in(request.node, arguments.name().ok_or(Errno::INVAL)?)?;
            let is_exclusive = flags & O_EXCL != 0 && !request.is_resent;
            self.make(&name, is_exclusive)?
        };
        let (node, mut reply) = self.made(&listed, request, Some(mode))?;
        node.memory().may_be_mapped = true;
        put_open(&mut reply, flags);
        Ok(Some(reply))
    }

    /// A place for what has no name.
    pub(crate) fn next_nameless(&self) -> Result<Name, Errno> {
        let number = self
            .nameless
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        format!("{NAMELESS}/{}-{number}", self.run)
            .parse()
            .map_err(errno)
    }

    /// What has snapshots stays where they can be found.
    fn check_movable(&self, name: &Name) -> Result<Listed, Errno> {
        let listed = self.pool.find(name).map_err(errno)?;
        if self.pool.list(Some(name)).map_err(errno)?.len() > 1 {
            return Err(Errno::BUSY);
        }
        Ok(listed)
    }

    pub(crate) fn unlink(&self, request: Request<'_>) -> Answer {
        let name = request.arguments().name().ok_or(Errno::INVAL)?;
        let name = self.file_name_in(request.node, name)?;
        let listed = match self.check_movable(&name) {
            Err(Errno::NOENT) if request.is_resent => return Ok(Some(Reply::default())),
            other => other?,
        };
        self.pool
            .rename_object(&name, &self.next_nameless()?)
            .map_err(errno)?;
        self.set_nameless(&listed)?;
        Ok(Some(Reply::default()))
    }

    /// Whoever has it open goes on; it ends when the kernel forgets it.
    fn set_nameless(&self, listed: &Listed) -> Result<(), Errno> {
        let node = self.nodes.enter(listed, 0).map_err(errno)?;
        node.memory().is_nameless = true;
        Ok(())
    }

    pub(crate) fn rmdir(&self, request: Request<'_>) -> Answer {
        let name = request.arguments().name().ok_or(Errno::INVAL)?;
        let parent = self.nodes.get(request.node).map_err(errno)?;
        let name = self.name_in(&parent, name)?;
        if name.object().is_some() {
            return Err(Errno::NOTDIR);
        }
        match self.pool.destroy(&name, false) {
            Err(PoolError::NotFound { .. }) if request.is_resent => {}
            other => drop(other.map_err(errno)?),
        }
        Ok(Some(Reply::default()))
    }

    pub(crate) fn rename(&self, request: Request<'_>, has_flags: bool) -> Answer {
        let mut arguments = request.arguments();
        let new_parent = arguments.u64().ok_or(Errno::INVAL)?;
        let flags = if has_flags {
            let flags = arguments.u32().ok_or(Errno::INVAL)?;
            arguments.u32().ok_or(Errno::INVAL)?;
            flags
        } else {
            0
        };
        if flags & !RENAME_NOREPLACE != 0 {
            return Err(Errno::INVAL);
        }
        let old_name = arguments.name().ok_or(Errno::INVAL)?;
        let new_name = arguments.name().ok_or(Errno::INVAL)?;
        if request.node == ROOT && new_parent == ROOT {
            // A program that moves copies then.
            return Err(Errno::XDEV);
        }
        let old = self.file_name_in(request.node, old_name)?;
        let new = self.file_name_in(new_parent, new_name)?;
        let target = match self.check_movable(&new) {
            Ok(listed) => Some(listed),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error),
        };
        let source = match self.pool.find(&old) {
            Err(PoolError::NotFound { .. }) if request.is_resent && target.is_some() => {
                return Ok(Some(Reply::default()));
            }
            other => other.map_err(errno)?,
        };
        match target {
            None => self.pool.rename_object(&old, &new).map_err(errno)?,
            Some(_) if flags & RENAME_NOREPLACE != 0 => return Err(Errno::EXIST),
            Some(target) if target.id == source.id => {}
            Some(target) => {
                self.pool
                    .rename_over(&old, &new, &self.next_nameless()?)
                    .map_err(errno)?;
                self.set_nameless(&target)?;
            }
        }
        Ok(Some(Reply::default()))
    }

    /// LINK: a name for a file that has none. Two names of one file are not possible.
    pub(crate) fn link(&self, request: Request<'_>) -> Answer {
        let mut arguments = request.arguments();
        let number = arguments.u64().ok_or(Errno::INVAL)?;
        let name = arguments.name().ok_or(Errno::INVAL)?;
        let name = self.file_name_in(request.node, name)?;
        let node = self.nodes.get(number).map_err(errno)?;
        let listed = self.pool.find_id(node.id()).map_err(errno)?;
        let is_done = request.is_resent && listed.name == name.to_string();
        if !is_done {
            if !node.memory().is_nameless {
                return Err(Errno::PERM);
            }
            let old: Name = listed.name.parse().map_err(errno)?;
            self.pool.rename_object(&old, &name).map_err(errno)?;
            node.memory().is_nameless = false;
        }
        let listed = self.pool.find_id(node.id()).map_err(errno)?;
        Ok(Some(self.entry(&listed)?.1))
    }

    /// Names of a directory, by number: what is made or removed meanwhile moves none of the others.
    pub(crate) fn readdir(&self, request: Request<'_>) -> Answer {
        let mut arguments = request.arguments();
        arguments.u64().ok_or(Errno::INVAL)?;
        let offset = arguments.u64().ok_or(Errno::INVAL)?;
        let limit = arguments.u32().ok_or(Errno::INVAL)? as usize;
        let limit = limit.min(LIST_BYTES_MAX);
        let node = self.nodes.get(request.node).map_err(errno)?;
        let (below, kind) = match &node.target {
            Target::Root => (None, Kind::Dataset),
            Target::Dataset(name) => (Some(name.parse::<Name>().map_err(errno)?), Kind::Object),
            Target::File(_) => return Err(Errno::NOTDIR),
        };
        let mut listed = self.pool.list(below.as_ref()).map_err(errno)?;
        listed.retain(|entry| entry.kind == kind && entry.name != NAMELESS);
        listed.sort_unstable_by_key(|entry| entry.id);
        let mut reply = Reply::default();
        let dots = [(1, &b"."[..]), (2, &b".."[..])];
        let dots = dots.map(|(next, name)| (request.node, next, true, name));
        let entries = listed.iter().map(|entry| {
            let name = entry.name.rsplit('/').next().unwrap_or_default();
            let is_directory = entry.kind == Kind::Dataset;
            let number = entry.id.get() + 1;
            (number, number + 2, is_directory, name.as_bytes())
        });
        for (number, next, is_directory, name) in dots.into_iter().chain(entries) {
            if next > offset
                && !put_directory_entry(&mut reply, limit, number, next, is_directory, name)
            {
                break;
            }
        }
        Ok(Some(reply))
    }
}

/// What an opened file is to the kernel. Its handle is 0: the node says all.
///
/// Who asks for direct I/O gets it from the file system too: only then does the kernel send writes of one file side by side.
pub(crate) fn put_open(reply: &mut Reply, asked_flags: u32) {
    let mut flags = open::KEEP_CACHE | open::NOFLUSH | open::PARALLEL_DIRECT_WRITES;
    if asked_flags & rustix::fs::OFlags::DIRECT.bits() != 0 {
        flags |= open::DIRECT_IO;
    }
    reply.u64(0).u32(flags).u32(0);
}
