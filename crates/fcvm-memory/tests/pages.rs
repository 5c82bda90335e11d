//! Page files against a model, damage in them, and the memory of a real process.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use fcvm_memory::page_file::{anonymous_file, seal};
use fcvm_memory::{
    CapturedPages, Content, GuestMapping, MemoryError, PAGE_BYTES, PageFile, PageRun,
};
use proptest::prelude::*;

const PAGE: usize = PAGE_BYTES as usize;

fn memory(pages: &[u8]) -> File {
    let file = anonymous_file("fcvm-test", (pages.len() * PAGE) as u64).unwrap();
    for (index, byte) in pages.iter().enumerate().filter(|(_, byte)| **byte != 0) {
        // 255 stands for a page that is written and zero.
        let content = if *byte == 255 { 0 } else { *byte };
        file.write_all_at(&[content; PAGE], (index * PAGE) as u64)
            .unwrap();
    }
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn captured(changes: &[(usize, u8)]) -> CapturedPages {
    let mut pages = CapturedPages::default();
    for (page, byte) in changes {
        pages.runs.push(PageRun {
            first: *page as u64,
            count: 1,
        });
        pages.bytes.extend([*byte; PAGE]);
    }
    pages
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn memories_and_their_differences_come_back(
        pages in prop::collection::vec(prop_oneof![3 => Just(0), 1 => Just(255), 3 => any::<u8>()], 1..700),
        changes in prop::collection::btree_map(0..700_usize, any::<u8>(), 0..60),
    ) {
        let source = memory(&pages);
        let stored = tempfile::tempfile().unwrap();
        PageFile::write_whole(&source, &stored).unwrap();
        let whole = PageFile::open(stored).unwrap();
        prop_assert_eq!(whole.content(), Content::Whole);
        prop_assert_eq!(whole.page_count(), pages.iter().filter(|byte| !matches!(byte, 0 | 255)).count() as u64);
        let restored = anonymous_file("fcvm-test", whole.memory_bytes()).unwrap();
        whole.restore_into(&restored).unwrap();
        prop_assert!(content(&restored) == content(&source));

        let changes: Vec<(usize, u8)> = changes.into_iter().filter(|(page, _)| *page < pages.len()).collect();
        let below = content(&source);
        let is_same = |offset: u64, page: &[u8]| below[offset as usize..][..PAGE] == *page;
        let stored = tempfile::tempfile().unwrap();
        PageFile::write_difference(&captured(&changes), whole.memory_bytes(), &stored, is_same).unwrap();
        let difference = PageFile::open(stored).unwrap();
        prop_assert_eq!(difference.content(), Content::Difference);
        let differing = changes.iter().filter(|(page, byte)| below[page * PAGE] != *byte).count();
        prop_assert_eq!(difference.page_count(), differing as u64);
        difference.restore_into(&restored).unwrap();
        let mut expected = below.clone();
        for (page, byte) in &changes {
            expected[page * PAGE..][..PAGE].fill(*byte);
        }
        prop_assert!(content(&restored) == expected);

        // The same by comparison of the two memories.
        let stored = tempfile::tempfile().unwrap();
        PageFile::write_comparison(&restored, &source, &stored).unwrap();
        let compared = PageFile::open(stored).unwrap();
        prop_assert_eq!(compared.content(), Content::Difference);
        prop_assert_eq!(compared.page_count(), differing as u64);
        compared.restore_into(&source).unwrap();
        prop_assert!(content(&source) == expected);
        let other = memory(&[1]);
        let stored = tempfile::tempfile().unwrap();
        let compared = PageFile::write_comparison(&restored, &other, &stored);
        let is_refused = matches!(compared, Err(MemoryError::Size { .. }));
        prop_assert_eq!(is_refused, pages.len() != 1);
    }
}

#[test]
fn every_flipped_bit_of_header_index_and_pages_is_found() {
    let stored = tempfile::tempfile().unwrap();
    PageFile::write_whole(&memory(&[1, 0, 2, 3]), &stored).unwrap();
    let good = content(&stored);
    let is_found = |bytes: &[u8]| {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        PageFile::open(file).and_then(|file| file.verify()).is_err()
    };
    assert!(!is_found(&good));
    for at in (0..44).chain(4096..good.len()) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        // The upper half of an entry's last word is reserved.
        let entry = at.checked_sub(good.len() - 2 * 24).map(|at| at % 24);
        assert!(
            is_found(&bytes) || entry.is_some_and(|at| at >= 20),
            "byte {at}"
        );
    }
    for length in [0, 1, 4095, 4096, 8192, good.len() - 1] {
        assert!(is_found(&good[..length]), "{length} bytes");
    }
    assert!(is_found(&[&good[..], b"x"].concat()));
}

