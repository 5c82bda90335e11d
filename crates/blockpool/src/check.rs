//! The full recount: walks everything that is reachable and compares it with what the pool says is used and shared.

use std::collections::{HashMap, HashSet};

use crate::allocator::Allocator;
use crate::error::{PoolError, Result};
use crate::layout::{Extent, PagePointer, TREE_COUNT, Tree, TreeName};
use crate::metadata::{Metadata, leaf_kind};
use crate::page::{Page, PageKind};
use crate::pool::Pool;
use crate::references::References;

/// Problems that are told one by one; more are counted.
const PROBLEMS_MAX: usize = 1000;

const TREE_NAMES: [TreeName; TREE_COUNT] = [
    TreeName::Entries,
    TreeName::Space,
    TreeName::RecordReferences,
    TreeName::PageReferences,
    TreeName::Sums,
];

/// What a recount found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Pages that are reachable, each counted once.
    pub page_count: u64,
    /// Records and extents of compressed ones that are reachable, each counted once.
    pub record_count: u64,
    /// Those with more than one reference.
    pub shared_record_count: u64,
    /// What is wrong, one line each; the first thousand.
    pub problems: Vec<String>,
    /// How many things are wrong.
    pub problem_count: u64,
}

impl CheckReport {
    fn add(&mut self, problem: String) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }
}

/// References that were found.
#[derive(Default)]
struct Count {
    pages: HashMap<u64, (PagePointer, u32)>,
    extents: HashMap<Extent, u32>,
    report: CheckReport,
}

impl Pool {
    /// Counts all references anew and compares. Others wait meanwhile.
    ///
    /// # Errors
    ///
    /// The pool stopped. What is wrong in the pool is in the report.
    pub fn check(&self) -> Result<CheckReport> {
        let mut state = self.inner.state();
        state.check_running()?;
        let metadata = &mut state.metadata;
        let mut count = metadata.count(&TREE_NAMES);
        metadata.compare(&mut count);
        Ok(count.report)
    }
}

impl Metadata {
    fn count(&mut self, trees: &[TreeName]) -> Count {
        let mut count = Count::default();
        for name in trees {
            let tree = self.trees[*name as usize];
            self.count_tree(&mut count, tree, leaf_kind(*name), &format!("its {name:?}"));
        }
        let maps: Vec<(String, Tree)> = self
            .catalog
            .iter()
            .map(|entry| (format!("'{}'", self.catalog.full_name(entry)), entry.map))
            .collect();
        for (name, map) in maps {
            self.count_tree(&mut count, map, PageKind::Map, &name);
        }
        count.report.page_count = count.pages.len() as u64;
        count.report.record_count = count.extents.len() as u64;
        let shared = count.extents.values().filter(|references| **references > 1);
        count.report.shared_record_count = shared.count() as u64;
        count
    }

    fn count_tree(&mut self, count: &mut Count, tree: Tree, kind: PageKind, owner: &str) {
        let mut waiting = vec![(tree.root, tree.height)];
        while let Some((pointer, level)) = waiting.pop() {
            if pointer.is_null() {
                continue;
            }
            let known = count.pages.entry(pointer.address).or_insert((pointer, 0));
            known.1 += 1;
            if known.0.second != pointer.second {
                let address = pointer.address;
                count.report.add(format!(
                    "the second copy of the page at block {address} is in two places"
                ));
            }
            if known.1 > 1 {
                continue;
            }
            let page = match self.page(pointer, kind, level) {
                Ok(page) => page,
                Err(error) => {
                    count.report.add(format!("{owner}: {error}"));
                    continue;
                }
            };
            match &*page {
                Page::Inner { children, .. } => {
                    waiting.extend(children.iter().map(|child| (*child, level - 1)));
                }
                Page::Map(slots) => {
                    for extent in slots.iter().flat_map(|slot| slot.extents()) {
                        *count.extents.entry(extent).or_insert(0) += 1;
                    }
                }
                Page::Raw { .. } => {}
            }
        }
    }

