//! `fcvm snapshot serve-memory` through the program, with a client process in place of a hypervisor. No VM
//! is started.

#![allow(missing_docs, reason = "a test program has no users")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;

use fcvm_memory::PAGE_BYTES;
use fcvm_memory::page_file::anonymous_file;
use fcvm_memory::uffd::{Faults, GuestMemory, Region, ServerWatch, Userfault, handshake};
use fcvm_snapshot::{ManifestFields, Mark, RootImage, SnapshotStore};

const PAGES: u64 = 64;
const SIGTERM: &str = "-TERM";
const SIGKILL: &str = "-KILL";

/// A data directory with a snapshot, whose pages hold their numbers but for each fourth, which is zero.
struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
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
        draft.finish(fields()).unwrap();
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
    let mut watch = ServerWatch::connect(&serving.socket).unwrap();
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
