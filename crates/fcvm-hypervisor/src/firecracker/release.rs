//! Released binaries of Firecracker: downloaded, compared with their published checksum, kept by version.
//!
//! ```text
//! DIRECTORY/v1.13.1/firecracker, jailer
//! DIRECTORY/current -> v1.13.1
//! DIRECTORY/.partial-XXXXXX/    until a release is whole
//! ```
//!
//! Who changes the directory holds flock(2) on it, and begins by removing what a killed one has left.
//!
//! The server has, as the project's own does: `latest`, which redirects to `tag/vVERSION`, and
//! `download/vVERSION/firecracker-vVERSION-ARCHITECTURE.tgz` with a `.sha256.txt` beside it. The checksum finds a
//! damaged download; that it is the project's own is for TLS to say, or for a checksum from elsewhere.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::redirect::{Attempt, Policy};
use reqwest::{Client, Response, StatusCode};
use sha2::{Digest as _, Sha256};

/// Where releases are published.
pub const SERVER: &str = "https://github.com/firecracker-microvm/firecracker/releases";
/// The programs that are taken out of a release.
const PROGRAMS: [&str; 2] = ["firecracker", "jailer"];
/// Name of the link to the version in use.
const CURRENT: &str = "current";
/// Name of that link until it takes the place of the one before.
const NEW: &str = ".current.new";
/// What names of directories begin with until they are whole.
const PARTIAL_PREFIX: &str = ".partial-";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a server may say nothing.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const REDIRECTS_MAX: usize = 5;
/// A release has about 10 MB.
const ARCHIVE_MAX_BYTES: u64 = 256 << 20;
const PROGRAM_MAX_BYTES: u64 = 256 << 20;
const CHECKSUM_MAX_BYTES: u64 = 4096;
const MEMBERS_MAX: usize = 1000;

