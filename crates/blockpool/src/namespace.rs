//! Making, finding, cloning and removing datasets, objects and snapshots.

use std::sync::{Arc, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::apply::AlignedRange;
use crate::catalog::{CHECKED, Entry, EntryKind, ObjectId, compression_bits, compression_of};
use crate::compression::Compression;
use crate::error::{PoolError, Result};
use crate::layout::{BLOCK_BYTES, RECORD_BYTES, check_pool_size};
use crate::metadata::Metadata;
use crate::name::Name;
use crate::object::Object;
use crate::operation::Operation;
use crate::pool::{Pool, State};
use crate::sync::RwLock;

/// Leaves of a removed map that are freed while others wait.
const REAP_STEP_LEAVES: u64 = 64;

/// What a [`Name`] means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A place for objects.
    Dataset,
    /// A disk or other sparse range of bytes.
    Object,
    /// An object as it once was.
    Snapshot,
}

/// A dataset, object or snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its id.
    pub id: ObjectId,
    /// Its name as users write it.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Size of an object or snapshot; 0 for a dataset.
    pub size_bytes: u64,
    /// When it was made, in seconds since 1970.
    pub created_unix_s: i64,
    /// What a dataset does with what its objects get; of an object or snapshot nothing is told.
    pub options: DatasetOptions,
}

/// What a dataset does with what its objects get. Other data has checksums once it is shared and was read or scrubbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DatasetOptions {
    /// Every write goes to a new place and gets a checksum at once.
    pub checksum: bool,
    /// What is written is compressed, a record of 64 KiB at a time; all that [`Self::checksum`] says comes with it.
    pub compression: Compression,
}

impl DatasetOptions {
    pub(crate) fn from_byte(byte: u8) -> Self {
        Self {
            checksum: byte & CHECKED != 0,
            compression: compression_of(byte),
        }
    }

    pub(crate) fn to_byte(self) -> u8 {
        let checked = if self.checksum { CHECKED } else { 0 };
        checked | compression_bits(self.compression)
    }
}

fn now_unix_s() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}

fn not_found(name: &Name) -> PoolError {
    PoolError::NotFound {
        name: name.to_string(),
    }
}

fn object_name(name: &Name) -> Result<&str> {
    match (name.object(), name.snapshot()) {
        (Some(object), None) => Ok(object),
        _ => Err(PoolError::Name {
            name: name.to_string(),
            reason: "an object is called DATASET/OBJECT",
        }),
    }
}

impl Metadata {
    pub(crate) fn dataset(&self, name: &Name) -> Result<&Entry> {
        let found = self.catalog.find(0, name.dataset());
        found.ok_or_else(|| PoolError::NotFound {
            name: name.dataset().to_owned(),
        })
    }

    /// What a name means, but for snapshots of datasets, which are those of their objects.
    pub(crate) fn find(&self, name: &Name) -> Result<&Entry> {
        let mut found = self.dataset(name)?;
        for part in [name.object(), name.snapshot()].into_iter().flatten() {
            found = self
                .catalog
                .find(found.id, part)
                .ok_or_else(|| not_found(name))?;
        }
        Ok(found)
    }

    /// The objects of a dataset, or the one object that is named.
    fn objects(&self, name: &Name) -> Result<Vec<u64>> {
        let dataset = self.dataset(name)?.id;
        match name.object() {
            Some(object) => {
                let found = self
                    .catalog
                    .find(dataset, object)
                    .ok_or_else(|| not_found(name))?;
                Ok(vec![found.id])
            }
            None => Ok(self
                .catalog
                .children(dataset)
                .map(|entry| entry.id)
                .collect()),
        }
    }

