//! A pool as a directory, through the program and the kernel. No VM is started.

#![allow(missing_docs, reason = "a test program has no users")]

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FallocateFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;

const MIB: u64 = 1 << 20;
const RECORD: u64 = 65_536;

/// A pool of 1 GiB that is mounted, with the dataset `set`.
struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    /// None, with a line that says why, where nothing can be mounted.
    fn new() -> Option<Self> {
        let helper = Command::new("fusermount3").arg("--version").output();
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        let reason = if device.is_err() {
            "/dev/fuse is missing, or not for this user"
        } else if helper.is_err() {
            "fusermount3 is missing"
        } else {
            let lab = Self {
                directory: tempfile::tempdir().unwrap(),
            };
            lab.must(&["create", "--size", "1g"]);
            lab.mount();
            fs::create_dir(lab.mounted("set")).unwrap();
            return Some(lab);
        };
        println!("skipped: {reason}");
        None
    }

    fn mounted(&self, name: &str) -> PathBuf {
        self.directory.path().join("mnt").join(name)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.mounted("set").join(name)
    }

    fn create(&self, name: &str) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        options.open(self.file(name)).unwrap()
    }

    fn pool(&self, arguments: &[&str]) -> std::process::Output {
        Command::new(env!("CARGO_BIN_EXE_fcvm"))
            .arg("pool")
            .args(arguments)
            .env("FCVM_DATA_DIR", self.directory.path().join("data"))
            .env("FCVM_RUNTIME_DIR", self.directory.path().join("run"))
            .output()
            .unwrap()
    }

    fn must(&self, arguments: &[&str]) -> String {
        let output = self.pool(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn mount(&self) {
        let mounted = self.mounted("");
        let said = self.must(&["mount", mounted.to_str().unwrap()]);
        assert_eq!(Path::new(said.trim()), mounted.components().as_path());
    }

    fn unmount(&self) {
        self.must(&["unmount", self.mounted("").to_str().unwrap()]);
    }

    /// Kills the processes of the mount: the server, or the keeper too.
    fn kill(&self, with_keeper: bool) {
        let own = self.directory.path().to_str().unwrap().to_owned();
        let find = |role: &str| -> Vec<i32> {
            let processes = fs::read_dir("/proc").unwrap().flatten();
            processes
                .filter(|entry| {
                    let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                    let line = String::from_utf8_lossy(&line).into_owned();
                    line.contains(role) && line.contains(&own)
                })
                .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
                .collect()
        };
        let mut doomed = if with_keeper {
            find("keep-mount")
        } else {
            Vec::new()
        };
        doomed.extend(find("serve-mount"));
        assert!(!doomed.is_empty());
        for process in doomed {
            let process = rustix::process::Pid::from_raw(process).unwrap();
            rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = Command::new("fusermount3")
            .args(["-u", "-z", "--"])
            .arg(self.mounted(""))
            .output();
    }
}

fn attribute(path: &Path, name: &str) -> u64 {
    let mut buffer = [0; 32];
    let name = format!("user.blockpool.{name}");
    let length = rustix::fs::getxattr(path, &*name, &mut buffer).unwrap();
    std::str::from_utf8(&buffer[..length])
        .unwrap()
        .parse()
        .unwrap()
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn is_there(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        println!("skipped: {program} is missing");
    }
    found
}

/// Bytes that differ from place to place.
fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length)
        .map(|index| (index / 97) as u8 ^ (index % 251) as u8 ^ seed)
        .collect()
}

fn errno<T>(result: std::io::Result<T>) -> Option<Errno> {
    result.err().and_then(|error| Errno::from_io_error(&error))
}