/// Why a release could not be had. Each message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReleaseError {
    /// The host's architecture has no releases.
    #[error("Firecracker is released for x86-64 and AArch64 hosts, not for {0}")]
    Architecture(&'static str),
    /// What was asked for is no version.
    #[error("'{0}' is no version of Firecracker such as 1.13.1")]
    Version(String),
    /// The server does not answer, or not to the end.
    #[error("cannot fetch {url}: {reason}")]
    Fetch {
        /// What was fetched.
        url: String,
        /// Why it failed.
        reason: String,
    },
    /// The download is not what was published.
    #[error(
        "{url} has the SHA-256 {found}, and {expected} was expected: nothing was installed, try again"
    )]
    Checksum {
        /// What was fetched.
        url: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// The archive is no release.
    #[error("{url} is no release of Firecracker: {reason}")]
    Archive {
        /// What was fetched.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// Another process fetches a release into the same directory.
    #[error("another process fetches a release of Firecracker into {}: wait for its end, and try again", directory.display())]
    Busy {
        /// The directory.
        directory: PathBuf,
    },
    /// An operation on a file failed.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

type Result<T> = std::result::Result<T, ReleaseError>;

/// What is to be fetched.
#[derive(Debug, Clone)]
pub struct ReleaseOptions {
    /// The server's address, as [`SERVER`].
    pub server: String,
    /// The version; the latest where there is none.
    pub version: Option<String>,
    /// The archive's SHA-256, known from elsewhere.
    pub sha256: Option<String>,
}

/// A release that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Its version.
    pub version: String,
    /// The hypervisor.
    pub firecracker: PathBuf,
    /// The program that confines it.
    pub jailer: PathBuf,
    /// It was fetched now.
    pub is_new: bool,
}

/// The release in use below `directory`, if there is one: the hypervisor's path.
pub fn installed(directory: &Path) -> Option<PathBuf> {
    let path = directory.join(CURRENT).join(PROGRAMS[0]);
    path.is_file().then_some(path)
}

/// Fetches a release into `directory` and makes it the one in use. `progress` is told of the bytes fetched, and of how
/// many they will be.
///
/// # Errors
/// Any [`ReleaseError`]; then nothing has changed.
pub async fn fetch(
    directory: &Path,
    options: &ReleaseOptions,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<Release> {
    let architecture = match std::env::consts::ARCH {
        known @ ("x86_64" | "aarch64") => known,
        other => return Err(ReleaseError::Architecture(other)),
    };
    let server = Server::new(&options.server)?;
    let version = match &options.version {
        Some(version) => version_in(version.strip_prefix('v').unwrap_or(version))
            .ok_or_else(|| ReleaseError::Version(version.clone()))?,
        None => server.latest().await?,
    };
    let _lock = begin(directory)?;
    let target = directory.join(format!("v{version}"));
    let is_new = !PROGRAMS.iter().all(|name| target.join(name).is_file());
    if is_new {
        let staging = tempfile::Builder::new()
            .prefix(PARTIAL_PREFIX)
            .tempdir_in(directory)
            .map_err(file("create a directory in", directory))?;
        let name = format!("firecracker-v{version}-{architecture}.tgz");
        let url = format!("{}/download/v{version}/{name}", server.address);
        let expected = match &options.sha256 {
            Some(sum) => sum.to_ascii_lowercase(),
            None => server.checksum(&format!("{url}.sha256.txt")).await?,
        };
        let archive = staging.path().join(&name);
        server.archive(&url, &archive, &expected, progress).await?;
        let suffix = format!("-v{version}-{architecture}");
        unpack(&archive, staging.path(), &suffix)
            .map_err(|reason| ReleaseError::Archive { url, reason })?;
        fs::remove_file(&archive).map_err(file("remove", &archive))?;
        // One that is not whole.
        if target.exists() {
            fs::remove_dir_all(&target).map_err(file("remove", &target))?;
        }
        fs::set_permissions(staging.path(), fs::Permissions::from_mode(0o755))
            .map_err(file("change the mode of", staging.path()))?;
        fs::rename(staging.keep(), &target).map_err(file("create", &target))?;
    }
    select(directory, &version)?;
    Ok(Release {
        firecracker: target.join(PROGRAMS[0]),
        jailer: target.join(PROGRAMS[1]),
        version,
        is_new,
    })
}

/// Makes the directory, keeps others from changing it for as long as the value is there, and removes what
/// one that was killed has left.
fn begin(directory: &Path) -> Result<File> {
    fs::create_dir_all(directory).map_err(file("create", directory))?;
    // The directory itself is the lock: no file is left, and the kernel frees it at death.
    let lock = File::open(directory).map_err(file("open", directory))?;
    lock.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => ReleaseError::Busy {
            directory: directory.to_owned(),
        },
        TryLockError::Error(error) => file("lock", directory)(error),
    })?;
    let entries = fs::read_dir(directory).map_err(file("read", directory))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let path = entry.path();
        if name.starts_with(PARTIAL_PREFIX) {
            fs::remove_dir_all(&path).map_err(file("remove", &path))?;
        } else if name == NEW {
            fs::remove_file(&path).map_err(file("remove", &path))?;
        }
    }
    Ok(lock)
}

