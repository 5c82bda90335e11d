//! Where the writable disks of VMs are, and how they are branched: what `--disk-store` says.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fcvm_snapshot::SnapshotStore;
use fcvm_storage::{BranchMethod, CopyStore, DiskStore, OverlayStore, PoolStore, choose};

use crate::args::DiskStoreChoice;
use crate::commands::pool::{create, mount};
use crate::context::{Context, create_private_dir};

/// The pool never asks for more than its file system has, and a file can have that much on ext4.
const POOL_BYTES: std::ops::RangeInclusive<u64> = 1 << 30..=(16 << 40) - (1 << 20);

/// A directory for disks, and the way to branch them there.
pub(crate) struct Disks {
    pub(crate) directory: PathBuf,
    pub(crate) store: Box<dyn DiskStore>,
}

/// Finds them; a pool is made and mounted if need be. `raw_only` is for hypervisors that know no other disks
/// than files of raw bytes.
pub(crate) fn find(context: &Context, raw_only: bool) -> anyhow::Result<Disks> {
    let directory = context.data_dir.join("disks");
    let store: Box<dyn DiskStore> = match context.disk_store {
        DiskStoreChoice::Auto => choose(&directory, raw_only)?,
        DiskStoreChoice::Pool => {
            let directory = mounted(context, "disks")?;
            let store = Box::new(PoolStore::new(directory.clone()));
            return Ok(Disks { directory, store });
        }
        DiskStoreChoice::Overlay if raw_only => {
            bail!("--disk-store overlay is QEMU's: choose auto, pool or copy, or --hypervisor qemu")
        }
        DiskStoreChoice::Overlay => Box::new(OverlayStore::new(directory.clone())),
        DiskStoreChoice::Copy => Box::new(CopyStore::new(directory.clone())),
    };
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(Disks { directory, store })
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
