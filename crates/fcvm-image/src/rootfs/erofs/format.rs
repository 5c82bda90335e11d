//! The bytes of EROFS structures: superblock, inodes, extended attributes, directory entries.
//!
//! Source: `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h` of Linux 6.1. Only what
//! `docs/format/root-image.md` lists is produced; where things are placed is decided in `plan`.

use crate::rootfs::layer::Xattr;
use crate::rootfs::tree::Metadata;

/// Offset of the superblock in the image.
pub(crate) const SUPERBLOCK_OFFSET_BYTES: u64 = 1024;
/// Inode numbers count these from the start of the metadata area.
pub(crate) const SLOT_BYTES: u64 = 32;
/// Size of an inode without attributes and data: always the extended form, since the compact one
/// has neither a time of its own nor 32-bit owners.
pub(crate) const INODE_BYTES: usize = 64;

const BLOCK_BYTES: usize = 4096;
const MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS: u8 = 12;
const SUPERBLOCK_BYTES: usize = 128;
const COMPAT_CHECKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
const VOLUME_NAME: &[u8; 16] = b"fcvm-root\0\0\0\0\0\0\0";

const DIRENT_BYTES: usize = 12;
const XATTR_HEADER_BYTES: usize = 12;
const XATTR_ENTRY_BYTES: usize = 4;

/// Most that the count field of an inode can express.
pub(crate) const MAX_XATTR_AREA_BYTES: usize = XATTR_HEADER_BYTES + 4 * (u16::MAX as usize - 1);
/// Largest value and longest name (without its namespace) of one attribute.
pub(crate) const MAX_XATTR_VALUE_BYTES: usize = u16::MAX as usize;
const MAX_XATTR_SUFFIX_BYTES: usize = u8::MAX as usize;

/// Block address of a hole in a chunk table.
pub(crate) const HOLE: u32 = u32::MAX;

/// What the superblock says.
pub(crate) struct Superblock {
    pub(crate) root_nid: u16,
    pub(crate) inode_count: u64,
    pub(crate) block_count: u32,
    pub(crate) metadata_block: u32,
    pub(crate) uuid: [u8; 16],
    pub(crate) has_chunked_files: bool,
}

impl Superblock {
    /// The first block from the superblock to its end, which is what the checksum covers.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BLOCK_BYTES - SUPERBLOCK_OFFSET_BYTES as usize);
        out.extend(MAGIC.to_le_bytes());
        out.extend(0u32.to_le_bytes()); // checksum, below
        out.extend((COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        out.extend([BLOCK_BITS, 0]); // no extension slots
        out.extend(self.root_nid.to_le_bytes());
        out.extend(self.inode_count.to_le_bytes());
        out.extend(0u64.to_le_bytes()); // build time: every inode has its own time
        out.extend(0u32.to_le_bytes());
        out.extend(self.block_count.to_le_bytes());
        out.extend(self.metadata_block.to_le_bytes());
        out.extend(0u32.to_le_bytes()); // no shared attributes
        out.extend(self.uuid);
        out.extend(VOLUME_NAME);
        let incompat = if self.has_chunked_files {
            INCOMPAT_CHUNKED_FILE
        } else {
            0
        };
        out.extend(incompat.to_le_bytes());
        debug_assert!(out.len() < SUPERBLOCK_BYTES);
        out.resize(BLOCK_BYTES - SUPERBLOCK_OFFSET_BYTES as usize, 0);
        // The kernel's crc32c leaves out the final inversion.
        let checksum = !crc32c::crc32c(&out);
        out[4..8].copy_from_slice(&checksum.to_le_bytes());
        out
    }
}

/// How the content of an inode is found (`i_format`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DataLayout {
    /// In consecutive blocks.
    Plain = 0,
    /// Whole blocks as `Plain`, the rest directly behind the inode and its attributes.
    Inline = 2,
    /// A table of chunk addresses behind the inode and its attributes.
    Chunked = 4,
}

/// File type in the high bits of the mode, and as directory entries name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileType {
    Regular,
    Directory,
    CharDevice,
    BlockDevice,
    Fifo,
    Symlink,
}

impl FileType {
    fn mode_bits(self) -> u16 {
        match self {
            Self::Fifo => 0o010_000,
            Self::CharDevice => 0o020_000,
            Self::Directory => 0o040_000,
            Self::BlockDevice => 0o060_000,
            Self::Regular => 0o100_000,
            Self::Symlink => 0o120_000,
        }
    }

    fn dirent_byte(self) -> u8 {
        match self {
            Self::Regular => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Symlink => 7,
        }
    }
}

/// What an inode says besides its [`Metadata`].
pub(crate) struct Inode {
    pub(crate) file_type: FileType,
    pub(crate) layout: DataLayout,
    pub(crate) size_bytes: u64,
    /// First block, encoded device number or chunk format, by type and layout.
    pub(crate) union_word: u32,
    pub(crate) serial: u32,
    pub(crate) link_count: u32,
}

impl Inode {
    /// Appends the inode and its attributes.
    pub(crate) fn encode(&self, metadata: &Metadata, out: &mut Vec<u8>) {
        const EXTENDED: u16 = 1;
        let xattr_bytes = xattr_area_bytes(&metadata.xattrs);
        let xattr_count = match xattr_bytes {
            0 => 0,
            bytes => ((bytes - XATTR_HEADER_BYTES) / 4 + 1) as u16,
        };
        out.extend((EXTENDED | (self.layout as u16) << 1).to_le_bytes());
        out.extend(xattr_count.to_le_bytes());
        out.extend((self.file_type.mode_bits() | metadata.mode).to_le_bytes());
        out.extend([0; 2]);
        out.extend(self.size_bytes.to_le_bytes());
        out.extend(self.union_word.to_le_bytes());
        out.extend(self.serial.to_le_bytes());
        out.extend(metadata.uid.to_le_bytes());
        out.extend(metadata.gid.to_le_bytes());
        out.extend(metadata.mtime.seconds.to_le_bytes());
        out.extend(metadata.mtime.nanoseconds.to_le_bytes());
        out.extend(self.link_count.to_le_bytes());
        out.extend([0; 16]);
        encode_xattrs(&metadata.xattrs, out);
    }
}

