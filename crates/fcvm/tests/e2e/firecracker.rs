//! What only Firecracker has: that it is chosen, its jail, memory by userfaultfd, and devices that it needs.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::base::IMAGE;
use crate::lab::{Lab, is_root};
use crate::process::wait_gone;

/// The first number of a jail's users.
const JAIL_USER: u32 = 0x7000_0000;
/// The state of a VM that starts from a snapshot.
const STATE: &str = "cat /dev/shm/state";

fn lab(what: &str) -> Option<Lab> {
    Lab::of_firecracker(what)
}

/// A snapshot of a VM that is gone.
fn snapshot(lab: &Lab, tag: &str, jail: bool) {
    let jail = format!("--jail={jail}");
    let options = ["--network", "none", "--memory", "128m", &jail];
    lab.idle_vm("source", &options);
    lab.sh("source", "echo kept > /dev/shm/state");
    lab.ok(&["snapshot", "create", "source", "--tag", tag]);
    lab.ok(&["rm", "-f", "source"]);
}

fn start(lab: &Lab, tag: &str, name: &str, memory: &str) {
    let run = ["snapshot", "run", "--snapshot", tag, "--name", name];
    let said = lab.ok(&[&run[..], &["--memory", memory, "--exec", STATE]].concat());
    assert_eq!(said, format!("{name}: kept\n"));
    let origin = lab.json(&["inspect", name])[0]["memory_origin"].to_string();
    assert!(origin.contains(memory), "{origin}");
}

#[test]
fn firecracker_is_taken_where_the_choice_is_left() {
    let Some(lab) = lab("is chosen by itself") else {
        return;
    };
    let run = |name: &str, options: &[&str], hypervisor: &str, expected: &str| {
        let begin = ["run", "--name", name, "--hypervisor", "auto"];
        lab.ok(&[&begin, options, &["--network", "none", IMAGE, "true"]].concat());
        let record = &lab.json(&["inspect", name])[0];
        assert_eq!(record["hypervisor"], hypervisor);
        let reason = record["hypervisor_reason"].as_str().unwrap();
        assert!(reason.contains(expected), "{reason}");
        lab.ok(&["rm", name]);
    };
    run("usual", &[], "firecracker", "KVM is usable and Firecracker");
    let other = ["--disk-store", "overlay"];
    run("other", &other, "qemu", "--disk-store overlay is QEMU's");
    lab.finish();
}

/// Faults of a clone that its server has answered.
fn faults(lab: &Lab, name: &str) -> u64 {
    let servers = lab.json(&["stats", "--memory", "--no-stream", "--format", "json"]);
    let served = servers[0]["served"].as_array().unwrap();
    let clone = served.iter().find(|clone| clone["vm"]["name"] == name);
    clone.unwrap()["statistics"]["faults"].as_u64().unwrap()
}

/// Clones of several commands get their memory from one server, which brings ahead what the first one needed.
#[test]
fn memory_is_served_and_its_server_is_missed() {
    let Some(lab) = lab("has its memory from a server") else {
        return;
    };
    serve(&lab, false);
    if is_root() {
        serve(&lab, true);
    }
    lab.finish();
}

fn serve(lab: &Lab, jail: bool) {
    /// Of the source.
    const PAGES: u64 = (128 << 20) / 4096;
    snapshot(lab, "base", jail);
    let server = lab.start(&["snapshot", "serve-memory", "base", "--record", "20"]);
    server.stdout.wait_for("\n");
    start(lab, "base", "recorded", "uffd");
    let kept = lab.data.join("snapshots/base/working-set.bin");
    crate::fault::wait_for("what the first clone needed", || kept.exists());
    start(lab, "base", "ahead", "uffd");
    let [recorded, ahead] = ["recorded", "ahead"].map(|name| faults(lab, name));
    // How far a slow host comes within what is recorded is its own.
    assert!(ahead * 2 <= recorded, "{ahead} faults after {recorded}");
    // What it did not need is not asked for by its fork: the snapshot has it.
    lab.sh("ahead", "echo more >> /dev/shm/state");
    let before = faults(lab, "ahead");
    lab.ok(&["fork", "ahead", "--name", "forked"]);
    let asked = faults(lab, "ahead") - before;
    assert!(asked < PAGES / 4, "{asked} faults while it was saved");
    assert_eq!(lab.sh("forked", STATE), "kept\nmore\n");

    server.signal(Signal::KILL);
    server.wait();
    for name in ["recorded", "ahead"] {
        let record = lab.wait_for_state(name, "exited");
        let error = record["error"].as_str().unwrap();
        assert!(error.contains("memory server has ended"), "{error}");
    }
    // What has memory of its own goes on, and a command starts a server where none runs.
    assert_eq!(lab.sh("forked", STATE), "kept\nmore\n");
    start(lab, "base", "started", "uffd");
    start(lab, "base", "mapped", "file");
    lab.ok(&["rm", "-f", "-a"]);
    lab.wait_for_no_process();
    lab.ok(&["system", "prune", "--force"]);
    lab.ok(&["snapshot", "rm", "base"]);
}

