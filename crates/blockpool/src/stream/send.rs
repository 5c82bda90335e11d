//! Sends snapshots: decides what of them the receiver has, and reads the rest.

use std::io::Write;

use super::difference::{Change, Known};
use super::frame::{Frame, Output, Place, REFERENCE_MAX_RECORDS, Start};
use super::{Position, token};
use crate::catalog::{Entry, EntryKind, ObjectId, Origin};
use crate::error::{PoolError, Result};
use crate::layout::{BLOCK, BLOCK_BYTES, RECORD_BLOCKS, RECORD_BYTES, Tree};
use crate::metadata::Metadata;
use crate::name::Name;
use crate::object::Object;
use crate::page::SLOTS;
use crate::pool::Pool;

/// What was sent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sent {
    /// Objects in the stream.
    pub objects: u64,
    /// Bytes of data in it.
    pub data_bytes: u64,
    /// All bytes of it.
    pub stream_bytes: u64,
    /// Why the token was not used and the stream began at its beginning.
    pub stale_token: Option<String>,
}

/// A snapshot that is sent, or one that the receiver has.
#[derive(Debug, Clone)]
struct Source {
    id: u64,
    object: u64,
    name: String,
    size_bytes: u64,
    unix_s: i64,
    origin: Origin,
}

/// What a stream is made of.
struct Plan {
    stream_id: u64,
    dataset: String,
    options: u8,
    bases: Vec<Source>,
    objects: Vec<Source>,
}

impl Plan {
    fn source(&self, place: Place) -> &Source {
        match place {
            Place::Base(number) => &self.bases[number as usize],
            Place::Object(number) => &self.objects[number as usize],
        }
    }
}

