//! The directory that Firecracker works in: its sockets, and the files that it is told by name.
//!
//! | | without a jail | with one |
//! |---|---|---|
//! | disks, the memory of another | links to inherited descriptors | hard links, a disk of another file system mounted; copies of memory |
//! | other files | where they are | hard links, copies where a link cannot be |
//! | the memory server's socket | where it is | another, whose connection is handed to the server |
//!
//! A link needs nothing of what it leads to but the file, so a disk that has no name gets one in the
//! jail. Where it is in another file system, such as a mounted pool, it gets a name there, is mounted over a
//! file of the jail, in the jail's own namespace of mounts, and loses the name again. Files that a VM only reads may be those of others too: the jails' group is let read them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{
    DirBuilderExt, FileExt, MetadataExt, PermissionsExt, chown, fchown, symlink,
};
use std::path::{Path, PathBuf};

use fcvm_process::HelperCommand;
use fcvm_types::guest::AGENT_VSOCK_PORT;
use fcvm_types::record::ProcessIdentity;
use rustix::fs::{AtFlags, CWD, MemfdFlags, SeekFrom};
use tokio::net::UnixListener;

use super::Firecracker;
use super::configuration::VSOCK_NAME;
use super::jail::{Jail, remove_cgroup};
use super::metrics::{METRICS_NAME, MetricsReader};
use crate::check::text_path;
use crate::error::HypervisorError;

/// Name of the file that memory is saved to in a jail.
const MEMORY_OUT: &str = "memory.out";
/// Name of the socket in a jail to which Firecracker connects for its memory.
const MEMORY_SOCKET: &str = "memory.sock";
/// Bytes copied at a time.
const COPY_BYTES: usize = 128 << 10;

/// The directory of a VM, for Firecracker's user alone. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Place {
    /// What Firecracker works in; its root where it is jailed.
    path: PathBuf,
    jail: Option<Jail>,
    /// What dropping removes.
    made: PathBuf,
    /// Disks that are to be mounted over files of these names.
    mounts: Vec<(File, String)>,
}

impl Place {
    pub(super) fn create(firecracker: &Firecracker) -> io::Result<Self> {
        let (path, made) = match firecracker.jail() {
            None => (
                firecracker.directory().to_owned(),
                firecracker.directory().to_owned(),
            ),
            Some(_) => {
                let made = firecracker.jail_directory()?;
                (made.join("root"), made)
            }
        };
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        if let Some(parent) = made.parent()
            && firecracker.jail().is_some()
        {
            builder.recursive(true).create(parent)?;
        }
        // What is there already is another's, which the value below would remove.
        builder.recursive(false).create(&made)?;
        let place = Self {
            jail: firecracker.jail().cloned(),
            path,
            made,
            mounts: Vec::new(),
        };
        if place.path != place.made {
            builder.create(&place.path)?;
        }
        Ok(place)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the agent connects to.
    pub(super) fn bind_agent(&self) -> io::Result<UnixListener> {
        let path = self.path.join(format!("{VSOCK_NAME}_{AGENT_VSOCK_PORT}"));
        let listener = UnixListener::bind(&path)?;
        if let Some(jail) = &self.jail {
            chown(&path, Some(jail.user), Some(jail.group))?;
        }
        Ok(listener)
    }

    /// Where a jailed Firecracker connects for its memory: it reaches no other socket.
    pub(super) fn bind_memory(&self) -> io::Result<Option<UnixListener>> {
        let Some(jail) = &self.jail else {
            return Ok(None);
        };
        let path = self.path.join(MEMORY_SOCKET);
        let listener = UnixListener::bind(&path)?;
        chown(&path, Some(jail.user), Some(jail.group))?;
        Ok(Some(listener))
    }

    /// The name of the socket that the memory is had from.
    pub(super) fn memory_socket(&self, server: &Path) -> Result<String, HypervisorError> {
        match self.jail {
            None => text_path(server, "the memory server's socket"),
            Some(_) => Ok(MEMORY_SOCKET.to_owned()),
        }
    }

    /// Makes a file reachable by a name: one that it only reads, or one that is its own, if need be once it has
    /// [`begun`](Self::mount).
    pub(super) fn add(
        &mut self,
        command: &mut HelperCommand,
        file: File,
        read_only: bool,
        name: &str,
    ) -> io::Result<()> {
        let path = self.path.join(name);
        match &self.jail {
            None => {
                let number = command.inherit(OwnedFd::from(file))?;
                symlink(format!("/proc/self/fd/{number}"), path)
            }
            Some(_) if read_only => self.lay_in(&file, name),
            Some(jail) => {
                fchown(&file, Some(jail.user), None)?;
                if file.metadata()?.dev() == fs::metadata(&self.path)?.dev() {
                    return link(&file, &path);
                }
                File::create_new(path)?;
                self.mounts.push((file, name.to_owned()));
                Ok(())
            }
        }
    }

    /// Mounts what could not be linked, for the process that runs in the jail.
    pub(super) fn mount(&mut self, process: ProcessIdentity) -> io::Result<()> {
        for (file, name) in std::mem::take(&mut self.mounts) {
            let Some(passage) = self.jail.as_ref().map(Jail::passage) else {
                continue;
            };
            link(&file, &passage)?;
            let mounted = fcvm_process::mount_for(process, &passage, Path::new(&name));
            // The mount keeps it.
            fs::remove_file(&passage)?;
            mounted?;
        }
        Ok(())
    }

    /// Lays a file as it is now into the jail, where there is one; Firecracker only reads it.
    pub(super) fn lay_in(&self, file: &File, name: &str) -> io::Result<()> {
        match &self.jail {
            None => Ok(()),
            Some(jail) => share(file, &self.path.join(name), jail.group),
        }
    }

    /// Makes the pipe for its counters, and reads that.
    pub(super) fn add_metrics(&self) -> io::Result<MetricsReader> {
        let path = self.path.join(METRICS_NAME);
        let reader = MetricsReader::start(&path)?;
        if let Some(jail) = &self.jail {
            chown(&path, Some(jail.user), None)?;
        }
        Ok(reader)
    }

    /// Makes an empty file that it reads and writes, and the owner too.
    pub(super) fn add_state(
        &mut self,
        command: &mut HelperCommand,
        name: &str,
    ) -> io::Result<File> {
        if let Some(jail) = &self.jail {
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(self.path.join(name))?;
            fchown(&file, Some(jail.user), None)?;
            return Ok(file);
        }
        let file = rustix::fs::memfd_create("fcvm-device-state", MemfdFlags::CLOEXEC)?;
        let file = File::from(file);
        self.add(command, file.try_clone()?, false, name)?;
        Ok(file)
    }

    /// The name of a file for Firecracker, which reads it.
    pub(super) fn shown(
        &self,
        path: &Path,
        name: &str,
        what: &'static str,
    ) -> Result<String, HypervisorError> {
        if self.jail.is_none() {
            return text_path(path, what);
        }
        let laid_in = || self.lay_in(&File::open(path)?, name);
        laid_in().map_err(|error| refused(what, path, &error))?;
        Ok(name.to_owned())
    }

    /// In a jail, a file that has what `memory` has, for Firecracker to write to.
    pub(super) fn output(&self, memory: &File) -> io::Result<Option<Output>> {
        let Some(jail) = &self.jail else {
            return Ok(None);
        };
        let path = self.path.join(MEMORY_OUT);
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true);
        let output = Output {
            file: file.open(&path)?,
            path,
        };
        sparse_copy(memory, &output.file)?;
        fchown(&output.file, Some(jail.user), None)?;
        Ok(Some(output))
    }
}

