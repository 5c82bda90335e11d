//! `fcvm pool mount` and `unmount`: the processes behind a mounted pool.
//!
//! Two of them. The keeper holds the kernel's side of the mount and the journal, and does nothing else that could fail; it
//! starts the server, which opens the pool and answers. When the server is killed the keeper starts another, which
//! takes over: files that are open stay open, and nothing that was answered is undone.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use blockpool::{FileDisk, Journal, Pool, PoolError};
use blockpool_fuse::Options;
use rustix::fs::{MemfdFlags, Mode, OFlags};

use crate::args::pool::MountCommand;
use crate::context::{Context, create_private_dir};
use crate::errors::EXIT_FCVM_FAILED;
use crate::logging::ProcessLog;

/// What a keeper writes when the mount answers.
const READY: &str = "ready";
/// Servers that may be killed within [`RESTART_PERIOD`] before the keeper gives up.
const RESTARTS_MAX: usize = 5;
const RESTART_PERIOD: Duration = Duration::from_secs(60);
/// How long `unmount` waits for the end of the server, which writes a checkpoint.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(60);
/// Threads of a server. They wait for the disk more than they work.
const THREAD_COUNT: usize = 8;

/// Runs a verb that has to do with mounts.
pub(super) fn run(context: &Context, pool: &Path, command: MountCommand) -> anyhow::Result<u8> {
    match command {
        MountCommand::Mount {
            directory,
            foreground,
            write_through,
        } => Mount::new(pool, &directory, write_through)?.run(context, foreground),
        MountCommand::Unmount { directory } => unmount(context, &directory),
        MountCommand::Bench(arguments) => super::bench::run(context, &arguments),
        MountCommand::KeepMount {
            directory,
            write_through,
        } => Mount::new(pool, &directory, write_through)?.keeper(context),
        MountCommand::ServeMount {
            takeover,
            write_through,
        } => server(pool, takeover, write_through),
        MountCommand::ServeBare => bare_server(pool),
    }
}

/// What is mounted where.
#[derive(Debug, Clone)]
pub(crate) struct Mount {
    pool: PathBuf,
    directory: PathBuf,
    /// The kernel gathers no writes.
    is_write_through: bool,
}

impl Mount {
    /// A pool and the directory to mount it on.
    pub(crate) fn new(
        pool: &Path,
        directory: &Path,
        is_write_through: bool,
    ) -> anyhow::Result<Self> {
        let directory = std::path::absolute(directory)?;
        Ok(Self {
            pool: std::path::absolute(pool)?,
            // Without a slash at the end, as the table of mounts has it.
            directory: directory.components().collect(),
            is_write_through,
        })
    }

    /// `fcvm pool mount`.
    pub(crate) fn run(&self, context: &Context, in_foreground: bool) -> anyhow::Result<u8> {
        if !self.pool.exists() {
            bail!(
                "there is no pool {}; make one with 'fcvm pool create --size SIZE'",
                self.pool.display()
            );
        }
        if in_foreground {
            prepare_directory(&self.directory)?;
            return self.keep(context, None);
        }
        self.start(context)?;
        println!("{}", self.directory.display());
        Ok(crate::EXIT_SUCCESS)
    }

