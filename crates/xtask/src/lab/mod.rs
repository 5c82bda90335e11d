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
use machine::Job;

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
/// What the scripts are told as it is: tests of the suite in place of the usual ones, options of the bench.
const PASSED_ON: [&str; 2] = ["LAB_TESTS", "BENCH_OPTIONS"];

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

fn run(
    target: &Path,
    kernel: &LabKernel,
    script: &str,
    environment: &[(String, String)],
) -> anyhow::Result<()> {
    let job = Job::new(&target.join("lab"), kernel, script, environment)?;
    match job.run(kernel)? {
        0 => Ok(()),
        status => bail!("the checks in the lab ended with status {status}"),
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
