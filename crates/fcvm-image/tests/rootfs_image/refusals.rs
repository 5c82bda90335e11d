//! Hostile and broken layers: each gets one line that names layer and member, and no image.

use fcvm_image::Digest;
use fcvm_image::rootfs::{Limits, RootfsError};

use crate::support::tarball::{Entry, seal, tar};
use crate::support::{try_build, try_build_as};

fn error_of(layers: &[Vec<u8>], limits: &Limits) -> String {
    let error = try_build(layers, limits)
        .err()
        .expect("the layer must be refused");
    let text = error.to_string();
    assert!(
        !text.contains('\n') && text.is_ascii(),
        "not one line: {text}"
    );
    text
}

/// Refuses the last entry as member of layer 2, on top of `lower`.
fn refused(lower: &[Entry], upper: &[Entry], reason: &str) {
    let layers = [tar(lower), tar(upper)];
    let text = error_of(&layers, &Limits::default());
    let member = String::from_utf8(upper.last().unwrap().path.clone()).unwrap();
    assert!(text.contains(reason), "{text}");
    let shown = if member.len() < 100 {
        member.escape_default().to_string()
    } else {
        "...".into()
    };
    assert!(text.contains(&shown), "{text} does not name {shown}");
    let layer = format!("layer 2 (sha256:{})", &Digest::of(&layers[1]).hex()[..12]);
    assert!(text.starts_with(&layer), "{text}");
}

#[test]
fn members_that_climb_out_are_refused() {
    let lower = [
        Entry::symlink("up", "../../etc"),
        Entry::symlink("a/up", "../.."),
        Entry::symlink("loop", "pool"),
        Entry::symlink("pool", "loop"),
        Entry::symlink("self", "self/x"),
        Entry::file("file", "x"),
        Entry::symlink("to-file", "file"),
        Entry::symlink("far", "missing/../../../etc"),
    ];
    let cases = [
        ("../x", "'..'"),
        ("a/../../x", "'..'"),
        ("..", "'..'"),
        ("/etc/passwd", "absolute"),
        ("//x", "absolute"),
        ("up/passwd", "leads out"),
        ("a/up/x", "leads out"),
        ("loop/x", "too many symbolic links"),
        ("self/x", "too many symbolic links"),
        ("file/x", "not a directory"),
        ("to-file/x", "not a directory"),
        ("far/x", "leads out"),
    ];
    for (path, reason) in cases {
        refused(&lower, &[Entry::file(path, "x")], reason);
        refused(&lower, &[Entry::dir(path)], reason);
        refused(&lower, &[Entry::symlink(path, "t")], reason);
    }
}

#[test]
fn hard_links_that_climb_out_or_lead_nowhere_are_refused() {
    let lower = [
        Entry::file("f", "x"),
        Entry::dir("d"),
        Entry::symlink("up", ".."),
    ];
    let cases = [
        ("../f", "'..'"),
        ("/f", "absolute"),
        ("up/f", "leads out"),
        ("missing", "does not exist"),
        ("d/missing", "does not exist"),
        ("no/such", "does not exist"),
        ("d", "is a directory"),
        (".", "is a directory"),
        ("", "1 to 4095"),
        ("f/x", "not a directory"),
    ];
    for (target, reason) in cases {
        refused(&lower, &[Entry::hard_link("link", target)], reason);
    }
    refused(
        &lower,
        &[Entry::file(".wh.f", ""), Entry::hard_link("link", "f")],
        "does not exist",
    );
}

