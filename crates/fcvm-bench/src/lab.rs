//! The place where fcvm is measured: its directories, its images, and the VMs started in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::{Options, images};

/// Where fcvm keeps what the bench makes, and what is measured.
pub(crate) struct Lab {
    /// The measured binary.
    pub(crate) fcvm: PathBuf,
    /// The agent that is packed into the initramfs.
    pub(crate) agent: PathBuf,
    /// Everything kept between two runs.
    pub(crate) data_dir: PathBuf,
    runtime: tempfile::TempDir,
    /// Name of the small image that VMs are started from.
    pub(crate) image: String,
    /// Release of the guest's kernel.
    pub(crate) guest_kernel: Option<String>,
}

impl Lab {
    /// Makes the guest kernel and the small image ready.
    pub(crate) fn prepare(options: &Options) -> anyhow::Result<Self> {
        let fcvm = std::path::absolute(&options.fcvm)?;
        if !fcvm.is_file() {
            bail!(
                "{} does not exist: run 'make build', or name the binary with --fcvm",
                fcvm.display()
            );
        }
        let agent = match &options.agent {
            Some(path) => std::path::absolute(path)?,
            None => find_agent(&fcvm)?,
        };
        let data_dir = std::path::absolute(&options.data_dir)?;
        std::fs::create_dir_all(&data_dir)
            .with_context(|| format!("cannot create {}", data_dir.display()))?;
        // A socket's path is short: the temporary directory's is, the data directory's may not be.
        let runtime = tempfile::tempdir().context("cannot make a directory for sockets")?;
        let image = images::BUSYBOX_NAME.to_owned();
        let mut lab = Self {
            fcvm,
            agent,
            data_dir,
            runtime,
            image,
            guest_kernel: None,
        };
        eprintln!(
            "preparing: guest kernel, images (kept in {})",
            lab.data_dir.display()
        );
        let said = lab.run(&["setup", "kernel"])?;
        lab.guest_kernel = String::from_utf8_lossy(&said)
            .lines()
            .find_map(|line| line.strip_prefix("Guest kernel "))
            .map(str::to_owned);
        images::import_busybox(&lab)?;
        Ok(lab)
    }

    /// A command line of fcvm with this lab's directories.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.fcvm);
        command
            .args(arguments)
            .env("FCVM_DATA_DIR", self.data_dir.join("fcvm"))
            .env("FCVM_RUNTIME_DIR", self.runtime.path())
            .env("FCVM_AGENT_BIN", &self.agent)
            .stdin(Stdio::null());
        command
    }

    /// Runs fcvm to its end and gives its standard output.
    pub(crate) fn run(&self, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
        finished(
            self.command(arguments),
            &format!("fcvm {}", arguments.join(" ")),
        )
    }

    /// Runs fcvm to its end and reads its standard output as JSON.
    pub(crate) fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let output = self.run(arguments)?;
        serde_json::from_slice(&output)
            .with_context(|| format!("fcvm {} gives no JSON", arguments.join(" ")))
    }

    /// What `fcvm inspect` says of a VM or an image.
    pub(crate) fn inspect(&self, name: &str) -> anyhow::Result<Value> {
        let output = self.run(&["inspect", name])?;
        let mut values: Vec<Value> =
            serde_json::from_slice(&output).context("fcvm inspect gives no JSON")?;
        values
            .pop()
            .with_context(|| format!("fcvm inspect knows nothing of '{name}'"))
    }

    /// Starts a VM in the background that waits to be used.
    pub(crate) fn start_vm(&self) -> anyhow::Result<BenchVm<'_>> {
        self.start_vm_with(&[])
    }

    /// The same with options of `fcvm run`.
    pub(crate) fn start_vm_with(&self, options: &[&str]) -> anyhow::Result<BenchVm<'_>> {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let name = format!("bench-{}-{number}", std::process::id());
        let run = ["run", "-d", "--name", &name, "--pull", "never"];
        self.run(&[&run[..], options, &[&self.image, "sleep", "86400"]].concat())?;
        Ok(BenchVm { lab: self, name })
    }
}

/// A VM of the bench; it ends with this value.
pub(crate) struct BenchVm<'a> {
    pub(crate) lab: &'a Lab,
    /// Its name.
    pub(crate) name: String,
}

impl Drop for BenchVm<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.lab.run(&["rm", "-f", &self.name]) {
            eprintln!("fcvm-bench: {error:#}");
        }
    }
}

/// Runs a program to its end and gives its standard output.
pub(crate) fn finished(mut command: Command, what: &str) -> anyhow::Result<Vec<u8>> {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .output()
        .with_context(|| format!("cannot start {what}"))?;
    if !status.success() {
        bail!(
            "{what} failed ({status}): {}",
            String::from_utf8_lossy(&stderr).trim()
        );
    }
    Ok(stdout)
}

/// A program of the search path, or of the directories of the system's administrator.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

fn find_agent(fcvm: &Path) -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("FCVM_AGENT_BIN") {
        return Ok(std::path::absolute(path)?);
    }
    let beside = fcvm.parent().unwrap_or(Path::new("/"));
    ["fc-agent", "../libexec/fcvm/fc-agent", "../agent/fc-agent"]
        .map(|relative| beside.join(relative))
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "the agent is not beside {}: run 'make build', or name it with --agent",
                fcvm.display()
            )
        })
}
