//! The kernel and the initramfs in a real machine: QEMU's microVM, emulated.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fcvm_kernel::GuestKernel;

/// Loads the modules the list names, tries what they are for, and powers off.
const INIT_PROGRAM: &str = r#"
use std::ffi::{CStr, c_char, c_int, c_long, c_ulong, c_void};
unsafe extern "C" {
    fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn reboot(command: c_int) -> c_int;
    fn sync();
}
const INIT_MODULE: c_long = if cfg!(target_arch = "x86_64") { 175 } else { 105 };
fn mount_at(kind: &CStr, target: &CStr) -> bool {
    unsafe { mount(c"none".as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) == 0 }
}
fn main() {
    println!("process {}", std::process::id());
    println!("mounts {}", mount_at(c"devtmpfs", c"/dev") && mount_at(c"proc", c"/proc") && mount_at(c"sysfs", c"/sys"));
    for name in std::fs::read_to_string("/modules/list").unwrap().lines() {
        let module = std::fs::read(format!("/modules/{name}")).unwrap();
        let result = unsafe { syscall(INIT_MODULE, module.as_ptr(), module.len(), c"".as_ptr()) };
        if result != 0 {
            println!("module {name} failed: {}", std::io::Error::last_os_error());
        }
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap();
    for name in ["erofs", "overlay", "ext4"] {
        println!("filesystem {name} {}", filesystems.lines().any(|line| line.trim_start_matches("nodev").trim() == name));
    }
    for path in ["/sys/block/vda", "/sys/class/net/eth0", "/dev/vport0p1"] {
        println!("device {path} {}", std::path::Path::new(path).exists());
    }
    println!("end");
    unsafe { sync(); reboot(0x4321fedc_u32 as c_int); }
}
"#;

/// Far more than an emulated boot on a busy machine takes; only a hang reaches it.
const BOOT_TIMEOUT_S: &str = "180";

#[test]
fn boots_the_fetched_kernel_with_its_modules() {
    let Some((directory, kernel)) = common::kernel() else {
        return;
    };
    if cfg!(not(target_arch = "x86_64")) {
        println!("skipped: the command line of this test is that of an x86-64 microVM");
        return;
    }
    let Some(init) = compile_init(directory.path()) else {
        println!("skipped: rustc cannot link static programs here");
        return;
    };
    let initramfs =
        fcvm_kernel::initramfs(directory.path(), &kernel, &init, fcvm_kernel::Devices::Qemu)
            .unwrap();
    let Some(console) = boot(directory.path(), &kernel, &initramfs) else {
        println!("skipped: qemu-system-x86_64 is not installed");
        return;
    };
    let said = |line: &str| console.lines().any(|found| found.trim() == line);
    assert!(
        said("process 1") && said("mounts true") && said("end"),
        "{console}"
    );
    assert!(!console.contains("failed:"), "{console}");
    for name in ["erofs", "overlay", "ext4"] {
        assert!(said(&format!("filesystem {name} true")), "{console}");
    }
    for path in ["/sys/block/vda", "/sys/class/net/eth0", "/dev/vport0p1"] {
        assert!(said(&format!("device {path} true")), "{console}");
    }
}

/// A static program, made here because the agent's own build is no part of this crate's.
fn compile_init(directory: &Path) -> Option<PathBuf> {
    let source = directory.join("init.rs");
    let program = directory.join("init");
    fs::write(&source, INIT_PROGRAM).unwrap();
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let status = Command::new(rustc)
        .args([
            "--edition=2024",
            "-Copt-level=s",
            "-Ctarget-feature=+crt-static",
            "-Cpanic=abort",
        ])
        .arg("-o")
        .arg(&program)
        .arg(&source)
        .status()
        .ok()?;
    status.success().then_some(program)
}

/// Everything the console said until the machine powered off; none where QEMU is not installed.
fn boot(directory: &Path, kernel: &GuestKernel, initramfs: &Path) -> Option<String> {
    let console = directory.join("console");
    let disk = directory.join("disk");
    fs::write(&disk, [0; 1 << 16]).unwrap();
    let status = Command::new("timeout")
        .args([BOOT_TIMEOUT_S, "qemu-system-x86_64"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-accel", "tcg", "-cpu", "max", "-m", "256M", "-machine", "microvm",
        ])
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .args(["-serial", &format!("file:{}", console.display())])
        .args(["-device", "virtio-serial-device"])
        .args([
            "-chardev",
            "null,id=agent",
            "-device",
            "virtserialport,chardev=agent,name=agent.0,nr=1",
        ])
        .args([
            "-drive",
            &format!(
                "if=none,id=d0,format=raw,read-only=on,file={}",
                disk.display()
            ),
        ])
        .args(["-device", "virtio-blk-device,drive=d0"])
        .args([
            "-netdev",
            "user,id=n0",
            "-device",
            "virtio-net-device,netdev=n0",
        ])
        .arg("-append")
        .arg(format!(
            "console=ttyS0 reboot=t panic=-1 quiet cryptomgr.notests{}",
            common::tsc()
        ))
        .arg("-kernel")
        .arg(&kernel.vmlinux)
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null())
        .status()
        .unwrap();
    if status.code() == Some(127) {
        return None;
    }
    Some(String::from_utf8_lossy(&fs::read(&console).unwrap_or_default()).into_owned())
}
