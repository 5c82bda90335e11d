//! What the integration tests share: a kernel package, or the line that says why there is none.

// Each test binary uses a part of it.
#![allow(dead_code)]

use std::net::{TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use fcvm_kernel::{Architecture, GuestKernel, SetupOptions};
use tempfile::TempDir;

/// Options that take the package that FCVM_TEST_KERNEL_DEB names, or fetch one; none, with a line that
/// says why, where neither can be.
pub(crate) fn setup_options() -> Option<SetupOptions> {
    let Some(architecture) = Architecture::host() else {
        println!("skipped: there is no guest kernel for this machine's architecture");
        return None;
    };
    let mut options = SetupOptions::new(architecture);
    options.package = std::env::var_os("FCVM_TEST_KERNEL_DEB").map(PathBuf::from);
    if options.package.is_none() && !archive_answers() {
        println!(
            "skipped: apt has no package source that answers, and FCVM_TEST_KERNEL_DEB is not set"
        );
        return None;
    }
    Some(options)
}

/// The kernel that FCVM_TEST_KERNEL_DIR names (the `current` of a directory of kernels), or one of this test's own; and a
/// directory to work in.
pub(crate) fn kernel() -> Option<(TempDir, GuestKernel)> {
    let directory = tempfile::tempdir().unwrap();
    if let Some(shared) = std::env::var_os("FCVM_TEST_KERNEL_DIR") {
        let shared = PathBuf::from(shared);
        let kernel = fcvm_kernel::installed(shared.parent().unwrap()).unwrap();
        return Some((
            directory,
            kernel.expect("FCVM_TEST_KERNEL_DIR holds a kernel"),
        ));
    }
    let options = setup_options()?;
    let kernel = fcvm_kernel::setup(directory.path(), &options, &mut |_| {}).unwrap();
    Some((directory, kernel))
}

/// True where apt knows the package and its host can be connected to.
fn archive_answers() -> bool {
    let Ok(output) = Command::new("apt-get")
        .args(["download", "--print-uris", "apt"])
        .output()
    else {
        return false;
    };
    let uris = String::from_utf8_lossy(&output.stdout).into_owned();
    let Some(host) = uris
        .split("://")
        .nth(1)
        .and_then(|rest| rest.split('/').next())
    else {
        return false;
    };
    let address = if host.contains(':') {
        host.to_owned()
    } else {
        format!("{host}:80")
    };
    address.to_socket_addrs().is_ok_and(|mut addresses| {
        addresses
            .any(|address| TcpStream::connect_timeout(&address, Duration::from_secs(10)).is_ok())
    })
}

/// An emulated machine's time-stamp counter is the host's; without its rate the kernel calibrates it
/// against a timer, which can take for ever on a busy host.
pub(crate) fn tsc() -> String {
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let rate = processors.lines().find_map(|line| {
        line.strip_prefix("cpu MHz")?
            .split(':')
            .nth(1)?
            .trim()
            .parse::<f64>()
            .ok()
    });
    rate.map_or_else(String::new, |mhz| {
        format!(" tsc=reliable tsc_early_khz={}", (mhz * 1000.0) as u64)
    })
}
