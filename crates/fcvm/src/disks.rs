//! Where the writable disks of VMs are, and how they are branched: what `--disk-store` says.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fcvm_snapshot::SnapshotStore;
use fcvm_storage::{BranchMethod, CopyStore, DiskStore, OverlayStore, PoolStore, choose};
use fcvm_types::record::DiskStoreRecord;

use crate::args::DiskStoreChoice;
use crate::commands::pool::{create, mount};
use crate::context::{Context, create_private_dir};

/// The pool never asks for more than its file system has, and a file can have that much on ext4.
const POOL_BYTES: std::ops::RangeInclusive<u64> = 1 << 30..=(16 << 40) - (1 << 20);

/// A directory for disks, and the way to branch them there.
pub(crate) struct Disks {
    pub(crate) directory: PathBuf,
    pub(crate) store: Box<dyn DiskStore>,
    /// What was chosen, for the record.
    pub(crate) choice: Option<DiskStoreRecord>,
}

/// The disks that a VM needs.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// Its hypervisor knows no other disks than files of raw bytes.
    pub(crate) raw_only: bool,
    /// It has one.
    pub(crate) is_used: bool,
}

/// Finds them; a pool is made and mounted if need be.
pub(crate) fn find(context: &Context, wanted: &Wanted) -> anyhow::Result<Disks> {
    let directory = context.data_dir.join("disks");
    let raw_only = wanted.raw_only;
    if !wanted.is_used {
        let store = Box::new(CopyStore::new(directory.clone()));
        let choice = None;
        return Ok(Disks {
            directory,
            store,
            choice,
        });
    }
    let mount = || mounted(context, "disks");
    let (directory, store, reason): (_, Box<dyn DiskStore>, _) = match context.disk_store {
        DiskStoreChoice::Auto => automatic(directory, raw_only, mount)?,
        DiskStoreChoice::Pool => {
            let directory = mount()?;
            let store = Box::new(PoolStore::new(directory.clone()));
            (directory, store, None)
        }
        DiskStoreChoice::Overlay if raw_only => {
            bail!("--disk-store overlay is QEMU's: choose auto, pool or copy, or --hypervisor qemu")
        }
        DiskStoreChoice::Overlay => {
            let store = Box::new(OverlayStore::new(directory.clone()));
            (directory, store, None)
        }
        DiskStoreChoice::Copy => {
            let store = Box::new(CopyStore::new(directory.clone()));
            (directory, store, None)
        }
    };
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let method = store.method().name().to_owned();
    Ok(Disks {
        directory,
        store,
        choice: Some(DiskStoreRecord { method, reason }),
    })
}

/// The best way where nobody said which, and why it is. Where blocks cannot be shared and overlays not be read there is
/// the pool, and copies where that cannot be had.
fn automatic(
    directory: PathBuf,
    raw_only: bool,
    mount: impl FnOnce() -> anyhow::Result<PathBuf>,
) -> anyhow::Result<(PathBuf, Box<dyn DiskStore>, Option<String>)> {
    let store = choose(&directory, raw_only)?;
    let reason = match store.method() {
        BranchMethod::Reflink => "the data directory's file system shares blocks".to_owned(),
        BranchMethod::Pool | BranchMethod::Overlay => {
            "the data directory's file system cannot share blocks".to_owned()
        }
        BranchMethod::Copy => match mount() {
            Ok(pool) => {
                let reason = "the data directory's file system cannot share blocks, and Firecracker reads no overlays";
                let store = Box::new(PoolStore::new(pool.clone()));
                return Ok((pool, store, Some(reason.to_owned())));
            }
            Err(error) => {
                tracing::debug!(target: "vm", "disks are copied: {error:#}");
                format!(
                    "the data directory's file system cannot share blocks, and there is no pool: {error:#}"
                )
            }
        },
    };
    Ok((directory, store, Some(reason)))
}

