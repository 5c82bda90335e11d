//! What the kernel knows of a pool: its nodes, and what is remembered of each while it does.
//!
//! The number of a node is that of the dataset, object or snapshot plus one (1 is the root), so that whoever serves next
//! knows it too.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use blockpool::{Kind, Listed, Name, Object, ObjectId, Pool, PoolError};

/// The number of the root.
pub(crate) const ROOT: u64 = 1;
/// The dataset of objects that lost their names and are open, or never had one.
pub(crate) const NAMELESS: &str = ".nameless";

/// What a node stands for.
#[derive(Debug)]
pub(crate) enum Target {
    Root,
    Dataset(String),
    File(Object),
}

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) number: u64,
    pub(crate) target: Target,
    pub(crate) is_snapshot: bool,
    /// Taken by who makes the file longer.
    pub(crate) growth: Mutex<()>,
    /// Counts changes of the content.
    version: AtomicU64,
    memory: Mutex<Memory>,
}

/// What is lost when the node is forgotten.
#[derive(Debug)]
pub(crate) struct Memory {
    /// How often the kernel got the node.
    lookups: u64,
    pub(crate) is_nameless: bool,
    /// Somebody could have mapped it to write to it.
    pub(crate) may_be_mapped: bool,
    pub(crate) mode: u32,
    /// Where it was given to somebody else than who mounted.
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    pub(crate) accessed: SystemTime,
    pub(crate) modified: SystemTime,
    pub(crate) changed: SystemTime,
    /// Blocks of 512 bytes, as of a version.
    pub(crate) blocks: Option<(u64, u64)>,
}

impl Node {
    pub(crate) fn id(&self) -> ObjectId {
        ObjectId::from_number(self.number - 1)
    }

    pub(crate) fn memory(&self) -> MutexGuard<'_, Memory> {
        lock(&self.memory)
    }

    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Remembers that the content changed.
    pub(crate) fn touch(&self) {
        self.version.fetch_add(1, Ordering::AcqRel);
        let now = SystemTime::now();
        let mut memory = self.memory();
        memory.modified = now;
        memory.changed = now;
    }

    fn new(target: Target, listed: Option<&Listed>) -> Self {
        let made = listed.map_or(0, |listed| listed.created_unix_s);
        let made = u64::try_from(made).unwrap_or(0);
        let time = SystemTime::UNIX_EPOCH
            .checked_add(std::time::Duration::from_secs(made))
            .unwrap_or(SystemTime::UNIX_EPOCH);
        let is_snapshot = listed.is_some_and(|listed| listed.kind == Kind::Snapshot);
        let is_directory = !matches!(target, Target::File(_));
        let name = listed.map_or("", |listed| &listed.name);
        Self {
            number: listed.map_or(ROOT, |listed| listed.id.get() + 1),
            target,
            is_snapshot,
            growth: Mutex::new(()),
            version: AtomicU64::new(0),
            memory: Mutex::new(Memory {
                lookups: 0,
                is_nameless: name
                    .split_once('/')
                    .is_some_and(|(dataset, _)| dataset == NAMELESS),
                may_be_mapped: false,
                mode: if is_directory { 0o700 } else { 0o600 },
                uid: None,
                gid: None,
                accessed: time,
                modified: time,
                changed: time,
                blocks: None,
            }),
        }
    }
}

/// The nodes that the kernel knows.
#[derive(Debug)]
pub(crate) struct Nodes {
    pool: Pool,
    known: Mutex<HashMap<u64, Arc<Node>>>,
    /// What has a smaller number may be known to the kernel without having been looked up here.
    certain_from: u64,
}

impl Nodes {
    /// `is_takeover`: the kernel knows nodes already.
    pub(crate) fn new(pool: Pool, is_takeover: bool) -> Self {
        Self {
            pool,
            known: Mutex::new(HashMap::from([(
                ROOT,
                Arc::new(Node::new(Target::Root, None)),
            )])),
            certain_from: if is_takeover { u64::MAX } else { 0 },
        }
    }

    /// The node with that number.
    pub(crate) fn get(&self, number: u64) -> Result<Arc<Node>, PoolError> {
        if let Some(node) = lock(&self.known).get(&number) {
            return Ok(Arc::clone(node));
        }
        let id = ObjectId::from_number(number.saturating_sub(1));
        let listed = self.pool.find_id(id)?;
        let node = self.enter(&listed, 0)?;
        // It was opened while another served.
        node.memory().may_be_mapped = true;
        Ok(node)
    }

    /// The node of what was found; the kernel will know it `lookups` times more.
    pub(crate) fn enter(&self, listed: &Listed, lookups: u64) -> Result<Arc<Node>, PoolError> {
        let number = listed.id.get() + 1;
        let mut known = lock(&self.known);
        let node = match known.get(&number) {
            Some(node) => Arc::clone(node),
            None => {
                let target = match listed.kind {
                    Kind::Dataset => Target::Dataset(listed.name.clone()),
                    Kind::Object | Kind::Snapshot => Target::File(self.pool.open_id(listed.id)?),
                };
                let node = Arc::new(Node::new(target, Some(listed)));
                known.insert(number, Arc::clone(&node));
                node
            }
        };
        node.memory().lookups += lookups;
        Ok(node)
    }

    /// The kernel forgets `lookups` of the times that it got the node; an object without a name ends with the last of them.
    pub(crate) fn forget(&self, number: u64, lookups: u64) {
        if number == ROOT {
            return;
        }
        let is_nameless = {
            let mut known = lock(&self.known);
            match known.get(&number) {
                Some(node) => {
                    let mut memory = node.memory();
                    memory.lookups = memory.lookups.saturating_sub(lookups);
                    let is_nameless = memory.is_nameless;
                    let is_last = memory.lookups == 0;
                    // Of one that has no name the kernel forgets all at once.
                    let is_over = is_last || (is_nameless && number < self.certain_from);
                    drop(memory);
                    if !is_over {
                        return;
                    }
                    known.remove(&number);
                    is_nameless
                }
                None => true,
            }
        };
        if is_nameless && let Err(error) = self.destroy_nameless(number) {
            tracing::warn!("a file that nobody uses could not be removed: {error}");
        }
    }

    fn destroy_nameless(&self, number: u64) -> Result<(), PoolError> {
        let id = ObjectId::from_number(number.saturating_sub(1));
        let listed = match self.pool.find_id(id) {
            Err(PoolError::NotFound { .. }) => return Ok(()),
            other => other?,
        };
        let name: Name = listed.name.parse()?;
        if name.dataset() == NAMELESS && name.object().is_some() {
            self.pool.destroy(&name, true)?;
        }
        Ok(())
    }
}

/// Nothing is half done under these locks when a thread panics.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