/// A file in a jail that Firecracker writes the memory to. It is removed with this value.
#[derive(Debug)]
pub(super) struct Output {
    /// Not opened anew by its name, in place of which a hostile process could put another.
    file: File,
    path: PathBuf,
}

impl Output {
    /// Its name for Firecracker.
    pub(super) const NAME: &str = MEMORY_OUT;

    /// Copies what was written.
    pub(super) fn copy_to(&self, memory: &File) -> io::Result<()> {
        let (length, wanted) = (self.file.metadata()?.len(), memory.metadata()?.len());
        if length != wanted {
            return Err(io::Error::other(format!(
                "{} has written {length} bytes of {wanted}",
                super::NAME
            )));
        }
        sparse_copy(&self.file, memory)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.made) {
            tracing::debug!("cannot remove {}: {error}", self.made.display());
        }
        if let Some(jail) = &self.jail
            && let Err(error) = remove_cgroup(&jail.cgroup())
        {
            tracing::debug!("cannot remove {}: {error}", jail.cgroup().display());
        }
    }
}

fn refused(what: &str, path: &Path, error: &io::Error) -> HypervisorError {
    HypervisorError::InvalidSpec {
        what: format!("{what} {} in a jail", path.display()),
        reason: error.to_string(),
    }
}

/// Lets a group read a file by a name in the jail.
fn share(file: &File, path: &Path, group: u32) -> io::Result<()> {
    let allow = |file: &File| {
        let data = file.metadata()?;
        if data.mode() & 0o004 != 0 || (data.gid() == group && data.mode() & 0o040 != 0) {
            return Ok(());
        }
        fchown(file, None, Some(group))?;
        file.set_permissions(fs::Permissions::from_mode((data.mode() | 0o040) & 0o7777))
    };
    if allow(file).and_then(|()| link(file, path)).is_ok() {
        return Ok(());
    }
    // Another file system, or one that nothing can be changed in.
    let copy = File::create_new(path)?;
    if rustix::fs::ioctl_ficlone(&copy, file).is_err() {
        sparse_copy(file, &copy)?;
    }
    allow(&copy)
}

/// Copies the parts of a file that are no holes.
fn sparse_copy(from: &File, to: &File) -> io::Result<()> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(from, SeekFrom::Data(at)) {
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?;
        at = start;
        while at < end {
            let wanted = usize::try_from(end - at).map_or(COPY_BYTES, |left| left.min(COPY_BYTES));
            from.read_exact_at(&mut buffer[..wanted], at)?;
            to.write_all_at(&buffer[..wanted], at)?;
            at += wanted as u64;
        }
    }
    Ok(())
}

/// Gives a file another name, or the first where it was made without one.
fn link(file: &File, path: &Path) -> io::Result<()> {
    let number = std::os::fd::AsRawFd::as_raw_fd(&file.as_fd());
    let from = format!("/proc/self/fd/{number}");
    let linked = rustix::fs::linkat(CWD, from, CWD, path, AtFlags::SYMLINK_FOLLOW);
    linked.map_err(|errno| match io::Error::from(errno) {
        error if error.kind() == io::ErrorKind::NotFound => io::Error::other(
            "its file system has no files without a name that can get one: --jail=false starts the VM without a jail",
        ),
        error => error,
    })
}
