//! Files, snapshots, a log, checkpoints and crashes over any scheme: as little of a file system as a count can be wrong in.
//!
//! The steps are those of the pool. A write goes in place where the file has the block to itself, else to a new block. What is
//! done goes into a log; a flush makes the log durable, a checkpoint everything. A crash takes back what was not flushed:
//! the state is that of the checkpoint, and the log is done again, by the same code. What is on the disk is on the disk:
//! a write in place is not taken back.

use std::collections::BTreeSet;
use std::fmt;
use std::hash::{Hash, Hasher};

use crate::scheme::{Placed, Pointer, Scheme};

/// Something to do. Files have numbers, shown as letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Writes a block; the file is made if need be.
    Write {
        /// Which file.
        file: usize,
        /// Which of its blocks.
        block: usize,
        /// What it shall hold.
        value: u8,
    },
    /// Makes a file of another one, or of a snapshot.
    Clone {
        /// Of which.
        source: usize,
        /// The new one.
        target: usize,
    },
    /// Makes what nobody may write to.
    Snapshot {
        /// Of which.
        source: usize,
        /// The new one.
        target: usize,
    },
    /// Removes a file or a snapshot.
    Free {
        /// Which.
        file: usize,
    },
    /// What was done is not taken back any more.
    Flush,
    /// Everything goes to its place, and the log is empty.
    Checkpoint,
    /// The machine stops and starts again: replay.
    Crash,
}

/// The name of a file: A, B, C.
pub(crate) fn letter(file: usize) -> char {
    char::from(b'A' + (file % 26) as u8)
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Write { file, block, value } => {
                write!(f, "write {value} to {}[{block}]", letter(file))
            }
            Self::Clone { source, target } => {
                write!(f, "clone {} as {}", letter(source), letter(target))
            }
            Self::Snapshot { source, target } => {
                write!(f, "snapshot {} as {}", letter(source), letter(target))
            }
            Self::Free { file } => write!(f, "free {}", letter(file)),
            Self::Flush => f.write_str("flush"),
            Self::Checkpoint => f.write_str("checkpoint"),
            Self::Crash => f.write_str("crash, replay"),
        }
    }
}

/// When a block is written in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InPlace {
    /// When the pointer was made after the file was cloned for the last time. As the pool does: once shared, never again.
    SinceClone,
    /// When its count is one. Wrong after a crash, with any scheme: it brings back pointers that were dropped and not yet flushed.
    ByCount,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Slot<P> {
    pointer: P,
    /// Made since the last clone.
    is_own: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct File<P> {
    map: Vec<Option<Slot<P>>>,
    /// What it was cloned from.
    origin: Option<usize>,
    is_snapshot: bool,
}

/// What a checkpoint keeps.
#[derive(Debug, Clone)]
struct Metadata<S: Scheme> {
    scheme: S,
    files: Vec<Option<File<S::Pointer>>>,
    used: BTreeSet<u64>,
    /// Free with the next checkpoint, and not before: the log still names it.
    freed: BTreeSet<u64>,
}

/// What the log says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Entry<P> {
    Set {
        file: usize,
        block: usize,
        pointer: P,
    },
    Share {
        source: usize,
        target: usize,
        is_snapshot: bool,
    },
    Free {
        file: usize,
    },
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Store<S: Scheme> {
    now: Metadata<S>,
    checkpoint: Metadata<S>,
    flushed: Vec<Entry<S::Pointer>>,
    pending: Vec<Entry<S::Pointer>>,
    disk: Vec<u8>,
    in_place: InPlace,
}

impl<S: Scheme> Store<S> {
    /// Without files; there may be `file_count` of `block_count` blocks.
    pub fn new(scheme: S, file_count: usize, in_place: InPlace) -> Self {
        let now = Metadata {
            scheme,
            files: vec![None; file_count],
            used: BTreeSet::new(),
            freed: BTreeSet::new(),
        };
        Self {
            checkpoint: now.clone(),
            now,
            flushed: Vec::new(),
            pending: Vec::new(),
            disk: Vec::new(),
            in_place,
        }
    }

    /// Does a step that can be done: files that it names are there, and those that it makes are not.
    pub fn step(&mut self, step: Step) {
        match step {
            Step::Write { file, block, value } => self.write(file, block, value),
            Step::Clone { source, target } => self.commit(Entry::Share {
                source,
                target,
                is_snapshot: false,
            }),
            Step::Snapshot { source, target } => self.commit(Entry::Share {
                source,
                target,
                is_snapshot: true,
            }),
            Step::Free { file } => self.commit(Entry::Free { file }),
            Step::Flush => self.flushed.append(&mut self.pending),
            Step::Checkpoint => {
                self.now.freed.clear();
                self.checkpoint = self.now.clone();
                self.flushed.clear();
                self.pending.clear();
            }
            Step::Crash => {
                self.pending.clear();
                self.now = self.checkpoint.clone();
                for entry in self.flushed.clone() {
                    if let Entry::Set { pointer, .. } = &entry {
                        self.now.scheme.place_again(pointer);
                        self.now.used.insert(pointer.address());
                    }
                    self.now.apply(&entry);
                }
            }
        }
    }

    fn commit(&mut self, entry: Entry<S::Pointer>) {
        self.now.apply(&entry);
        self.pending.push(entry);
    }

    fn write(&mut self, file: usize, block: usize, value: u8) {
        let now = &mut self.now;
        let slot = now.files[file]
            .as_ref()
            .and_then(|file| file.map.get(block)?.as_ref());
        let is_alone = slot.is_some_and(|slot| match self.in_place {
            InPlace::SinceClone => slot.is_own,
            InPlace::ByCount => now.scheme.count(&slot.pointer) == 1,
        });
        if let Some(slot) = slot.filter(|_| is_alone && now.scheme.writes_in_place()) {
            self.disk[slot.pointer.address() as usize] = value;
            return;
        }
        let (used, freed) = (&mut now.used, &now.freed);
        let placed = now.scheme.place(&[value], &mut || {
            let address = (0..).find(|address| !used.contains(address) && !freed.contains(address));
            let address = address.unwrap_or(u64::MAX);
            used.insert(address);
            address
        });
        let pointer = match placed {
            Placed::Known(pointer) => pointer,
            Placed::New(pointer) => {
                let at = pointer.address() as usize;
                self.disk.resize(self.disk.len().max(at + 1), 0);
                self.disk[at] = value;
                pointer
            }
        };
        self.commit(Entry::Set {
            file,
            block,
            pointer,
        });
    }

    /// What a block holds; none where the file has none.
    pub fn read(&self, file: usize, block: usize) -> Option<u8> {
        let slot = self.now.files[file].as_ref()?.map.get(block)?.as_ref()?;
        self.disk.get(slot.pointer.address() as usize).copied()
    }

    /// Whether the file is there; whether it may be written.
    pub fn kind(&self, file: usize) -> Option<bool> {
        let file = self.now.files.get(file)?.as_ref()?;
        Some(!file.is_snapshot)
    }

    /// All pointers, with their files and places.
    pub fn pointers(&self) -> impl Iterator<Item = (usize, usize, &S::Pointer)> {
        let files = self.now.files.iter().enumerate();
        files.flat_map(|(number, file)| {
            let slots = file.iter().flat_map(|file| file.map.iter().enumerate());
            slots.filter_map(move |(block, slot)| Some((number, block, &slot.as_ref()?.pointer)))
        })
    }

    /// Blocks that are not free.
    pub fn used(&self) -> &BTreeSet<u64> {
        &self.now.used
    }

    /// The scheme.
    pub fn scheme(&self) -> &S {
        &self.now.scheme
    }
}

impl<S: Scheme> Hash for Store<S> {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        for state in [&self.now, &self.checkpoint] {
            (&state.files, &state.used, &state.freed).hash(hasher);
            state.scheme.facts().hash(hasher);
        }
        (&self.flushed, &self.pending, &self.disk).hash(hasher);
    }
}

