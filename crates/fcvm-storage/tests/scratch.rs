//! Scratch disks with the real mkfs.ext4, checked by the real e2fsck.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use fcvm_storage::{CloneMethod, ScratchStore, StorageError, find_mkfs, reflink_support};
use fcvm_types::ByteSize;

fn mkfs() -> Option<PathBuf> {
    let found = find_mkfs(&std::env::var("PATH").unwrap_or_default());
    if found.is_none() {
        println!("skipped: mkfs.ext4 is not installed");
    }
    found
}

fn names(directory: &Path) -> Vec<String> {
    let entries = directory.read_dir().unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// e2fsck finds nothing to correct.
fn assert_clean(mkfs: &Path, file: &File) {
    let target = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let output = Command::new(mkfs.with_file_name("e2fsck"))
        .args(["-f", "-n", &target])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
}

#[test]
fn disks_are_clean_sparse_apart_and_nameless() {
    let Some(mkfs) = mkfs() else { return };
    let directory = tempfile::tempdir().unwrap();
    let store = ScratchStore::new(directory.path().join("scratch"), mkfs.clone());
    for mebibytes in [16, 100, 10 << 10, 1 << 20] {
        let size = ByteSize::from_mib(mebibytes);
        let disk = store.create(size).unwrap();
        let data = disk.file.metadata().unwrap();
        assert_eq!(data.len(), size.bytes());
        assert_eq!(data.nlink(), 0);
        assert_eq!(data.mode() & 0o777, 0o600);
        let allocated = data.blocks() * 512;
        assert!(allocated < 24 << 20, "{size}: {allocated} bytes allocated");
        if mebibytes <= 10 << 10 {
            assert!(allocated < 1 << 20, "{size}: {allocated} bytes allocated");
            assert_clean(&mkfs, &disk.file);
        }
        let other = store.create(size).unwrap();
        disk.file.write_all_at(&[0xff; 4096], 8 << 20).unwrap();
        let mut bytes = [0; 4096];
        other.file.read_exact_at(&mut bytes, 8 << 20).unwrap();
        assert_eq!(bytes, [0; 4096]);
        let reflink = reflink_support(directory.path()).unwrap();
        assert_eq!(other.method == CloneMethod::Reflink, reflink);
    }
    let kept = names(&directory.path().join("scratch"));
    assert_eq!(kept.len(), 4, "{kept:?}");
    assert!(store.prune().unwrap() > 0);
    assert!(names(&directory.path().join("scratch")).is_empty());
    assert_eq!(store.prune().unwrap(), 0);
}

#[test]
fn damaged_template_is_made_anew() {
    let Some(mkfs) = mkfs() else { return };
    let directory = tempfile::tempdir().unwrap();
    let store = ScratchStore::new(directory.path().to_owned(), mkfs.clone());
    let size = ByteSize::from_mib(64);
    store.create(size).unwrap();
    let template = directory.path().join(&names(directory.path())[0]);
    let whole = std::fs::read(&template).unwrap();
    std::fs::write(&template, b"half written").unwrap();
    let disk = store.create(size).unwrap();
    assert_clean(&mkfs, &disk.file);
    // The same bytes again: a template depends on its size and the options alone.
    assert!(std::fs::read(&template).unwrap() == whole);
}

#[test]
fn many_at_once_make_one_template() {
    let Some(mkfs) = mkfs() else { return };
    let directory = tempfile::tempdir().unwrap();
    let store = ScratchStore::new(directory.path().to_owned(), mkfs);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| store.create(ByteSize::from_mib(256)).unwrap()))
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
    });
    assert_eq!(names(directory.path()).len(), 1);
}

#[test]
fn what_can_not_be_is_told_in_one_line() {
    let Some(mkfs) = mkfs() else { return };
    let directory = tempfile::tempdir().unwrap();
    let store = ScratchStore::new(directory.path().to_owned(), mkfs);
    for mebibytes in [1, 1 << 30] {
        let error = store.create(ByteSize::from_mib(mebibytes)).unwrap_err();
        assert!(matches!(error, StorageError::Size { .. }), "{error}");
    }
    let missing = ScratchStore::new(directory.path().to_owned(), "/nonexistent/mkfs".into());
    let error = missing.create(ByteSize::from_mib(64)).unwrap_err();
    assert!(error.to_string().contains("package e2fsprogs"), "{error}");
    assert!(names(directory.path()).is_empty());
}