/// A store of the same kind in the same place.
pub(crate) fn another(
    store: &dyn DiskStore,
    directory: &Path,
    raw_only: bool,
) -> anyhow::Result<Box<dyn DiskStore>> {
    Ok(match store.method() {
        BranchMethod::Pool => Box::new(PoolStore::new(directory.to_owned())),
        // A VM that stays in its process stays with its file. Over a frozen one that is what was
        // written since, and little.
        BranchMethod::Overlay | BranchMethod::Copy => {
            Box::new(CopyStore::new(directory.to_owned()))
        }
        BranchMethod::Reflink => choose(directory, raw_only)?,
    })
}

/// The pool of the data directory, where it is mounted.
pub(crate) fn pool_directory(context: &Context) -> PathBuf {
    context.data_dir.join("pool/mnt")
}

/// The directory for disks of snapshots in the pool of the data directory: where that is mounted, or a snapshot needs it.
pub(crate) fn of_snapshots(
    context: &Context,
    store: &SnapshotStore,
) -> anyhow::Result<Option<PathBuf>> {
    let directory = pool_directory(context);
    let is_mounted = mount::mounted_pool(&directory)?.is_some() && !mount::is_dead(&directory);
    if !is_mounted && !store.needs_pool()? {
        return Ok(None);
    }
    mounted(context, "snapshots").map(Some)
}

/// Makes and mounts the pool of the data directory where nobody has, and makes a directory in it.
fn mounted(context: &Context, name: &str) -> anyhow::Result<PathBuf> {
    let home = context.data_dir.join("pool");
    create_private_dir(&home)?;
    let directory = pool_directory(context);
    // Of several first runs one mounts. The directory itself is the lock, which ends with its holder.
    let lock = File::open(&home).with_context(|| format!("cannot open {}", home.display()))?;
    lock.lock()
        .with_context(|| format!("cannot lock {}", home.display()))?;
    let is_mounted = mount::mounted_pool(&directory)?.is_some();
    if !is_mounted || mount::is_dead(&directory) {
        let pool = home.join("pool.img");
        if !pool.exists() {
            make(&pool)?;
        }
        // Each write is sent: one that the kernel gathers is answered before there is room for it, and lost where there is
        // none. So the hypervisor learns of it in time, and the VM waits.
        let mount = mount::Mount::new(&pool, &directory, true)?;
        mount
            .start(context)
            .context("cannot mount the pool for disks")?;
    }
    let disks = directory.join(name);
    match std::fs::create_dir(&disks) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot make {}", disks.display()))
        }
        _ => Ok(disks),
    }
}

fn make(path: &Path) -> anyhow::Result<()> {
    let failed = || format!("cannot make the pool {}", path.display());
    let space = rustix::fs::statvfs(path.parent().unwrap_or(path)).with_context(failed)?;
    let host_bytes = space.f_blocks.saturating_mul(space.f_frsize);
    let size_bytes = host_bytes.clamp(*POOL_BYTES.start(), *POOL_BYTES.end());
    create::create(path, size_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pool_is_for_raw_disks_that_the_file_system_cannot_share() {
        let directory = tempfile::tempdir().unwrap();
        let disks = directory.path().join("disks");
        let is_shared = fcvm_storage::reflink_support(directory.path()).unwrap();
        let pool = || Ok(PathBuf::from("/pool/disks"));
        let none = || anyhow::bail!("fusermount3 is missing");
        let chosen = |raw_only, mount: &dyn Fn() -> anyhow::Result<PathBuf>| {
            let (found, store, reason) = automatic(disks.clone(), raw_only, mount).unwrap();
            assert_eq!(found != disks, store.method() == BranchMethod::Pool);
            (store.method().name(), reason.unwrap())
        };
        if is_shared {
            assert_eq!(chosen(true, &none).0, "reflink");
            return;
        }
        assert_eq!(chosen(false, &pool).0, "overlay");
        let (method, reason) = chosen(true, &pool);
        assert_eq!(method, "pool");
        assert!(reason.contains("Firecracker reads no overlays"), "{reason}");
        let (method, reason) = chosen(true, &none);
        assert_eq!(method, "copy");
        assert!(
            reason.ends_with("there is no pool: fusermount3 is missing"),
            "{reason}"
        );
    }
}
