//! Branching disks on real file systems, with QEMU's own programs as writer, reader and judge.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fcvm_storage::{
    BranchMethod, CopyStore, Disk, DiskManifest, DiskStore, FrozenDisk, Layer, LayerFormat,
    OverlayStore, StorageError, choose,
};

const DISK_BYTES: u64 = 8 << 20;

/// QEMU's programs are there.
fn have_qemu() -> bool {
    let found = Command::new("qemu-io").arg("--version").output().is_ok();
    if !found {
        println!("skipped: qemu-utils is not installed");
    }
    found
}

fn path_of(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

/// The layers as QEMU's block layer is told of them.
fn image_options(layers: &[Layer]) -> String {
    let mut options = Vec::new();
    let mut prefix = String::new();
    for layer in layers.iter().rev() {
        let driver = match layer.format {
            LayerFormat::Raw => "raw",
            LayerFormat::Qcow2 => "qcow2",
        };
        let name = path_of(&layer.file);
        options.push(format!(
            "{prefix}driver={driver},{prefix}file.driver=file,{prefix}file.filename={name},\
             {prefix}file.locking=off"
        ));
        prefix.push_str("backing.");
    }
    options.join(",")
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

#[track_caller]
fn succeeds(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text} {output:?}"
    );
    text
}

/// A write of the guest's.
#[track_caller]
fn write(disk: &Disk, pattern: u8, offset: u64, length: u64) {
    let command = format!("write -P {pattern} {offset} {length}");
    let options = image_options(disk.layers());
    let said = succeeds("qemu-io", &["--image-opts", &options, "-c", &command]);
    assert!(said.contains("ops"), "{said}");
}

/// All that a guest would read.
fn content(layers: &[Layer]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("raw");
    let options = image_options(layers);
    succeeds(
        "qemu-img",
        &[
            "convert",
            "--image-opts",
            &options,
            "-O",
            "raw",
            raw.to_str().unwrap(),
        ],
    );
    std::fs::read(raw).unwrap()
}

/// QEMU finds nothing to correct in any layer.
fn assert_sound(layers: &[Layer]) {
    for layer in layers
        .iter()
        .filter(|layer| layer.format == LayerFormat::Qcow2)
    {
        let options = image_options(std::slice::from_ref(layer));
        let said = succeeds("qemu-img", &["check", "-U", "--image-opts", &options]);
        assert!(said.contains("No errors were found"), "{said}");
    }
}

fn raw_disk(directory: &Path) -> Disk {
    let file = tempfile::tempfile_in(directory).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    Disk::raw(file).unwrap()
}

/// Freezes a disk in use and gives its state and what it goes on with.
fn freeze(store: &dyn DiskStore, disk: Disk) -> (FrozenDisk, Disk) {
    let prepared = store.prepare(&disk).unwrap();
    let frozen = store.freeze(prepared).unwrap();
    (frozen.frozen_disk, frozen.continue_on.unwrap_or(disk))
}

/// Numbers that look like chance and are the same every time, splitmix64.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// Many disks from one, each with writes of its own between freezing and branching: all hold exactly
/// what a model of plain bytes says, and no frozen state ever changes.
fn disks_are_apart(store: &dyn DiskStore, directory: &Path, seed: u64) {
    let mut numbers = Numbers(seed);
    let mut disks = vec![(raw_disk(directory), vec![0; DISK_BYTES as usize])];
    let mut states: Vec<(FrozenDisk, Vec<u8>)> = Vec::new();
    for round in 1..=10_u8 {
        for (index, (disk, model)) in disks.iter_mut().enumerate() {
            let offset = numbers.below(DISK_BYTES / 512) * 512;
            let length = (numbers.below(300) * 512 + 512).min(DISK_BYTES - offset);
            let pattern = round * 16 + index as u8;
            write(disk, pattern, offset, length);
            model[offset as usize..(offset + length) as usize].fill(pattern);
        }
        if numbers.below(2) == 0 {
            let chosen = numbers.below(disks.len() as u64) as usize;
            let (disk, model) = disks.swap_remove(chosen);
            let (state, disk) = freeze(store, disk);
            disks.push((disk, model.clone()));
            states.push((state, model));
        }
        if !states.is_empty() && disks.len() < 5 {
            let (state, model) = &states[numbers.below(states.len() as u64) as usize];
            disks.push((store.branch(state).unwrap(), model.clone()));
        }
    }
    assert!(disks.len() > 2 && states.len() > 1);
    for (disk, model) in &disks {
        assert!(content(disk.layers()) == *model, "a disk differs");
        assert_eq!(disk.size_bytes(), DISK_BYTES);
        assert_sound(disk.layers());
    }
    for (state, model) in &states {
        assert!(content(state.layers()) == *model, "a frozen disk differs");
    }
    assert_no_file_is_written_by_two(&disks, &states);
}