impl<S: Scheme> Metadata<S> {
    /// What is done, and what is done again: there is no other code.
    fn apply(&mut self, entry: &Entry<S::Pointer>) {
        match entry {
            Entry::Set {
                file,
                block,
                pointer,
            } => {
                self.drop_slot(*file, *block);
                let file = self.files[*file].get_or_insert_with(|| File {
                    map: Vec::new(),
                    origin: None,
                    is_snapshot: false,
                });
                file.map.resize(file.map.len().max(block + 1), None);
                file.map[*block] = Some(Slot {
                    pointer: pointer.clone(),
                    is_own: true,
                });
            }
            Entry::Share {
                source,
                target,
                is_snapshot,
            } => self.share(*source, *target, *is_snapshot),
            Entry::Free { file } => {
                let blocks = self.files[*file].as_ref().map_or(0, |file| file.map.len());
                for block in 0..blocks {
                    self.drop_slot(*file, block);
                }
                self.files[*file] = None;
                for other in self.files.iter_mut().flatten() {
                    other.origin = other.origin.filter(|origin| origin != file);
                }
            }
        }
    }

    fn share(&mut self, source: usize, target: usize, is_snapshot: bool) {
        let Some(from) = &mut self.files[source] else {
            return;
        };
        let mut map = Vec::new();
        for slot in &mut from.map {
            map.push(slot.as_mut().map(|slot| {
                slot.is_own = false;
                let pointer = self.scheme.share(&mut slot.pointer);
                Slot {
                    pointer,
                    is_own: false,
                }
            }));
        }
        self.files[target] = Some(File {
            map,
            origin: Some(source),
            is_snapshot,
        });
    }

    fn drop_slot(&mut self, number: usize, block: usize) {
        let Some(file) = &mut self.files[number] else {
            return;
        };
        let origin = file.origin;
        let Some(slot) = file.map.get_mut(block).and_then(Option::take) else {
            return;
        };
        let files = self.files.iter_mut().enumerate();
        let relatives = files.filter_map(|(other, file)| {
            let file = file.as_mut()?;
            let is_relative =
                other != number && (origin == Some(other) || file.origin == Some(number));
            let slot = file.map.get_mut(block)?.as_mut()?;
            is_relative.then_some(&mut slot.pointer)
        });
        if self.scheme.drop_one(&slot.pointer, relatives.collect()) {
            self.used.remove(&slot.pointer.address());
            self.freed.insert(slot.pointer.address());
        }
    }
}
