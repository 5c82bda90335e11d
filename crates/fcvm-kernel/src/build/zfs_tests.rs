//! What can be said of OpenZFS in a kernel without building one.

use super::*;
use crate::build::SourceSpec;

fn source(tree: &Path, release: &str, is_fixed: bool) -> Source {
    Source {
        id: "a".to_owned(),
        tree: tree.to_owned(),
        version: release.parse().unwrap(),
        release: release.to_owned(),
        spec: SourceSpec::Tree(tree.to_owned()),
        is_fixed,
    }
}

fn tree() -> tempfile::TempDir {
    let tree = tempfile::tempdir().unwrap();
    fs::create_dir(tree.path().join("fs")).unwrap();
    let kconfig = format!("menu \"File systems\"\n{KCONFIG_BEFORE}\nendmenu\n");
    fs::write(tree.path().join("fs/Kconfig"), kconfig).unwrap();
    tree
}

#[test]
fn each_kernel_has_the_release_of_its_own_suite() {
    for (kernel, version, suite) in [
        ("6.1", "2.1.11", "bookworm"),
        ("6.12", "2.3.9", "trixie"),
        ("6.6", "2.3.9", "trixie"),
        ("7.2", "2.4.4", "sid"),
    ] {
        let release = release_for(kernel.parse().unwrap()).unwrap();
        assert_eq!(
            (release.version, release.suite),
            (version, suite),
            "{kernel}"
        );
    }
}

#[test]
fn a_kernel_that_no_release_knows_is_refused_in_one_line() {
    for kernel in ["3.2", "7.3", "8.0"] {
        let message = release_for(kernel.parse().unwrap())
            .unwrap_err()
            .to_string();
        assert!(!message.contains('\n'), "{message}");
        assert!(message.contains(&format!("Linux {kernel}")), "{message}");
        assert!(
            message.contains("2.3.9 of trixie (Linux 4.18 to 6.19)"),
            "{message}"
        );
    }
}

#[test]
fn the_package_has_the_last_word_on_kernels() {
    let tree = tempfile::tempdir().unwrap();
    let meta = "Version:       2.1.11\nLinux-Maximum: 6.2\nLinux-Minimum: 3.10\n";
    fs::write(tree.path().join("META"), meta).unwrap();
    let check = |kernel: &str| check_meta(tree.path(), kernel.parse().unwrap());
    assert_eq!(check("6.1").unwrap(), "2.1.11");
    let message = check("6.12").unwrap_err().to_string();
    assert!(message.contains("2.1.11 (Linux 3.10 to 6.2)"), "{message}");
}

#[test]
fn the_symbol_is_declared_once() {
    let tree = tree();
    let source = source(tree.path(), "6.12.1", true);
    declare(&source).unwrap();
    let once = fs::read_to_string(tree.path().join("fs/Kconfig")).unwrap();
    assert_eq!(
        once,
        format!("menu \"File systems\"\n{KCONFIG_LINE}\n{KCONFIG_BEFORE}\nendmenu\n")
    );
    declare(&source).unwrap();
    assert_eq!(
        fs::read_to_string(tree.path().join("fs/Kconfig")).unwrap(),
        once
    );
    assert!(tree.path().join("fs/zfs/Kconfig").is_file());
}

#[test]
fn a_directory_of_the_users_is_not_changed() {
    let tree = tree();
    let message = declare(&source(tree.path(), "6.12.1", false))
        .unwrap_err()
        .to_string();
    assert!(message.contains("copy-builtin"), "{message}");
    assert!(!tree.path().join("fs/zfs").exists());
    fs::create_dir(tree.path().join("fs/zfs")).unwrap();
    fs::write(tree.path().join("fs/zfs/Kconfig"), "config ZFS\n").unwrap();
    declare(&source(tree.path(), "6.12.1", false)).unwrap();
}

#[test]
fn what_is_the_same_keeps_its_time() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir(from.path().join("a")).unwrap();
    fs::write(from.path().join("a/same"), "1").unwrap();
    fs::write(from.path().join("a/other"), "1").unwrap();
    copy_differing(from.path(), to.path()).unwrap();
    let old = std::time::UNIX_EPOCH;
    for name in ["a/same", "a/other"] {
        let file = File::options()
            .append(true)
            .open(to.path().join(name))
            .unwrap();
        file.set_modified(old).unwrap();
    }
    fs::write(from.path().join("a/other"), "2").unwrap();
    copy_differing(from.path(), to.path()).unwrap();
    let time = |name: &str| {
        fs::metadata(to.path().join(name))
            .unwrap()
            .modified()
            .unwrap()
    };
    assert_eq!(time("a/same"), old);
    assert_ne!(time("a/other"), old);
}

#[test]
fn configures_reason_is_one_line() {
    let said = "configure: WARNING: x\nconfigure: error: \n\t*** Unable to build an empty module.\n\t*** x\n";
    assert_eq!(configure_error(said), "Unable to build an empty module. x");
    assert_eq!(configure_error(""), "it gave no reason");
}

fn built(name: &str, zfs: Option<&str>) -> BuiltKernel {
    let file = serde_json::json!({"path": "f", "size_bytes": 0, "modified_ns": 0, "sha256": ""});
    serde_json::from_value(serde_json::json!({
        "version": 1, "name": name, "key": "", "profile": "guest-zfs", "use": "guest", "source": "", "source_id": "",
        "release": "", "compiler": "", "march": null, "object_count": 0, "built_at_seconds": 0, "vmlinux": file,
        "image": file, "config": file, "symbols": [],
        "zfs": zfs.map(|version| serde_json::json!({"version": version, "package": ""})),
    }))
    .unwrap()
}

#[test]
fn an_image_gets_the_version_of_the_kernel_that_is_built() {
    let kernels = [
        built("plain", None),
        built("new", Some("2.3.10")),
        built("old", Some("2.1.11")),
    ];
    assert_eq!(version_for_suite(&kernels, "trixie").unwrap(), "2.3.10");
    assert_eq!(version_for_suite(&kernels, "bookworm").unwrap(), "2.1.11");
    let message = |kernels: &[BuiltKernel], suite: &str| {
        let message = version_for_suite(kernels, suite).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    };
    let said = message(&kernels[2..], "trixie");
    assert!(
        said.contains("(old has 2.1.11)") && said.contains("--source debian:6.12"),
        "{said}"
    );
    assert!(message(&kernels[..1], "sid").contains("--source debian:7.2"));
    assert!(message(&[], "bullseye").contains("bookworm, trixie, sid"));
}