fn assert_no_file_is_written_by_two(disks: &[(Disk, Vec<u8>)], states: &[(FrozenDisk, Vec<u8>)]) {
    let identity = |layer: &Layer| {
        let data = layer.file.metadata().unwrap();
        (data.dev(), data.ino())
    };
    let mut writers: HashMap<_, usize> = HashMap::new();
    for (disk, _) in disks {
        *writers
            .entry(identity(disk.layers().last().unwrap()))
            .or_default() += 1;
    }
    let below = disks
        .iter()
        .flat_map(|(disk, _)| &disk.layers()[..disk.depth() - 1]);
    let frozen = states.iter().flat_map(|(state, _)| state.layers());
    for layer in below.chain(frozen) {
        assert!(
            !writers.contains_key(&identity(layer)),
            "a shared file is written"
        );
        let refused = layer.file.write_at(&[0; 512], 0).unwrap_err();
        assert_eq!(
            refused.raw_os_error(),
            Some(rustix::io::Errno::BADF.raw_os_error())
        );
    }
    assert!(writers.values().all(|count| *count == 1));
}

/// What every store keeps to, in `directory`.
fn all_of_it(store: &dyn DiskStore, directory: &Path) {
    disks_are_apart(store, directory, 1);
    let disk = raw_disk(directory);
    write(&disk, 7, 0, 1 << 20);
    let (state, disk) = freeze(store, disk);
    write(&disk, 8, 65536, 512);
    let clone = store.branch(&state).unwrap();
    let before = clone.usage().unwrap();
    write(&clone, 9, 4 << 20, 1 << 20);
    let usage = clone.usage().unwrap();
    assert!(
        usage.own_bytes >= before.own_bytes + (1 << 20),
        "{before:?} {usage:?}"
    );
    let kept = directory.join("kept");
    std::fs::create_dir(&kept).unwrap();
    let manifest = state.persist(&kept, "disk").unwrap();
    drop((state, disk));
    let text = serde_json::to_string(&manifest).unwrap();
    let manifest: DiskManifest = serde_json::from_str(&text).unwrap();
    manifest.verify(&kept).unwrap();
    let again = FrozenDisk::open(&kept, &manifest).unwrap();
    let mut model = vec![0; DISK_BYTES as usize];
    model[..1 << 20].fill(7);
    assert!(content(again.layers()) == model);
    let later = store.branch(&again).unwrap();
    write(&later, 3, 0, 512);
    manifest.verify(&kept).unwrap();
    assert_eq!(names(directory), ["kept"]);
}

