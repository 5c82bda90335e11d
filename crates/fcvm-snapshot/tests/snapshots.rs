//! Snapshots against a model in bytes, and what happens to those that are damaged, removed or half made.

mod lab;
mod model;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use fcvm_snapshot::{Manifest, SnapshotError, SnapshotStore, Swept};
use lab::{Lab, PAGE, disk_of, fields, memory_of, pages_over, read_all, tag};

#[test]
fn what_was_written_is_read() {
    let lab = Lab::new();
    let bytes = lab::pattern(8);
    let memory = memory_of(&bytes);
    let mut draft = lab.store.begin(&tag("one")).unwrap();
    draft.write_memory_whole(&memory, None).unwrap();
    draft.write_state(b"devices").unwrap();
    draft.write_disk(&disk_of(lab.path(), b"a disk")).unwrap();
    assert!(lab.store.list().unwrap().is_empty());
    let made = draft.finish(fields()).unwrap();
    let opened = lab.store.open(&tag("one")).unwrap();
    assert_eq!(made.manifest(), opened.manifest());
    assert_eq!(opened.manifest().fields, fields());
    let mut last = (0, 0);
    let loaded = opened
        .load_memory(|done, total| last = (done, total))
        .unwrap();
    assert_eq!(read_all(&loaded), bytes);
    assert!(last.0 == last.1 && last.1 > 0, "{last:?}");
    assert!(loaded.write_at(b"x", 0).is_err(), "it is sealed");
    assert_eq!(opened.device_state().unwrap(), b"devices");
    let disk = opened.disk().unwrap();
    assert_eq!(&read_all(&disk.layers()[0].file)[..6], b"a disk");
    assert!(disk.layers()[0].file.write_at(b"x", 0).is_err());
    opened.verify().unwrap();
    assert!(opened.disk_space().unwrap().own_bytes > 0);
    let folder = lab.store.directory().join("one");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    for name in ["manifest.json", "memory.pages", "state.bin"] {
        assert_eq!(mode(&folder.join(name)), 0o600, "{name}");
    }
    assert!(!format!("{:?}", opened.manifest()).contains("secret"));
}

#[test]
fn a_working_set_is_kept_with_its_snapshot_alone() {
    let lab = Lab::new();
    let make = |name: &str| {
        let mut draft = lab.store.begin(&tag(name)).unwrap();
        let memory = memory_of(&lab::pattern(8));
        draft.write_memory_whole(&memory, None).unwrap();
        draft.write_state(b"devices").unwrap();
        draft.finish(fields()).unwrap()
    };
    let (one, two) = (make("one"), make("two"));
    assert_eq!(one.working_set().unwrap(), None);
    // Bytes of a set of pages 5 and 1, as docs/format/snapshot.md tells.
    let path = |snapshot: &str| lab.store.directory().join(snapshot).join("working-set.bin");
    let mut bytes = b"FCVMWSET\x01\0\0\0\x01\0\0\0".to_vec();
    bytes.extend((8 * PAGE as u64).to_le_bytes());
    let id = u128::from_str_radix(one.manifest().id.as_str(), 16).unwrap();
    bytes.extend(id.to_be_bytes());
    bytes.extend(2_u32.to_le_bytes());
    let entries = [5_u64, 1].map(|page| [&page.to_le_bytes()[..], &1_u32.to_le_bytes()].concat());
    let entries = entries.concat();
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes), &entries);
    bytes.extend(checksum.to_le_bytes());
    bytes.extend(entries);
    fs::write(path("one"), &bytes).unwrap();
    let set = one.working_set().unwrap().unwrap();
    let pages: Vec<u64> = set.runs().iter().map(|run| run.first).collect();
    assert_eq!((pages, set.is_complete()), (vec![5, 1], true));
    // Kept anew it is the same file; another snapshot's is refused.
    assert!(one.store_working_set(&set).unwrap());
    assert_eq!(fs::read(path("one")).unwrap(), bytes);
    // A part of one does not take its place.
    let mut part = bytes.clone();
    part[12] = 0;
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&part[..44]), &part[48..]);
    part[44..48].copy_from_slice(&checksum.to_le_bytes());
    fs::write(path("one"), &part).unwrap();
    let part = one.working_set().unwrap().unwrap();
    assert!(!part.is_complete() && one.store_working_set(&set).unwrap());
    assert!(!one.store_working_set(&part).unwrap());
    assert_eq!(fs::read(path("one")).unwrap(), bytes);
    assert_eq!(
        fs::metadata(path("one")).unwrap().permissions().mode() & 0o777,
        0o600
    );
    fs::copy(path("one"), path("two")).unwrap();
    let error = two.working_set().unwrap_err().to_string();
    assert!(error.contains("of another snapshot"), "{error}");
    assert!(two.store_working_set(&set).unwrap());
    assert_eq!(two.working_set().unwrap().as_ref(), Some(&set));
    // It goes with the snapshot, which is as good without it.
    one.verify().unwrap();
    lab.store.remove(&tag("one"), false).unwrap();
    assert!(!path("one").exists());
    assert!(one.store_working_set(&set).is_err());
}

