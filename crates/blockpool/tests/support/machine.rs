//! Does steps to a pool and to its model, and compares the two: at any time, and after a crash at any event.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockpool::{
    Compression, DatasetOptions, Fault, Name, Pool, PoolError, RECORD_BYTES, SimulatedDisk,
};

use super::model::{BLOCK, Model, SECTOR, Thing, find_wrong};

/// Streams that were sent, received and compared.
pub(crate) static TRANSFERS: AtomicU64 = AtomicU64::new(0);

/// One step, whatever the numbers mean in the state in which it is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) kind: u8,
    pub(crate) a: u32,
    pub(crate) b: u32,
    pub(crate) c: u32,
}

/// What was true between two steps.
#[derive(Debug, Clone)]
struct Moment {
    /// Events of the disk until then.
    events: usize,
    model: Model,
    /// Everything before was durable then.
    is_flushed: bool,
}

pub(crate) struct Machine {
    pub(crate) disk: SimulatedDisk,
    pub(crate) pool: Option<Pool>,
    pub(crate) model: Model,
    moments: Vec<Moment>,
    next_id: u64,
    counter: u64,
    last_write: Option<Step>,
    /// Errors that the disk was told to make are no bugs.
    pub(crate) has_faults: bool,
    pub(crate) steps_done: u64,
}

fn name(text: &str) -> Name {
    text.parse().expect("names of this test are good")
}

impl Machine {
    pub(crate) fn new(size_bytes: u64) -> Self {
        let disk = SimulatedDisk::new(size_bytes);
        let pool =
            Pool::create(Arc::new(disk.clone()), size_bytes, [3; 16]).expect("an empty pool");
        pool.create_dataset(&name("d")).expect("a dataset");
        pool.flush().expect("a flush");
        disk.start_recording();
        let mut machine = Self {
            disk,
            pool: Some(pool),
            model: Model::default(),
            moments: Vec::new(),
            next_id: 1,
            counter: 0,
            last_write: None,
            has_faults: false,
            steps_done: 0,
        };
        machine.note(true);
        machine
    }

    /// Goes on with a pool that is there, whatever it holds.
    pub(crate) fn from_disk(disk: SimulatedDisk, pool: Pool) -> Self {
        let mut machine = Self {
            disk,
            pool: Some(pool),
            model: Model::default(),
            moments: Vec::new(),
            next_id: 1,
            counter: 1 << 40,
            last_write: None,
            has_faults: false,
            steps_done: 0,
        };
        for (full, size_bytes) in machine.listing() {
            let bytes = machine.read(&full);
            let mut thing = Thing {
                id: machine.id(),
                size_bytes,
                ..Thing::default()
            };
            thing.write(0, &bytes);
            machine.insert(&full, thing);
        }
        machine.disk.start_recording();
        machine.model.flushed();
        machine.note(true);
        machine
    }

    fn insert(&mut self, full: &str, thing: Thing) {
        let path = full.strip_prefix("d/").expect("all is in one dataset");
        match path.split_once('@') {
            Some((object, snapshot)) => {
                let key = (object.to_owned(), snapshot.to_owned());
                self.model.snapshots.insert(key, Arc::new(thing));
            }
            None => {
                self.model.objects.insert(path.to_owned(), Arc::new(thing));
            }
        }
    }

