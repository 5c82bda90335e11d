//! What must survive the way from a layer into the image: every kind of metadata, every form of
//! tar that carries it, every compression, byte for byte reproducibly.

use std::io::Write;
use std::process::Command;

use fcvm_image::Digest;
use fcvm_image::rootfs::{FORMAT_VERSION, Limits, image_key};

use crate::support::tarball::{Entry, pax_records, seal, tar};
use crate::support::{TestImage, build_image, fsck, try_build, try_build_as};

fn one(entries: &[Entry]) -> TestImage {
    build_image(&[tar(entries)])
}

#[test]
fn owners_modes_times_and_devices_are_kept() {
    let image = one(&[
        Entry::file("suid", "x").mode(0o4755).owner(0, 65_536),
        Entry::file("huge", "x")
            .mode(0o2640)
            .owner(4_000_000_000, 4_294_967_294),
        Entry {
            mtime: -5,
            ..Entry::file("old", "x")
        },
        Entry {
            mtime: 8_589_934_591,
            ..Entry::file("late", "x")
        },
        Entry::file("nano", "x").pax("mtime", "1700000000.123456789"),
        Entry::file("before", "x").pax("mtime", "-1.25"),
        Entry::dir("tmp").mode(0o1777),
        Entry::new(b'3', "null").mode(0o666).device(1, 3),
        Entry::new(b'3', "big").device(4095, 1_048_575),
        Entry::new(b'4', "disk").mode(0o660).device(259, 300),
        Entry::new(b'6', "fifo").mode(0o600),
        Entry::symlink("link", "t".repeat(4095)),
        Entry::symlink("short", "/absolute/and/dangling").owner(7, 8),
    ])
    .read();
    let suid = image.at("suid");
    assert_eq!((suid.mode, suid.uid, suid.gid), (0o104_755, 0, 65_536));
    let huge = image.at("huge");
    assert_eq!(
        (huge.mode, huge.uid, huge.gid),
        (0o102_640, 4_000_000_000, 4_294_967_294)
    );
    assert_eq!(image.at("old").mtime, (-5, 0));
    assert_eq!(image.at("late").mtime, (8_589_934_591, 0));
    assert_eq!(image.at("nano").mtime, (1_700_000_000, 123_456_789));
    assert_eq!(image.at("before").mtime, (-2, 750_000_000));
    assert_eq!(image.at("tmp").mode, 0o041_777);
    assert_eq!(
        (image.at("null").mode, image.at("null").rdev),
        (0o020_666, 0x103)
    );
    assert_eq!(image.at("big").rdev, 0xffff_ffff);
    assert_eq!(
        (image.at("disk").mode, image.at("disk").rdev),
        (0o060_660, 0x10_0000 | 259 << 8 | 44)
    );
    assert_eq!(image.at("fifo").mode, 0o010_600);
    assert_eq!(image.at("link").content, "t".repeat(4095).into_bytes());
    assert_eq!(image.text("short"), "/absolute/and/dangling");
    assert_eq!((image.at("short").uid, image.at("short").gid), (7, 8));
}

#[test]
fn extended_attributes_are_kept_byte_for_byte() {
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let acl = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x04\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
    let binary = b"line\nline\n12 fake=record\n\0=\xff\n";
    let large = vec![0xa5; 65_535];
    let image = one(&[
        Entry::file("caps", "x").xattr("security.capability", capability),
        Entry::file("acl", "x").xattr("system.posix_acl_access", acl),
        Entry::dir("dir")
            .xattr("system.posix_acl_default", acl)
            .xattr("trusted.t", ""),
        Entry::file("binary", "x")
            .xattr("user.b", binary)
            .xattr("user.é=", "equals"),
        Entry::symlink("link", "caps").xattr("security.selinux", "u:r:t:s0\0"),
        Entry::file("large", "content")
            .xattr("user.large", &large)
            .xattr("user.other", "1"),
        Entry::file("twice", "x")
            .xattr("user.x", "first")
            .xattr("user.x", "last"),
        Entry::file("left-out", "x")
            .xattr("com.apple.quarantine", "1")
            .xattr("trusted.overlay.opaque", "y")
            .xattr("user.", "no name")
            .xattr("user.kept", "1"),
        Entry::dir("many")
            .xattr("user.a", vec![1; 3000])
            .xattr("user.b", vec![2; 3000]),
        Entry::file("many/child", "x"),
    ]);
    assert_eq!(image.built.skipped_xattr_count, 3);
    let read = image.read();
    let xattr = |path: &str, name: &str| read.at(path).xattrs[name.as_bytes()].clone();
    assert_eq!(xattr("caps", "security.capability"), capability);
    assert_eq!(xattr("acl", "system.posix_acl_access"), acl);
    assert_eq!(xattr("dir", "system.posix_acl_default"), acl);
    assert_eq!(xattr("dir", "trusted.t"), b"");
    assert_eq!(xattr("binary", "user.b"), binary);
    assert_eq!(xattr("link", "security.selinux"), b"u:r:t:s0\0");
    assert_eq!(xattr("large", "user.large"), large);
    assert_eq!(read.text("large"), "content");
    assert_eq!(xattr("twice", "user.x"), b"last");
    assert_eq!(read.at("left-out").xattrs.len(), 1);
    assert_eq!(xattr("many", "user.b"), vec![2; 3000]);
}

