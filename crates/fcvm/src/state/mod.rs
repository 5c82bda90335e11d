//! The state of VMs on disk: one directory per VM with its record and logs.
//!
//! A record is written by the owner while it lives, and by whoever holds the store's lock once the
//! owner is dead. Every listing first settles the records of dead owners, so that no command ever
//! sees a ghost. The bytes are described in docs/format/state-record.md.

mod lookup;
mod reap;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fcvm_types::record::{RECORD_VERSION, VmRecord, VmState};
use fcvm_types::{VmId, VmName};
use rustix::fs::FlockOperation;

use crate::context::create_private_dir;

const RECORD_FILE: &str = "record.json";
/// A record is a few kilobytes; more is not ours.
const MAX_RECORD_BYTES: u64 = 4 << 20;

/// All VMs of a data directory.
#[derive(Debug, Clone)]
pub(crate) struct StateStore {
    directory: PathBuf,
    runtime_dir: PathBuf,
}

/// Holds the store's lock until dropped.
#[derive(Debug)]
pub(crate) struct StoreLock(
    #[allow(dead_code, reason = "the lock lives as long as the file is open")] File,
);

/// A VM's files.
#[derive(Debug, Clone)]
pub(crate) struct VmPaths {
    /// Record and logs.
    pub(crate) directory: PathBuf,
    /// Directory of the control socket.
    pub(crate) runtime: PathBuf,
}

impl VmPaths {
    pub(crate) fn record(&self) -> PathBuf {
        self.directory.join(RECORD_FILE)
    }

    pub(crate) fn container_log(&self) -> PathBuf {
        self.directory.join("container.log")
    }

    pub(crate) fn console_log(&self) -> PathBuf {
        self.directory.join("console.log")
    }

    /// What the owner was told to run: `exec` and clones inherit from it.
    pub(crate) fn spec(&self) -> PathBuf {
        self.directory.join("spec.json")
    }

    pub(crate) fn owner_log(&self) -> PathBuf {
        self.directory.join("owner.log")
    }

    pub(crate) fn control_socket(&self) -> PathBuf {
        self.runtime.join("control.sock")
    }

    /// Where clones of the running VM are asked for.
    pub(crate) fn fork_socket(&self) -> PathBuf {
        self.runtime.join("fork.sock")
    }
}

/// What a directory of the store holds.
#[derive(Debug)]
pub(crate) enum Entry {
    /// A record that can be read.
    Vm(Box<VmRecord>),
    /// A record that cannot: damaged, or of a later version.
    Unreadable {
        /// Name of its directory.
        directory: String,
        /// Why.
        reason: String,
    },
}