    pub(crate) fn pool(&self) -> &Pool {
        self.pool.as_ref().expect("the pool is open")
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn note(&mut self, is_flushed: bool) {
        if is_flushed {
            self.model.flushed();
        }
        let events = self.disk.mark(0);
        self.moments.push(Moment {
            events,
            model: self.model.clone(),
            is_flushed,
        });
    }

    fn listing(&self) -> BTreeMap<String, u64> {
        let listed = self.pool().list(Some(&name("d"))).expect("a list");
        let in_dataset = listed.into_iter().filter(|entry| entry.name != "d");
        in_dataset
            .map(|entry| (entry.name, entry.size_bytes))
            .collect()
    }

    fn read(&self, full: &str) -> Vec<u8> {
        let object = self.pool().open_object(&name(full)).expect("it is listed");
        let mut bytes = vec![0xee; object.size_bytes().expect("it is there") as usize];
        object.read_at(&mut bytes, 0).expect("its own range");
        bytes
    }

    /// Compares everything with the model, and the references with a recount.
    pub(crate) fn verify(&self) {
        assert_eq!(self.listing(), self.model.listing());
        for (full, thing) in self.model.things() {
            let (found, expected) = (self.read(&full), thing.read());
            if let Some(at) = found.iter().zip(&expected).position(|(a, b)| a != b) {
                panic!("'{full}' differs at byte {at}");
            }
        }
        verify_accounting(self.pool());
    }

    fn object_name(&self, number: u32) -> Option<String> {
        let count = self.model.objects.len();
        let mut names = self.model.objects.keys();
        (count > 0).then(|| names.nth(number as usize % count).cloned())?
    }

    /// An object or a snapshot.
    fn thing_name(&self, number: u32) -> Option<(String, Arc<Thing>)> {
        let count = self.model.objects.len() + self.model.snapshots.len();
        let mut things = self.model.things();
        let (name, thing) = (count > 0).then(|| things.nth(number as usize % count))??;
        Some((name, Arc::clone(thing)))
    }

    fn snapshot_name(&self, number: u32) -> Option<(String, String)> {
        let count = self.model.snapshots.len();
        let mut names = self.model.snapshots.keys();
        (count > 0).then(|| names.nth(number as usize % count).cloned())?
    }

    fn size(number: u32) -> u64 {
        match number % 8 {
            0 => 0,
            1 => u64::from(number >> 8) % (9 << 20),
            2 => (8 << 20) + u64::from(number >> 8) % (1 << 18),
            _ => u64::from(number >> 8) % (1 << 20),
        }
    }

    fn pattern(&mut self, length: usize) -> Vec<u8> {
        self.counter += 1;
        let word = self.counter.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        // A half of what is written cannot be compressed.
        if self.counter.is_multiple_of(2) {
            let mut numbers = super::Numbers(word);
            return (0..length).map(|_| numbers.next() as u8 | 1).collect();
        }
        (0..length)
            .map(|at| (word >> (at % 8 * 8)) as u8 | 1)
            .collect()
    }

    /// Does one step.
    pub(crate) fn step(&mut self, step: Step) {
        self.steps_done += 1;
        let is_flushed = match step.kind % 37 {
            0 | 1 => self.create(step),
            2..=10 => self.write(step),
            11..=13 => self.rewrite(step),
            14 | 15 => self.punch(step),
            16 => self.resize(step),
            17 | 18 => self.clone_object(step),
            19..=21 => self.clone_range(step),
            22 => self.snapshot(step),
            23 => self.rollback(step),
            24 => self.destroy(step),
            25 => self.rename(step),
            26 => self.reopen(),
            27 => self.checkpoint(),
            28 => self.scrub(),
            29 => self.set_options(step),
            30 => self.transfer(step),
            31 => self.copy_whole(step),
            _ => self.flush(),
        };
        self.note(is_flushed);
    }

    /// Whether it worked. What a full pool or a faulty disk refuses is no bug.
    fn allow<T>(&self, result: Result<T, PoolError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => match error.reason() {
                PoolError::Full => None,
                PoolError::Io { .. } | PoolError::Stopped { .. } if self.has_faults => None,
                error => panic!("{error}"),
            },
        }
    }

    fn create(&mut self, step: Step) -> bool {
        let object = format!("o{}", step.a % 8);
        let size_bytes = Self::size(step.b);
        let result = self
            .pool()
            .create_object(&name(&format!("d/{object}")), size_bytes);
        if self.model.objects.contains_key(&object) {
            assert!(
                matches!(
                    result,
                    Err(PoolError::Exists { .. } | PoolError::Full | PoolError::Stopped { .. })
                ),
                "{result:?}"
            );
        } else if self.allow(result).is_some() {
            let id = self.id();
            let thing = Thing {
                id,
                size_bytes,
                ..Thing::default()
            };
            self.model.objects.insert(object, Arc::new(thing));
        }
        false
    }

