//! `fcvm image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Format;

/// `fcvm image ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Fetch an image from a registry
    Pull(PullArguments),
    /// List images
    #[command(alias = "list")]
    Ls(ImageLsArguments),
    /// Show an image's configuration and layers as JSON
    Inspect {
        /// Names, ids or digests
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove images
    Rm {
        /// Also one that a VM uses, or that has several names
        #[arg(short, long)]
        force: bool,
        /// All images
        #[arg(short, long)]
        all: bool,
        /// Names, ids or digests
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        images: Vec<String>,
    },
    /// Give an image another name
    Tag {
        /// Name, id or digest
        image: String,
        /// The other name
        name: String,
    },
    /// Take an image from a file or directory
    Import(ImportArguments),
    /// Make an image from a distribution's packages, without any registry
    Bootstrap(BootstrapArguments),
}

/// `fcvm image pull`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fcvm image pull debian:bookworm-slim\n  fcvm image pull registry.example/team/app@sha256:...\n  fcvm image pull --tls-verify=false localhost:5000/app"
)]
pub(crate) struct PullArguments {
    /// Check the registry's certificate, and refuse plain HTTP
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) tls_verify: bool,
    /// Directory with certificate authorities (*.crt) for the registry
    #[arg(long, value_name = "DIR")]
    pub(crate) cert_dir: Option<PathBuf>,
    /// User name and password for the registry
    #[arg(long, value_name = "USER:PASSWORD")]
    pub(crate) creds: Option<String>,
    /// File with credentials, before Podman's and Docker's
    #[arg(long, env = "REGISTRY_AUTH_FILE", value_name = "FILE")]
    pub(crate) authfile: Option<PathBuf>,
    /// Show nothing but the id
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The images
    #[arg(required = true)]
    pub(crate) images: Vec<String>,
}

/// `fcvm image ls`.
#[derive(Debug, Args)]
pub(crate) struct ImageLsArguments {
    /// Only ids
    #[arg(short, long, conflicts_with = "format")]
    pub(crate) quiet: bool,
    /// Do not shorten ids
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

/// `fcvm image import`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fcvm image import oci:./layout:latest app:1\n  fcvm image import oci-archive:app.tar\n  fcvm image import docker-archive:app.tar.gz\n  fcvm image import dir:./rootfs base:1"
)]
pub(crate) struct ImportArguments {
    /// oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE or dir:ROOTFS
    pub(crate) source: String,
    /// Name of the image [default: the one that the source has]
    pub(crate) name: Option<String>,
}

/// `fcvm image bootstrap`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fcvm image bootstrap debian:bookworm\n  fcvm image bootstrap debian:trixie --include curl,python3 --tag lab:1\n  fcvm image bootstrap debian:trixie --zfs"
)]
pub(crate) struct BootstrapArguments {
    /// DISTRIBUTION:SUITE, for example debian:bookworm
    pub(crate) source: String,
    /// Packages to add
    #[arg(long, value_name = "PACKAGE,...", value_delimiter = ',')]
    pub(crate) include: Vec<String>,
    /// Add OpenZFS's userland and zed, of the version that a built kernel has, or of this one
    #[arg(long, value_name = "VERSION", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub(crate) zfs: Option<String>,
    /// Name of the image [default: DISTRIBUTION:SUITE]
    #[arg(long, value_name = "NAME")]
    pub(crate) tag: Option<String>,
    /// Mirror to fetch packages from [default: the host's apt configuration, else the distribution's]
    #[arg(long, value_name = "URL")]
    pub(crate) mirror: Option<String>,
}
