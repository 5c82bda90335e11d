//! Tests of [`super`] on images made here, with each compression by its real encoder.

use std::io::Write;
use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::*;

/// A small vmlinux: one loadable segment and the PVH note, then the banner.
fn vmlinux() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4_u32, 4, XEN_ELFNOTE_PHYS32_ENTRY as u32] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(0x0100_0000_u32.to_le_bytes());
    let body = b"Linux version 6.1.0-test (nobody@registry.example) #1 SMP\n".repeat(200);
    let note_at = 64 + 2 * 56;
    let body_at = note_at + note.len();
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for wide in [0_u64, 64, 0] {
        file.extend(wide.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for (kind, offset, size) in [
        (PT_LOAD, body_at, body.len()),
        (PT_NOTE, note_at, note.len()),
    ] {
        file.extend(kind.to_le_bytes());
        file.extend(4_u32.to_le_bytes());
        for wide in [offset, 0, 0, size, size, 4] {
            file.extend((wide as u64).to_le_bytes());
        }
    }
    file.extend(note);
    file.extend(body);
    file
}

/// A bzImage around a payload whose last four bytes are the uncompressed size.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    const SETUP_SECTORS: usize = 3;
    const PAYLOAD_OFFSET: usize = 0x40;
    let mut file = vec![0; (SETUP_SECTORS + 1) * 512 + PAYLOAD_OFFSET];
    file[0x1f1] = SETUP_SECTORS as u8;
    file[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&(PAYLOAD_OFFSET as u32).to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend(payload);
    // The rest of the protected-mode code.
    file.extend([0x90; 64]);
    file
}

/// Compresses with a command-line tool; none where it is not installed.
fn compress_with(program: &str, arguments: &[&str], input: &[u8]) -> Option<Vec<u8>> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    Some(output.stdout)
}

fn gzip(input: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(input).unwrap();
    encoder.finish().unwrap()
}

/// The legacy frame that `lz4 -l` makes, as the kernel's build uses it.
fn lz4_legacy(input: &[u8]) -> Vec<u8> {
    let mut file = 0x184c_2102_u32.to_le_bytes().to_vec();
    for block in input.chunks(8 << 20) {
        let compressed = lz4_flex::block::compress(block);
        file.extend((compressed.len() as u32).to_le_bytes());
        file.extend(compressed);
    }
    file
}

fn with_size(mut payload: Vec<u8>, size: usize) -> Vec<u8> {
    payload.extend((size as u32).to_le_bytes());
    payload
}

#[test]
fn every_compression_of_the_kernels_build_is_undone() {
    let vmlinux = vmlinux();
    let size = vmlinux.len();
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    bzip2.write_all(&vmlinux).unwrap();
    let mut payloads = vec![
        ("gzip", gzip(&vmlinux)),
        (
            "zstd",
            with_size(zstd::encode_all(vmlinux.as_slice(), 19).unwrap(), size),
        ),
        ("lz4", with_size(lz4_legacy(&vmlinux), size)),
        ("bzip2", with_size(bzip2.finish().unwrap(), size)),
    ];
    // The options of the kernel's scripts/xz_wrap.sh and scripts/Makefile.lib.
    let xz_options = ["--check=crc32", "--x86", "--lzma2=dict=32MiB"];
    match compress_with("xz", &xz_options, &vmlinux) {
        Some(xz) => payloads.push(("xz", with_size(xz, size))),
        None => println!("skipped: xz is not installed"),
    }
    if let Some(lzma) = compress_with("xz", &["--format=lzma", "-9"], &vmlinux) {
        payloads.push(("lzma", with_size(lzma, size)));
    }
    for (name, payload) in payloads {
        let file = bzimage(&payload);
        let image = extract(&file).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(image.bytes, vmlinux, "{name}");
        assert_eq!(image.architecture, Architecture::X86_64);
        assert_eq!(image.release().as_deref(), Some("6.1.0-test"));
    }
}