    fn range(step: Step, size_bytes: u64) -> (u64, u64) {
        let offset = u64::from(step.b) % size_bytes.max(1);
        let length = match step.c % 4 {
            0 => u64::from(step.c >> 8) % 700,
            1 => u64::from(step.c >> 8) % (1 << 18),
            _ => BLOCK as u64 * (1 + u64::from(step.c >> 8) % 5),
        };
        let offset = if step.c % 4 > 1 {
            offset / BLOCK as u64 * BLOCK as u64
        } else {
            offset
        };
        (offset, length.min(size_bytes.saturating_sub(offset)))
    }

    fn write(&mut self, step: Step) -> bool {
        self.last_write = Some(step);
        let Some(object) = self.object_name(step.a) else {
            return false;
        };
        let size_bytes = self.model.objects[&object].size_bytes;
        let (offset, length) = Self::range(step, size_bytes);
        let bytes = self.pattern(length as usize);
        let opened = self
            .pool()
            .open_object(&name(&format!("d/{object}")))
            .expect("it is there");
        let done = self.allow(opened.write_at(&bytes, offset)).is_some();
        let thing = self.model.objects.get_mut(&object).expect("it was found");
        Arc::make_mut(thing).write(offset, &bytes);
        if !done {
            self.settle(&object);
        }
        false
    }

    /// Writes where the last write was: what is new becomes old.
    fn rewrite(&mut self, step: Step) -> bool {
        match self.last_write {
            Some(last) => self.write(last),
            None => self.write(step),
        }
    }

    /// A step on an object failed in the middle: takes over what the pool has, where that is old or new.
    fn settle(&mut self, object: &str) {
        // A fault is for the step, not for looking at what it left.
        self.disk.set_fault(None);
        let full = format!("d/{object}");
        let opened = self.pool().open_object(&name(&full)).expect("it is there");
        let mut bytes = vec![0; self.model.objects[object].size_bytes as usize];
        opened.read_at(&mut bytes, 0).expect("its own range");
        let id = self.model.objects[object].id;
        let wrong = find_wrong(&bytes, id, std::slice::from_ref(&self.model), 1);
        assert_eq!(wrong, None, "'{full}' holds neither old nor new bytes");
        let thing = Arc::make_mut(self.model.objects.get_mut(object).expect("it was found"));
        for (index, block) in bytes.chunks(BLOCK).enumerate() {
            let mut content = thing.content(index as u64).to_vec();
            content[..block.len()].copy_from_slice(block);
            if thing.content(index as u64)[..] != content[..] {
                thing.set(index as u64, content.into());
            }
        }
    }

    fn punch(&mut self, step: Step) -> bool {
        let Some(object) = self.object_name(step.a) else {
            return false;
        };
        let (offset, mut length) = Self::range(step, self.model.objects[&object].size_bytes);
        if step.c % 16 == 15 {
            length = self.model.objects[&object].size_bytes - offset;
        }
        let opened = self
            .pool()
            .open_object(&name(&format!("d/{object}")))
            .expect("it is there");
        let done = self.allow(opened.punch_hole(offset, length)).is_some();
        let thing = self.model.objects.get_mut(&object).expect("it was found");
        Arc::make_mut(thing).zero(offset, length);
        if !done {
            self.settle(&object);
        }
        false
    }

