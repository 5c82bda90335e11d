//! `fcvm exec`: another process in a running VM.

use fcvm_types::guest::ProcessPlan;
use fcvm_wire::{Outcome, Request};

use super::run::process::{environment, terminal_environment};
use crate::args::ExecArguments;
use crate::attach::terminal_size;
use crate::client::Client;
use crate::context::Context;
use crate::owner::spec::VmSpec;

pub(crate) async fn run(context: &Context, arguments: ExecArguments) -> anyhow::Result<u8> {
    let store = context.state()?;
    let record = store.find(&arguments.vm)?;
    let client = Client::connect(&store, &record).await?;
    let container = VmSpec::of(&store.paths(&record.id))?.process;
    let mut env = container.env;
    if arguments.tty {
        terminal_environment(&mut env);
    }
    for entry in environment(&arguments.env_file, &arguments.env)? {
        super::run::process::set(&mut env, entry);
    }
    let user_differs = arguments.user.is_some();
    let capabilities = if arguments.privileged {
        super::run::capabilities::all()
    } else {
        container.capabilities
    };
    let process = ProcessPlan {
        args: arguments.command,
        env,
        cwd: arguments.workdir.unwrap_or(container.cwd),
        user: if user_differs {
            arguments.user.unwrap_or_default()
        } else {
            container.user
        },
        terminal: arguments.tty.then(terminal_size),
        stdin: arguments.interactive,
        capabilities,
        rlimits: container.rlimits,
        no_new_privileges: container.no_new_privileges,
    };
    let client = client.start(Request::Exec { process }).await?;
    match client.attach(arguments.interactive, arguments.tty).await? {
        Outcome::Exited(status) => Ok(status.shell_code()),
        other => anyhow::bail!("the guest's agent gave an answer that makes no sense ({other:?})"),
    }
}
