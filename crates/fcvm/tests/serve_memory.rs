//! `fcvm snapshot serve-memory` through the program, with a client process in place of a hypervisor. No VM
//! is started.

#![allow(missing_docs, reason = "a test program has no users")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;

use fcvm_memory::PAGE_BYTES;
use fcvm_memory::page_file::anonymous_file;
use fcvm_memory::uffd::{Faults, GuestMemory, Region, ServerWatch, Userfault, handshake};
use fcvm_snapshot::{ManifestFields, Mark, RootImage, SnapshotStore};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const PAGES: u64 = 64;
const SIGTERM: &str = "-TERM";
const SIGKILL: &str = "-KILL";

/// A data directory with a snapshot, whose pages hold their numbers but for each fourth, which is zero.
struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
        Self::with(fields())
    }

    fn with(fields: ManifestFields) -> Self {
        let lab = Self(tempfile::tempdir().unwrap());
        let memory = anonymous_file("fcvm-test", PAGES * PAGE_BYTES).unwrap();
        for page in 0..PAGES {
            let bytes = expected(page).to_ne_bytes();
            if expected(page) != 0 {
                memory.write_all_at(&bytes, page * PAGE_BYTES).unwrap();
            }
        }
        let store = SnapshotStore::new(lab.0.path().join("data/snapshots"));
        let mut draft = store.begin(&"one".parse().unwrap()).unwrap();
        draft.write_memory_whole(&memory, None).unwrap();
        draft.write_state(b"devices").unwrap();
        draft.finish(fields).unwrap();
        lab
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join("data/snapshots/one").join(name)
    }

    fn fcvm(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fcvm"));
        command
            .args(arguments)
            .env("FCVM_DATA_DIR", self.0.path().join("data"))
            .env("FCVM_RUNTIME_DIR", self.0.path().join("run"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn serve(&self, options: &[&str]) -> Serving {
        let arguments = [
            &["--log-level", "info", "snapshot", "serve-memory", "one"],
            options,
        ];
        let mut child = self.fcvm(&arguments.concat()).spawn().unwrap();
        let mut socket = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut socket).unwrap();
        Serving {
            child,
            socket: socket.trim().into(),
        }
    }
}

fn expected(page: u64) -> u64 {
    if page.is_multiple_of(4) {
        0
    } else {
        page + 1000
    }
}

fn fields() -> ManifestFields {
    ManifestFields {
        source_id: "0123456789abcdef0123456789abcdef".parse().unwrap(),
        source_name: "source".parse().unwrap(),
        image: "image:1".to_owned(),
        image_digest: String::new(),
        root_image: RootImage {
            path: "/nowhere".into(),
            digest: String::new(),
        },
        spec: serde_json::Value::Null,
        hypervisor: "none".to_owned(),
        device_line: serde_json::Value::Null,
        accelerator: serde_json::Value::Null,
        host_cpu: String::new(),
        mark: Mark::new(String::new()),
        timings_us: Vec::new(),
    }
}

/// The program, killed when it is dropped.
struct Serving {
    child: Child,
    socket: PathBuf,
}

impl Serving {
    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    fn wait(&mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        (self.child.wait().unwrap(), said)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that has read all pages and found them right.
fn client(serving: &Serving) -> Child {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "client_process", "--nocapture"])
        .env("FCVM_TEST_SOCKET", &serving.socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let found = lines
        .map_while(Result::ok)
        .any(|line| line.contains("> fine"));
    assert!(found, "the client failed: {}", child.wait().unwrap());
    child
}

#[test]
#[ignore = "the client of the other tests: a process of its own"]
fn client_process() {
    let Some(socket) = std::env::var_os("FCVM_TEST_SOCKET") else {
        return;
    };
    let memory = GuestMemory::anonymous(PAGES * PAGE_BYTES, false).unwrap();
    let userfault = userfault().unwrap();
    memory.register(&userfault).unwrap();
    let region = Region {
        address: memory.address(),
        bytes: memory.bytes(),
        offset: 0,
        page_bytes: PAGE_BYTES,
    };
    handshake::send(&UnixStream::connect(socket).unwrap(), &[region], &userfault).unwrap();
    for page in 0..PAGES {
        let found = memory.word(page * PAGE_BYTES).load(Ordering::Relaxed);
        assert_eq!(found, expected(page));
    }
    println!("> fine");
    // Until the test closes it, or the server kills this process.
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0);
}

fn userfault() -> Option<Userfault> {
    let all = Userfault::create(Faults::All);
    all.or_else(|_| Userfault::create(Faults::OfUserMode)).ok()
}

fn is_possible() -> bool {
    let possible = userfault().is_some();
    if !possible {
        println!("skipped: this user may not use userfaultfd");
    }
    possible
}

#[test]
fn the_memory_of_a_snapshot_is_served_and_its_working_set_kept() {
    if !is_possible() {
        return;
    }
    let lab = Lab::new();
    let mut serving = lab.serve(&["--exit-when-idle"]);
    let mut first = client(&serving);
    drop(first.stdin.take());
    assert!(first.wait().unwrap().success());
    let (status, said) = serving.wait();
    assert!(status.success(), "{said}");
    assert!(said.contains("64 pages come ahead"), "{said}");
    assert!(said.contains("64 faults (16 zero"), "{said}");
    assert!(!serving.socket.exists());
    assert!(lab.file("working-set.bin").is_file());

    // Told to end, it takes its clones along.
    let mut serving = lab.serve(&[]);
    let mut second = client(&serving);
    // Waiting for it would close this, at which it ends by itself.
    let input = second.stdin.take();
    serving.signal(SIGTERM);
    assert_eq!(second.wait().unwrap().signal(), Some(9));
    drop(input);
    let (status, said) = serving.wait();
    assert!(status.success(), "{said}");
    assert!(!serving.socket.exists());
}

#[test]
fn stats_tell_what_servers_do() {
    if !is_possible() {
        return;
    }
    let lab = Lab::new();
    let stats = || -> serde_json::Value {
        let output = lab
            .fcvm(&["stats", "--memory", "--no-stream", "--format", "json"])
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert_eq!(stats(), serde_json::json!([]));
    let serving = lab.serve(&[]);
    let mut clone = client(&serving);
    // The last page is counted when the clone has it, which may be a moment before.
    let is_counted =
        |told: &serde_json::Value| told[0]["served"][0]["statistics"]["faults"] == PAGES;
    let told = std::iter::repeat_with(stats).take(100).find(is_counted);
    let told = told.expect("the faults are never counted");
    assert_eq!(told[0]["server_pid"], serving.child.id());
    let served = &told[0]["served"][0];
    assert_eq!(served["pid"], clone.id());
    assert_eq!(served["statistics"]["faults"], PAGES);
    assert!(served["vm"].is_null());
    let output = lab.fcvm(&["stats", "--memory", "--no-stream"]).output();
    let table = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(table.contains("(0 ended)"), "{table}");
    serving.signal(SIGTERM);
    clone.wait().unwrap();
}

#[test]
fn a_killed_server_is_noticed_and_its_socket_swept() {
    if !is_possible() {
        return;
    }
    let lab = Lab::new();
    let mut serving = lab.serve(&[]);
    let this = std::process::id().cast_signed();
    let mut watch = ServerWatch::connect_for(&serving.socket, this).unwrap();
    // A socket that is listened to stays.
    let prune = || {
        let output = lab.fcvm(&["system", "prune", "--force"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!prune().contains("serve-memory-"));
    serving.signal(SIGKILL);
    assert_eq!(watch.next().unwrap(), None);
    assert_eq!(serving.wait().0.signal(), Some(9));
    assert!(prune().contains("serve-memory-"));
    assert!(!serving.socket.exists());
}

/// Of a VM under Firecracker, as far as it is looked at before a clone is started.
fn firecracker_fields(root_image: &Path) -> ManifestFields {
    let process = serde_json::json!({
        "args": ["true"], "env": [], "cwd": "", "user": "", "terminal": null, "stdin": false,
        "capabilities": [], "rlimits": [], "no_new_privileges": false,
    });
    let duration = serde_json::json!({ "secs": 20, "nanos": 0 });
    let version = serde_json::json!({ "major": 1, "minor": 13, "micro": 0 });
    ManifestFields {
        spec: serde_json::json!({
            "id": fields().source_id, "name": "source", "hostname": "source", "image": "image:1",
            "image_digest": "", "root_image": root_image, "kernel": root_image, "initramfs": root_image,
            "process": process, "read_only": false, "privileged": false, "extra_hosts": [],
            "cpu_count": 1, "memory_bytes": PAGES * PAGE_BYTES, "disk_bytes": 0,
            "hypervisor": "firecracker", "accelerator": "Tcg", "network": "None", "ports": [],
            "dns_servers": [], "labels": {}, "remove_on_exit": false, "stop_signal": 15,
            "stop_timeout": duration, "boot_timeout": duration, "health": null, "timings_us": [],
        }),
        device_line: serde_json::json!({
            "firecracker_version": version, "cpu_count": 1, "memory_bytes": PAGES * PAGE_BYTES,
            "disks": [], "has_network": false,
        }),
        accelerator: serde_json::json!({ "kind": "tcg", "tsc_khz": null }),
        host_cpu: "QEMU's own".to_owned(),
        mark: Mark::new("01".repeat(16)),
        ..fields()
    }
}

#[test]
fn a_server_that_a_command_started_ends_by_itself_where_no_clone_comes() {
    let image = tempfile::NamedTempFile::new().unwrap();
    let lab = Lab::with(firecracker_fields(image.path()));
    let run = || {
        let arguments = ["snapshot", "run", "--snapshot", "one", "--memory", "uffd"];
        let output = lab
            .fcvm(&arguments)
            // No Firecracker is there.
            .env("FCVM_FIRECRACKER_BIN", "/nonexistent")
            // No pool is mounted, which would stay.
            .env("FCVM_DISK_STORE", "copy")
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    // Without close-on-exec: it can be read to its end when all have ended that the command has started.
    let (mut ended, held) = std::io::pipe().unwrap();
    rustix::io::fcntl_setfd(&held, rustix::io::FdFlags::empty()).unwrap();
    let said = run();
    assert!(!said.contains("memory server"), "{said}");
    drop(held);
    ended.read_to_end(&mut Vec::new()).unwrap();
    let log = std::fs::read_to_string(lab.file("memory-server.log")).unwrap();
    assert!(log.contains("0 clones served"), "{log}");
    let left = std::fs::read_dir(lab.0.path().join("run")).unwrap();
    let names = left.map(|entry| entry.unwrap().file_name());
    assert!(
        !names
            .into_iter()
            .any(|name| name.to_string_lossy().starts_with("serve-memory-"))
    );

    // One that cannot start says why.
    let memory = File::options()
        .write(true)
        .open(lab.file("memory.pages"))
        .unwrap();
    memory.write_all_at(b"x", 4096 + 5).unwrap();
    let said = run();
    assert!(
        said.contains("does not start") && said.contains("damaged"),
        "{said}"
    );
}

#[test]
fn damage_is_told_before_anything_is_served() {
    let lab = Lab::new();
    let refused = |what: &str| {
        let output = lab
            .fcvm(&["snapshot", "serve-memory", "one"])
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains(what), "{said}");
    };
    // A byte of a page, then the end of the file.
    let memory = File::options()
        .read(true)
        .write(true)
        .open(lab.file("memory.pages"))
        .unwrap();
    memory.write_all_at(b"x", 4096 + 5).unwrap();
    refused("checksum");
    memory
        .set_len(memory.metadata().unwrap().len() - PAGE_BYTES)
        .unwrap();
    refused("damaged");
}

#[test]
fn a_server_may_have_as_many_descriptors_as_the_host_allows() {
    let lab = Lab::new();
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // Enough for the other tests as well.
    let low = Some(256);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: low,
            maximum,
        },
    )
    .unwrap();
    let serving = lab.serve(&[]);
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", serving.child.id())).unwrap();
    let files = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let files: Vec<&str> = files.unwrap().split_whitespace().collect();
    assert_ne!(files[0], "256");
    assert_eq!(files[0], files[1]);
}

#[test]
fn a_damaged_working_set_is_recorded_anew() {
    if !is_possible() {
        return;
    }
    let lab = Lab::new();
    let mut file = File::create(lab.file("working-set.bin")).unwrap();
    file.write_all(b"FCVMWSET and nonsense").unwrap();
    let mut serving = lab.serve(&["--exit-when-idle"]);
    let mut child = client(&serving);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    let (status, said) = serving.wait();
    assert!(status.success() && said.contains("recorded anew"), "{said}");
    assert!(said.contains("64 pages come ahead"), "{said}");
}
