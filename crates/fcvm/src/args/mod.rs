//! The command line: what can be written, not what it does (that is `commands/`).

pub(crate) mod clones;
pub(crate) mod fork;
pub(crate) mod image;
pub(crate) mod kernel;
pub(crate) mod pool;
pub(crate) mod run;
pub(crate) mod snapshot;
pub(crate) mod system;
pub(crate) mod zfs_send;

use clap::{Args, Parser, Subcommand, ValueEnum};
use fcvm_types::VmName;
use std::path::PathBuf;

/// Run container images, each in its own microVM.
#[derive(Debug, Parser)]
#[command(
    name = "fcvm",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    after_help = "Examples:\n  \
        fcvm setup                                     fetch the guest kernel, check this host\n  \
        fcvm image bootstrap debian:bookworm           make an image from Debian's packages\n  \
        fcvm run --rm debian:bookworm uname -a         run a command in a microVM of its own\n  \
        fcvm run -d --name web -p 8080:80 IMAGE        run a service in the background\n  \
        fcvm exec -it web sh                           a shell in it\n\n\
        Exit codes: the container's own; 125 when fcvm itself fails, 126 when the command cannot\n\
        be executed, 127 when it does not exist, 128+N when signal N ended it."
)]
pub(crate) struct Arguments {
    /// Options of every command.
    #[command(flatten)]
    pub(crate) global: GlobalOptions,
    /// The verb.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct GlobalOptions {
    /// Where images, kernels and the state of VMs are kept [default: /var/lib/fcvm for root, else
    /// $XDG_DATA_HOME/fcvm or ~/.local/share/fcvm]
    #[arg(
        long,
        global = true,
        env = "FCVM_DATA_DIR",
        value_name = "DIR",
        help_heading = "Global options"
    )]
    pub(crate) data_dir: Option<PathBuf>,
    /// Where sockets are kept [default: /run/fcvm for root, else $XDG_RUNTIME_DIR/fcvm]
    #[arg(
        long,
        global = true,
        env = "FCVM_RUNTIME_DIR",
        value_name = "DIR",
        help_heading = "Global options"
    )]
    pub(crate) runtime_dir: Option<PathBuf>,
    /// How the writable disks of VMs are kept and cloned
    #[arg(
        long,
        global = true,
        env = "FCVM_DISK_STORE",
        value_enum,
        value_name = "STORE",
        default_value = "auto",
        help_heading = "Global options"
    )]
    pub(crate) disk_store: DiskStoreChoice,
    /// What is logged to stderr: error, warn, info, debug, trace, or tracing directives
    #[arg(
        long,
        global = true,
        env = "FCVM_LOG",
        value_name = "LEVEL",
        default_value = "warn",
        help_heading = "Global options"
    )]
    pub(crate) log_level: String,
}

