//! Layer files to uncompressed bytes: recognising the compression, decoding and hashing in threads
//! of their own, within limits.
//!
//! One thread decodes all layers in order and hands each chunk to two readers: the hasher, which
//! computes the `diff_id` of each layer, and the merge, through [`LayerStream`]. Queues are short,
//! so memory stays bounded, and the decoder may run a little ahead into the next layer.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::mem;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

use super::LayerInput;
use super::error::{LayerName, RootfsError};
use crate::{Digest, Task};

const CHUNK_BYTES: usize = 256 * 1024;
const QUEUE_CHUNKS: usize = 16;
const INPUT_BUFFER_BYTES: usize = 128 * 1024;

/// Largest window a zstd layer may ask for, as a power of two: what `zstd -d` allows by default.
const ZSTD_MAX_WINDOW_LOG: u32 = 27;

/// The queues between the decoder, the hasher and the merge.
pub(crate) struct Pipeline {
    pub(crate) decoder: Decoder,
    pub(crate) hasher: Hasher,
    pub(crate) events: Receiver<Event>,
}

/// What the merge receives.
pub(crate) enum Event {
    Data(Arc<Chunk>),
    LayerEnd,
    Failed(RootfsError),
}

/// A piece of an uncompressed layer. Its memory goes back to the pool with the last reader.
pub(crate) struct Chunk {
    bytes: Vec<u8>,
    /// Compressed bytes consumed so far, of all layers.
    input_bytes: u64,
    pool: Arc<Pool>,
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.pool.put(mem::take(&mut self.bytes));
    }
}

/// Buffers to use again: fresh memory costs page faults for every chunk.
#[derive(Default)]
struct Pool(Mutex<Vec<Vec<u8>>>);

impl Pool {
    fn take(&self) -> Vec<u8> {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.pop().unwrap_or_else(|| vec![0; CHUNK_BYTES])
    }

    fn put(&self, mut buffer: Vec<u8>) {
        // Chunks are cut at the end of a layer; the length is restored without writing all of it.
        buffer.resize(CHUNK_BYTES, 0);
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(buffer);
    }
}

/// Makes the queues. The decoder and the hasher are to be run in threads.
pub(crate) fn pipeline(max_uncompressed_bytes: u64) -> Pipeline {
    let (to_merge, events) = sync_channel(QUEUE_CHUNKS);
    let (to_hasher, chunks) = sync_channel(QUEUE_CHUNKS);
    let decoder = Decoder {
        to_merge,
        to_hasher,
        pool: Arc::default(),
        input_bytes: 0,
        left_bytes: max_uncompressed_bytes,
        max_uncompressed_bytes,
    };
    Pipeline {
        decoder,
        hasher: Hasher { chunks },
        events,
    }
}

/// Reads and decodes all layers.
pub(crate) struct Decoder {
    to_merge: SyncSender<Event>,
    to_hasher: SyncSender<Option<Arc<Chunk>>>,
    pool: Arc<Pool>,
    input_bytes: u64,
    left_bytes: u64,
    max_uncompressed_bytes: u64,
}

/// The merge ended early and dropped its end of the queue.
struct Abandoned;

impl Decoder {
    /// Runs until all layers are read, one fails, or the merge does not listen any more.
    pub(crate) fn run(mut self, layers: &[LayerInput]) {
        for (index, layer) in layers.iter().enumerate() {
            match self.decode(layer, layer.name(index)) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    let _ = self.to_merge.send(Event::Failed(error));
                    return;
                }
                Err(Abandoned) => return,
            }
            if self.to_hasher.send(None).is_err() || self.to_merge.send(Event::LayerEnd).is_err() {
                return;
            }
        }
    }

    fn decode(
        &mut self,
        layer: &LayerInput,
        name: LayerName,
    ) -> Result<Result<(), RootfsError>, Abandoned> {
        let failed = |source| {
            Ok(Err(RootfsError::ReadLayer {
                layer: name,
                path: layer.path.clone(),
                source,
            }))
        };
        let file = match File::open(&layer.path) {
            Ok(file) => file,
            Err(source) => return failed(source),
        };
        let mut input = BufReader::with_capacity(
            INPUT_BUFFER_BYTES,
            Counted {
                inner: file,
                read_bytes: 0,
            },
        );
        let compression = match input.fill_buf() {
            Ok(start) => Compression::recognise(start),
            Err(source) => return failed(source),
        };
        let start_bytes = self.input_bytes;
        let origin = (name, layer.path.as_path());
        match compression {
            Compression::None => self.pump(
                input,
                |input| input.get_ref().read_bytes + start_bytes,
                origin,
                None,
            ),
            Compression::Gzip => self.pump(
                MultiGzDecoder::new(input),
                |decoder| decoder.get_ref().get_ref().read_bytes + start_bytes,
                origin,
                Some("gzip"),
            ),
            Compression::Zstd => {
                let mut decoder = match zstd::Decoder::with_buffer(input) {
                    Ok(decoder) => decoder,
                    Err(source) => return failed(source),
                };
                if let Err(source) = decoder.window_log_max(ZSTD_MAX_WINDOW_LOG) {
                    return failed(source);
                }
                self.pump(
                    decoder,
                    |decoder| decoder.get_ref().get_ref().read_bytes + start_bytes,
                    origin,
                    Some("zstd"),
                )
            }
            Compression::Unsupported(compression) => Ok(Err(RootfsError::UnsupportedCompression {
                layer: name,
                compression,
            })),
        }
    }

    fn pump<R: Read>(
        &mut self,
        mut source: R,
        position: impl Fn(&R) -> u64,
        (layer, path): (LayerName, &Path),
        compression: Option<&'static str>,
    ) -> Result<Result<(), RootfsError>, Abandoned> {
        loop {
            let mut bytes = self.pool.take();
            let (length, at_end) = match fill(&mut source, &mut bytes) {
                Ok(filled) => filled,
                Err(source) => return Ok(Err(damaged(layer, path, compression, source))),
            };
            if length as u64 > self.left_bytes {
                return Ok(Err(RootfsError::Limit {
                    layer,
                    what: "uncompressed bytes",
                    limit: self.max_uncompressed_bytes,
                }));
            }
            self.left_bytes -= length as u64;
            bytes.truncate(length);
            self.input_bytes = position(&source);
            if length > 0 {
                let pool = Arc::clone(&self.pool);
                let chunk = Arc::new(Chunk {
                    bytes,
                    input_bytes: self.input_bytes,
                    pool,
                });
                // The hasher only ends before the decoder when its thread died.
                self.to_hasher
                    .send(Some(Arc::clone(&chunk)))
                    .map_err(|_| Abandoned)?;
                self.to_merge
                    .send(Event::Data(chunk))
                    .map_err(|_| Abandoned)?;
            }
            if at_end {
                return Ok(Ok(()));
            }
        }
    }
}