#[test]
fn copies_are_clones() {
    let Some(lab) = Lab::new() else { return };
    // A length that ends within a block.
    let bytes = pattern(20 * MIB as usize + 777, 1);
    fs::write(lab.file("one"), &bytes).unwrap();
    let path = |name: &str| lab.file(name).to_str().unwrap().to_owned();
    let data_bytes = || attribute(&lab.mounted(""), "data_bytes");
    let before = data_bytes();
    run("cp", &[&path("one"), &path("two")]);
    assert_eq!(data_bytes(), before);
    for name in ["one", "two"] {
        assert_eq!(attribute(&lab.file(name), "exclusive_bytes"), 0, "{name}");
        assert_eq!(fs::read(lab.file(name)).unwrap(), bytes, "{name}");
    }
    // What is written to one is not in the other.
    let two = OpenOptions::new()
        .write(true)
        .open(lab.file("two"))
        .unwrap();
    two.write_all_at(&[0xee; 5000], 3 * MIB + 5).unwrap();
    two.sync_all().unwrap();
    assert_eq!(fs::read(lab.file("one")).unwrap(), bytes);
    assert_eq!(attribute(&lab.file("two"), "exclusive_bytes"), RECORD);
    // Ranges that are no records are copied, and say the same.
    let (from, to) = (File::open(lab.file("one")).unwrap(), lab.create("odd"));
    let (mut at, mut into) = (12_345, 54_321);
    let mut left = 3 * MIB as usize;
    while left > 0 {
        let copied =
            rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut into), left).unwrap();
        assert!(copied > 0);
        left -= copied;
    }
    let odd = fs::read(lab.file("odd")).unwrap();
    assert_eq!(odd.len(), 54_321 + 3 * MIB as usize);
    assert_eq!(odd[54_321..], bytes[12_345..12_345 + 3 * MIB as usize]);
}

#[test]
fn files_over_4_gib_are_cloned() {
    let Some(lab) = Lab::new() else { return };
    let file = lab.create("large");
    file.set_len((5 << 30) + 1000).unwrap();
    let places = [
        0,
        (4 << 30) - 8192,
        (4 << 30) - 4096,
        4 << 30,
        (5 << 30) - 100,
    ];
    for (index, place) in places.into_iter().enumerate() {
        file.write_all_at(&[index as u8 + 1; 300], place).unwrap();
    }
    let clone = lab.create("clone");
    let (mut at, mut into) = (0, 0);
    let mut requests = 0;
    while at < (5 << 30) + 1000 {
        let copied =
            rustix::fs::copy_file_range(&file, Some(&mut at), &clone, Some(&mut into), 6 << 30);
        assert!(copied.unwrap() > 0);
        requests += 1;
    }
    // Each but the last stops at a border of records, however large the kernel lets it be.
    assert!(requests <= 3, "{requests}");
    assert_eq!(attribute(&lab.file("clone"), "exclusive_bytes"), 0);
    for (index, place) in places.into_iter().enumerate() {
        let mut found = [0; 300];
        clone.read_exact_at(&mut found, place).unwrap();
        assert_eq!(found, [index as u8 + 1; 300], "{place}");
    }
}

#[test]
fn holes_are_told_made_and_kept() {
    let Some(lab) = Lab::new() else { return };
    let file = lab.create("sparse");
    file.set_len(1 << 40).unwrap();
    file.write_all_at(&[7; 8192], 10 << 30).unwrap();
    let seek = |from| rustix::fs::seek(&file, from);
    assert_eq!(seek(SeekFrom::Data(0)), Ok(10 << 30));
    assert_eq!(seek(SeekFrom::Hole(10 << 30)), Ok((10 << 30) + RECORD));
    assert_eq!(seek(SeekFrom::Data((10 << 30) + RECORD)), Err(Errno::NXIO));
    assert_eq!(seek(SeekFrom::Hole(5)), Ok(5));
    assert_eq!(file.metadata().unwrap().blocks(), 16);
    let allocate = |flags, offset, length| rustix::fs::fallocate(&file, flags, offset, length);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    allocate(punch, (10 << 30) + 100, 4096).unwrap();
    let mut bytes = [1; 8192];
    file.read_exact_at(&mut bytes, 10 << 30).unwrap();
    assert!(bytes[..100].iter().all(|byte| *byte == 7));
    assert!(bytes[100..4196].iter().all(|byte| *byte == 0));
    assert!(bytes[4196..].iter().all(|byte| *byte == 7));
    allocate(FallocateFlags::ZERO_RANGE, 10 << 30, 8192).unwrap();
    assert_eq!(file.metadata().unwrap().blocks(), 0);
    allocate(FallocateFlags::KEEP_SIZE, 1 << 40, 4096).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 40);
    allocate(FallocateFlags::empty(), 1 << 40, 4096).unwrap();
    assert_eq!(file.metadata().unwrap().len(), (1 << 40) + 4096);
    assert_eq!(
        allocate(FallocateFlags::COLLAPSE_RANGE, 0, 4096),
        Err(Errno::OPNOTSUPP)
    );
    assert_eq!(
        allocate(FallocateFlags::empty(), 0, 2 << 30),
        Err(Errno::NOSPC)
    );
    // What is cut off is gone, also within a block.
    file.set_len(100).unwrap();
    file.write_all_at(&[9; 100], 0).unwrap();
    file.set_len(50).unwrap();
    file.set_len(4096).unwrap();
    let mut bytes = [1; 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..50].iter().all(|byte| *byte == 9) && bytes[50..].iter().all(|byte| *byte == 0));
    assert_eq!(errno(file.set_len(1 << 62)), Some(Errno::FBIG));
}

