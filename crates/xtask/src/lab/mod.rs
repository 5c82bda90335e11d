//! `cargo xtask lab-test`: the end-to-end suite where KVM runs guests, on a machine that has no KVM; which
//! tests of it and how is in `lab/e2e`. `cargo xtask lab-bench` measures there (`lab/bench`).
//!
//! QEMU emulates a processor with AMD's virtualisation (SVM) and Linux's own KVM runs on it: the lab. The
//! host's files are there as the host has them, below a file system in memory that takes all changes, so
//! that what was built here runs there unchanged. Nothing is fetched but Debian's generic kernel, which
//! has KVM and 9p as modules. Where a part is missing, one line says so and nothing has failed.

mod kernel;
mod machine;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use cargo_metadata::Message;

use kernel::LabKernel;
use machine::{Ended, Job};

/// Programs of the host that make the lab.
const PROGRAMS: [&str; 5] = [
    "qemu-system-x86_64",
    "busybox",
    "cpio",
    "dpkg-deb",
    "apt-get",
];
/// The checks.
const CHECKS: &str = include_str!("../../lab/e2e");
/// The bench.
const BENCH: &str = include_str!("../../lab/bench");
/// Names a Firecracker.
const FIRECRACKER: &str = "FCVM_FIRECRACKER_BIN";
/// What the scripts are told as it is: tests of the suite in place of the usual ones, the part to go on from,
/// options of the bench.
const PASSED_ON: [&str; 3] = ["LAB_TESTS", FROM, "BENCH_OPTIONS"];
/// Names the part of the checks to go on from.
const FROM: &str = "LAB_FROM";

