//! What the tests make snapshots of.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use fcvm_memory::page_file::anonymous_file;
use fcvm_memory::{CapturedPages, PageFile, PageRun};
use fcvm_snapshot::{Draft, ManifestFields, Mark, RootImage, Snapshot, SnapshotStore};
use fcvm_storage::{CopyStore, Disk, DiskStore, FrozenDisk};
use fcvm_types::{SnapshotTag, VmId};

pub(crate) const PAGE: usize = 4096;
pub(crate) type Pages = [(u64, [u8; PAGE])];

/// A store in a directory of its own.
pub(crate) struct Lab {
    directory: tempfile::TempDir,
    pub(crate) store: SnapshotStore,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = SnapshotStore::new(directory.path().join("snapshots"));
        Self { directory, store }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Another directory plays the pool: what is told apart is the file system, and that is the same.
    pub(crate) fn use_pool(&mut self) {
        let pool = self.path().join("pool");
        std::fs::create_dir(&pool).unwrap();
        self.store = self.store.clone().with_pool(pool);
    }

    pub(crate) fn pool_names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path().join("pool")) else {
            return Vec::new();
        };
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.store.directory()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub(crate) fn whole(&self, name: &str, bytes: &[u8], disk: Option<&[u8]>) -> Snapshot {
        let mut draft = self.store.begin(&tag(name)).unwrap();
        draft.write_memory_whole(&memory_of(bytes), None).unwrap();
        draft.write_state(b"the state").unwrap();
        if let Some(disk) = disk {
            draft.write_disk(&disk_of(self.path(), disk)).unwrap();
        }
        draft.finish(fields()).unwrap()
    }

    pub(crate) fn begin_difference(&self, name: &str, parent: &str, pages: &Pages) -> Draft {
        let parent = self.store.open(&tag(parent)).unwrap();
        let memory = parent.load_memory(|_, _| ()).unwrap();
        let over = pages_over(&memory, pages);
        let mut draft = self.store.begin(&tag(name)).unwrap();
        draft
            .write_memory_difference(&memory, &over, &parent)
            .unwrap();
        draft.write_state(b"the state").unwrap();
        draft
    }

    pub(crate) fn difference(&self, name: &str, parent: &str, pages: &Pages) -> Snapshot {
        self.begin_difference(name, parent, pages)
            .finish(fields())
            .unwrap()
    }
}

pub(crate) fn tag(text: &str) -> SnapshotTag {
    text.parse().unwrap()
}

/// Pages that are all different, none of them zero.
pub(crate) fn pattern(pages: usize) -> Vec<u8> {
    (0..pages * PAGE)
        .map(|at| (at / PAGE * 31 + at % 251 + 1) as u8)
        .collect()
}

pub(crate) fn memory_of(bytes: &[u8]) -> File {
    let file = anonymous_file("test", bytes.len() as u64).unwrap();
    for (index, page) in bytes.chunks(PAGE).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, (index * PAGE) as u64).unwrap();
        }
    }
    file
}

/// The pages, in order, as a page file.
pub(crate) fn pages_over(memory: &File, pages: &Pages) -> PageFile {
    let captured = CapturedPages {
        runs: pages
            .iter()
            .map(|(first, _)| PageRun {
                first: *first,
                count: 1,
            })
            .collect(),
        bytes: pages.iter().flat_map(|(_, bytes)| *bytes).collect(),
    };
    let target = anonymous_file("pages", 0).unwrap();
    let size = memory.metadata().unwrap().len();
    PageFile::write_difference(&captured, size, &target, |_, _| false).unwrap();
    PageFile::open(target).unwrap()
}

pub(crate) fn read_all(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

pub(crate) fn disk_of(directory: &Path, bytes: &[u8]) -> FrozenDisk {
    let file = tempfile::tempfile_in(directory).unwrap();
    file.set_len(bytes.len().next_multiple_of(512) as u64)
        .unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let store = CopyStore::new(directory.to_owned());
    let prepared = store.prepare(&Disk::raw(file).unwrap()).unwrap();
    store.freeze(prepared).unwrap().frozen_disk
}

pub(crate) fn fields() -> ManifestFields {
    ManifestFields {
        source_id: VmId::from_random([7; 16]),
        source_name: "web".parse().unwrap(),
        image: "registry.example/web:1".to_owned(),
        image_digest: "sha256:00".to_owned(),
        root_image: RootImage {
            path: "/images/root".into(),
            digest: "sha256:01".to_owned(),
        },
        spec: serde_json::json!({"memory": 256, "ratio": 0.1}),
        hypervisor: "QEMU 7.2".to_owned(),
        device_line: serde_json::json!(["virtio-blk-device"]),
        accelerator: serde_json::json!("tcg"),
        host_cpu: "cpu".to_owned(),
        mark: Mark::new("secret".to_owned()),
        timings_us: vec![("stop".to_owned(), 12)],
    }
}
