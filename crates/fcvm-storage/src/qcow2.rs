//! Empty qcow2 overlays, and the header of any qcow2 file. docs/format/disk-overlay.md says the bytes.
//!
//! Nothing else of the format: what is in an overlay is the hypervisor's to write and to read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// "QFI" and 0xfb.
const MAGIC: [u8; 4] = *b"QFI\xfb";
const VERSION: u32 = 3;
/// log2 of the cluster size, 64 KiB.
const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
/// log2 of the bits of a reference count.
const REFCOUNT_ORDER: u32 = 4;
/// The header without extensions.
const HEADER_BYTES: u32 = 104;
/// Incompatible feature, bit 4: entries of L2 tables have a bitmap for 32 parts of their cluster, so
/// that a small write copies 2 KiB from below instead of 64.
const EXTENDED_L2: u64 = 1 << 4;
/// Bytes of the disk behind one entry of the L1 table: an L2 table is a cluster of 16-byte entries.
const L1_ENTRY_COVERS: u64 = CLUSTER_BYTES / 16 * CLUSTER_BYTES;
/// First cluster of the L1 table, after header, refcount table and refcount block.
const L1_CLUSTER: u64 = 3;
/// QEMU's longest L1 table, in bytes (QCOW_MAX_L1_SIZE).
const L1_BYTES_MAX: u64 = 32 << 20;

/// The largest disk that [`write_empty`] makes an overlay for.
pub(crate) const SIZE_BYTES_MAX: u64 = L1_BYTES_MAX / 8 * L1_ENTRY_COVERS;

/// What a qcow2 header tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Qcow2Header {
    /// Size of the disk that the guest sees.
    pub size_bytes: u64,
    /// It names a file to lie on, which no file of fcvm's does.
    pub names_backing_file: bool,
    /// It names a file that holds its data, which no file of fcvm's does.
    pub names_data_file: bool,
}

impl Qcow2Header {
    /// Reads the first bytes of a file, at least 104 of them; `None` where it is no qcow2 of version
    /// 3 or its size is nothing that QEMU opens.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let u64_at = |at: usize| Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        if bytes.get(..4)? != MAGIC || u32_at(4)? != VERSION || u32_at(100)? < HEADER_BYTES {
            return None;
        }
        let size_bytes = u64_at(24)?;
        Some(Self {
            size_bytes,
            names_backing_file: u64_at(8)? != 0 || u32_at(16)? != 0,
            // Incompatible feature, bit 2.
            names_data_file: u64_at(72)? & (1 << 2) != 0,
        })
        .filter(|_| i64::try_from(size_bytes).is_ok())
    }

    /// Reads the header of a file; `None` as [`parse`](Self::parse).
    pub(crate) fn read(file: &File) -> io::Result<Option<Self>> {
        let mut bytes = [0; HEADER_BYTES as usize];
        match file.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok(Self::parse(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Makes an empty file an overlay of a disk of `size_bytes`, all of which shows what lies below.
pub(crate) fn write_empty(file: &File, size_bytes: u64) -> io::Result<()> {
    if size_bytes > SIZE_BYTES_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let l1_entries = size_bytes.div_ceil(L1_ENTRY_COVERS);
    let clusters = L1_CLUSTER + (l1_entries * 8).div_ceil(CLUSTER_BYTES).max(1);
    // The L1 table is a hole: no part of the disk is in this file.
    file.set_len(clusters * CLUSTER_BYTES)?;
    file.write_all_at(&header(size_bytes, l1_entries as u32), 0)?;
    // The refcount table has one block, in cluster 2, which counts the first 2 GiB of the file.
    file.write_all_at(&(2 * CLUSTER_BYTES).to_be_bytes(), CLUSTER_BYTES)?;
    let counts = 1_u16.to_be_bytes().repeat(clusters as usize);
    file.write_all_at(&counts, 2 * CLUSTER_BYTES)
}

fn header(size_bytes: u64, l1_entries: u32) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_be_bytes());
    // No name of a file to lie on: offset, length.
    bytes.extend(0_u64.to_be_bytes());
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(CLUSTER_BITS.to_be_bytes());
    bytes.extend(size_bytes.to_be_bytes());
    // No encryption.
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(l1_entries.to_be_bytes());
    bytes.extend((L1_CLUSTER * CLUSTER_BYTES).to_be_bytes());
    // The refcount table: offset, clusters.
    bytes.extend(CLUSTER_BYTES.to_be_bytes());
    bytes.extend(1_u32.to_be_bytes());
    // No snapshots inside: count, offset.
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(0_u64.to_be_bytes());
    // Features: incompatible, compatible, of autoclear.
    bytes.extend(EXTENDED_L2.to_be_bytes());
    bytes.extend(0_u64.to_be_bytes());
    bytes.extend(0_u64.to_be_bytes());
    bytes.extend(REFCOUNT_ORDER.to_be_bytes());
    bytes.extend(HEADER_BYTES.to_be_bytes());
    // The end of header extensions: type, length.
    bytes.extend([0; 8]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_read_as_it_was_written() {
        let file = tempfile::tempfile().unwrap();
        write_empty(&file, 10 << 30).unwrap();
        let header = Qcow2Header::read(&file).unwrap().unwrap();
        assert_eq!(header.size_bytes, 10 << 30);
        assert!(!header.names_backing_file && !header.names_data_file);
        let mut bytes = [0; 104];
        file.read_exact_at(&mut bytes, 0).unwrap();
        for (at, value) in [(0, 1), (7, 2), (24, 0x80), (103, 72)] {
            let mut damaged = bytes;
            damaged[at] = value;
            assert_eq!(Qcow2Header::parse(&damaged), None, "byte {at}");
        }
        for at in [15, 19] {
            let mut naming = bytes;
            naming[at] = 1;
            assert!(Qcow2Header::parse(&naming).unwrap().names_backing_file);
        }
        bytes[79] |= 4;
        assert!(Qcow2Header::parse(&bytes).unwrap().names_data_file);
        assert_eq!(Qcow2Header::parse(&bytes[..103]), None);
        assert_eq!(
            Qcow2Header::read(&tempfile::tempfile().unwrap()).unwrap(),
            None
        );
    }

    #[test]
    fn disk_that_is_too_large_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = write_empty(&file, SIZE_BYTES_MAX + 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
