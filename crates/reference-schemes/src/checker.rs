//! Tries all that can be done with a store, shortest first, beside a model that knows what each file has to hold.
//!
//! Files are taken in order, so that two ways which differ in names alone are one; a state that was reached before is not
//! looked at again. The first failure is thus a shortest one.

use std::collections::HashSet;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::scheme::{Pointer, Scheme};
use crate::store::{InPlace, Step, Store, letter};

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// Freed while referenced: whoever is given the block next writes over it.
    FreedInUse {
        /// Whose pointer leads to what is free.
        file: usize,
        /// The block.
        address: u64,
    },
    /// No pointer leads to it, and it is not free: leaked.
    Leaked {
        /// The block.
        address: u64,
    },
    /// Something else than what was written is read.
    Changed {
        /// In which file.
        file: usize,
        /// What it reads.
        found: Option<u8>,
    },
    /// A count is not the number of pointers. It does no harm yet.
    Miscounted {
        /// The block.
        address: u64,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FreedInUse { file, address } => {
                write!(f, "block {address} is free, and {} has it", letter(*file))
            }
            Self::Leaked { address } => {
                write!(f, "block {address} is nobody's, and is never freed")
            }
            Self::Changed { file, found } => {
                write!(
                    f,
                    "{} reads {found:?}, which nobody wrote to it",
                    letter(*file)
                )
            }
            Self::Miscounted { address } => {
                write!(
                    f,
                    "the count of block {address} is not the number of its pointers"
                )
            }
        }
    }
}

/// What is tried.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Files and snapshots that there are at once.
    pub file_count: usize,
    /// Blocks of each.
    pub block_count: usize,
    /// What a block may hold: 1 up to this.
    pub value_count: u8,
    /// Steps one after the other.
    pub step_count: usize,
}

/// What a file has to hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Truth {
    /// Tells a file from one that had its number before.
    generation: u64,
    blocks: Vec<Option<u8>>,
    is_snapshot: bool,
}

/// A store and what is true of it.
#[derive(Debug, Clone)]
pub struct World<S: Scheme> {
    store: Store<S>,
    now: Vec<Option<Truth>>,
    durable: Vec<Option<Truth>>,
    /// Written since the last flush: a crash may leave it. Generation, block, value.
    unflushed: Vec<(u64, usize, u8)>,
    generation: u64,
    limits: Limits,
    is_exact: bool,
}

impl<S: Scheme> World<S> {
    /// Nothing is there yet. With `is_exact` counts have to be right, not only what follows from them.
    pub fn new(scheme: S, in_place: InPlace, limits: Limits, is_exact: bool) -> Self {
        Self {
            store: Store::new(scheme, limits.file_count, in_place),
            now: vec![None; limits.file_count],
            durable: vec![None; limits.file_count],
            unflushed: Vec::new(),
            generation: 0,
            limits,
            is_exact,
        }
    }

