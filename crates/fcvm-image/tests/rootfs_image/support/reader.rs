//! Reads the images that fcvm writes, from the description of the format alone: the tests' second
//! opinion, for the parts that `fsck.erofs` does not compare (attributes, links, holes, times).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const BLOCK: usize = 4096;

/// Everything about one name in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub nid: u64,
    /// With the file type bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub nlink: u32,
    /// Encoded device number of devices, else 0.
    pub rdev: u32,
    pub size: u64,
    /// Content of files and symbolic links; empty for huge sparse files, see `blocks`.
    pub content: Vec<u8>,
    /// For chunked files: what is stored of them, in bytes.
    pub stored_bytes: Option<u64>,
    pub layout: u16,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Entry {
    pub fn kind(&self) -> u16 {
        self.mode >> 12
    }

    pub fn permissions(&self) -> u16 {
        self.mode & 0o7777
    }
}

/// An image read whole: full paths, `""` for the root.
pub struct Image {
    pub entries: BTreeMap<Vec<u8>, Entry>,
    pub inode_count: u64,
}

/// Files larger than this are not read into memory.
const MAX_CONTENT: u64 = 64 << 20;

impl Image {
    pub fn open(path: &Path) -> Self {
        Self::parse(&std::fs::read(path).unwrap())
    }

    pub fn parse(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len() % BLOCK, 0);
        let superblock = &bytes[1024..BLOCK];
        assert_eq!(u32_at(superblock, 0), 0xe0f5_e1e2);
        let mut zeroed = superblock.to_vec();
        zeroed[4..8].fill(0);
        assert_eq!(
            !crc32c::crc32c(&zeroed),
            u32_at(superblock, 4),
            "superblock checksum"
        );
        assert_eq!(superblock[12], 12);
        assert_eq!(u32_at(superblock, 36) as usize * BLOCK, bytes.len());
        let walker = Walker {
            bytes,
            metadata_at: u32_at(superblock, 40) as usize * BLOCK,
        };
        let root = u64::from(u16_at(superblock, 14));
        let mut entries = BTreeMap::new();
        let mut pending = vec![(Vec::new(), root, root)];
        while let Some((path, nid, parent)) = pending.pop() {
            let entry = walker.inode(nid);
            if entry.kind() == 0o4 {
                let mut subdirectories = 0;
                for (name, child, file_type) in walker.directory(nid, &entry) {
                    match name.as_slice() {
                        b"." => assert_eq!(child, nid),
                        b".." => assert_eq!(child, parent),
                        _ => {
                            let mut full = path.clone();
                            if !full.is_empty() {
                                full.push(b'/');
                            }
                            full.extend(&name);
                            let kind = walker.inode(child).kind();
                            let expected = [0, 5, 3, 0, 2, 0, 4, 0, 1, 0, 7][kind as usize];
                            assert_eq!(file_type, expected, "{}", full.escape_ascii());
                            subdirectories += u32::from(kind == 0o4);
                            pending.push((full, child, nid));
                        }
                    }
                }
                assert_eq!(entry.nlink, 2 + subdirectories, "{}", path.escape_ascii());
            }
            assert!(entries.insert(path, entry).is_none());
        }
        let chunked = entries.values().any(|entry| entry.layout == 4);
        assert_eq!(
            u32_at(superblock, 80),
            if chunked { 4 } else { 0 },
            "feature_incompat"
        );
        let image = Self {
            entries,
            inode_count: u64_at(superblock, 16),
        };
        image.check_links();
        image
    }

    fn check_links(&self) {
        let mut names: BTreeMap<u64, u32> = BTreeMap::new();
        for entry in self.entries.values() {
            *names.entry(entry.nid).or_default() += 1;
        }
        assert_eq!(names.len() as u64, self.inode_count);
        for (path, entry) in &self.entries {
            if entry.kind() != 0o4 {
                assert_eq!(entry.nlink, names[&entry.nid], "{}", path.escape_ascii());
            }
        }
    }

    pub fn get(&self, path: impl AsRef<[u8]>) -> Option<&Entry> {
        self.entries.get(path.as_ref())
    }

    #[track_caller]
    pub fn at(&self, path: impl AsRef<[u8]>) -> &Entry {
        let path = path.as_ref();
        self.get(path).unwrap_or_else(|| {
            panic!(
                "{} is not in the image: {:?}",
                path.escape_ascii(),
                self.paths()
            )
        })
    }

    /// All paths but the root, readable.
    pub fn paths(&self) -> BTreeSet<String> {
        let shown = self
            .entries
            .keys()
            .map(|path| path.escape_ascii().to_string());
        shown.filter(|path| !path.is_empty()).collect()
    }

    #[track_caller]
    pub fn text(&self, path: &str) -> String {
        String::from_utf8(self.at(path).content.clone()).unwrap()
    }
}

struct Walker<'a> {
    bytes: &'a [u8],
    metadata_at: usize,
}