#[test]
fn a_tag_is_taken_early_and_given_back() {
    let lab = Lab::new();
    let draft = lab.store.begin(&tag("one")).unwrap();
    assert!(matches!(
        lab.store.begin(&tag("one")),
        Err(SnapshotError::Busy(_))
    ));
    assert_eq!(lab.store.sweep().unwrap(), Swept::default());
    drop(draft);
    assert_eq!(lab.names(), [".lock"]);
    lab.whole("one", &lab::pattern(2), None);
    assert!(matches!(
        lab.store.begin(&tag("one")),
        Err(SnapshotError::Exists(_))
    ));
    let draft = lab.store.begin(&tag("two")).unwrap();
    assert!(matches!(
        draft.finish(fields()),
        Err(SnapshotError::Refused { .. })
    ));
    assert_eq!(lab.names(), [".lock", "one"]);
}

#[test]
fn parents_stay_as_long_as_they_are_needed() {
    let lab = Lab::new();
    let base = lab::pattern(4);
    lab.whole("a", &base, None);
    lab.difference("b", "a", &[(1, [7; PAGE])]);
    lab.difference("c", "b", &[(2, [0; PAGE])]);
    assert_eq!(lab.store.open(&tag("c")).unwrap().depth().unwrap(), 3);
    let error = lab.store.remove(&tag("a"), false).unwrap_err().to_string();
    assert!(
        error.contains("'b'") && error.contains("--prune-children"),
        "{error}"
    );
    // A manifest of a later version still holds its parent.
    let path = lab.store.directory().join("b/manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replacen("\"version\":1", "\"version\":2", 1)).unwrap();
    let error = lab.store.open(&tag("b")).unwrap_err().to_string();
    assert!(error.contains("version 2"), "{error}");
    assert!(lab.store.remove(&tag("a"), false).is_err());
    let listed = lab.store.list().unwrap();
    let good: Vec<bool> = listed.iter().map(|one| one.snapshot.is_ok()).collect();
    assert_eq!(good, [true, false, true]);
    fs::write(&path, text).unwrap();

    let before = lab.store.open(&tag("c")).unwrap();
    let draft = lab.begin_difference("d", "c", &[(0, [9; PAGE])]);
    let removed = lab.store.remove(&tag("a"), true).unwrap();
    assert_eq!(removed.tags, [tag("c"), tag("b"), tag("a")]);
    assert!(removed.freed_bytes > 0);
    let gone = |error| matches!(error, SnapshotError::ParentGone { .. });
    assert!(gone(draft.finish(fields()).unwrap_err()));
    assert!(gone(before.load_memory(|_, _| ()).unwrap_err()));
    assert_eq!(lab.names(), [".lock"]);
    let again = lab.store.remove(&tag("a"), true);
    assert!(matches!(again, Err(SnapshotError::NotFound(_))));
}

