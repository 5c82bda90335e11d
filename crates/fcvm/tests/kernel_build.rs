//! What `fcvm kernel build` and `config` refuse, through the program: one line that says what to do, before anything is
//! compiled; and what a build says that fails. Nothing is fetched.

#![allow(missing_docs, reason = "a test program has no users")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sha2::{Digest as _, Sha256};

/// A directory with a source that has nothing but its version, as a tree and as an archive.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new(release: [u32; 3]) -> Self {
        let scratch = Self(tempfile::tempdir().unwrap());
        let [major, minor, patch] = release;
        let tree = scratch.path("linux");
        for directory in ["arch/x86", "scripts"] {
            fs::create_dir_all(tree.join(directory)).unwrap();
        }
        let makefile = format!("VERSION = {major}\nPATCHLEVEL = {minor}\nSUBLEVEL = {patch}\n");
        fs::write(tree.join("Makefile"), makefile).unwrap();
        for name in ["Kbuild", "Kconfig", "arch/x86/Kconfig", "arch/x86/Makefile"] {
            fs::write(tree.join(name), "").unwrap();
        }
        let status = Command::new("tar")
            .arg("--create")
            .arg("--file")
            .arg(scratch.path("linux.tar"))
            .arg("--directory")
            .arg(scratch.path(""))
            .arg("linux")
            .status()
            .unwrap();
        assert!(status.success());
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `tar:` with the archive's checksum.
    fn archive(&self) -> String {
        let bytes = fs::read(self.path("linux.tar")).unwrap();
        let sum: String = Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        format!("tar:{}#sha256={sum}", self.path("linux.tar").display())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fcvm"));
        command
            .arg("--data-dir")
            .arg(self.path("data"))
            .args(["kernel"])
            .args(arguments);
        command
    }

    /// The one line with which a command is refused.
    fn refusal(&self, arguments: &[&str]) -> String {
        refusal(&self.command(arguments).output().unwrap())
    }
}

fn refusal(output: &Output) -> String {
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(125), "{said}");
    let errors: Vec<&str> = said
        .lines()
        .filter(|line| line.starts_with("Error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{said}");
    errors[0].to_owned()
}