    /// Pairs of an object and its snapshot of the name's.
    pub(crate) fn snapshots(&self, name: &Name) -> Result<Vec<(u64, u64)>> {
        let Some(snapshot) = name.snapshot() else {
            return Err(PoolError::Name {
                name: name.to_string(),
                reason: "a snapshot is called DATASET/OBJECT@SNAPSHOT or DATASET@SNAPSHOT",
            });
        };
        let found: Vec<_> = self
            .objects(name)?
            .into_iter()
            .filter_map(|object| Some((object, self.catalog.find(object, snapshot)?.id)))
            .collect();
        if found.is_empty() {
            Err(not_found(name))
        } else {
            Ok(found)
        }
    }

    pub(crate) fn listed(&self, entry: &Entry) -> Option<Listed> {
        Some(Listed {
            id: ObjectId(entry.id),
            name: self.catalog.full_name(entry),
            kind: match entry.kind {
                EntryKind::Dataset => Kind::Dataset,
                EntryKind::Object => Kind::Object,
                EntryKind::Snapshot => Kind::Snapshot,
                EntryKind::Dying => return None,
            },
            size_bytes: entry.size_bytes,
            created_unix_s: entry.created_unix_s,
            options: DatasetOptions::from_byte(entry.options),
        })
    }
}

impl State {
    /// Lets records of one object hold what records of another one hold: an id and a first record each.
    pub(crate) fn commit_clone(
        &mut self,
        (source, source_first): (u64, u64),
        (target, target_first): (u64, u64),
        record_count: u64,
    ) -> Result<()> {
        let (from, to) = (self.metadata.entry(source)?, self.metadata.entry(target)?);
        let aligned = AlignedRange::new(from, to, target_first, record_count);
        let has_leaves = aligned.is_some_and(|range| !range.leaves.is_empty());
        if source != target && source_first == target_first && has_leaves {
            return self.commit(&Operation::CloneAligned {
                source,
                target,
                first: target_first,
                record_count,
            });
        }
        self.commit(&Operation::CloneRange {
            source,
            source_first,
            target,
            target_first,
            record_count,
        })
    }

    /// Makes a snapshot of each object, or of none.
    fn snapshot_all(&mut self, objects: &[u64], name: &str) -> Result<()> {
        let mut made = Vec::new();
        for object in objects {
            let id = self.metadata.next_id;
            let result = self.commit(&Operation::Clone {
                source: *object,
                id,
                kind: EntryKind::Snapshot,
                parent: *object,
                unix_s: now_unix_s(),
                name: name.to_owned(),
            });
            if let Err(error) = result {
                for id in made {
                    self.commit(&Operation::Remove { id })?;
                }
                return Err(error);
            }
            made.push(id);
        }
        Ok(())
    }
}

impl Pool {
    /// Makes a dataset.
    ///
    /// # Errors
    ///
    /// It exists, or the pool is out of order.
    pub fn create_dataset(&self, name: &Name) -> Result<ObjectId> {
        if name.object().is_some() || name.snapshot().is_some() {
            return Err(PoolError::Name {
                name: name.to_string(),
                reason: "a dataset has a name without '/' and '@'",
            });
        }
        self.retry_when_full(|| self.create_entry(EntryKind::Dataset, |_| Ok(0), name.dataset(), 0))
    }

    /// Changes what a dataset does with what its objects get from now on.
    ///
    /// # Errors
    ///
    /// It does not exist, or the pool is out of order.
    pub fn set_options(&self, dataset: &Name, options: DatasetOptions) -> Result<()> {
        if dataset.object().is_some() || dataset.snapshot().is_some() {
            return Err(PoolError::Name {
                name: dataset.to_string(),
                reason: "only datasets have options, and their names have no '/' and '@'",
            });
        }
        let mut state = self.inner.state();
        let id = state.metadata.dataset(dataset)?.id;
        state.commit(&Operation::Options {
            id,
            options: options.to_byte(),
        })
    }