fn damaged(
    layer: LayerName,
    path: &Path,
    compression: Option<&'static str>,
    source: io::Error,
) -> RootfsError {
    match compression {
        Some(compression) => RootfsError::Decompress {
            layer,
            compression,
            source,
        },
        None => RootfsError::ReadLayer {
            layer,
            path: path.into(),
            source,
        },
    }
}

/// Reads until `buffer` is full or the source ends; tells the length and whether it ended.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<(usize, bool)> {
    let mut length = 0;
    while length < buffer.len() {
        match source.read(&mut buffer[length..]) {
            Ok(0) => return Ok((length, true)),
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok((length, false))
}

/// Counts what is read from the layer's file, for the progress.
struct Counted {
    inner: File,
    read_bytes: u64,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.read_bytes += count as u64;
        Ok(count)
    }
}

enum Compression {
    None,
    Gzip,
    Zstd,
    Unsupported(&'static str),
}

impl Compression {
    /// By the first bytes; media types of layers are often wrong.
    fn recognise(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or a skippable frame as zstd:chunked layers may start with.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, ..] => {
                Self::Unsupported("bzip2")
            }
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Unsupported("xz"),
            [0x04, 0x22, 0x4d, 0x18, ..] => Self::Unsupported("lz4"),
            _ => Self::None,
        }
    }
}

/// Computes the `diff_id` of each layer.
pub(crate) struct Hasher {
    chunks: Receiver<Option<Arc<Chunk>>>,
}

impl Hasher {
    /// Returns the sha256 of each layer that was read to its end.
    pub(crate) fn run(self) -> Vec<Digest> {
        let mut digests = Vec::new();
        let mut hash = Sha256::new();
        for chunk in self.chunks {
            match chunk {
                Some(chunk) => hash.update(&chunk.bytes),
                None => digests.push(Digest::from_sha256(hash.finalize_reset().into())),
            }
        }
        digests
    }
}

/// The uncompressed bytes of one layer at a time, as the merge reads them.
pub(crate) struct LayerStream<'a> {
    events: Receiver<Event>,
    current: Option<Arc<Chunk>>,
    position: usize,
    at_end: bool,
    failure: Option<RootfsError>,
    task: &'a dyn Task,
    reported_bytes: u64,
}

impl<'a> LayerStream<'a> {
    pub(crate) fn new(events: Receiver<Event>, task: &'a dyn Task) -> Self {
        Self {
            events,
            current: None,
            position: 0,
            at_end: false,
            failure: None,
            task,
            reported_bytes: 0,
        }
    }

    /// Reads the current layer to its end, so that its digest is known, and goes to the next one.
    pub(crate) fn finish_layer(&mut self) -> Result<(), RootfsError> {
        loop {
            match self.fill_buf() {
                Ok([]) => break,
                Ok(bytes) => {
                    let length = bytes.len();
                    self.consume(length);
                }
                Err(_) => return Err(self.take_failure()),
            }
        }
        self.at_end = false;
        Ok(())
    }

    /// The reason of the [`io::Error`] that reading returned.
    pub(crate) fn take_failure(&mut self) -> RootfsError {
        self.failure.take().unwrap_or(RootfsError::Thread)
    }
}

impl BufRead for LayerStream<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while !self.at_end
            && self
                .current
                .as_ref()
                .is_none_or(|chunk| self.position >= chunk.bytes.len())
        {
            self.current = None;
            self.position = 0;
            match self.events.recv() {
                Ok(Event::Data(chunk)) => {
                    self.task.advance(chunk.input_bytes - self.reported_bytes);
                    self.reported_bytes = chunk.input_bytes;
                    self.current = Some(chunk);
                }
                Ok(Event::LayerEnd) => self.at_end = true,
                Ok(Event::Failed(error)) => {
                    self.failure = Some(error);
                    return Err(io::ErrorKind::Other.into());
                }
                Err(_) => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
        Ok(self
            .current
            .as_ref()
            .map_or(&[], |chunk| &chunk.bytes[self.position..]))
    }

    fn consume(&mut self, amount: usize) {
        self.position += amount;
    }
}

impl Read for LayerStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut bytes = self.fill_buf()?;
        let count = bytes.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}
