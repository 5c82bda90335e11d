//! Streams: what comes out is what went in, what was shared is shared, and whatever is cut or changed is refused.

mod support;

use std::sync::Arc;

use blockpool::{
    BLOCK_BYTES, CrashChoice, DatasetOptions, Name, Object, Pool, PoolError, RECORD_BYTES,
    SimulatedDisk,
};
use support::Numbers;
use support::machine::verify_accounting;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn new_pool(size_bytes: u64, id: u8) -> (SimulatedDisk, Pool) {
    let disk = SimulatedDisk::new(size_bytes);
    let pool = Pool::create(Arc::new(disk.clone()), size_bytes, [id; 16]).unwrap();
    (disk, pool)
}

fn noise(seed: u64, length: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    (0..length).map(|_| numbers.next() as u8).collect()
}

fn content(pool: &Pool, text: &str) -> Vec<u8> {
    let object = pool.open_object(&name(text)).unwrap();
    let mut bytes = vec![0xee; object.size_bytes().unwrap() as usize];
    object.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn send(pool: &Pool, snapshot: &str, from: Option<&str>) -> Vec<u8> {
    let mut stream = Vec::new();
    let sent = pool
        .send(&name(snapshot), from, None, &mut stream, |_| ())
        .unwrap();
    assert_eq!(sent.stream_bytes, stream.len() as u64);
    stream
}

fn receive(pool: &Pool, stream: &[u8]) -> Result<blockpool::Received, PoolError> {
    pool.receive(None, false, &mut &stream[..], |_| ())
}

/// Everything below the dataset but times, ids and the state of receives.
fn listing(pool: &Pool) -> Vec<(String, u64)> {
    let listed = pool.list(None).unwrap().into_iter();
    listed
        .filter(|entry| !entry.name.starts_with('%'))
        .map(|entry| (entry.name, entry.size_bytes))
        .collect()
}

fn assert_same(a: &Pool, b: &Pool, names: &[&str]) {
    for text in names {
        assert!(content(a, text) == content(b, text), "'{text}' differs");
    }
}

const NAMES: [&str; 6] = ["d/a@1", "d/b@1", "d/c@1", "d/a", "d/b", "d/c"];

/// Objects that share: whole clones, ranges, parts of records, an end that is no whole block.
fn source() -> (SimulatedDisk, Pool) {
    let (disk, pool) = new_pool(64 << 20, 1);
    pool.create_dataset(&name("d")).unwrap();
    let a = pool.create_object(&name("d/a"), (9 << 20) + 1234).unwrap();
    a.write_at(&noise(1, 2 << 20), 0).unwrap();
    a.write_at(&noise(2, 70_001), (9 << 20) - 68_767).unwrap();
    let b = pool.clone_object(&name("d/a"), &name("d/b")).unwrap();
    b.write_at(&noise(3, 5000), 300_000).unwrap();
    b.punch_hole(500_000, 100_000).unwrap();
    let c = pool.create_object(&name("d/c"), 1 << 20).unwrap();
    c.write_at(&noise(4, 100_000), 0).unwrap();
    pool.clone_range(&a, 0, &c, 10 * RECORD_BYTES, 4 * RECORD_BYTES)
        .unwrap();
    pool.clone_range(&c, 0, &c, 5 * RECORD_BYTES, RECORD_BYTES)
        .unwrap();
    c.write_at(&noise(5, 4096), 11 * RECORD_BYTES + 8192)
        .unwrap();
    pool.snapshot(&name("d@1")).unwrap();
    (disk, pool)
}

#[test]
fn a_dataset_arrives_as_it_was_and_shares_what_it_shared() {
    let (_, from) = source();
    let stream = send(&from, "d@1", None);
    let blocks = |bytes: u64| bytes.div_ceil(BLOCK_BYTES);
    // Each block once: the three writes of a, two of b (a hole's ends are blocks), two of c.
    let expected = blocks(2 << 20) + 19 + 3 + 2 + blocks(100_000) + 1;
    assert!(
        stream.len() as u64 <= expected * BLOCK_BYTES + 10_000,
        "{} blocks of data, {expected} expected",
        stream.len() as u64 / BLOCK_BYTES
    );
    let (_, to) = new_pool(64 << 20, 2);
    let received = receive(&to, &stream).unwrap();
    assert_eq!((received.objects, received.dataset.as_str()), (3, "d"));
    assert_eq!(listing(&from), listing(&to));
    assert_same(&from, &to, &NAMES);
    verify_accounting(&to);
    let (there, here) = (from.space().data_bytes, to.space().data_bytes);
    assert!(here <= there + 4 * RECORD_BYTES, "{here} for {there}");
    assert_eq!(to.partial_receives().unwrap(), []);
    assert!(matches!(
        receive(&to, &stream),
        Err(PoolError::Exists { .. })
    ));
    assert_eq!(to.partial_receives().unwrap(), []);
}

#[test]
fn a_block_that_ten_objects_share_travels_once() {
    let (_, from) = new_pool(64 << 20, 1);
    from.create_dataset(&name("d")).unwrap();
    let base = from.create_object(&name("d/base"), 16 << 20).unwrap();
    base.write_at(&noise(1, 16 << 20), 0).unwrap();
    for index in 0..10 {
        let clone = from
            .clone_object(&name("d/base"), &name(&format!("d/clone{index}")))
            .unwrap();
        clone
            .write_at(&noise(index, 4096), index * 9 * 4096)
            .unwrap();
    }
    from.snapshot(&name("d@s")).unwrap();
    let stream = send(&from, "d@s", None);
    assert!(stream.len() < (16 << 20) + 300_000, "{}", stream.len());
    let (_, to) = new_pool(64 << 20, 2);
    receive(&to, &stream).unwrap();
    assert!(to.space().data_bytes < (16 << 20) + 11 * RECORD_BYTES);
    for index in 0..10 {
        let text = format!("d/clone{index}@s");
        assert_same(&from, &to, &[&text]);
    }
    verify_accounting(&to);
}

fn change(pool: &Pool, seed: u64) {
    let mut numbers = Numbers(seed);
    let objects: Vec<Object> = ["d/a", "d/b", "d/c"]
        .iter()
        .map(|text| pool.open_object(&name(text)).unwrap())
        .collect();
    for _ in 0..20 {
        let object = &objects[numbers.below(3) as usize];
        let size_bytes = object.size_bytes().unwrap();
        let offset = numbers.below(size_bytes - 9000);
        match numbers.below(3) {
            0 => object.punch_hole(offset, 8000).unwrap(),
            1 => {
                let other = &objects[numbers.below(3) as usize];
                let (from, to) = (numbers.below(4), 4 + numbers.below(4));
                pool.clone_range(
                    other,
                    from * RECORD_BYTES,
                    object,
                    to * RECORD_BYTES,
                    RECORD_BYTES,
                )
                .unwrap();
            }
            _ => object
                .write_at(&noise(numbers.next(), 8000), offset)
                .unwrap(),
        }
    }
}

#[test]
fn differences_build_on_each_other_and_new_objects_share_with_old_ones() {
    let (_, from) = source();
    let (_, to) = new_pool(64 << 20, 2);
    receive(&to, &send(&from, "d@1", None)).unwrap();
    for round in 2..8 {
        change(&from, round);
        let (old, new) = (format!("{}", round - 1), format!("{round}"));
        if round == 4 {
            from.clone_object(&name("d/a"), &name("d/new")).unwrap();
            let c = from.open_object(&name("d/c")).unwrap();
            c.set_size(700_000).unwrap();
            from.open_object(&name("d/b"))
                .unwrap()
                .set_size(10 << 20)
                .unwrap();
        }
        from.snapshot(&name(&format!("d@{new}"))).unwrap();
        let stream = send(&from, &format!("d@{new}"), Some(&old));
        assert!(stream.len() < 400_000, "{}", stream.len());
        let received = receive(&to, &stream).unwrap();
        assert_eq!(received.objects, if round < 4 { 3 } else { 4 });
        assert_eq!(listing(&from), listing(&to));
        for object in ["a", "b", "c"] {
            let texts = [format!("d/{object}"), format!("d/{object}@{new}")];
            assert_same(&from, &to, &[&texts[0], &texts[1]]);
        }
        verify_accounting(&to);
    }
    // And back: a snapshot that was received is the same snapshot.
    let b = to.open_object(&name("d/b")).unwrap();
    b.write_at(&noise(9, 9000), 5).unwrap();
    to.snapshot(&name("d/b@back")).unwrap();
    let stream = send(&to, "d/b@back", Some("7"));
    assert!(stream.len() < 40_000);
    receive(&from, &stream).unwrap();
    assert_same(&from, &to, &["d/b", "d/b@back"]);
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let (_, from) = source();
    let (_, to) = new_pool(64 << 20, 2);
    let whole = send(&from, "d@1", None);
    change(&from, 1);
    from.snapshot(&name("d@2")).unwrap();
    let difference = send(&from, "d@2", Some("1"));
    let text = |result: Result<blockpool::Received, PoolError>| result.unwrap_err().to_string();
    assert!(text(receive(&to, &difference)).contains("builds on a snapshot"));
    receive(&to, &whole).unwrap();
    let a = to.open_object(&name("d/a")).unwrap();
    a.write_at(&[1; 5], 7).unwrap();
    assert!(text(receive(&to, &difference)).contains("changed since"));
    assert_eq!(to.list(None).unwrap().len(), 7);
    to.receive(None, true, &mut &difference[..], |_| ())
        .unwrap();
    assert_same(&from, &to, &["d/a", "d/a@2"]);
    for (snapshot, base) in [
        ("d@1", Some("2")),
        ("d@1", Some("1")),
        ("d@x", None),
        ("d/a", None),
    ] {
        let result = from.send(&name(snapshot), base, None, &mut Vec::new(), |_| ());
        assert!(result.is_err(), "{snapshot} {base:?}");
    }
    let result = to.receive(Some(&name("e/a")), false, &mut &whole[..], |_| ());
    assert!(matches!(result, Err(PoolError::Name { .. })));
    let received = to
        .receive(Some(&name("e")), false, &mut &whole[..], |_| ())
        .unwrap();
    assert_eq!(received.dataset, "e");
    assert!(content(&to, "e/a") == content(&from, "d/a@1"));
}

/// Where frames begin, the end of the header first.
fn frames(stream: &[u8]) -> Vec<usize> {
    let mut at = 24;
    let mut found = vec![];
    while at < stream.len() {
        found.push(at);
        let length = &stream[at + 8..at + 12];
        at += 12 + u32::from_le_bytes(length.try_into().unwrap()) as usize;
    }
    found
}

fn small_stream() -> (Pool, Vec<u8>) {
    let (_, pool) = new_pool(16 << 20, 1);
    pool.create_dataset(&name("d")).unwrap();
    let a = pool.create_object(&name("d/a"), 600_000).unwrap();
    a.write_at(&noise(1, 9000), 100_000).unwrap();
    let b = pool.clone_object(&name("d/a"), &name("d/b")).unwrap();
    b.write_at(&noise(2, 5000), 300_000).unwrap();
    pool.clone_range(&a, RECORD_BYTES, &b, 6 * RECORD_BYTES, RECORD_BYTES)
        .unwrap();
    pool.snapshot(&name("d@1")).unwrap();
    let stream = send(&pool, "d@1", None);
    (pool, stream)
}

#[test]
fn a_stream_that_is_cut_anywhere_is_refused_and_goes_on_with_its_token() {
    let (from, stream) = small_stream();
    let mut cuts: Vec<usize> = frames(&stream)
        .into_iter()
        .flat_map(|at| [at, at + 1, at + 11, at + 12, at + 13])
        .collect();
    cuts.extend((0..24).chain([stream.len() - 1]));
    for cut in cuts.into_iter().filter(|cut| *cut < stream.len()) {
        let (disk, to) = new_pool(16 << 20, 2);
        let error = receive(&to, &stream[..cut]).unwrap_err();
        assert!(
            matches!(error.reason(), PoolError::Stream { .. }),
            "{cut}: {error}"
        );
        assert_eq!(listing(&to), [], "at {cut}");
        verify_accounting(&to);
        // What is left survives a crash.
        drop(to);
        let to = Pool::open(Arc::new(disk.clone())).unwrap();
        let partial = to.partial_receives().unwrap();
        let token = partial.first().map(|partial| partial.token.clone());
        let mut rest = Vec::new();
        let sent = from
            .send(&name("d@1"), None, token.as_deref(), &mut rest, |_| ())
            .unwrap();
        assert_eq!(sent.stale_token, None);
        let received = receive(&to, &rest).unwrap();
        assert!(!received.is_started_over || !received.is_resumed);
        assert_same(&from, &to, &["d/a", "d/b", "d/a@1", "d/b@1"]);
        assert_eq!(to.partial_receives().unwrap(), []);
        verify_accounting(&to);
    }
}

#[test]
fn no_changed_bit_of_a_stream_is_overlooked() {
    let (_, stream) = small_stream();
    let mut numbers = Numbers(6);
    let mut places: Vec<usize> = (0..2000)
        .map(|_| numbers.below(stream.len() as u64) as usize)
        .collect();
    places.extend(0..24);
    for at in frames(&stream) {
        places.extend(at..(at + 40).min(stream.len()));
    }
    let (_, to) = new_pool(16 << 20, 2);
    for at in places {
        let mut changed = stream.clone();
        changed[at] ^= 1 << numbers.below(8);
        let error = receive(&to, &changed).unwrap_err();
        assert!(
            matches!(
                error.reason(),
                PoolError::Stream { .. } | PoolError::StreamVersion { .. }
            ),
            "at {at}: {error}"
        );
        assert_eq!(listing(&to), []);
    }
    verify_accounting(&to);
    receive(&to, &stream).unwrap();
}

#[test]
fn frames_that_are_left_out_moved_or_of_another_stream_are_refused() {
    let (_, stream) = small_stream();
    let places = frames(&stream);
    let part = |index: usize| {
        let end = places.get(index + 1).copied().unwrap_or(stream.len());
        &stream[places[index]..end]
    };
    let (_, other) = source();
    let other = send(&other, "d@1", None);
    let (_, to) = new_pool(16 << 20, 2);
    for index in 0..places.len() {
        let mut bytes = stream[..24].to_vec();
        for keep in (0..places.len()).filter(|keep| *keep != index) {
            bytes.extend_from_slice(part(keep));
        }
        assert!(receive(&to, &bytes).is_err(), "without {index}");
        let mut bytes = stream[..places[index]].to_vec();
        bytes.extend_from_slice(&other[places[index].min(other.len())..]);
        assert!(receive(&to, &bytes).is_err(), "another one's {index}");
        if index + 1 < places.len() {
            let mut bytes = stream[..places[index]].to_vec();
            bytes.extend_from_slice(part(index + 1));
            bytes.extend_from_slice(part(index));
            bytes.extend_from_slice(&stream[(places[index + 1] + part(index + 1).len())..]);
            assert!(receive(&to, &bytes).is_err(), "swapped {index}");
        }
    }
    assert_eq!(listing(&to), []);
}

/// A stream with a version of its own and a right checksum.
fn with_version(stream: &[u8], version: u32) -> Vec<u8> {
    let mut bytes = stream.to_vec();
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..24]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

#[test]
fn another_version_and_what_is_no_stream_are_named() {
    let (_, stream) = small_stream();
    let (_, to) = new_pool(16 << 20, 2);
    for version in [0, 3, u32::MAX] {
        let error = receive(&to, &with_version(&stream, version)).unwrap_err();
        let PoolError::StreamVersion { found, known: 2 } = error else {
            panic!("{error}");
        };
        assert_eq!(found, version);
    }
    for bytes in [&b""[..], b"hello", &[0; 100], &[0xff; 5000]] {
        let error = receive(&to, bytes).unwrap_err();
        assert!(matches!(error, PoolError::Stream { .. }), "{error}");
    }
    assert_eq!(to.list(None).unwrap(), []);
}

#[test]
fn a_stream_of_version_1_is_read() {
    let (from, stream) = small_stream();
    let (id, mut frames) = support::restream::split(&stream);
    // It did not end with the options of the dataset.
    assert_eq!(frames[0].1.pop(), Some(0));
    let stream = with_version(&support::restream::join(id, &frames), 1);
    let (_, to) = new_pool(16 << 20, 2);
    receive(&to, &stream).unwrap();
    assert_eq!(listing(&to), listing(&from));
    frames[0].1.push(0);
    let longer = with_version(&support::restream::join(id, &frames), 1);
    let (_, to) = new_pool(16 << 20, 3);
    let error = receive(&to, &longer).unwrap_err();
    assert!(matches!(error, PoolError::Stream { .. }), "{error}");
}

#[test]
fn a_stale_token_starts_over_and_a_wrong_one_is_refused() {
    let (from, stream) = small_stream();
    let (_, to) = new_pool(16 << 20, 2);
    receive(&to, &stream[..stream.len() - 50]).unwrap_err();
    let token = to.partial_receives().unwrap()[0].token.clone();
    // Another pool cannot go on with it.
    let mut rest = Vec::new();
    let resume =
        |from: &Pool, rest: &mut Vec<u8>| from.send(&name("d@1"), None, Some(&token), rest, |_| ());
    resume(&from, &mut rest).unwrap();
    assert!(rest.len() < stream.len());
    let (_, other) = new_pool(16 << 20, 3);
    let error = receive(&other, &rest).unwrap_err().to_string();
    assert!(error.contains("without --resume"), "{error}");
    assert_eq!(other.list(None).unwrap(), []);
    // The snapshot is made anew: the token is of another one.
    from.destroy(&name("d@1"), false).unwrap();
    from.open_object(&name("d/a"))
        .unwrap()
        .write_at(&[3; 9], 0)
        .unwrap();
    from.snapshot(&name("d@1")).unwrap();
    let mut whole = Vec::new();
    let sent = resume(&from, &mut whole).unwrap();
    assert!(sent.stale_token.is_some());
    receive(&to, &whole).unwrap();
    assert_same(&from, &to, &["d/a", "d/b"]);
    // What the old one left is there until it is removed; sent again from its beginning, a stream drops what it had itself.
    assert_eq!(to.partial_receives().unwrap().len(), 1);
    let (_, third) = new_pool(16 << 20, 3);
    receive(&third, &whole[..whole.len() - 50]).unwrap_err();
    assert!(receive(&third, &whole).unwrap().is_started_over);
    let error = from.send(&name("d@1"), None, Some("1-2-3"), &mut Vec::new(), |_| ());
    assert!(matches!(error, Err(PoolError::Token { .. })));
}

#[test]
fn a_crash_in_the_middle_leaves_all_of_it_or_none() {
    let (from, stream) = small_stream();
    let (disk, to) = new_pool(16 << 20, 2);
    to.flush().unwrap();
    disk.start_recording();
    receive(&to, &stream[..stream.len() / 3]).unwrap_err();
    for part in [2, 3, 3] {
        let token = to.partial_receives().unwrap().remove(0).token;
        let mut rest = Vec::new();
        from.send(&name("d@1"), None, Some(&token), &mut rest, |_| ())
            .unwrap();
        if part == 2 {
            receive(&to, &rest[..rest.len() / 2]).unwrap_err();
        } else if to.list(Some(&name("d"))).is_err() {
            receive(&to, &rest[..rest.len()]).unwrap();
            break;
        }
    }
    let mut numbers = Numbers(1);
    let (mut none, mut all) = (0, 0);
    for events in 0..=disk.events().len() {
        let left = disk.after_crash(events, |_| match numbers.below(3) {
            0 => CrashChoice::Keep,
            1 => CrashChoice::Lose,
            _ => CrashChoice::Tear(numbers.below(9) as usize),
        });
        let pool = Pool::open(Arc::new(left)).unwrap();
        verify_accounting(&pool);
        match listing(&pool).len() {
            // The dataset alone is made before.
            0 | 1 => none += 1,
            5 => {
                all += 1;
                assert_same(&from, &pool, &["d/a", "d/b", "d/a@1", "d/b@1"]);
            }
            _ => panic!("{:?} at {events}", listing(&pool)),
        }
        if let Some(partial) = pool.partial_receives().unwrap().first() {
            let mut rest = Vec::new();
            let token = Some(partial.token.as_str());
            from.send(&name("d@1"), None, token, &mut rest, |_| ())
                .unwrap();
            receive(&pool, &rest).unwrap();
            assert_same(&from, &pool, &["d/a", "d/b", "d/a@1", "d/b@1"]);
        }
    }
    assert!(none > 10 && all > 0, "{none} {all}");
}

#[test]
fn what_is_damaged_is_not_sent_and_a_checked_dataset_receives_checked() {
    let (disk, from) = source();
    from.scrub(|_| ()).unwrap();
    let (_, to) = new_pool(64 << 20, 2);
    to.create_dataset(&name("d")).unwrap();
    to.set_options(
        &name("d"),
        DatasetOptions {
            checksum: true,
            ..DatasetOptions::default()
        },
    )
    .unwrap();
    receive(&to, &send(&from, "d@1", None)).unwrap();
    assert_same(&from, &to, &NAMES);
    assert!(to.scrub(|_| ()).unwrap().data_blocks > 500);
    let victim = noise(1, 4096);
    for piece in disk.written_pieces() {
        let mut bytes = vec![0; 4096];
        blockpool::Disk::read_at(&disk, &mut bytes, piece).unwrap();
        if bytes == victim {
            disk.flip_bit(piece + 5, 5);
        }
    }
    let from = Pool::open(Arc::new(disk.copy())).unwrap();
    let result = from.send(&name("d@1"), None, None, &mut Vec::new(), |_| ());
    assert!(
        matches!(result, Err(PoolError::Damaged { .. })),
        "{result:?}"
    );
}

#[test]
fn wrong_values_under_right_checksums_make_no_panic_and_no_half_of_anything() {
    let (_, from) = source();
    let whole = send(&from, "d@1", None);
    let (_, to) = new_pool(64 << 20, 2);
    receive(&to, &whole).unwrap();
    change(&from, 1);
    from.snapshot(&name("d@2")).unwrap();
    let streams = [whole, send(&from, "d@2", Some("1"))];
    let before = listing(&to);
    let contents: Vec<_> = NAMES.iter().map(|text| content(&to, text)).collect();
    let mut numbers = Numbers(8);
    let mut received = 0;
    for round in 0..400 {
        let (id, mut frames) = support::restream::split(&streams[round % 2]);
        for _ in 0..1 + numbers.below(3) {
            let how: Vec<u8> = (0..12).map(|_| numbers.next() as u8).collect();
            support::restream::change(&mut frames, &how);
        }
        let stream = support::restream::join(id, &frames);
        let target = (round % 2 == 0).then(|| name("e"));
        match to.receive(target.as_ref(), false, &mut &stream[..], |_| ()) {
            Ok(_) if target.is_some() => drop(to.destroy(&name("e"), true)),
            // A difference that is wrong under right checksums is what somebody sent.
            Ok(_) => {
                received += 1;
                for text in to.list(Some(&name("d"))).unwrap() {
                    if text.name.contains('@') && !text.name.ends_with("@1") {
                        to.destroy(&name(&text.name), false).unwrap();
                    }
                }
                to.rollback(&name("d@1")).unwrap();
                for (text, _) in listing(&to) {
                    if !before.iter().any(|(known, _)| *known == text) {
                        let _ = to.destroy(&name(&text), true);
                    }
                }
            }
            Err(_) => {}
        }
        for partial in to.partial_receives().unwrap() {
            to.destroy(&name(&partial.dataset), true).unwrap();
        }
        let known = listing(&to);
        let known: Vec<_> = known.into_iter().filter(|(text, _)| text != "e").collect();
        assert_eq!(known, before, "round {round}");
    }
    for (text, expected) in NAMES.iter().zip(&contents) {
        assert!(content(&to, text) == *expected, "'{text}' changed");
    }
    verify_accounting(&to);
    println!("{received} received");
}
