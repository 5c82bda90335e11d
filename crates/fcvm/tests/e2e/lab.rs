//! A place to run fcvm in: a data directory, a runtime directory and a home of its own, and the proof
//! at the end that nothing was left.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::inotify;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::base::{Base, base};
use crate::hypervisor::Hypervisor;
use crate::process::{self, Output, Running, limit};

/// An ordinary user: Debian's `nobody`.
const NOBODY: u32 = 65_534;
/// Cache of what a probe of the accelerators found.
const HOST_PROBE: &str = "host-probe.json";

/// A place to run fcvm in.
pub(crate) struct Lab {
    directory: TempDir,
    program: PathBuf,
    /// `FCVM_AGENT_BIN`.
    pub(crate) agent: PathBuf,
    /// `FCVM_DATA_DIR`.
    pub(crate) data: PathBuf,
    /// `FCVM_RUNTIME_DIR`.
    pub(crate) runtime: PathBuf,
    /// `PATH`, where it is not the test's own.
    pub(crate) path: Option<OsString>,
    /// `FCVM_DISK_STORE`; `FCVM_TEST_DISK_STORE` says it for all tests.
    pub(crate) disk_store: Option<String>,
    /// `FCVM_HYPERVISOR` and `FCVM_ACCEL`.
    pub(crate) hypervisor: Hypervisor,
    /// `FCVM_FIRECRACKER_BIN`.
    pub(crate) firecracker: Option<PathBuf>,
    user: Option<u32>,
    marker: u64,
    finished: Cell<bool>,
}

/// Waits until none of these processes is left.
#[track_caller]
fn wait_for_none(processes: impl Fn() -> Vec<(Pid, String)>) {
    for (pid, command) in processes() {
        assert!(
            process::wait_gone(pid),
            "left running: {} {command}",
            pid.as_raw_nonzero()
        );
    }
    assert_eq!(processes(), [], "left running");
}

impl Lab {
    /// A lab with the shared kernel and images; `None` when the machine cannot run VMs (it is told).
    pub(crate) fn new() -> Option<Self> {
        let base = base()?;
        let lab = Self::empty(base, None);
        for part in ["kernels", "images"] {
            symlink(base.data.join(part), lab.data.join(part)).unwrap();
        }
        lab.know_host(base);
        Some(lab)
    }

    /// The same, for a test of what only QEMU has: `None` where the suite runs under another hypervisor.
    pub(crate) fn of_qemu(what: &str) -> Option<Self> {
        if !Hypervisor::of_suite().is_qemu() {
            println!("skipped: only QEMU {what}");
            return None;
        }
        Self::new()
    }

    /// The same, for a test of what only Firecracker has.
    pub(crate) fn of_firecracker(what: &str) -> Option<Self> {
        if Hypervisor::of_suite().is_qemu() {
            println!("skipped: only Firecracker {what}");
            return None;
        }
        Self::new()
    }

    /// A lab with the shared kernel and no images.
    pub(crate) fn without_images() -> Option<Self> {
        let base = base()?;
        let lab = Self::empty(base, None);
        symlink(base.data.join("kernels"), lab.data.join("kernels")).unwrap();
        lab.know_host(base);
        Some(lab)
    }

    /// A lab of an ordinary user: `nobody` when the suite runs as root, else the user it runs as.
    pub(crate) fn ordinary() -> Option<Self> {
        if !is_root() {
            return Self::new();
        }
        let base = base()?;
        let mut lab = Self::empty(base, Some(NOBODY));
        if lab.hypervisor.needs_kvm() && !is_kvm_everybodys() {
            println!("skipped: only root may open /dev/kvm, or the group kvm");
            return None;
        }
        // The checkout may be in a home that no other user can enter.
        let directory = lab.directory.path().to_owned();
        for program in [
            Some(&mut lab.program),
            Some(&mut lab.agent),
            lab.firecracker.as_mut(),
        ]
        .into_iter()
        .flatten()
        {
            let copy = directory.join(program.file_name().unwrap());
            fcvm_testing::copy_program(program, &copy);
            *program = copy;
        }
        let data = lab.data.to_str().unwrap();
        for part in ["kernels", "images"] {
            process::must("cp", &["-a", base.data.join(part).to_str().unwrap(), data]);
        }
        lab.know_host(base);
        process::must("chown", &["-R", &format!("{NOBODY}:{NOBODY}"), data]);
        Some(lab)
    }

    /// What the base has found out about the host's accelerators need not be found out again.
    fn know_host(&self, base: &Base) {
        let _ = fs::copy(base.data.join(HOST_PROBE), self.data.join(HOST_PROBE));
    }

