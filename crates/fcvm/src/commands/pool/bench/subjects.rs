//! What is measured: the pool, file systems that share blocks, overlays, copies. All are taken away at the end.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use anyhow::{Context as _, bail};
use blockpool::{FileDisk, Pool};
use rustix::fs::OFlags;
use tokio::signal::unix::{SignalKind, signal};

use super::super::mount::Mount;
use crate::context::Context;

const POOL_BYTES: u64 = 64 << 30;

/// Something that clones files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    /// By the library, in this process.
    Pool,
    /// By copy_file_range(2) in the mount.
    PoolMount,
    Xfs,
    Btrfs,
    Overlay,
    Copy,
}

impl Subject {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pool => "pool",
            Self::PoolMount => "pool, mounted",
            Self::Xfs => "XFS reflink",
            Self::Btrfs => "btrfs reflink",
            Self::Overlay => "qcow2 overlay",
            Self::Copy => "plain copy",
        }
    }

    /// Whether clones are of blocks, so that they can be timed against the size.
    pub(super) fn shares(self) -> bool {
        !matches!(self, Self::Overlay | Self::Copy)
    }
}

/// A mount that another process serves: one that served itself could not end while it waits for its own answers.
struct Served {
    directory: PathBuf,
    /// Where it is not the keeper of the mount that waits for it.
    server: Option<Child>,
}

/// A file system in a file.
struct Loop {
    subject: Subject,
    directory: PathBuf,
}

/// What has to be taken away, whether the bench ends or is interrupted.
#[derive(Default)]
struct Leftovers {
    helper: Option<PathBuf>,
    fuse: Vec<PathBuf>,
    loops: Vec<PathBuf>,
    home: PathBuf,
}

impl Leftovers {
    fn unmount(&mut self) {
        for directory in self.loops.drain(..) {
            let _ = Command::new("umount").arg("-l").arg(directory).status();
        }
        let Some(helper) = &self.helper else { return };
        for directory in self.fuse.drain(..) {
            let _ = blockpool_fuse::unmount(helper, &directory, true);
        }
    }
}

/// Nothing is half done under it when a thread panics.
fn lock(leftovers: &Mutex<Leftovers>) -> MutexGuard<'_, Leftovers> {
    leftovers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whoever interrupts the bench shall not have to unmount what it mounted.
fn watch_signals(leftovers: Arc<Mutex<Leftovers>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (ready, is_ready) = mpsc::channel();
    std::thread::spawn(move || {
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) = (
                signal(SignalKind::interrupt()),
                signal(SignalKind::terminate()),
            ) else {
                return;
            };
            let _ = ready.send(());
            let code = tokio::select! {
                _ = interrupt.recv() => 128 + 2,
                _ = terminate.recv() => 128 + 15,
            };
            // Held to the end: nothing is mounted any more.
            let mut leftovers = lock(&leftovers);
            leftovers.unmount();
            // Under another name, so that the bench finds nowhere to make more.
            let gone = leftovers.home.with_extension("gone");
            let _ = fs::rename(&leftovers.home, &gone);
            let _ = fs::remove_dir_all(gone);
            std::process::exit(code);
        });
    });
    is_ready.recv().context("cannot wait for signals")
}

/// All subjects.
pub(super) struct Lab {
    home: tempdir::Directory,
    leftovers: Arc<Mutex<Leftovers>>,
    helper: Option<PathBuf>,
    qemu_img: Option<PathBuf>,
    pool: Pool,
    mount: Option<Served>,
    bare: Option<Served>,
    loops: Vec<Loop>,
    left_out: Vec<String>,
}

/// A directory that goes with its owner.
mod tempdir {
    use std::path::{Path, PathBuf};

    pub(in super::super) struct Directory(PathBuf);

    impl Directory {
        pub(in super::super) fn new(parent: &Path) -> std::io::Result<Self> {
            let path = parent.join(format!("fcvm-pool-bench-{}", std::process::id()));
            std::fs::create_dir_all(&path)?;
            Ok(Self(path))
        }

        pub(in super::super) fn path(&self) -> &Path {
            &self.0
        }

