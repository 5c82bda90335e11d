//! `fcvm fork`.

use clap::Args;

use super::clones::CloneArguments;

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
    /// The clones
    #[command(flatten)]
    pub(crate) clones: CloneArguments,
    /// Only tell what the fork would cost
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Name, id or owner PID of the VM
    pub(crate) vm: String,
}
