//! Setup with Debian's real package: fetched with apt where the archive is reachable, or the file that
//! FCVM_TEST_KERNEL_DEB names.

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use fcvm_kernel::{
    Architecture, GuestKernel, KernelError, SetupOptions, SetupStage, from_file, installed, setup,
    verify,
};

/// Runs setup and returns the stages that it reported.
fn run(
    directory: &Path,
    options: &SetupOptions,
) -> (fcvm_kernel::Result<GuestKernel>, Vec<SetupStage>) {
    let mut stages = Vec::new();
    let result = setup(directory, options, &mut |event| {
        assert!(
            event.total.is_none_or(|total| event.done <= total),
            "{event:?}"
        );
        stages.push(event.stage);
    });
    (result, stages)
}

#[test]
fn fetches_once_and_repairs_what_is_damaged() {
    let Some(options) = common::setup_options() else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    assert_eq!(installed(directory).unwrap(), None);

    let (kernel, stages) = run(directory, &options);
    let kernel = kernel.unwrap();
    assert!(stages.contains(&SetupStage::Unpack));
    assert_eq!(installed(directory).unwrap().as_ref(), Some(&kernel));
    assert!(
        kernel.version.starts_with(|c: char| c.is_ascii_digit()),
        "{kernel:?}"
    );
    let names: Vec<&str> = kernel
        .modules
        .iter()
        .map(|module| module.name.as_str())
        .collect();
    for driver in [
        "virtio_mmio",
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
        "erofs",
        "overlay",
    ] {
        assert!(names.contains(&driver), "{names:?}");
    }
    let list = fs::read_to_string(kernel.vmlinux.with_file_name("modules/list")).unwrap();
    let listed: Vec<&str> = list
        .lines()
        .map(|line| line.trim_end_matches(".ko"))
        .collect();
    assert_eq!(listed, names);
    let place = |name: &str| names.iter().position(|found| *found == name);
    assert!(place("virtio_ring") < place("virtio") && place("virtio") < place("virtio_mmio"));
    let bus = place("virtio_pci");
    for part in ["virtio_pci_legacy_dev", "virtio_pci_modern_dev"] {
        assert!(place(part).is_some() && place(part) < bus, "{names:?}");
    }
    assert!(bus < place("virtio_blk"), "{names:?}");
    assert!(
        !directory.join("apt").exists(),
        "the lists of a finished setup are removed"
    );

    // The second time nothing is fetched; what a killed setup left is removed.
    let mut again = options.clone();
    again.package = None;
    fs::create_dir(directory.join(".partial-left")).unwrap();
    let (second, stages) = run(directory, &again);
    assert_eq!(
        (second.unwrap(), stages),
        (kernel.clone(), vec![SetupStage::Verify])
    );
    assert!(!directory.join(".partial-left").exists());

    damage_is_found_and_repaired(directory, &options, &kernel);
    files_of_the_user_are_taken(directory, &kernel);
}

fn damage_is_found_and_repaired(directory: &Path, options: &SetupOptions, kernel: &GuestKernel) {
    // A changed byte under an unchanged time is found by its checksum only.
    let module = &kernel.modules[0].path;
    let time = fs::metadata(module).unwrap().modified().unwrap();
    let mut bytes = fs::read(module).unwrap();
    bytes[100] ^= 1;
    fs::write(module, bytes).unwrap();
    let module_file = fs::File::options().append(true).open(module).unwrap();
    module_file.set_modified(time).unwrap();
    installed(directory).unwrap();
    let error = verify(directory).unwrap_err();
    assert!(matches!(error, KernelError::Damaged { .. }), "{error}");

    // A cut file is found at once.
    let length = fs::metadata(&kernel.vmlinux).unwrap().len();
    let vmlinux = fs::File::options()
        .write(true)
        .open(&kernel.vmlinux)
        .unwrap();
    vmlinux.set_len(length - 1).unwrap();
    let error = installed(directory).unwrap_err().to_string();
    assert!(
        error.contains("damaged") && error.contains("fcvm setup"),
        "{error}"
    );

    assert_eq!(&run(directory, options).0.unwrap(), kernel);
    verify(directory).unwrap();

    // Times alone are no damage: the directory was copied.
    fs::File::options()
        .append(true)
        .open(module)
        .unwrap()
        .set_modified(time + std::time::Duration::from_secs(1))
        .unwrap();
    assert_eq!(installed(directory).unwrap().as_ref(), Some(kernel));

    broken_records_are_told_apart(directory, options, kernel);
}