#[test]
fn malformed_members_are_refused() {
    let long = "n".repeat(256);
    refused(
        &[],
        &[Entry::file(&long, "x")],
        "256 bytes and the limit is 255",
    );
    refused(
        &[],
        &[Entry::file(format!("{long}/x"), "x")],
        "256 bytes and the limit is 255",
    );
    refused(
        &[],
        &[Entry::file("d/".repeat(9000), "x")],
        "limit is 16384",
    );
    refused(&[], &[Entry::symlink("s", "")], "link target has 0 bytes");
    refused(
        &[],
        &[Entry::symlink("s", "t".repeat(4096))],
        "link target has 4096 bytes",
    );
    refused(&[], &[Entry::new(b'V', "volume")], "type 'V'");
    refused(
        &[],
        &[Entry::new(b'3', "dev").device(4096, 0)],
        "4096:0 is out of range",
    );
    refused(
        &[],
        &[Entry::file("f", "").owner(1 << 32, 0)],
        "4294967296 does not fit",
    );
    refused(
        &[],
        &[Entry::file("f", "").pax("mtime", "yesterday")],
        "'mtime' is malformed",
    );
    refused(
        &[],
        &[Entry::file("f", "").pax("uid", "-1")],
        "'uid' is malformed",
    );
    refused(
        &[],
        &[Entry::file("f", "").pax("size", "x")],
        "'size' is malformed",
    );
    refused(&[], &[Entry::file(".wh.", "")], "not a valid whiteout");
    refused(&[], &[Entry::file("d/.wh...", "")], "not a valid whiteout");
    refused(&[], &[Entry::file(".wh.d/x", "")], "not a valid whiteout");
    refused(&[], &[Entry::file("./", "x")], "replace the root directory");
    refused(
        &[],
        &[Entry::symlink(".", "x")],
        "replace the root directory",
    );
    refused(
        &[],
        &[Entry::file("f", "").xattr("user.x", vec![0; 65_536])],
        "65536 bytes, limit 65535",
    );
    refused(
        &[],
        &[Entry::file("f", "")
            .xattr("user.x", vec![0; 65_535])
            .xattr("user.y", vec![0; 65_535])],
        "too large",
    );
}

#[test]
fn inconsistent_sparse_maps_are_refused() {
    for (map, size) in [
        ("10,5,0,5", "100"),      // not ordered
        ("0,10,5,5", "100"),      // overlapping
        ("0,5,90,20", "100"),     // beyond the end
        ("0,10", "100"),          // more stored than mapped
        ("0,1000000", "2000000"), // less stored than mapped
        ("18446744073709551615,5", "100"),
    ] {
        let entry = Entry::file("f", vec![1; 25])
            .pax("GNU.sparse.size", size)
            .pax("GNU.sparse.name", "f")
            .pax("GNU.sparse.map", map);
        refused(&[], &[entry], "sparse map");
    }
    let endless = Entry::file("f", "")
        .pax("GNU.sparse.size", u64::MAX.to_string())
        .pax("GNU.sparse.map", "0,0");
    refused(&[], &[endless], "too large");
}

#[test]
fn sparse_maps_without_line_ends_are_refused() {
    let entry = |data: Vec<u8>| {
        Entry::file("f", data)
            .pax("GNU.sparse.major", "1")
            .pax("GNU.sparse.minor", "0")
            .pax("GNU.sparse.realsize", "8192")
    };
    let digits = |length: usize| vec![b'1'; length];
    let limits = Limits {
        max_sparse_segments: 10,
        max_header_bytes: 4096,
        ..Limits::default()
    };
    for length in [10, 700, 2000, 1 << 20] {
        // A line that never ends, at its start and after a good one.
        for start in ["", "2\n0\n"] {
            let data = [start.as_bytes(), &digits(length)].concat();
            error_of(&[tar(&[entry(data.clone())])], &limits);
            let mut cut = entry(data).bytes();
            cut.truncate(cut.len().saturating_sub(512));
            error_of(&[cut], &limits);
        }
    }
    let wide = [b"x".repeat(3000), b"\n".to_vec()].concat();
    error_of(&[tar(&[entry(wide)])], &limits);
    let endless = [entry(digits(1 << 20)).bytes(), digits(1 << 20)].concat();
    assert!(error_of(&[endless], &limits).contains("headers are too long"));
}