#[test]
fn an_uncompressed_kernel_is_taken_as_it_is() {
    let vmlinux = vmlinux();
    let image = extract(&vmlinux).unwrap();
    assert!(matches!(image.bytes, Cow::Borrowed(_)));
}

#[test]
fn arm_images_are_found_plain_compressed_and_in_zboot() {
    let mut image = vec![0; 256];
    image[56..60].copy_from_slice(b"ARM\x64");
    let payload = gzip(&image);
    let mut zboot = b"MZ\0\0zimg".to_vec();
    zboot.extend(64_u32.to_le_bytes());
    zboot.extend((payload.len() as u32).to_le_bytes());
    zboot.resize(64, 0);
    zboot.extend(&payload);
    for file in [&image, &payload, &zboot] {
        let found = extract(file).unwrap();
        assert_eq!(
            (found.bytes.as_ref(), found.architecture),
            (image.as_slice(), Architecture::Aarch64)
        );
    }
    assert!(matches!(
        extract(&zboot[..70]),
        Err(ImageError::Truncated(_))
    ));
}

#[test]
fn what_is_no_kernel_is_refused_with_its_reason() {
    let vmlinux = vmlinux();
    let good = bzimage(&gzip(&vmlinux));
    let message = |file: &[u8]| extract(file).unwrap_err().to_string();
    assert!(message(b"").starts_with("it is neither"));
    assert!(message(b"#!/bin/sh\n").starts_with("it is neither"));
    assert!(message(&good[..good.len() - 100]).contains("truncated"));

    let mut old = good.clone();
    old[0x206..0x208].copy_from_slice(&0x0207_u16.to_le_bytes());
    assert!(message(&old).contains("2.07"));

    assert!(message(&bzimage(b"????????")).contains("compression is not known"));

    let mut size = gzip(&vmlinux);
    let end = size.len();
    size[end - 10] ^= 1;
    assert!(message(&bzimage(&size)).contains("does not decompress"));
    let wrong = with_size(zstd::encode_all(vmlinux.as_slice(), 1).unwrap(), 7);
    assert!(message(&bzimage(&wrong)).contains("in place of 7"));

    let mut no_pvh = vmlinux.clone();
    let note = memchr::memmem::find(&no_pvh, b"Xen\0").unwrap();
    no_pvh[note] = b'x';
    assert!(message(&no_pvh).contains("CONFIG_PVH"));

    let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    assert!(message(&own).contains("no kernel"), "{}", message(&own));
}

#[test]
fn output_is_bounded() {
    let zeros = vec![0; 1 << 20];
    for payload in [gzip(&zeros), zstd::encode_all(zeros.as_slice(), 1).unwrap()] {
        let compression = Compression::detect(&payload).unwrap();
        let error = compression.decompress(&payload, 1000).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(compression.decompress(&payload, 1 << 20).unwrap(), zeros);
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..2048), kind in 0..4) {
        match kind {
            0 => bytes.splice(0..0, *b"\x7fELF\x02\x01\x01").for_each(drop),
            1 if bytes.len() > 0x250 => {
                bytes[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
                bytes[0x202..0x206].copy_from_slice(b"HdrS");
            }
            2 => bytes.splice(0..0, *b"MZ\0\0zimg").for_each(drop),
            _ => {}
        }
        let _ = extract(&bytes);
    }

    #[test]
    fn no_damage_to_a_kernel_makes_it_panic(at in 0_usize..4000, byte in any::<u8>(), cut in 0_usize..4000) {
        let mut file = bzimage(&gzip(&vmlinux()));
        let length = file.len();
        file[at % length] = byte;
        let _ = extract(&file);
        let _ = extract(&file[..cut.min(length)]);
        let mut plain = vmlinux();
        let length = plain.len();
        plain[at % length] = byte;
        let _ = extract(&plain);
    }
}