#[test]
fn names_come_and_go_while_files_are_open() {
    let Some(lab) = Lab::new() else { return };
    let mut file = lab.create("gone");
    file.write_all(&pattern(100_000, 3)).unwrap();
    fs::remove_file(lab.file("gone")).unwrap();
    assert!(!lab.file("gone").exists());
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.write_all_at(b"still", 50).unwrap();
    let mut bytes = [0; 5];
    file.read_exact_at(&mut bytes, 50).unwrap();
    assert_eq!(&bytes, b"still");
    drop(file);
    fs::write(lab.file("new"), "new").unwrap();
    fs::write(lab.file("old"), "old").unwrap();
    let mut old = File::open(lab.file("old")).unwrap();
    fs::rename(lab.file("new"), lab.file("old")).unwrap();
    assert_eq!(fs::read(lab.file("old")).unwrap(), b"new");
    let mut text = String::new();
    old.read_to_string(&mut text).unwrap();
    assert_eq!(text, "old");
    drop(old);
    // A file that never had a name gets one; a second one it does not get.
    let nameless = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::TMPFILE.bits() as i32)
        .open(lab.mounted("set"));
    match nameless {
        Ok(nameless) => {
            nameless.write_all_at(b"named", 0).unwrap();
            let own = format!(
                "/proc/self/fd/{}",
                std::os::fd::AsRawFd::as_raw_fd(&nameless)
            );
            let follow = AtFlags::SYMLINK_FOLLOW;
            rustix::fs::linkat(CWD, &own, CWD, lab.file("named"), follow).unwrap();
            assert_eq!(fs::read(lab.file("named")).unwrap(), b"named");
            fs::remove_file(lab.file("named")).unwrap();
        }
        Err(error) => println!("skipped: nameless files: {error}"),
    }
    let linked = fs::hard_link(lab.file("old"), lab.file("second"));
    assert_eq!(errno(linked), Some(Errno::PERM));
    // What the pool does not have.
    assert_eq!(errno(File::create(lab.mounted("file"))), Some(Errno::PERM));
    assert_eq!(
        errno(fs::create_dir(lab.file("directory"))),
        Some(Errno::PERM)
    );
    assert_eq!(errno(File::create(lab.file("a@b"))), Some(Errno::INVAL));
    assert_eq!(
        errno(File::create(lab.file(&"x".repeat(256)))),
        Some(Errno::NAMETOOLONG)
    );
    assert_eq!(
        errno(fs::remove_dir(lab.mounted("set"))),
        Some(Errno::NOTEMPTY)
    );
    let names = |path: PathBuf| -> Vec<_> {
        let entries = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        entries.collect()
    };
    assert_eq!(names(lab.mounted("")), ["set"]);
    assert_eq!(names(lab.mounted("set")), ["old"]);
    fs::remove_file(lab.file("old")).unwrap();
    lab.unmount();
    // Nothing is left of what had no name.
    assert_eq!(
        lab.must(&["ls", "--format", "json"])
            .matches("\"name\"")
            .count(),
        1
    );
    let checked = lab.must(&["check"]);
    assert!(checked.starts_with("0 records of data"), "{checked}");
}