#[test]
fn devices_on_a_pci_bus_work_and_are_cloned() {
    let Some(lab) = lab("has a PCI bus") else {
        return;
    };
    lab.idle_vm("source", &["--pci"]);
    let ask = "echo kept > /data/file; sync; ls /sys/bus/pci/drivers/virtio-pci | grep -c ^0000; ls /sys/class/net";
    assert_eq!(lab.sh("source", ask), "5\neth0\nlo\n");
    lab.ok(&["fork", "source", "--name", "clone"]);
    lab.ok(&["snapshot", "create", "clone", "--tag", "pci", "--verify"]);
    let run = ["snapshot", "run", "--snapshot", "pci", "--name", "restored"];
    lab.ok(&run);
    for vm in ["source", "clone", "restored"] {
        let ask = "cat /data/file; dd if=/dev/urandom of=/data/more bs=1M count=4 2>/dev/null; sync; ip addr show eth0 | grep -c 'inet '";
        assert_eq!(lab.sh(vm, ask), "kept\n1\n");
    }
    lab.ok(&["rm", "-f", "-a"]);
    lab.ok(&["snapshot", "rm", "pci"]);
    lab.finish();
}

/// A setting of the host, which is what it was again when this ends.
struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    fn set(path: &'static str, value: u64) -> Self {
        let before = fs::read_to_string(path).unwrap();
        fs::write(path, value.to_string()).unwrap();
        Self { path, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        fs::write(self.path, &self.before).unwrap();
    }
}

/// Pages of 2 MiB that the host has.
const HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