#[test]
fn long_names_paths_and_links_in_both_dialects() {
    let name = "n".repeat(255);
    let deep = vec![name.as_str(); 20].join("/");
    assert!(deep.len() > 4096);
    for gnu in [false, true] {
        let with = |entry: Entry| Entry { gnu, ..entry };
        let image = one(&[
            with(Entry::file(&deep, "deep")),
            with(Entry::hard_link("link", &deep)),
            with(Entry::symlink("sym", &deep[..4000])),
            with(Entry::file(format!("./{name}.d//x/").replace(".d", ""), "x").clone()),
        ][..3]);
        let read = image.read();
        assert_eq!(read.text(&deep), "deep");
        assert_eq!(read.at("link").nid, read.at(&deep).nid);
        assert_eq!(read.text("sym"), &deep[..4000]);
    }
}

#[test]
fn ustar_prefixes_and_old_directories_are_understood() {
    let mut header = Entry::file("name", "").header();
    header[345..351].copy_from_slice(b"prefix");
    seal(&mut header);
    let mut old = Entry {
        kind: 0,
        ..Entry::new(b'0', "old-directory/")
    }
    .header();
    old[257..265].fill(0);
    seal(&mut old);
    let layer = [header.to_vec(), old.to_vec()].concat();
    // The closing zero blocks are missing too.
    let image = build_image(&[layer]).read();
    assert_eq!(image.at("prefix/name").kind(), 0o10);
    assert_eq!(image.at("old-directory").kind(), 0o4);
}

#[test]
fn global_headers_are_ignored_and_sizes_may_come_from_pax() {
    let global = Entry {
        data: pax_records(&[(b"comment".to_vec(), b"x".to_vec())]),
        ..Entry::new(b'g', "pax_global_header")
    };
    let sized = Entry {
        size: Some(0),
        ..Entry::file("f", vec![9; 700]).pax("size", "700")
    };
    let image = one(&[global, sized, Entry::file("g", "after")]).read();
    assert_eq!(image.at("f").content, vec![9; 700]);
    assert_eq!(image.text("g"), "after");
}