fn names(directory: &Path) -> Vec<String> {
    let entries = directory.read_dir().unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn overlays_and_copies_anywhere() {
    if !have_qemu() {
        return;
    }
    let overlays = tempfile::tempdir().unwrap();
    let store = OverlayStore::new(overlays.path().to_owned());
    all_of_it(&store, overlays.path());
    let copies = tempfile::tempdir().unwrap();
    all_of_it(&CopyStore::new(copies.path().to_owned()), copies.path());
}

/// Names the directory to a child that runs one test on a file system of its own.
const MOUNTED: &str = "FCVM_TEST_MOUNTED";

/// Runs a test of this program again with a file system mounted, which ends with the child's mount
/// namespace. `script` mounts it at `$2`; `$1` is a file that it may use.
fn again_on(test: &str, user: bool, script: &str) {
    let directory = tempfile::tempdir().unwrap();
    let mount = directory.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    let image = directory.path().join("image");
    File::create(&image).unwrap().set_len(512 << 20).unwrap();
    let namespaces: &[&str] = if user {
        &["--user", "--map-root-user", "--mount"]
    } else {
        &["--mount"]
    };
    let script = format!("{{ {script}; }} >/dev/null || exit 77; exec \"$3\" --exact {test}");
    let output = Command::new("unshare")
        .args(namespaces)
        .args(["sh", "-c", &script, "sh"])
        .args([&image, &mount, &std::env::current_exe().unwrap()])
        .env(MOUNTED, &mount)
        .output();
    match output {
        Ok(output) if output.status.code() == Some(101) || output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            let passed = output.status.success() && text.contains("1 passed");
            assert!(passed, "{text} {}", String::from_utf8_lossy(&output.stderr));
        }
        _ => println!("skipped: '{script}' works for root and with its programs alone"),
    }
}

fn mounted() -> Option<PathBuf> {
    std::env::var_os(MOUNTED).map(PathBuf::from)
}

#[test]
fn blocks_are_shared_where_the_file_system_can() {
    if !have_qemu() {
        return;
    }
    let Some(directory) = mounted() else {
        let name = "blocks_are_shared_where_the_file_system_can";
        again_on(
            name,
            false,
            "mkfs.xfs -q -m reflink=1 \"$1\" && mount -o loop \"$1\" \"$2\"",
        );
        again_on(
            name,
            false,
            "mkfs.btrfs -q \"$1\" && mount -o loop \"$1\" \"$2\"",
        );
        return;
    };
    let store = choose(&directory.join("disks"), false).unwrap();
    assert_eq!(store.method(), BranchMethod::Reflink);
    all_of_it(&*store, &directory.join("disks"));
    let firecracker = choose(&directory.join("raw"), true).unwrap();
    assert_eq!(firecracker.method(), BranchMethod::Reflink);

    // What is the same takes no space, and what is not is told.
    let disk = raw_disk(&directory.join("raw"));
    write(&disk, 1, 0, 4 << 20);
    let (state, disk) = freeze(&*firecracker, disk);
    let clone = firecracker.branch(&state).unwrap();
    assert!(
        clone
            .layers()
            .iter()
            .all(|layer| layer.format == LayerFormat::Raw)
    );
    write(&clone, 2, 1 << 20, 1 << 20);
    for disk in [&disk, &clone] {
        disk.layers()[0].file.sync_all().unwrap();
    }
    let usage = disk.usage().unwrap();
    assert!(
        usage.own_bytes < 64 << 10 && usage.shared_bytes >= 4 << 20,
        "{usage:?}"
    );
    let usage = clone.usage().unwrap();
    assert!((1 << 20..5 << 18).contains(&usage.own_bytes), "{usage:?}");

    // A snapshot that is on another file system is not copied for a clone, but lies below it.
    let elsewhere = tempfile::tempdir_in(directory.parent().unwrap()).unwrap();
    let manifest = state.persist(elsewhere.path(), "disk").unwrap();
    manifest.verify(elsewhere.path()).unwrap();
    let state = FrozenDisk::open(elsewhere.path(), &manifest).unwrap();
    let clone = store.branch(&state).unwrap();
    assert_eq!(clone.depth(), 2);
    write(&clone, 3, 0, 512);
    let clone = firecracker.branch(&state).unwrap();
    assert_eq!(clone.depth(), 1);
    write(&clone, 3, 0, 512);
    assert_eq!(content(state.layers())[0], 1);
}