    fn resize(&mut self, step: Step) -> bool {
        let Some(object) = self.object_name(step.a) else {
            return false;
        };
        let size_bytes = Self::size(step.b);
        let opened = self
            .pool()
            .open_object(&name(&format!("d/{object}")))
            .expect("it is there");
        let done = self.allow(opened.set_size(size_bytes)).is_some();
        let thing = Arc::make_mut(self.model.objects.get_mut(&object).expect("it was found"));
        let old_bytes = thing.size_bytes;
        if size_bytes < old_bytes {
            thing.zero(size_bytes, old_bytes - size_bytes);
        }
        if done {
            thing.size_bytes = size_bytes;
        } else {
            self.settle(&object);
        }
        false
    }

    fn clone_object(&mut self, step: Step) -> bool {
        let Some((source, thing)) = self.thing_name(step.a) else {
            return false;
        };
        let target = format!("o{}", step.b % 8);
        let result = self
            .pool()
            .clone_object(&name(&source), &name(&format!("d/{target}")));
        if self.model.objects.contains_key(&target) {
            assert!(result.is_err());
        } else if self.allow(result).is_some() {
            let mut thing = (*thing).clone();
            thing.id = self.id();
            self.model.objects.insert(target, Arc::new(thing));
        }
        false
    }

    /// Makes an object as long as another thing, then lets it hold what that holds, all of it or from the middle on.
    fn copy_whole(&mut self, step: Step) -> bool {
        let (Some((source, from)), Some(target)) =
            (self.thing_name(step.a), self.object_name(step.b))
        else {
            return false;
        };
        if from.id == self.model.objects[&target].id {
            return false;
        }
        let full = format!("d/{target}");
        let open = |full: &str| self.pool().open_object(&name(full)).expect("it is there");
        let (source, opened) = (open(&source), open(&full));
        let size_bytes = from.size_bytes;
        let resized = self.allow(opened.set_size(size_bytes)).is_some();
        let thing = Arc::make_mut(self.model.objects.get_mut(&target).expect("it was found"));
        if size_bytes < thing.size_bytes {
            thing.zero(size_bytes, thing.size_bytes - size_bytes);
        }
        if !resized {
            self.settle(&target);
            return false;
        }
        thing.size_bytes = size_bytes;
        self.note(false);
        let first = match step.c % 3 {
            0 => u64::from(step.c >> 8) % (size_bytes / RECORD_BYTES + 1),
            _ => 0,
        };
        let offset = first * RECORD_BYTES;
        let length = size_bytes - offset;
        let result = self
            .pool()
            .clone_range(&source, offset, &opened, offset, length);
        let done = self.allow(result).is_some();
        self.model_clone(
            &target,
            &from,
            (first, first),
            length.div_ceil(RECORD_BYTES),
        );
        if !done {
            self.settle(&target);
        }
        false
    }

    /// What records of a thing become, in the model.
    fn model_clone(&mut self, target: &str, from: &Thing, firsts: (u64, u64), count: u64) {
        let blocks_per_record = RECORD_BYTES / BLOCK as u64;
        let thing = Arc::make_mut(self.model.objects.get_mut(target).expect("it was found"));
        for block in 0..count * blocks_per_record {
            let (source_block, target_block) = (
                firsts.0 * blocks_per_record + block,
                firsts.1 * blocks_per_record + block,
            );
            thing.set(target_block, from.content(source_block));
            // A lost write to the source is lost in the clone.
            if let (Some(old), Some(new)) = (
                from.blocks.get(&source_block),
                thing.blocks.get_mut(&target_block),
            ) {
                new.before.extend(old.before.iter().cloned());
            }
        }
    }

