//! The probe of KVM against this machine's own, in a child process as in the product. This test is
//! its own child: it has no harness.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use fcvm_hypervisor::probe::{KvmUsability, probe_host, run_probe_guest};

const CHILD: &str = "run-probe-guest";

fn main() {
    if std::env::args().nth(1).as_deref() == Some(CHILD) {
        run_probe_guest();
        return;
    }
    verdict_is_one_that_the_machine_explains();
    kept_result_is_not_probed_again();
    child_without_a_verdict_is_told();
    println!("test result: ok. 3 passed");
}

fn child() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(CHILD);
    command
}

fn verdict_is_one_that_the_machine_explains() {
    let probe = probe_host(None, child());
    println!("KVM: {}; TSC: {:?} kHz", probe.kvm, probe.tsc_khz);
    std::io::stdout().flush().unwrap();
    match std::fs::metadata("/dev/kvm") {
        Err(_) => assert_eq!(probe.kvm, KvmUsability::Absent),
        Ok(_) => {
            let device = std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/kvm");
            assert_eq!(device.is_err(), probe.kvm == KvmUsability::NoPermission);
            assert_ne!(probe.kvm, KvmUsability::Absent);
            // A host that runs its guests by emulating them says so on its own command line.
            let host = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
            if host.contains("nested_pvm=1") && device.is_ok() {
                assert!(
                    matches!(probe.kvm, KvmUsability::Emulating { .. }),
                    "{}",
                    probe.kvm
                );
            }
        }
    }
}

fn kept_result_is_not_probed_again() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("probe.json");
    let first = probe_host(Some(&cache), child());
    let Ok(written) = std::fs::metadata(&cache) else {
        println!("skipped: KVM can not be opened, so there is nothing to keep");
        return;
    };
    // This one would answer something else.
    let again = probe_host(Some(&cache), Command::new("/nonexistent"));
    assert_eq!(first, again);
    assert_eq!(std::fs::metadata(&cache).unwrap().ino(), written.ino());
}

fn child_without_a_verdict_is_told() {
    if std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        println!("skipped: KVM can not be opened");
        return;
    }
    for command in [Command::new("/bin/true"), Command::new("/nonexistent")] {
        let probe = probe_host(None, command);
        assert!(
            matches!(probe.kvm, KvmUsability::Unusable { .. }),
            "{}",
            probe.kvm
        );
    }
}