/// A tmpfs, which an ordinary user can have in a namespace.
#[test]
fn full_and_read_only_file_systems() {
    let Some(directory) = mounted() else {
        let name = "full_and_read_only_file_systems";
        again_on(name, true, "mount -t tmpfs -o size=1m fcvm-test \"$2\"");
        again_on(name, true, "mount -t tmpfs -o ro fcvm-test \"$2\"");
        return;
    };
    let elsewhere = tempfile::tempdir_in(directory.parent().unwrap()).unwrap();
    let disk = raw_disk(elsewhere.path());
    let bytes = vec![7; 2 << 20];
    disk.layers()[0].file.write_all_at(&bytes, 0).unwrap();
    let overlays = OverlayStore::new(directory.clone());
    let copies = CopyStore::new(directory.clone());
    let (state, disk) = freeze(&OverlayStore::new(elsewhere.path().to_owned()), disk);
    if File::create(directory.join("filler")).is_err() {
        for error in [
            overlays.prepare(&disk).unwrap_err(),
            copies.branch(&state).unwrap_err(),
            choose(&directory, false).unwrap_err(),
            state.persist(&directory, "disk").unwrap_err(),
        ] {
            assert!(matches!(error, StorageError::NotWritable { .. }), "{error}");
        }
        return;
    }
    for error in [
        copies.branch(&state).unwrap_err(),
        copies
            .freeze(copies.prepare(&disk).unwrap())
            .map(drop)
            .err()
            .unwrap_or_else(|| {
                // The overlay is small enough; the state below it is not.
                copies.branch(&state).unwrap_err()
            }),
        state.persist(&directory, "disk").unwrap_err(),
    ] {
        assert!(matches!(error, StorageError::Full { .. }), "{error}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    assert_eq!(names(&directory), ["filler"]);
    overlays.prepare(&disk).unwrap();
    let filler = File::create(directory.join("filler")).unwrap();
    assert!(filler.write_all_at(&bytes, 0).is_err());
    for error in [
        overlays.prepare(&disk).unwrap_err(),
        overlays.branch(&state).unwrap_err(),
        choose(&directory, false).unwrap_err(),
    ] {
        assert!(matches!(error, StorageError::Full { .. }), "{error}");
    }
    // The source is as it was.
    let mut first = [0; 4];
    state.layers()[0].file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [7; 4]);
}

#[test]
fn directory_that_vanishes_or_refuses() {
    let directory = tempfile::tempdir().unwrap();
    let disks = directory.path().join("disks");
    let store = choose(&disks, false).unwrap();
    let disk = raw_disk(&disks);
    let (state, disk) = freeze(&*store, disk);
    let prepared = store.prepare(&disk).unwrap();
    std::fs::remove_dir_all(&disks).unwrap();
    // What was prepared needs the directory no more.
    store.freeze(prepared).unwrap();
    for error in [
        store.prepare(&disk).unwrap_err(),
        store.branch(&state).unwrap_err(),
        state.persist(&disks, "disk").unwrap_err(),
    ] {
        assert!(matches!(error, StorageError::Gone { .. }), "{error}");
        assert!(
            error.to_string().contains("the directory is gone"),
            "{error}"
        );
    }
    if rustix::process::geteuid().is_root() {
        println!("skipped: root may write to every directory");
        return;
    }
    let locked = std::fs::Permissions::from_mode(0o500);
    std::fs::set_permissions(directory.path(), locked).unwrap();
    let error = choose(&disks, false).unwrap_err();
    assert!(matches!(error, StorageError::NotWritable { .. }), "{error}");
}

#[test]
fn second_name_where_there_is_one_already() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) = (
        directory.path().join("first"),
        directory.path().join("second"),
    );
    std::fs::create_dir(&first).unwrap();
    std::fs::create_dir(&second).unwrap();
    let store = OverlayStore::new(directory.path().to_owned());
    let (state, disk) = freeze(&store, raw_disk(directory.path()));
    let parent = state.persist(&first, "disk").unwrap();
    // A snapshot of a clone: what its parent keeps is kept once.
    let clone = store
        .branch(&FrozenDisk::open(&first, &parent).unwrap())
        .unwrap();
    let (state, _clone) = freeze(&store, clone);
    let child = state.persist(&second, "disk").unwrap();
    let inode = |path: PathBuf| path.metadata().unwrap().ino();
    assert_eq!(
        inode(first.join("disk-0.raw")),
        inode(second.join("disk-0.raw"))
    );
    assert_eq!(child.layers[1].file, "disk-1.qcow2");
    // The parent can go.
    std::fs::remove_dir_all(&first).unwrap();
    child.verify(&second).unwrap();
    // Once more changes nothing; under a name that is another's it is refused and taken back.
    assert_eq!(state.persist(&second, "disk").unwrap(), child);
    let (other, _disk) = freeze(&store, disk);
    std::fs::write(second.join("other-1.qcow2"), b"not ours").unwrap();
    let error = other.persist(&second, "other").unwrap_err();
    assert!(error.to_string().contains("File exists"), "{error}");
    assert_eq!(
        names(&second),
        ["disk-0.raw", "disk-1.qcow2", "other-1.qcow2"]
    );
    assert!(other.persist(&second, "../up").is_err());
}

