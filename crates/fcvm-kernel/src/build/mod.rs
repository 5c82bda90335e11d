//! Kernels built from source by profile.
//!
//! ```text
//! profile  what is asked for, with a reason for each line        (data: ../../profiles)
//! answers  a profile from the few questions that a person can answer
//! source   Debian's packages, a directory, an archive, a repository
//! resolve  the source's own Kconfig makes a configuration of it; what got lost is an error
//! zfs      OpenZFS added to a source, where the profile asks for it
//! builder  make, with a cache by content; store keeps what came of it
//! deb      a host's kernel as a Debian package
//! ```
//!
//! Everything is below the kernels' directory: `sources/ID/linux`, `work/ID/PROFILE` (the objects, kept so that a
//! changed option costs only what depends on it), `built/NAME`.

mod answers;
mod builder;
mod deb;
mod error;
mod kconfig;
mod process;
mod profile;
mod resolve;
mod source;
mod store;
mod zfs;

use std::io::Read as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

pub use answers::{Answers, Features, GuestMemory, Hardware, Prefer, Purpose};
pub use builder::{BuildOptions, Lto, Plan, build, plan};
pub use deb::package;
pub use error::BuildError;
pub use process::{Make, check_tools};
pub use profile::{KernelVersion, Origin, Profile, Request, Use};
pub use resolve::{Differing, Lost, Resolved, difference, parse_config, resolve};
pub use source::{Scope, Source, SourceSpec, fetch};
pub use store::{BuiltKernel, BuiltSymbol, BuiltZfs, find, list, remove, select, selected};
pub use zfs::{
    LICENCE_REMARK as ZFS_LICENCE_REMARK, Zfs, fetch as fetch_zfs,
    version_for_suite as zfs_version_for_suite,
};

/// Result of configuring and building.
pub type Result<T> = std::result::Result<T, BuildError>;

/// Where things are below the kernels' directory.
#[derive(Debug, Clone)]
pub struct Directories {
    /// Sources and apt's lists.
    pub sources: PathBuf,
    /// Objects of builds.
    pub work: PathBuf,
    /// Finished kernels.
    pub built: PathBuf,
}

impl Directories {
    /// Below `kernels`.
    pub fn new(kernels: &Path) -> Self {
        Self {
            sources: kernels.join("sources"),
            work: kernels.join("work"),
            built: kernels.join("built"),
        }
    }

    /// The output directory in which configurations of a source are resolved.
    pub fn resolving(&self, source: &Source) -> PathBuf {
        resolve::directory(&self.work, source)
    }
}

/// Fails where a directory's file system has less than `needed_mb` left.
pub(crate) fn check_space(path: &Path, needed_mb: u64, what: &'static str) -> Result<()> {
    let stat = rustix::fs::statvfs(path)
        .map_err(|errno| BuildError::file("look at", path)(errno.into()))?;
    let free_mb = (stat.f_bavail.saturating_mul(stat.f_frsize)) >> 20;
    match free_mb < needed_mb {
        true => Err(BuildError::Space {
            path: path.to_owned(),
            free_mb,
            needed_mb,
            what,
        }),
        false => Ok(()),
    }
}

/// SHA-256 of a file of any size.
pub(crate) fn sha256_file(path: &Path) -> Result<String> {
    let mut file = std::fs::File::open(path).map_err(BuildError::file("open", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let count = file
            .read(&mut buffer)
            .map_err(BuildError::file("read", path))?;
        if count == 0 {
            return Ok(crate::files::hexadecimal(&hash.finalize()));
        }
        hash.update(&buffer[..count]);
    }
}
