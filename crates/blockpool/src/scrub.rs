//! Reads everything that has a checksum, repairs what a second copy allows, and tells what is lost.

use std::collections::HashSet;

use crate::error::{PoolError, Result};
use crate::layout::{
    BLOCK, BLOCK_BYTES, PagePointer, RECORD_BYTES, Superblock, TREE_COUNT, Tree, TreeName,
};
use crate::metadata::{Metadata, leaf_kind, span};
use crate::page::{Page, PageKind, SLOTS};
use crate::pool::{Pool, lock};

/// A range of an object that cannot be read any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The object or snapshot.
    pub name: String,
    /// Where it begins.
    pub offset_bytes: u64,
    /// How long it is, up to the end of the object.
    pub length_bytes: u64,
    /// Why.
    pub reason: String,
}

/// What a scrub found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Pages that were read, each copy counted.
    pub page_copies: u64,
    /// Blocks of data that were read: those that are not written in place any more.
    pub data_blocks: u64,
    /// Those of them that had no checksum and have one now.
    pub new_sums: u64,
    /// Copies that were damaged and are whole again.
    pub repaired_copies: u64,
    /// What is lost.
    pub lost: Vec<Lost>,
    /// Damage outside of objects, one line each.
    pub problems: Vec<String>,
}

/// What is known while a scrub runs.
#[derive(Default)]
struct Progress {
    seen: HashSet<u64>,
    report: ScrubReport,
    /// Level and first leaf of pages of sums that are lost.
    lost_sums: Vec<(u8, u64)>,
}

impl Pool {
    /// Reads both copies of every superblock and page, and all data that is not written in place any more. `tell` gets the number of
    /// blocks read until now.
    ///
    /// Shared data that has no checksum yet gets one, of what it is now.
    ///
    /// # Errors
    ///
    /// The pool stopped, or cannot write a repaired page. What is damaged is in the report.
    pub fn scrub(&self, mut tell: impl FnMut(u64)) -> Result<ScrubReport> {
        // What is only in memory has no copies yet.
        self.checkpoint()?;
        let mut progress = Progress::default();
        self.scrub_superblocks(&mut progress.report)?;
        let (trees, maps) = {
            let state = self.inner.state();
            let metadata = &state.metadata;
            let maps: Vec<u64> = metadata.catalog.iter().map(|entry| entry.id).collect();
            (metadata.trees, maps)
        };
        self.scrub_trees(trees, &mut progress)?;
        for id in maps {
            let mut state = self.inner.state();
            state.check_running()?;
            let metadata = &mut state.metadata;
            let Some(entry) = metadata.catalog.get(id) else {
                continue;
            };
            let owner = (metadata.catalog.full_name(entry), entry.size_bytes);
            let map = entry.map;
            metadata.scrub_below(
                map.root,
                PageKind::Map,
                (map.height, 0),
                Some(&owner),
                &mut progress,
            )?;
            drop(state);
            tell(progress.report.page_copies);
        }
        let mut report = progress.report;
        self.scrub_data(&mut report, tell)?;
        if report.new_sums > 0 {
            self.checkpoint()?;
        }
        Ok(report)
    }

    /// Makes damaged copies of the last two superblocks whole.
    fn scrub_superblocks(&self, report: &mut ScrubReport) -> Result<()> {
        let position = lock(&self.inner.log);
        for txg in [position.txg, position.txg + 1] {
            let mut good = None;
            let mut bad = Vec::new();
            for offset_bytes in Superblock::offsets_bytes(txg) {
                let mut bytes = vec![0; BLOCK];
                report.page_copies += 1;
                let read = self.inner.disk.read_at(&mut bytes, offset_bytes);
                // The other superblock of a new pool was never written.
                let is_empty = read.is_ok() && bytes.iter().all(|byte| *byte == 0);
                if read.is_ok() && Superblock::decode(&bytes).is_ok() {
                    good = Some(bytes);
                } else if !is_empty || txg == position.txg {
                    bad.push(offset_bytes);
                }
            }
            match good {
                Some(bytes) => {
                    for offset_bytes in bad {
                        self.inner
                            .disk
                            .write_at(&bytes, offset_bytes)
                            .map_err(PoolError::io("repair a superblock"))?;
                        report.repaired_copies += 1;
                    }
                }
                None if bad.is_empty() => {}
                None => report.problems.push(format!(
                    "both copies of the superblock in blocks {} and {} are damaged; the next checkpoint but one writes them",
                    bad[0] / BLOCK_BYTES,
                    bad[1] / BLOCK_BYTES
                )),
            }
        }
        Ok(())
    }

