//! The same layers through other programs: `umoci unpack` as root, and extraction by `fsck.erofs`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use crate::support::build_image;
use crate::support::reader::Image;
use crate::support::tarball::{Entry, tar};

/// Objects by path; `""` is the root.
type Objects = BTreeMap<Vec<u8>, Seen>;
/// The names of each file that has several.
type LinkGroups = BTreeSet<Vec<Vec<u8>>>;

/// One object as a file system shows it; `ino` only tells which names are the same file.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    uid: u32,
    gid: u32,
    nlink: u64,
    rdev: u64,
    mtime: (i64, u32),
    content: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Walks a directory tree; the second part groups the paths of files with several names.
fn walk(root: &Path) -> (Objects, LinkGroups) {
    let mut seen = BTreeMap::new();
    let mut inodes: BTreeMap<u64, Vec<Vec<u8>>> = BTreeMap::new();
    let mut pending = vec![(Vec::new(), root.to_path_buf())];
    while let Some((name, path)) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_symlink() {
            fs::read_link(&path)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec()
        } else if kind.is_file() {
            fs::read(&path).unwrap()
        } else {
            Vec::new()
        };
        if kind.is_dir() {
            for child in fs::read_dir(&path).unwrap() {
                let child = child.unwrap();
                let mut child_name = name.clone();
                if !name.is_empty() {
                    child_name.push(b'/');
                }
                child_name.extend(child.file_name().as_bytes());
                pending.push((child_name, child.path()));
            }
        } else if metadata.nlink() > 1 {
            inodes.entry(metadata.ino()).or_default().push(name.clone());
        }
        let is_device = kind.is_char_device() || kind.is_block_device();
        let object = Seen {
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
            nlink: if kind.is_dir() { 0 } else { metadata.nlink() },
            rdev: if is_device { metadata.rdev() } else { 0 },
            mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
            content,
            xattrs: xattrs(&path),
        };
        seen.insert(name, object);
    }
    (seen, groups(inodes))
}

fn groups(inodes: BTreeMap<u64, Vec<Vec<u8>>>) -> LinkGroups {
    let sorted = |mut names: Vec<Vec<u8>>| {
        names.sort();
        names
    };
    inodes.into_values().map(sorted).collect()
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let mut found = BTreeMap::new();
    for name in names[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; 1 << 16];
        let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]).unwrap();
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    found
}

/// The image as the same kind of list.
fn listed(image: &Image) -> (Objects, LinkGroups) {
    let mut inodes: BTreeMap<u64, Vec<Vec<u8>>> = BTreeMap::new();
    let mut seen = BTreeMap::new();
    for (path, entry) in &image.entries {
        let is_directory = entry.kind() == 0o4;
        if !is_directory && entry.nlink > 1 {
            inodes.entry(entry.nid).or_default().push(path.clone());
        }
        let (major, minor) = (
            entry.rdev >> 8 & 0xfff,
            entry.rdev & 0xff | entry.rdev >> 12 & 0xf_ff00,
        );
        let object = Seen {
            mode: u32::from(entry.mode),
            uid: entry.uid,
            gid: entry.gid,
            nlink: if is_directory {
                0
            } else {
                u64::from(entry.nlink)
            },
            rdev: rustix::fs::makedev(major, minor),
            mtime: entry.mtime,
            content: if is_directory {
                Vec::new()
            } else {
                entry.content.clone()
            },
            xattrs: entry.xattrs.clone(),
        };
        seen.insert(path.clone(), object);
    }
    (seen, groups(inodes))
}

fn run(program: &str, arguments: &[&str], directory: &Path) -> Option<()> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .output()
        .ok()?;
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Some(())
}