/// `--disk-store`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DiskStoreChoice {
    /// Blocks shared by the file system where it can (btrfs, XFS), else overlays, and with Firecracker the pool
    Auto,
    /// Files over files, qcow2
    Overlay,
    /// A block-cloning pool, made and mounted when it is first needed
    Pool,
    /// Full copies
    Copy,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a new microVM
    Run(Box<run::RunArguments>),
    /// The same commands, for those used to Podman's spelling
    #[command(subcommand)]
    Podman(PodmanCommand),
    /// Keep the started state of an image for 'fcvm run --warm', without leaving a VM behind
    Prepare(Box<run::PrepareArguments>),
    /// Run another process in a running VM
    Exec(ExecArguments),
    /// Fork a running VM: clones that continue from this instant, each on its own
    #[command(visible_alias = "clone")]
    Fork(fork::ForkArguments),
    /// Keep the state of VMs, and start clones of it
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// List VMs
    #[command(visible_alias = "ps", alias = "list")]
    Ls(LsArguments),
    /// Show what a VM's container wrote
    Logs(LogsArguments),
    /// Copy files between a VM and the host
    Cp(CpArguments),
    /// Stop VMs: the stop signal, a grace period, then the end
    Stop(StopArguments),
    /// Send a signal to the containers of VMs
    Kill(KillArguments),
    /// Remove VMs
    Rm(RmArguments),
    /// Wait until VMs have ended and print their exit codes
    Wait(WaitArguments),
    /// Show all that is known of VMs, images, as JSON
    Inspect(InspectArguments),
    /// Show the processes of a VM
    Top(TopArguments),
    /// Show what VMs use
    Stats(StatsArguments),
    /// Stop the virtual processors of VMs
    Pause(VmsArguments),
    /// Let paused VMs go on
    Unpause(VmsArguments),
    /// Manage images
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// The block-cloning pool: disks with instant copies and snapshots
    Pool(pool::PoolArguments),
    /// Prepare this host: guest kernel, checks
    Setup(system::SetupArguments),
    /// Disk usage and clean-up
    #[command(subcommand)]
    System(system::SystemCommand),
    /// Checks of this installation
    #[command(subcommand)]
    Test(system::TestCommand),
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man {
        /// Existing directory
        directory: PathBuf,
    },
    /// The owner process of a detached VM
    #[command(hide = true)]
    Owner {
        /// The VM is a clone; standard input is the channel to its source
        #[arg(long)]
        clone: bool,
    },
    /// The throw-away guest that shows whether KVM runs guests
    #[command(hide = true)]
    ProbeGuest,
    /// The first process of a jail's PID namespace
    #[command(hide = true)]
    JailInit {
        /// What it runs
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// What makes the tap device of a VM of Firecracker; standard input is the channel to its owner
    #[command(hide = true)]
    MakeTap,
    /// Kernels, and hosts that are tuned for VMs
    #[command(subcommand)]
    Kernel(kernel::KernelCommand),
    /// Send a ZFS snapshot, through interruptions
    ZfsSend(zfs_send::ZfsSendArguments),
    /// The event stream (not in this version)
    #[command(hide = true, disable_help_flag = true)]
    Events(Later),
    /// The HTTP API (not in this version)
    #[command(hide = true, disable_help_flag = true)]
    Serve(Later),
}

/// Arguments of a verb that this version refuses.
#[derive(Debug, Args)]
pub(crate) struct Later {
    /// Whatever was written
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) rest: Vec<String>,
}

/// `fcvm podman ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum PodmanCommand {
    /// Run a command in a new microVM
    Run(Box<run::RunArguments>),
}

/// Form of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For programs: stable, documented in docs/format/json-output.md
    Json,
}

/// `fcvm exec`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fcvm exec web cat /etc/hostname\n  fcvm exec -it web sh\n  echo hi | fcvm exec -i web tee /tmp/file"
)]
pub(crate) struct ExecArguments {
    /// Pass standard input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set an environment variable (NAME=value, or NAME to pass the host's value)
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Run as this user: name or number, with an optional group
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Keep all capabilities
    #[arg(long)]
    pub(crate) privileged: bool,
    /// Name, id or owner PID of the VM
    pub(crate) vm: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// `fcvm ls`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fcvm ls\n  fcvm ls -a --format json\n  fcvm ls --size           memory and disk of each clone\n  fcvm rm $(fcvm ls -aq)"
)]
pub(crate) struct LsArguments {
    /// Also those that have ended
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Only the VM of this owner process
    #[arg(long, value_name = "N")]
    pub(crate) pid: Option<i32>,
    /// Only ids
    #[arg(short, long, conflicts_with_all = ["format", "size"])]
    pub(crate) quiet: bool,
    /// Also what each VM takes: its part of the memory, the memory that is its own, its disk
    #[arg(short, long)]
    pub(crate) size: bool,
    /// Do not shorten ids and commands
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Only VMs that match: name=, id=, label=NAME[=VALUE], status=, ancestor=IMAGE
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<String>,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

/// `fcvm logs`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fcvm logs --tail 20 web\n  fcvm logs -f --since 10m web\n  fcvm logs --console web     what the guest's kernel and agent said"
)]
pub(crate) struct LogsArguments {
    /// Go on with what is written from now on, until the VM ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only the last N lines
    #[arg(long, value_name = "N", default_value = "all")]
    pub(crate) tail: String,
    /// Only what came since: a time (RFC 3339) or an age (90s, 10m, 3h, 2d)
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<String>,
    /// Only what came until: a time (RFC 3339) or an age
    #[arg(long, value_name = "TIME")]
    pub(crate) until: Option<String>,
    /// Show the time of each line
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Show the guest's console in place of the container's output
    #[arg(long, conflicts_with_all = ["timestamps", "since", "until", "follow"])]
    pub(crate) console: bool,
    /// Name, id or owner PID of the VM
    pub(crate) vm: String,
}