#[test]
fn another_version_and_another_size_are_told() {
    let stored = tempfile::tempfile().unwrap();
    PageFile::write_whole(&memory(&[1, 2]), &stored).unwrap();
    let other = anonymous_file("fcvm-test", 3 * PAGE_BYTES).unwrap();
    let error = PageFile::open(stored.try_clone().unwrap())
        .unwrap()
        .restore_into(&other)
        .unwrap_err();
    assert!(
        matches!(
            error,
            MemoryError::Size {
                found: 8192,
                expected: 12288
            }
        ),
        "{error}"
    );
    stored.write_all_at(&[2], 8).unwrap();
    let error = PageFile::open(stored).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the memory file has version 2, and this fcvm knows version 1: use a newer fcvm"
    );
}

/// A child that maps a memory file copy-on-write, writes to some pages and then waits.
const MAPPER: &str = r#"
import mmap, os, sys
fd, pages = int(sys.argv[1]), int(sys.argv[2])
m = mmap.mmap(fd, pages * 4096, mmap.MAP_PRIVATE)
for page in map(int, sys.argv[3:]):
    m[page * 4096] = 200
print("ready", flush=True)
for line in sys.stdin:
    page = int(line)
    print(m[page * 4096], m[page * 4096 + 4095], flush=True)
"#;

#[test]
fn pages_of_a_process_are_read_and_written() {
    let pages: Vec<u8> = (0..64).map(|page| page % 5).collect();
    let file = memory(&pages);
    seal(&file).unwrap();
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).unwrap();
    let fd = file.as_raw_fd().to_string();
    let child = Command::new("python3")
        .args(["-c", MAPPER, &fd, "64", "0", "7", "8", "63"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            println!("skipped: python3 cannot be run ({error})");
            return;
        }
    };
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    let mapping = GuestMapping::find(child.id() as i32, &file).unwrap();
    let mut captured = CapturedPages::default();
    mapping.capture(&mut captured).unwrap();
    let run = |first, count| PageRun { first, count };
    assert_eq!(captured.runs, [run(0, 1), run(7, 2), run(63, 1)]);
    assert_eq!(captured.bytes.len(), 4 * PAGE);
    assert_eq!(
        (captured.bytes[PAGE], captured.bytes[2 * PAGE - 1]),
        (200, 2)
    );

    let stored = anonymous_file("fcvm-test", 0).unwrap();
    let mut changed = CapturedPages::default();
    for (page, byte) in [(1, 77), (2, 0), (63, 78)] {
        changed.runs.push(run(page, 1));
        changed.bytes.extend([byte; PAGE]);
    }
    PageFile::write_difference(&changed, 64 * PAGE_BYTES, &stored, |_, _| false).unwrap();
    mapping.apply(&PageFile::open(stored).unwrap()).unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for (page, expected) in [
        (0, "200 0"),
        (1, "77 77"),
        (2, "0 0"),
        (3, "3 3"),
        (63, "78 78"),
    ] {
        writeln!(stdin, "{page}").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), expected, "page {page}");
    }
    // The file that others map has not changed.
    let expected: Vec<u8> = pages.iter().flat_map(|byte| [*byte; PAGE]).collect();
    assert!(content(&file) == expected);
    let other = anonymous_file("fcvm-test", PAGE_BYTES).unwrap();
    assert!(GuestMapping::find(child.id() as i32, &other).is_err());
    drop(stdin);
    child.wait().unwrap();
}
