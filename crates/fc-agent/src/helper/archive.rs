//! Reading a path of the container as a tar archive, and saying what a path is.
//!
//! The tar crate writes the members; which ones, and that a live file which grows or shrinks does not
//! break the archive, is here. Runs with the container's root as "/".

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use fcvm_wire::message::PathStat;
use fcvm_wire::{Failure, FailureKind, Outcome};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header, HeaderMode};

use crate::failure::{Context, guest, reason};
use crate::link::DATA_BYTES;

/// Failure of an operation on a path that the host named.
pub(super) fn path_failure(path: &Path, error: &io::Error) -> Failure {
    let errno = Errno::from_io_error(error);
    let kind = match errno {
        Some(Errno::NOENT | Errno::NOTDIR) => FailureKind::PathNotFound,
        _ => FailureKind::Guest,
    };
    let why = errno.map_or_else(|| error.to_string(), reason);
    Failure {
        kind,
        message: format!(
            "'{}' in the container: {}",
            path.display(),
            why.to_lowercase()
        ),
    }
}

/// What a path is; of a link, what it leads to, where that exists.
pub(super) fn stat(path: &str) -> Result<Outcome, Failure> {
    let path = Path::new("/").join(path);
    let metadata = fs::metadata(&path)
        .or_else(|_| fs::symlink_metadata(&path))
        .map_err(|error| path_failure(&path, &error))?;
    Ok(Outcome::Stat(PathStat {
        is_directory: metadata.is_dir(),
        size_bytes: metadata.len(),
        mode: metadata.mode(),
    }))
}

/// Name of the archive's first member for a path; `None` where only the content is asked for.
fn member_name(path: &str) -> Option<PathBuf> {
    if path.ends_with("/.") || path == "." {
        return None;
    }
    Path::new(path).file_name().map(PathBuf::from)
}

/// Writes a path as a tar archive.
pub(super) fn read(path: &str, follow: bool, out: Option<File>) -> Result<Outcome, Failure> {
    let out = out.ok_or_else(|| guest("the archive has no stream"))?;
    let name = member_name(path);
    let path = Path::new("/").join(path);
    let source = if follow || name.is_none() {
        fs::canonicalize(&path)
    } else {
        Ok(path.clone())
    };
    let (source, metadata) = source
        .and_then(|source| {
            let metadata = fs::symlink_metadata(&source)?;
            Ok((source, metadata))
        })
        .map_err(|error| path_failure(&path, &error))?;
    let mut writer = Writer {
        builder: Builder::new(BufWriter::with_capacity(DATA_BYTES, out)),
        linked: BTreeMap::new(),
    };
    match name {
        Some(name) => writer.tree(source, name, metadata)?,
        None if metadata.is_dir() => writer.children(&source, Path::new(""))?,
        None => {
            let path = path.display();
            return Err(guest(format!("'{path}' in the container is no directory")));
        }
    }
    let buffer = writer.builder.into_inner();
    buffer
        .and_then(|mut buffer| buffer.flush())
        .context("sending the archive")?;
    Ok(Outcome::Done)
}

struct Writer {
    builder: Builder<BufWriter<File>>,
    /// Files with several names: device and inode, and the name under which they were sent.
    linked: BTreeMap<(u64, u64), PathBuf>,
}

impl Writer {
    /// A path and all below it. Depth costs memory, not stack.
    fn tree(&mut self, source: PathBuf, name: PathBuf, metadata: Metadata) -> Result<(), Failure> {
        let mut rest = vec![(source, name, metadata)];
        while let Some((source, name, metadata)) = rest.pop() {
            self.member(&source, &name, &metadata)
                .map_err(|error| path_failure(&source, &error))?;
            if metadata.is_dir() {
                rest.extend(children(&source, &name)?);
            }
        }
        Ok(())
    }

    fn children(&mut self, source: &Path, name: &Path) -> Result<(), Failure> {
        for (source, name, metadata) in children(source, name)? {
            self.tree(source, name, metadata)?;
        }
        Ok(())
    }