        pub(in super::super) fn join(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

pub(super) fn open_direct(path: &Path) -> anyhow::Result<File> {
    let direct = OFlags::DIRECT.bits() as i32;
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
    };
    match open(direct) {
        Ok(file) => Ok(file),
        // A file system that has no direct I/O.
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => Ok(open(0)?),
        Err(error) => Err(error).with_context(|| format!("cannot open {}", path.display())),
    }
}

fn tool(program: &Path, arguments: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed: {}", program.display(), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Fills a file with bytes that are no zeros.
fn fill(path: &Path, size_bytes: u64) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let bytes = vec![0x5a; 1 << 20];
    let mut at = 0;
    while at < size_bytes {
        let length = (size_bytes - at).min(1 << 20) as usize;
        file.write_all_at(&bytes[..length], at)?;
        at += length as u64;
    }
    Ok(file.sync_all()?)
}

impl Lab {
    pub(super) fn new(context: &Context, parent: &Path, size_bytes: u64) -> anyhow::Result<Self> {
        let home = tempdir::Directory::new(parent)
            .with_context(|| format!("cannot use {}", parent.display()))?;
        let leftovers = Arc::new(Mutex::new(Leftovers {
            helper: context.find_program("fusermount3"),
            home: home.path().to_owned(),
            ..Leftovers::default()
        }));
        watch_signals(Arc::clone(&leftovers))?;
        let disk = FileDisk::create(&home.join("pool.img"), POOL_BYTES)?;
        let pool = Pool::create(Arc::new(disk), POOL_BYTES, [1; 16])?;
        pool.create_dataset(&"set".parse()?)?;
        let mut lab = Self {
            helper: context.find_program("fusermount3"),
            qemu_img: context.find_program("qemu-img"),
            home,
            leftovers,
            pool,
            mount: None,
            bare: None,
            loops: Vec::new(),
            left_out: Vec::new(),
        };
        fs::create_dir(lab.home.join("plain"))?;
        fill(&lab.home.join("plain/base"), size_bytes)?;
        fill(&lab.raw(), size_bytes)?;
        lab.mount_both(context)?;
        for subject in [Subject::Xfs, Subject::Btrfs] {
            if let Err(error) = lab.mount_loop(context, subject, size_bytes) {
                lab.left_out.push(format!("{}: {error}", subject.name()));
            }
        }
        if lab.qemu_img.is_none() {
            lab.left_out
                .push("qcow2 overlay: qemu-img is missing".to_owned());
        }
        for subject in lab.subjects() {
            let base = lab.path(subject, "base");
            if subject != Subject::Pool && !base.exists() {
                fill(&base, size_bytes)?;
            }
        }
        let base = lab.pool.create_object(&"set/base".parse()?, size_bytes)?;
        let bytes = vec![0x5a; 1 << 20];
        for at in (0..size_bytes).step_by(bytes.len()) {
            let length = (size_bytes - at).min(bytes.len() as u64) as usize;
            base.write_at(&bytes[..length], at)?;
        }
        lab.pool.checkpoint()?;
        Ok(lab)
    }

    /// Mounts something. An interruption comes before it or when it is noted.
    fn mounts<T>(
        &self,
        mount: impl FnOnce(&mut Leftovers) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        mount(&mut lock(&self.leftovers))
    }

