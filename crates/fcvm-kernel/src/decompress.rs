//! Bounded decompression of one buffer, by the magic numbers that kernels and modules use.
//!
//! The formats are those of the kernel's `lib/decompress.c`. The bytes may be hostile: output and the
//! decoders' own memory are bounded.

use std::io::{self, Read};

/// Memory a decoder may take for its dictionary, in KiB: what `xz --ultra` and `zstd --ultra` need
/// in the kernel's own build.
const DECODER_MEMORY_KIB: u32 = 192 << 10;
/// The same as a power of two, for zstd's window: 128 MiB.
const ZSTD_WINDOW_LOG: u32 = 27;

/// A compression that kernels use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Xz,
    Lzma,
    Zstd,
    /// The legacy frame format, which is what the kernel's build makes.
    Lz4,
    Bzip2,
}

impl Compression {
    /// Recognises the compression by the first bytes.
    pub(crate) fn detect(bytes: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 6] = [
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x5d\0\0", Compression::Lzma),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
            (b"\x02\x21\x4c\x18", Compression::Lz4),
            (b"BZh", Compression::Bzip2),
        ];
        MAGICS
            .iter()
            .find(|(magic, _)| bytes.starts_with(magic))
            .map(|(_, compression)| *compression)
    }

    /// Decompresses the first stream in `bytes`; what follows it is ignored, except for
    /// [`Compression::Lz4`], whose format has no end mark.
    ///
    /// More than `limit_bytes` of output is [`io::ErrorKind::FileTooLarge`].
    pub(crate) fn decompress(self, bytes: &[u8], limit_bytes: usize) -> io::Result<Vec<u8>> {
        match self {
            Self::Gzip => read_bounded(flate2::bufread::GzDecoder::new(bytes), limit_bytes),
            Self::Xz => {
                let reader = lzma_rust2::XzReader::new_mem_limit(bytes, false, DECODER_MEMORY_KIB);
                read_bounded(reader, limit_bytes)
            }
            Self::Lzma => {
                let reader =
                    lzma_rust2::LzmaReader::new_mem_limit(bytes, DECODER_MEMORY_KIB, None)?;
                read_bounded(reader, limit_bytes)
            }
            Self::Zstd => {
                let mut reader = zstd::Decoder::with_buffer(bytes)?.single_frame();
                reader.window_log_max(ZSTD_WINDOW_LOG)?;
                read_bounded(reader, limit_bytes)
            }
            Self::Lz4 => read_bounded(lz4_flex::frame::FrameDecoder::new(bytes), limit_bytes),
            Self::Bzip2 => read_bounded(bzip2::bufread::BzDecoder::new(bytes), limit_bytes),
        }
    }
}

fn read_bounded(reader: impl Read, limit_bytes: usize) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    let read = reader
        .take(limit_bytes as u64 + 1)
        .read_to_end(&mut output)?;
    if read > limit_bytes {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("more than {limit_bytes} bytes come out of it"),
        ));
    }
    Ok(output)
}