#[test]
fn a_whole_memory_is_kept_as_what_differs_from_its_parent() {
    let lab = Lab::new();
    let parent = lab.whole("a", &lab::pattern(300), None);
    let mut bytes = lab::pattern(300);
    bytes[7 * PAGE..8 * PAGE].fill(9);
    bytes[280 * PAGE..281 * PAGE].fill(0);
    let mut draft = lab.store.begin(&tag("b")).unwrap();
    draft
        .write_memory_comparison(&lab::memory_of(&bytes), &parent)
        .unwrap();
    draft.write_state(b"the state").unwrap();
    let stored = draft.load(Some(&parent)).unwrap();
    assert!(read_all(&stored.memory) == bytes);
    let snapshot = draft.finish(fields()).unwrap();
    assert_eq!(snapshot.manifest().memory.page_count, 2);
    assert_eq!(snapshot.manifest().parent, Some(parent.reference()));
    let memory = snapshot.load_memory(|_, _| ()).unwrap();
    assert!(read_all(&memory) == bytes);
    let mut draft = lab.store.begin(&tag("c")).unwrap();
    let other = lab::memory_of(&bytes[PAGE..]);
    let error = draft.write_memory_comparison(&other, &parent).unwrap_err();
    assert!(error.to_string().contains("has 1228800"), "{error}");
}

#[test]
fn a_line_has_an_end() {
    let lab = Lab::new();
    lab.whole("s1", &lab::pattern(2), None);
    for depth in 2..=fcvm_snapshot::DEPTH_MAX {
        lab.difference(
            &format!("s{depth}"),
            &format!("s{}", depth - 1),
            &[(0, [depth as u8; PAGE])],
        );
    }
    let parent = lab.store.open(&tag("s32")).unwrap();
    let memory = parent.load_memory(|_, _| ()).unwrap();
    assert_eq!(read_all(&memory)[0], 32);
    let over = pages_over(&memory, &[(0, [1; PAGE])]);
    let mut draft = lab.store.begin(&tag("s33")).unwrap();
    let error = draft
        .write_memory_difference(&memory, &over, &parent)
        .unwrap_err();
    assert!(error.to_string().contains("--full"), "{error}");
}

#[test]
fn every_flipped_bit_is_found() {
    let lab = Lab::new();
    lab.whole("a", &lab::pattern(3), Some(b"disk"));
    lab.difference("b", "a", &[(0, [5; PAGE]), (1, [0; PAGE])]);
    let folder = lab.store.directory().join("b");
    for name in ["a", "b"] {
        for entry in fs::read_dir(lab.store.directory().join(name)).unwrap() {
            let path = entry.unwrap().path();
            let whole = fs::read(&path).unwrap();
            let file = fs::File::options().write(true).open(&path).unwrap();
            // Every byte of what is short, samples of the rest: a bit each.
            let step = if whole.len() < 4096 { 1 } else { 37 };
            for at in (0..whole.len()).step_by(step) {
                let bit = at % 8;
                file.write_all_at(&[whole[at] ^ (1 << bit)], at as u64)
                    .unwrap();
                let found = lab.store.open(&tag(name)).and_then(|one| one.verify());
                assert!(found.is_err(), "{}: byte {at}, bit {bit}", path.display());
                file.write_all_at(&[whole[at]], at as u64).unwrap();
            }
            file.set_len(whole.len() as u64 - 1).unwrap();
            assert!(lab.store.open(&tag(name)).is_err(), "{}", path.display());
            fs::write(&path, &whole).unwrap();
            let away = folder.with_file_name("away");
            fs::rename(&path, &away).unwrap();
            assert!(lab.store.open(&tag(name)).is_err(), "{}", path.display());
            fs::rename(&away, &path).unwrap();
        }
        lab.store.open(&tag(name)).unwrap().verify().unwrap();
    }
    // A whole file of another snapshot is no better.
    let other = lab.store.directory().join("a/memory.pages");
    fs::copy(other, folder.join("memory.pages")).unwrap();
    assert!(lab.store.open(&tag("b")).is_err());
    assert!(Manifest::parse(&tag("b"), &vec![b' '; 2 << 20]).is_err());
}