/// A tree of real files archived by GNU tar, if it and busybox are there: many hard links,
/// symbolic links and programs.
fn real_layer() -> Option<Vec<u8>> {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    for name in ["usr/bin", "usr/sbin", "etc"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    for busybox in ["/usr/bin/busybox", "/bin/busybox"] {
        if fs::copy(busybox, root.join("usr/bin/busybox")).is_ok() {
            run("usr/bin/busybox", &["--install", "usr/bin"], &root)?;
            run("usr/bin/busybox", &["--install", "-s", "usr/sbin"], &root)?;
            break;
        }
    }
    std::os::unix::fs::symlink("usr/bin", root.join("bin")).unwrap();
    run(
        "cp",
        &["-r", concat!(env!("CARGO_MANIFEST_DIR"), "/src"), "etc/"],
        &root,
    )?;
    let archive = directory.path().join("layer.tar");
    let options = [
        "--format=posix",
        "--owner=0",
        "--group=0",
        "-cf",
        archive.to_str()?,
        ".",
    ];
    run("tar", &options, &root)?;
    Some(fs::read(archive).unwrap())
}

fn upper_layers() -> Vec<Vec<u8>> {
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    vec![
        tar(&[
            Entry::dir("./").mode(0o755),
            Entry::dir("usr").mode(0o711),
            Entry::file("bin/new", vec![b'n'; 9000])
                .mode(0o4755)
                .owner(70_000, 3_000_000_000),
            Entry::hard_link("bin/new-too", "bin/new"),
            Entry::file("caps", "c").xattr("security.capability", capability),
            Entry::file("binary", "b").xattr("user.binary", b"a\nb\n=c\0d"),
            Entry::dir("gone"),
            Entry::file("gone/f", "x"),
            Entry::dir("opaque"),
            Entry::file("opaque/old", "x"),
            Entry::new(b'3', "null").mode(0o666).device(1, 3),
            Entry::new(b'4', "disk").mode(0o660).device(259, 300),
            Entry::new(b'6', "fifo").mode(0o640),
            Entry::file("nano", "n").pax("mtime", "1700000000.123456789"),
            Entry::file("replaced", "by a directory"),
        ]),
        tar(&[
            Entry::file(".wh.gone", ""),
            Entry::file("opaque/new", "y"),
            Entry::file("opaque/.wh..wh..opq", ""),
            Entry::dir("opaque").mode(0o1777),
            Entry::dir("replaced"),
            Entry::file("replaced/f", "z"),
            Entry::hard_link("again", "usr/bin/new"),
            // Sets the time that the changes above change in a real directory.
            Entry::dir("usr").mode(0o711),
            Entry::dir("./").mode(0o755),
        ]),
    ]
}

#[test]
fn umoci_unpacks_the_same_tree() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: unpacking with owners and devices needs root");
        return;
    }
    let Some(real) = real_layer() else {
        eprintln!("skipped: GNU tar is not installed");
        return;
    };
    let layers: Vec<Vec<u8>> = std::iter::once(real).chain(upper_layers()).collect();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    if Command::new("umoci").arg("--version").output().is_err() {
        eprintln!("skipped: umoci is not installed");
        return;
    }
    run("umoci", &["init", "--layout", "oci"], path);
    run("umoci", &["new", "--image", "oci:i"], path);
    for layer in &layers {
        fs::write(path.join("layer"), layer).unwrap();
        run(
            "umoci",
            &["raw", "add-layer", "--image", "oci:i", "layer"],
            path,
        );
    }
    run("umoci", &["unpack", "--image", "oci:i", "bundle"], path);
    let (expected, expected_links) = walk(&path.join("bundle/rootfs"));
    let (mut found, found_links) = listed(&build_image(&layers).read());
    assert_eq!(
        found
            .keys()
            .map(|path| path.escape_ascii().to_string())
            .collect::<Vec<_>>(),
        expected
            .keys()
            .map(|path| path.escape_ascii().to_string())
            .collect::<Vec<_>>()
    );
    for (path, expected) in expected {
        let mut found = found.remove(&path).unwrap();
        // umoci gives the time of unpacking to directories that later members changed.
        if expected.mode & 0o170_000 == 0o040_000 {
            found.mtime = expected.mtime;
        }
        assert!(
            found == expected,
            "{}: {found:?}\n{expected:?}",
            path.escape_ascii()
        );
    }
    assert_eq!(found_links, expected_links);
}

#[test]
fn fsck_extracts_the_same_contents() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("tree");
    let mut entries = vec![Entry::dir("d"), Entry::symlink("link", "d/f0")];
    for (index, size) in [0usize, 1, 4032, 4033, 4096, 100_000]
        .into_iter()
        .enumerate()
    {
        entries.push(Entry::file(
            format!("d/f{index}"),
            vec![index as u8 + 65; size],
        ));
    }
    entries.extend((0..1000).map(|index| Entry::file(format!("many/{index}"), index.to_string())));
    let image = build_image(&[tar(&entries)]);
    let option = format!("--extract={}", target.display());
    let path = image.path.to_str().unwrap();
    // As the superuser too: owners are those of the archive, modes let everybody read.
    if run(
        "fsck.erofs",
        &["--no-preserve-owner", &option, path],
        directory.path(),
    )
    .is_none()
    {
        eprintln!("skipped: fsck.erofs is not installed (package erofs-utils)");
        return;
    }
    let (extracted, _) = walk(&target);
    let (found, _) = listed(&image.read());
    assert_eq!(found.len(), extracted.len());
    for (path, extracted) in extracted {
        let found = &found[&path];
        assert_eq!(found.mode & 0o170_000, extracted.mode & 0o170_000);
        assert!(
            found.content == extracted.content,
            "{}",
            path.escape_ascii()
        );
        assert_eq!(found.mtime, extracted.mtime, "{}", path.escape_ascii());
    }
}