/// True, with a line that says so, where this machine cannot build kernels.
fn tools_are_missing() -> bool {
    let headers = ["gelf.h", "openssl/bio.h"];
    let missing: Vec<&str> = ["make", "gcc", "flex", "bison", "bc", "perl", "xz"]
        .into_iter()
        .filter(|program| find(program).is_none())
        .chain(headers.into_iter().filter(|header| {
            let include = ["/usr/include", "/usr/include/x86_64-linux-gnu"];
            !include
                .iter()
                .any(|directory| Path::new(directory).join(header).exists())
        }))
        .collect();
    if !missing.is_empty() {
        println!("skipped: building kernels needs {}", missing.join(", "));
    }
    !missing.is_empty()
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

#[test]
fn what_does_not_exist_is_told_with_what_does() {
    let scratch = Scratch::new([6, 12, 1]);
    for (arguments, expected) in [
        (
            ["config", "-p", "tiny"],
            "known are guest-min, guest, guest-zfs",
        ),
        (["config", "-p", "./mine.toml"], "mine.toml"),
        (
            ["build", "-s", "debian:5.10"],
            "Debian has debian:6.1, debian:6.12",
        ),
        (["build", "-s", "linux-6.1"], "known are debian:6.1"),
        (["build", "-s", "tar:linux.tar"], "#sha256="),
        (["config", "--set", "XFS=y"], "CONFIG_NAME=value"),
        (["build", "--march", "-x"], "--march"),
        (["show", "--", "none"], "fcvm kernel ls"),
    ] {
        // '-x' after '--march' is its value only with a sign of equality.
        let said = match arguments {
            ["build", "--march", value] => scratch.refusal(&["build", &format!("--march={value}")]),
            _ => scratch.refusal(&arguments),
        };
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}

#[test]
fn a_compiler_that_is_missing_is_told_with_its_package() {
    let scratch = Scratch::new([6, 12, 1]);
    // All but the compiler, so that nothing else is named.
    let bin = scratch.path("bin");
    fs::create_dir(&bin).unwrap();
    for program in ["make", "ld", "flex", "bison", "bc", "perl", "xz"] {
        fs::write(bin.join(program), "").unwrap();
    }
    for action in ["config", "build"] {
        let source = scratch.archive();
        let mut command = scratch.command(&[action, "--source", &source]);
        let said = refusal(&command.env("PATH", &bin).output().unwrap());
        assert!(
            said.contains("needs gcc") && said.contains("apt-get install gcc"),
            "{said}"
        );
        let mut command = scratch.command(&[action, "--source", &source, "--lto", "thin"]);
        let said = refusal(&command.env("PATH", &bin).output().unwrap());
        assert!(
            said.contains("apt-get install gcc clang lld llvm"),
            "{said}"
        );
    }
}

#[test]
fn a_fragment_that_contradicts_the_profile_is_refused_with_both_places() {
    let scratch = Scratch::new([6, 12, 1]);
    let fragment = scratch.path("mine.config");
    fs::write(&fragment, "CONFIG_XFS_FS=y\n# CONFIG_EXT4_FS is not set\n").unwrap();
    let fragment = fragment.to_str().unwrap();
    let said = scratch.refusal(&["config", "--fragment", fragment]);
    for part in [
        "CONFIG_EXT4_FS",
        "profile guest-min sets y",
        "mine.config:2 sets n",
        "--set",
    ] {
        assert!(said.contains(part), "{said}");
    }
}

#[test]
fn an_archive_that_was_tampered_with_is_not_unpacked() {
    if tools_are_missing() {
        return;
    }
    let scratch = Scratch::new([6, 12, 1]);
    let source = scratch.archive();
    let mut bytes = fs::read(scratch.path("linux.tar")).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(scratch.path("linux.tar"), bytes).unwrap();
    for action in ["config", "build"] {
        let said = scratch.refusal(&[action, "--source", &source]);
        assert!(said.contains("tampered with"), "{said}");
    }
    let left: Vec<_> = fs::read_dir(scratch.path("data/kernels/sources"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["lock"]);
}

#[test]
fn a_source_that_is_no_kernel_or_fits_no_zfs_is_refused() {
    if tools_are_missing() {
        return;
    }
    let scratch = Scratch::new([3, 2, 1]);
    let tree = format!("tree:{}", scratch.path("linux").display());
    let said = scratch.refusal(&["config", "--source", &tree, "--zfs", "builtin"]);
    assert!(said.contains("copy-builtin"), "{said}");
    let archive = scratch.archive();
    let said = scratch.refusal(&["config", "--source", &archive, "--zfs", "builtin"]);
    assert!(
        said.contains("no OpenZFS fits Linux 3.2: known are 2.1.11 of bookworm"),
        "{said}"
    );
    fs::remove_file(scratch.path("linux/Kconfig")).unwrap();
    let said = scratch.refusal(&["config", "--source", &tree]);
    assert!(said.contains("no kernel's source"), "{said}");
    let git = format!("git:{}#main", scratch.path("nothing").display());
    let said = scratch.refusal(&["config", "--source", &git]);
    assert!(said.contains("git fetch"), "{said}");
}

#[test]
fn a_disk_without_room_is_told_before_anything_is_unpacked() {
    if tools_are_missing() {
        return;
    }
    let scratch = Scratch::new([6, 12, 1]);
    let data = scratch.path("data");
    fs::create_dir(&data).unwrap();
    // A small tmpfs in a mount namespace of its own: no privilege is needed.
    let script = "mount -t tmpfs -o size=32m none \"$1\" || exit 77; shift; exec \"$@\"";
    let archive = scratch.archive();
    let inner = scratch.command(&["build", "--source", &archive]);
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
        .arg(&data)
        .arg(inner.get_program())
        .args(inner.get_args())
        .output();
    match output {
        Ok(output) if output.status.code() == Some(125) => {
            let said = refusal(&output);
            assert!(
                said.contains("no space") && said.contains("MB free"),
                "{said}"
            );
        }
        Ok(output) => println!(
            "skipped: no tmpfs can be mounted here: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ),
        Err(error) => println!("skipped: no unshare: {error}"),
    }
}

/// A source whose Makefile compiles each file, as a kernel's does, and no more of a kernel than that.
fn small_source(scratch: &Scratch) -> [String; 4] {
    let tree = scratch.path("linux");
    let makefile = "VERSION = 6
PATCHLEVEL = 12
SUBLEVEL = 1
allnoconfig:
\tcp $(KCONFIG_ALLCONFIG) $(O)/.config
olddefconfig: ;
bzImage: $(O)/first.o $(O)/second.o
$(O)/%.o: %.c
\t@echo '  CC      $*.o'
\t@$(CC) -c -o $@ $<
";
    let profile = "summary = 'small'\n[symbols.'All']\nFIRST = { why = 'a test', cost = 'none' }\n";
    for (name, text) in [
        ("linux/Makefile", makefile),
        ("linux/Kconfig", "config FIRST\n\tbool \"first\"\n"),
        ("linux/first.c", "#warning error: a word\nint first;\n"),
        (
            "linux/second.c",
            "int second = missing;\nint third = absent;\n",
        ),
        ("small.toml", profile),
    ] {
        fs::write(scratch.path(name), text).unwrap();
    }
    let profile = scratch.path("small.toml").display().to_string();
    [
        "--profile".to_owned(),
        profile,
        "--source".to_owned(),
        format!("tree:{}", tree.display()),
    ]
}

#[test]
fn a_failing_build_tells_its_first_error_and_where_the_rest_is() {
    if tools_are_missing() {
        return;
    }
    let scratch = Scratch::new([6, 12, 1]);
    let inputs = small_source(&scratch);
    let mut command = scratch.command(&["build", "--jobs", "1"]);
    let output = command.args(inputs).output().unwrap();
    let said = refusal(&output);
    assert!(
        said.contains("building small-6.12.1-")
            && said.contains("second.c:1:14: error: 'missing' undeclared"),
        "{said}"
    );
    let progress = String::from_utf8(output.stderr).unwrap();
    assert!(progress.contains("objects (first.o)"), "{progress}");
    let (_, log) = said.split_once("(all of it: ").unwrap();
    let log = fs::read_to_string(log.trim_end_matches(')')).unwrap();
    for line in [
        "  CC      first.o",
        "#warning error: a word",
        "'absent' undeclared",
        "make: ***",
    ] {
        assert!(log.contains(line), "{line} is not in: {log}");
    }
}
