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
