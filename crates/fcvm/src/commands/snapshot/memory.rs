//! Where clones of a snapshot get their memory: `snapshot run --memory`.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use fcvm_hypervisor::HypervisorKind;
use fcvm_memory::uffd::{ServerWatch, Summary};
use fcvm_snapshot::Snapshot;

use super::serve_memory::PREFIX;
use crate::args::snapshot::MemoryChoice;
use crate::context::Context;
use crate::logging::ProcessLog;
use crate::owner::spec::VmSpec;
use crate::template::TemplateMemory;

/// What a server that was started for a command has to say, in the snapshot's folder.
const LOG: &str = "memory-server.log";

/// What was chosen, and why.
pub(super) struct Chosen {
    pub(super) memory: TemplateMemory,
    pub(super) reason: String,
    /// The memory server, to be kept until the clones are there.
    pub(super) server: Option<HeldServer>,
}

/// Chooses for clones of a snapshot that this command starts.
pub(super) fn choose(
    context: &Context,
    choice: MemoryChoice,
    snapshot: &Snapshot,
    spec: &VmSpec,
) -> anyhow::Result<Chosen> {
    let file = |reason: &str| file(snapshot, spec, reason);
    match (spec.hypervisor, choice) {
        (HypervisorKind::Qemu, MemoryChoice::Uffd) => bail!(
            "--memory uffd is for snapshots of VMs under Firecracker: QEMU maps the memory as a file, which --memory file says"
        ),
        (HypervisorKind::Qemu, MemoryChoice::Auto) => {
            return file("QEMU maps the memory as a file");
        }
        (_, MemoryChoice::File) => return file("--memory file"),
        (HypervisorKind::Firecracker, MemoryChoice::Auto | MemoryChoice::Uffd) => {}
    }
    let found = running(context, snapshot);
    let reason = match choice {
        MemoryChoice::Uffd => "--memory uffd",
        _ if spec.hugepages => "hugepages can be had from a memory server only",
        _ if found.is_some() => "a memory server has this snapshot in memory already",
        _ if spec.jail => {
            return file(
                "no memory server runs for this snapshot; each jail has a copy of the file, where --memory uffd brings what is touched",
            );
        }
        _ => {
            return file(
                "no memory server runs for this snapshot, and clones of one command share a file's pages",
            );
        }
    };
    let server = match found {
        Some(server) => server,
        None => HeldServer::start(context, snapshot)?,
    };
    Ok(Chosen {
        memory: TemplateMemory::Served(server.socket.clone()),
        reason: reason.to_owned(),
        server: Some(server),
    })
}

/// The memory in a file.
pub(super) fn file(snapshot: &Snapshot, spec: &VmSpec, reason: &str) -> anyhow::Result<Chosen> {
    if spec.hugepages {
        let tag = snapshot.tag();
        bail!(
            "the snapshot '{tag}' is of a VM with hugepages, which Firecracker maps from no file: 'fcvm snapshot run --snapshot {tag}' has a memory server bring them"
        );
    }
    Ok(Chosen {
        memory: TemplateMemory::File(OwnedFd::from(super::load_memory(snapshot)?)),
        reason: reason.to_owned(),
        server: None,
    })
}

/// A process that serves this snapshot's memory.
fn running(context: &Context, snapshot: &Snapshot) -> Option<HeldServer> {
    let id = snapshot.manifest().id.to_string();
    let entries = std::fs::read_dir(&context.runtime_dir).ok()?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut sockets = paths.filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(PREFIX))
    });
    sockets.find_map(|socket| {
        // One that was killed does not answer.
        let summary = Summary::ask(&socket).ok()?;
        // One that ends meanwhile is none.
        (summary.name == id)
            .then(|| HeldServer::hold(socket).ok())
            .flatten()
    })
}

/// A memory server that stays at least as long as this is there: then its clones keep it, if there are any.
pub(super) struct HeldServer {
    socket: PathBuf,
    _watch: ServerWatch,
}

impl HeldServer {
    /// Holds the server of a socket.
    fn hold(socket: PathBuf) -> anyhow::Result<Self> {
        // What happens to this command is nothing to the server: nothing is told that would have to be read.
        let watch = ServerWatch::connect_for(&socket, std::process::id().cast_signed())?;
        Ok(Self {
            socket,
            _watch: watch,
        })
    }

    /// Starts one that ends by itself.
    fn start(context: &Context, snapshot: &Snapshot) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let tag = snapshot.tag();
        let log = ProcessLog::open(snapshot.path().join(LOG))?;
        let mut process = Command::new(program)
            .arg("--data-dir")
            .arg(&context.data_dir)
            .arg("--runtime-dir")
            .arg(&context.runtime_dir)
            .args(["--log-level", "info"])
            .args(["snapshot", "serve-memory", "--exit-when-idle"])
            .arg(tag.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.file()?)
            .current_dir("/")
            // It outlives the command, and what the terminal says to that.
            .process_group(0)
            .spawn()
            .context("cannot start the memory server")?;
        let mut line = String::new();
        let output = process.stdout.take().context("the server has no output")?;
        match BufReader::new(output).read_line(&mut line) {
            Ok(1..) => Self::hold(PathBuf::from(line.trim_end())),
            _ => {
                let _ = process.wait();
                bail!(
                    "the memory server of the snapshot '{tag}' does not start: {}",
                    log.last_line()
                )
            }
        }
    }
}