#[test]
fn damaged_archives_are_refused() {
    let whole = tar(&[
        Entry::file("first", vec![1; 5000]),
        Entry::file("second", "x"),
    ]);
    let cut = |length: usize| error_of(&[whole[..length].to_vec()], &Limits::default());
    assert!(cut(3000).contains("after member 'first': it ends in the middle of a member"));
    assert!(
        cut(512 + 5120 + 100).contains("after member 'first': it ends in the middle of a header")
    );
    let mut flipped = whole.clone();
    flipped[512 + 5120 + 5] ^= 1;
    assert!(error_of(&[flipped], &Limits::default()).contains("not a valid tar archive"));
    let text = error_of(&[b"this is no archive".repeat(100)], &Limits::default());
    assert!(
        text.contains("not a valid tar archive after member ''"),
        "{text}"
    );
    let mut negative = Entry::file("f", "x").header();
    negative[124..136].fill(0xff);
    seal(&mut negative);
    error_of(&[negative.to_vec()], &Limits::default());
}

#[test]
fn a_wrong_digest_is_reported_before_what_it_causes() {
    let good = tar(&[Entry::file("f", "x")]);
    let bad = tar(&[Entry::file("../f", "x")]);
    for layer in [&good, &bad] {
        let layers = [
            (good.clone(), Digest::of(&good)),
            (layer.clone(), Digest::of(b"other")),
        ];
        let error = try_build_as(&layers, &Limits::default()).err().unwrap();
        let RootfsError::DiffIdMismatch {
            layer: name,
            actual,
        } = &error
        else {
            panic!("{error}");
        };
        assert_eq!((name.index, *actual), (1, Digest::of(layer)));
        assert!(error.to_string().contains("pull it again"));
    }
}

#[test]
fn damaged_and_unknown_compression_is_told_apart() {
    // Hardly compressible, so that every compressed byte matters.
    let mut state = 1u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let data: Vec<u8> = (0..100_000).map(|_| noise()).collect();
    let plain = tar(&[Entry::file("f", data)]);
    let mut gzip = Vec::new();
    let mut encoder = flate2::write::GzEncoder::new(&mut gzip, flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, &plain).unwrap();
    encoder.finish().unwrap();
    let zstd = zstd::encode_all(plain.as_slice(), 1).unwrap();
    for (compressed, name) in [(gzip, "gzip"), (zstd, "zstd")] {
        let cut = compressed[..compressed.len() - 20].to_vec();
        let mut flipped = compressed.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 0x55;
        for bytes in [cut, flipped] {
            let error = try_build_as(&[(bytes, Digest::of(&plain))], &Limits::default()).err();
            let text = error.expect("damage must be noticed").to_string();
            let noticed = text.contains(&format!("damaged {name} data"))
                || text.contains("does not have the content");
            assert!(noticed, "{text}");
        }
    }
    let xz = [b"\xfd7zXZ\0".to_vec(), vec![0; 100]].concat();
    assert!(error_of(&[xz], &Limits::default()).contains("compressed with xz"));
}

#[test]
fn limits_end_what_costs_too_much() {
    let limits = Limits::default();
    let file = |name: &str, size: usize| Entry::file(name, vec![1; size]);
    let cases: [(Limits, Vec<Entry>, &str); 5] = [
        (
            Limits {
                max_members: 2,
                ..limits.clone()
            },
            vec![file("a", 1), file("b", 1), file("c", 1)],
            "members",
        ),
        (
            Limits {
                max_uncompressed_bytes: 5000,
                ..limits.clone()
            },
            vec![file("a", 9000)],
            "uncompressed bytes",
        ),
        (
            Limits {
                max_image_bytes: 8192,
                ..limits.clone()
            },
            vec![file("a", 9000)],
            "more bytes than",
        ),
        (
            Limits {
                max_image_bytes: 4096,
                ..limits.clone()
            },
            vec![file("a", 1)],
            "more bytes than",
        ),
        (
            Limits {
                max_metadata_bytes: 4000,
                ..limits.clone()
            },
            vec![file("a", 2000), file("b", 2000)],
            "bytes of metadata",
        ),
    ];
    for (limits, entries, what) in cases {
        let text = error_of(&[tar(&entries)], &limits);
        assert!(text.contains(what) && text.contains("limit"), "{text}");
    }
    let header = Limits {
        max_header_bytes: 1000,
        ..limits.clone()
    };
    let text = error_of(&[tar(&[Entry::file("x".repeat(2000), "")])], &header);
    assert!(text.contains("not a valid tar archive"), "{text}");
    let segments = Limits {
        max_sparse_segments: 3,
        ..limits.clone()
    };
    let sparse = Entry::file("f", "")
        .pax("GNU.sparse.size", "100")
        .pax("GNU.sparse.map", "0,0,1,0,2,0,3,0");
    assert!(error_of(&[tar(&[sparse])], &segments).contains("too many sparse entries"));
    let attributes = Limits {
        max_xattr_bytes: 100,
        ..limits
    };
    let entry = Entry::file("f", "").xattr("user.x", vec![0; 200]);
    assert!(error_of(&[tar(&[entry])], &attributes).contains("extended attributes are too large"));
}

