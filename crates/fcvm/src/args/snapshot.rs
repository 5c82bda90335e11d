//! `fcvm snapshot`.

use clap::{Args, Subcommand, ValueEnum};
use fcvm_types::SnapshotTag;

use super::Format;
use super::clones::CloneArguments;

/// The verbs of `fcvm snapshot`.
#[derive(Debug, Subcommand)]
#[command(
    after_help = "A snapshot is a VM as of one instant: memory, processors, disk. It survives the VM and a\n\
        reboot of the host, and clones of it are as 'fcvm fork' makes them.\n\n\
        Examples:\n  \
        fcvm snapshot create web --tag warm\n  \
        fcvm snapshot run --snapshot warm --name copy -p 8081:80\n  \
        fcvm snapshot serve warm &          keeps it in memory: clones start faster\n  \
        fcvm snapshot rm warm"
)]
pub(crate) enum SnapshotCommand {
    /// Keep the state of a running VM, which goes on
    Create(CreateArguments),
    /// List snapshots
    #[command(visible_alias = "list")]
    Ls(LsArguments),
    /// Show all that is known of snapshots, as JSON
    Inspect(InspectArguments),
    /// Remove snapshots
    Rm(RmArguments),
    /// Start clones of a snapshot
    Run(RunArguments),
    /// Keep a snapshot's memory resident and start clones of it on demand; they end with this process
    Serve(ServeArguments),
    /// Give a snapshot's memory to hypervisors that ask for it page by page (userfaultfd)
    ServeMemory(ServeMemoryArguments),
}

/// `fcvm snapshot create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArguments {
    /// Name of the snapshot
    #[arg(short, long, value_name = "TAG")]
    pub(crate) tag: SnapshotTag,
    /// Start a clone and compare its memory and disk before the tag appears
    #[arg(long)]
    pub(crate) verify: bool,
    /// Store the whole memory also where the VM is a clone of another snapshot
    #[arg(long)]
    pub(crate) full: bool,
    /// Name, id or owner PID of the VM
    pub(crate) vm: String,
}

/// `fcvm snapshot ls`.
#[derive(Debug, Args)]
pub(crate) struct LsArguments {
    /// Only tags
    #[arg(short, long, conflicts_with = "format")]
    pub(crate) quiet: bool,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

/// `fcvm snapshot inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    /// Also check every byte against its checksum
    #[arg(long)]
    pub(crate) verify: bool,
    /// Tags
    #[arg(required = true)]
    pub(crate) tags: Vec<SnapshotTag>,
}

/// `fcvm snapshot rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArguments {
    /// Also the snapshots that store only what differs from this one
    #[arg(long)]
    pub(crate) prune_children: bool,
    /// No error when a snapshot does not exist
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Tags
    #[arg(required = true)]
    pub(crate) tags: Vec<SnapshotTag>,
}

/// `fcvm snapshot run`.
#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// The snapshot
    #[arg(
        long,
        value_name = "TAG",
        required_unless_present = "pid",
        conflicts_with = "pid"
    )]
    pub(crate) snapshot: Option<SnapshotTag>,
    /// The process that serves the snapshot ('fcvm snapshot serve')
    #[arg(long, value_name = "SERVE_PID")]
    pub(crate) pid: Option<i32>,
    /// The clones
    #[command(flatten)]
    pub(crate) clones: CloneArguments,
    /// Where the clones get their memory
    #[arg(long, value_enum, default_value = "auto", conflicts_with = "pid")]
    pub(crate) memory: MemoryChoice,
}

/// `--memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MemoryChoice {
    /// From a file, or from a memory server that runs for the snapshot
    Auto,
    /// A file, whose pages the clones share until they write to them
    File,
    /// A memory server (userfaultfd), which brings ahead what earlier clones needed; one is started where none runs
    Uffd,
}

/// `fcvm snapshot serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArguments {
    /// Keep so many clones loaded and paused, about 80 MB each
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(..=32))]
    pub(crate) standby: u16,
    /// The snapshot
    pub(crate) tag: SnapshotTag,
}

/// `fcvm snapshot serve-memory`.
#[derive(Debug, Args)]
#[command(
    after_help = "Prints the path of its socket. Firecracker connects to it when a snapshot is loaded with this path as\n\
        'backend_path' and 'Uffd' as 'backend_type'. The pages that the first clone asks for are recorded, kept with\n\
        the snapshot, and brought to later ones ahead. Clones are killed when this process is told to end; when it is\n\
        killed they stand still: whoever runs them watches it."
)]
pub(crate) struct ServeMemoryArguments {
    /// End when neither a clone nor one who watches is there any more, or when none has come for 60 s
    #[arg(long)]
    pub(crate) exit_when_idle: bool,
    /// How long the pages of a clone are recorded, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(..=3600))]
    pub(crate) record: u64,
    /// The snapshot
    pub(crate) tag: SnapshotTag,
}