const CREATOR: &str = "FCVM_TEST_CREATOR";
const STAGES: [&str; 5] = ["begun", "memory", "state", "disk", "manifest"];

/// What the killed child does: up to a stage, which it tells, and waits there.
fn create_until(directory: &str, stage: &str) {
    let mut store = SnapshotStore::new(directory.into());
    let pool = Path::new(directory).with_file_name("pool");
    if pool.exists() {
        store = store.with_pool(pool);
    }
    let reached = |name| {
        if name == stage {
            println!("\nreached");
            std::io::stdout().flush().unwrap();
            std::thread::park();
        }
    };
    let mut draft = store.begin(&tag("one")).unwrap();
    reached("begun");
    draft
        .write_memory_whole(&memory_of(&lab::pattern(4)), None)
        .unwrap();
    reached("memory");
    draft.write_state(b"state").unwrap();
    reached("state");
    draft
        .write_disk(&disk_of(Path::new(directory).parent().unwrap(), b"disk"))
        .unwrap();
    reached("disk");
    println!("\nreached");
    std::io::stdout().flush().unwrap();
    // Until whoever kills it has the lock.
    std::io::stdin().read_line(&mut String::new()).unwrap();
    draft.finish(fields()).unwrap();
}

#[test]
fn a_killed_creator_leaves_nothing_visible() {
    if let Ok(stage) = std::env::var(CREATOR) {
        let (stage, directory) = stage.split_once(':').unwrap();
        return create_until(directory, stage);
    }
    for (stage, in_pool) in STAGES
        .iter()
        .flat_map(|stage| [(*stage, false), (*stage, true)])
    {
        let mut lab = Lab::new();
        if in_pool {
            lab.use_pool();
        }
        drop(lab.store.begin(&tag("other")).unwrap());
        // The manifest is written, and the name waits for the lock.
        let lock = fs::File::open(lab.store.directory().join(".lock")).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "a_killed_creator_leaves_nothing_visible",
                "--nocapture",
            ])
            .env(
                CREATOR,
                format!("{stage}:{}", lab.store.directory().display()),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "reached"), "{stage}");
        if stage == "manifest" {
            lock.lock().unwrap();
            writeln!(child.stdin.take().unwrap()).unwrap();
            let manifest = lab.store.directory().join(".new-one/manifest.json");
            while !manifest.exists() && child.try_wait().unwrap().is_none() {
                std::thread::yield_now();
            }
        } else {
            assert_eq!(lab.store.sweep().unwrap(), Swept::default(), "{stage}");
            assert!(matches!(
                lab.store.begin(&tag("one")),
                Err(SnapshotError::Busy(_))
            ));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        drop(lock);
        assert!(lab.store.list().unwrap().is_empty(), "{stage}");
        assert_eq!(lab.store.sweep().unwrap().folder_count, 1, "{stage}");
        assert_eq!(lab.names(), [".lock"], "{stage}");
        assert_eq!(lab.pool_names(), Vec::<String>::new(), "{stage}");
    }
}

