//! `fcvm kernel`.

mod answers;
pub(crate) mod build;
mod device;
mod install;
mod tune;
mod zpool;

use anyhow::Context as _;

pub(crate) use device::search_path;

use crate::args::kernel::KernelCommand;
use crate::context::Context;

/// `fcvm kernel ...`.
pub(crate) fn run(context: &Context, command: KernelCommand) -> anyhow::Result<u8> {
    match command {
        KernelCommand::Source(command) => build::run(context, command),
        KernelCommand::Tune(arguments) => tune::run(&arguments),
        KernelCommand::Zpool(command) => zpool::run(&command),
        KernelCommand::Install(arguments) => install::run(context, &arguments),
        KernelCommand::Entries(arguments) => install::entries(&arguments),
        KernelCommand::RescueInitramfs(arguments) => install::rescue(&arguments),
        KernelCommand::Kexec(arguments) => install::kexec(context, &arguments),
    }
}

/// A command as one can paste it.
pub(crate) fn shown(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    let quoted: Vec<String> = words
        .iter()
        .map(|word| {
            if !word.is_empty() && word.chars().all(plain) {
                word.clone()
            } else {
                format!("'{}'", word.replace('\'', "'\\''"))
            }
        })
        .collect();
    quoted.join(" ")
}

/// Runs a command that was shown.
pub(crate) fn execute(words: &[String]) -> anyhow::Result<()> {
    eprintln!("+ {}", shown(words));
    let status = std::process::Command::new(&words[0])
        .args(&words[1..])
        .env("PATH", device::search_path())
        .status()
        .with_context(|| format!("cannot start '{}': install zfsutils-linux", words[0]))?;
    anyhow::ensure!(status.success(), "'{}' failed: {status}", shown(words));
    Ok(())
}
