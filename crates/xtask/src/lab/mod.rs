//! `cargo xtask lab-test`: the end-to-end checks of `lab/e2e` where KVM runs guests, on a machine that has
//! no KVM.
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

/// What the script sees: names and paths.
type Environment = Vec<(String, PathBuf)>;

/// Runs the checks in the lab, or says why not.
pub(crate) fn test(target: &Path) -> anyhow::Result<()> {
    match prepare(target)? {
        Ok((kernel, environment)) => run(target, &kernel, CHECKS, &environment),
        Err(missing) => {
            println!("skipped: lab-test: {missing}");
            Ok(())
        }
    }
}

/// The kernel of the lab and what the script is told, or what is missing here.
fn prepare(target: &Path) -> anyhow::Result<Result<(LabKernel, Environment), String>> {
    if cfg!(not(target_arch = "x86_64")) {
        return Ok(Err("the lab is an x86-64 machine".to_owned()));
    }
    if let Some(program) = PROGRAMS.iter().find(|name| find(name).is_none()) {
        return Ok(Err(format!("{program} is not installed")));
    }
    let parts = [
        ("FCVM", target.join("debug/fcvm")),
        ("FCVM_AGENT_BIN", target.join("agent/fc-agent")),
        ("LAB_KERNELS", target.join("test-data/kernels")),
    ];
    for (_, path) in &parts {
        if !path.exists() {
            return Ok(Err(format!(
                "{} is not there: 'make lab-test' makes it",
                path.display()
            )));
        }
    }
    let directory = target.join("lab");
    let kernel = match LabKernel::ready(&directory)? {
        Ok(kernel) => kernel,
        Err(missing) => return Ok(Err(missing)),
    };
    let mut environment: Vec<_> = parts.map(|(name, path)| (name.to_owned(), path)).into();
    environment.push(("LAB_DRIVER_TEST".to_owned(), driver_test()?));
    let named = std::env::var_os("FCVM_FIRECRACKER_BIN").map(PathBuf::from);
    if let Some(firecracker) = named.or_else(|| find("firecracker")) {
        environment.push(("FCVM_FIRECRACKER_BIN".to_owned(), firecracker));
    }
    Ok(Ok((kernel, environment)))
}

fn run(
    target: &Path,
    kernel: &LabKernel,
    script: &str,
    environment: &[(String, PathBuf)],
) -> anyhow::Result<()> {
    let job = Job::new(&target.join("lab"), kernel, script, environment)?;
    match job.run(kernel)? {
        0 => Ok(()),
        status => bail!("the checks in the lab ended with status {status}"),
    }
}

/// The program of the driver's tests, some of which need the real one.
fn driver_test() -> anyhow::Result<PathBuf> {
    let output = Command::new(env!("CARGO"))
        .args(["test", "--locked", "--no-run", "-p", "fcvm-hypervisor"])
        .args(["--test", "firecracker", "--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    Message::parse_stream(output.stdout.as_slice())
        .filter_map(Result::ok)
        .find_map(|message| match message {
            Message::CompilerArtifact(artifact) => artifact.executable,
            _ => None,
        })
        .map(PathBuf::from)
        .context("the driver's tests cannot be built")
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