#[test]
fn attributes_are_kept_as_far_as_is_said() {
    let Some(lab) = Lab::new() else { return };
    let file = lab.create("file");
    assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o644 & !umask());
    file.set_permissions(fs::Permissions::from_mode(0o640))
        .unwrap();
    assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o640);
    let time = std::time::SystemTime::UNIX_EPOCH + Duration::new(1_000_000, 5);
    file.set_modified(time).unwrap();
    assert_eq!(file.metadata().unwrap().modified().unwrap(), time);
    let refused = rustix::fs::setxattr(lab.file("file"), "user.x", b"1", XattrFlags::empty());
    assert_eq!(refused, Err(Errno::OPNOTSUPP));
    let found = rustix::fs::statvfs(lab.mounted("")).unwrap();
    assert!(found.f_blocks * found.f_frsize <= 1 << 30);
    assert!(found.f_bavail > 0);
}

#[test]
fn in_roots_mount_modes_and_owners_decide() {
    let Some(lab) = Lab::new() else { return };
    let file = lab.create("file");
    let other = Some(4711);
    if !rustix::process::geteuid().is_root() {
        let refused = std::os::unix::fs::fchown(&file, other, None);
        assert_eq!(
            refused.unwrap_err().kind(),
            std::io::ErrorKind::PermissionDenied
        );
        return;
    }
    (&file).write_all(b"content").unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o600))
        .unwrap();
    for directory in [lab.directory.path(), &lab.mounted(""), &lab.mounted("set")] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let as_other = |script: &str| {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=4711",
            "--regid=4711",
            "--clear-groups",
            "sh",
            "-c",
            script,
        ]);
        command.current_dir(lab.mounted("set")).output().unwrap()
    };
    assert!(!as_other("cat file").status.success());
    std::os::unix::fs::fchown(&file, other, None).unwrap();
    assert_eq!(as_other("cat file").stdout, b"content");
    assert!(!as_other("touch new").status.success());
    fs::set_permissions(lab.mounted("set"), fs::Permissions::from_mode(0o777)).unwrap();
    let made = as_other("umask 077; echo more >new && cat new && stat -c %u:%g new");
    assert_eq!(String::from_utf8_lossy(&made.stdout), "more\n4711:4711\n");
    // Another server knows nothing of it, and what is open stays open.
    let open = File::open(lab.file("new")).unwrap();
    lab.kill(false);
    assert_eq!(open.metadata().unwrap().len(), 5);
}

fn umask() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    u32::from_str_radix(line.unwrap().trim(), 8).unwrap()
}

