//! Receives snapshots: into a dataset of its own first, and to their names all at once when everything is there.

use std::collections::HashSet;
use std::io::Read;

use super::frame::{Frame, Input, Place, Start, wrong};
use super::{Position, token};
use crate::catalog::{Entry, EntryKind, Origin};
use crate::error::{PoolError, Result};
use crate::layout::{BLOCK, BLOCK_BYTES, RECORD_BLOCKS, RECORD_BYTES, read_uint};
use crate::metadata::Metadata;
use crate::name::Name;
use crate::namespace::{DatasetOptions, Kind};
use crate::object::Object;
use crate::operation::Operation;
use crate::pool::{Pool, State};

const PREFIX: &str = "%receiving-";
const STATE: &str = "state";
const STATE_MAGIC: [u8; 4] = *b"BPRS";
/// How much of a stream may have to be sent again after a crash.
const SAVE_BYTES: u64 = 64 << 20;
/// Pages that giving names needs, and those that each object adds: its entries.
const NAMING_PAGES: (u64, u64) = (32, 8);

/// What was received.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Received {
    /// The dataset.
    pub dataset: String,
    /// The snapshot.
    pub snapshot: String,
    /// Objects that have it now.
    pub objects: u64,
    /// Bytes of data that the stream had.
    pub data_bytes: u64,
    /// All bytes of it.
    pub stream_bytes: u64,
    /// It began where an earlier receive had ended.
    pub is_resumed: bool,
    /// What an earlier receive had was dropped, as the stream begins at its beginning.
    pub is_started_over: bool,
}

/// A receive that did not come to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partial {
    /// The dataset that has what came; destroy it to give the receive up.
    pub dataset: String,
    /// With it, the sender goes on.
    pub token: String,
}

/// An object of the stream.
struct Incoming {
    name: String,
    size_bytes: u64,
    unix_s: i64,
    origin: Origin,
    /// Where it grows.
    object: Object,
    /// The object that gets the snapshot; none makes a new one.
    continues: Option<u64>,
    /// The base of that one.
    base: u64,
}

struct Receiver<'a> {
    pool: &'a Pool,
    stream_id: u64,
    /// Where things go in the end.
    target: Name,
    snapshot: String,
    temporary: Name,
    state: Object,
    sequence: u64,
    /// Where the stream begins.
    start: Position,
    position: Position,
    saved_bytes: u64,
    bases: Vec<u64>,
    objects: Vec<Incoming>,
    /// Ids of objects that are continued, and names of those that are new.
    taken: HashSet<(u64, String)>,
    object_count: u32,
    base_count: u32,
    is_in_object: bool,
    data_blocks: u64,
}

/// The dataset that is asked for, or the one that was sent.
fn target_of(dataset: Option<&Name>, sent: &str) -> Result<Name> {
    match dataset {
        Some(name) if name.object().is_none() && name.snapshot().is_none() => Ok(name.clone()),
        Some(name) => Err(PoolError::Name {
            name: name.to_string(),
            reason: "a stream is received into a dataset, whose name has no '/' and '@'",
        }),
        None => sent.parse(),
    }
}

fn child(dataset: &Name, object: &str) -> Result<Name> {
    format!("{dataset}/{object}").parse()
}

/// What the state object says: the sequence and the position.
fn load_state(state: &Object, stream_id: u64) -> Result<Option<(u64, Position)>> {
    let mut newest = None;
    for offset_bytes in [0, BLOCK_BYTES] {
        let mut bytes = [0; 40];
        state.read_at(&mut bytes, offset_bytes)?;
        let good = read_uint(&bytes[..4]) == u64::from(crc32c::crc32c(&bytes[4..]))
            && bytes[4..8] == STATE_MAGIC
            && read_uint(&bytes[8..16]) == stream_id;
        let position = (read_uint(&bytes[24..28]) as u32, read_uint(&bytes[32..40]));
        newest = newest.max(good.then(|| (read_uint(&bytes[16..24]), position)));
    }
    Ok(newest)
}