    fn mount_both(&mut self, context: &Context) -> anyhow::Result<()> {
        let Some(helper) = self.helper.clone() else {
            bail!("fusermount3 is missing: install the package fuse3");
        };
        let mounted_pool = self.home.join("mounted.img");
        Pool::create(
            Arc::new(FileDisk::create(&mounted_pool, POOL_BYTES)?),
            POOL_BYTES,
            [3; 16],
        )?;
        let directory = self.home.join("mnt");
        let context = Context {
            data_dir: self.home.join("data"),
            ..context.clone()
        };
        // As every other file system here: what is written goes to it at once.
        self.mounts(|leftovers| {
            leftovers.fuse.push(directory.clone());
            Mount::new(&mounted_pool, &directory, true)?.start(&context)
        })?;
        fs::create_dir(directory.join("set"))?;
        self.mount = Some(Served {
            directory,
            server: None,
        });
        let directory = self.home.join("bare");
        fs::create_dir(&directory)?;
        let device = self.mounts(|leftovers| {
            leftovers.fuse.push(directory.clone());
            Ok(blockpool_fuse::mount(
                &helper,
                "fcvm-bare-bench",
                &directory,
            )?)
        })?;
        let server = Command::new("/proc/self/exe")
            .args(["pool", "serve-bare", "--pool"])
            .arg(self.raw())
            .stdin(device)
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start the server of the bare mount")?;
        self.bare = Some(Served {
            directory,
            server: Some(server),
        });
        Ok(())
    }

    fn mount_loop(
        &mut self,
        context: &Context,
        subject: Subject,
        size_bytes: u64,
    ) -> anyhow::Result<()> {
        if !rustix::process::geteuid().is_root() {
            bail!("only root can mount it");
        }
        let kind = match subject {
            Subject::Xfs => "xfs",
            _ => "btrfs",
        };
        let Some(mkfs) = context.find_program(&format!("mkfs.{kind}")) else {
            bail!("mkfs.{kind} is missing");
        };
        let image = self.home.join(&format!("{kind}.img"));
        File::create(&image)?.set_len(8 * size_bytes + (4 << 30))?;
        let image = image.to_str().context("a path that is no text")?.to_owned();
        tool(&mkfs, &["-q", &image])?;
        let directory = self.home.join(kind);
        fs::create_dir(&directory)?;
        let place = directory.to_str().context("a path that is no text")?;
        self.mounts(|leftovers| {
            tool(Path::new("mount"), &["-o", "loop", &image, place])?;
            leftovers.loops.push(directory.clone());
            Ok(())
        })?;
        self.loops.push(Loop { subject, directory });
        Ok(())
    }

    pub(super) fn subjects(&self) -> Vec<Subject> {
        let mut subjects = vec![Subject::Pool, Subject::PoolMount];
        subjects.extend(self.loops.iter().map(|found| found.subject));
        subjects.extend(self.qemu_img.is_some().then_some(Subject::Overlay));
        subjects.push(Subject::Copy);
        subjects
    }

    pub(super) fn left_out(&self) -> &[String] {
        &self.left_out
    }

    pub(super) fn has_mount(&self) -> bool {
        self.mount.is_some()
    }

    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn raw(&self) -> PathBuf {
        self.home.join("raw")
    }

    pub(super) fn bare(&self) -> Option<PathBuf> {
        self.bare.as_ref().map(|bare| bare.directory.join("file"))
    }

    fn path(&self, subject: Subject, name: &str) -> PathBuf {
        match subject {
            Subject::Pool | Subject::PoolMount => self.home.join("mnt/set").join(name),
            Subject::Overlay | Subject::Copy => self.home.join("plain").join(name),
            Subject::Xfs | Subject::Btrfs => {
                let found = self.loops.iter().find(|found| found.subject == subject);
                found.map_or_else(PathBuf::new, |found| found.directory.join(name))
            }
        }
    }

    /// Clones a file; returns the new one's path.
    pub(super) fn clone(
        &self,
        subject: Subject,
        source: &str,
        target: &str,
    ) -> anyhow::Result<PathBuf> {
        let (from, to) = (self.path(subject, source), self.path(subject, target));
        match subject {
            Subject::Pool => {
                let name = |name: &str| format!("set/{name}").parse();
                self.pool.clone_object(&name(source)?, &name(target)?)?;
            }
            Subject::PoolMount => {
                let (from, to) = (File::open(from)?, File::create_new(&to)?);
                let length = from.metadata()?.len();
                let (mut at, mut into) = (0, 0);
                while at < length {
                    let left = usize::try_from(length - at)?;
                    let (at, into) = (Some(&mut at), Some(&mut into));
                    if rustix::fs::copy_file_range(&from, at, &to, into, left)? == 0 {
                        bail!("the source became shorter");
                    }
                }
            }
            Subject::Xfs | Subject::Btrfs => {
                rustix::fs::ioctl_ficlone(File::create_new(&to)?, File::open(from)?)?;
            }
            Subject::Overlay => {
                let Some(qemu_img) = &self.qemu_img else {
                    bail!("qemu-img is missing")
                };
                let format = if source == "base" { "raw" } else { "qcow2" };
                let [from, to] = [&from, &to].map(|path| path.to_string_lossy().into_owned());
                tool(
                    qemu_img,
                    &[
                        "create", "-q", "-f", "qcow2", "-b", &from, "-F", format, &to,
                    ],
                )?;
            }
            Subject::Copy => {
                fs::copy(from, &to)?;
            }
        }
        Ok(to)
    }