#[test]
fn mapped_and_read_bytes_are_the_same() {
    let Some(lab) = Lab::new() else { return };
    let file = lab.create("mapped");
    file.set_len(MIB).unwrap();
    let flags = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
    let shared = rustix::mm::MapFlags::SHARED;
    // SAFETY: a new mapping, where the kernel has room, of a file that stays as long.
    let address = unsafe {
        rustix::mm::mmap(std::ptr::null_mut(), MIB as usize, flags, shared, &file, 0).unwrap()
    };
    let at = |offset: usize| address.cast::<u8>().wrapping_add(offset);
    for index in 0..200_000 {
        // SAFETY: inside the mapping, which nothing else in this process uses.
        unsafe { at(index).write_volatile(index as u8) };
    }
    let mut bytes = vec![0; 200_000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(
        bytes
            .iter()
            .enumerate()
            .all(|(index, byte)| *byte == index as u8)
    );
    file.write_all_at(b"written", 500_000).unwrap();
    for (index, byte) in b"written".iter().enumerate() {
        // SAFETY: as above.
        assert_eq!(unsafe { at(500_000 + index).read_volatile() }, *byte);
    }
    // A clone has what is mapped and not written out.
    // SAFETY: as above.
    unsafe { at(7).write_volatile(0xaa) };
    let path = |name: &str| lab.file(name).to_str().unwrap().to_owned();
    run("cp", &[&path("mapped"), &path("clone")]);
    let mut byte = [0];
    File::open(lab.file("clone"))
        .unwrap()
        .read_exact_at(&mut byte, 7)
        .unwrap();
    assert_eq!(byte, [0xaa]);
    // SAFETY: the mapping that was made, not used any more.
    unsafe { rustix::mm::munmap(address, MIB as usize).unwrap() };
}

#[test]
fn fio_finds_what_it_wrote() {
    let Some(lab) = Lab::new() else { return };
    if !is_there("fio") {
        return;
    }
    let directory = format!("--directory={}", lab.mounted("set").display());
    for (engine, direct, sizes) in [
        (
            "psync",
            "--direct=0",
            ["--bsrange=1k-96k", "--blockalign=1024"],
        ),
        (
            "libaio",
            "--direct=1",
            ["--bsrange=4k-96k", "--blockalign=4096"],
        ),
        (
            "mmap",
            "--direct=0",
            ["--bsrange=4k-96k", "--blockalign=4096"],
        ),
    ] {
        let name = format!("--name={engine}");
        let engine = format!("--ioengine={engine}");
        let mut arguments = vec![&*directory, &*name, &*engine, direct, "--size=16m"];
        arguments.extend(["--rw=randrw", "--iodepth=8", "--randseed=5", "--fsync=32"]);
        arguments.extend(["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"]);
        arguments.extend(["--verify_state_save=0"]);
        arguments.extend(sizes);
        run("fio", &arguments);
    }
}

#[test]
fn qemus_tools_work_on_files_in_it() {
    let Some(lab) = Lab::new() else { return };
    if !is_there("qemu-img") {
        return;
    }
    let path = |name: &str| lab.file(name).to_str().unwrap().to_owned();
    for format in ["qcow2", "raw"] {
        let image = path(format);
        run("qemu-img", &["create", "-f", format, &image, "64m"]);
        for cache in ["writeback", "none"] {
            let mut arguments = vec!["-f", format, "-t", cache];
            for command in [
                "write -P 7 0 8M",
                "write -P 9 1000k 64k",
                "discard 2M 1M",
                "write -z 5M 64k",
                "flush",
                "read -P 7 0 1000k",
                "read -P 9 1000k 64k",
                "read -P 0 5M 64k",
            ] {
                arguments.extend(["-c", command]);
            }
            arguments.push(&image);
            let said = run("qemu-io", &arguments);
            assert!(!said.contains("verification failed"), "{said}");
        }
        if format == "qcow2" {
            run("qemu-img", &["check", &image]);
        }
        let copy = path(&format!("{format}-copy"));
        run("cp", &[&image, &copy]);
        run(
            "qemu-img",
            &["compare", "-f", format, "-F", format, &image, &copy],
        );
    }
}

#[test]
fn what_was_synced_survives_all_processes_of_the_mount() {
    let Some(lab) = Lab::new() else { return };
    let bytes = pattern(5 * MIB as usize, 4);
    let file = lab.create("kept");
    file.write_all_at(&bytes, 0).unwrap();
    file.sync_all().unwrap();
    fs::copy(lab.file("kept"), lab.file("clone")).unwrap();
    File::open(lab.file("clone")).unwrap().sync_all().unwrap();
    file.write_all_at(b"not synced", 0).unwrap();
    lab.kill(true);
    let begin = Instant::now();
    // Who had it open gets errors from now on, and no wrong bytes.
    let uncached = OpenOptions::new().read(true).open(lab.file("kept"));
    let refused = errno(uncached);
    assert!(
        matches!(refused, Some(Errno::NOTCONN | Errno::CONNABORTED)),
        "{refused:?}"
    );
    assert!(errno(file.sync_all()).is_some());
    drop(file);
    lab.mount();
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert_eq!(fs::read(lab.file("clone")).unwrap(), bytes);
    assert_eq!(fs::read(lab.file("kept")).unwrap()[10..], bytes[10..]);
}

#[test]
fn a_killed_server_is_followed_by_another() {
    let Some(lab) = Lab::new() else { return };
    let file = lab.create("busy");
    file.set_len(8 * MIB).unwrap();
    let nameless = lab.create("nameless");
    fs::remove_file(lab.file("nameless")).unwrap();
    nameless.write_all_at(b"nobody else sees this", 0).unwrap();
    let mut model = vec![0; 8 * MIB as usize];
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut state = 12_345_u64;
            for index in 0..3000 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let at = (state >> 33) as usize % (8 * MIB as usize - 9000);
                let length = 1 + (state >> 20) as usize % 9000;
                let bytes = vec![state as u8 | 1; length];
                file.write_all_at(&bytes, at as u64).unwrap();
                model[at..at + length].copy_from_slice(&bytes);
                if index % 500 == 499 {
                    file.sync_all().unwrap();
                }
            }
        });
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(100));
            lab.kill(false);
            // It answers again when this returns.
            fs::metadata(lab.mounted("set")).unwrap();
            rustix::fs::statvfs(lab.mounted("")).unwrap();
        }
        writer.join().unwrap();
    });
    let mut text = [0; 21];
    nameless.read_exact_at(&mut text, 0).unwrap();
    assert_eq!(&text, b"nobody else sees this");
    drop((file, nameless));
    lab.unmount();
    lab.mount();
    assert!(
        fs::read(lab.file("busy")).unwrap() == model,
        "the bytes differ"
    );
    lab.unmount();
    lab.must(&["check"]);
    assert_eq!(
        lab.must(&["ls", "--format", "json"])
            .matches("\"name\"")
            .count(),
        2
    );
}

