//! Every built-in profile, resolved by the real Kconfig of real sources: nothing gets lost.
//!
//! `FCVM_TEST_KERNEL_SOURCES` names the directory in which `make test` keeps the sources (what configuring
//! takes of them: 25 MB each). Without it, or without the archive, the test says that it is skipped.

use std::path::Path;
use std::process::Command;

use fcvm_kernel::build::{
    self, Answers, GuestMemory, Hardware, Make, Prefer, Profile, Purpose, Scope, SourceSpec,
};

/// A directory, an archive and a repository of the same source as a package.
#[test]
fn every_kind_of_source_configures_alike() {
    let Some(directory) = std::env::var_os("FCVM_TEST_KERNEL_SOURCES") else {
        println!("skipped: FCVM_TEST_KERNEL_SOURCES is not set");
        return;
    };
    let fetch = |text: &str, directory: &Path| {
        let spec: SourceSpec = text.parse().unwrap();
        build::fetch(directory, &spec, Scope::Configuration, &mut |_| {})
    };
    let package = match fetch("debian:6.1", Path::new(&directory)) {
        Ok(source) => source,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let work = tempfile::tempdir().unwrap();
    let at = |name: &str| work.path().join(name).to_str().unwrap().to_owned();
    let script = "set -e; cd \"$1\"; shift
        { ls -d linux/Kbuild linux/Makefile linux/scripts linux/arch/x86/Makefile*
          find linux -name 'Kconfig*' -type f; } | tar --create --files-from=- --file \"$1/linux.tar\"
        cd \"$1\"; sha256sum linux.tar; tar --extract --file linux.tar; cd linux
        git init --quiet --initial-branch=main; git add --all --force
        git -c user.name=t -c user.email=t@localhost commit --quiet --message=t";
    let output = Command::new("sh")
        .args(["-c", script, "sh"])
        .args([package.tree.parent().unwrap(), work.path()])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("git: not found") {
        println!("skipped: git is not installed");
        return;
    }
    assert!(output.status.success(), "{said}");
    let sum = String::from_utf8(output.stdout).unwrap();
    let (sum, _) = sum.split_once(' ').unwrap();

    let profile = Profile::load("guest-min").unwrap();
    let values = |source: &build::Source, name: &str| {
        let at = work.path().join("out").join(name);
        let resolved = build::resolve(source, &profile, &at, &Make::default()).unwrap();
        resolved.check().unwrap();
        resolved.values
    };
    for (name, text) in [
        ("tree", format!("tree:{}", at("linux"))),
        ("tar", format!("tar:{}#sha256={sum}", at("linux.tar"))),
        ("git", format!("git:{}#main", at("linux"))),
    ] {
        let source = fetch(&text, &work.path().join("sources")).unwrap();
        assert_eq!(source.release, package.release, "{name}");
        assert_eq!(source.is_fixed, name != "tree");
        // The others have not been through so much.
        if name == "git" {
            assert_eq!(values(&source, name), values(&package, "package"));
        }
    }
}

#[test]
fn every_profile_resolves_with_two_kernels() {
    let Some(directory) = std::env::var_os("FCVM_TEST_KERNEL_SOURCES") else {
        println!("skipped: FCVM_TEST_KERNEL_SOURCES is not set");
        return;
    };
    let directory = Path::new(&directory);
    std::thread::scope(|scope| {
        for source in ["debian:6.1", "debian:6.12"] {
            scope.spawn(move || every_profile_resolves_with(source, directory));
        }
    });
}

fn every_profile_resolves_with(source: &str, directory: &Path) {
    let output = tempfile::tempdir().unwrap();
    let spec: SourceSpec = source.parse().unwrap();
    let fetched = build::fetch(directory, &spec, Scope::Configuration, &mut |_| {});
    let source = match fetched {
        Ok(source) => source,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let at = output.path().join(&source.id);
    let profiles = Profile::built_in().unwrap().into_iter();
    for profile in profiles.chain(answered(output.path())) {
        let resolved = build::resolve(&source, &profile, &at, &Make::default()).unwrap();
        let lost: Vec<String> = resolved.lost.iter().map(ToString::to_string).collect();
        assert!(
            lost.is_empty(),
            "{} on {}: {lost:#?}",
            profile.name,
            source.release
        );
        defences_are_on(&profile, &resolved);
    }
    what_is_lost_is_told(&source, &at);
}

/// Profiles made by answers that together include every part.
fn answered(directory: &Path) -> Vec<Profile> {
    let host = |prefer, guest_memory, hardware| Purpose::Host {
        prefer,
        guest_memory,
        hardware,
    };
    let both = [
        host(Prefer::Throughput, GuestMemory::None, Hardware::Common),
        host(Prefer::Latency, GuestMemory::Reserved, Hardware::Virtual),
    ];
    let profiles = both.into_iter().zip(["one", "two"]).map(|(purpose, name)| {
        let answers = Answers { purpose, zfs: true };
        let path = directory.join(format!("{name}.toml"));
        std::fs::write(&path, answers.profile_text(name, "").unwrap()).unwrap();
        Profile::load(path.to_str().unwrap()).unwrap()
    });
    profiles.collect()
}

/// What a configuration that starts from nothing would leave off, by either kernel's names.
fn defences_are_on(profile: &Profile, resolved: &build::Resolved) {
    let is_on = |symbol: &str| resolved.values.contains_key(symbol);
    for (new, old) in [
        ("CPU_MITIGATIONS", "SPECULATION_MITIGATIONS"),
        ("MITIGATION_RETPOLINE", "RETPOLINE"),
        ("MITIGATION_PAGE_TABLE_ISOLATION", "PAGE_TABLE_ISOLATION"),
        ("MITIGATION_SRSO", "CPU_SRSO"),
        ("STACKPROTECTOR_STRONG", ""),
        ("HARDENED_USERCOPY", ""),
        ("FORTIFY_SOURCE", ""),
        ("RANDOMIZE_BASE", ""),
        ("RANDOMIZE_MEMORY", ""),
    ] {
        assert!(is_on(new) || is_on(old), "{}: {new}", profile.name);
    }
    assert!(!is_on("MODULES"), "{}", profile.name);
}

fn what_is_lost_is_told(source: &build::Source, at: &Path) {
    let mut profile = Profile::load("guest-min").unwrap();
    let settings = ["XFS_QUOTA", "NO_SUCH_SYMBOL_AT_ALL"].map(|name| format!("CONFIG_{name}=y"));
    profile.set(&settings).unwrap();
    let resolved = build::resolve(source, &profile, at, &Make::default()).unwrap();
    let lost: Vec<(&str, &str)> = resolved
        .lost
        .iter()
        .map(|lost| (lost.request.symbol.as_str(), lost.reason.as_str()))
        .collect();
    assert_eq!(
        lost,
        [
            ("NO_SUCH_SYMBOL_AT_ALL", "this source has no such symbol"),
            ("XFS_QUOTA", "it depends on XFS_FS"),
        ]
    );
}