    /// Mounts, on a directory which is made if need be; returns when the mount answers.
    pub(crate) fn start(&self, context: &Context) -> anyhow::Result<()> {
        prepare_directory(&self.directory)?;
        let directory = context.data_dir.join("pool");
        create_private_dir(&directory)?;
        let log = ProcessLog::open(directory.join("mount.log"))?;
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut keeper = Command::new(program)
            .arg("--data-dir")
            .arg(&context.data_dir)
            .args(["pool", "keep-mount", "--pool"])
            .arg(&self.pool)
            .args(self.is_write_through.then_some("--write-through"))
            .arg(&self.directory)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.file()?)
            .spawn()
            .context("cannot start the process that keeps the mount")?;
        let mut said = String::new();
        if let Some(output) = keeper.stdout.take() {
            BufReader::new(output)
                .read_line(&mut said)
                .context("cannot read what the keeper of the mount says")?;
        }
        if said.trim() == READY {
            return Ok(());
        }
        let _ = keeper.wait();
        bail!("{}", log.last_line());
    }

    /// `fcvm pool keep-mount`: the keeper that [`start`](Self::start) starts.
    pub(crate) fn keeper(&self, context: &Context) -> anyhow::Result<u8> {
        let report = crate::commands::run::leave_command()?;
        self.keep(context, Some(report))
    }

    /// Mounts, and has a server until it is unmounted.
    fn keep(&self, context: &Context, report: Option<File>) -> anyhow::Result<u8> {
        let Some(helper) = context.find_program("fusermount3") else {
            bail!("fusermount3 is missing: install the package fuse3");
        };
        let directory = &self.directory;
        let device = blockpool_fuse::mount(&helper, &self.pool.to_string_lossy(), directory)?;
        let journal = rustix::fs::memfd_create("fcvm-pool-journal", MemfdFlags::CLOEXEC)
            .context("cannot make the journal")?;
        watch_signals(helper.clone(), directory.clone());
        // Of the mount itself: by its path, what is under it would answer once it is unmounted.
        let mounted = rustix::fs::open(
            directory,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .with_context(|| format!("cannot open {}", directory.display()))?;
        let mut server = self.start_server(&device, &journal, false)?;
        std::thread::spawn(move || {
            // Answered by the server, or never.
            let answer = rustix::fs::fstatvfs(&mounted);
            // No longer in use by the keeper, or it could not be unmounted.
            drop(mounted);
            if answer.is_ok() {
                report.map(|mut report| report.write_all(format!("{READY}\n").as_bytes()));
            }
        });
        let mut killed: Vec<Instant> = Vec::new();
        loop {
            let status = server.wait().context("cannot wait for the server")?;
            if status.success() {
                return Ok(crate::EXIT_SUCCESS);
            }
            killed.retain(|at| at.elapsed() < RESTART_PERIOD);
            killed.push(Instant::now());
            if status.code().is_some() || killed.len() > RESTARTS_MAX {
                give_up(&helper, directory, status);
                return Ok(EXIT_FCVM_FAILED);
            }
            tracing::warn!(
                "the server of {} ended ({status}): another takes over",
                directory.display()
            );
            server = self.start_server(&device, &journal, true)?;
        }
    }

    fn start_server(
        &self,
        device: &OwnedFd,
        journal: &OwnedFd,
        is_takeover: bool,
    ) -> anyhow::Result<Child> {
        Command::new("/proc/self/exe")
            .args(["pool", "serve-mount", "--pool"])
            .arg(&self.pool)
            .args(is_takeover.then_some("--takeover"))
            .args(self.is_write_through.then_some("--write-through"))
            .stdin(device.try_clone()?)
            .stdout(journal.try_clone()?)
            // What interrupts the keeper is for it to handle.
            .process_group(0)
            .spawn()
            .context("cannot start the server of the mount")
    }
}

fn prepare_directory(directory: &Path) -> anyhow::Result<()> {
    if is_dead(directory) {
        // Of a machine or processes that are no more: whoever had files open there has lost them already.
        tracing::warn!(
            "{} was left by a mount that ended: it is taken away",
            directory.display()
        );
        let helper = Path::new("fusermount3");
        blockpool_fuse::unmount(helper, directory, true)?;
    }
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory);
    made.with_context(|| format!("cannot make {}", directory.display()))
}

/// Whether a directory is a mount that nobody answers any more.
pub(crate) fn is_dead(directory: &Path) -> bool {
    matches!(
        rustix::fs::statvfs(directory),
        Err(rustix::io::Errno::NOTCONN | rustix::io::Errno::CONNABORTED)
    )
}

fn give_up(helper: &Path, directory: &Path, status: ExitStatus) {
    // The server has said why, unless it was killed again and again.
    if status.code().is_none() {
        tracing::error!(
            "the servers of {} are killed ({status}): it is unmounted",
            directory.display()
        );
    }
    if let Err(error) = blockpool_fuse::unmount(helper, directory, true) {
        tracing::warn!("{error}");
    }
}