    /// Writes through QEMU's block layer, at even distances in place of random ones; how many a second.
    pub(super) fn overlay_writes(&self, offsets: &[u64]) -> anyhow::Result<f64> {
        let Some(qemu_img) = &self.qemu_img else {
            bail!("qemu-img is missing")
        };
        let path = self
            .path(Subject::Overlay, "clone")
            .to_string_lossy()
            .into_owned();
        let count = offsets.len().to_string();
        // A little more than a mebibyte: every cluster once, then the next block of each.
        let arguments = [
            "bench", "-w", "-d", "8", "-s", "4096", "-S", "1052672", "-c", &count,
        ];
        let arguments = [&arguments[..], &["-t", "none", "-f", "qcow2", &path]].concat();
        let said = tool(qemu_img, &arguments)?;
        let spent = said
            .split("completed in ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let spent_s: f64 = spent.context("qemu-img bench says no time")?.parse()?;
        Ok(offsets.len() as f64 / spent_s)
    }

    /// A file of so many written blocks, at even distances.
    pub(super) fn make_sparse(
        &self,
        subject: Subject,
        name: &str,
        size_bytes: u64,
        extents: u64,
    ) -> anyhow::Result<()> {
        if subject == Subject::Pool {
            let object = self
                .pool
                .create_object(&format!("set/{name}").parse()?, size_bytes)?;
            for index in 0..extents {
                object.write_at(&[7; 4096], index * (size_bytes / extents))?;
            }
            return Ok(self.pool.flush()?);
        }
        let file = File::create_new(self.path(subject, name))?;
        file.set_len(size_bytes)?;
        for index in 0..extents {
            file.write_all_at(&[7; 4096], index * (size_bytes / extents))?;
        }
        Ok(file.sync_all()?)
    }

    pub(super) fn remove(&self, subject: Subject, name: &str) -> anyhow::Result<()> {
        if subject == Subject::Pool {
            self.pool.destroy(&format!("set/{name}").parse()?, false)?;
        } else {
            fs::remove_file(self.path(subject, name))?;
        }
        Ok(())
    }

    /// Opens a pool with an object of 100 GiB, a block in each MiB, whose last writes are only in the log.
    pub(super) fn open_after_crash(&self) -> anyhow::Result<f64> {
        let path = self.home.join("crashed.img");
        let pool = Pool::create(
            Arc::new(FileDisk::create(&path, POOL_BYTES)?),
            POOL_BYTES,
            [2; 16],
        )?;
        pool.create_dataset(&"set".parse()?)?;
        let object = pool.create_object(&"set/large".parse()?, 100 << 30)?;
        for index in 0..100 << 10 {
            object.write_at(&[7; 4096], index << 20)?;
            if index % 10_000 == 9_999 {
                pool.checkpoint()?;
            }
        }
        pool.flush()?;
        drop((object, pool));
        let begin = Instant::now();
        let pool = Pool::open(Arc::new(FileDisk::open(&path)?))?;
        let open_s = begin.elapsed().as_secs_f64();
        drop(pool);
        fs::remove_file(path)?;
        Ok(open_s)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        lock(&self.leftovers).unmount();
        for served in [&mut self.mount, &mut self.bare].into_iter().flatten() {
            if let Some(server) = &mut served.server {
                let _ = server.wait();
            }
        }
    }
}