/// `fcvm cp`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  fcvm cp web:/etc/hosts .\n  fcvm cp data/. web:/srv/data\n  fcvm cp web:/var/log - | tar t      '-' reads or writes a tar archive"
)]
pub(crate) struct CpArguments {
    /// Keep the owners of the files copied into the VM (they become root's otherwise)
    #[arg(short, long)]
    pub(crate) archive: bool,
    /// Follow a symbolic link at the end of the source path
    #[arg(short = 'L', long)]
    pub(crate) follow_link: bool,
    /// VM:PATH, PATH or '-'
    pub(crate) source: String,
    /// VM:PATH, PATH or '-'
    pub(crate) destination: String,
}

/// `fcvm stop`.
#[derive(Debug, Args)]
pub(crate) struct StopArguments {
    /// Seconds between the stop signal and the end [default: the VM's own, 10]
    #[arg(short, long, value_name = "SECONDS")]
    pub(crate) time: Option<u32>,
    /// All running VMs
    #[arg(short, long)]
    pub(crate) all: bool,
    /// No error when a VM does not exist
    #[arg(short, long)]
    pub(crate) ignore: bool,
    /// Names, ids or owner PIDs of VMs
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) vms: Vec<String>,
}

/// `fcvm kill`.
#[derive(Debug, Args)]
pub(crate) struct KillArguments {
    /// Signal: name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL")]
    pub(crate) signal: String,
    /// All running VMs
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Names, ids or owner PIDs of VMs
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) vms: Vec<String>,
}

/// `fcvm rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArguments {
    /// Stop VMs that run; no error when a VM does not exist
    #[arg(short, long)]
    pub(crate) force: bool,
    /// All VMs
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Names, ids or owner PIDs of VMs
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) vms: Vec<String>,
}

/// `fcvm wait`.
#[derive(Debug, Args)]
pub(crate) struct WaitArguments {
    /// Names, ids or owner PIDs of VMs
    #[arg(required = true)]
    pub(crate) vms: Vec<String>,
}

/// `fcvm inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    /// Names, ids or owner PIDs of VMs; names of images where no VM is called so
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
}

/// `fcvm top`.
#[derive(Debug, Args)]
pub(crate) struct TopArguments {
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// Name, id or owner PID of the VM
    pub(crate) vm: String,
}

/// `fcvm stats`.
#[derive(Debug, Args)]
pub(crate) struct StatsArguments {
    /// Print once and end
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Seconds between two prints
    #[arg(short, long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) interval: u32,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// Tell what memory servers do for the VMs whose memory they have ('fcvm snapshot serve-memory')
    #[arg(long, conflicts_with = "vms")]
    pub(crate) memory: bool,
    /// Names, ids or owner PIDs of VMs [default: all running]
    pub(crate) vms: Vec<String>,
}

/// A verb with VMs and no options.
#[derive(Debug, Args)]
pub(crate) struct VmsArguments {
    /// All VMs to which it applies
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Names, ids or owner PIDs of VMs
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    pub(crate) vms: Vec<String>,
}

/// Reads a VM name for clap.
pub(crate) fn parse_vm_name(text: &str) -> Result<VmName, String> {
    text.parse()
        .map_err(|error: fcvm_types::id::IdError| error.to_string())
}