/// What the script sees: names and values.
type Environment = Vec<(String, String)>;
/// Programs that a script needs, by the variables that name them.
type Programs = Vec<(&'static str, PathBuf)>;

/// Runs the checks in the lab, or says why not.
pub(crate) fn test(target: &Path) -> anyhow::Result<()> {
    let programs = || {
        let driver = test_program("fcvm-hypervisor", "firecracker")?;
        let suite = test_program("fcvm", "e2e")?;
        Ok(vec![
            ("LAB_DRIVER_TEST", driver),
            ("LAB_SUITE", suite),
            ("RUSTC", rustc()?),
        ])
    };
    match prepare(target, programs)? {
        Ok((kernel, environment)) => run(target, &kernel, CHECKS, &environment),
        Err(missing) => {
            println!("skipped: lab-test: {missing}");
            Ok(())
        }
    }
}

/// Measures in the lab, or says why not.
pub(crate) fn bench(target: &Path) -> anyhow::Result<()> {
    let programs = || Ok(vec![("LAB_BENCH", target.join("release/fcvm-bench"))]);
    match prepare(target, programs)? {
        Ok((_, environment)) if !environment.iter().any(|(name, _)| name == FIRECRACKER) => {
            println!("skipped: lab-bench: there is no Firecracker ({FIRECRACKER}, PATH)");
            Ok(())
        }
        Ok((kernel, environment)) => run(target, &kernel, BENCH, &environment),
        Err(missing) => {
            println!("skipped: lab-bench: {missing}");
            Ok(())
        }
    }
}

/// The kernel of the lab and what the script is told, or what is missing here.
fn prepare(
    target: &Path,
    programs: impl FnOnce() -> anyhow::Result<Programs>,
) -> anyhow::Result<Result<(LabKernel, Environment), String>> {
    if cfg!(not(target_arch = "x86_64")) {
        return Ok(Err("the lab is an x86-64 machine".to_owned()));
    }
    if let Some(program) = PROGRAMS.iter().find(|name| find(name).is_none()) {
        return Ok(Err(format!("{program} is not installed")));
    }
    let kernel = target.join("test-data/kernels/current");
    let parts = [
        ("FCVM_AGENT_BIN", target.join("agent/fc-agent")),
        ("FCVM_TEST_KERNEL_DIR", kernel),
    ];
    for (_, path) in &parts {
        if !path.exists() {
            return Ok(Err(format!(
                "{} is not there: make's targets 'lab-test' and 'lab-bench' make it",
                path.display()
            )));
        }
    }
    let directory = target.join("lab");
    let kernel = match LabKernel::ready(&directory)? {
        Ok(kernel) => kernel,
        Err(missing) => return Ok(Err(missing)),
    };
    let named = std::env::var_os(FIRECRACKER).map(PathBuf::from);
    let firecracker = named.or_else(|| find("firecracker"));
    let firecracker = firecracker.map(|path| (FIRECRACKER, path));
    let mut environment = Environment::new();
    for (name, path) in parts.into_iter().chain(programs()?).chain(firecracker) {
        environment.push((name.to_owned(), machine::absolute(&path)?));
    }
    for name in PASSED_ON {
        if let Ok(value) = std::env::var(name) {
            environment.push((name.to_owned(), value));
        }
    }
    Ok(Ok((kernel, environment)))
}

/// Runs a script in the lab. Where that stands still the part that it was in begins anew, once.
fn run(
    target: &Path,
    kernel: &LabKernel,
    script: &str,
    environment: &[(String, String)],
) -> anyhow::Result<()> {
    let mut environment = environment.to_vec();
    let mut parts = Parts::default();
    loop {
        let job = Job::new(&target.join("lab"), kernel, script, &environment)?;
        match job.run(kernel, |line| parts.note(line))? {
            Ended::Status(_) if !parts.failed.is_empty() => {
                bail!("failed in the lab: {}", parts.failed.join(", "))
            }
            Ended::Status(0) => return Ok(()),
            Ended::Status(status) => bail!("the script in the lab ended with status {status}"),
            Ended::StoodStill => {
                let part = parts.begin_anew()?;
                println!(
                    "lab: it stands still, as its emulated processor does now and then: anew from {part}"
                );
                environment.retain(|(name, _)| name != FROM);
                environment.push((FROM.to_owned(), part));
            }
        }
    }
}

/// What a script has told of its parts.
#[derive(Default)]
struct Parts {
    /// The one that it is in.
    current: Option<String>,
    failed: Vec<String>,
    /// In which the lab stood still.
    still: Vec<String>,
}

impl Parts {
    fn note(&mut self, line: &str) {
        if let Some(part) = line.strip_prefix("lab: part ") {
            self.current = Some(part.to_owned());
        } else if let Some(part) = line.strip_prefix("lab: failed ") {
            self.failed.push(part.to_owned());
        }
    }

    /// The part to go on with after the lab stood still.
    fn begin_anew(&mut self) -> anyhow::Result<String> {
        let Some(part) = self.current.clone() else {
            bail!("the lab stands still");
        };
        if self.still.contains(&part) {
            bail!("the lab stood still twice in {part}");
        }
        self.still.push(part.clone());
        Ok(part)
    }
}

/// The program of a package's tests.
fn test_program(package: &str, test: &str) -> anyhow::Result<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .args(["test", "--locked", "--no-run", "-p", package])
        .args(["--test", test, "--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    Message::parse_stream(output.stdout.as_slice())
        .filter_map(Result::ok)
        .find_map(|message| match message {
            Message::CompilerArtifact(artifact) if artifact.target.is_test() => artifact.executable,
            _ => None,
        })
        .map(PathBuf::from)
        .with_context(|| format!("the tests '{test}' of {package} cannot be built"))
}

/// The compiler itself: what stands for it in PATH may look for its toolchain elsewhere in the lab.
fn rustc() -> anyhow::Result<PathBuf> {
    let output = Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .context("cannot run rustc")?;
    let sysroot = String::from_utf8(output.stdout).context("rustc's directory is not UTF-8")?;
    Ok(Path::new(sysroot.trim()).join("bin/rustc"))
}

/// A program of the search path.
fn find(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

/// Runs a command of the host that has to succeed.
fn must(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_in_which_the_lab_stood_still_begins_anew_once() {
        let mut parts = Parts::default();
        assert!(parts.begin_anew().is_err(), "nothing has begun");
        for line in [
            "lab: part one",
            "lab: failed one",
            "lab: part two",
            "test two::x ... ok",
        ] {
            parts.note(line);
        }
        assert_eq!(parts.failed, ["one"]);
        assert_eq!(parts.begin_anew().unwrap(), "two");
        parts.note("lab: part two");
        let error = parts.begin_anew().unwrap_err().to_string();
        assert_eq!(error, "the lab stood still twice in two");
        parts.note("lab: part three");
        assert_eq!(parts.begin_anew().unwrap(), "three");
    }
}