/// FNV-1a, 64 bits.
fn stream_id(pool_id: &[u8; 16], plan: (&[Source], &[Source])) -> u64 {
    let numbers = |sources: &[Source]| -> Vec<u8> {
        let ids = sources.iter().flat_map(|source| source.id.to_le_bytes());
        ids.collect()
    };
    let mut bytes = pool_id.to_vec();
    bytes.extend(numbers(plan.1));
    bytes.extend([0; 8]);
    bytes.extend(numbers(plan.0));
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl Metadata {
    pub(crate) fn origin_of(&self, entry: &Entry) -> Origin {
        if entry.origin == Origin::default() {
            return Origin {
                pool_id: self.pool_id,
                id: entry.id,
            };
        }
        entry.origin
    }

    fn source(&self, object: u64, id: u64) -> Result<Source> {
        let (snapshot, parent) = (self.entry(id)?, self.entry(object)?);
        Ok(Source {
            id,
            object,
            name: parent.name.clone(),
            size_bytes: snapshot.size_bytes,
            unix_s: snapshot.created_unix_s,
            origin: self.origin_of(snapshot),
        })
    }

    fn send_plan(&self, name: &Name, from: Option<&str>) -> Result<Plan> {
        let sources = |name: &Name| -> Result<Vec<Source>> {
            let mut pairs = self.snapshots(name)?;
            // What was made first is what others were cloned from.
            pairs.sort_unstable();
            pairs
                .into_iter()
                .map(|(object, id)| self.source(object, id))
                .collect()
        };
        let objects = sources(name)?;
        let bases = match from {
            Some(from) => sources(&name.at_snapshot(from)?)?,
            None => Vec::new(),
        };
        for object in &objects {
            let base = bases.iter().find(|base| base.object == object.object);
            if base.is_some_and(|base| base.id >= object.id) {
                return Err(PoolError::Name {
                    name: name.to_string(),
                    reason: "it is not newer than the snapshot from which the difference is asked",
                });
            }
        }
        Ok(Plan {
            stream_id: stream_id(&self.pool_id, (&bases, &objects)),
            dataset: name.dataset().to_owned(),
            options: self.dataset(name)?.options,
            bases,
            objects,
        })
    }

    fn map_of_source(&self, source: &Source) -> Option<Tree> {
        let entry = self.entry(source.id).ok()?;
        (entry.kind == EntryKind::Snapshot).then_some(entry.map)
    }
}

/// Neighbours that are one frame.
#[derive(Debug, Clone, Copy)]
struct Run {
    first: u64,
    count: u64,
    place: Place,
    place_first: u64,
}

struct Sender<'a, 'b> {
    pool: &'a Pool,
    plan: &'a Plan,
    output: Output<'b>,
    known: Known,
    run: Option<Run>,
    data_blocks: u64,
    tell: &'a mut dyn FnMut(u64),
}

impl Pool {
    /// Sends a snapshot of an object, or of all objects of a dataset that have it; with `from`, only what changed since that snapshot,
    /// which the receiver has to have. `resume` is a token of a receive that failed; a stale one is told of and not used. `tell` gets the
    /// number of bytes written until now.
    ///
    /// # Errors
    ///
    /// A snapshot does not exist or is damaged, the token is none, or the output fails.
    pub fn send(
        &self,
        snapshot: &Name,
        from: Option<&str>,
        resume: Option<&str>,
        output: &mut dyn Write,
        mut tell: impl FnMut(u64),
    ) -> Result<Sent> {
        let resume = resume.map(token::decode).transpose()?;
        let plan = self.inner.state().metadata.send_plan(snapshot, from)?;
        let (position, stale_token) = match resume {
            None => ((0, 0), None),
            Some((id, position))
                if id == plan.stream_id && position.0 as usize <= plan.objects.len() =>
            {
                (position, None)
            }
            Some(_) => {
                let why = "the token is of other snapshots than these: the stream starts over";
                ((0, 0), Some(why.to_owned()))
            }
        };
        let mut sender = Sender {
            pool: self,
            plan: &plan,
            output: Output::begin(output, plan.stream_id)?,
            known: Known::default(),
            run: None,
            data_blocks: 0,
            tell: &mut tell,
        };
        sender.send(
            snapshot.snapshot().unwrap_or(""),
            from.unwrap_or(""),
            position,
        )?;
        Ok(Sent {
            objects: plan.objects.len() as u64,
            data_bytes: sender.data_blocks * BLOCK_BYTES,
            stream_bytes: sender.output.byte_count,
            stale_token,
        })
    }
}

impl Sender<'_, '_> {
    fn send(&mut self, snapshot: &str, from: &str, position: Position) -> Result<()> {
        let plan = self.plan;
        self.output.write(&Frame::Begin {
            position,
            object_count: plan.objects.len() as u32,
            base_count: plan.bases.len() as u32,
            dataset: plan.dataset.clone(),
            snapshot: snapshot.to_owned(),
            from: from.to_owned(),
            options: plan.options,
        })?;
        for (base, number) in plan.bases.iter().zip(0..) {
            self.output.write(&Frame::Base {
                origin: base.origin,
                name: base.name.clone(),
            })?;
            self.learn(Place::Base(number))?;
        }
        for number in 0..plan.objects.len() as u32 {
            self.send_object(number, position)?;
        }
        let data_blocks = self.data_blocks;
        self.output.write(&Frame::End { data_blocks })?;
        self.output.finish()
    }

    fn map(metadata: &Metadata, source: &Source) -> Result<Tree> {
        let map = metadata.map_of_source(source);
        map.ok_or_else(|| PoolError::NotFound {
            name: format!("{}, of which a snapshot is being sent", source.name),
        })
    }

    fn learn(&mut self, place: Place) -> Result<()> {
        let mut state = self.pool.inner.state();
        let map = Self::map(&state.metadata, self.plan.source(place))?;
        state.metadata.learn(map, place, &mut self.known)
    }

    /// What an object begins with: its own base, what is most like it, or nothing.
    fn start_of(&mut self, number: u32) -> Result<Start> {
        let object = &self.plan.objects[number as usize];
        let mut bases = self.plan.bases.iter().zip(0..);
        if let Some((_, base)) = bases.find(|(base, _)| base.object == object.object) {
            return Ok(Start::OwnBase(base));
        }
        let mut state = self.pool.inner.state();
        let map = Self::map(&state.metadata, object)?;
        Ok(match state.metadata.nearest(map, &self.known)? {
            None => Start::Zeros,
            Some(Place::Base(base)) => Start::OtherBase(base),
            Some(Place::Object(object)) => Start::Object(object),
        })
    }

    fn send_object(&mut self, number: u32, position: Position) -> Result<()> {
        let object = &self.plan.objects[number as usize];
        let start = self.start_of(number)?;
        self.output.write(&Frame::Object {
            start,
            size_bytes: object.size_bytes,
            unix_s: object.unix_s,
            origin: object.origin,
            name: object.name.clone(),
        })?;
        let place = match start {
            Start::Zeros => None,
            Start::OwnBase(base) | Start::OtherBase(base) => Some(Place::Base(base)),
            Start::Object(object) => Some(Place::Object(object)),
        };
        // What the receiver has already is looked at, not sent: later references may lead to it.
        let first_record = match number.cmp(&position.0) {
            std::cmp::Ordering::Less => u64::MAX,
            std::cmp::Ordering::Equal => position.1,
            std::cmp::Ordering::Greater => 0,
        };
        let mut from = 0;
        while let Some((leaf, changes)) = self.next_changes(number, place, from)? {
            from = leaf + 1;
            for change in changes {
                if change.record >= first_record {
                    self.send_change(object, change)?;
                }
            }
            (self.tell)(self.output.byte_count);
        }
        self.end_run()?;
        self.learn(Place::Object(number))?;
        self.output.write(&Frame::ObjectEnd)
    }

    fn next_changes(
        &mut self,
        number: u32,
        start: Option<Place>,
        from: u64,
    ) -> Result<Option<(u64, Vec<Change>)>> {
        let plan = self.plan;
        let here = Place::Object(number);
        let record_count = plan.source(here).size_bytes.div_ceil(RECORD_BYTES);
        let mut state = self.pool.inner.state();
        let metadata = &mut state.metadata;
        let map = Self::map(metadata, plan.source(here))?;
        let start = match start {
            Some(place) => Self::map(metadata, plan.source(place))?,
            None => Tree::default(),
        };
        let Some(leaf) = metadata
            .next_difference(map, start, from)?
            .filter(|leaf| *leaf < record_count.div_ceil(SLOTS as u64))
        else {
            return Ok(None);
        };
        let map_of = |metadata: &Metadata, place: Place| metadata.map_of_source(plan.source(place));
        let changes = metadata.leaf_changes(
            (map, start),
            leaf,
            here,
            record_count,
            &mut self.known,
            map_of,
        )?;
        Ok(Some((leaf, changes)))
    }

    fn send_change(&mut self, object: &Source, change: Change) -> Result<()> {
        if let Some((place, place_first)) = change.reference {
            match &mut self.run {
                Some(run)
                    if run.place == place
                        && run.count < REFERENCE_MAX_RECORDS
                        && run.first + run.count == change.record
                        && run.place_first + run.count == place_first =>
                {
                    run.count += 1;
                }
                _ => {
                    self.end_run()?;
                    self.run = Some(Run {
                        first: change.record,
                        count: 1,
                        place,
                        place_first,
                    });
                }
            }
            if change.holes == 0 && change.data == 0 {
                return Ok(());
            }
        }
        self.end_run()?;
        let mut block = 0;
        while block < RECORD_BLOCKS {
            let count = u64::from((change.holes >> block).trailing_ones());
            if count > 0 {
                self.output.write(&Frame::Hole {
                    first_block: change.record * RECORD_BLOCKS + block,
                    block_count: count,
                })?;
            }
            block += count + 1;
        }
        if change.data == 0 {
            return Ok(());
        }
        let blocks = self.read_blocks(object, change)?;
        self.data_blocks += u64::from(change.data.count_ones());
        self.output.write(&Frame::Data {
            record: change.record,
            map: change.data,
            blocks,
        })
    }

    fn read_blocks(&self, source: &Source, change: Change) -> Result<Vec<u8>> {
        let object = Object::new(self.pool, ObjectId(source.id).0);
        let mut blocks = vec![0; change.data.count_ones() as usize * BLOCK];
        let mut filled = 0;
        let mut block = 0;
        while block < RECORD_BLOCKS {
            let count = u64::from((change.data >> block).trailing_ones());
            let offset = change.record * RECORD_BYTES + block * BLOCK_BYTES;
            // The last block of an object may be there in part.
            if count == 0 {
                block += 1;
                continue;
            }
            let length = (count * BLOCK_BYTES).min(source.size_bytes.saturating_sub(offset));
            object.read_at(&mut blocks[filled..filled + length as usize], offset)?;
            filled += count as usize * BLOCK;
            block += count + 1;
        }
        Ok(blocks)
    }

    fn end_run(&mut self) -> Result<()> {
        let Some(run) = self.run.take() else {
            return Ok(());
        };
        self.output.write(&Frame::Reference {
            first: run.first,
            count: run.count,
            place: run.place,
            place_first: run.place_first,
        })
    }
}