    fn empty(base: &Base, user: Option<u32>) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let directory = tempfile::Builder::new()
            .prefix("fcvm-e2e-")
            .tempdir()
            .unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["data", "data/vms", "run", "home", "tmp"] {
            fs::create_dir(path(name)).unwrap();
            chown(path(name), user, user).unwrap();
        }
        Self {
            program: base.program.clone(),
            agent: base.agent.clone(),
            data: path("data"),
            runtime: path("run"),
            path: None,
            disk_store: std::env::var("FCVM_TEST_DISK_STORE").ok(),
            hypervisor: Hypervisor::of_suite(),
            firecracker: Hypervisor::of_suite().program(),
            user,
            // Below the default limit, and no two that run on one machine are likely to be equal.
            marker: (u64::from(std::process::id()) * 131 + COUNT.fetch_add(1, Ordering::Relaxed))
                % 800_000,
            finished: Cell::new(false),
            directory,
        }
    }

    /// A file of the lab's own, outside of fcvm's directories.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join("home").join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).unwrap();
        }
        path
    }

    /// The directory below the data directory that disks of VMs are in.
    pub(crate) fn disks(&self) -> &'static str {
        match self.disk_store.as_deref() {
            Some("pool") => "pool",
            _ => "disks",
        }
    }

    /// Writes a file of the lab's own.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.file(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// A directory with stand-ins for programs, before all others in PATH.
    pub(crate) fn shadow(&mut self, program: &str, script: &str) {
        let directory = self.file("shadow");
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join(program);
        fcvm_testing::write_program(&path, &format!("#!/bin/sh\n{script}\n"));
        let others = std::env::var_os("PATH").unwrap_or_default();
        let all = std::iter::once(directory)
            .chain(std::env::split_paths(&others).filter(|dir| !dir.ends_with("shadow")));
        self.path = Some(std::env::join_paths(all).unwrap());
    }

    /// A PATH in which everything is found but this program.
    pub(crate) fn without_program(&mut self, missing: &str) {
        let directory = self.file("rest-of-path");
        fs::create_dir_all(&directory).unwrap();
        let path = std::env::var_os("PATH").unwrap_or_default();
        for entry in std::env::split_paths(&path)
            .filter_map(|part| fs::read_dir(part).ok())
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            if name != missing && !name.to_string_lossy().starts_with(&format!("{missing}.")) {
                // The first of a name counts.
                let _ = symlink(entry.path(), directory.join(name));
            }
        }
        self.path = Some(directory.into());
    }

    /// A command with the lab's surroundings, its processes marked as the lab's.
    pub(crate) fn tool(&self, program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Command {
        // Descriptors and environment are not inherited by helpers, resource limits are: one that
        // nothing else uses tells the lab's processes from all others, whoever their parent is.
        let mut command = Command::new("/usr/bin/prlimit");
        command
            .arg(format!("--msgqueue={0}:{0}", self.marker))
            .arg(program)
            .args(arguments);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if ["FCVM_", "XDG_", "REGISTRY_", "DOCKER_"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
            {
                command.env_remove(name);
            }
        }
        command
            .env("FCVM_DATA_DIR", &self.data)
            .env("FCVM_RUNTIME_DIR", &self.runtime);
        command.env("FCVM_AGENT_BIN", &self.agent);
        command
            .env("HOME", self.directory.path().join("home"))
            .env("TMPDIR", self.directory.path().join("tmp"));
        if let Some(path) = &self.path {
            command.env("PATH", path);
        }
        if let Some(store) = &self.disk_store {
            command.env("FCVM_DISK_STORE", store);
        }
        command
            .env("FCVM_HYPERVISOR", self.hypervisor.name())
            .env("FCVM_ACCEL", self.hypervisor.accelerator());
        if let Some(firecracker) = &self.firecracker {
            command.env("FCVM_FIRECRACKER_BIN", firecracker);
        }
        if let Some(user) = self.user {
            command.uid(user).gid(user).current_dir("/");
        }
        command
    }

    /// fcvm with these arguments.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        self.tool(&self.program, arguments)
    }

    /// The fcvm program.
    pub(crate) fn program(&self) -> &str {
        self.program.to_str().unwrap()
    }

    /// Runs fcvm to its end.
    pub(crate) fn fcvm(&self, arguments: &[&str]) -> Output {
        process::run(self.command(arguments))
    }

    /// Runs fcvm, which has to succeed and to say nothing on stderr; gives its standard output.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.fcvm(arguments);
        assert!(
            output.code == 0 && output.stderr.is_empty(),
            "fcvm {arguments:?}: {output:?}"
        );
        output.text()
    }

    /// Runs what has to succeed and may tell of its progress on stderr; gives its standard output.
    #[track_caller]
    pub(crate) fn first_run(&self, arguments: &[&str]) -> String {
        let output = self.fcvm(arguments);
        assert!(output.code == 0, "fcvm {arguments:?}: {output:?}");
        output.text()
    }

    /// Imports an image; what was done is told on stderr.
    #[track_caller]
    pub(crate) fn import(&self, source: &str, name: &str) {
        let output = self.fcvm(&["image", "import", source, name]);
        assert!(output.code == 0, "import of {source}: {output:?}");
    }

    /// Runs fcvm, which has to fail with this code and one line on stderr; gives the line.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, arguments: &[&str]) -> String {
        one_error(self.fcvm(arguments), code, &format!("fcvm {arguments:?}"))
    }

    /// Starts fcvm and goes on.
    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        Running::start(self.command(arguments))
    }

    /// Parsed JSON output.
    #[track_caller]
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    /// Starts a VM in the background that idles until it is told to stop, and stops at once then.
    #[track_caller]
    pub(crate) fn idle_vm(&self, name: &str, options: &[&str]) -> String {
        self.idle_vm_of(crate::base::IMAGE, name, options)
    }

    /// The same with another image.
    #[track_caller]
    pub(crate) fn idle_vm_of(&self, image: &str, name: &str, options: &[&str]) -> String {
        let mut arguments = vec!["run", "-d", "--name", name];
        arguments.extend(options);
        arguments.extend([
            image,
            "sh",
            "-c",
            "trap 'exit 0' TERM; echo started; while :; do sleep 1000 & wait; done",
        ]);
        let id = self.ok(&arguments).trim().to_owned();
        // The program runs when the command returns; that its trap is set it says itself.
        self.start(&["logs", "-f", name])
            .stdout
            .wait_for("started\n");
        id
    }

    /// What a shell in a VM says to a script.
    #[track_caller]
    pub(crate) fn sh(&self, vm: &str, script: &str) -> String {
        self.ok(&["exec", vm, "sh", "-c", script])
    }

    /// The state records that can be read now.
    pub(crate) fn records(&self) -> Vec<Value> {
        let Ok(directory) = fs::read_dir(self.data.join("vms")) else {
            return Vec::new();
        };
        directory
            .flatten()
            .filter_map(|entry| {
                serde_json::from_slice(&fs::read(entry.path().join("record.json")).ok()?).ok()
            })
            .collect()
    }

    /// Waits until there is a record that fits, and gives it.
    pub(crate) fn wait_for_record(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let watch =
            inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).unwrap();
        let vms = self.data.join("vms");
        let changes = inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::DELETE;
        inotify::add_watch(&watch, &vms, changes).unwrap();
        let deadline = std::time::Instant::now() + limit();
        loop {
            for entry in fs::read_dir(&vms).unwrap().flatten() {
                // Watched before it is read: what changes in between is not missed. It may be gone.
                let _ = inotify::add_watch(&watch, entry.path(), changes);
            }
            if let Some(record) = self.records().into_iter().find(&fits) {
                return record;
            }
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            assert!(
                !left.is_zero(),
                "waited in vain for a record {what}; there are {:?}",
                self.records()
            );
            let left = rustix::event::Timespec::try_from(left).unwrap();
            let _ = rustix::event::poll(
                &mut [rustix::event::PollFd::new(
                    &watch,
                    rustix::event::PollFlags::IN,
                )],
                Some(&left),
            );
            let mut events = [0_u8; 4096];
            while rustix::io::read(&watch, &mut events).is_ok_and(|length| length > 0) {}
        }
    }

    /// Waits until a VM's record has this state, and gives the record.
    pub(crate) fn wait_for_state(&self, name: &str, state: &str) -> Value {
        self.wait_for_record(&format!("of '{name}' in state {state}"), |record| {
            record["name"] == name && record["state"] == state
        })
    }

    /// The lab's processes but for those behind a mounted pool, which outlives VMs: number and command line.
    pub(crate) fn processes(&self) -> Vec<(Pid, String)> {
        let is_mount = |command: &str| {
            ["pool keep-mount", "pool serve-mount"]
                .iter()
                .any(|role| command.contains(role))
        };
        let mut processes = self.all_processes();
        processes.retain(|(_, command)| !is_mount(command));
        processes
    }

    fn all_processes(&self) -> Vec<(Pid, String)> {
        let marked = |pid: i32| -> Option<(Pid, String)> {
            let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
            let limits = read("limits")?;
            let line = limits
                .lines()
                .find(|line| line.starts_with("Max msgqueue size"))?;
            let marked = line.split_whitespace().nth(3)? == self.marker.to_string();
            let state = read("stat")?.rsplit_once(") ")?.1.chars().next()?;
            let command = read("cmdline")?.replace('\0', " ");
            (marked && state != 'Z').then_some((Pid::from_raw(pid)?, command))
        };
        let directory = fs::read_dir("/proc").unwrap().flatten();
        directory
            .filter_map(|entry| marked(entry.file_name().to_str()?.parse().ok()?))
            .collect()
    }

    /// The lab's processes that run this program.
    pub(crate) fn processes_of(&self, program: &str) -> Vec<Pid> {
        let is = |pid: &Pid| {
            let exe =
                fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero())).unwrap_or_default();
            exe.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(program))
        };
        self.processes()
            .into_iter()
            .map(|(pid, _)| pid)
            .filter(is)
            .collect()
    }

    /// The processes of the lab's hypervisor.
    pub(crate) fn hypervisors(&self) -> Vec<Pid> {
        self.processes_of(self.hypervisor.process())
    }

    /// The process of the only VM.
    #[track_caller]
    pub(crate) fn the_hypervisor(&self) -> Pid {
        let [pid] = self.hypervisors()[..] else {
            panic!("{:?}", self.processes())
        };
        pid
    }

    /// Waits until none of the lab's processes is left; those of a mounted pool may be.
    #[track_caller]
    pub(crate) fn wait_for_no_process(&self) {
        wait_for_none(|| self.processes());
    }

    /// Files below the data and runtime directories that are neither kernels nor images nor templates
    /// of disks.
    pub(crate) fn leftovers(&self) -> Vec<PathBuf> {
        // Below it is a directory for each program that is jailed.
        let jails = self.data.join("jails");
        let jailed = fs::read_dir(&jails).into_iter().flatten().flatten();
        let kept = [
            "jails",
            "vms",
            "vms/lock",
            "kernels",
            "images",
            "disks",
            "pool",
            "snapshots",
            "snapshots/.lock",
            HOST_PROBE,
        ]
        .map(|name| self.data.join(name));
        let mut found = Vec::new();
        let searched = [
            self.data.clone(),
            self.data.join("vms"),
            self.data.join("snapshots"),
            self.runtime.clone(),
            self.directory.path().join("tmp"),
        ];
        for directory in searched.into_iter().chain(jailed.map(|entry| entry.path())) {
            let entries = fs::read_dir(directory)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path());
            found.extend(entries.filter(|path| !kept.contains(path)));
        }
        found
    }

    /// Asserts that no VM, process, socket or file is left.
    #[track_caller]
    pub(crate) fn finish(self) {
        assert_eq!(self.ok(&["ls", "-a", "-q"]), "", "VMs are left");
        // What ends by itself has its files open until it has.
        self.wait_for_no_process();
        let pool = self.data.join("pool/mnt").to_str().unwrap().to_owned();
        // Not asked of the mount, which may be another user's and closed even to root.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        if mounts
            .lines()
            .any(|mount| mount.split(' ').nth(1) == Some(&pool))
        {
            self.ok(&["pool", "unmount", &pool]);
        }
        wait_for_none(|| self.all_processes());
        assert_eq!(self.leftovers(), [] as [PathBuf; 0], "files are left");
        self.finished.set(true);
    }

    /// Shows what a failed test left, for its reader.
    fn explain(&self) {
        for record in self.records() {
            let directory = self
                .data
                .join("vms")
                .join(record["id"].as_str().unwrap_or("?"));
            eprintln!(
                "--- VM {} is {} ({})",
                record["name"], record["state"], record["error"]
            );
            for name in ["owner.log", "console.log"] {
                let text = fs::read(directory.join(name)).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let tail = text.lines().rev().take(15).collect::<Vec<_>>();
                eprintln!(
                    "--- {name}\n{}",
                    tail.into_iter().rev().collect::<Vec<_>>().join("\n")
                );
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.finished.get() {
            return;
        }
        if std::thread::panicking() {
            self.explain();
        }
        let _ = Command::new("fusermount3")
            .args(["-u", "-z"])
            .arg(self.data.join("pool/mnt"))
            .output();
        for (pid, _) in self.all_processes() {
            let _ = kill_process(pid, Signal::KILL);
            process::wait_gone(pid);
        }
    }
}

/// Checks that a command failed with this code and one clear line; gives the line.
#[track_caller]
pub(crate) fn one_error(output: Output, code: i32, what: &str) -> String {
    let line = output.stderr.trim_end_matches('\n');
    let clear =
        line.starts_with("Error: ") && !line.contains(['\n', '\r', '\x1b']) && line.len() > 20;
    assert!(
        output.code == code && clear,
        "{what}: no clear error with code {code}: {output:?}"
    );
    line.to_owned()
}

/// Any user may open `/dev/kvm`.
pub(crate) fn is_kvm_everybodys() -> bool {
    fs::metadata("/dev/kvm").is_ok_and(|data| data.permissions().mode() & 0o6 == 0o6)
}

/// The suite runs as root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Files below a directory with their sizes, for a comparison of before and after.
pub(crate) fn tree(directory: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let data = entry.metadata().unwrap();
            if data.is_dir() {
                pending.push(entry.path());
            } else {
                found.push((entry.path(), data.len()));
            }
        }
    }
    found.sort();
    found
}
