//! `fcvm pool`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use fcvm_types::ByteSize;

use super::Format;

/// `fcvm pool ...`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        fcvm pool create --size 100g                     a pool that takes what is written to it\n  \
        fcvm pool import disk.raw vms/base               a disk in it\n  \
        fcvm pool clone vms/base vms/web                 a copy at once, whatever its size\n  \
        fcvm pool snapshot vms@monday                    all disks of a dataset at one moment\n  \
        fcvm pool rollback vms/web@monday                back to it\n  \
        fcvm pool destroy vms/web@monday                 remove the snapshot\n  \
        fcvm pool mount ~/disks                          files in which 'cp' clones\n  \
        fcvm pool --pool /dev/sdb1 status --format json  a pool on a partition\n\n\
        A pool can be open in one process at a time. Names are DATASET, DATASET/OBJECT,\n\
        DATASET/OBJECT@SNAPSHOT and DATASET@SNAPSHOT (all objects of the dataset).")]
pub(crate) struct PoolArguments {
    /// File or block device of the pool [default: pool/pool.img in the data directory]
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) pool: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: PoolCommand,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// The verbs of `fcvm pool`.
#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Make a pool
    Create {
        /// Largest size; a file takes only what is written to it
        #[arg(long, value_name = "SIZE")]
        size: ByteSize,
    },
    /// Let a pool become larger
    Grow {
        /// New size
        size: ByteSize,
    },
    /// Show where the space is
    Status {
        /// Form of the output
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// List datasets, objects and snapshots with what they take
    #[command(alias = "list")]
    Ls {
        /// Only this one and what is in it
        name: Option<String>,
        /// Form of the output
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Copy a file, or standard input ('-'), into a new object; the dataset is made if need be
    Import {
        /// File, block device, or '-'
        file: PathBuf,
        /// DATASET/OBJECT
        name: String,
    },
    /// Copy an object or snapshot into a new file, holes left out
    Export {
        /// DATASET/OBJECT or DATASET/OBJECT@SNAPSHOT
        name: String,
        /// File to make
        file: PathBuf,
    },
    /// Make an object that holds what another one, or a snapshot, holds
    Clone {
        /// DATASET/OBJECT or DATASET/OBJECT@SNAPSHOT
        source: String,
        /// DATASET/OBJECT to make
        target: String,
    },
    /// Keep an object, or all objects of a dataset, as they are now
    Snapshot {
        /// DATASET/OBJECT@SNAPSHOT or DATASET@SNAPSHOT
        name: String,
    },
    /// Make an object, or all objects of a dataset, what they were
    Rollback {
        /// DATASET/OBJECT@SNAPSHOT or DATASET@SNAPSHOT
        name: String,
    },
    /// Remove datasets, objects and snapshots
    #[command(alias = "rm")]
    Destroy {
        /// Also what is in them
        #[arg(short, long)]
        recursive: bool,
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Write a snapshot, or what changed since an earlier one, to a pipe or file
    Send(SendArguments),
    /// Take what 'fcvm pool send' wrote; nothing changes before all of it is there
    #[command(alias = "recv")]
    Receive(ReceiveArguments),
    /// Change what a dataset does with what is written from now on
    Set(SetArguments),
    #[command(flatten)]
    Mount(MountCommand),
    /// Read everything that has a checksum, repair what can be repaired, list what is lost
    Scrub {
        /// Form of the output
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
    /// Count all references anew and compare
    Check {
        /// Make the counts what was found
        #[arg(long)]
        repair: bool,
        /// Form of the output
        #[arg(long, value_enum, default_value = "table")]
        format: Format,
    },
}

/// What a dataset does with what is written.
#[derive(Debug, Args)]
pub(crate) struct SetArguments {
    /// Dataset; it is made if need be
    pub(crate) dataset: String,
    /// Never write in place, and give every block a checksum at once
    #[arg(long, value_enum, required_unless_present = "compression")]
    pub(crate) checksum: Option<Switch>,
    /// Compress 64 KiB at a time, with checksums and never in place; what was written before stays as it is
    #[arg(long, value_enum, required_unless_present = "checksum")]
    pub(crate) compression: Option<CompressionName>,
}

/// How a dataset compresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CompressionName {
    Off,
    /// Hardly slower than none
    Lz4,
    /// Smaller, and slower to write
    Zstd,
}

/// The verbs that have to do with mounts.
#[derive(Debug, Subcommand)]
pub(crate) enum MountCommand {
    /// Show the pool as a directory: datasets are directories, objects are files, 'cp' clones
    Mount {
        /// Directory; it is made if need be
        directory: PathBuf,
        /// Stay, and unmount when interrupted
        #[arg(long)]
        foreground: bool,
        /// Hand every write to the pool at once, in place of letting the kernel gather writes until a flush
        #[arg(long)]
        write_through: bool,
    },
    /// Measure a pool beside XFS, btrfs, qcow2 overlays, copies and plain files
    Bench(BenchArguments),
    /// End a mount that nobody uses
    #[command(alias = "umount")]
    Unmount {
        /// Directory
        directory: PathBuf,
    },
    /// Hold a mount and start its servers; for fcvm's own use
    #[command(hide = true)]
    KeepMount {
        /// Directory
        directory: PathBuf,
        /// As of mount
        #[arg(long)]
        write_through: bool,
    },
    /// Answer for a mount; for fcvm's own use
    #[command(hide = true)]
    ServeMount {
        /// Another server did until now
        #[arg(long)]
        takeover: bool,
        /// As of mount
        #[arg(long)]
        write_through: bool,
    },
    /// Answer for a mount of one file, which the bench compares with; for fcvm's own use
    #[command(hide = true)]
    ServeBare,
}

/// `fcvm pool send`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        fcvm pool send vms@monday | ssh host fcvm pool receive\n  \
        fcvm pool send vms@tuesday --from monday | ssh host fcvm pool receive\n  \
        fcvm pool send vms/web@monday --output web.stream\n  \
        fcvm pool send vms@monday --resume TOKEN | ssh host fcvm pool receive\n\n\
        What disks share is sent once and is shared where it is received.")]
pub(crate) struct SendArguments {
    /// DATASET/OBJECT@SNAPSHOT or DATASET@SNAPSHOT
    pub(crate) name: String,
    /// Only what changed since this snapshot, which the receiver has
    #[arg(long, value_name = "SNAPSHOT")]
    pub(crate) from: Option<String>,
    /// File to make [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Go on where a receive stopped that told this token
    #[arg(long, value_name = "TOKEN")]
    pub(crate) resume: Option<String>,
    /// Form of what is told when it is done: on stderr, or on stdout with --output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

/// `fcvm pool receive`.
#[derive(Debug, Args)]
pub(crate) struct ReceiveArguments {
    /// Dataset to receive into [default: the name that it had]
    pub(crate) dataset: Option<String>,
    /// File to read [default: standard input]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// Roll objects back that changed since the snapshot that the stream builds on
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Show receives that did not come to their end, with their tokens, and receive nothing
    #[arg(long, conflicts_with_all = ["dataset", "input", "force"])]
    pub(crate) list: bool,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

/// `fcvm pool bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    /// Size of what is cloned
    #[arg(long, value_name = "SIZE", default_value = "1g")]
    pub(crate) clone_size: ByteSize,
    /// Random 4 KiB writes to a clone
    #[arg(long, value_name = "COUNT", default_value_t = 65_536)]
    pub(crate) rewrites: u64,
    /// Rounds, of which medians are shown
    #[arg(long, value_name = "COUNT", default_value_t = 3)]
    pub(crate) rounds: u64,
    /// Where to measure; several times the size is needed [default: the data directory]
    #[arg(long, value_name = "DIR")]
    pub(crate) directory: Option<PathBuf>,
    /// Also time clones of sparse files of 1 MiB to 1 TiB, and draw them
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}
