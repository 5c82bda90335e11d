//! A real guest for the tests: kernel, initramfs with the agent, disks, QEMU.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use tempfile::TempDir;

/// What the tests need of the machine.
pub(crate) struct Tools {
    kernel: PathBuf,
    modules: PathBuf,
    agent: PathBuf,
    image: PathBuf,
    tsc_khz: u64,
    _directory: TempDir,
}

impl Tools {
    /// Size of the agent's file.
    pub(crate) fn agent_bytes(&self) -> u64 {
        fs::metadata(&self.agent).unwrap().len()
    }
}

fn on_path(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok()
}

/// The tools; the reason is printed where they are absent.
pub(crate) fn tools() -> Option<&'static Tools> {
    static TOOLS: OnceLock<Result<Tools, String>> = OnceLock::new();
    match TOOLS.get_or_init(find_tools) {
        Ok(tools) => Some(tools),
        Err(reason) => {
            println!("skipped: {reason}");
            None
        }
    }
}

fn find_tools() -> Result<Tools, String> {
    let kernel = std::env::var_os("FCVM_TEST_KERNEL_DIR")
        .map(PathBuf::from)
        .ok_or(
            "FCVM_TEST_KERNEL_DIR names no directory with vmlinux, modules/list and modules/*.ko",
        )?;
    for program in ["qemu-system-x86_64", "mkfs.erofs", "mkfs.ext4", "busybox"] {
        if !on_path(program) {
            return Err(format!("{program} is not installed"));
        }
    }
    let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
    Ok(Tools {
        modules: kernel.join("modules"),
        kernel: kernel.join("vmlinux"),
        agent: build_agent(),
        image: make_image(directory.path()),
        tsc_khz: measure_tsc_khz(),
        _directory: directory,
    })
}

/// The agent as the product builds it: static.
fn build_agent() -> PathBuf {
    if let Some(agent) = std::env::var_os("FCVM_TEST_AGENT") {
        return agent.into();
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let status = Command::new(env!("CARGO"))
        .args(["build", "-q", "--profile", "agent", "-p", "fc-agent"])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .current_dir(&workspace)
        .status()
        .unwrap();
    assert!(status.success(), "the agent does not build");
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), PathBuf::from);
    target.join("x86_64-unknown-linux-gnu/agent/fc-agent")
}

/// The guest's time stamp counter is the host's under TCG, and calibrating it there can take forever.
fn measure_tsc_khz() -> u64 {
    // SAFETY: every x86-64 processor has the instruction.
    let read = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, began) = (read(), std::time::Instant::now());
    std::thread::sleep(Duration::from_millis(50));
    let (end, took) = (read(), began.elapsed());
    u64::try_from(u128::from(end - start) * 1_000_000 / took.as_nanos()).unwrap()
}