    /// Makes an object of zeros.
    ///
    /// # Errors
    ///
    /// It exists, its dataset does not, or its size is out of range.
    pub fn create_object(&self, name: &Name, size_bytes: u64) -> Result<Object> {
        let object = object_name(name)?;
        let id = self.retry_when_full(|| {
            let dataset = |metadata: &Metadata| Ok(metadata.dataset(name)?.id);
            self.create_entry(EntryKind::Object, dataset, object, size_bytes)
        })?;
        Ok(Object::new(self, id.0))
    }

    fn create_entry(
        &self,
        kind: EntryKind,
        parent: impl FnOnce(&Metadata) -> Result<u64>,
        name: &str,
        size_bytes: u64,
    ) -> Result<ObjectId> {
        let mut state = self.inner.state();
        let id = state.metadata.next_id;
        let parent = parent(&state.metadata)?;
        state.commit(&Operation::Create {
            id,
            kind,
            parent,
            size_bytes,
            unix_s: now_unix_s(),
            name: name.to_owned(),
        })?;
        Ok(ObjectId(id))
    }

    /// Opens an object or a snapshot of one.
    ///
    /// # Errors
    ///
    /// It does not exist.
    pub fn open_object(&self, name: &Name) -> Result<Object> {
        if name.object().is_none() {
            return Err(PoolError::Name {
                name: name.to_string(),
                reason: "it names no object",
            });
        }
        let id = self.inner.state().metadata.find(name)?.id;
        Ok(Object::new(self, id))
    }

    /// Everything in the pool, or in the dataset or object that is named, by name.
    ///
    /// # Errors
    ///
    /// Nothing has that name.
    pub fn list(&self, below: Option<&Name>) -> Result<Vec<Listed>> {
        let state = self.inner.state();
        let metadata = &state.metadata;
        let mut waiting: Vec<&Entry> = match below {
            Some(name) => vec![metadata.find(name)?],
            None => metadata.catalog.children(0).collect(),
        };
        waiting.reverse();
        let mut listed = Vec::new();
        while let Some(entry) = waiting.pop() {
            listed.extend(metadata.listed(entry));
            let children: Vec<&Entry> = metadata.catalog.children(entry.id).collect();
            waiting.extend(children.into_iter().rev());
        }
        Ok(listed)
    }

    /// Makes an object that holds what another one, or a snapshot, holds now. Its cost does not depend on the size.
    ///
    /// # Errors
    ///
    /// The source does not exist, the target does, or the pool is out of order.
    pub fn clone_object(&self, source: &Name, target: &Name) -> Result<Object> {
        let object = object_name(target)?;
        let opened = self.open_object(source)?;
        let id = self.retry_when_full(|| {
            self.with_gates(&[opened.id().0], |state| {
                let id = state.metadata.next_id;
                let parent = state.metadata.dataset(target)?.id;
                state.commit(&Operation::Clone {
                    source: opened.id().0,
                    id,
                    kind: EntryKind::Object,
                    parent,
                    unix_s: now_unix_s(),
                    name: object.to_owned(),
                })?;
                Ok(id)
            })
        })?;
        Ok(Object::new(self, id))
    }