#[test]
fn chains_of_links_cannot_cost_much_time() {
    let mut entries: Vec<Entry> = (1..20)
        .map(|index| {
            let target = format!("{}l{}", "d/../".repeat(700), index - 1);
            Entry::symlink(format!("l{index}"), target)
        })
        .collect();
    entries.extend([Entry::dir("d"), Entry::dir("l0")]);
    entries.extend((0..100).map(|index| Entry::file(format!("l19/{index}"), "")));
    try_build(&[tar(&entries)], &Limits::default()).unwrap();
    let few = Limits {
        max_members: 1000,
        ..Limits::default()
    };
    assert!(error_of(&[tar(&entries)], &few).contains("path components to look up"));
}

#[test]
fn deep_paths_are_no_problem() {
    let path = "d/".repeat(8000) + "f";
    let image = try_build(&[tar(&[Entry::file(&path, "deep")])], &Limits::default()).unwrap();
    assert_eq!(image.built.inode_count, 8002);
    let hidden = [
        tar(&[Entry::file(&path, "deep")]),
        tar(&[Entry::file(".wh.d", "")]),
    ];
    let image = try_build(&hidden, &Limits::default()).unwrap();
    assert_eq!(image.built.inode_count, 1);
}

#[test]
fn a_bomb_is_stopped_by_its_uncompressed_size() {
    let zeros = std::io::Read::take(std::io::repeat(0), 1 << 30);
    let bomb = zstd::encode_all(zeros, 1).unwrap();
    assert!(bomb.len() < 1 << 20);
    let limits = Limits {
        max_uncompressed_bytes: 10 << 20,
        ..Limits::default()
    };
    let error = try_build_as(&[(bomb, Digest::of(b""))], &limits)
        .err()
        .unwrap();
    assert!(
        matches!(
            error,
            RootfsError::Limit {
                what: "uncompressed bytes",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn missing_files_and_full_disks_are_reported() {
    use fcvm_image::rootfs::{LayerInput, build};
    let directory = tempfile::tempdir().unwrap();
    let missing = LayerInput {
        path: directory.path().join("none"),
        diff_id: Digest::of(b""),
    };
    let mut output = std::fs::File::create(directory.path().join("out")).unwrap();
    let silent = fcvm_image::Silent;
    let error = build(&[missing], &mut output, &Limits::default(), &silent).unwrap_err();
    assert!(
        error.to_string().contains("cannot read layer 1") && error.to_string().contains("none")
    );

    let layer = tar(&[Entry::file("f", vec![1; 1 << 20])]);
    let inputs =
        crate::support::layer_files(directory.path(), &[(layer.clone(), Digest::of(&layer))]);
    let mut read_only = std::fs::File::open(directory.path().join("out")).unwrap();
    let error = build(&inputs, &mut read_only, &Limits::default(), &silent).unwrap_err();
    assert_eq!(error.to_string(), "cannot write the root image");
    assert!(std::error::Error::source(&error).is_some());
}
