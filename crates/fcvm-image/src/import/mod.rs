//! Images from files and directories of this machine: OCI layouts, archives, root file systems.
//!
//! Nothing is unpacked: members of an archive are read where they lie. An image with which something
//! is wrong leaves nothing in the store.

mod archive;
mod directory;
mod docker;
mod layout;

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::digest::Digest;
use crate::format::{FormatError, Platform, PlatformError};
use crate::progress::{Progress, one_line};
use crate::reference::{Reference, ReferenceError};
use crate::store::{CopyError, Image, ImageStore, Ingest, StoreError};

pub use self::archive::count_archive_members;
pub use self::docker::parse_docker_manifest;

/// Where an image is imported from, in the spelling of skopeo and Podman.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `oci:DIR[:NAME]`: a directory in OCI image layout.
    OciLayout {
        /// The directory.
        dir: PathBuf,
        /// Which image, by its name in the layout.
        name: Option<String>,
    },
    /// `oci-archive:FILE[:NAME]`: the same in a tar archive.
    OciArchive {
        /// The archive; it may be compressed with gzip or zstd.
        file: PathBuf,
        /// Which image, by its name in the layout.
        name: Option<String>,
    },
    /// `docker-archive:FILE[:NAME]`: what `docker save` and `podman save` write.
    DockerArchive {
        /// The archive; it may be compressed with gzip or zstd.
        file: PathBuf,
        /// Which image, by one of its names.
        name: Option<String>,
    },
    /// `dir:ROOTFS`: a directory that is the root file system.
    Directory {
        /// The directory.
        dir: PathBuf,
    },
}

/// A text that names no source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a source of images; write oci:DIR[:NAME], oci-archive:FILE[:NAME], \
     docker-archive:FILE[:NAME] or dir:ROOTFS"
)]
pub struct SourceError(String);

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        let refuse = || SourceError(one_line(text, 200));
        let (kind, rest) = text.split_once(':').ok_or_else(refuse)?;
        let (path, name) = match rest.split_once(':') {
            // A name may have colons, a path may not: the rule of skopeo.
            Some((path, name)) if kind != "dir" && !name.is_empty() => {
                (path, Some(name.to_owned()))
            }
            _ => (
                rest.strip_suffix(':')
                    .filter(|_| kind != "dir")
                    .unwrap_or(rest),
                None,
            ),
        };
        if path.is_empty() {
            return Err(refuse());
        }
        let path = PathBuf::from(path);
        match kind {
            "oci" => Ok(Self::OciLayout { dir: path, name }),
            "oci-archive" => Ok(Self::OciArchive { file: path, name }),
            "docker-archive" => Ok(Self::DockerArchive { file: path, name }),
            "dir" => Ok(Self::Directory { dir: path }),
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path, name) = match self {
            Self::OciLayout { dir, name } => ("oci", dir, name.as_ref()),
            Self::OciArchive { file, name } => ("oci-archive", file, name.as_ref()),
            Self::DockerArchive { file, name } => ("docker-archive", file, name.as_ref()),
            Self::Directory { dir } => ("dir", dir, None),
        };
        write!(f, "{kind}:{}", path.display())?;
        name.map_or(Ok(()), |name| write!(f, ":{name}"))
    }
}

/// What [`import`] is to do besides copying.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportOptions {
    /// Name to give; else the image gets the names that the source has for it.
    pub name: Option<Reference>,
    /// Which image of a source that has several platforms.
    pub platform: Platform,
}