/// Linux's encoding of device numbers in 32 bits.
pub(crate) fn device_word(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Splits an attribute name into EROFS's namespace index and the rest. `None` for namespaces that
/// EROFS and Linux do not have and for names that Linux does not allow.
pub(crate) fn xattr_index(name: &[u8]) -> Option<(u8, &[u8])> {
    const NAMESPACES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    let (index, suffix) = NAMESPACES
        .iter()
        .find_map(|(prefix, index)| name.strip_prefix(*prefix).map(|suffix| (*index, suffix)))?;
    let valid = !suffix.is_empty() && suffix.len() <= MAX_XATTR_SUFFIX_BYTES;
    (valid && !suffix.contains(&0)).then_some((index, suffix))
}

/// Bytes that attributes take behind their inode, 0 for none.
pub(crate) fn xattr_area_bytes(xattrs: &[Xattr]) -> usize {
    let entries: usize = xattrs
        .iter()
        .filter_map(|xattr| xattr_index(&xattr.name).map(|(_, suffix)| (suffix, &xattr.value)))
        .map(|(suffix, value)| (XATTR_ENTRY_BYTES + suffix.len() + value.len()).next_multiple_of(4))
        .sum();
    if entries == 0 {
        0
    } else {
        XATTR_HEADER_BYTES + entries
    }
}

fn encode_xattrs(xattrs: &[Xattr], out: &mut Vec<u8>) {
    if xattrs.is_empty() {
        return;
    }
    out.extend([0; XATTR_HEADER_BYTES]); // no shared attributes
    for xattr in xattrs {
        let Some((index, suffix)) = xattr_index(&xattr.name) else {
            continue;
        };
        let start = out.len();
        out.extend([suffix.len() as u8, index]);
        out.extend((xattr.value.len() as u16).to_le_bytes());
        out.extend_from_slice(suffix);
        out.extend_from_slice(&xattr.value);
        out.resize(start + (out.len() - start).next_multiple_of(4), 0);
    }
}

/// One entry of a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dirent<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) nid: u64,
    pub(crate) file_type: FileType,
}

/// Size of a directory with these names, which are in the order of [`encode_dirents`].
pub(crate) fn directory_bytes<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut size = 0usize;
    for name in names {
        let entry = DIRENT_BYTES + name.len();
        if size % BLOCK_BYTES + entry > BLOCK_BYTES {
            size = size.next_multiple_of(BLOCK_BYTES);
        }
        size += entry;
    }
    size as u64
}

/// The content of a directory. `entries` hold `.` and `..` and are sorted by name as bytes.
pub(crate) fn encode_dirents(entries: &[Dirent<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let fits = |entry: &&Dirent<'_>| {
            used += DIRENT_BYTES + entry.name.len();
            used <= BLOCK_BYTES
        };
        let count = rest.iter().take_while(fits).count();
        let (block, behind) = rest.split_at(count);
        out.resize(out.len().next_multiple_of(BLOCK_BYTES), 0);
        let mut name_offset = DIRENT_BYTES * count;
        for entry in block {
            out.extend(entry.nid.to_le_bytes());
            out.extend((name_offset as u16).to_le_bytes());
            out.extend([entry.file_type.dirent_byte(), 0]);
            name_offset += entry.name.len();
        }
        for entry in block {
            out.extend_from_slice(entry.name);
        }
        rest = behind;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_size_is_that_of_its_content() {
        use proptest::prelude::*;
        let names =
            proptest::collection::btree_set(proptest::collection::vec(1u8..=255, 1..=255), 1..300);
        proptest!(|(names in names)| {
            let entries: Vec<Dirent<'_>> = names
                .iter()
                .map(|name| Dirent { name, nid: 7, file_type: FileType::Regular })
                .collect();
            let size = directory_bytes(names.iter().map(Vec::as_slice));
            prop_assert_eq!(encode_dirents(&entries).len() as u64, size);
        });
    }

    #[test]
    fn device_numbers_are_encoded_as_linux_does() {
        assert_eq!(device_word(1, 3), 0x103);
        assert_eq!(device_word(0xfff, 0xf_ffff), 0xffff_ffff);
        assert_eq!(
            device_word(259, 0x12345),
            (259 << 8) | 0x45 | (0x12300 << 12)
        );
    }

    #[test]
    fn attribute_names_split_by_namespace() {
        assert_eq!(
            xattr_index(b"security.capability"),
            Some((6, b"capability".as_slice()))
        );
        assert_eq!(xattr_index(b"user.a.b"), Some((1, b"a.b".as_slice())));
        assert_eq!(xattr_index(b"trusted.x"), Some((4, b"x".as_slice())));
        assert_eq!(
            xattr_index(b"system.posix_acl_access"),
            Some((2, b"".as_slice()))
        );
        assert_eq!(
            xattr_index(b"system.posix_acl_default"),
            Some((3, b"".as_slice()))
        );
        for name in [
            "user.",
            "system.nfs4_acl",
            "com.apple.quarantine",
            "",
            "user",
            "user.a\0",
        ] {
            assert_eq!(xattr_index(name.as_bytes()), None, "{name:?}");
        }
    }
}
