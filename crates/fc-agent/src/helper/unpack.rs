//! Unpacking a tar archive into a directory of the container. Runs with the container's root as "/".
//!
//! The tar crate does the work, and refuses members that leave the directory; special files, which
//! it does not know, are made here under the same rule.

use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use fcvm_wire::{Failure, FailureKind, Outcome};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, makedev, mknodat, utimensat};
use tar::{Archive, Entry, EntryType};

use super::archive::path_failure;
use crate::failure::{bad_request, guest};

/// Unpacks the archive.
pub(super) fn write(
    directory: &str,
    keep_owners: bool,
    input: Option<File>,
) -> Result<Outcome, Failure> {
    let input = input.ok_or_else(|| guest("the archive has no stream"))?;
    let directory = Path::new("/").join(directory);
    let metadata =
        std::fs::metadata(&directory).map_err(|error| path_failure(&directory, &error))?;
    if !metadata.is_dir() {
        return Err(Failure {
            kind: FailureKind::PathNotFound,
            message: format!("'{}' in the container is no directory", directory.display()),
        });
    }
    rustix::process::umask(Mode::empty());
    unpack(&directory, keep_owners, BufReader::new(input))?;
    Ok(Outcome::Done)
}

fn unpack(directory: &Path, keep_owners: bool, input: impl Read) -> Result<(), Failure> {
    let directory =
        &std::fs::canonicalize(directory).map_err(|error| path_failure(directory, &error))?;
    let mut archive = Archive::new(input);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(keep_owners);
    let broken = |error: &std::io::Error| bad_request(format!("the archive is broken: {error}"));
    // Directories get their modes and times after their content.
    let mut directories = Vec::new();
    for entry in archive.entries().map_err(|error| broken(&error))? {
        let mut entry = entry.map_err(|error| broken(&error))?;
        check_path(&entry)?;
        match entry.header().entry_type() {
            EntryType::Directory => {
                if !directory.join(relative(&entry)).is_dir() {
                    unpack_entry(&mut entry, directory)?;
                }
                directories.push(entry);
            }
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                special(&entry, directory, keep_owners)?;
            }
            _ => unpack_entry(&mut entry, directory)?,
        }
    }
    for mut entry in directories.into_iter().rev() {
        unpack_entry(&mut entry, directory)?;
        set_time(&entry, directory)?;
    }
    Ok(())
}

/// Sets a directory's time of modification, which the crate leaves alone.
fn set_time<R: Read>(entry: &Entry<'_, R>, directory: &Path) -> Result<(), Failure> {
    let Ok(seconds) = entry.header().mtime() else {
        return Ok(());
    };
    let time = Timespec {
        tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX),
        tv_nsec: 0,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    let path = directory.join(relative(entry));
    utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|errno| path_failure(&path, &errno.into()))
}

/// The member's name below the directory: as the crate, without a leading "/".
fn relative<R: Read>(entry: &Entry<'_, R>) -> PathBuf {
    let path = entry.path_bytes();
    Path::new(std::ffi::OsStr::from_bytes(&path))
        .components()
        .filter(|part| matches!(part, Component::Normal(_)))
        .collect()
}

fn climbs_out<R: Read>(entry: &Entry<'_, R>) -> Failure {
    bad_request(format!(
        "the archive holds a member that climbs out of it: '{}'",
        String::from_utf8_lossy(&entry.path_bytes())
    ))
}

fn check_path<R: Read>(entry: &Entry<'_, R>) -> Result<(), Failure> {
    let path = entry.path_bytes();
    let path = Path::new(std::ffi::OsStr::from_bytes(&path));
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(climbs_out(entry));
    }
    Ok(())
}

fn unpack_entry<R: Read>(entry: &mut Entry<'_, R>, directory: &Path) -> Result<(), Failure> {
    let unpacked = entry.unpack_in(directory);
    match unpacked {
        Ok(true) => Ok(()),
        Ok(false) => Err(climbs_out(entry)),
        Err(error) => {
            // The crate wraps the cause in several layers of text.
            let mut cause: &dyn std::error::Error = &error;
            while let Some(source) = cause.source() {
                cause = source;
            }
            Err(guest(format!(
                "'{}' cannot be written in the container: {cause}",
                String::from_utf8_lossy(&entry.path_bytes())
            )))
        }
    }
}

