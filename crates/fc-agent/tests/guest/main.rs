//! The agent in a real guest: QEMU with TCG, a real kernel, real disks.
//!
//! FCVM_TEST_KERNEL_DIR names a directory with `vmlinux`, `modules/list` and `modules/*.ko`.

mod client;
mod lab;

use client::{Vm, plan, shell};
use fcvm_types::guest::ExitStatus;
use fcvm_wire::Outcome;

#[test]
fn a_container_runs_and_its_output_and_code_arrive() {
    let Some(tools) = lab::tools() else { return };
    let process =
        shell("echo out; echo err >&2; id; pwd; hostname; mount; ls -l /proc/self/fd /dev; exit 7");
    let (vm, mut stream) = Vm::run(tools, &plan(process));
    let output = stream.collect();
    println!(
        "{}{}",
        output.text(),
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(output.outcome, Outcome::Exited(ExitStatus::Code(7)));
    let guest = vm.power_off();
    println!("{}", guest.console());
}