impl Pool {
    /// Receives what [`Self::send`] wrote, into `dataset` or one with the name that it had. Nothing but a dataset
    /// `%receiving-...` changes before all of it is there. With `force`, objects that changed since the base are rolled back to it. `tell`
    /// gets the number of bytes read until now.
    ///
    /// # Errors
    ///
    /// The stream is cut, changed, of another version, or builds on what is not here. Where it can go on, the error has the token.
    pub fn receive(
        &self,
        dataset: Option<&Name>,
        force: bool,
        input: &mut dyn Read,
        mut tell: impl FnMut(u64),
    ) -> Result<Received> {
        let mut input = Input::begin(input)?;
        let Frame::Begin {
            position,
            object_count,
            base_count,
            dataset: sent_dataset,
            snapshot,
            options: sent_options,
            ..
        } = input.read()?
        else {
            return Err(wrong("it has no beginning"));
        };
        let target = target_of(dataset, &sent_dataset)?;
        // What comes is written as in the dataset in which it ends.
        let listed = self.list(Some(&target)).unwrap_or_default();
        let options = listed.first().map(|entry| entry.options);
        let options = options.unwrap_or(DatasetOptions::from_byte(sent_options));
        let (temporary, state, sequence, is_started_over) =
            self.begin_receive(input.stream_id, position, options)?;
        let mut receiver = Receiver {
            pool: self,
            stream_id: input.stream_id,
            target,
            snapshot,
            temporary,
            state,
            sequence,
            start: position,
            position,
            saved_bytes: 0,
            bases: Vec::new(),
            objects: Vec::new(),
            taken: HashSet::new(),
            object_count,
            base_count,
            is_in_object: false,
            data_blocks: 0,
        };
        let result = receiver.receive(&mut input, force, &mut tell);
        if let Err(error) = result {
            // The failure is what counts; without a saved position more of it is sent again.
            if receiver.objects.is_empty() {
                let _ = self.destroy(&receiver.temporary, true);
                return Err(error);
            }
            let _ = receiver.save();
            return Err(PoolError::Interrupted {
                reason: Box::new(error),
                token: receiver.saved_token(),
            });
        }
        Ok(Received {
            dataset: receiver.target.to_string(),
            objects: receiver.objects.len() as u64,
            data_bytes: receiver.data_blocks * BLOCK_BYTES,
            stream_bytes: input.byte_count,
            is_resumed: position != (0, 0),
            is_started_over,
            snapshot: receiver.snapshot,
        })
    }

    /// Receives that did not come to their end.
    ///
    /// # Errors
    ///
    /// The pool is out of order.
    pub fn partial_receives(&self) -> Result<Vec<Partial>> {
        let mut partial = Vec::new();
        for entry in self.list(None)? {
            let id = entry.name.strip_prefix(PREFIX);
            let id = id.and_then(|id| u64::from_str_radix(id, 16).ok());
            let Some(id) = id.filter(|_| entry.kind == Kind::Dataset) else {
                continue;
            };
            let position = match self.open_object(&child(&entry.name.parse()?, STATE)?) {
                Ok(state) => load_state(&state, id)?,
                Err(_) => None,
            };
            partial.push(Partial {
                dataset: entry.name,
                token: token::encode(id, position.map_or((0, 0), |(_, position)| position)),
            });
        }
        Ok(partial)
    }

    /// Finds or makes the dataset in which a stream grows: its name, its state, the sequence of that, and whether an earlier one
    /// was dropped.
    fn begin_receive(
        &self,
        stream_id: u64,
        start: Position,
        options: DatasetOptions,
    ) -> Result<(Name, Object, u64, bool)> {
        let dataset: Name = format!("{PREFIX}{stream_id:016x}").parse()?;
        let state_name = child(&dataset, STATE)?;
        let is_there = self.list(Some(&dataset)).is_ok();
        if start != (0, 0) {
            let known = match self.open_object(&state_name) {
                Ok(state) => load_state(&state, stream_id)?.map(|found| (found, state)),
                Err(_) => None,
            };
            return match known {
                Some(((sequence, position), state)) if start <= position => {
                    Ok((dataset, state, sequence, false))
                }
                _ => Err(wrong(
                    "the part that it continues is not in this pool; send it again without --resume",
                )),
            };
        }
        if is_there {
            self.destroy(&dataset, true)?;
        }
        self.create_dataset(&dataset)?;
        self.set_options(&dataset, options)?;
        let state = self.create_object(&state_name, 2 * BLOCK_BYTES)?;
        Ok((dataset, state, 0, is_there))
    }

    /// Lets records of `to` hold what records of `from` hold.
    fn clone_records(&self, from: (u64, u64), to: (u64, u64), record_count: u64) -> Result<()> {
        self.retry_when_full(|| {
            self.with_gates(&[from.0, to.0], |state| {
                state.commit_clone(from, to, record_count)
            })
        })?;
        self.checkpoint_if_due()
    }
}

impl Metadata {
    /// The snapshot of that origin in a dataset.
    fn find_origin(&self, dataset: &Name, origin: Origin) -> Option<&Entry> {
        let dataset = self.catalog.find(0, dataset.dataset())?.id;
        self.catalog.iter().find(|entry| {
            entry.kind == EntryKind::Snapshot
                && self.origin_of(entry) == origin
                && self.catalog.get(entry.parent).map(|object| object.parent) == Some(dataset)
        })
    }
}