/// The same sparse file in GNU's old format and the three PAX ones, by hand.
fn sparse_layers(size: u64, segments: &[(u64, Vec<u8>)]) -> Vec<(&'static str, Vec<u8>)> {
    let data: Vec<u8> = segments.iter().flat_map(|(_, data)| data.clone()).collect();
    let pairs = || segments.iter().map(|(offset, data)| (*offset, data.len()));
    let stored = |entry: Entry| Entry {
        data: data.clone(),
        ..entry
    };
    let size_text = size.to_string();
    let list: Vec<String> = pairs()
        .map(|(offset, length)| format!("{offset},{length}"))
        .collect();

    let mut v00 = Entry::new(b'0', "f").pax("GNU.sparse.size", &size_text);
    for (offset, length) in pairs() {
        v00 = v00
            .pax("GNU.sparse.offset", offset.to_string())
            .pax("GNU.sparse.numbytes", length.to_string());
    }
    let v01 = Entry::new(b'0', "GNUSparseFile.0/f")
        .pax("GNU.sparse.name", "f")
        .pax("GNU.sparse.size", &size_text)
        .pax("GNU.sparse.map", list.join(","));
    let mut map = format!("{}\n", segments.len());
    for (offset, length) in pairs() {
        map += &format!("{offset}\n{length}\n");
    }
    let mut with_map = map.into_bytes();
    with_map.resize(with_map.len().next_multiple_of(512), 0);
    with_map.extend(&data);
    let v10 = Entry {
        data: with_map,
        ..Entry::new(b'0', "GNUSparseFile.0/f")
    }
    .pax("GNU.sparse.major", "1")
    .pax("GNU.sparse.minor", "0")
    .pax("GNU.sparse.name", "f")
    .pax("GNU.sparse.realsize", &size_text);
    let sized = v10.clone().pax("size", v10.data.len().to_string());
    let follower = Entry::file("g", "after");
    vec![
        ("old GNU", old_gnu(size, segments, &data, &follower)),
        ("PAX 0.0", tar(&[stored(v00), follower.clone()])),
        ("PAX 0.1", tar(&[stored(v01), follower.clone()])),
        ("PAX 1.0", tar(&[v10, follower.clone()])),
        ("PAX 1.0 with size", tar(&[sized, follower])),
    ]
}

/// A field of 12 bytes: octal, or base 256 for what octal cannot say.
fn gnu_number(value: u64) -> Vec<u8> {
    if value < 1 << 33 {
        return format!("{value:011o}\0").into_bytes();
    }
    [&[0x80, 0, 0, 0][..], &value.to_be_bytes()].concat()
}

fn old_gnu(size: u64, segments: &[(u64, Vec<u8>)], data: &[u8], follower: &Entry) -> Vec<u8> {
    let entry = Entry {
        gnu: true,
        size: Some(data.len() as u64),
        ..Entry::new(b'S', "f")
    };
    let mut header = entry.header();
    header[329..345].fill(0);
    header[345..512].fill(0);
    let descriptor =
        |offset: u64, length: usize| [gnu_number(offset), gnu_number(length as u64)].concat();
    let mut descriptors = segments
        .iter()
        .map(|(offset, data)| descriptor(*offset, data.len()))
        .peekable();
    for (slot, text) in (0..4).zip(&mut descriptors) {
        header[386 + slot * 24..410 + slot * 24].copy_from_slice(&text);
    }
    header[482] = u8::from(descriptors.peek().is_some());
    header[483..495].copy_from_slice(&gnu_number(size));
    seal(&mut header);
    let mut out = header.to_vec();
    while descriptors.peek().is_some() {
        let mut block = [0u8; 512];
        for (slot, text) in (0..21).zip(&mut descriptors) {
            block[slot * 24..slot * 24 + 24].copy_from_slice(&text);
        }
        block[504] = u8::from(descriptors.peek().is_some());
        out.extend(block);
    }
    out.extend(data);
    out.resize(out.len().next_multiple_of(512), 0);
    out.extend(tar(std::slice::from_ref(follower)));
    out
}

