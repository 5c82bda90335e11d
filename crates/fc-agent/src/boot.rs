//! What is needed before the host can be spoken to: kernel file systems, modules, the agent's own
//! root directory.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};

use fcvm_wire::Failure;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use crate::console;
use crate::failure::{Context, reason};

/// Where the agent's own root is assembled before it becomes "/".
const BASE: &str = "/base";
/// Descriptors that the agent may have open.
const MAX_DESCRIPTORS: u64 = 4096;
/// Directories of the agent's own root.
const DIRECTORIES: [&str; 8] = [
    "proc",
    "sys",
    "dev",
    "cgroup",
    "files",
    "image",
    "scratch",
    "container",
];
/// Restricts what the containers' own files (hosts, resolv.conf, ...) and a read-only container's mount
/// points can take of the guest's memory.
const BASE_OPTIONS: &CStr = c"mode=755,size=4m";

/// Makes the agent safe from being looked into and from being chosen when memory runs out.
pub(crate) fn harden() {
    // A process that the agent starts shares its memory until it executes the workload's program;
    // processes of the container must not be able to attach to it in that time.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    // A clone is made a guest of its own by the agent: nothing else should run before.
    let _ = crate::sys::run_first();
    // Each of the streams takes up to four descriptors.
    let limit = Rlimit {
        current: Some(MAX_DESCRIPTORS),
        maximum: Some(MAX_DESCRIPTORS),
    };
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Mounts the kernel's file systems in a root of the agent's own and makes that "/".
///
/// The initramfs itself cannot be left by pivot_root(2), but a tmpfs on top of it can; so the
/// container's namespace will hold nothing of the agent's.
pub(crate) fn make_root() -> Result<(), Failure> {
    make_directory(BASE)?;
    mount(
        "tmpfs",
        BASE,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        BASE_OPTIONS,
    )
    .context("mounting a tmpfs")?;
    rustix::process::chdir(BASE).context("entering the agent's root")?;
    for directory in DIRECTORIES {
        make_directory(directory)?;
    }
    let closed = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("proc", "proc", "proc", closed, None).context("mounting /proc")?;
    mount("sysfs", "sys", "sysfs", closed, None).context("mounting /sys")?;
    let devices = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("devtmpfs", "dev", "devtmpfs", devices, None).context("mounting /dev")?;
    Ok(())
}

/// Enters the root that [`make_root`] assembled; the initramfs is out of sight from then on.
pub(crate) fn enter_root() -> Result<(), Failure> {
    mount_move(BASE, "/").context("moving the agent's root")?;
    rustix::process::chroot(".").context("entering the agent's root")
}

fn make_directory(path: &str) -> Result<(), Failure> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno).context(&format!("making the directory {path}")),
    }
}

/// Last bytes of a signed module, before them a record whose last four bytes are the signature's
/// length (kernel: include/linux/module_signature.h).
const SIGNATURE_MARK: &[u8] = b"~Module signature appended~\n";
const SIGNATURE_RECORD_BYTES: usize = 12;

/// Parameters of modules, by file name.
///
/// As many requests of a disk are under way as the host works on at a time (QEMU: the 64 threads that
/// serve its files); the kernel's default, 256, takes four times the memory and the time to set up.
const PARAMETERS: [(&str, &CStr); 1] = [("virtio_blk.ko", c"queue_depth=64")];

/// Loads the modules named in /modules/list, in its order, and frees their memory in the
/// initramfs. A module that does not load is told on the console; what needs it fails later.
pub(crate) fn load_modules() {
    let Ok(list) = fs::read_to_string("/modules/list") else {
        return;
    };
    // The host made the initramfs and could replace the kernel as well: where the kernel does not
    // insist on signatures, checking them is a third of the time from boot to container.
    let enforced = fs::read_to_string("sys/module/module/parameters/sig_enforce")
        .is_ok_and(|text| text.starts_with('Y'));
    for name in list.lines().map(str::trim).filter(|name| !name.is_empty()) {
        let path = format!("/modules/{name}");
        let parameters = PARAMETERS.iter().find(|(module, _)| *module == name);
        let parameters = parameters.map_or(c"", |(_, parameters)| parameters);
        match load_module(&path, parameters, !enforced) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                console::line(&format!(
                    "the kernel module {name} cannot be loaded: {}",
                    reason(errno)
                ));
            }
        }
        let _ = fs::remove_file(&path);
    }
}

fn load_module(path: &str, parameters: &CStr, unsigned: bool) -> io::Result<()> {
    if unsigned {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        drop_signature(&mut file)?;
    }
    // The kernel takes no file that is open for writing.
    rustix::system::finit_module(File::open(path)?, parameters, 0)?;
    Ok(())
}

/// Cuts a module's signature off, where it has one.
fn drop_signature(file: &mut File) -> io::Result<()> {
    const TAIL_BYTES: usize = SIGNATURE_RECORD_BYTES + SIGNATURE_MARK.len();
    let size = file.seek(SeekFrom::End(0))?;
    let Some(record) = size.checked_sub(TAIL_BYTES as u64) else {
        return Ok(());
    };
    let mut tail = [0; TAIL_BYTES];
    file.seek(SeekFrom::Start(record))?;
    file.read_exact(&mut tail)?;
    let (fields, mark) = tail.split_at(SIGNATURE_RECORD_BYTES);
    let Some(length) = fields.last_chunk().filter(|_| mark == SIGNATURE_MARK) else {
        return Ok(());
    };
    match record.checked_sub(u64::from(u32::from_be_bytes(*length))) {
        Some(end) => file.set_len(end),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn without_signature(content: &[u8]) -> Vec<u8> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        drop_signature(&mut file).unwrap();
        let mut left = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut left).unwrap();
        left
    }

    #[test]
    fn a_signature_is_cut_off() {
        let mut module = b"module".to_vec();
        module.extend_from_slice(b"signature");
        module.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        module.extend_from_slice(SIGNATURE_MARK);
        assert_eq!(without_signature(&module), b"module");
    }

    #[test]
    fn other_files_are_left_alone() {
        let short = b"short".to_vec();
        assert_eq!(without_signature(&short), short);
        let unsigned = vec![7; 500];
        assert_eq!(without_signature(&unsigned), unsigned);
        let mut lying = vec![0xff; SIGNATURE_RECORD_BYTES];
        lying.extend_from_slice(SIGNATURE_MARK);
        assert_eq!(without_signature(&lying), lying);
    }
}