    fn clone_range(&mut self, step: Step) -> bool {
        let (Some((source, from)), Some(target)) =
            (self.thing_name(step.a), self.object_name(step.b))
        else {
            return false;
        };
        let to = Arc::clone(&self.model.objects[&target]);
        let records = |thing: &Thing| thing.size_bytes / RECORD_BYTES;
        let (from_first, to_first) = (
            u64::from(step.c) % records(&from).max(1),
            u64::from(step.c >> 8) % records(&to).max(1),
        );
        let room = records(&from)
            .saturating_sub(from_first)
            .min(records(&to).saturating_sub(to_first));
        let count = (1 + u64::from(step.c >> 16) % 20).min(room);
        let open = |full: &str| self.pool().open_object(&name(full)).expect("it is there");
        let length = count * RECORD_BYTES;
        let full = format!("d/{target}");
        let result = self.pool().clone_range(
            &open(&source),
            from_first * RECORD_BYTES,
            &open(&full),
            to_first * RECORD_BYTES,
            length,
        );
        if from.id == to.id && from_first.abs_diff(to_first) < count {
            assert!(
                matches!(
                    result,
                    Err(PoolError::Range { .. } | PoolError::Stopped { .. })
                ),
                "{result:?}"
            );
            return false;
        }
        let done = self.allow(result).is_some();
        self.model_clone(&target, &from, (from_first, to_first), count);
        if !done {
            self.settle(&target);
        }
        false
    }

    fn snapshot(&mut self, step: Step) -> bool {
        let snapshot = format!("s{}", step.b % 3);
        let whole = step.c.is_multiple_of(4);
        let objects: Vec<String> = match (whole, self.object_name(step.a)) {
            (_, None) => return false,
            (true, _) => self.model.objects.keys().cloned().collect(),
            (false, Some(object)) => vec![object],
        };
        let full = if whole {
            format!("d@{snapshot}")
        } else {
            format!("d/{}@{snapshot}", objects[0])
        };
        let result = self.pool().snapshot(&name(&full));
        let exists = |object: &String| {
            self.model
                .snapshots
                .contains_key(&(object.clone(), snapshot.clone()))
        };
        if objects.iter().any(exists) {
            assert!(result.is_err());
            return false;
        }
        match self.allow(result) {
            Some(count) => {
                assert_eq!(count, objects.len());
                for object in objects {
                    let mut thing = (*self.model.objects[&object]).clone();
                    thing.id = self.id();
                    self.model
                        .snapshots
                        .insert((object, snapshot.clone()), Arc::new(thing));
                }
            }
            None => self.adopt_snapshots(&objects, &snapshot),
        }
        false
    }

    /// A pool that became full in the middle may have made some of the snapshots.
    fn adopt_snapshots(&mut self, objects: &[String], snapshot: &str) {
        let listing = self.listing();
        for object in objects {
            if listing.contains_key(&format!("d/{object}@{snapshot}")) {
                let mut thing = (*self.model.objects[object]).clone();
                thing.id = self.id();
                self.model
                    .snapshots
                    .insert((object.clone(), snapshot.to_owned()), Arc::new(thing));
            }
        }
    }

    fn rollback(&mut self, step: Step) -> bool {
        let Some((object, snapshot)) = self.snapshot_name(step.a) else {
            return false;
        };
        let result = self
            .pool()
            .rollback(&name(&format!("d/{object}@{snapshot}")));
        if self.allow(result).is_some() {
            let source = Arc::clone(&self.model.snapshots[&(object.clone(), snapshot)]);
            let thing = Arc::make_mut(
                self.model
                    .objects
                    .get_mut(&object)
                    .expect("snapshots have objects"),
            );
            // What a crash may leave is what the object or the snapshot might have held.
            let old = std::mem::take(&mut thing.blocks);
            thing.blocks = source.blocks.clone();
            thing.size_bytes = source.size_bytes;
            for (index, block) in old {
                let content = thing.content(index);
                let new = thing.blocks.entry(index).or_insert(super::model::Block {
                    now: content,
                    before: Vec::new(),
                });
                new.before.push(block.now);
                new.before.extend(block.before);
            }
        }
        false
    }