    /// Lets a range of one object hold what a range of another, or of the same one, holds; no data is copied. Returns when it is done,
    /// durable with the next flush. At the same place of another object this costs nothing that grows with the range.
    ///
    /// # Errors
    ///
    /// Offsets are no multiples of 64 KiB, or the length is none and does not reach to the ends of both; the
    /// ranges overlap or are not inside their objects.
    pub fn clone_range(
        &self,
        source: &Object,
        source_offset_bytes: u64,
        target: &Object,
        target_offset_bytes: u64,
        length_bytes: u64,
    ) -> Result<()> {
        let (from, to) = (source.id().0, target.id().0);
        let refused = |reason| Err(PoolError::Range { reason });
        if !source_offset_bytes.is_multiple_of(RECORD_BYTES)
            || !target_offset_bytes.is_multiple_of(RECORD_BYTES)
        {
            return refused("offsets have to be multiples of 64 KiB");
        }
        self.retry_when_full(|| {
            self.with_gates(&[from, to], |state| {
                let metadata = &state.metadata;
                metadata.check_range(from, source_offset_bytes, length_bytes)?;
                metadata.check_range(to, target_offset_bytes, length_bytes)?;
                let is_end = metadata.entry(from)?.size_bytes == source_offset_bytes + length_bytes
                    && metadata.entry(to)?.size_bytes == target_offset_bytes + length_bytes;
                if !length_bytes.is_multiple_of(RECORD_BYTES) && !is_end {
                    return refused(
                        "the length has to be a multiple of 64 KiB, or reach to both ends",
                    );
                }
                let record_count = length_bytes.div_ceil(RECORD_BYTES);
                if from == to && source_offset_bytes.abs_diff(target_offset_bytes) < length_bytes {
                    return refused("source and target overlap");
                }
                if record_count == 0 {
                    return Ok(());
                }
                let source = (from, source_offset_bytes / RECORD_BYTES);
                let target = (to, target_offset_bytes / RECORD_BYTES);
                state.commit_clone(source, target, record_count)
            })
        })?;
        self.checkpoint_if_due()
    }

    /// Makes a snapshot of an object (`dataset/object@name`), or of all objects of a dataset at one moment
    /// (`dataset@name`). Returns how many objects it has.
    ///
    /// # Errors
    ///
    /// What it is of does not exist, one of the snapshots does, or the pool is out of order.
    pub fn snapshot(&self, name: &Name) -> Result<usize> {
        let Some(snapshot) = name.snapshot() else {
            return Err(PoolError::Name {
                name: name.to_string(),
                reason: "a snapshot is called DATASET/OBJECT@SNAPSHOT or DATASET@SNAPSHOT",
            });
        };
        self.retry_when_full(|| {
            let objects = self.inner.state().metadata.objects(name)?;
            self.with_gates(&objects, |state| {
                if state.metadata.objects(name)? != objects {
                    return Err(PoolError::Range {
                        reason: "the dataset changed meanwhile; try again",
                    });
                }
                for object in &objects {
                    if state.metadata.catalog.find(*object, snapshot).is_some() {
                        return Err(PoolError::Exists {
                            name: name.to_string(),
                        });
                    }
                }
                state.snapshot_all(&objects, snapshot)?;
                Ok(objects.len())
            })
        })
    }

    /// Makes an object, or each object of a dataset that has the snapshot, what it was then. Returns how many there are.
    ///
    /// # Errors
    ///
    /// The snapshot does not exist, or the pool is out of order.
    pub fn rollback(&self, name: &Name) -> Result<usize> {
        self.retry_when_full(|| {
            let pairs = self.inner.state().metadata.snapshots(name)?;
            let objects: Vec<u64> = pairs.iter().map(|(object, _)| *object).collect();
            self.with_gates(&objects, |state| {
                if state.metadata.snapshots(name)? != pairs {
                    return Err(not_found(name));
                }
                // All of them or none: what one of them may need is there for each.
                state.metadata.need_pages(32 * pairs.len() as u64)?;
                for (object, snapshot) in &pairs {
                    let (object, snapshot) = (*object, *snapshot);
                    state.commit(&Operation::Rollback { object, snapshot })?;
                }
                Ok(pairs.len())
            })
        })
    }

    /// Removes a dataset, object or snapshot; with `recursive` also what is in it. Returns how many things were removed. Their
    /// space is free with the next checkpoint.
    ///
    /// # Errors
    ///
    /// It does not exist, has something in it, or the pool is out of order.
    pub fn destroy(&self, name: &Name, recursive: bool) -> Result<usize> {
        let count = self.retry_when_full(|| {
            let mut ids = self.inner.state().metadata.doomed(name, recursive)?;
            self.with_gates(&ids.clone(), |state| {
                // Nothing may have come meanwhile that would lose its parent.
                ids = state.metadata.doomed(name, recursive)?;
                for id in &ids {
                    state.commit(&Operation::Remove { id: *id })?;
                    state.gates.remove(id);
                }
                Ok(ids.len())
            })
        })?;
        self.reap()?;
        Ok(count)
    }