fn expanded(size: u64, segments: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let mut content = vec![0; size as usize];
    for (offset, data) in segments {
        content[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
    }
    content
}

#[test]
fn sparse_files_of_all_formats_keep_content_and_holes() {
    let many: Vec<(u64, Vec<u8>)> = (0..60)
        .map(|index| (index * 20_000 + 17, vec![index as u8 + 1; 3000]))
        .collect();
    let cases = [
        (1_300_000, many),
        (
            10 << 20,
            vec![
                (4096, vec![1; 8192]),
                (5 << 20, vec![2; 1]),
                ((10 << 20) - 1, vec![3; 1]),
            ],
        ),
        (100_000, vec![(0, vec![4; 100]), (100_000, Vec::new())]),
        (50_000, Vec::new()),
        (5_000, vec![(0, vec![5; 5_000])]),
    ];
    for (size, segments) in cases {
        let mut first: Option<Vec<u8>> = None;
        for (format, layer) in sparse_layers(size, &segments) {
            if format == "PAX 0.0" && segments.is_empty() {
                continue; // that format cannot say "nothing but a hole"
            }
            let image = build_image(&[layer]);
            let read = image.read();
            let file = read.at("f");
            assert_eq!(file.size, size, "{format}");
            assert!(
                file.content == expanded(size, &segments),
                "{format}, size {size}"
            );
            assert_eq!(read.text("g"), "after", "{format}");
            if size == 10 << 20 {
                assert_eq!(file.stored_bytes, Some(4 * 4096), "{format}");
            }
            let bytes = image.bytes()[4096..].to_vec();
            assert!(
                *first.get_or_insert_with(|| bytes.clone()) == bytes,
                "{format}"
            );
        }
    }
}

#[test]
fn huge_sparse_files_have_large_chunks() {
    let size = 3 << 40;
    let segments = [(1 << 40, vec![1; 100]), ((3 << 40) - 100, vec![2; 100])];
    for (format, layer) in sparse_layers(size, &segments) {
        let image = build_image(&[layer]).read();
        assert_eq!(image.at("f").size, size);
        assert_eq!(image.at("f").layout, 4);
        // Two chunks of 16 MiB: at most 2^18 chunks cover 3 TiB.
        assert_eq!(image.at("f").stored_bytes, Some(2 << 24), "{format}");
    }
}

#[test]
fn archives_of_gnu_tar_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let file = std::fs::File::create(root.join("holes")).unwrap();
    file.set_len(9 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"data", 6 << 20).unwrap();
    std::fs::write(root.join("x".repeat(200)), "long").unwrap();
    std::fs::hard_link(root.join("holes"), root.join("again")).unwrap();
    for format in ["--format=gnu", "--format=posix"] {
        for version in ["0.0", "0.1", "1.0"] {
            let output = Command::new("tar")
                .args(["--sparse", format, "--sparse-version", version, "-c", "."])
                .current_dir(root)
                .output();
            let Ok(output) = output else {
                eprintln!("skipped: GNU tar is not installed");
                return;
            };
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            let image = build_image(&[output.stdout]).read();
            let holes = image.at("holes");
            assert_eq!((holes.size, holes.nlink), (9 << 20, 2));
            assert!(holes.content[6 << 20..].starts_with(b"data\0"));
            assert!(holes.stored_bytes.is_some_and(|bytes| bytes < 1 << 20));
            assert_eq!(image.text(&"x".repeat(200)), "long");
        }
    }
}

#[test]
fn file_contents_of_every_size_class_are_kept() {
    let sizes = [
        0, 1, 100, 3000, 4031, 4032, 4033, 4095, 4096, 4097, 8192, 300_000,
    ];
    let content = |size: usize| {
        (0..size)
            .map(|at| (at * 31 % 251) as u8)
            .collect::<Vec<u8>>()
    };
    let entries: Vec<Entry> = sizes
        .iter()
        .map(|&size| Entry::file(format!("f{size}"), content(size)))
        .collect();
    let image = one(&entries).read();
    for size in sizes {
        let file = image.at(format!("f{size}"));
        assert!(file.content == content(size), "{size}");
        let inline = size > 0 && size <= 4096 - 64;
        assert_eq!(file.layout, if inline { 2 } else { 0 }, "{size}");
    }
}

#[test]
fn directories_of_every_size_are_kept() {
    for count in [0usize, 1, 50, 170, 300, 5000] {
        let names: Vec<String> = (0..count)
            .map(|index| format!("{}{index}", "n".repeat(index % 40)))
            .collect();
        let mut entries = vec![Entry::dir("d"), Entry::file("d/.-before-dotdot", "")];
        entries.extend(
            names
                .iter()
                .map(|name| Entry::file(format!("d/{name}"), name)),
        );
        entries.extend(
            names
                .iter()
                .take(100)
                .map(|name| Entry::dir(format!("e/{name}"))),
        );
        let image = one(&entries).read();
        assert_eq!(
            image.entries.len(),
            3 + usize::from(count > 0) + count + count.min(100)
        );
        for name in &names {
            assert_eq!(image.text(&format!("d/{name}")), *name);
        }
    }
}

#[test]
fn names_of_any_bytes_are_kept_in_order() {
    let names: Vec<Vec<u8>> = (1..=255u8)
        .filter(|byte| !b"/.".contains(byte))
        .flat_map(|byte| [vec![byte], vec![b'.', byte], vec![b'a', byte, 0xff]])
        .collect();
    let entries: Vec<Entry> = names.iter().map(|name| Entry::file(name, name)).collect();
    let image = one(&entries).read();
    for name in names {
        assert_eq!(image.at(&name).content, name);
    }
}

