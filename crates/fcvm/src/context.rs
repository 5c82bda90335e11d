//! Directories, tools and host facts, read from the environment once.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use fcvm_snapshot::SnapshotStore;

use crate::args::{DiskStoreChoice, GlobalOptions};
use crate::state::StateStore;

/// Proxies, as the environment's variables of the same names give them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Proxies {
    pub(crate) https: Option<String>,
    pub(crate) http: Option<String>,
    pub(crate) none: Option<String>,
}

impl Proxies {
    fn from_environment() -> Self {
        // Both spellings are in use; the lower-case one is the older.
        let either = |lower: &str, upper: &str| {
            [lower, upper]
                .iter()
                .find_map(|name| std::env::var(name).ok())
                .filter(|value| !value.is_empty())
        };
        Self {
            https: either("https_proxy", "HTTPS_PROXY"),
            http: either("http_proxy", "HTTP_PROXY"),
            none: either("no_proxy", "NO_PROXY"),
        }
    }
}

/// What every command needs to know of its surroundings.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// Images, kernels and the state of VMs.
    pub(crate) data_dir: PathBuf,
    /// Control sockets.
    pub(crate) runtime_dir: PathBuf,
    /// How disks are kept.
    pub(crate) disk_store: DiskStoreChoice,
    /// Podman's and Docker's files with credentials for registries, the most important one first.
    pub(crate) credential_files: Vec<PathBuf>,
    /// Proxies for registries.
    pub(crate) proxies: Proxies,
    /// Where programs are looked for.
    pub(crate) search_path: std::ffi::OsString,
    /// Firecracker's program, where it is not to be looked for.
    pub(crate) firecracker: Option<PathBuf>,
}

impl Context {
    /// Reads the options and the environment.
    pub(crate) fn from_environment(options: &GlobalOptions) -> anyhow::Result<Self> {
        let root = rustix::process::geteuid().is_root();
        let variable = |name: &str| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let home = variable("HOME");
        let data_dir = match (&options.data_dir, root, variable("XDG_DATA_HOME"), &home) {
            (Some(dir), ..) => std::path::absolute(dir)?,
            (None, true, ..) => PathBuf::from("/var/lib/fcvm"),
            (None, false, Some(dir), _) => dir.join("fcvm"),
            (None, false, None, Some(home)) => home.join(".local/share/fcvm"),
            (None, false, None, None) => bail!(
                "neither HOME nor XDG_DATA_HOME is set: say where data is kept with --data-dir"
            ),
        };
        let runtime_dir = match (&options.runtime_dir, root, variable("XDG_RUNTIME_DIR")) {
            (Some(dir), ..) => std::path::absolute(dir)?,
            (None, true, _) => PathBuf::from("/run/fcvm"),
            (None, false, Some(dir)) if dir.is_dir() => dir.join("fcvm"),
            (None, false, _) => data_dir.join("run"),
        };
        let search_path = std::env::var_os("PATH").unwrap_or_default();
        // Debian keeps mkfs and friends where ordinary users do not look.
        let mut directories: Vec<PathBuf> = std::env::split_paths(&search_path).collect();
        directories.extend(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from));
        let search_path = std::env::join_paths(directories).unwrap_or(search_path);
        let under = |base: Option<PathBuf>, rest: &str| base.map(|base| base.join(rest));
        let config = variable("XDG_CONFIG_HOME").or_else(|| under(home.clone(), ".config"));
        let docker = variable("DOCKER_CONFIG").or_else(|| under(home.clone(), ".docker"));
        let credential_files = [
            under(variable("XDG_RUNTIME_DIR"), "containers/auth.json"),
            under(config, "containers/auth.json"),
            under(docker, "config.json"),
        ];
        Ok(Self {
            data_dir,
            runtime_dir,
            disk_store: options.disk_store,
            credential_files: credential_files.into_iter().flatten().collect(),
            proxies: Proxies::from_environment(),
            search_path,
            firecracker: variable("FCVM_FIRECRACKER_BIN"),
        })
    }

    /// The state store.
    pub(crate) fn state(&self) -> anyhow::Result<StateStore> {
        StateStore::open(&self.data_dir.join("vms"), &self.runtime_dir)
    }

    /// The snapshots.
    pub(crate) fn snapshots(&self) -> SnapshotStore {
        let store = SnapshotStore::new(self.data_dir.join("snapshots"));
        match crate::disks::of_snapshots(self, &store) {
            Ok(Some(directory)) => store.with_pool(directory),
            Ok(None) => store,
            Err(error) => {
                // Those whose disks are there say so.
                tracing::warn!("{error:#}");
                store
            }
        }
    }

    /// A program, looked up as a shell does.
    pub(crate) fn find_program(&self, name: &str) -> Option<PathBuf> {
        std::env::split_paths(&self.search_path)
            .map(|directory| directory.join(name))
            .find(|path| {
                rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file()
            })
    }

    /// The agent's binary: `FCVM_AGENT_BIN`, in `../libexec/fcvm`, or beside this program.
    pub(crate) fn agent_binary(&self) -> anyhow::Result<PathBuf> {
        if let Some(path) = std::env::var_os("FCVM_AGENT_BIN").map(PathBuf::from) {
            if path.is_file() {
                return Ok(path);
            }
            bail!("FCVM_AGENT_BIN names {}, which is no file", path.display());
        }
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let beside = program.parent().unwrap_or(Path::new("/"));
        // A build tree comes first: cargo leaves an agent that is not static beside the program.
        let places = ["../agent/fc-agent", "../libexec/fcvm/fc-agent", "fc-agent"];
        let candidates = places.map(|place| beside.join(place));
        match candidates.iter().find(|path| path.is_file()) {
            Some(path) => Ok(path.clone()),
            None => bail!(
                "the guest agent fc-agent is neither beside {} nor in ../libexec/fcvm: run 'make agent', or set FCVM_AGENT_BIN",
                program.display()
            ),
        }
    }
}

/// Creates a directory that only its owner can enter, with its parents.
pub(crate) fn create_private_dir(path: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot create {}", path.display()))?;
    let metadata =
        std::fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        bail!(
            "{} belongs to another user: choose another directory with --data-dir or --runtime-dir",
            path.display()
        );
    }
    Ok(())
}
