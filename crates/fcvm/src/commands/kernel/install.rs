//! `fcvm kernel install`, `entries`, `kexec`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use fcvm_kernel::build::{self, Use};
use fcvm_kernel::install::{self, Action, HostKernel, Options, Plan};
use serde_json::json;

use crate::EXIT_SUCCESS;
use crate::args::Format;
use crate::args::kernel::install::{
    EntriesArguments, InstallArguments, KexecArguments, Loader, RescueArguments,
};
use crate::context::Context;
use crate::output;

/// Where the words are that `fcvm kernel tune --apply-to` wrote.
const TUNED_WORDS: &str = "etc/fcvm/kernel-command-line";
/// Where systems keep the command line for kernels to come.
const SYSTEM_WORDS: &str = "etc/kernel/cmdline";

pub(crate) fn run(context: &Context, arguments: &InstallArguments) -> anyhow::Result<u8> {
    let running = is_running_system(&arguments.root)?;
    let mut kernel = find(context, &arguments.kernel)?;
    if let Some(initrd) = &arguments.initrd {
        kernel.initrd = Some(initrd.clone());
    }
    let options = Options {
        root: arguments.root.clone(),
        esp: arguments.esp.clone(),
        loader: match arguments.loader {
            Loader::Grub => install::Loader::Grub,
            Loader::SystemdBoot => install::Loader::SystemdBoot,
            Loader::EfiStub => install::Loader::EfiStub,
        },
        command_line: command_line(arguments, running)?,
        rescue_initrd: arguments.rescue_initrd.clone(),
    };
    let plan = install::plan(&kernel, &options)?;
    print(&plan, arguments)?;
    if arguments.dry_run {
        return Ok(EXIT_SUCCESS);
    }
    anyhow::ensure!(
        !running || arguments.yes,
        "nothing is changed: {} is the running system, which is changed only with --yes",
        arguments.root.display()
    );
    plan.apply()?;
    Ok(EXIT_SUCCESS)
}

pub(crate) fn entries(arguments: &EntriesArguments) -> anyhow::Result<u8> {
    let entries = install::list(&arguments.root, &arguments.esp)?;
    match arguments.format {
        Format::Json => println!("{}", serde_json::to_string_pretty(&entries)?),
        Format::Table => output::table(
            &["VERSION", "LOADER", "FILE"],
            entries.iter().map(|entry| {
                vec![
                    entry.version.clone(),
                    entry.loader.to_owned(),
                    entry.path.display().to_string(),
                ]
            }),
        ),
    }
    Ok(EXIT_SUCCESS)
}

pub(crate) fn kexec(context: &Context, arguments: &KexecArguments) -> anyhow::Result<u8> {
    let mut kernel = find(context, &arguments.kernel)?;
    if let Some(initrd) = &arguments.initrd {
        kernel.initrd = Some(initrd.clone());
    }
    let way = install::kexec(&arguments.root, &kernel, arguments.command_line.as_deref())?;
    println!("{}", super::shown(&way.load));
    println!("{}", super::shown(&way.start));
    if !arguments.load && !arguments.yes {
        return Ok(EXIT_SUCCESS);
    }
    anyhow::ensure!(
        is_running_system(&arguments.root)?,
        "nothing is loaded: {} is not the running system",
        arguments.root.display()
    );
    super::execute(&way.load)?;
    if arguments.yes {
        super::execute(&way.start)?;
    } else {
        println!(
            "loaded: '{}' ends this system and starts it",
            super::shown(&way.start)
        );
    }
    Ok(EXIT_SUCCESS)
}

pub(crate) fn rescue(arguments: &RescueArguments) -> anyhow::Result<u8> {
    let rescue = install::rescue(&arguments.root, &arguments.add)?;
    let output = &arguments.output;
    fs::write(output, &rescue.bytes)
        .with_context(|| format!("cannot write {}", output.display()))?;
    println!(
        "{} ({:.1} MB, {} programs and libraries)",
        output.display(),
        rescue.bytes.len() as f64 / 1e6,
        rescue.files.len()
    );
    if !rescue.missing.is_empty() {
        eprintln!(
            "note: {} has no {}: install zfsutils-linux there to read pools",
            arguments.root.display(),
            rescue.missing.join(", ")
        );
    }
    Ok(EXIT_SUCCESS)
}

/// The kernel in a directory, or the built one of this name.
fn find(context: &Context, name: &str) -> anyhow::Result<HostKernel> {
    let given = PathBuf::from(name);
    if name.contains('/') || given.is_dir() {
        let directory = fs::canonicalize(&given)
            .with_context(|| format!("there is no kernel in {}", given.display()))?;
        return Ok(HostKernel::in_directory(&directory)?);
    }
    let kernel = build::find(&super::build::directories(context), name)?;
    anyhow::ensure!(
        kernel.used_for == Use::Host,
        "{} is a guest's kernel and boots no host: build one of host-latency or host-full",
        kernel.name
    );
    kernel.check()?;
    Ok(HostKernel {
        vmlinuz: kernel.image_path(),
        config: Some(kernel.config_path()),
        initrd: None,
    })
}

fn is_running_system(root: &Path) -> anyhow::Result<bool> {
    let real = fs::canonicalize(root)
        .with_context(|| format!("cannot use the root directory {}", root.display()))?;
    Ok(real == Path::new("/"))
}

fn command_line(arguments: &InstallArguments, running: bool) -> anyhow::Result<String> {
    let read = |path: &str| fs::read_to_string(arguments.root.join(path));
    let mut line = match &arguments.command_line {
        Some(line) => line.clone(),
        None => match read(SYSTEM_WORDS) {
            Ok(line) => line,
            Err(_) if running => install::running(&read("proc/cmdline").unwrap_or_default()),
            Err(_) => String::new(),
        },
    };
    if arguments.tuned {
        let words = read(TUNED_WORDS).with_context(|| {
            format!(
                "cannot read {}: write it with 'fcvm kernel tune --apply-to {}'",
                arguments.root.join(TUNED_WORDS).display(),
                arguments.root.display()
            )
        })?;
        line = format!("{} {}", line.trim(), words.trim());
    }
    Ok(line.trim().to_owned())
}

fn print(plan: &Plan, arguments: &InstallArguments) -> anyhow::Result<()> {
    if arguments.format == Format::Json {
        let mut value = serde_json::to_value(plan)?;
        value["dry_run"] = json!(arguments.dry_run);
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    output::table(
        &["ACTION", "FILE", "WHAT FOR"],
        plan.changes.iter().map(|change| {
            let action = match change.action {
                Action::Create => "create",
                Action::Replace => "replace",
                Action::Keep => "keep",
            };
            let path = arguments.root.join(&change.path);
            vec![
                action.to_owned(),
                path.display().to_string(),
                change.reason.clone(),
            ]
        }),
    );
    for remark in &plan.remarks {
        println!("\n{remark}");
    }
    Ok(())
}