/// Failure of [`import`]. Nothing of the image is kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The source cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Archive, file of a layout, or directory.
        path: PathBuf,
        /// The operating system's or the decoder's answer.
        source: io::Error,
    },
    /// The source is not what it is said to be.
    #[error("{} is not usable as {kind}: {reason}", path.display())]
    Unusable {
        /// Archive or directory.
        path: PathBuf,
        /// `an OCI image layout`, `a Docker archive`.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// No image has this name.
    #[error("{} has no image '{name}'; it has {available}", path.display())]
    NoSuchImage {
        /// Archive or directory.
        path: PathBuf,
        /// The name asked for.
        name: String,
        /// Names there are.
        available: String,
    },
    /// Which image is meant must be said.
    #[error("{} has several images; add ':' and the name of one: {available}", path.display())]
    SeveralImages {
        /// Archive or directory.
        path: PathBuf,
        /// Names there are.
        available: String,
    },
    /// One name cannot be given to several images.
    #[error("{} has several images, and one name cannot be given to all", path.display())]
    OneNameForSeveral {
        /// The archive.
        path: PathBuf,
    },
    /// A document of the image is not usable.
    #[error("{}: {error}", path.display())]
    Format {
        /// Archive or directory.
        path: PathBuf,
        /// What is wrong.
        error: FormatError,
    },
    /// The image is for another machine.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// A name of the source breaks the rules.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// tar cannot be started.
    #[error("cannot start tar, which packs the directory")]
    StartTar(#[source] io::Error),
    /// tar failed.
    #[error("tar cannot pack {}: {reason}", dir.display())]
    Tar {
        /// The directory.
        dir: PathBuf,
        /// Its last error lines.
        reason: String,
    },
    /// The image cannot be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Copies images from `source` into the store. Several come from a Docker archive that has several
/// and of which none was named.
pub fn import(
    store: &ImageStore,
    source: &Source,
    options: &ImportOptions,
    progress: &dyn Progress,
) -> Result<Vec<Image>, ImportError> {
    let import = Import {
        store,
        options,
        progress,
    };
    match source {
        Source::OciLayout { dir, name } => {
            let layout = layout::Directory::open(dir)?;
            import
                .layout(&layout, dir, name.as_deref())
                .map(|image| vec![image])
        }
        Source::OciArchive { file, name } => {
            let archive = archive::Archive::open(file, &store.begin()?)?;
            import
                .layout(&archive, file, name.as_deref())
                .map(|image| vec![image])
        }
        Source::DockerArchive { file, name } => {
            let archive = archive::Archive::open(file, &store.begin()?)?;
            import.docker(&archive, file, name.as_deref())
        }
        Source::Directory { dir } => import.directory(dir).map(|image| vec![image]),
    }
}

/// One call of [`import`].
struct Import<'i> {
    store: &'i ImageStore,
    options: &'i ImportOptions,
    progress: &'i dyn Progress,
}

/// Named members, of a directory or of an archive.
trait Members {
    /// Opens a member and tells its size in bytes. The name is relative and has no `..`.
    fn open(&self, name: &Path) -> Result<(Box<dyn Read + '_>, u64), io::Error>;
}

/// Reads a small member.
fn read_member(
    members: &dyn Members,
    path: &Path,
    name: &Path,
    limit_bytes: u64,
) -> Result<Vec<u8>, ImportError> {
    let shown = || path.join(name);
    let read_error = |source| ImportError::Read {
        path: shown(),
        source,
    };
    let (reader, size_bytes) = members.open(name).map_err(read_error)?;
    if size_bytes > limit_bytes {
        let document = "document";
        let error = FormatError::TooLarge {
            document,
            size_bytes,
            limit_bytes,
        };
        return Err(ImportError::Format {
            path: shown(),
            error,
        });
    }
    let mut bytes = Vec::new();
    reader
        .take(limit_bytes)
        .read_to_end(&mut bytes)
        .map_err(read_error)?;
    Ok(bytes)
}

impl Import<'_> {
    /// Copies one layer, unless it is here.
    fn layer(
        &self,
        ingest: &Ingest,
        members: &dyn Members,
        (path, name): (&Path, &Path),
        digest: &Digest,
        announced_bytes: Option<u64>,
    ) -> Result<u64, ImportError> {
        let shown = path.join(name);
        let read_error = |source| ImportError::Read {
            path: shown.clone(),
            source,
        };
        let (mut reader, size_bytes) = members.open(name).map_err(read_error)?;
        let size_bytes = announced_bytes.unwrap_or(size_bytes);
        let task = self.progress.start(&digest.short(), Some(size_bytes));
        if ingest.has(digest, size_bytes) {
            task.finish("already here");
            return Ok(size_bytes);
        }
        let what = shown.display().to_string();
        let mut bounded = (&mut reader).take(size_bytes + 1);
        let copied = ingest.copy(&what, &mut bounded, digest, size_bytes, &|bytes| {
            task.advance(bytes)
        });
        match copied {
            Ok(()) => {}
            Err(CopyError::Source(source)) => return Err(read_error(source)),
            Err(CopyError::Store(error)) => return Err(error.into()),
        }
        task.finish("done");
        Ok(size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_as_skopeo_does() {
        for (text, path, name) in [
            ("oci:/a/b", "/a/b", None),
            ("oci:/a/b:", "/a/b", None),
            (
                "oci:a:docker.io/library/x:1",
                "a",
                Some("docker.io/library/x:1"),
            ),
            ("oci-archive:x.tar:1", "x.tar", Some("1")),
            ("docker-archive:./x.tar.gz", "./x.tar.gz", None),
            ("dir:/a:b", "/a:b", None),
        ] {
            let (found_path, found_name) = match text.parse::<Source>().unwrap() {
                Source::OciLayout { dir, name } => (dir, name),
                Source::OciArchive { file, name } | Source::DockerArchive { file, name } => {
                    (file, name)
                }
                Source::Directory { dir } => (dir, None),
            };
            assert_eq!(
                (found_path, found_name.as_deref()),
                (path.into(), name),
                "{text}"
            );
        }
        for bad in [
            "",
            "oci",
            "oci:",
            "oci::x",
            "docker:x",
            "/a/b",
            "registry.example/a:b",
        ] {
            let error = bad.parse::<Source>().unwrap_err().to_string();
            assert!(error.contains("docker-archive:FILE"), "{error}");
        }
    }
}