#[test]
fn damage_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let kept = directory.path().join("kept");
    std::fs::create_dir(&kept).unwrap();
    let store = OverlayStore::new(directory.path().to_owned());
    let (_, disk) = freeze(&store, raw_disk(directory.path()));
    let (state, _disk) = freeze(&store, disk);
    let manifest = state.persist(&kept, "disk").unwrap();
    let base = File::options()
        .write(true)
        .open(kept.join("disk-0.raw"))
        .unwrap();
    let overlay = File::options()
        .write(true)
        .open(kept.join("disk-1.qcow2"))
        .unwrap();
    let damaged = |manifest: &DiskManifest, file: &str, reason: &str| {
        let error = manifest.verify(&kept).unwrap_err().to_string();
        assert!(error.contains(file) && error.contains(reason), "{error}");
        assert!(!error.contains('\n'), "{error}");
    };
    base.write_all_at(&[1], 5_000_000).unwrap();
    damaged(&manifest, "disk-0.raw", "CRC-32C");
    FrozenDisk::open(&kept, &manifest).unwrap();
    base.write_all_at(&[0], 5_000_000).unwrap();
    manifest.verify(&kept).unwrap();
    // A name of a file to lie on, which a program would follow that does not know better.
    overlay.write_all_at(&[1], 15).unwrap();
    damaged(&manifest, "disk-1.qcow2", "names another file");
    overlay.write_all_at(&[0], 15).unwrap();
    overlay.write_all_at(&[1], 30).unwrap();
    damaged(&manifest, "disk-1.qcow2", "not of 8388608");
    overlay.write_all_at(&[0x80, 0], 29).unwrap();
    manifest.verify(&kept).unwrap();
    overlay.write_all_at(b"R", 0).unwrap();
    damaged(&manifest, "disk-1.qcow2", "not a qcow2");
    base.set_len(DISK_BYTES + 1).unwrap();
    damaged(&manifest, "disk-0.raw", "8388609 bytes");
    std::fs::remove_file(kept.join("disk-0.raw")).unwrap();
    damaged(&manifest, "disk-0.raw", "missing");
    std::os::unix::fs::symlink("/etc/passwd", kept.join("disk-0.raw")).unwrap();
    damaged(&manifest, "disk-0.raw", "symbolic link");
    let change = |change: &dyn Fn(&mut DiskManifest)| {
        let mut changed = manifest.clone();
        change(&mut changed);
        changed
    };
    damaged(
        &change(&|m| m.layers[0].file = "../disk-0.raw".into()),
        "kept",
        "not a file name",
    );
    damaged(&change(&|m| m.layers.clear()), "kept", "0 layers");
    let many = change(&|m| m.layers = vec![m.layers[0].clone(); 65]);
    damaged(&many, "kept", "65 layers");
}
