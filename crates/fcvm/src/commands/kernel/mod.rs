//! `fcvm kernel`.

mod device;
mod tune;
mod zpool;

use crate::args::kernel::KernelCommand;

/// `fcvm kernel ...`.
pub(crate) fn run(command: KernelCommand) -> anyhow::Result<u8> {
    match command {
        KernelCommand::Tune(arguments) => tune::run(&arguments),
        KernelCommand::Zpool(command) => zpool::run(&command),
    }
}