impl Receiver<'_> {
    fn receive(
        &mut self,
        input: &mut Input<'_>,
        force: bool,
        tell: &mut dyn FnMut(u64),
    ) -> Result<()> {
        loop {
            let frame = input.read()?;
            tell(input.byte_count);
            match frame {
                Frame::Begin { .. } => return Err(wrong("it begins twice")),
                Frame::Base { origin, name } => self.base(origin, &name)?,
                Frame::Object { .. } => self.object(frame, force)?,
                Frame::ObjectEnd => self.object_end()?,
                Frame::End { data_blocks } => {
                    if self.is_in_object || self.objects.len() != self.object_count as usize {
                        return Err(wrong("it ends before all objects have come"));
                    }
                    if data_blocks != self.data_blocks {
                        return Err(wrong("some of its data is missing"));
                    }
                    return self.finish(force);
                }
                change => self.change(change)?,
            }
            if input.byte_count >= self.saved_bytes + SAVE_BYTES {
                self.saved_bytes = input.byte_count;
                self.save()?;
            }
        }
    }

    /// Makes all that came durable, then says so.
    fn save(&mut self) -> Result<()> {
        self.pool.flush()?;
        self.sequence += 1;
        let mut bytes = [0; 40];
        bytes[4..8].copy_from_slice(&STATE_MAGIC);
        bytes[8..16].copy_from_slice(&self.stream_id.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.position.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.position.1.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&checksum.to_le_bytes());
        self.state
            .write_at(&bytes, self.sequence % 2 * BLOCK_BYTES)?;
        self.pool.flush()
    }

    /// The token for what was saved last.
    fn saved_token(&self) -> String {
        // A state that cannot be read is none: everything is sent again.
        let saved = load_state(&self.state, self.stream_id).ok().flatten();
        let position = saved.map_or((0, 0), |(_, position)| position);
        token::encode(self.stream_id, position)
    }

    fn base(&mut self, origin: Origin, name: &str) -> Result<()> {
        if self.bases.len() >= self.base_count as usize || !self.objects.is_empty() {
            return Err(wrong("it has a base where none comes"));
        }
        let state = self.pool.inner.state();
        let found = state.metadata.find_origin(&self.target, origin);
        let Some(found) = found else {
            return Err(PoolError::Stream {
                what: format!(
                    "it builds on a snapshot of '{name}' that dataset '{}' does not have; send it without --from, or from one that is there",
                    self.target
                ),
            });
        };
        self.bases.push(found.id);
        Ok(())
    }

    fn base_id(&self, number: u32) -> Result<u64> {
        let id = self.bases.get(number as usize).copied();
        id.ok_or_else(|| wrong("it builds on a base that it does not name"))
    }

    fn place_id(&self, place: Place) -> Result<u64> {
        match place {
            Place::Base(number) => self.base_id(number),
            Place::Object(number) => {
                let object = self.objects.get(number as usize);
                let object =
                    object.ok_or_else(|| wrong("it refers to an object that did not come"))?;
                Ok(object.object.id().0)
            }
        }
    }

    fn object(&mut self, frame: Frame, force: bool) -> Result<()> {
        let Frame::Object {
            start,
            size_bytes,
            unix_s,
            origin,
            name,
        } = frame
        else {
            return Err(wrong("it has no object where one comes"));
        };
        let number = self.objects.len() as u32;
        if self.is_in_object
            || number >= self.object_count
            || self.bases.len() != self.base_count as usize
        {
            return Err(wrong("it has an object where none comes"));
        }
        let source = match start {
            Start::Zeros => None,
            Start::OwnBase(base) | Start::OtherBase(base) => Some(self.base_id(base)?),
            Start::Object(object) => Some(self.place_id(Place::Object(object))?),
        };
        let (continues, base) = match (start, source) {
            (Start::OwnBase(_), Some(base)) => {
                let mut state = self.pool.inner.state();
                let object = state.metadata.entry(base)?.parent;
                check_unchanged(&mut state, object, base, force)?;
                (Some(object), base)
            }
            _ => (None, 0),
        };
        let goes_to = match continues {
            Some(object) => (object, String::new()),
            None => (0, name.clone()),
        };
        if !self.taken.insert(goes_to) {
            return Err(wrong("an object comes twice"));
        }
        check_free(
            &self.pool.inner.state(),
            &self.target,
            continues,
            &name,
            &self.snapshot,
        )?;
        let object = self.growing_object(number, source)?;
        if !self.is_done(number) {
            object.set_size(size_bytes.next_multiple_of(RECORD_BYTES))?;
            let is_first = number == self.start.0;
            self.position = (number, if is_first { self.start.1 } else { 0 });
        }
        self.objects.push(Incoming {
            name,
            size_bytes,
            unix_s,
            origin,
            object,
            continues,
            base,
        });
        self.is_in_object = true;
        Ok(())
    }

    /// Where an object grows: what an earlier part of the stream left, or a new one.
    fn growing_object(&self, number: u32, source: Option<u64>) -> Result<Object> {
        let temporary = child(&self.temporary, &number.to_string())?;
        match self.pool.open_object(&temporary) {
            Ok(object) if (number, 0) < self.start || number == self.start.0 => Ok(object),
            Ok(_) | Err(PoolError::NotFound { .. }) if (number, 0) < self.start => {
                Err(wrong("the part that it continues is damaged"))
            }
            found => {
                if found.is_ok() {
                    self.pool.destroy(&temporary, true)?;
                }
                match source {
                    None => self.pool.create_object(&temporary, 0),
                    Some(id) => {
                        let full = {
                            let state = self.pool.inner.state();
                            let entry = state.metadata.entry(id)?;
                            state.metadata.catalog.full_name(entry)
                        };
                        self.pool.clone_object(&full.parse()?, &temporary)
                    }
                }
            }
        }
    }

    /// Whether an object came with an earlier part of the stream.
    fn is_done(&self, number: u32) -> bool {
        number < self.start.0
    }

    fn change(&mut self, frame: Frame) -> Result<()> {
        let number = self.objects.len().wrapping_sub(1) as u32;
        let Some(incoming) = self.objects.last().filter(|_| self.is_in_object) else {
            return Err(wrong("it has data outside of objects"));
        };
        let record_count = incoming.size_bytes.div_ceil(RECORD_BYTES);
        let object = incoming.object.clone();
        let first = match &frame {
            Frame::Data { record, .. } => *record,
            Frame::Hole { first_block, .. } => first_block / RECORD_BLOCKS,
            Frame::Reference { first, .. } => *first,
            _ => return Err(wrong("a part of it is in the wrong place")),
        };
        if self.is_done(number) || (number, first) < self.position {
            return Err(wrong("its parts are not in order"));
        }
        match frame {
            Frame::Data {
                record,
                map,
                blocks,
            } => {
                if record >= record_count {
                    return Err(wrong("it has data behind the end of an object"));
                }
                self.data_blocks += u64::from(map.count_ones());
                write_blocks(&object, record, map, &blocks)?;
            }
            Frame::Hole {
                first_block,
                block_count,
            } => {
                if first_block + block_count > record_count * RECORD_BLOCKS {
                    return Err(wrong("it has a hole behind the end of an object"));
                }
                object.punch_hole(first_block * BLOCK_BYTES, block_count * BLOCK_BYTES)?;
            }
            Frame::Reference {
                first,
                count,
                place,
                place_first,
            } => {
                let source = self.place_id(place)?;
                let id = object.id().0;
                let overlaps = source == id && first.abs_diff(place_first) < count;
                if first + count > record_count || overlaps {
                    return Err(wrong("it refers to what cannot be"));
                }
                self.pool
                    .clone_records((source, place_first), (id, first), count)
                    .map_err(|error| match error {
                        PoolError::Damaged { .. } => wrong("it refers to what is not there"),
                        other => other,
                    })?;
            }
            _ => {}
        }
        self.position = (number, first);
        Ok(())
    }

    fn object_end(&mut self) -> Result<()> {
        let number = self.objects.len().wrapping_sub(1) as u32;
        let Some(incoming) = self.objects.last().filter(|_| self.is_in_object) else {
            return Err(wrong("an object ends that did not begin"));
        };
        if !self.is_done(number) {
            incoming.object.set_size(incoming.size_bytes)?;
            self.position = (number + 1, 0);
        }
        self.is_in_object = false;
        Ok(())
    }

    /// Gives everything its name, at once.
    fn finish(&mut self, force: bool) -> Result<()> {
        match self.pool.create_dataset(&self.target) {
            Ok(_) => {
                let grown_in = self.pool.find(&self.temporary)?;
                self.pool.set_options(&self.target, grown_in.options)?;
            }
            Err(PoolError::Exists { .. }) => {}
            Err(error) => return Err(error),
        }
        let grown = self.objects.iter().map(|incoming| incoming.object.id().0);
        let continued = self
            .objects
            .iter()
            .filter_map(|incoming| incoming.continues);
        let mut ids: Vec<u64> = grown.chain(continued).collect();
        ids.push(self.state.id().0);
        self.pool.retry_when_full(|| {
            self.pool.with_gates(&ids, |state| {
                for incoming in &self.objects {
                    if let Some(object) = incoming.continues {
                        check_unchanged(state, object, incoming.base, force)?;
                    }
                    check_free(
                        state,
                        &self.target,
                        incoming.continues,
                        &incoming.name,
                        &self.snapshot,
                    )?;
                }
                self.check_alone(state)?;
                let pages = NAMING_PAGES.0 + NAMING_PAGES.1 * self.objects.len() as u64;
                state.metadata.need_pages(pages)?;
                self.name_all(state)
            })
        })?;
        self.pool.flush()?;
        self.pool.reap()
    }

    /// Fails where something else is in the dataset in which all this grew: it could not be removed.
    fn check_alone(&self, state: &State) -> Result<()> {
        let metadata = &state.metadata;
        let temporary = metadata.dataset(&self.temporary)?.id;
        let grown = self.objects.iter().map(|incoming| &incoming.object);
        let mut ids = HashSet::from([self.state.id().0]);
        ids.extend(grown.map(|object| object.id().0));
        let has_more = |id: &u64| metadata.catalog.children(*id).next().is_some();
        let mut children = metadata.catalog.children(temporary);
        if ids.iter().any(has_more) || children.any(|child| !ids.contains(&child.id)) {
            return Err(wrong(
                "something else was put where it was being received; remove that dataset",
            ));
        }
        Ok(())
    }

    fn name_all(&self, state: &mut State) -> Result<()> {
        let parent = state.metadata.dataset(&self.target)?.id;
        let temporary = state.metadata.dataset(&self.temporary)?.id;
        for incoming in &self.objects {
            let grown = incoming.object.id().0;
            let object = incoming.continues.unwrap_or(grown);
            if incoming.continues.is_none() {
                state.commit(&Operation::Rename {
                    id: grown,
                    parent,
                    name: incoming.name.clone(),
                })?;
            }
            let id = state.metadata.next_id;
            state.commit(&Operation::Clone {
                source: grown,
                id,
                kind: EntryKind::Snapshot,
                parent: object,
                unix_s: incoming.unix_s,
                name: self.snapshot.clone(),
            })?;
            let origin = incoming.origin;
            state.commit(&Operation::Origin { id, origin })?;
            if incoming.continues.is_some() {
                state.commit(&Operation::Rollback {
                    object,
                    snapshot: id,
                })?;
                state.commit(&Operation::Remove { id: grown })?;
            }
        }
        state.commit(&Operation::Remove {
            id: self.state.id().0,
        })?;
        state.commit(&Operation::Remove { id: temporary })
    }
}

