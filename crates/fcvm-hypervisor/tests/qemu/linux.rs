//! A real Linux guest whose first process is a shell on the agent channel.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// After so long a test fails rather than hangs: far more than a loaded host needs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Loads the modules in order and runs what comes over the port, line by line; a line of its own
/// tells the end of each answer.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read module; do insmod /modules/$module; done < /modules/list
disk() { for name in /sys/block/vd*; do [ "$(cat $name/serial)" = $1 ] && echo /dev/${name##*/}; done; }
port=$(grep -l fcvm.agent.0 /sys/class/virtio-ports/*/name)
port=${port%/name}
exec 3<>/dev/${port##*/}
echo "-- up" >&3
while read -r line <&3; do eval "$line" >&3 2>&1; echo "-- $?" >&3; done
"#;

/// The guest's kernel and its initial RAM disk.
pub(crate) struct Linux {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
}

impl Linux {
    /// Makes the initial RAM disk in `directory`; says that the test is skipped where something for
    /// it is missing.
    pub(crate) fn prepare(directory: &Path) -> Option<Self> {
        let skip = |reason: &str| println!("skipped: {reason}");
        let Some(kernel) = std::env::var_os("FCVM_TEST_KERNEL_DIR").map(PathBuf::from) else {
            skip("FCVM_TEST_KERNEL_DIR names no directory with vmlinux and modules/list");
            return None;
        };
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new);
        let Some(busybox) = busybox.into_iter().find(|path| path.exists()) else {
            skip("busybox is not installed");
            return None;
        };
        let root = directory.join("initramfs.d");
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::create_dir_all(root.join("modules")).unwrap();
        std::fs::copy(busybox, root.join("bin/busybox")).unwrap();
        for entry in kernel.join("modules").read_dir().unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, root.join("modules").join(path.file_name().unwrap())).unwrap();
        }
        let init = root.join("init");
        std::fs::write(&init, INIT).unwrap();
        std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755)).unwrap();
        let initramfs = directory.join("initramfs");
        let packed = Command::new("sh")
            .args(["-c", "find . | cpio --quiet -o -H newc > \"$1\"", "sh"])
            .arg(&initramfs)
            .current_dir(&root)
            .stdin(Stdio::null())
            .status()
            .unwrap();
        if !packed.success() {
            skip("cpio is not installed");
            return None;
        }
        Some(Self {
            kernel: kernel.join("vmlinux"),
            initramfs,
        })
    }
}

/// The shell in the guest.
pub(crate) struct Shell(BufReader<UnixStream>);

impl Shell {
    /// Waits until the guest is up.
    pub(crate) async fn connect(agent: UnixStream) -> Self {
        let mut shell = Self(BufReader::new(agent));
        assert_eq!(shell.answer().await, ("up".to_owned(), String::new()));
        shell
    }

    /// The shell of a clone, which waits for a line.
    pub(crate) fn of_clone(agent: UnixStream) -> Self {
        Self(BufReader::new(agent))
    }

    /// Runs a line of shell and returns what it printed.
    ///
    /// # Panics
    ///
    /// It failed, or does not end.
    pub(crate) async fn run(&mut self, line: &str) -> String {
        self.send(line).await;
        let (status, text) = self.answer().await;
        assert_eq!(status, "0", "{line}: {text}");
        text.trim().to_owned()
    }

    /// Starts a line of shell; [`answer`](Self::answer) gives its exit code and what it printed.
    pub(crate) async fn send(&mut self, line: &str) {
        let line = format!("{line}\n");
        self.0.get_mut().write_all(line.as_bytes()).await.unwrap();
    }

    pub(crate) async fn answer(&mut self) -> (String, String) {
        let mut text = String::new();
        loop {
            let mut line = String::new();
            let read = tokio::time::timeout(PATIENCE, self.0.read_line(&mut line)).await;
            let length = read.expect("the guest answers").unwrap();
            assert!(length > 0, "the agent channel has ended after: {text}");
            if let Some(status) = line.strip_prefix("-- ") {
                return (status.trim().to_owned(), text);
            }
            text.push_str(&line);
        }
    }
}
