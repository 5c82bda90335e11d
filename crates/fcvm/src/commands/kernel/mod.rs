//! `fcvm kernel`.

mod tune;

use crate::args::kernel::KernelCommand;

/// `fcvm kernel ...`.
pub(crate) fn run(command: KernelCommand) -> anyhow::Result<u8> {
    match command {
        KernelCommand::Tune(arguments) => tune::run(&arguments),
    }
}