#[test]
fn directory_that_can_not_be_written_to() {
    let Some(mkfs) = mkfs() else { return };
    if rustix::process::geteuid().is_root() {
        // Root may write everywhere, but not where the file system itself refuses.
        let store = ScratchStore::new("/proc/fcvm".into(), mkfs);
        assert!(store.create(ByteSize::from_mib(64)).is_err());
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let locked = std::fs::Permissions::from_mode(0o500);
    std::fs::set_permissions(directory.path(), locked).unwrap();
    let store = ScratchStore::new(directory.path().to_owned(), mkfs);
    let error = store.create(ByteSize::from_mib(64)).unwrap_err();
    assert!(matches!(error, StorageError::NotWritable { .. }), "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
}

/// A tmpfs of its own, mounted in a user and mount namespace of a child: full and read-only file
/// systems without being root.
#[test]
fn full_and_read_only_file_systems() {
    const CHILD: &str = "FCVM_TEST_MOUNT";
    let Some(mkfs) = mkfs() else { return };
    if let Ok(directory) = std::env::var(CHILD) {
        let store = ScratchStore::new(directory.clone().into(), mkfs);
        let error = store.create(ByteSize::from_mib(64)).unwrap_err();
        let read_only = directory.ends_with("read-only");
        match (&error, read_only) {
            (StorageError::Full { .. }, false) | (StorageError::NotWritable { .. }, true) => {}
            _ => panic!("{error:?}"),
        }
        assert!(names(Path::new(&directory)).is_empty());
        return;
    }
    let own = std::env::current_exe().unwrap();
    for (name, options) in [("full", "size=8k"), ("read-only", "ro")] {
        let directory = tempfile::tempdir().unwrap();
        let mount = directory.path().join(name);
        std::fs::create_dir(&mount).unwrap();
        let script = "mount -t tmpfs -o \"$1\" fcvm-test \"$2\" || exit 77; \
                      exec \"$3\" --exact full_and_read_only_file_systems";
        let output = Command::new("unshare")
            .args([
                "--user",
                "--map-root-user",
                "--mount",
                "sh",
                "-c",
                script,
                "sh",
                options,
            ])
            .args([&mount, &own])
            .env(CHILD, &mount)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let text = String::from_utf8_lossy(&output.stdout);
                assert!(text.contains("1 passed"), "{text}");
            }
            Ok(output) if output.status.code() == Some(101) => {
                panic!("{name}: {}", String::from_utf8_lossy(&output.stdout));
            }
            _ => println!("skipped: no user namespace to mount a file system in"),
        }
    }
}

/// An XFS in a file, mounted in a mount namespace of a child: needs root.
#[test]
fn disks_share_blocks_where_the_file_system_can() {
    const CHILD: &str = "FCVM_TEST_REFLINK";
    let Some(mkfs) = mkfs() else { return };
    if let Ok(directory) = std::env::var(CHILD) {
        let directory = Path::new(&directory);
        assert!(reflink_support(directory).unwrap());
        let store = ScratchStore::new(directory.join("scratch"), mkfs.clone());
        let disk = store.create(ByteSize::from_mib(10 << 10)).unwrap();
        assert_eq!(disk.method, CloneMethod::Reflink);
        assert_clean(&mkfs, &disk.file);
        return;
    }
    let mkfs_xfs = mkfs.with_file_name("mkfs.xfs");
    if !rustix::process::geteuid().is_root() || !mkfs_xfs.exists() {
        println!("skipped: making and mounting an XFS needs root and mkfs.xfs");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (image, mount) = (
        directory.path().join("image"),
        directory.path().join("mount"),
    );
    std::fs::create_dir(&mount).unwrap();
    File::create(&image).unwrap().set_len(512 << 20).unwrap();
    let made = Command::new(&mkfs_xfs)
        .args(["-q", "-m", "reflink=1"])
        .arg(&image)
        .status();
    assert!(made.unwrap().success());
    // The mount and its loop device end with the namespace.
    let script = "mount -o loop \"$1\" \"$2\" || exit 77; \
                  exec \"$3\" --exact disks_share_blocks_where_the_file_system_can";
    let own = std::env::current_exe().unwrap();
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh"])
        .args([&image, &mount, &own])
        .env(CHILD, &mount)
        .output()
        .unwrap();
    if output.status.code() == Some(77) {
        println!("skipped: no XFS can be mounted here");
        return;
    }
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}
