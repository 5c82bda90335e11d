//! The fcvm command line: reads the arguments and the environment, and dispatches to `commands/`.
//!
//! Nothing else of the project reads the environment or the terminal.

#![forbid(unsafe_code)]

mod args;
mod attach;
mod client;
mod commands;
mod connection;
mod context;
mod disks;
mod errors;
mod handover;
mod logging;
mod output;
mod owner;
mod progress;
mod signals;
mod state;
mod template;
mod warm;

use std::process::ExitCode;

use clap::Parser;

use args::{Arguments, Command, PodmanCommand};
use context::Context;
use errors::{EXIT_FCVM_FAILED, refuse_later};

fn main() -> ExitCode {
    errors::end_with_lost_output();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return errors::report_usage(&error),
    };
    if let Err(error) = logging::start(&arguments.global.log_level) {
        return errors::report(&error);
    }
    // One thread runs everything asynchronous: helper processes get their death signal from the
    // thread that started them, so that thread has to be the one that lives longest.
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return errors::report(&anyhow::Error::new(error).context("cannot start")),
    };
    let local = tokio::task::LocalSet::new();
    let result = Context::from_environment(&arguments.global).and_then(|context| {
        runtime.block_on(local.run_until(dispatch(&context, arguments.command)))
    });
    // Threads that block in a read of the terminal must not hold the process.
    runtime.shutdown_background();
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => errors::report(&error),
    }
}

async fn dispatch(context: &Context, command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Run(arguments) | Command::Podman(PodmanCommand::Run(arguments)) => {
            commands::run::run(context, *arguments).await
        }
        Command::Prepare(arguments) => commands::prepare::run(context, *arguments).await,
        Command::ProbeGuest => commands::setup::probe_guest(),
        Command::JailInit { command } => commands::setup::jail_init(&command),
        Command::MakeTap => commands::setup::make_tap(),
        Command::Owner { clone: false } => commands::run::owner(context).await,
        Command::Owner { clone: true } => commands::clones::owner(context).await,
        Command::Snapshot(command) => commands::snapshot::run(context, command).await,
        Command::Fork(arguments) => commands::fork::run(context, &arguments).await,
        Command::Exec(arguments) => commands::exec::run(context, arguments).await,
        Command::Ls(arguments) => commands::ls::run(context, &arguments).await,
        Command::Logs(arguments) => commands::logs::run(context, &arguments).await,
        Command::Cp(arguments) => commands::cp::run(context, &arguments).await,
        Command::Stop(arguments) => commands::lifecycle::stop(context, &arguments).await,
        Command::Kill(arguments) => commands::lifecycle::kill(context, &arguments).await,
        Command::Rm(arguments) => commands::lifecycle::rm(context, &arguments).await,
        Command::Wait(arguments) => commands::lifecycle::wait(context, &arguments).await,
        Command::Pause(arguments) => commands::lifecycle::pause(context, &arguments).await,
        Command::Unpause(arguments) => commands::lifecycle::unpause(context, &arguments).await,
        Command::Inspect(arguments) => commands::inspect::run(context, &arguments),
        Command::Top(arguments) => commands::top::run(context, &arguments).await,
        Command::Stats(arguments) => commands::stats::run(context, &arguments).await,
        Command::Image(command) => commands::image::run(context, command).await,
        Command::Pool(arguments) => commands::pool::run(context, arguments),
        Command::Setup(arguments) => commands::setup::run(context, arguments).await,
        Command::System(command) => commands::system::run(context, command).await,
        Command::Test(command) => commands::sanity::run(context, command).await,
        Command::Completion { shell } => commands::documentation::completion(shell),
        Command::Man { directory } => commands::documentation::man(&directory),
        Command::Kernel(command) => commands::kernel::run(context, command),
        Command::ZfsSend(arguments) => commands::zfs_send::run(&arguments),
        Command::Events(_) => refuse_later("events"),
        Command::Serve(_) => refuse_later("serve"),
    }
}

/// The code of a successful command.
pub(crate) const EXIT_SUCCESS: u8 = 0;
const _: () = assert!(EXIT_SUCCESS != EXIT_FCVM_FAILED);