    /// What can be done now. A file that is made is the first one that is not there.
    pub fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let is_there = |file: usize| self.now[file].is_some();
        let files = 0..self.limits.file_count;
        let target = files.clone().find(|file| !is_there(*file));
        for file in files.clone().filter(|file| is_there(*file)) {
            steps.push(Step::Free { file });
            if let Some(target) = target {
                let source = file;
                steps.push(Step::Clone { source, target });
                steps.push(Step::Snapshot { source, target });
            }
        }
        for file in files {
            let truth = self.now[file].as_ref();
            let is_writable = truth.map_or(target == Some(file), |truth| !truth.is_snapshot);
            let blocks = 0..self.limits.block_count;
            steps.extend(blocks.filter(|_| is_writable).flat_map(|block| {
                let values = 1..=self.limits.value_count;
                values.map(move |value| Step::Write { file, block, value })
            }));
        }
        steps.extend([Step::Flush, Step::Checkpoint, Step::Crash]);
        steps
    }

    /// Does a step to both, and compares them.
    ///
    /// # Errors
    ///
    /// What is wrong afterwards.
    pub fn step(&mut self, step: Step) -> Result<(), Problem> {
        self.store.step(step);
        match step {
            Step::Write { file, block, value } => self.note_write(file, block, value),
            Step::Clone { source, target } | Step::Snapshot { source, target } => {
                self.generation += 1;
                self.now[target] = self.now[source].clone().map(|truth| Truth {
                    generation: self.generation,
                    is_snapshot: matches!(step, Step::Snapshot { .. }),
                    ..truth
                });
            }
            Step::Free { file } => self.now[file] = None,
            Step::Flush | Step::Checkpoint => {
                self.durable.clone_from(&self.now);
                self.unflushed.clear();
            }
            Step::Crash => self.settle()?,
        }
        self.check()
    }

    fn note_write(&mut self, file: usize, block: usize, value: u8) {
        let truth = self.now[file].get_or_insert_with(|| {
            self.generation += 1;
            Truth {
                generation: self.generation,
                blocks: vec![None; self.limits.block_count],
                is_snapshot: false,
            }
        });
        truth.blocks[block] = Some(value);
        self.unflushed.push((truth.generation, block, value));
    }

    /// After a crash a block holds what was flushed, or what was written to that file since.
    fn settle(&mut self) -> Result<(), Problem> {
        self.now.clone_from(&self.durable);
        for (file, truth) in self.now.iter_mut().enumerate() {
            let Some(truth) = truth else { continue };
            for (block, value) in truth.blocks.iter_mut().enumerate() {
                let found = self.store.read(file, block);
                let is_possible = found == *value
                    || found.is_some_and(|found| {
                        self.unflushed.contains(&(truth.generation, block, found))
                    });
                if !is_possible {
                    return Err(Problem::Changed { file, found });
                }
                *value = found;
            }
        }
        self.durable.clone_from(&self.now);
        self.unflushed.clear();
        Ok(())
    }

    fn check(&self) -> Result<(), Problem> {
        let used = self.store.used();
        for (file, _, pointer) in self.store.pointers() {
            let address = pointer.address();
            if !used.contains(&address) {
                return Err(Problem::FreedInUse { file, address });
            }
        }
        for (file, truth) in self.now.iter().enumerate() {
            let blocks = truth
                .iter()
                .flat_map(|truth| truth.blocks.iter().enumerate());
            for (block, value) in blocks {
                let found = self.store.read(file, block);
                if found != *value {
                    return Err(Problem::Changed { file, found });
                }
            }
        }
        for address in used.iter().copied() {
            let mut pointers = self
                .store
                .pointers()
                .filter(|(_, _, pointer)| pointer.address() == address);
            let Some((_, _, pointer)) = pointers.next() else {
                return Err(Problem::Leaked { address });
            };
            let pointer_count = 1 + pointers.count() as u64;
            if self.is_exact && self.store.scheme().count(pointer) != pointer_count {
                return Err(Problem::Miscounted { address });
            }
        }
        Ok(())
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.store.hash(&mut hasher);
        (&self.now, &self.durable, &self.unflushed).hash(&mut hasher);
        hasher.finish()
    }

    /// Who has which block, with which count.
    pub fn show(&self) -> String {
        let mut shown = Vec::new();
        for (file, _, pointer) in self.store.pointers() {
            let count = self.store.scheme().count(pointer);
            shown.push(format!(
                "{}: block {}, count {count}",
                letter(file),
                pointer.address()
            ));
        }
        shown.join("; ")
    }
}

/// A shortest way to something wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CounterExample {
    /// What was done.
    pub steps: Vec<Step>,
    /// What is wrong after the last step.
    pub problem: Problem,
}

impl CounterExample {
    /// The steps with what was true after each, a line each.
    pub fn explain<S: Scheme>(&self, mut world: World<S>) -> String {
        let mut lines = Vec::new();
        for (number, step) in self.steps.iter().enumerate() {
            let _ = world.step(*step);
            lines.push(format!(
                "{}. {:<18} {}",
                number + 1,
                step.to_string(),
                world.show()
            ));
        }
        lines.push(format!("=> {}", self.problem));
        lines.join("\n")
    }
}

/// How much was tried without anything wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tried {
    /// Different states.
    pub state_count: u64,
    /// Steps from each of them.
    pub step_count: u64,
}

/// Tries all ways of up to `limits.step_count` steps.
///
/// # Errors
///
/// A shortest one that goes wrong.
pub fn search<S: Scheme>(start: &World<S>) -> Result<Tried, CounterExample> {
    let mut seen = HashSet::from([start.fingerprint()]);
    // Ways, not worlds: a world is quickly made again, and there are many.
    let mut ways: Vec<Vec<Step>> = vec![Vec::new()];
    let mut tried = Tried {
        state_count: 1,
        step_count: 0,
    };
    for _ in 0..start.limits.step_count {
        let mut longer = Vec::new();
        for way in ways {
            let mut world = start.clone();
            let failed = |problem| CounterExample {
                steps: way.clone(),
                problem,
            };
            way.iter()
                .try_for_each(|step| world.step(*step))
                .map_err(failed)?;
            for step in world.steps() {
                let mut next = world.clone();
                let result = next.step(step);
                let steps = [&way[..], &[step]].concat();
                if let Err(problem) = result {
                    return Err(CounterExample { steps, problem });
                }
                tried.step_count += 1;
                if seen.insert(next.fingerprint()) {
                    tried.state_count += 1;
                    longer.push(steps);
                }
            }
        }
        ways = longer;
    }
    Ok(tried)
}
