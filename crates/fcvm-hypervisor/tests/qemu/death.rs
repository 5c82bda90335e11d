//! A VM ends with its owner whatever way the owner dies.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use fcvm_hypervisor::Launch;
use fcvm_types::record::ProcessIdentity;

use crate::support::{Ending, qemu, spec, write_kernel};

const CHILD: &str = "FCVM_TEST_OWNER";
const MARK: &str = "vm ";

/// The test runs its own program a second time, as the owner.
#[tokio::test]
async fn killed_owner_takes_its_vms_along() {
    if std::env::var_os(CHILD).is_some() {
        own_two_vms().await;
        return;
    }
    if qemu().is_none() {
        return;
    }
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "death::killed_owner_takes_its_vms_along",
            "--nocapture",
        ])
        .env(CHILD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    let identities: Vec<ProcessIdentity> = lines
        .filter_map(|line| identity(&line.unwrap()))
        .take(2)
        .collect();
    for &identity in &identities {
        assert!(fcvm_process::is_running(identity));
    }
    owner.kill().unwrap();
    owner.wait().unwrap();
    assert_eq!(identities.len(), 2);
    for identity in identities {
        fcvm_process::wait_gone(identity).await.unwrap();
    }
}

async fn own_two_vms() {
    let qemu = qemu().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let kernel = write_kernel(directory.path(), "", Ending::Halt);
    let mut vms = Vec::new();
    for _ in 0..2 {
        let (spec, console) = spec(kernel.clone());
        vms.push((qemu.launch(spec).await.unwrap(), console));
    }
    // Nothing by a name is left even now.
    drop(directory);
    for (vm, _) in &vms {
        let identity = vm.identity();
        println!("\n{MARK}{} {}", identity.pid, identity.start_ticks);
    }
    std::future::pending().await
}

fn identity(line: &str) -> Option<ProcessIdentity> {
    let (pid, start_ticks) = line.strip_prefix(MARK)?.split_once(' ')?;
    Some(ProcessIdentity {
        pid: pid.parse().unwrap(),
        start_ticks: start_ticks.parse().unwrap(),
    })
}
