//! `fcvm fork`.

use clap::Args;
use fcvm_types::{PortMapping, VmName};

use super::{Format, parse_vm_name};

/// `fcvm fork`.
#[derive(Debug, Args)]
#[command(
    after_help = "Each clone has the source's memory, processes and files as they are at this instant,\n\
        shared until it writes, and a disk, a network and random numbers of its own. The source goes\n\
        on after a pause of some milliseconds; its connections and exec sessions stay its own.\n\n\
        Examples:\n  \
        fcvm fork web                              one clone, web-1\n  \
        fcvm fork web -n 20 --name try             try-1 to try-20\n  \
        fcvm fork web --name blue -p 8081:80       one clone, blue, that publishes a port\n  \
        fcvm fork web -n 3 --exec 'cat /etc/hostname'\n  \
        fcvm fork web -n 50 --dry-run              what it would cost"
)]
pub(crate) struct ForkArguments {
    /// How many clones, named PREFIX-1, PREFIX-2, ... [default: one]
    #[arg(short = 'n', long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=100))]
    pub(crate) count: Option<u16>,
    /// Beginning of the clones' names, or without -n the very name of the one clone [default: the
    /// source's name]
    #[arg(long, value_name = "PREFIX", value_parser = parse_vm_name)]
    pub(crate) name: Option<VmName>,
    /// Run a shell command in each clone as soon as it is there, and print what it says
    #[arg(long, value_name = "CMD")]
    pub(crate) exec: Option<String>,
    /// Publish a port of the clone, as in 'fcvm run'; only with a single clone
    #[arg(short, long, value_name = "[IP:]HOST:GUEST[/PROTO]")]
    pub(crate) publish: Vec<PortMapping>,
    /// Remove the clones when their containers have ended
    #[arg(long)]
    pub(crate) rm: bool,
    /// Only tell what the fork would cost
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// Name, id or owner PID of the VM
    pub(crate) vm: String,
}
