//! What a pool has to hold: names and bytes, and for each sector what it may hold after a crash.

use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) const BLOCK: usize = 4096;
/// What a crash leaves whole.
pub(crate) const SECTOR: usize = 512;

pub(crate) type Content = Arc<[u8]>;

/// A block: what it holds now, and what else a crash may bring back.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) now: Content,
    pub(crate) before: Vec<Content>,
}

pub(crate) fn zeros() -> Content {
    static ZEROS: std::sync::OnceLock<Content> = std::sync::OnceLock::new();
    Arc::clone(ZEROS.get_or_init(|| vec![0; BLOCK].into()))
}

/// An object or snapshot; a block that is not there was zeros since the last flush.
#[derive(Debug, Clone, Default)]
pub(crate) struct Thing {
    pub(crate) id: u64,
    pub(crate) size_bytes: u64,
    pub(crate) blocks: BTreeMap<u64, Block>,
}

impl Thing {
    pub(crate) fn content(&self, block: u64) -> Content {
        self.blocks
            .get(&block)
            .map_or_else(zeros, |block| Arc::clone(&block.now))
    }

    pub(crate) fn set(&mut self, index: u64, content: Content) {
        let block = self.blocks.entry(index).or_insert_with(|| Block {
            now: zeros(),
            before: Vec::new(),
        });
        if block.now != content {
            let old = std::mem::replace(&mut block.now, content);
            block.before.push(old);
        }
    }

    pub(crate) fn write(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (index, at) = (offset / BLOCK as u64, offset as usize % BLOCK);
            let length = (BLOCK - at).min(bytes.len());
            let mut content = self.content(index).to_vec();
            content[at..at + length].copy_from_slice(&bytes[..length]);
            self.set(index, content.into());
            bytes = &bytes[length..];
            offset += length as u64;
        }
    }

    pub(crate) fn zero(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        let first = offset / BLOCK as u64;
        let indices: Vec<u64> = self
            .blocks
            .range(first..end.div_ceil(BLOCK as u64))
            .map(|(index, _)| *index)
            .collect();
        for index in indices {
            let begin = index * BLOCK as u64;
            let from = offset.saturating_sub(begin) as usize;
            let to = (end - begin).min(BLOCK as u64) as usize;
            let mut content = self.content(index).to_vec();
            content[from..to].fill(0);
            self.set(index, content.into());
        }
    }

    pub(crate) fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size_bytes as usize];
        for (index, block) in &self.blocks {
            let at = *index as usize * BLOCK;
            let end = (at + BLOCK).min(bytes.len());
            if at < end {
                bytes[at..end].copy_from_slice(&block.now[..end - at]);
            }
        }
        bytes
    }
}

/// The whole pool: objects of one dataset by name, snapshots by object and name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    pub(crate) objects: BTreeMap<String, Arc<Thing>>,
    pub(crate) snapshots: BTreeMap<(String, String), Arc<Thing>>,
}

impl Model {
    /// What is there, as the pool lists it: names and sizes.
    pub(crate) fn listing(&self) -> BTreeMap<String, u64> {
        let objects = self
            .objects
            .iter()
            .map(|(name, thing)| (format!("d/{name}"), thing.size_bytes));
        let snapshots = self
            .snapshots
            .iter()
            .map(|((name, snapshot), thing)| (format!("d/{name}@{snapshot}"), thing.size_bytes));
        objects.chain(snapshots).collect()
    }

    pub(crate) fn things(&self) -> impl Iterator<Item = (String, &Arc<Thing>)> {
        let objects = self
            .objects
            .iter()
            .map(|(name, thing)| (format!("d/{name}"), thing));
        let snapshots = self
            .snapshots
            .iter()
            .map(|((name, snapshot), thing)| (format!("d/{name}@{snapshot}"), thing));
        objects.chain(snapshots)
    }

    /// Everything is durable: only what is there now may be there after a crash.
    pub(crate) fn flushed(&mut self) {
        let things = self.objects.values_mut().chain(self.snapshots.values_mut());
        for thing in things {
            if thing.blocks.values().any(|block| !block.before.is_empty()) {
                for block in Arc::make_mut(thing).blocks.values_mut() {
                    block.before.clear();
                }
            }
        }
    }
}

/// Where `bytes` are not what may be left of a thing: each unit (a sector after a crash, a byte after a write that was cut short) what it
/// was in one of the models.
pub(crate) fn find_wrong(bytes: &[u8], id: u64, models: &[Model], unit: usize) -> Option<u64> {
    let versions: Vec<&Arc<Thing>> = models
        .iter()
        .flat_map(|model| model.objects.values().chain(model.snapshots.values()))
        .filter(|thing| thing.id == id)
        .collect();
    for (index, block) in bytes.chunks(BLOCK).enumerate() {
        let known: Vec<Content> = versions
            .iter()
            .flat_map(|thing| match thing.blocks.get(&(index as u64)) {
                Some(block) => [vec![Arc::clone(&block.now)], block.before.clone()].concat(),
                None => vec![zeros()],
            })
            .collect();
        for (number, sector) in block.chunks(unit).enumerate() {
            let at = number * unit;
            if !known
                .iter()
                .any(|content| content[at..at + sector.len()] == *sector)
            {
                return Some((index * BLOCK + at) as u64);
            }
        }
    }
    None
}
