//! Where clones of a snapshot get their memory: `snapshot run --memory`.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, bail};
use fcvm_hypervisor::HypervisorKind;
use fcvm_memory::uffd::Summary;
use fcvm_snapshot::Snapshot;

use super::serve_memory::PREFIX;
use crate::args::snapshot::MemoryChoice;
use crate::context::Context;
use crate::owner::spec::VmSpec;
use crate::template::TemplateMemory;

/// What was chosen, and why.
pub(super) struct Chosen {
    pub(super) memory: TemplateMemory,
    pub(super) reason: String,
    /// A memory server that was started for it.
    pub(super) started: Option<StartedServer>,
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
    let (socket, started) = match found {
        Some(socket) => (socket, None),
        None => {
            let server = StartedServer::start(context, snapshot)?;
            (server.socket.clone(), Some(server))
        }
    };
    Ok(Chosen {
        memory: TemplateMemory::Served(socket),
        reason: reason.to_owned(),
        started,
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
        started: None,
    })
}

/// The socket of a process that serves this snapshot's memory.
fn running(context: &Context, snapshot: &Snapshot) -> Option<PathBuf> {
    let id = snapshot.manifest().id.to_string();
    let entries = std::fs::read_dir(&context.runtime_dir).ok()?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut sockets = paths.filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(PREFIX))
    });
    // One that was killed does not answer.
    sockets.find(|socket| Summary::ask(socket).is_ok_and(|summary| summary.name == id))
}

/// A memory server that ends with its last clone. Dropped before [`keep`](Self::keep), it is ended: no clone
/// will come.
pub(super) struct StartedServer {
    process: Option<Child>,
    socket: PathBuf,
}

impl StartedServer {
    fn start(context: &Context, snapshot: &Snapshot) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let tag = snapshot.tag();
        let mut process = Command::new(program)
            .arg("--data-dir")
            .arg(&context.data_dir)
            .arg("--runtime-dir")
            .arg(&context.runtime_dir)
            .args(["snapshot", "serve-memory", "--exit-when-idle"])
            .arg(tag.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .current_dir("/")
            // It outlives the command, and what the terminal says to that.
            .process_group(0)
            .spawn()
            .context("cannot start the memory server")?;
        let mut line = String::new();
        let output = process.stdout.take().context("the server has no output")?;
        let read = BufReader::new(output).read_line(&mut line);
        let server = Self {
            process: Some(process),
            socket: PathBuf::from(line.trim_end()),
        };
        match read {
            Ok(1..) => Ok(server),
            _ => bail!(
                "the memory server of the snapshot '{tag}' does not start: 'fcvm snapshot serve-memory {tag}' says why"
            ),
        }
    }

    /// Its clones are there: it ends with the last of them.
    pub(super) fn keep(mut self) {
        self.process = None;
    }
}

impl Drop for StartedServer {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            // Its socket is removed by whoever looks next.
            let _ = process.kill();
            let _ = process.wait();
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}