    /// Frees what was removed, in steps that let others work in between.
    ///
    /// # Errors
    ///
    /// The pool is out of order.
    pub fn reap(&self) -> Result<()> {
        loop {
            let more = {
                let mut state = self.inner.state();
                state.check_running()?;
                let more = state.metadata.reap_some(REAP_STEP_LEAVES);
                if !matches!(more, Ok(_) | Err(PoolError::Full)) {
                    state.pending.must_checkpoint = true;
                }
                more
            };
            match more {
                Ok(false) => return Ok(()),
                Ok(true) => self.checkpoint_if_due()?,
                // The rest is done by the checkpoints that come.
                Err(PoolError::Full) => return self.checkpoint(),
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives an object another name, also in another dataset.
    ///
    /// # Errors
    ///
    /// The old name does not exist, the new one does.
    pub fn rename_object(&self, old: &Name, new: &Name) -> Result<()> {
        object_name(old)?;
        let name = object_name(new)?.to_owned();
        let mut state = self.inner.state();
        let id = state.metadata.find(old)?.id;
        let parent = state.metadata.dataset(new)?.id;
        state.commit(&Operation::Rename { id, parent, name })
    }

    /// Lets the pool use up to `size_bytes` of its disk, which grows if it can.
    ///
    /// # Errors
    ///
    /// The size is smaller than the pool or too large, or the disk cannot grow.
    pub fn grow(&self, size_bytes: u64) -> Result<()> {
        let size_blocks = check_pool_size(size_bytes)? * (RECORD_BYTES / BLOCK_BYTES);
        let old_blocks = self.inner.state().metadata.size_blocks;
        if size_blocks < old_blocks {
            return Err(PoolError::Size {
                what: "a pool that has more",
                size_bytes,
                min_bytes: old_blocks * BLOCK_BYTES,
                max_bytes: crate::layout::POOL_MAX_BYTES,
            });
        }
        let failed = PoolError::io("let the pool's disk grow");
        self.inner.disk.grow(size_bytes).map_err(failed)?;
        {
            let mut state = self.inner.state();
            state.check_running()?;
            state.metadata.size_blocks = size_blocks;
            state.metadata.allocator.grow(size_blocks);
        }
        self.checkpoint()
    }

    /// Does something while no write to these objects is on its way.
    pub(crate) fn with_gates<T>(
        &self,
        ids: &[u64],
        work: impl FnOnce(&mut State) -> Result<T>,
    ) -> Result<T> {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids.dedup();
        let gates: Vec<Arc<RwLock<()>>> = ids.iter().map(|id| self.inner.gate(*id)).collect();
        let _guards: Vec<_> = gates
            .iter()
            .map(|gate| gate.write().unwrap_or_else(PoisonError::into_inner))
            .collect();
        work(&mut self.inner.state())
    }

    /// Space that was freed can be used after a checkpoint: one is tried before it is said that the pool is full.
    pub(crate) fn retry_when_full<T>(&self, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        match work() {
            Err(PoolError::Full) => {
                self.checkpoint()?;
                work()
            }
            other => other,
        }
    }
}

impl Metadata {
    /// What goes with a name, children first.
    fn doomed(&self, name: &Name, recursive: bool) -> Result<Vec<u64>> {
        if name.snapshot().is_some() {
            let pairs = self.snapshots(name)?;
            return Ok(pairs.into_iter().map(|(_, snapshot)| snapshot).collect());
        }
        let mut ids = vec![self.find(name)?.id];
        let mut next = 0;
        while recursive && next < ids.len() {
            ids.extend(self.catalog.children(ids[next]).map(|entry| entry.id));
            next += 1;
        }
        ids.reverse();
        Ok(ids)
    }
}