fn broken_records_are_told_apart(directory: &Path, options: &SetupOptions, kernel: &GuestKernel) {
    // A later format is refused, and not replaced.
    let manifest = kernel.vmlinux.with_file_name("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"version\": 1", "\"version\": 99")).unwrap();
    let mut without_package = options.clone();
    without_package.package = None;
    let error = run(directory, &without_package).0.unwrap_err();
    assert!(
        matches!(error, KernelError::FutureVersion { found: 99, .. }),
        "{error}"
    );
    fs::write(&manifest, text).unwrap();

    // A path that leads out of the directory is damage.
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(
        &manifest,
        text.replace("\"vmlinux\",", "\"../../vmlinux\","),
    )
    .unwrap();
    assert!(matches!(
        installed(directory),
        Err(KernelError::Damaged { .. })
    ));
    fs::write(&manifest, text).unwrap();

    // A link that leads nowhere is no kernel; one that leads out is damage.
    let link = directory.join("current");
    let target = fs::read_link(&link).unwrap();
    fs::remove_file(&link).unwrap();
    symlink("gone", &link).unwrap();
    assert_eq!(installed(directory).unwrap(), None);
    fs::remove_file(&link).unwrap();
    symlink("/etc", &link).unwrap();
    assert!(matches!(
        installed(directory),
        Err(KernelError::Damaged { .. })
    ));
    fs::remove_file(&link).unwrap();
    symlink(target, &link).unwrap();
    assert_eq!(installed(directory).unwrap().as_ref(), Some(kernel));
}

fn files_of_the_user_are_taken(directory: &Path, kernel: &GuestKernel) {
    let own = from_file(directory, &kernel.vmlinux).unwrap();
    assert_eq!(
        (&own.vmlinux, &own.version),
        (&kernel.vmlinux, &kernel.version)
    );
    assert!(own.modules.is_empty());
}

#[test]
fn the_wrong_package_is_refused_and_leaves_nothing() {
    let Some(architecture) = Architecture::host() else {
        println!("skipped: there is no guest kernel for this machine's architecture");
        return;
    };
    if std::process::Command::new("dpkg-deb")
        .arg("--version")
        .output()
        .is_err()
    {
        println!("skipped: dpkg-deb is not installed");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let package = directory.path().join("broken.deb");
    fs::write(&package, "no package").unwrap();
    let mut options = SetupOptions::new(architecture);
    options.package = Some(package.clone());
    let kernels = directory.path().join("kernels");
    let error = setup(&kernels, &options, &mut |_| {})
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("broken.deb") && error.contains("not a"),
        "{error}"
    );

    // A real package of another kind.
    let tree = directory.path().join("tree");
    fs::create_dir_all(tree.join("DEBIAN")).unwrap();
    fs::write(
        tree.join("DEBIAN/control"),
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@registry.example>\nDescription: x\n",
    )
    .unwrap();
    let status = std::process::Command::new("dpkg-deb")
        .args(["--root-owner-group", "--build"])
        .args([&tree, &package])
        .output()
        .unwrap()
        .status;
    assert!(status.success());
    let error = setup(&kernels, &options, &mut |_| {})
        .unwrap_err()
        .to_string();
    assert!(error.contains("vmlinuz"), "{error}");

    let left: Vec<_> = fs::read_dir(&kernels)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["lock"]);
}