#[test]
fn snapshots_are_files_that_never_change() {
    let Some(lab) = Lab::new() else { return };
    fs::write(lab.file("disk"), pattern(300_000, 5)).unwrap();
    lab.unmount();
    lab.must(&["snapshot", "set/disk@before"]);
    lab.mount();
    let file = OpenOptions::new()
        .write(true)
        .open(lab.file("disk"))
        .unwrap();
    file.write_all_at(&[1; 1000], 0).unwrap();
    assert_eq!(
        fs::read(lab.file("disk@before")).unwrap(),
        pattern(300_000, 5)
    );
    let path = |name: &str| lab.file(name).to_str().unwrap().to_owned();
    run("cp", &[&path("disk@before"), &path("back")]);
    assert_eq!(fs::read(lab.file("back")).unwrap(), pattern(300_000, 5));
    let snapshot = File::open(lab.file("disk@before")).unwrap();
    assert_eq!(snapshot.metadata().unwrap().mode() & 0o222, 0);
    assert_eq!(errno(fs::remove_file(lab.file("disk"))), Some(Errno::BUSY));
}

#[test]
fn refusals_name_what_to_do() {
    let Some(lab) = Lab::new() else { return };
    let output = lab.pool(&["status"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("is in use by another process"), "{said}");
    let second = lab.directory.path().join("second");
    let output = lab.pool(&["mount", second.to_str().unwrap()]);
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("is in use by another process"), "{said}");
    let busy = lab.create("busy");
    let output = lab.pool(&["unmount", lab.mounted("").to_str().unwrap()]);
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("unmount"), "{said}");
    drop(busy);
    lab.unmount();
    let output = lab.pool(&["--pool", "/nowhere/pool", "mount", second.to_str().unwrap()]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("there is no pool /nowhere/pool"), "{said}");
}

/// Waits until the table of mounts says so.
fn wait_for_mounts(is_it: impl Fn(&str) -> bool) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    // The kernel tells of each change of what was opened before it.
    let mut table = File::open("/proc/self/mounts").unwrap();
    let deadline = Instant::now() + Duration::from_secs(240);
    loop {
        let mut mounts = String::new();
        table.rewind().unwrap();
        table.read_to_string(&mut mounts).unwrap();
        if is_it(&mounts) {
            return;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "waited in vain: {mounts}");
        let left = Timespec::try_from(left).unwrap();
        let _ = poll(&mut [PollFd::new(&table, PollFlags::PRI)], Some(&left));
    }
}

#[test]
fn an_interrupted_bench_leaves_nothing() {
    let Some(lab) = Lab::new() else { return };
    let home = lab.directory.path().join("bench");
    fs::create_dir(&home).unwrap();
    let own = home.to_str().unwrap();
    let mut bench = Command::new(env!("CARGO_BIN_EXE_fcvm"))
        .args(["pool", "bench", "--clone-size", "16m", "--rounds", "100000"])
        .args(["--directory", own])
        .env("FCVM_DATA_DIR", lab.directory.path().join("data"))
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let count = |mounts: &str| mounts.lines().filter(|line| line.contains(own)).count();
    // The pool's and the bare one; where this is root, loops may be there, too.
    wait_for_mounts(|mounts| count(mounts) >= 2);
    let process = rustix::process::Pid::from_child(&bench);
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    assert_eq!(bench.wait().unwrap().code(), Some(130));
    assert_eq!(count(&fs::read_to_string("/proc/self/mounts").unwrap()), 0);
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0);
    lab.unmount();
}
