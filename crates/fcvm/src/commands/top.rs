//! `fcvm top`: the processes of a VM's container, in the columns of `podman top`.

use fcvm_types::guest::GuestProcess;
use fcvm_wire::{Outcome, Request};

use crate::args::{Format, TopArguments};
use crate::client::Client;
use crate::context::Context;
use crate::errors::printable;
use crate::output::table;

pub(crate) async fn run(context: &Context, arguments: &TopArguments) -> anyhow::Result<u8> {
    let store = context.state()?;
    let record = store.find(&arguments.vm)?;
    let outcome = Client::connect(&store, &record)
        .await?
        .guest(Request::Processes)
        .await?;
    let Outcome::Processes(processes) = outcome else {
        anyhow::bail!("the guest's agent gave an answer that makes no sense ({outcome:?})");
    };
    if arguments.format == Format::Json {
        println!("{}", serde_json::to_string_pretty(&processes)?);
    } else {
        table(
            &[
                "USER", "PID", "PPID", "STAT", "RSS", "TTY", "TIME", "COMMAND",
            ],
            processes.iter().map(row),
        );
    }
    Ok(crate::EXIT_SUCCESS)
}

fn row(process: &GuestProcess) -> Vec<String> {
    let seconds = process.cpu_ns / 1_000_000_000;
    vec![
        printable(&process.user),
        process.pid.to_string(),
        process.parent_pid.to_string(),
        printable(&process.state.to_string()),
        fcvm_types::ByteSize::from_bytes(process.rss_bytes).to_string(),
        printable(&process.tty),
        format!("{}:{:02}", seconds / 60, seconds % 60),
        printable(&process.command),
    ]
}