impl StateStore {
    /// Opens the store; nothing is created before the first VM.
    pub(crate) fn open(directory: &Path, runtime_dir: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            directory: directory.to_owned(),
            runtime_dir: runtime_dir.to_owned(),
        })
    }

    /// Where the files of a VM are.
    pub(crate) fn paths(&self, id: &VmId) -> VmPaths {
        VmPaths {
            directory: self.directory.join(id.as_str()),
            runtime: self.runtime_dir.join(id.short()),
        }
    }

    /// Takes the store's lock; waits for other commands, which hold it for milliseconds.
    pub(crate) fn lock(&self) -> anyhow::Result<StoreLock> {
        create_private_dir(&self.directory)?;
        let path = self.directory.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot write in the data directory ({})", path.display()))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(StoreLock(file))
    }

    /// Enters a new VM. Its name has to be free.
    pub(crate) fn create(&self, record: &VmRecord) -> anyhow::Result<()> {
        let _lock = self.lock()?;
        self.check_name(record)?;
        let paths = self.paths(&record.id);
        create_private_dir(&paths.directory)?;
        self.write(record).inspect_err(|_| {
            // Nothing of a VM that could not be entered may stay.
            let _ = std::fs::remove_dir_all(&paths.directory);
        })
    }

    /// Writes the record of a VM that has got another name, which has to be free.
    pub(crate) fn rename(&self, record: &VmRecord) -> anyhow::Result<()> {
        let _lock = self.lock()?;
        self.check_name(record)?;
        self.write(record)
    }

    /// No other VM may have the name. The lock must be held.
    fn check_name(&self, record: &VmRecord) -> anyhow::Result<()> {
        for entry in self.entries(true)? {
            if let Entry::Vm(other) = entry
                && other.name == record.name
                && other.id != record.id
            {
                bail!(
                    "the name '{}' is in use by VM {}: choose another name, or remove that VM with 'fcvm rm {}'",
                    record.name,
                    other.id.short(),
                    record.name
                );
            }
        }
        Ok(())
    }

    /// A name that no VM has.
    pub(crate) fn free_name(&self) -> anyhow::Result<VmName> {
        let taken: Vec<VmName> = self.all()?.into_iter().map(|record| record.name).collect();
        loop {
            let name = VmName::generate(random()?);
            if !taken.contains(&name) {
                return Ok(name);
            }
        }
    }

    /// Writes a record so that a reader sees the old one or the new one, whole.
    pub(crate) fn write(&self, record: &VmRecord) -> anyhow::Result<()> {
        let paths = self.paths(&record.id);
        let temporary = paths.directory.join("record.json.new");
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(record)?)?;
            std::fs::rename(&temporary, paths.record())
        };
        write()
            .with_context(|| format!("cannot write the state record {}", paths.record().display()))
    }

    /// The VMs that somebody has asked for, as [`all`](Self::all) gives them.
    pub(crate) fn list(&self) -> anyhow::Result<Vec<VmRecord>> {
        let mut records = self.all()?;
        records.retain(|record| record.state != VmState::Standby);
        Ok(records)
    }

    /// All VMs that can be read, oldest first, the dead settled; a line on stderr for each that cannot.
    pub(crate) fn all(&self) -> anyhow::Result<Vec<VmRecord>> {
        let mut records = Vec::new();
        for entry in self.entries(false)? {
            match entry {
                Entry::Vm(record) => records.push(*record),
                Entry::Unreadable { directory, reason } => tracing::warn!(
                    "the state record in {directory} {reason}; 'fcvm rm -f {}' removes it",
                    &directory[..12.min(directory.len())]
                ),
            }
        }
        records.sort_by_key(|record| record.created_at);
        Ok(records)
    }

    /// What is in the store, the dead settled.
    fn entries(&self, locked: bool) -> anyhow::Result<Vec<Entry>> {
        let directory = match std::fs::read_dir(&self.directory) {
            Ok(directory) => directory,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot list {}", self.directory.display()));
            }
        };
        let mut entries = Vec::new();
        for entry in directory {
            let name = entry?.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<VmId>().ok()) else {
                continue;
            };
            match read_record(&self.paths(&id).record()) {
                Ok(Some(record)) if is_ghost(&record) => {
                    entries.extend(self.settle(&id, locked)?.map(Box::new).map(Entry::Vm))
                }
                Ok(Some(record)) => entries.push(Entry::Vm(Box::new(record))),
                // Removed between the listing and the reading, or not entered yet; what a crash left
                // is cleared by `remove_leftovers`.
                Ok(None) => {}
                Err(reason) => entries.push(Entry::Unreadable {
                    directory: id.to_string(),
                    reason,
                }),
            }
        }
        Ok(entries)
    }

    /// Removes the directory of a record that cannot be read, named by an id or its beginning.
    pub(crate) fn remove_unreadable(&self, text: &str) -> anyhow::Result<bool> {
        let _lock = self.lock()?;
        for entry in self.entries(true)? {
            if let Entry::Unreadable { directory, .. } = entry
                && text.len() >= 4
                && directory.starts_with(text)
            {
                self.remove(&directory.parse()?)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes directories that belong to no VM: what a crash left before the first record.
    pub(crate) fn remove_leftovers(&self) -> anyhow::Result<Vec<PathBuf>> {
        let _lock = self.lock()?;
        let mut removed = Vec::new();
        for entry in std::fs::read_dir(&self.directory)?.flatten() {
            let is_vm = entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.parse::<VmId>().is_ok());
            if is_vm && !entry.path().join(RECORD_FILE).exists() {
                remove_tree(&entry.path())?;
                removed.push(entry.path());
            }
        }
        Ok(removed)
    }

    /// Removes an ended VM.
    pub(crate) fn remove(&self, id: &VmId) -> anyhow::Result<()> {
        let paths = self.paths(id);
        remove_tree(&paths.runtime)?;
        remove_tree(&paths.directory)
    }
}

/// The record says that the VM lives, and its owner does not.
fn is_ghost(record: &VmRecord) -> bool {
    record.state != VmState::Exited && !fcvm_process::is_running(record.owner)
}

/// Reads a record's file, `None` where there is none; the error is a predicate: "is damaged (...)".
///
/// Whether it is there and what it says come from one opening: a record may be entered or removed by
/// another command at any moment.
fn read_record(path: &Path) -> Result<Option<VmRecord>, String> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot be read ({error})")),
    };
    let mut bytes = Vec::new();
    file.take(MAX_RECORD_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot be read ({error})"))?;
    if bytes.len() as u64 > MAX_RECORD_BYTES {
        return Err(format!(
            "is damaged (more than {MAX_RECORD_BYTES} bytes long)"
        ));
    }
    parse_record(&bytes).map(Some)
}

/// Reads a record's bytes.
fn parse_record(bytes: &[u8]) -> Result<VmRecord, String> {
    #[derive(serde::Deserialize)]
    struct Version {
        version: u32,
    }
    let Version { version } =
        serde_json::from_slice(bytes).map_err(|error| format!("is damaged ({error})"))?;
    if version > RECORD_VERSION {
        return Err(format!(
            "is of version {version}, and this fcvm knows versions up to {RECORD_VERSION}: use the newer fcvm"
        ));
    }
    serde_json::from_slice(bytes).map_err(|error| format!("is damaged ({error})"))
}

