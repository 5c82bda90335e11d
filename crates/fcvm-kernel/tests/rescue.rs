//! The emergency initramfs, booted with the packaged kernel in a real machine: QEMU's microVM, emulated.

mod common;

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use fcvm_kernel::install;

/// Far more than an emulated boot on a busy machine takes; only a hang reaches it.
const BOOT_TIMEOUT_S: &str = "180";

struct Machine {
    child: Child,
    input: ChildStdin,
    output: ChildStdout,
    said: String,
}

impl Machine {
    fn boot(kernel: &Path, initramfs: &Path) -> Option<Self> {
        let command_line = format!(
            "console=ttyS0 reboot=t panic=-1 quiet cryptomgr.notests fcvm.pool=tank{}",
            common::tsc()
        );
        let mut child = Command::new("timeout")
            .args([
                BOOT_TIMEOUT_S,
                "qemu-system-x86_64",
                "-nodefaults",
                "-no-user-config",
            ])
            .args([
                "-display",
                "none",
                "-no-reboot",
                "-accel",
                "tcg",
                "-cpu",
                "max",
            ])
            .args(["-m", "512M", "-machine", "microvm"])
            .args([
                "-chardev",
                "stdio,id=console,signal=off",
                "-serial",
                "chardev:console",
            ])
            .args(["-append", &command_line])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        Some(Self {
            input: child.stdin.take()?,
            output: child.stdout.take()?,
            child,
            said: String::new(),
        })
    }

    /// Reads until the machine has said `end`, or nothing more.
    fn until(&mut self, end: &str) {
        let from = self.said.len();
        let mut byte = [0];
        while !self.said[from..].contains(end) {
            match self.output.read(&mut byte) {
                Ok(1) => self.said.push(char::from(byte[0])),
                _ => panic!("the machine ended without '{end}': {}", self.said),
            }
        }
    }
}

#[test]
fn a_shell_with_the_systems_programs_comes_up() {
    let Some((directory, kernel)) = common::kernel() else {
        return;
    };
    if cfg!(not(target_arch = "x86_64")) {
        println!("skipped: the command line of this test is that of an x86-64 microVM");
        return;
    }
    // A program with libraries, which busybox does not have.
    let program = "factor".to_owned();
    let rescue = match install::rescue(Path::new("/"), std::slice::from_ref(&program)) {
        Ok(rescue) => rescue,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let path = directory.path().join("rescue.img");
    std::fs::write(&path, &rescue.bytes).unwrap();
    let Some(mut machine) = Machine::boot(&kernel.vmlinux, &path) else {
        println!("skipped: qemu-system-x86_64 is not installed");
        return;
    };
    machine.until("# ");
    for line in ["Nothing is mounted for writing.", "'reboot -f' restarts"] {
        assert!(machine.said.contains(line), "{}", machine.said);
    }
    // Neither it nor the packaged kernel has ZFS, and that is told in place of an import.
    let told = match rescue.missing.contains(&"zpool") {
        true => "There is no zpool here",
        false => "This kernel has no ZFS",
    };
    assert!(machine.said.contains(told), "{}", machine.said);
    // Its libraries are there.
    machine.input.write_all(b"factor 143\n").unwrap();
    machine.until("143: 11 13");
    machine.until("# ");
    // The shell may end, process 1 does not.
    machine.input.write_all(b"exit\n").unwrap();
    machine.until("# ");
    machine.input.write_all(b"reboot -f\n").unwrap();
    assert!(machine.child.wait().unwrap().success(), "{}", machine.said);
}

#[test]
fn a_system_without_the_programs_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let message = |additional: &[String]| {
        let error = install::rescue(root.path(), additional).unwrap_err();
        error.to_string()
    };
    assert!(message(&[]).contains("install busybox-static there"));
    std::fs::create_dir_all(root.path().join("bin")).unwrap();
    std::fs::write(root.path().join("bin/busybox"), "#!").unwrap();
    let rescue = install::rescue(root.path(), &[]).unwrap();
    assert_eq!(rescue.files, ["usr/bin/busybox"]);
    assert!(rescue.missing.contains(&"zpool"));
    assert!(message(&["nothing".to_owned()]).contains("no program 'nothing'"));
    assert!(message(&["../x".to_owned()]).contains("is no name of a program"));
    // A program whose library is not there, and a link that leads out of the root.
    std::fs::copy("/bin/ls", root.path().join("bin/ls")).unwrap();
    let told = message(&["ls".to_owned()]);
    assert!(
        told.contains("bin/ls needs") && told.contains("is not there"),
        "{told}"
    );
    std::os::unix::fs::symlink("/etc/passwd", root.path().join("bin/zpool")).unwrap();
    let rescue = install::rescue(root.path(), &[]).unwrap();
    assert!(rescue.missing.contains(&"zpool"));
}