    fn destroy(&mut self, step: Step) -> bool {
        if step.b.is_multiple_of(2)
            && let Some((object, snapshot)) = self.snapshot_name(step.a)
        {
            let result = self
                .pool()
                .destroy(&name(&format!("d/{object}@{snapshot}")), false);
            let result = self.allow(result);
            if result.is_some()
                || !self
                    .listing()
                    .contains_key(&format!("d/{object}@{snapshot}"))
            {
                self.model.snapshots.remove(&(object, snapshot));
            }
        } else if let Some(object) = self.object_name(step.a) {
            let has_snapshots = self.model.snapshots.keys().any(|(name, _)| *name == object);
            let recursive = step.c.is_multiple_of(2);
            let result = self
                .pool()
                .destroy(&name(&format!("d/{object}")), recursive);
            if has_snapshots && !recursive {
                assert!(
                    matches!(
                        result,
                        Err(PoolError::HasDependents { .. } | PoolError::Stopped { .. })
                    ),
                    "{result:?}"
                );
                return false;
            }
            let _ = self.allow(result);
            let listing = self.listing();
            self.model.snapshots.retain(|(name, snapshot), _| {
                *name != object || listing.contains_key(&format!("d/{name}@{snapshot}"))
            });
            if !listing.contains_key(&format!("d/{object}")) {
                self.model.objects.remove(&object);
            }
        }
        false
    }

    fn rename(&mut self, step: Step) -> bool {
        let Some(old) = self.object_name(step.a) else {
            return false;
        };
        let new = format!("o{}", step.b % 8);
        let result = self
            .pool()
            .rename_object(&name(&format!("d/{old}")), &name(&format!("d/{new}")));
        if self.model.objects.contains_key(&new) {
            assert!(result.is_err());
        } else if self.allow(result).is_some() {
            let thing = self.model.objects.remove(&old).expect("it was found");
            self.model.objects.insert(new.clone(), thing);
            let snapshots = std::mem::take(&mut self.model.snapshots);
            self.model.snapshots = snapshots
                .into_iter()
                .map(|((object, snapshot), thing)| {
                    let object = if object == old { new.clone() } else { object };
                    ((object, snapshot), thing)
                })
                .collect();
        }
        false
    }

    /// Opens the pool again as it is, without what was not flushed being lost by the disk.
    fn reopen(&mut self) -> bool {
        let result = self.pool().flush();
        if self.allow(result).is_none() {
            return false;
        }
        self.pool = None;
        match Pool::open(Arc::new(self.disk.clone())) {
            Ok(pool) => self.pool = Some(pool),
            Err(error) => {
                assert!(self.has_faults, "{error}");
                self.disk.set_fault(None);
                self.pool =
                    Some(Pool::open(Arc::new(self.disk.clone())).expect("the fault is gone"));
            }
        }
        true
    }

    fn checkpoint(&mut self) -> bool {
        let result = self.pool().checkpoint();
        self.allow(result).is_some()
    }

    /// Everything that is frozen is what it was; what has no checksum gets one.
    fn scrub(&mut self) -> bool {
        let result = self.pool().scrub(|_| ());
        if let Some(report) = self.allow(result)
            && !self.has_faults
        {
            assert_eq!((report.lost, report.problems), (Vec::new(), Vec::new()));
            assert_eq!(report.repaired_copies, 0);
        }
        false
    }

    fn set_options(&mut self, step: Step) -> bool {
        let compression = [
            Compression::Off,
            Compression::Lz4,
            Compression::Zstd,
            Compression::Lz4,
        ];
        let options = DatasetOptions {
            checksum: step.a.is_multiple_of(2),
            compression: compression[step.b as usize % 4],
        };
        let result = self.pool().set_options(&name("d"), options);
        let _ = self.allow(result);
        false
    }