    fn member(&mut self, source: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_metadata_in_mode(metadata, HeaderMode::Complete);
        let kind = metadata.file_type();
        if !kind.is_file() {
            header.set_size(0);
        }
        if metadata.nlink() > 1 && !kind.is_dir() {
            let key = (metadata.dev(), metadata.ino());
            if let Some(first) = self.linked.get(&key) {
                header.set_entry_type(EntryType::Link);
                header.set_size(0);
                return self.builder.append_link(&mut header, name, first);
            }
            self.linked.insert(key, name.to_owned());
        }
        if kind.is_file() {
            self.file(source, name, &mut header, metadata.len())
        } else if kind.is_symlink() {
            let target = fs::read_link(source)?;
            self.builder.append_link(&mut header, name, target)
        } else if kind.is_socket() {
            // A socket means nothing without its process; tar programs leave it out as well.
            Ok(())
        } else {
            if kind.is_char_device() || kind.is_block_device() {
                header.set_device_major(rustix::fs::major(metadata.rdev()))?;
                header.set_device_minor(rustix::fs::minor(metadata.rdev()))?;
            }
            self.builder.append_data(&mut header, name, io::empty())
        }
    }

    /// Sends exactly the size announced, whatever happens to the file meanwhile.
    fn file(
        &mut self,
        source: &Path,
        name: &Path,
        header: &mut Header,
        size_bytes: u64,
    ) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(source, flags, Mode::empty())?);
        let content = file.chain(io::repeat(0)).take(size_bytes);
        self.builder.append_data(header, name, content)
    }
}

/// Entries of a directory, sorted; those that vanish meanwhile are left out.
fn children(source: &Path, name: &Path) -> Result<Vec<(PathBuf, PathBuf, Metadata)>, Failure> {
    let failed = |error| path_failure(source, &error);
    let mut found = Vec::new();
    for entry in fs::read_dir(source).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        match entry.metadata() {
            Ok(metadata) => found.push((entry.path(), name.join(entry.file_name()), metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(path_failure(&entry.path(), &error)),
        }
    }
    found.sort_by(|(first, ..), (second, ..)| first.cmp(second));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_named_from_the_last_component_on() {
        let name = |path| member_name(path).map(|name| name.display().to_string());
        assert_eq!(name("/etc/hosts").as_deref(), Some("hosts"));
        assert_eq!(name("/data/").as_deref(), Some("data"));
        assert_eq!(name("relative").as_deref(), Some("relative"));
        assert_eq!(name("/data/."), None);
        assert_eq!(name("/"), None);
        assert_eq!(name("."), None);
    }

    #[test]
    fn an_archive_keeps_links_modes_and_long_names() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("tree");
        let long = "n".repeat(200);
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(root.join("sub").join(&long), "content").unwrap();
        fs::set_permissions(
            root.join("sub").join(&long),
            PermissionsExt::from_mode(0o4711),
        )
        .unwrap();
        fs::hard_link(root.join("sub").join(&long), root.join("twin")).unwrap();
        std::os::unix::fs::symlink("/elsewhere", root.join("link")).unwrap();
        let path = directory.path().join("out.tar");
        let out = File::create(&path).unwrap();
        read(root.to_str().unwrap(), false, Some(out)).unwrap();
        let mut archive = tar::Archive::new(File::open(&path).unwrap());
        let mut members = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let link = entry
                .link_name()
                .unwrap()
                .map(|link| link.display().to_string());
            let mut content = String::new();
            entry.read_to_string(&mut content).unwrap();
            members.push((name, entry.header().mode().unwrap() & 0o7777, link, content));
        }
        let names: Vec<_> = members.iter().map(|member| member.0.as_str()).collect();
        let file = format!("tree/sub/{long}");
        assert_eq!(names, ["tree", "tree/twin", "tree/sub", &file, "tree/link"]);
        let (twin, second, link) = (&members[1], &members[3], &members[4]);
        assert_eq!((twin.1, twin.3.as_str()), (0o4711, "content"));
        assert_eq!(second.2.as_deref(), Some("tree/twin"));
        assert_eq!(link.2.as_deref(), Some("/elsewhere"));
    }

    #[test]
    fn a_missing_path_is_told_apart() {
        let failure = read(
            "/no/such/path",
            false,
            Some(File::open("/dev/null").unwrap()),
        );
        assert_eq!(failure.unwrap_err().kind, FailureKind::PathNotFound);
    }
}