impl Walker<'_> {
    fn inode(&self, nid: u64) -> Entry {
        let at = self.metadata_at + nid as usize * 32;
        let inode = &self.bytes[at..at + 64];
        let format = u16_at(inode, 0);
        assert_eq!(format & 1, 1, "extended inodes only");
        let layout = format >> 1;
        let xattr_bytes = match u16_at(inode, 2) as usize {
            0 => 0,
            count => 12 + (count - 1) * 4,
        };
        let mode = u16_at(inode, 4);
        let word = u32_at(inode, 16);
        let mut entry = Entry {
            nid,
            mode,
            size: u64_at(inode, 8),
            uid: u32_at(inode, 24),
            gid: u32_at(inode, 28),
            mtime: (u64_at(inode, 32) as i64, u32_at(inode, 40)),
            nlink: u32_at(inode, 44),
            rdev: if matches!(mode >> 12, 0o2 | 0o6) {
                word
            } else {
                0
            },
            content: Vec::new(),
            stored_bytes: None,
            layout,
            xattrs: self.xattrs(&self.bytes[at + 64..at + 64 + xattr_bytes]),
        };
        let behind = at + 64 + xattr_bytes;
        match layout {
            _ if matches!(mode >> 12, 0o1 | 0o2 | 0o6) => assert_eq!(entry.size, 0),
            0 => {
                let start = word as usize * BLOCK;
                let end = start + (entry.size as usize);
                entry.content = self.bytes[start..end].to_vec();
                let padding = &self.bytes[end..end.next_multiple_of(BLOCK)];
                assert!(padding.iter().all(|&byte| byte == 0), "padding is zero");
            }
            2 => {
                let tail = entry.size as usize % BLOCK;
                let whole = entry.size as usize - tail;
                assert!(
                    tail > 0 && behind % BLOCK + tail <= BLOCK,
                    "tail within one block"
                );
                let start = word as usize * BLOCK;
                entry.content = self.bytes[start..start + whole].to_vec();
                entry.content.extend(&self.bytes[behind..behind + tail]);
            }
            4 => self.chunked(&mut entry, word, behind),
            other => panic!("layout {other}"),
        }
        entry
    }

    fn chunked(&self, entry: &mut Entry, format: u32, table_at: usize) {
        assert_eq!(format & !0x1f, 0);
        let chunk = BLOCK << format;
        let count = (entry.size as usize).div_ceil(chunk);
        let mut stored = 0;
        let keep = entry.size <= MAX_CONTENT;
        for index in 0..count {
            let length = chunk.min(entry.size as usize - index * chunk);
            let address = u32_at(self.bytes, table_at + 4 * index);
            if address == u32::MAX {
                if keep {
                    entry.content.resize(entry.content.len() + length, 0);
                }
                continue;
            }
            let start = address as usize * BLOCK;
            let data = &self.bytes[start..start + length];
            stored += length.next_multiple_of(BLOCK) as u64;
            if keep {
                entry.content.extend(data);
            }
        }
        entry.stored_bytes = Some(stored);
    }

    fn xattrs(&self, mut area: &[u8]) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut xattrs = BTreeMap::new();
        if area.is_empty() {
            return xattrs;
        }
        assert!(
            area[..12].iter().all(|&byte| byte == 0),
            "no shared attributes"
        );
        area = &area[12..];
        assert!(!area.is_empty(), "an attribute area is not empty");
        while !area.is_empty() {
            let (name_length, value_length) = (area[0] as usize, u16_at(area, 2) as usize);
            let prefix: &[u8] = match area[1] {
                1 => b"user.",
                2 => b"system.posix_acl_access",
                3 => b"system.posix_acl_default",
                4 => b"trusted.",
                6 => b"security.",
                other => panic!("attribute namespace {other}"),
            };
            let mut name = prefix.to_vec();
            name.extend(&area[4..4 + name_length]);
            let value = area[4 + name_length..4 + name_length + value_length].to_vec();
            assert!(xattrs.insert(name, value).is_none());
            area = &area[(4 + name_length + value_length).next_multiple_of(4)..];
        }
        xattrs
    }

    fn directory(&self, nid: u64, entry: &Entry) -> Vec<(Vec<u8>, u64, u8)> {
        let mut found = Vec::new();
        for block in entry.content.chunks(BLOCK) {
            let count = u16_at(block, 8) as usize / 12;
            for index in 0..count {
                let dirent = &block[index * 12..index * 12 + 12];
                let start = u16_at(dirent, 8) as usize;
                let end = if index + 1 < count {
                    u16_at(block, (index + 1) * 12 + 8) as usize
                } else {
                    let rest = &block[start..];
                    start
                        + rest
                            .iter()
                            .position(|&byte| byte == 0)
                            .unwrap_or(rest.len())
                };
                found.push((block[start..end].to_vec(), u64_at(dirent, 0), dirent[10]));
            }
        }
        let sorted = found.windows(2).all(|pair| pair[0].0 < pair[1].0);
        assert!(sorted, "directory {nid} is sorted and has each name once");
        found
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