    /// Sends snapshots to another dataset of the pool, with a stream that is cut, one that goes on, and a difference where there is an
    /// older snapshot; compares, and removes them again.
    fn transfer(&mut self, step: Step) -> bool {
        let names = self.model.snapshots.keys();
        let Some((_, snapshot)) = names.clone().nth(step.a as usize % names.len().max(1)) else {
            return false;
        };
        let sent: BTreeMap<&str, Arc<Thing>> = self
            .model
            .snapshots
            .iter()
            .filter(|((_, name), _)| name == snapshot)
            .map(|((object, _), thing)| (object.as_str(), Arc::clone(thing)))
            .collect();
        let result = self.transfer_to(&format!("d@{snapshot}"), step, |pool| {
            for (object, thing) in &sent {
                for text in [format!("r/{object}"), format!("r/{object}@{snapshot}")] {
                    let bytes = read_thing(pool, &text)?;
                    assert!(bytes == thing.read(), "'{text}' is not what was sent");
                }
            }
            Ok(())
        });
        let _ = self.allow(result);
        // What a crash or a fault left is removed with the next transfer.
        let result = remove_transfers(self.pool());
        let _ = self.allow(result);
        false
    }

    fn transfer_to(
        &self,
        snapshot: &str,
        step: Step,
        compare: impl Fn(&Pool) -> Result<(), PoolError>,
    ) -> Result<(), PoolError> {
        let pool = self.pool();
        remove_transfers(pool)?;
        let target = name("r");
        let mut stream = Vec::new();
        pool.send(&name(snapshot), None, None, &mut stream, |_| ())?;
        if step.b.is_multiple_of(2) {
            let cut = step.c as usize % stream.len();
            let result = pool.receive(Some(&target), false, &mut &stream[..cut], |_| ());
            match result {
                Err(error) if matches!(error.reason(), PoolError::Stream { .. }) => {}
                Err(error) => return Err(error),
                Ok(_) => panic!("a stream without its end was received"),
            }
            let partial = pool.partial_receives()?;
            let token = partial.first().map(|partial| partial.token.as_str());
            stream.clear();
            let sent = pool.send(&name(snapshot), None, token, &mut stream, |_| ())?;
            assert_eq!(sent.stale_token, None);
        }
        pool.receive(Some(&target), false, &mut &stream[..], |_| ())?;
        compare(pool)?;
        TRANSFERS.fetch_add(1, Ordering::SeqCst);
        if !step.b.is_multiple_of(3) {
            return Ok(());
        }
        // What is sent back as a difference to itself changes nothing.
        let objects = pool.list(Some(&target))?.into_iter();
        for entry in objects.filter(|entry| entry.kind == blockpool::Kind::Object) {
            let object = pool.open_object(&name(&entry.name))?;
            let length = entry.size_bytes.min(5000);
            object.write_at(
                &vec![step.c as u8; length as usize],
                entry.size_bytes - length,
            )?;
            object.punch_hole(0, entry.size_bytes / 3)?;
        }
        pool.snapshot(&name("r@next"))?;
        let changed = pool.list(Some(&target))?;
        let from = snapshot.split_once('@').map(|(_, from)| from);
        stream.clear();
        pool.send(&name("r@next"), from, None, &mut stream, |_| ())?;
        let copy = name("r2");
        let mut first = Vec::new();
        pool.send(&name(snapshot), None, None, &mut first, |_| ())?;
        pool.receive(Some(&copy), false, &mut &first[..], |_| ())?;
        pool.receive(Some(&copy), false, &mut &stream[..], |_| ())?;
        for entry in changed.into_iter().filter(|entry| entry.name.contains('@')) {
            let other = entry.name.replacen("r/", "r2/", 1);
            let (here, there) = (read_thing(pool, &entry.name)?, read_thing(pool, &other)?);
            assert!(here == there, "'{other}' differs");
        }
        Ok(())
    }

    fn flush(&mut self) -> bool {
        let result = self.pool().flush();
        self.allow(result).is_some()
    }

    /// How many events there are to crash after.
    pub(crate) fn event_count(&self) -> usize {
        self.disk.events().len()
    }