/// Points `current` to a version, at once.
fn select(directory: &Path, version: &str) -> Result<()> {
    let link = directory.join(CURRENT);
    let new = directory.join(NEW);
    std::os::unix::fs::symlink(format!("v{version}"), &new).map_err(file("create", &new))?;
    fs::rename(&new, &link).map_err(file("create", &link))
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ReleaseError {
    move |source| ReleaseError::File {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Three numbers: it becomes a part of paths.
fn version_in(text: &str) -> Option<String> {
    let parts: Vec<&str> = text.split('.').collect();
    let number = |part: &&str| {
        (1..=5).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit())
    };
    (parts.len() == 3 && parts.iter().all(number)).then(|| text.to_owned())
}

/// The server of releases.
struct Server {
    address: String,
    client: Client,
}

impl Server {
    fn new(address: &str) -> Result<Self> {
        // Only the first call in a process has an effect; the program has no other use of TLS.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .user_agent(concat!("fcvm/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .redirect(Policy::custom(redirect))
            .build()
            .map_err(|error| failure(address, &error))?;
        Ok(Self {
            address: address.trim_end_matches('/').to_owned(),
            client,
        })
    }

    async fn get(&self, url: &str) -> Result<Response> {
        let response = self.client.get(url).send().await;
        let response = response.map_err(|error| failure(url, &error))?;
        let reason = match response.status() {
            StatusCode::OK => return Ok(response),
            StatusCode::NOT_FOUND => {
                "it is not there (404): there is no such release, or not for this architecture"
                    .to_owned()
            }
            status => format!("the server answers {status}"),
        };
        Err(ReleaseError::Fetch {
            url: url.to_owned(),
            reason,
        })
    }

    /// The latest version: where the server's `latest` leads.
    async fn latest(&self) -> Result<String> {
        let url = format!("{}/latest", self.address);
        let response = self.get(&url).await?;
        let tag = response
            .url()
            .path_segments()
            .and_then(|mut all| all.next_back());
        tag.and_then(|tag| version_in(tag.strip_prefix('v')?))
            .ok_or_else(|| ReleaseError::Fetch {
                reason: format!("it leads to {} and to no version", response.url()),
                url,
            })
    }

    /// The first word of a file as sha256sum writes them.
    async fn checksum(&self, url: &str) -> Result<String> {
        let mut response = self.get(url).await?;
        let mut text = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| failure(url, &error))?
        {
            text.extend_from_slice(&chunk);
            if text.len() as u64 > CHECKSUM_MAX_BYTES {
                break;
            }
        }
        let text = String::from_utf8_lossy(&text).to_ascii_lowercase();
        let sum = text.split_ascii_whitespace().next().unwrap_or_default();
        if sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(sum.to_owned());
        }
        Err(ReleaseError::Fetch {
            url: url.to_owned(),
            reason: "it is no SHA-256".to_owned(),
        })
    }

    async fn archive(
        &self,
        url: &str,
        path: &Path,
        expected: &str,
        progress: &mut dyn FnMut(u64, Option<u64>),
    ) -> Result<()> {
        let mut response = self.get(url).await?;
        let total = response.content_length();
        let mut target = File::create(path).map_err(file("create", path))?;
        let (mut hash, mut done) = (Sha256::new(), 0);
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| failure(url, &error))?
        {
            done += chunk.len() as u64;
            if done > ARCHIVE_MAX_BYTES {
                return Err(ReleaseError::Archive {
                    url: url.to_owned(),
                    reason: format!("it has more than {ARCHIVE_MAX_BYTES} bytes"),
                });
            }
            hash.update(&chunk);
            target.write_all(&chunk).map_err(file("write", path))?;
            progress(done, total);
        }
        let found: String = hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        match found == expected {
            true => Ok(()),
            false => Err(ReleaseError::Checksum {
                url: url.to_owned(),
                found,
                expected: expected.to_owned(),
            }),
        }
    }
}

/// Follows to another server, but not from encryption to none.
fn redirect(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let was_encrypted = attempt
        .previous()
        .last()
        .is_some_and(|url| url.scheme() == "https");
    if attempt.previous().len() > REDIRECTS_MAX {
        attempt.error("too many redirects")
    } else if was_encrypted && attempt.url().scheme() != "https" {
        attempt.error("a redirect leads to a server without TLS")
    } else {
        attempt.follow()
    }
}

/// The innermost reason: what is around it repeats the address.
fn failure(url: &str, error: &reqwest::Error) -> ReleaseError {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    ReleaseError::Fetch {
        url: url.to_owned(),
        reason: innermost.to_string(),
    }
}

/// Takes the programs, whose names in the archive end with `suffix`, out of it. Nothing else is written.
fn unpack(archive: &Path, target: &Path, suffix: &str) -> std::result::Result<(), String> {
    let file = File::open(archive).map_err(|error| error.to_string())?;
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
    let mut missing = PROGRAMS.to_vec();
    let damaged = |error: io::Error| format!("it cannot be unpacked ({error})");
    for entry in archive.entries().map_err(damaged)?.take(MEMBERS_MAX) {
        let entry = entry.map_err(damaged)?;
        let path = entry.path().map_err(damaged)?.into_owned();
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(index) = missing
            .iter()
            .position(|program| name.and_then(|name| name.strip_suffix(suffix)) == Some(*program))
        else {
            continue;
        };
        if !entry.header().entry_type().is_file() || entry.size() > PROGRAM_MAX_BYTES {
            return Err(format!("{} is no program", path.display()));
        }
        let to = target.join(missing.swap_remove(index));
        write_program(&mut entry.take(PROGRAM_MAX_BYTES), &to).map_err(damaged)?;
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(format!("it holds no {}{suffix}", missing.join(" and no "))),
    }
}

fn write_program(from: &mut impl io::Read, path: &Path) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    io::copy(from, &mut file)?;
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    file.sync_all()
}