fn gzip(bytes: &[u8], members: usize) -> Vec<u8> {
    let chunk = bytes.len().div_ceil(members);
    let mut out = Vec::new();
    for part in bytes.chunks(chunk) {
        let mut encoder = flate2::write::GzEncoder::new(&mut out, flate2::Compression::fast());
        encoder.write_all(part).unwrap();
        encoder.finish().unwrap();
    }
    out
}

#[test]
fn compression_and_timing_do_not_change_a_byte() {
    let layers = [
        tar(&[
            Entry::file("a", vec![1; 700_000]),
            Entry::dir("d"),
            Entry::file("d/x", "x"),
        ]),
        tar(&[
            Entry::file("b", vec![2; 900_000]),
            Entry::file("a", vec![3; 500_000]),
        ]),
        tar(&[
            Entry::file("d/.wh..wh..opq", ""),
            Entry::file("d/y", vec![4; 100_000]),
        ]),
    ];
    let plain = build_image(&layers).bytes();
    type Encode = fn(&[u8]) -> Vec<u8>;
    let encodings: [Encode; 5] = [
        |bytes| bytes.to_vec(),
        |bytes| gzip(bytes, 1),
        |bytes| gzip(bytes, 7),
        |bytes| zstd::encode_all(bytes, 3).unwrap(),
        |bytes| {
            let (start, end) = bytes.split_at(bytes.len() / 2);
            let skippable = [0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4].to_vec();
            [
                skippable,
                zstd::encode_all(start, 1).unwrap(),
                zstd::encode_all(end, 9).unwrap(),
            ]
            .concat()
        },
    ];
    for encode in encodings {
        let compressed: Vec<_> = layers
            .iter()
            .map(|layer| (encode(layer), Digest::of(layer)))
            .collect();
        let image = try_build_as(&compressed, &Limits::default()).unwrap();
        assert!(
            image.bytes() == plain,
            "the image depends on the compression"
        );
    }
    for _ in 0..5 {
        assert!(
            build_image(&layers).bytes() == plain,
            "the image depends on timing"
        );
    }
}

/// Any change of the bytes of an image must come with a new format version.
#[test]
fn the_bytes_of_version_1_do_not_change() {
    let layers = [
        tar(&[
            Entry::dir("./").mode(0o755),
            Entry::dir("etc"),
            Entry::file("etc/passwd", "root:x:0:0::/:/bin/sh\n").xattr("user.a", "b"),
            Entry::file("big", vec![5; 10_000]),
            Entry::symlink("lib", "usr/lib"),
            Entry::hard_link("link", "big"),
        ]),
        tar(&[
            Entry::file("etc/.wh.passwd", ""),
            Entry::file("lib/so", vec![6; 5_000]),
        ]),
    ];
    let image = build_image(&layers);
    assert_eq!(FORMAT_VERSION, 1);
    let digest = Digest::of(&image.bytes()).to_string();
    assert_eq!(
        digest,
        "sha256:79ef7ccd5847fecd9e00c385e198242aae51b4a5d849ae393990249a42980668"
    );
}

#[test]
fn the_key_is_that_of_layers_and_order() {
    let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
    assert_eq!(image_key([a, b]), image_key([a, b]));
    assert_ne!(image_key([a, b]), image_key([b, a]));
    assert_ne!(image_key([a]), image_key([a, a]));
}

#[test]
fn an_old_file_is_overwritten_completely() {
    let layer = tar(&[Entry::file("a", "x")]);
    let fresh = try_build(std::slice::from_ref(&layer), &Limits::default()).unwrap();
    let inputs = crate::support::layer_files(
        fresh.directory.path(),
        &[(layer.clone(), Digest::of(&layer))],
    );
    let path = fresh.directory.path().join("reused");
    std::fs::write(&path, vec![0xff; 100_000]).unwrap();
    let mut file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let silent = fcvm_image::Silent;
    fcvm_image::rootfs::build(&inputs, &mut file, &Limits::default(), &silent).unwrap();
    fsck(&path);
    assert!(std::fs::read(&path).unwrap() == fresh.bytes());
}
