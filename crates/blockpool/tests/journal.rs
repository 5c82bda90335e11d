//! A process that is killed: what it did and did not flush is there for the next one.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use blockpool::{FileDisk, Journal, Name, Pool, PoolError};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Step {
    Write {
        object: u8,
        at: u32,
        length: u16,
        byte: u8,
    },
    Punch {
        object: u8,
        at: u32,
        length: u32,
    },
    Resize {
        object: u8,
        size: u32,
    },
    Clone {
        source: u8,
        target: u8,
    },
    CloneRange {
        source: u8,
        target: u8,
        first: u8,
        to: u8,
        count: u8,
    },
    Rename {
        object: u8,
        target: u8,
    },
    Flush,
    Checkpoint,
    Kill,
}

const SIZE: u32 = 1 << 20;

fn step() -> impl Strategy<Value = Step> {
    let object = 0..4u8;
    prop_oneof![
        8 => (object.clone(), 0..SIZE, 1..20_000u16, 1u8..)
            .prop_map(|(object, at, length, byte)| Step::Write { object, at, length, byte }),
        1 => (object.clone(), 0..SIZE, 1..200_000u32)
            .prop_map(|(object, at, length)| Step::Punch { object, at, length }),
        1 => (object.clone(), 1..SIZE).prop_map(|(object, size)| Step::Resize { object, size }),
        2 => (object.clone(), object.clone())
            .prop_map(|(source, target)| Step::Clone { source, target }),
        2 => (object.clone(), object.clone(), 0..8u8, 8..16u8, 1..8u8).prop_map(
            |(source, target, first, to, count)| Step::CloneRange { source, target, first, to, count }
        ),
        1 => (object.clone(), object).prop_map(|(object, target)| Step::Rename { object, target }),
        2 => Just(Step::Flush),
        1 => Just(Step::Checkpoint),
        2 => Just(Step::Kill),
    ]
}

struct Subject {
    pool: Option<Pool>,
    journal: File,
    model: [Option<Vec<u8>>; 4],
}

fn name(object: u8) -> Name {
    format!("set/{object}").parse().unwrap()
}

impl Subject {
    fn open(&mut self, path: &Path) {
        let journal = Journal::new(self.journal.try_clone().unwrap());
        let disk = Arc::new(FileDisk::open(path).unwrap());
        self.pool = Some(Pool::open_with_journal(disk, Arc::new(journal)).unwrap());
    }

    fn pool(&self) -> &Pool {
        self.pool.as_ref().unwrap()
    }

    fn object(&mut self, object: u8) -> blockpool::Object {
        let model = &mut self.model[usize::from(object)];
        if model.is_none() {
            *model = Some(vec![0; SIZE as usize]);
            return self
                .pool()
                .create_object(&name(object), u64::from(SIZE))
                .unwrap();
        }
        self.pool().open_object(&name(object)).unwrap()
    }

    fn size(&self, object: u8) -> u64 {
        self.model[usize::from(object)].as_ref().unwrap().len() as u64
    }

    fn take(&mut self, step: &Step, path: &Path) {
        match *step {
            Step::Write {
                object,
                at,
                length,
                byte,
            } => {
                let opened = self.object(object);
                let at = u64::from(at).min(self.size(object));
                let length = u64::from(length).min(self.size(object) - at) as usize;
                opened.write_at(&vec![byte; length], at).unwrap();
                let model = self.model[usize::from(object)].as_mut().unwrap();
                model[at as usize..at as usize + length].fill(byte);
            }
            Step::Punch { object, at, length } => {
                let opened = self.object(object);
                let at = u64::from(at).min(self.size(object));
                let length = u64::from(length).min(self.size(object) - at);
                opened.punch_hole(at, length).unwrap();
                let model = self.model[usize::from(object)].as_mut().unwrap();
                model[at as usize..(at + length) as usize].fill(0);
            }
            Step::Resize { object, size } => {
                self.object(object).set_size(u64::from(size)).unwrap();
                self.model[usize::from(object)]
                    .as_mut()
                    .unwrap()
                    .resize(size as usize, 0);
            }
            Step::Clone { source, target } => {
                self.object(source);
                if source == target {
                    return;
                }
                if self.model[usize::from(target)].take().is_some() {
                    self.pool().destroy(&name(target), false).unwrap();
                }
                self.pool()
                    .clone_object(&name(source), &name(target))
                    .unwrap();
                self.model[usize::from(target)] = self.model[usize::from(source)].clone();
            }
            Step::CloneRange {
                source,
                target,
                first,
                to,
                count,
            } => {
                let (from, into) = (self.object(source), self.object(target));
                let [at, to, length] = [first, to, count].map(|count| u64::from(count) << 16);
                match self.pool().clone_range(&from, at, &into, to, length) {
                    Ok(()) => {}
                    Err(PoolError::OutOfRange { .. } | PoolError::Range { .. }) => return,
                    Err(error) => panic!("{error}"),
                }
                let bytes = self.model[usize::from(source)].as_ref().unwrap()
                    [at as usize..(at + length) as usize]
                    .to_vec();
                let model = self.model[usize::from(target)].as_mut().unwrap();
                model[to as usize..to as usize + bytes.len()].copy_from_slice(&bytes);
            }
            Step::Rename { object, target } => {
                self.object(object);
                if object == target {
                    return;
                }
                if self.model[usize::from(target)].is_some() {
                    let gone: Name = "gone/it".parse().unwrap();
                    self.pool()
                        .rename_over(&name(object), &name(target), &gone)
                        .unwrap();
                    self.pool().destroy(&gone, false).unwrap();
                } else {
                    self.pool()
                        .rename_object(&name(object), &name(target))
                        .unwrap();
                }
                self.model[usize::from(target)] = self.model[usize::from(object)].take();
            }
            Step::Flush => self.pool().flush().unwrap(),
            Step::Checkpoint => self.pool().checkpoint().unwrap(),
            Step::Kill => {
                self.pool = None;
                self.open(path);
            }
        }
    }

    fn check(&self) {
        for (index, model) in self.model.iter().enumerate() {
            let opened = self.pool().open_object(&name(index as u8));
            let Some(model) = model else {
                assert!(opened.is_err());
                continue;
            };
            let opened = opened.unwrap();
            assert_eq!(opened.size_bytes().unwrap(), model.len() as u64);
            let mut bytes = vec![0; model.len()];
            opened.read_at(&mut bytes, 0).unwrap();
            let differs = bytes
                .iter()
                .zip(model)
                .position(|(found, wanted)| found != wanted);
            assert_eq!(differs, None, "object {index}");
        }
        assert_eq!(self.pool().check().unwrap().problems, Vec::<String>::new());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_was_done_is_undone_when_the_process_is_killed(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pool");
        let size = 64 << 20;
        let pool = Pool::create(Arc::new(FileDisk::create(&path, size).unwrap()), size, [7; 16]);
        let pool = pool.unwrap();
        pool.create_dataset(&"set".parse().unwrap()).unwrap();
        pool.create_dataset(&"gone".parse().unwrap()).unwrap();
        pool.flush().unwrap();
        drop(pool);
        let mut subject = Subject {
            pool: None,
            journal: tempfile::tempfile().unwrap(),
            model: [const { None }; 4],
        };
        subject.open(&path);
        for step in &steps {
            subject.take(step, &path);
        }
        subject.take(&Step::Kill, &path);
        subject.check();
        subject.take(&Step::Kill, &path);
        subject.check();
    }
}
