//! Tests of [`super`] on module files made here: an ELF file with nothing but `.modinfo`.

use super::*;

/// An object file with a `.modinfo` section of the given strings.
fn module(strings: &[&str]) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let info: Vec<u8> = strings
        .iter()
        .flat_map(|text| text.bytes().chain([0]))
        .collect();
    let sections_at = 64 + info.len() + names.len();
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [1_u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for wide in [0_u64, 0, sections_at as u64] {
        file.extend(wide.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 0, 0, 64, 3, 2] {
        file.extend(half.to_le_bytes());
    }
    file.extend(&info);
    file.extend(names);
    let mut section = |name: u32, kind: u32, offset: usize, size: usize| {
        file.extend(name.to_le_bytes());
        file.extend(kind.to_le_bytes());
        for wide in [0, 0, offset as u64, size as u64, 0, 1, 0] {
            file.extend(u64::to_le_bytes(wide));
        }
    };
    section(0, 0, 0, 0);
    section(1, 1, 64, info.len());
    section(10, 3, 64 + info.len(), names.len());
    // The last of a section header's ten fields is written as part of the next; pad the end.
    file.resize(sections_at + 3 * 64, 0);
    file
}

fn index(files: &[(&str, Vec<u8>)], builtin: &str) -> (tempfile::TempDir, ModuleIndex) {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(directory.path().join(name), bytes).unwrap();
    }
    let index = ModuleIndex::read(directory.path(), builtin).unwrap();
    (directory, index)
}

fn names(index: &ModuleIndex, roots: &[&str]) -> Result<Vec<String>> {
    let roots: Vec<String> = roots.iter().map(|root| (*root).to_owned()).collect();
    Ok(index
        .resolve(&roots)?
        .into_iter()
        .map(|module| module.name)
        .collect())
}

#[test]
fn each_module_comes_after_those_it_depends_on_and_once() {
    let (_directory, index) = index(
        &[
            (
                "virtio-mmio.ko",
                module(&["license=GPL", "depends=virtio,virtio_ring"]),
            ),
            ("virtio.ko", module(&["depends=virtio-ring"])),
            (
                "virtio_ring.ko",
                module(&["depends=", "softdep=pre: ignored"]),
            ),
            (
                "virtio_net.ko",
                module(&["depends=net_failover,virtio,libcrc32c"]),
            ),
            ("net_failover.ko", module(&["depends=failover"])),
            ("failover.ko", module(&[])),
            ("README", b"no module".to_vec()),
        ],
        "kernel/lib/libcrc32c.ko\nkernel/fs/ext4/ext4.ko\n",
    );
    assert_eq!(
        names(&index, &["virtio_mmio", "virtio-net", "ext4"]).unwrap(),
        [
            "virtio_ring",
            "virtio",
            "virtio_mmio",
            "failover",
            "net_failover",
            "virtio_net"
        ]
    );
}

#[test]
fn compressed_modules_are_decompressed() {
    use std::io::Write;
    let plain = module(&["depends="]);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&plain).unwrap();
    let gzip = encoder.finish().unwrap();
    let zstd = zstd::encode_all(plain.as_slice(), 1).unwrap();
    let (_directory, index) = index(&[("a.ko.gz", gzip), ("b.ko.zst", zstd)], "");
    let modules = index.resolve(&["a".to_owned(), "b".to_owned()]).unwrap();
    assert!(modules.iter().all(|module| module.bytes == plain));
}

#[test]
fn what_cannot_be_loaded_is_refused() {
    let (_directory, index) = index(
        &[
            ("a.ko", module(&["depends=b"])),
            ("b.ko", module(&["depends=a"])),
            ("c.ko", module(&["depends=gone"])),
            ("d.ko", b"\x7fELF but not".to_vec()),
            ("e.ko.xz", b"\xfd7zXZ\0 but not".to_vec()),
        ],
        "",
    );
    for (root, message) in [
        (
            "a",
            "the kernel module a cannot be used: it depends on itself",
        ),
        ("c", "the kernel has no module 'gone', which c needs"),
        (
            "nowhere",
            "the kernel has no module 'nowhere', which the guest needs",
        ),
    ] {
        assert_eq!(names(&index, &[root]).unwrap_err().to_string(), message);
    }
    for root in ["d", "e"] {
        assert!(matches!(
            names(&index, &[root]),
            Err(KernelError::Module { .. })
        ));
    }
}