fn remove_tree(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// This process, as a record names it.
pub(crate) fn this_process() -> anyhow::Result<fcvm_types::record::ProcessIdentity> {
    let pid = i32::try_from(std::process::id())?;
    fcvm_process::process_identity(pid).context("cannot read /proc/self/stat: is /proc mounted?")
}

/// Random bytes from the kernel.
pub(crate) fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| anyhow::anyhow!("the kernel gives no random bytes: {error}"))?;
    Ok(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use fcvm_types::record::ProcessIdentity;

    pub(crate) fn record(store: &StateStore, name: &str, owner: ProcessIdentity) -> VmRecord {
        let record = VmRecord {
            version: RECORD_VERSION,
            id: VmId::from_random(random().unwrap()),
            name: name.parse().unwrap(),
            state: VmState::Running,
            owner,
            image: "image".into(),
            image_digest: "sha256:0".into(),
            command: vec!["true".into()],
            cpu_count: 1,
            memory_bytes: 1 << 28,
            hypervisor: "qemu".into(),
            hypervisor_reason: None,
            accelerator: "tcg".into(),
            network: "none".into(),
            ports: Vec::new(),
            labels: Default::default(),
            remove_on_exit: false,
            stop_signal: 15,
            terminal: false,
            created_at: time::OffsetDateTime::now_utc(),
            started_at: None,
            finished_at: None,
            exit: None,
            error: None,
            health: None,
            lineage: None,
            start_cache: None,
            memory_origin: None,
            disk_store: None,
            timings_us: Vec::new(),
            resources: Vec::new(),
        };
        store.create(&record).unwrap();
        record
    }

    fn store(dir: &tempfile::TempDir) -> StateStore {
        StateStore::open(&dir.path().join("vms"), &dir.path().join("run")).unwrap()
    }

    fn dead() -> ProcessIdentity {
        ProcessIdentity {
            pid: std::process::id() as i32,
            start_ticks: 1,
        }
    }

    #[test]
    fn records_round_trip_and_names_are_unique() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let me = super::this_process().unwrap();
        let web = record(&store, "web", me);
        assert_eq!(store.find("web").unwrap(), web);
        let mut twin = web.clone();
        twin.id = VmId::from_random([7; 16]);
        let error = store.create(&twin).unwrap_err().to_string();
        assert!(error.contains("the name 'web' is in use"), "{error}");
        assert!(!store.paths(&twin.id).directory.exists());
    }

    #[test]
    fn a_dead_owners_vm_is_settled_by_the_next_listing() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let mut lost = record(&store, "lost", dead());
        let leftover = dir.path().join("leftover");
        std::fs::write(&leftover, "x").unwrap();
        lost.resources = vec![fcvm_types::record::Resource::Path {
            path: leftover.display().to_string(),
        }];
        store.write(&lost).unwrap();
        let listed = store.list().unwrap();
        assert_eq!(listed[0].state, VmState::Exited);
        assert!(listed[0].error.as_deref().unwrap().contains("owner"));
        assert!(!leftover.exists());

        let mut removed = record(&store, "removed", dead());
        removed.remove_on_exit = true;
        store.write(&removed).unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
        assert!(!store.paths(&removed.id).directory.exists());
    }

    #[test]
    fn damaged_and_future_records_are_told_and_hide_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let me = super::this_process().unwrap();
        let damaged = record(&store, "damaged", me);
        std::fs::write(store.paths(&damaged.id).record(), "{\"version\": 1, ").unwrap();
        let future = record(&store, "future", me);
        std::fs::write(store.paths(&future.id).record(), "{\"version\": 99}").unwrap();
        let good = record(&store, "good", me);
        assert_eq!(store.list().unwrap(), [good]);
        assert!(
            store
                .find(future.id.short())
                .unwrap_err()
                .to_string()
                .contains("use the newer fcvm")
        );
        assert!(
            store
                .find(damaged.id.short())
                .unwrap_err()
                .to_string()
                .contains("is damaged")
        );
    }

    #[test]
    fn records_that_come_and_go_while_others_list_are_never_told_as_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let me = super::this_process().unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let lister = scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    for entry in store.entries(false).unwrap() {
                        if let Entry::Unreadable { reason, .. } = entry {
                            return Some(reason);
                        }
                    }
                }
                None
            });
            for _ in 0..400 {
                let passing = record(&store, "passing", me);
                store.remove(&passing.id).unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(lister.join().unwrap(), None);
        });
    }

    #[test]
    fn vms_are_found_by_name_prefix_and_pid() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(&dir);
        let me = super::this_process().unwrap();
        let web = record(&store, "web", me);
        for text in ["web", web.id.as_str(), web.id.short(), &me.pid.to_string()] {
            assert_eq!(store.find(text).unwrap().id, web.id, "{text}");
        }
        let error = store.find("nosuch").unwrap_err().to_string();
        assert!(error.contains("no VM"), "{error}");
    }
}
