//! A Debian image, made by the real mmdebstrap from the machine's package mirror.

mod common;

use std::fs;

use common::{Recorder, Scratch, all, tool_missing};
use fcvm_image::bootstrap::{BootstrapError, BootstrapOptions, Variant, ZFS_LABEL, bootstrap};
use fcvm_image::{ImageStore, Silent};

fn options() -> BootstrapOptions {
    BootstrapOptions {
        variant: Variant::Essential,
        ..BootstrapOptions::new("bookworm")
    }
}

#[test]
fn bookworm_becomes_an_image() {
    if tool_missing("mmdebstrap") {
        return;
    }
    let scratch = Scratch::new();
    let store = scratch.store();
    let progress = Recorder::default();
    let image = match bootstrap(&store, &options(), &progress) {
        Err(BootstrapError::NoNamespaces(reason)) => {
            println!("skipped: mmdebstrap does not work for this user here: {reason}");
            return;
        }
        Err(BootstrapError::Failed { reason, .. }) if reason.contains("resolv") => {
            println!("skipped: no Debian mirror is reachable: {reason}");
            return;
        }
        other => other.unwrap(),
    };
    assert_eq!(store.resolve("debian:bookworm").unwrap().id, image.id);
    assert_eq!(image.names[0].to_string(), "localhost/debian:bookworm");
    let run = image.config.config().as_ref().unwrap();
    assert_eq!(run.cmd().as_deref().unwrap(), ["bash"]);
    assert!(run.env().as_deref().unwrap()[0].starts_with("PATH=/usr/local/sbin:"));
    assert!(
        progress
            .lines()
            .iter()
            .any(|line| line.starts_with("installing essential"))
    );
    assert_eq!(
        progress.lines().last().unwrap(),
        "debian bookworm: installed"
    );
    assert_eq!(all(&store.dir().join("tmp")), []);
    let root = store.root_image(&image, &Silent).unwrap();
    assert!(fs::metadata(root).unwrap().len() > 50 << 20);
}

/// A program in place of mmdebstrap, for what the real one does on other machines.
fn program(scratch: &Scratch, script: &str) -> BootstrapOptions {
    let program = scratch.path("program");
    fcvm_testing::write_program(&program, &format!("#!/bin/sh\n{script}\n"));
    BootstrapOptions {
        program,
        ..options()
    }
}

#[test]
fn failures_say_what_to_do_and_leave_nothing() {
    let scratch = Scratch::new();
    let store = scratch.store();
    let fail = |options: &BootstrapOptions| {
        let error = bootstrap(&store, options, &Silent).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        assert_eq!(all(&store.dir().join("tmp")), [], "{error}");
        assert_eq!(all(&store.dir().join("blobs")), [], "{error}");
        error
    };
    for (script, expected) in [
        (
            "echo some bytes; echo 'E: apt failed' >&2; echo 'I: cleanup' >&2; exit 1",
            "E: apt failed",
        ),
        ("echo 'E: newuidmap failed' >&2; exit 1", "uidmap"),
        (
            "echo 'GPG error: NO_PUBKEY 0E98' >&2; echo 'E: apt-get update failed: NO_PUBKEY' >&2; exit 1",
            "debian-archive-keyring",
        ),
        ("exit 3", "did not say why"),
        ("kill -9 $$", "did not say why"),
    ] {
        let error = fail(&program(&scratch, script));
        assert!(error.contains(expected), "{script}: {error}");
    }
    let missing = BootstrapOptions {
        program: "/no/such/mmdebstrap".into(),
        ..options()
    };
    assert!(fail(&missing).contains("apt install mmdebstrap"));
    for suite in ["", "-x", "a b", "../x", "book;worm"] {
        let wrong = BootstrapOptions {
            suite: suite.into(),
            ..options()
        };
        assert!(fail(&wrong).contains("not a suite"), "{suite}");
    }
    let wrong = BootstrapOptions {
        include: vec!["vim".into(), "--opt".into()],
        ..options()
    };
    assert!(fail(&wrong).contains("'--opt' is not the name of a Debian package"));
    let wrong = BootstrapOptions {
        sources: Some("-".into()),
        ..options()
    };
    assert!(fail(&wrong).contains("neither a mirror"));
}

#[test]
fn the_program_is_asked_for_what_was_wanted() {
    let scratch = Scratch::new();
    let said = scratch.path("said");
    let mut options = program(
        &scratch,
        &format!(
            "echo \"$TMPDIR $*\" > {}; tar -cf - -C /etc hostname",
            said.display()
        ),
    );
    options.include = vec!["vim".into(), "curl".into()];
    options.sources = Some("https://mirror.example/debian".into());
    options.name = Some("registry.example/mine:1".parse().unwrap());
    options.work_dir = Some(scratch.path(""));
    let store = ImageStore::open(&scratch.path("other")).unwrap();
    let image = bootstrap(&store, &options, &Silent).unwrap();
    assert_eq!(image.display_name(), "registry.example/mine:1");
    let said = fs::read_to_string(said).unwrap();
    assert!(
        said.starts_with(&scratch.path("").display().to_string()),
        "{said}"
    );
    for part in [
        "--variant=essential",
        "--include=vim,curl",
        "bookworm - https://mirror.example/debian",
    ] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn zfs_is_asked_for_in_one_version_with_a_package_for_the_kernels_part() {
    let scratch = Scratch::new();
    let (said, control) = (scratch.path("said"), scratch.path("control"));
    let mut options = program(
        &scratch,
        &format!(
            "echo \"$*\" > {}; dpkg-deb --field \"$FCVM_STUB\" > {}; tar -cf - -C /etc hostname",
            said.display(),
            control.display()
        ),
    );
    options.zfs = Some("2.3.9".into());
    let image = bootstrap(&scratch.store(), &options, &Silent).unwrap();
    let labels = image
        .config
        .config()
        .as_ref()
        .unwrap()
        .labels()
        .clone()
        .unwrap();
    assert_eq!(labels.get(ZFS_LABEL).unwrap(), "2.3.9");
    let said = fs::read_to_string(said).unwrap();
    assert!(said.contains("--components=main,contrib "), "{said}");
    assert!(
        said.contains("--include=zfsutils-linux=2.3.9*,zfs-zed=2.3.9* "),
        "{said}"
    );
    let control = fs::read_to_string(control).unwrap();
    assert!(control.contains("Provides: zfs-modules\n"), "{control}");
}

#[test]
fn another_zfs_than_the_kernels_is_refused() {
    let scratch = Scratch::new();
    let script = "echo \"E: Version '2.2.0*' for 'zfsutils-linux' was not found\" >&2; exit 100";
    let mut options = program(&scratch, script);
    options.zfs = Some("2.2.0".into());
    let message = bootstrap(&scratch.store(), &options, &Silent)
        .unwrap_err()
        .to_string();
    assert!(
        message.starts_with("bookworm has no OpenZFS 2.2.0"),
        "{message}"
    );
    options.zfs = Some("2;x".into());
    assert!(bootstrap(&scratch.store(), &options, &Silent).is_err());
}
