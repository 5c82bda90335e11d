//! What `fcvm fork` and `fcvm snapshot run` have in common: the clones.

use anyhow::bail;
use clap::Args;
use fcvm_types::{PortMapping, VmName};

use super::{Format, parse_vm_name};

/// Options of the clones that a command starts.
#[derive(Debug, Args)]
pub(crate) struct CloneArguments {
    /// How many clones, named PREFIX-1, PREFIX-2, ... [default: one]
    #[arg(short = 'n', long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=100))]
    pub(crate) count: Option<u16>,
    /// Beginning of the clones' names, or without -n the very name of the one clone [default: the
    /// name of the VM that they are clones of]
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
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
}

impl CloneArguments {
    /// Refuses what does not go together.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if self.count.is_some_and(|count| count > 1) && !self.publish.is_empty() {
            bail!("-p gives one clone a port: several clones cannot share it");
        }
        Ok(())
    }
}