/// A keeper that is told to end unmounts, where nobody uses the files.
fn watch_signals(helper: PathBuf, directory: PathBuf) {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let Ok(mut terminate) = signal(SignalKind::terminate()) else {
                return;
            };
            loop {
                tokio::select! {
                    _ = tokio::signal::ctrl_c() => {}
                    _ = terminate.recv() => {}
                }
                if let Err(error) = blockpool_fuse::unmount(&helper, &directory, false) {
                    tracing::error!("{error}");
                }
            }
        });
    });
}

/// `fcvm pool serve-mount`: the server that a keeper starts. Its standard input is the kernel's side, its output the journal.
fn server(pool_path: &Path, is_takeover: bool, is_write_through: bool) -> anyhow::Result<u8> {
    let device = std::io::stdin().as_fd().try_clone_to_owned()?;
    let journal = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    if journal.metadata()?.file_type()
        != std::fs::File::open("/proc/self/exe")?
            .metadata()?
            .file_type()
    {
        bail!("this command is for fcvm's own use");
    }
    let disk = Arc::new(super::disk(pool_path)?);
    let pool = Pool::open_with_journal(disk, Arc::new(Journal::new(journal)))
        .with_context(|| pool_path.display().to_string())?;
    let options = Options {
        thread_count: THREAD_COUNT,
        writeback_cache: !is_write_through,
        host_directory: pool_path.parent().map(Path::to_owned),
    };
    blockpool_fuse::serve(device, &pool, options, is_takeover)?;
    Ok(crate::EXIT_SUCCESS)
}

/// `fcvm pool serve-bare`: the server of a mount that has one file and does nothing to it.
fn bare_server(path: &Path) -> anyhow::Result<u8> {
    let device = std::io::stdin().as_fd().try_clone_to_owned()?;
    let file = File::options().read(true).write(true).open(path)?;
    blockpool_fuse::serve_passthrough(device, &file, THREAD_COUNT)?;
    Ok(crate::EXIT_SUCCESS)
}

/// `fcvm pool unmount`: returns when the pool is free for others.
fn unmount(context: &Context, directory: &Path) -> anyhow::Result<u8> {
    let directory: PathBuf = std::path::absolute(directory)?.components().collect();
    let Some(helper) = context.find_program("fusermount3") else {
        bail!("fusermount3 is missing: install the package fuse3");
    };
    let pool = mounted_pool(&directory)?;
    let is_dead = is_dead(&directory);
    blockpool_fuse::unmount(&helper, &directory, is_dead)?;
    let begin = Instant::now();
    while let Some(pool) = &pool
        && !is_dead
    {
        match FileDisk::open(pool) {
            Err(PoolError::InUse { .. }) if begin.elapsed() < UNMOUNT_TIMEOUT => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error @ PoolError::InUse { .. }) => return Err(error.into()),
            _ => break,
        }
    }
    Ok(crate::EXIT_SUCCESS)
}

/// The pool that is mounted on a directory, from /proc/self/mountinfo: proc(5).
pub(crate) fn mounted_pool(directory: &Path) -> anyhow::Result<Option<PathBuf>> {
    let mounts =
        std::fs::read("/proc/self/mountinfo").context("cannot read the table of mounts")?;
    let mounts = String::from_utf8_lossy(&mounts);
    let found = mounts.lines().rev().find_map(|line| {
        let (place, source) = line.split_once(" - ")?;
        let place = unescaped(place.split(' ').nth(4)?);
        let mut source = source.split(' ');
        let is_pool = source.next()? == "fuse.fcvm-pool" && Path::new(&place) == directory;
        is_pool.then(|| source.next().map(unescaped))?
    });
    Ok(found.map(PathBuf::from))
}

/// Spaces and the like are written as three octal digits there.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::unescaped;

    #[test]
    fn names_in_the_table_of_mounts_are_read() {
        assert_eq!(unescaped(r"/a\040b\134c\x"), r"/a b\c\x");
        assert_eq!(unescaped("/plain"), "/plain");
    }
}
