//! `fcvm zfs-send`.

use clap::Args;

/// `fcvm zfs-send`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        fcvm zfs-send tank/vms@monday backup/vms              to another pool of this host\n  \
        fcvm zfs-send tank/vms@monday backup/vms --ssh nas    through ssh, with a key\n\n\
        The newest snapshot that both sides have is where an incremental stream begins. An interrupted stream goes on\n\
        from the state that the destination kept (zfs receive -s), in this run or the next. The snapshot is held\n\
        meanwhile. Nothing at the destination is overwritten or rolled back.")]
pub(crate) struct ZfsSendArguments {
    /// The host of the destination
    #[arg(long, value_name = "[USER@]HOST")]
    pub(crate) ssh: Option<String>,
    /// Send encrypted data as it is
    #[arg(long)]
    pub(crate) raw: bool,
    /// Attempts without progress before it gives up
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) attempts: u32,
    /// Print nothing but errors
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The snapshot: POOL/DATASET@SNAPSHOT
    pub(crate) source: String,
    /// The dataset that receives it: POOL/DATASET
    pub(crate) destination: String,
}