    /// Opens what a crash after so many events left, and compares. Returns the pool for going on.
    pub(crate) fn verify_crash(
        &self,
        events: usize,
        choose: impl FnMut(usize) -> blockpool::CrashChoice,
    ) -> (SimulatedDisk, Pool) {
        let left = self.disk.after_crash(events, choose);
        let pool = match Pool::open(Arc::new(left.clone())) {
            Ok(pool) => pool,
            Err(error) => panic!("after a crash at event {events}: {error}"),
        };
        let end = self
            .moments
            .iter()
            .position(|moment| moment.events > events);
        let end = end.unwrap_or(self.moments.len() - 1);
        let begin = self.moments[..end.max(1)]
            .iter()
            .rposition(|moment| moment.is_flushed && moment.events <= events);
        let allowed: Vec<Model> = self.moments[begin.unwrap_or(0)..=end]
            .iter()
            .map(|moment| moment.model.clone())
            .collect();
        let listed = pool.list(Some(&name("d"))).expect("a list");
        let listing: BTreeMap<String, u64> = listed
            .into_iter()
            .filter(|entry| entry.name != "d")
            .map(|entry| (entry.name, entry.size_bytes))
            .collect();
        let fitting: Vec<&Model> = allowed
            .iter()
            .filter(|model| model.listing() == listing)
            .collect();
        assert!(
            !fitting.is_empty(),
            "after a crash at event {events} there are {listing:?}"
        );
        for (full, size_bytes) in &listing {
            let mut bytes = vec![0xee; *size_bytes as usize];
            let object = pool.open_object(&name(full)).expect("it is listed");
            object.read_at(&mut bytes, 0).expect("its own range");
            let is_right = fitting.iter().any(|model| {
                let (_, thing) = model
                    .things()
                    .find(|(name, _)| name == full)
                    .expect("the lists are equal");
                find_wrong(&bytes, thing.id, &allowed, SECTOR).is_none()
            });
            assert!(
                is_right,
                "'{full}' is wrong after a crash at event {events}"
            );
        }
        verify_transfers(&pool);
        verify_accounting(&pool);
        (left, pool)
    }

    /// Whether the pool refuses to go on, as it has to after a failed flush.
    pub(crate) fn is_stopped(&self) -> bool {
        let result = self.pool().flush();
        assert!(
            matches!(result, Ok(()) | Err(PoolError::Stopped { .. })),
            "{result:?}"
        );
        result.is_err()
    }

    pub(crate) fn set_fault(&mut self, fault: Option<Fault>) {
        self.has_faults |= fault.is_some();
        self.disk.set_fault(fault);
    }
}

/// What an object or snapshot holds.
fn read_thing(pool: &Pool, text: &str) -> Result<Vec<u8>, PoolError> {
    let object = pool.open_object(&name(text))?;
    let mut bytes = vec![0xee; object.size_bytes()? as usize];
    object.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Removes what transfers left.
fn remove_transfers(pool: &Pool) -> Result<(), PoolError> {
    for entry in pool.list(None)? {
        let is_left = entry.kind == blockpool::Kind::Dataset && entry.name != "d";
        if is_left {
            pool.destroy(&name(&entry.name), true)?;
        }
    }
    Ok(())
}

/// A transfer that a crash ended is whole, or is not there: each object has its snapshot and is what that is.
fn verify_transfers(pool: &Pool) {
    let Ok(listed) = pool.list(Some(&name("r"))) else {
        return;
    };
    for entry in listed.into_iter().filter(|entry| entry.name.contains('/')) {
        let object = pool.open_object(&name(&entry.name)).expect("it is listed");
        let mut bytes = vec![0; entry.size_bytes as usize];
        object.read_at(&mut bytes, 0).expect("it is whole");
    }
}

/// Nothing is lost, nothing is free and in use, and the space adds up.
pub(crate) fn verify_accounting(pool: &Pool) {
    let report = pool.check().expect("the pool runs");
    assert_eq!(report.problems, Vec::<String>::new());
    let space = pool.space();
    let sum = space.reserved_bytes
        + space.data_bytes
        + space.metadata_bytes
        + space.freeing_bytes
        + space.free_bytes;
    assert_eq!(sum, space.size_bytes);
}