fn special<R: Read>(
    entry: &Entry<'_, R>,
    directory: &Path,
    keep_owners: bool,
) -> Result<(), Failure> {
    let header = entry.header();
    let path = directory.join(relative(entry));
    // A link among the directories above it may lead anywhere.
    let parent = path.parent().unwrap_or(directory);
    let real = std::fs::canonicalize(parent).map_err(|error| path_failure(parent, &error))?;
    if path == *directory || !real.starts_with(directory) {
        return Err(climbs_out(entry));
    }
    let kind = match header.entry_type() {
        EntryType::Fifo => FileType::Fifo,
        EntryType::Char => FileType::CharacterDevice,
        _ => FileType::BlockDevice,
    };
    let number = |part: std::io::Result<Option<u32>>| part.ok().flatten().unwrap_or(0);
    let device = makedev(number(header.device_major()), number(header.device_minor()));
    let mode = Mode::from_raw_mode(header.mode().unwrap_or(0o600) & 0o7777);
    let _ = std::fs::remove_file(&path);
    mknodat(CWD, &path, kind, mode, device).map_err(|errno| path_failure(&path, &errno.into()))?;
    if keep_owners {
        let id = |id: std::io::Result<u64>| id.ok().and_then(|id| u32::try_from(id).ok());
        std::os::unix::fs::lchown(&path, id(header.uid()), id(header.gid()))
            .map_err(|error| path_failure(&path, &error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tar::{Builder, Header};

    use super::*;

    fn member(builder: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, mode: u32, data: &str) {
        let mut header = Header::new_gnu();
        // Written as it is: the crate's own setter refuses hostile names.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_000_000_000);
        header.set_uid(0);
        header.set_gid(0);
        if kind == EntryType::Symlink {
            header.set_link_name(data).unwrap();
            header.set_size(0);
            header.set_cksum();
            builder.append(&header, std::io::empty()).unwrap();
        } else {
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data.as_bytes()).unwrap();
        }
    }

    fn unpacked(
        fill: impl FnOnce(&mut Builder<Vec<u8>>),
    ) -> (tempfile::TempDir, Result<(), Failure>) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("in")).unwrap();
        let mut builder = Builder::new(Vec::new());
        fill(&mut builder);
        let bytes = builder.into_inner().unwrap();
        let result = unpack(&directory.path().join("in"), false, bytes.as_slice());
        (directory, result)
    }

    #[test]
    fn modes_times_and_special_files_are_kept() {
        let (directory, result) = unpacked(|builder| {
            member(builder, "closed", EntryType::Directory, 0o711, "");
            member(
                builder,
                "closed/file",
                EntryType::Regular,
                0o4755,
                "content",
            );
            member(builder, "pipe", EntryType::Fifo, 0o640, "");
        });
        result.unwrap();
        let path = |name: &str| directory.path().join("in").join(name);
        let metadata = |name: &str| std::fs::symlink_metadata(path(name)).unwrap();
        assert_eq!(metadata("closed").permissions().mode() & 0o7777, 0o711);
        assert_eq!(
            metadata("closed/file").permissions().mode() & 0o7777,
            0o4755
        );
        assert_eq!(
            metadata("closed").modified().unwrap(),
            std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000)
        );
        assert_eq!(metadata("pipe").permissions().mode() & 0o170_000, 0o010_000);
    }

    #[test]
    fn members_that_climb_out_are_refused() {
        let (directory, result) =
            unpacked(|builder| member(builder, "../out", EntryType::Regular, 0o644, "x"));
        assert!(result.unwrap_err().message.contains("climbs out"));
        assert!(!directory.path().join("out").exists());
        let (directory, result) = unpacked(|builder| {
            member(builder, "link", EntryType::Symlink, 0o777, "..");
            member(builder, "link/out", EntryType::Regular, 0o644, "x");
        });
        assert!(result.is_err());
        assert!(!directory.path().join("out").exists());
    }

    #[test]
    fn special_files_stay_inside() {
        let outside = tempfile::tempdir().unwrap();
        let target = outside.path().join("pipe");
        std::fs::write(&target, "kept").unwrap();
        let absolute = target.to_str().unwrap().to_owned();
        let (_absolute, result) =
            unpacked(|builder| member(builder, &absolute, EntryType::Fifo, 0o600, ""));
        // Taken as a path below the directory, where nothing is yet.
        assert!(result.is_err());
        let (_linked, result) = unpacked(|builder| {
            let parent = outside.path().to_str().unwrap();
            member(builder, "link", EntryType::Symlink, 0o777, parent);
            member(builder, "link/pipe", EntryType::Fifo, 0o600, "");
        });
        assert!(result.unwrap_err().message.contains("climbs out"));
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "kept");
    }

    #[test]
    fn a_truncated_archive_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut builder = Builder::new(Vec::new());
        member(
            &mut builder,
            "file",
            EntryType::Regular,
            0o644,
            &"x".repeat(2000),
        );
        let bytes = builder.into_inner().unwrap();
        assert!(unpack(directory.path(), false, &bytes[..1024]).is_err());
        assert!(unpack(directory.path(), false, &b"no archive at all"[..]).is_err());
    }
}