    fn compare(&self, count: &mut Count) {
        let mut used_blocks = 0;
        for (extent, references) in &count.extents {
            used_blocks += extent.block_count;
            if !self.allocator.is_used_extent(*extent) {
                count
                    .report
                    .add(format!("{extent} is in use and called free"));
            }
            let extra = self.extra_references(*extent);
            if extra != references - 1 {
                count.report.add(format!(
                    "{extent} has {references} references, not {}",
                    u64::from(extra) + 1
                ));
            }
        }
        for (address, (pointer, references)) in &count.pages {
            for block in [*address, pointer.second]
                .into_iter()
                .filter(|block| *block != 0)
            {
                used_blocks += 1;
                if !self.allocator.contains_block(block) || !self.allocator.is_used(block) {
                    count.report.add(format!(
                        "the page at block {block} is in use and called free"
                    ));
                }
            }
            let extra = self.pages.extra(*address);
            if extra != references - 1 {
                count.report.add(format!(
                    "the page at block {address} has {references} references, not {}",
                    u64::from(extra) + 1
                ));
            }
        }
        self.compare_rest(count, used_blocks);
    }

    /// What is counted and not reachable.
    fn compare_rest(&self, count: &mut Count, used_blocks: u64) {
        for (record, _) in self.records.iter() {
            if !count.extents.contains_key(&Extent::of_record(record)) {
                count.report.add(format!(
                    "record {record} has references and nothing names it"
                ));
            }
        }
        let parts = count.extents.keys().filter(|extent| !extent.is_record());
        let parts: HashSet<u64> = parts.map(|extent| extent.first_block).collect();
        for (address, _) in self.pages.iter() {
            if !count.pages.contains_key(&address) && !parts.contains(&address) {
                count.report.add(format!(
                    "the page or extent at block {address} has references and nothing names it"
                ));
            }
        }
        let called_used = self.allocator.used_blocks();
        if called_used > used_blocks {
            count.report.add(format!(
                "{} blocks are called used and nothing names them",
                called_used - used_blocks
            ));
        }
        let extents = count.extents.keys();
        let data_blocks: u64 = extents.map(|extent| extent.block_count).sum();
        if self.allocator.data_blocks() != data_blocks {
            count.report.add(format!(
                "{data_blocks} blocks have data, not {}",
                self.allocator.data_blocks()
            ));
        }
        if self.has_wrong_counts {
            count.report.add(
                "something was freed that was free, or dropped without being readable".to_owned(),
            );
        }
    }

    /// Makes what is used and shared what the maps say.
    pub(crate) fn recount(&mut self) -> Result<()> {
        let first_block = self.allocator.first_block();
        for name in [
            TreeName::Space,
            TreeName::RecordReferences,
            TreeName::PageReferences,
        ] {
            self.trees[name as usize] = Tree::default();
        }
        let count = self.count(&[TreeName::Entries, TreeName::Sums]);
        self.allocator = Allocator::new(first_block, self.size_blocks);
        self.records = References::default();
        self.pages = References::default();
        for (extent, references) in &count.extents {
            if !self.allocator.contains_record(extent.record()) {
                return Err(PoolError::Damaged {
                    what: format!("a map names {extent}, which the pool has not"),
                });
            }
            if self.allocator.is_used_partly(*extent) {
                return Err(PoolError::Damaged {
                    what: format!("{extent} has a part of something else"),
                });
            }
            self.allocator.take(*extent);
            let (counts, number) = self.counts_of(*extent);
            counts.set(number, references - 1)?;
        }
        for (address, (pointer, references)) in &count.pages {
            for block in [*address, pointer.second]
                .into_iter()
                .filter(|block| *block != 0)
            {
                if !self.allocator.contains_block(block) || self.allocator.is_used(block) {
                    return Err(PoolError::Damaged {
                        what: format!("block {block} has a page and something else"),
                    });
                }
                self.allocator.take_named_page(block);
            }
            self.pages.set(*address, references - 1)?;
        }
        self.allocator.set_dirty();
        self.has_wrong_counts = false;
        Ok(())
    }
}