/// A root image: busybox, some users, and what the tests run.
fn make_image(directory: &Path) -> PathBuf {
    let root = directory.join("root");
    for path in ["bin", "etc", "home/app", "data/empty", "usr/bin"] {
        fs::create_dir_all(root.join(path)).unwrap();
    }
    let found = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .unwrap();
    fs::copy(found, root.join("bin/busybox")).unwrap();
    let list = Command::new(found).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines() {
        if applet != "busybox" {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
    }
    let write = |path: &str, text: &str| fs::write(root.join(path), text).unwrap();
    write(
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n",
    );
    write(
        "etc/group",
        "root:x:0:\napp:x:1000:\naudio:x:29:app\ntty:x:5:\n",
    );
    write("etc/hosts", "from the image\n");
    write("data/hello", "hello\n");
    write("data/text", "no program\n");
    std::os::unix::fs::symlink("hello", root.join("data/link")).unwrap();
    std::os::unix::fs::symlink("/nowhere/resolv.conf", root.join("etc/resolv.conf")).unwrap();
    let image = directory.join("root.erofs");
    let output = Command::new("mkfs.erofs")
        .args(["--all-root", "-Eforce-inode-extended"])
        .arg(&image)
        .arg(&root)
        .output()
        .unwrap();
    assert!(output.status.success(), "mkfs.erofs: {output:?}");
    image
}

fn cpio_entry(out: &mut Vec<u8>, inode: u32, name: &str, mode: u32, content: &[u8]) {
    let fields = [
        inode,
        mode,
        0,
        0,
        1,
        0,
        u32::try_from(content.len()).unwrap(),
        0,
        0,
        0,
        0,
        u32::try_from(name.len() + 1).unwrap(),
        0,
    ];
    out.extend_from_slice(b"070701");
    for field in fields {
        write!(out, "{field:08x}").unwrap();
    }
    out.extend_from_slice(name.as_bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn make_initramfs(tools: &Tools, path: &Path) {
    let mut cpio = Vec::new();
    cpio_entry(
        &mut cpio,
        1,
        "init",
        0o100_755,
        &fs::read(&tools.agent).unwrap(),
    );
    cpio_entry(&mut cpio, 2, "modules", 0o040_755, b"");
    let list = fs::read_to_string(tools.modules.join("list")).unwrap();
    cpio_entry(&mut cpio, 3, "modules/list", 0o100_644, list.as_bytes());
    for (inode, name) in (4..).zip(list.lines()) {
        let module = fs::read(tools.modules.join(name)).unwrap();
        cpio_entry(
            &mut cpio,
            inode,
            &format!("modules/{name}"),
            0o100_644,
            &module,
        );
    }
    cpio_entry(&mut cpio, 0, "TRAILER!!!", 0, b"");
    fs::write(path, cpio).unwrap();
}

/// A running guest; killed when dropped.
pub(crate) struct Guest {
    /// QEMU.
    pub(crate) qemu: Child,
    listener: UnixListener,
    directory: TempDir,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() {
            eprintln!("console of the guest:\n{}", self.console());
        }
    }
}

impl Guest {
    /// Boots a guest and gives the host's end of the agent's port.
    pub(crate) fn boot(tools: &Tools) -> (Self, UnixStream) {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        make_initramfs(tools, &path("initramfs"));
        let scratch = File::create(path("scratch")).unwrap();
        scratch.set_len(512 << 20).unwrap();
        let output = Command::new("mkfs.ext4")
            .args(["-q", "-F"])
            .arg(path("scratch"))
            .output()
            .unwrap();
        assert!(output.status.success(), "mkfs.ext4: {output:?}");
        let listener = UnixListener::bind(path("agent.sock")).unwrap();
        let qemu = Self::start(tools, directory.path());
        let guest = Self {
            qemu,
            listener,
            directory,
        };
        let stream = guest.connected();
        (guest, stream)
    }

    /// The host's end of the agent's port: QEMU connects again when it was closed.
    pub(crate) fn connected(&self) -> UnixStream {
        self.listener.accept().unwrap().0
    }

    fn start(tools: &Tools, directory: &Path) -> Child {
        let file = |name: &str| directory.join(name).display().to_string();
        let append = format!(
            "console=ttyS0 reboot=t panic=-1 quiet tsc_early_khz={} tsc=reliable cryptomgr.notests {}",
            tools.tsc_khz,
            std::env::var("FCVM_TEST_APPEND").unwrap_or_default(),
        );
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(
                "-nodefaults -no-user-config -display none -no-reboot -cpu max -accel tcg"
                    .split(' '),
            )
            .args(
                "-m 256M -smp 1 -machine microvm -global virtio-mmio.force-legacy=false".split(' '),
            )
            .args(["-chardev", &format!("file,id=con,path={}", file("console"))])
            .args([
                "-serial",
                "chardev:con",
                "-device",
                "virtio-serial-device,id=vs0",
            ])
            .args([
                "-chardev",
                &format!("socket,id=c0,path={},reconnect=1", file("agent.sock")),
            ])
            .args([
                "-device",
                "virtserialport,chardev=c0,name=fcvm.agent.0,nr=1",
            ])
            .args([
                "-blockdev",
                &format!(
                    "driver=file,node-name=root,read-only=on,filename={}",
                    tools.image.display()
                ),
            ])
            .args(["-device", "virtio-blk-device,drive=root,serial=fcvm-root"])
            .args([
                "-blockdev",
                &format!("driver=file,node-name=scratch,filename={}", file("scratch")),
            ])
            .args([
                "-device",
                "virtio-blk-device,drive=scratch,serial=fcvm-scratch",
            ])
            .args([
                "-netdev",
                "user,id=n0",
                "-device",
                "virtio-net-device,netdev=n0",
            ])
            .arg("-kernel")
            .arg(&tools.kernel)
            .args(["-initrd", &file("initramfs"), "-append", &append])
            .stdin(Stdio::null());
        command.spawn().unwrap()
    }

    /// What the guest wrote to its console.
    pub(crate) fn console(&self) -> String {
        let bytes = fs::read(self.directory.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The disk of the writable layer.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.directory.path().join("scratch")
    }
}