/// Fails where an object is not what its snapshot says any more.
fn check_unchanged(state: &mut State, object: u64, base: u64, force: bool) -> Result<()> {
    let (now, then) = (state.metadata.entry(object)?, state.metadata.entry(base)?);
    let name = state.metadata.catalog.full_name(now);
    let is_same_size = now.size_bytes == then.size_bytes;
    let (now, then) = (now.map, then.map);
    if force || (is_same_size && state.metadata.is_same_content(now, then)?) {
        return Ok(());
    }
    Err(PoolError::Stream {
        what: format!(
            "'{name}' changed since the snapshot that it builds on; roll it back, or receive with --force"
        ),
    })
}

/// Fails where what is to be made is there already.
fn check_free(
    state: &State,
    target: &Name,
    continues: Option<u64>,
    name: &str,
    snapshot: &str,
) -> Result<()> {
    let catalog = &state.metadata.catalog;
    let found = match continues {
        Some(object) => catalog.find(object, snapshot),
        None => catalog
            .find(0, target.dataset())
            .and_then(|dataset| catalog.find(dataset.id, name)),
    };
    match found {
        Some(entry) => Err(PoolError::Exists {
            name: catalog.full_name(entry),
        }),
        None => Ok(()),
    }
}

fn write_blocks(object: &Object, record: u64, map: u16, blocks: &[u8]) -> Result<()> {
    let mut rest = blocks;
    let mut block = 0;
    while block < RECORD_BLOCKS {
        let count = u64::from((map >> block).trailing_ones());
        let (now, later) = rest.split_at(count as usize * BLOCK);
        if count > 0 {
            object.write_at(now, record * RECORD_BYTES + block * BLOCK_BYTES)?;
        }
        rest = later;
        block += count + 1;
    }
    Ok(())
}
