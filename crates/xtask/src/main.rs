//! Checks as code: `cargo xtask check`, or one of its parts; and `cargo xtask lab-test`, `lab-bench`.
//!
//! None of the checks needs the network. Each failure is a line `file:line: what is wrong`; any line makes
//! the exit code 1. What can be left to rustc, clippy and rustfmt is left to them.

#![forbid(unsafe_code)]

mod advisories;
mod dependencies;
mod lab;
mod licences;
mod links;
mod lock_file;
mod policy;
mod report;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use cargo_metadata::{Metadata, MetadataCommand};

use policy::Policy;
use report::Finding;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  check                    all of the checks
  check-deps               which crate may depend on which
  check-licences           licences and sources of dependencies against deny.toml
  check-advisories         Cargo.lock against crates/xtask/data/advisories.toml
  check-tidy               file and function lengths, module comments, links, paths
  lab-test                 fcvm on Firecracker and on QEMU with KVM, in an emulated machine that has KVM
  lab-bench                how VMs begin under Firecracker, measured in that machine
  update-advisories DIR    write that file anew from a checkout of RustSec's advisory-db";

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(findings) if findings.is_empty() => ExitCode::SUCCESS,
        Ok(findings) => {
            for finding in &findings {
                eprintln!("{finding}");
            }
            eprintln!("xtask: {} findings", findings.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> anyhow::Result<Vec<Finding>> {
    let root = workspace_root()?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["check"] => check_all(&root),
        ["check-deps"] => Ok(dependencies::check(&metadata(&root)?)),
        ["check-licences"] => check_licences(&root),
        ["check-advisories"] => check_advisories(&root),
        ["check-tidy"] => tidy::check(&root),
        [task @ ("lab-test" | "lab-bench")] => {
            let target = metadata(&root)?.target_directory;
            match *task {
                "lab-test" => lab::test(target.as_std_path())?,
                _ => lab::bench(target.as_std_path())?,
            }
            Ok(Vec::new())
        }
        ["update-advisories", directory] => {
            let count = advisories::update(&root, Path::new(directory))?;
            println!("{count} advisories written");
            Ok(Vec::new())
        }
        _ => bail!("{USAGE}"),
    }
}

fn check_all(root: &Path) -> anyhow::Result<Vec<Finding>> {
    let mut findings = dependencies::check(&metadata(root)?);
    findings.extend(check_licences(root)?);
    findings.extend(check_advisories(root)?);
    findings.extend(tidy::check(root)?);
    run_cargo_deny(root)?;
    Ok(findings)
}

fn check_licences(root: &Path) -> anyhow::Result<Vec<Finding>> {
    licences::check(&metadata(root)?, &Policy::read(root)?)
}

fn check_advisories(root: &Path) -> anyhow::Result<Vec<Finding>> {
    let list = advisories::read(root)?;
    let policy = Policy::read(root)?;
    let mut findings = Vec::new();
    for lock_file in ["Cargo.lock", "fuzz/Cargo.lock"] {
        let packages = lock_file::read(root, lock_file)?;
        findings.extend(advisories::check(&list, &packages, &policy, lock_file));
    }
    Ok(findings)
}

/// The same policy by cargo-deny itself, with newer advisories, for those who have it and a copy of
/// the advisory database.
fn run_cargo_deny(root: &Path) -> anyhow::Result<()> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let databases = home.map(|home| home.join("advisory-dbs"));
    if !databases.is_some_and(|path| path.is_dir()) {
        return Ok(());
    }
    let status = Command::new("cargo-deny")
        .args(["--offline", "check"])
        .current_dir(root)
        .stdin(Stdio::null())
        .status();
    match status {
        Ok(status) if !status.success() => bail!("cargo deny found what is told above"),
        // Not installed: the checks of our own have run.
        _ => Ok(()),
    }
}

/// The packages of this platform: those of others need not have been downloaded.
fn metadata(root: &Path) -> anyhow::Result<Metadata> {
    let output = Command::new("rustc")
        .args(["--print", "host-tuple"])
        .output()
        .context("cannot start rustc")?;
    let host = String::from_utf8(output.stdout)?.trim().to_owned();
    MetadataCommand::new()
        .current_dir(root)
        .other_options(["--locked", "--offline", "--filter-platform", &host].map(str::to_owned))
        .exec()
        .context("cargo metadata failed; run 'cargo fetch' once if it asks for the network")
}

fn workspace_root() -> anyhow::Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here.ancestors().nth(2).context("xtask is not in crates/")?;
    Ok(root.to_owned())
}