fn free_hugepages() -> u64 {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

#[test]
fn memory_in_hugepages_is_cloned_by_its_server() {
    const PAGES: u64 = 64;
    let Some(lab) = lab("has hugepages") else {
        return;
    };
    if !is_own_host() {
        return;
    }
    let jail = format!("--jail={}", is_root());
    let options = [
        "--hugepages",
        "--network",
        "none",
        "--memory",
        "128m",
        &jail,
    ];
    let run = [&["run", "--rm"], &options[..], &[IMAGE, "true"]].concat();
    let none = Setting::set(HUGEPAGES, 0);
    let line = lab.fails(125, &run);
    assert!(
        line.contains("takes 64 pages of 2 MiB and the host has 0"),
        "{line}"
    );
    drop(none);

    let _pages = Setting::set(HUGEPAGES, 3 * PAGES);
    assert_eq!(free_hugepages(), 3 * PAGES, "the host has not the memory");
    lab.idle_vm("source", &options);
    lab.sh("source", "echo kept > /dev/shm/state");
    let usage = &lab.json(&["ls", "--size", "--format", "json"])[0]["usage"];
    let taken = 3 * PAGES - free_hugepages();
    assert!(taken > 0, "its memory is elsewhere");
    let own = usage["guest_private_bytes"].as_u64().unwrap();
    assert!(own >= taken << 21, "{own} bytes, and {taken} pages taken");
    let line = lab.fails(125, &["fork", "source"]);
    assert!(line.contains("fcvm snapshot create"), "{line}");
    let create = ["snapshot", "create", "source", "--tag"];
    let line = lab.fails(125, &[&create[..], &["checked", "--verify"]].concat());
    assert!(line.contains("leave it out"), "{line}");
    lab.ok(&[&create[..], &["base"]].concat());
    let run = ["snapshot", "run", "--snapshot", "base", "--memory", "file"];
    let line = lab.fails(125, &run);
    assert!(line.contains("memory server"), "{line}");

    // One of each way to ask for it, and a clone of a clone.
    start(&lab, "base", "first", "uffd");
    let run = ["snapshot", "run", "--snapshot", "base", "--name", "second"];
    lab.ok(&run);
    let origin = lab.json(&["inspect", "second"])[0]["memory_origin"].to_string();
    assert!(origin.contains("hugepages can be had"), "{origin}");
    assert_eq!(
        lab.sh("second", "echo more >> /dev/shm/state; cat /dev/shm/state"),
        "kept\nmore\n"
    );
    assert_eq!(lab.sh("first", STATE), "kept\n");
    let count = faults(&lab, "first");
    assert!(
        (1..=PAGES).contains(&count),
        "{count} faults of {PAGES} pages"
    );
    lab.ok(&["snapshot", "create", "second", "--tag", "next"]);
    lab.ok(&["rm", "-f", "-a"]);
    lab.wait_for_no_process();
    assert_eq!(free_hugepages(), 3 * PAGES);
    lab.ok(&["snapshot", "run", "--snapshot", "next", "--name", "third"]);
    assert_eq!(lab.sh("third", STATE), "kept\nmore\n");
    lab.ok(&["rm", "-f", "-a"]);
    lab.wait_for_no_process();
    let none = Setting::set(HUGEPAGES, 0);
    let line = lab.fails(125, &["snapshot", "run", "--snapshot", "next"]);
    assert!(line.contains("and the host has 0"), "{line}");
    drop(none);
    for tag in ["next", "base"] {
        lab.ok(&["snapshot", "rm", tag]);
    }
    lab.finish();
}

/// Names in a directory, but for sockets' and pipes'.
fn files(directory: &Path) -> Vec<String> {
    use std::os::unix::fs::FileTypeExt as _;
    let entries = fs::read_dir(directory).unwrap().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| {
            let kind = entry.file_type().unwrap();
            !kind.is_socket() && !kind.is_fifo()
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// The control group of a process.
fn cgroup(process: Pid) -> PathBuf {
    let path = format!("/proc/{}/cgroup", process.as_raw_nonzero());
    let line = fs::read_to_string(path).unwrap();
    let group = line.trim().strip_prefix("0::/").unwrap();
    Path::new("/sys/fs/cgroup").join(group)
}

#[test]
fn a_jailed_vm_has_little_and_leaves_nothing() {
    let Some(lab) = lab("has a jailer") else {
        return;
    };
    if !is_root() {
        println!("skipped: a jail needs root");
        return;
    }
    lab.idle_vm("jailed", &["--network", "none", "--jail"]);
    let process = lab.the_hypervisor();
    let proc = PathBuf::from(format!("/proc/{}", process.as_raw_nonzero()));
    let user = fs::metadata(&proc).unwrap().uid();
    assert!(user > JAIL_USER, "{user}");
    let root = proc.join("root");
    let expected = [
        "dev",
        "disk0",
        "disk1",
        "firecracker",
        "firecracker.pid",
        "initramfs",
        "kernel",
        "run",
        "state",
    ];
    assert_eq!(files(&root), expected);
    let status = fs::read_to_string(proc.join("status")).unwrap();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    assert_eq!(numbers.unwrap().split_whitespace().count(), 2, "{status}");
    assert!(status.contains("CapEff:\t0000000000000000\n"), "{status}");
    let group = cgroup(process);
    let limit = |name: &str| fs::read_to_string(group.join(name)).unwrap();
    assert_eq!(limit("memory.max"), format!("{}\n", (512_u64 + 128) << 20));
    assert_eq!(limit("cpu.max"), "200000 100000\n");

    // A disk of the pool, which is another file system, is mounted there.
    let pool = lab.data.join("pool/mnt");
    let mounts = fs::read_to_string(proc.join("mountinfo")).unwrap();
    let mounts = mounts.lines().map(|line| line.split(' ').nth(4).unwrap());
    let expected = ["/", "/disk1"];
    assert_eq!(
        mounts.collect::<Vec<_>>(),
        expected[..1 + usize::from(pool.is_dir())]
    );
    let store = &lab.json(&["inspect", "jailed"])[0]["disk_store"];
    assert_eq!(store["method"] == "pool", pool.is_dir(), "{store}");
    assert_eq!(
        store["reason"].is_string(),
        lab.disk_store.is_none(),
        "{store}"
    );
    // It had a name there for that alone.
    let names = fs::read_dir(pool.join("disks")).into_iter().flatten();
    let names = names.map(|entry| entry.unwrap().file_name());
    let left = names.filter(|name| name.to_string_lossy().starts_with("jail-"));
    assert_eq!(left.count(), 0);

    lab.sh("jailed", "echo kept > /root/file; sync");
    lab.ok(&["fork", "jailed", "--name", "clone"]);
    assert_eq!(
        lab.sh("clone", "cat /root/file; echo other > /root/file; sync"),
        "kept\n"
    );
    assert_eq!(lab.sh("jailed", "cat /root/file"), "kept\n");
    let users: HashSet<u32> = lab
        .hypervisors()
        .into_iter()
        .map(|pid| {
            fs::metadata(format!("/proc/{}", pid.as_raw_nonzero()))
                .unwrap()
                .uid()
        })
        .collect();
    assert_eq!(users.len(), 2, "each has a user of its own");
    lab.ok(&["rm", "-f", "clone"]);

    // Its owner's death is its own.
    let owner = lab.wait_for_state("jailed", "running")["owner"]["pid"].as_i64();
    let owner = Pid::from_raw(i32::try_from(owner.unwrap()).unwrap()).unwrap();
    kill_process(owner, Signal::KILL).unwrap();
    assert!(wait_gone(owner));
    lab.wait_for_no_process();
    lab.ok(&["rm", "jailed"]);
    lab.ok(&["system", "prune", "--force"]);
    assert!(!group.exists(), "{} is left", group.display());
    lab.finish();
}

#[test]
fn root_may_do_without_a_jail() {
    let Some(lab) = lab("has a jailer") else {
        return;
    };
    lab.idle_vm("free", &["--jail", "--jail=false"]);
    let process = lab.the_hypervisor().as_raw_nonzero();
    let user = fs::metadata(format!("/proc/{process}")).unwrap().uid();
    assert_eq!(user, rustix::process::geteuid().as_raw());
    lab.ok(&["fork", "free", "-n", "2", "--name", "clone"]);
    assert_eq!(lab.sh("clone-2", "echo here"), "here\n");
    lab.ok(&["rm", "-f", "-a"]);
    lab.finish();
}

/// A file of the host that is away as long as this lives.
struct Away(&'static str);

impl Away {
    fn take(path: &'static str) -> Self {
        fs::rename(path, format!("{path}.away")).unwrap();
        Self(path)
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        fs::rename(format!("{}.away", self.0), self.0).unwrap();
    }
}

/// Whether tests may change the host; tells that they may not.
fn is_own_host() -> bool {
    let own = std::env::var_os("FCVM_TEST_OWN_HOST").is_some();
    if !own {
        println!("skipped: this test changes the host: FCVM_TEST_OWN_HOST allows it");
    }
    own
}

#[test]
fn devices_that_are_missing_are_told() {
    let Some(lab) = lab("needs them") else { return };
    if !is_own_host() {
        return;
    }
    for (device, said) in [("/dev/net/tun", "modprobe tun"), ("/dev/kvm", "needs KVM")] {
        let away = Away::take(device);
        let line = lab.fails(125, &["run", "--rm", IMAGE, "true"]);
        assert!(line.contains(said), "{line}");
        drop(away);
    }
    assert_eq!(lab.ok(&["run", "--rm", IMAGE, "echo", "here"]), "here\n");
    lab.finish();
}

#[test]
fn users_without_namespaces_are_told_and_have_qemu() {
    const LIMIT: &str = "/proc/sys/user/max_user_namespaces";
    if !is_own_host() {
        return;
    }
    let Some(_) = lab("needs a user namespace") else {
        return;
    };
    let Some(lab) = Lab::ordinary() else { return };
    let limit = Setting::set(LIMIT, 0);
    let line = lab.fails(125, &["run", "--rm", IMAGE, "true"]);
    assert!(line.contains("max_user_namespaces"), "{line}");
    let run = [
        "run",
        "--hypervisor",
        "auto",
        "--name",
        "other",
        IMAGE,
        "true",
    ];
    if is_root()
        && let Some(roots) = Lab::new()
    {
        // Root's passt needs one too.
        let line = roots.fails(125, &["run", "--rm", IMAGE, "true"]);
        assert!(line.contains("max_user_namespaces"), "{line}");
        roots.finish();
    }
    // Nor has it passt then.
    let output = lab.fcvm(&run);
    assert_eq!(output.code, 0, "{output:?}");
    assert!(output.stderr.contains("user namespace"), "{output:?}");
    let record: Value = lab.json(&["inspect", "other"])[0].clone();
    drop(limit);
    assert_eq!(record["hypervisor"], "qemu");
    let line = lab.fails(125, &["run", "--rm", "--jail", IMAGE, "true"]);
    assert!(line.contains("needs root"), "{line}");
    lab.ok(&["rm", "other"]);
    lab.finish();
}
