//! `fcvm kernel zpool plan`: describes the devices, shows the plan, runs it where asked.

use std::path::PathBuf;

use anyhow::Context as _;
use fcvm_kernel::zpool::{self, Plan, Request, Role, Workload};
use fcvm_types::ByteSize;
use serde_json::json;

use super::{device, execute, shown};
use crate::EXIT_SUCCESS;
use crate::args::Format;
use crate::args::kernel::zpool::{self as arguments, PlanArguments, ZpoolCommand};
use crate::output;

pub(crate) fn run(command: &ZpoolCommand) -> anyhow::Result<u8> {
    match command {
        ZpoolCommand::Plan(arguments) => plan(arguments),
    }
}

fn plan(arguments: &PlanArguments) -> anyhow::Result<u8> {
    let plan = zpool::plan(&request(arguments)?)?;
    let destroyed = destroyed(arguments)?;
    let obstacles = plan.obstacles(&destroyed);
    match arguments.format {
        Format::Json => {
            let mut value = serde_json::to_value(&plan)?;
            value["obstacles"] = json!(obstacles);
            println!("{}", serde_json::to_string_pretty(&value)?);
        }
        Format::Table => print(&plan, &obstacles),
    }
    if !arguments.yes {
        return Ok(EXIT_SUCCESS);
    }
    anyhow::ensure!(
        obstacles.is_empty(),
        "nothing is run: {}",
        obstacles.join("; ")
    );
    for words in plan.runnable(&destroyed) {
        execute(&words)?;
    }
    Ok(EXIT_SUCCESS)
}

fn request(arguments: &PlanArguments) -> anyhow::Result<Request> {
    let groups = [
        (&arguments.devices, Role::Data),
        (&arguments.special, Role::Special),
        (&arguments.log, Role::Log),
        (&arguments.cache, Role::Cache),
        (&arguments.spare, Role::Spare),
    ];
    let mut devices = Vec::new();
    for (paths, role) in groups {
        for path in paths {
            devices.push((device::describe(path)?, role));
        }
    }
    Ok(Request {
        pool: arguments.pool.clone(),
        devices,
        workload: match arguments.workload {
            arguments::Workload::Vm => Workload::Vm,
            arguments::Workload::Database => Workload::Database,
            arguments::Workload::Files => Workload::Files,
            arguments::Workload::Backup => Workload::Backup,
        },
        layout: arguments.layout,
        ashift: arguments.ashift,
        record_bytes: arguments.record_size.map(ByteSize::bytes),
    })
}

/// The devices that are named a second time, which must have been named a first time.
fn destroyed(arguments: &PlanArguments) -> anyhow::Result<Vec<String>> {
    let real = |path: &PathBuf| {
        std::fs::canonicalize(path).with_context(|| format!("cannot use {}", path.display()))
    };
    let given: Vec<PathBuf> = [
        &arguments.devices,
        &arguments.special,
        &arguments.log,
        &arguments.cache,
        &arguments.spare,
    ]
    .into_iter()
    .flatten()
    .map(real)
    .collect::<anyhow::Result<_>>()?;
    arguments
        .destroy_data
        .iter()
        .map(|path| {
            let real = real(path)?;
            anyhow::ensure!(
                given.contains(&real),
                "--destroy-data {}: name the device among those of the pool too",
                path.display()
            );
            Ok(real.to_string_lossy().into_owned())
        })
        .collect()
}

fn print(plan: &Plan, obstacles: &[String]) {
    println!(
        "{} usable for data; any {} of the devices may fail\n",
        ByteSize::from_bytes(plan.usable_bytes),
        plan.failures_survived
    );
    output::table(
        &["OPTION", "WHY"],
        plan.reasons
            .iter()
            .map(|reason| vec![reason.option.clone(), reason.reason.clone()]),
    );
    for warning in &plan.warnings {
        println!("\nWarning: {warning}");
    }
    println!("\nCommands:");
    for command in &plan.commands {
        let note = if command.example {
            "   # for each volume"
        } else {
            ""
        };
        println!("  {}{note}", shown(&command.words));
    }
    for obstacle in obstacles {
        println!("\nNot to be run: {obstacle}");
    }
}