#[test]
fn disks_in_a_pool_stay_there_and_go_with_their_snapshots() {
    let mut lab = Lab::new();
    lab.use_pool();
    assert!(!lab.store.needs_pool().unwrap());
    for name in ["one", "two"] {
        let made = lab.whole(name, &lab::pattern(2), Some(name.as_bytes()));
        made.verify().unwrap();
        let disk = made.disk().unwrap();
        assert_eq!(&read_all(&disk.layers()[0].file)[..3], name.as_bytes());
        let folder = lab.store.directory().join(name);
        assert!(folder.join("disk.pool").exists() && !folder.join("disk-0.raw").exists());
    }
    assert_eq!(lab.pool_names().len(), 2);
    // Who does not have the pool is told, and removes nothing.
    let without = SnapshotStore::new(lab.store.directory().to_owned());
    assert!(without.needs_pool().unwrap());
    let error = without.open(&tag("one")).unwrap_err().to_string();
    assert!(error.contains("not mounted"), "{error}");
    let opened = lab.store.open(&tag("one")).unwrap();
    assert!(without.remove(&tag("one"), false).is_err());
    assert_eq!(lab.pool_names().len(), 2);
    // It had its name taken already, and is swept with its disk.
    assert_eq!(lab.store.sweep().unwrap().folder_count, 1);
    assert_eq!(lab.pool_names().len(), 1);
    assert_eq!(
        &read_all(&opened.disk().unwrap().layers()[0].file)[..3],
        b"one"
    );
    lab.store.remove(&tag("two"), false).unwrap();
    assert_eq!(lab.pool_names(), Vec::<String>::new());
    // What names files elsewhere is nobody's.
    let folder = lab.store.directory().join(".removed-0");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("disk.pool"), "../../../../../../../../../../..").unwrap();
    assert!(lab.store.sweep().is_err());
}

#[test]
fn a_dead_creators_tag_and_a_dead_removers_folder_are_free() {
    let lab = Lab::new();
    for name in [".new-one", ".removed-0"] {
        fs::create_dir_all(lab.store.directory().join(name)).unwrap();
        fs::write(lab.store.directory().join(name).join("memory.pages"), b"x").unwrap();
    }
    lab.whole("one", &lab::pattern(2), None);
    assert_eq!(lab.store.sweep().unwrap().folder_count, 1);
    assert_eq!(lab.names(), [".lock", "one"]);
}

#[test]
fn a_full_file_system_is_told_and_nothing_is_left() {
    const CHILD: &str = "FCVM_TEST_MOUNT";
    if let Ok(mount) = std::env::var(CHILD) {
        return fill(Path::new(&mount));
    }
    let directory = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=4m fcvm-test \"$1\" || exit 77; \
                  exec \"$2\" --exact a_full_file_system_is_told_and_nothing_is_left --nocapture";
    let output = Command::new("unshare")
        .args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .args([directory.path(), &std::env::current_exe().unwrap()])
        .env(CHILD, directory.path())
        .output();
    match output {
        Ok(output) if !matches!(output.status.code(), Some(1 | 77)) => assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        _ => println!("skipped: no user namespace to mount a file system in"),
    }
}

fn fill(mount: &Path) {
    let store = SnapshotStore::new(mount.join("snapshots"));
    let elsewhere = tempfile::tempdir().unwrap();
    let small = memory_of(&lab::pattern(4));
    let full = |error: SnapshotError| {
        let text = error.to_string();
        assert!(matches!(error, SnapshotError::Full { .. }), "{text}");
        assert!(text.contains("is full") && !text.contains('\n'), "{text}");
    };
    for stage in ["memory", "state", "disk", "manifest"] {
        let mut draft = store.begin(&tag("one")).unwrap();
        let large = memory_of(&lab::pattern(2000));
        if stage == "memory" {
            full(draft.write_memory_whole(&large, None).unwrap_err());
        } else {
            draft.write_memory_whole(&small, None).unwrap();
        }
        match stage {
            "state" => {
                full(draft.write_state(&vec![1; 8 << 20]).unwrap_err());
                drop(draft);
            }
            "disk" => {
                let disk = disk_of(elsewhere.path(), &vec![1; 8 << 20]);
                full(draft.write_disk(&disk).unwrap_err());
                drop(draft);
            }
            "manifest" => {
                draft.write_state(b"state").unwrap();
                // All that is left, to the last page.
                let mut rest = fs::File::create(mount.join("rest")).unwrap();
                while rest.write_all(&[1; PAGE]).is_ok() {}
                full(draft.finish(fields()).unwrap_err());
                fs::remove_file(mount.join("rest")).unwrap();
            }
            _ => drop(draft),
        }
        let left: Vec<_> = fs::read_dir(store.directory()).unwrap().collect();
        assert_eq!(left.len(), 1, "{stage}: {left:?}");
    }
}