    fn scrub_trees(&self, trees: [Tree; TREE_COUNT], progress: &mut Progress) -> Result<()> {
        let names = [
            TreeName::Entries,
            TreeName::Space,
            TreeName::RecordReferences,
            TreeName::PageReferences,
            TreeName::Sums,
        ];
        let mut state = self.inner.state();
        for name in names {
            let tree = trees[name as usize];
            let kind = leaf_kind(name);
            state
                .metadata
                .scrub_below(tree.root, kind, (tree.height, 0), None, progress)?;
        }
        for (level, leaf) in std::mem::take(&mut progress.lost_sums) {
            // The data is there; it is read without being verified this time, and gets new sums.
            if level > 0 {
                state.metadata.drop_sums_tree();
                break;
            }
            state.metadata.set_leaf(TreeName::Sums, leaf, None)?;
        }
        Ok(())
    }
}

impl Metadata {
    /// Looks at a page and at all below it. `owner` is the object's name and size.
    fn scrub_below(
        &mut self,
        pointer: PagePointer,
        kind: PageKind,
        (level, first_leaf): (u8, u64),
        owner: Option<&(String, u64)>,
        progress: &mut Progress,
    ) -> Result<()> {
        // What is dirty is not on the disk; what was seen is only looked at again to name everything that is lost.
        if pointer.is_null() || self.dirty.contains_key(&pointer.address) {
            return Ok(());
        }
        if !progress.seen.insert(pointer.address) && progress.report.lost.is_empty() {
            return Ok(());
        }
        let page = match self.scrub_page(pointer, kind, level, &mut progress.report)? {
            Ok(page) => page,
            Err(error) => {
                note_loss(&mut progress.report, owner, (level, first_leaf), &error);
                if kind == PageKind::Sums {
                    progress.lost_sums.push((level, first_leaf));
                }
                return Ok(());
            }
        };
        if let Page::Inner { children, .. } = page {
            for (index, child) in children.iter().enumerate() {
                let first_leaf = first_leaf + index as u64 * span(level - 1);
                self.scrub_below(*child, kind, (level - 1, first_leaf), owner, progress)?;
            }
        }
        Ok(())
    }

    /// Reads both copies of a page and makes both whole if one is. The inner error is for a page that is lost.
    fn scrub_page(
        &mut self,
        pointer: PagePointer,
        kind: PageKind,
        level: u8,
        report: &mut ScrubReport,
    ) -> Result<std::result::Result<Page, PoolError>> {
        let mut good = None;
        let mut failure = None;
        let mut bad = Vec::new();
        for address in [pointer.address, pointer.second]
            .into_iter()
            .filter(|address| *address != 0)
        {
            report.page_copies += 1;
            match self.read_copy(pointer, address, kind, level) {
                Ok(page) => good = Some(page),
                Err(error) => {
                    failure = Some(error);
                    bad.push(address);
                }
            }
        }
        let Some(page) = good else {
            return Ok(Err(failure.unwrap_or_else(|| PoolError::Damaged {
                what: "a page has no address".to_owned(),
            })));
        };
        let bytes = page.encode(pointer, &self.pool_id);
        for address in bad
            .into_iter()
            .filter(|address| self.allocator.contains_block(*address))
        {
            self.disk
                .write_at(&bytes, address * BLOCK_BYTES)
                .map_err(PoolError::io("repair a page of metadata"))?;
            report.repaired_copies += 1;
        }
        Ok(Ok(page))
    }
}

fn note_loss(
    report: &mut ScrubReport,
    owner: Option<&(String, u64)>,
    (level, first_leaf): (u8, u64),
    error: &PoolError,
) {
    let Some((name, size_bytes)) = owner else {
        report.problems.push(error.to_string());
        return;
    };
    let leaf_bytes = SLOTS as u64 * RECORD_BYTES;
    let offset_bytes = first_leaf * leaf_bytes;
    report.lost.push(Lost {
        name: name.clone(),
        offset_bytes,
        length_bytes: (span(level) * leaf_bytes).min(size_bytes.saturating_sub(offset_bytes)),
        reason: error.to_string(),
    });
}
