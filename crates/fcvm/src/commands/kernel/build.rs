//! `fcvm kernel build` and its like: kernels from source, by profile.

use std::fs;
use std::io::{IsTerminal, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use fcvm_kernel::build::{
    self, BuildOptions, BuiltKernel, Directories, Lto, Profile, Resolved, Scope, Source, SourceSpec,
};
use fcvm_kernel::{SetupEvent, SetupStage};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::args::Format;
use crate::args::kernel::build::{
    BuildArguments, ConfigArguments, ConfigInputs, LtoChoice, SourceCommand, ZfsChoice,
};
use crate::context::Context;
use crate::output::{age, table};

/// Exit code of `config` where a symbol was lost.
const EXIT_LOST: u8 = 1;
/// Lines of progress where stderr is no terminal: one for each tenth.
const TENTHS: u64 = 10;
/// Largest fragment or configuration.
const TEXT_MAX_BYTES: u64 = 8 << 20;

pub(crate) fn run(context: &Context, command: SourceCommand) -> anyhow::Result<u8> {
    let directories = directories(context);
    match command {
        SourceCommand::Profiles { name, format } => profiles(name.as_deref(), format)?,
        SourceCommand::Config(arguments) => return config(context, &arguments),
        SourceCommand::Build(arguments) => build_command(context, &arguments)?,
        SourceCommand::Ls { quiet, format } => ls(&directories, quiet, format)?,
        SourceCommand::Show { name, format } => show(&build::find(&directories, &name)?, format)?,
        SourceCommand::Rm { names } => {
            for name in names {
                let kernel = build::find(&directories, &name)?;
                build::remove(&directories, &kernel)?;
                println!("{}", kernel.name);
            }
        }
        SourceCommand::Diff {
            first,
            second,
            format,
        } => diff(&directories, &first, &second, format)?,
    }
    Ok(crate::EXIT_SUCCESS)
}

/// Where kernels from source are.
pub(crate) fn directories(context: &Context) -> Directories {
    Directories::new(&context.data_dir.join("kernels"))
}

/// Builds a kernel of a built-in profile of the default source, or takes the one that is there.
pub(crate) fn build_default(context: &Context, profile: &str) -> anyhow::Result<BuiltKernel> {
    let inputs = ConfigInputs {
        profile: profile.to_owned(),
        source: "debian:6.1".to_owned(),
        set: Vec::new(),
        fragment: Vec::new(),
        zfs: None,
        lto: LtoChoice::None,
    };
    build_kernel(
        context,
        &inputs,
        BuildOptions::default(),
        None,
        &mut Shown::new(false),
    )
}

/// The version of OpenZFS that an image of a suite needs for the kernels that are built.
pub(crate) fn zfs_for_suite(context: &Context, suite: &str) -> anyhow::Result<String> {
    let kernels = build::list(&directories(context))?;
    Ok(build::zfs_version_for_suite(&kernels, suite)?)
}

fn lto(choice: LtoChoice) -> Lto {
    match choice {
        LtoChoice::None => Lto::None,
        LtoChoice::Thin => Lto::Thin,
        LtoChoice::Full => Lto::Full,
    }
}

/// The profile with the user's changes.
fn profile(inputs: &ConfigInputs) -> anyhow::Result<Profile> {
    let mut profile = Profile::load(&inputs.profile)?;
    if let Some(choice) = inputs.zfs {
        profile.set_zfs(choice == ZfsChoice::Builtin)?;
    }
    for path in &inputs.fragment {
        let text = read_text(path)?;
        profile.add_fragment(&path.display().to_string(), &text)?;
    }
    let mut settings = inputs.set.clone();
    settings.extend(lto(inputs.lto).setting().map(str::to_owned));
    profile.set(&settings)?;
    Ok(profile)
}

fn read_text(path: &Path) -> anyhow::Result<String> {
    let metadata = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if metadata.len() > TEXT_MAX_BYTES {
        bail!("{} is larger than a configuration can be", path.display());
    }
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn fetch(
    context: &Context,
    inputs: &ConfigInputs,
    scope: Scope,
    shown: &mut Shown,
) -> anyhow::Result<Source> {
    let spec: SourceSpec = inputs.source.parse()?;
    let directory = directories(context).sources;
    Ok(build::fetch(&directory, &spec, scope, &mut |event| {
        shown.event(&event)
    })?)
}

fn profiles(name: Option<&str>, format: Format) -> anyhow::Result<()> {
    let Some(name) = name else {
        let profiles = Profile::built_in()?;
        return match format {
            Format::Json => print_json(&profiles.iter().map(profile_json).collect::<Vec<_>>()),
            Format::Table => {
                let rows = profiles.iter().map(|profile| {
                    let count = profile.requests().count().to_string();
                    vec![profile.name.clone(), count, profile.summary.clone()]
                });
                table(&["PROFILE", "SYMBOLS", "WHAT IT IS"], rows);
                Ok(())
            }
        };
    };
    let profile = Profile::load(name)?;
    if format == Format::Json {
        let lines: Vec<_> = profile
            .requests()
            .map(|request| {
                json!({
                    "symbol": request.symbol, "value": request.value, "section": request.section,
                    "why": request.why, "cost": request.cost, "optional": request.optional,
                    "formerly": request.formerly,
                })
            })
            .collect();
        return print_json(&lines);
    }
    let mut requests: Vec<_> = profile.requests().collect();
    requests.sort_by_key(|request| (&request.section, &request.symbol));
    let rows = requests.into_iter().map(|request| {
        vec![
            request.section.clone(),
            format!("{}={}", request.symbol, request.value),
            request.why.clone(),
            request.cost.clone(),
        ]
    });
    table(&["PART", "SYMBOL", "WHY", "COST"], rows);
    Ok(())
}

fn profile_json(profile: &Profile) -> serde_json::Value {
    json!({
        "name": profile.name, "summary": profile.summary, "use": profile.used_for,
        "symbol_count": profile.requests().count(),
    })
}

fn print_json<T: serde::Serialize>(value: &T) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

fn config(context: &Context, arguments: &ConfigArguments) -> anyhow::Result<u8> {
    let mut inputs = arguments.inputs.clone();
    if let Some(path) = &arguments.answers.save_profile {
        super::answers::save(&arguments.answers, inputs.zfs, path)?;
        inputs.profile = path.display().to_string();
    }
    let inputs = &inputs;
    let profile = profile(inputs)?;
    let options = BuildOptions {
        lto: lto(inputs.lto),
        search_path: context.search_path.clone(),
        ..BuildOptions::default()
    };
    let headers = false;
    build::check_tools(
        &context.search_path,
        inputs.lto != LtoChoice::None,
        &[],
        headers,
    )?;
    let mut shown = Shown::new(false);
    let source = fetch(context, inputs, Scope::Configuration, &mut shown)?;
    let directory = directories(context).resolving(&source);
    let started = Instant::now();
    let resolved = build::resolve(&source, &profile, &directory, &options.make())?;
    shown.end();
    report(&resolved);
    if let Some(path) = &arguments.output {
        match path.as_os_str() == "-" {
            true => std::io::stdout().write_all(resolved.text.as_bytes())?,
            false => fs::write(path, &resolved.text)
                .with_context(|| format!("cannot write {}", path.display()))?,
        }
    } else if arguments.format == Format::Json {
        let lines = |lost: &[build::Lost]| {
            lost.iter()
                .map(|lost| {
                    json!({
                        "symbol": lost.request.symbol, "wanted": lost.request.value,
                        "found": lost.found, "reason": lost.reason,
                        "optional": lost.request.optional,
                    })
                })
                .collect::<Vec<_>>()
        };
        print_json(&json!({
            "profile": profile.name, "source": source.spec.to_string(), "release": source.release,
            "asked": resolved.requests.len(), "on": resolved.values.len(),
            "lost": lines(&resolved.lost), "absent": lines(&resolved.absent),
        }))?;
    } else if resolved.lost.is_empty() {
        println!(
            "{} on Linux {}: {} symbols asked for, all there{}; {} on in all ({:.1} s)",
            profile.name,
            source.release,
            resolved.requests.len(),
            match resolved.absent.len() {
                0 => String::new(),
                count => format!(" but {count} that may be missing"),
            },
            resolved.values.len(),
            started.elapsed().as_secs_f64(),
        );
    }
    Ok(match resolved.lost.is_empty() {
        true => crate::EXIT_SUCCESS,
        false => EXIT_LOST,
    })
}

/// Tells what was lost, what may be missing, and which defences are off.
fn report(resolved: &Resolved) {
    for warning in &resolved.warnings {
        eprintln!("warning: {warning}");
    }
    for lost in &resolved.absent {
        let reason = lost.request.optional.as_deref().unwrap_or_default();
        eprintln!(
            "note: CONFIG_{} is {}: {reason}",
            lost.request.symbol, lost.found
        );
    }
    for lost in &resolved.lost {
        eprintln!("Error: {lost}");
    }
}

fn build_command(context: &Context, arguments: &BuildArguments) -> anyhow::Result<()> {
    let options = BuildOptions {
        march: arguments.march.clone(),
        ..BuildOptions::default()
    };
    let started = Instant::now();
    let mut shown = Shown::new(arguments.quiet);
    let kernel = build_kernel(
        context,
        &arguments.inputs,
        options,
        arguments.jobs,
        &mut shown,
    )?;
    let package = match &arguments.deb {
        Some(directory) => Some(build::package(&kernel, directory)?),
        None => None,
    };
    if arguments.quiet {
        println!("{}", kernel.name);
        return Ok(());
    }
    let (vmlinux, image) = kernel.sizes_bytes();
    println!(
        "{} in {:.1} s",
        kernel.name,
        started.elapsed().as_secs_f64()
    );
    println!(
        "  vmlinux  {} ({:.1} MB)",
        kernel.vmlinux_path().display(),
        vmlinux as f64 / 1e6
    );
    println!(
        "  bzImage  {} ({:.1} MB)",
        kernel.image_path().display(),
        image as f64 / 1e6
    );
    if let Some(package) = package {
        println!("  package  {}", package.display());
    }
    Ok(())
}

fn build_kernel(
    context: &Context,
    inputs: &ConfigInputs,
    mut options: BuildOptions,
    jobs: Option<u16>,
    shown: &mut Shown,
) -> anyhow::Result<BuiltKernel> {
    let profile = profile(inputs)?;
    options.lto = lto(inputs.lto);
    options.search_path.clone_from(&context.search_path);
    options.jobs = jobs.map_or_else(
        || std::thread::available_parallelism().map_or(1, usize::from),
        usize::from,
    );
    options.check()?;
    build::check_tools(&context.search_path, options.lto != Lto::None, &[], true)?;
    let source = fetch(context, inputs, Scope::Whole, shown)?;
    let directories = directories(context);
    let zfs = match profile.has_zfs() && source.is_fixed {
        true => Some(build::fetch_zfs(
            &directories.sources,
            &source,
            &mut |event| shown.event(&event),
        )?),
        false => None,
    };
    if profile.has_zfs() {
        eprintln!("note: {}", build::ZFS_LICENCE_REMARK);
    }
    let plan = build::plan(&directories, source, zfs, profile, options)?;
    report(&plan.resolved);
    let kernel = build::build(&directories, &plan, &mut |event| shown.event(&event))?;
    shown.end();
    Ok(kernel)
}

fn ls(directories: &Directories, quiet: bool, format: Format) -> anyhow::Result<()> {
    let kernels = build::list(directories)?;
    if quiet {
        kernels
            .iter()
            .for_each(|kernel| println!("{}", kernel.name));
        return Ok(());
    }
    let selected = build::selected(directories).ok().flatten();
    let is_selected = |kernel: &BuiltKernel| {
        selected
            .as_ref()
            .is_some_and(|selected| selected.name == kernel.name)
    };
    if format == Format::Json {
        let list: Vec<_> = kernels
            .iter()
            .map(|kernel| {
                let (vmlinux, image) = kernel.sizes_bytes();
                json!({
                    "name": kernel.name, "profile": kernel.profile, "use": kernel.used_for,
                    "source": kernel.source, "release": kernel.release, "compiler": kernel.compiler,
                    "vmlinux_bytes": vmlinux, "image_bytes": image,
                    "built_at_seconds": kernel.built_at_seconds, "selected": is_selected(kernel),
                })
            })
            .collect();
        return print_json(&list);
    }
    let rows = kernels.iter().map(|kernel| {
        let (vmlinux, image) = kernel.sizes_bytes();
        let built = std::time::UNIX_EPOCH + Duration::from_secs(kernel.built_at_seconds);
        vec![
            kernel.name.clone(),
            kernel.source.clone(),
            format!("{:.1} MB", vmlinux as f64 / 1e6),
            format!("{:.1} MB", image as f64 / 1e6),
            age(built.into()),
            if is_selected(kernel) {
                "guests boot it"
            } else {
                ""
            }
            .to_owned(),
        ]
    });
    let header = ["NAME", "SOURCE", "VMLINUX", "BZIMAGE", "BUILT", ""];
    table(&header, rows);
    Ok(())
}

fn show(kernel: &BuiltKernel, format: Format) -> anyhow::Result<()> {
    if format == Format::Json {
        return print_json(kernel);
    }
    let (vmlinux, image) = kernel.sizes_bytes();
    println!("name      {}", kernel.name);
    println!("release   {}", kernel.release);
    println!("source    {} ({})", kernel.source, kernel.source_id);
    println!("compiler  {}", kernel.compiler);
    if let Some(zfs) = &kernel.zfs {
        println!("OpenZFS   {} ({})", zfs.version, zfs.package);
    }
    if kernel.has_zfs() {
        println!("licence   {}", build::ZFS_LICENCE_REMARK);
    }
    println!(
        "vmlinux   {} ({vmlinux} bytes)",
        kernel.vmlinux_path().display()
    );
    println!(
        "bzImage   {} ({image} bytes)",
        kernel.image_path().display()
    );
    println!("config    {}", kernel.config_path().display());
    let mut symbols: Vec<_> = kernel.symbols.iter().collect();
    symbols.sort_by_key(|line| (&line.section, &line.symbol));
    let rows = symbols.into_iter().map(|line| {
        let value = match &line.replaced {
            Some(replaced) => format!("{}={} (profile: {replaced})", line.symbol, line.result),
            None => format!("{}={}", line.symbol, line.result),
        };
        vec![
            line.section.clone(),
            value,
            line.why.clone(),
            line.cost.clone(),
        ]
    });
    table(&["PART", "SYMBOL", "WHY", "COST"], rows);
    Ok(())
}

fn diff(
    directories: &Directories,
    first: &str,
    second: &str,
    format: Format,
) -> anyhow::Result<()> {
    let read = |name: &str| -> anyhow::Result<_> {
        let text = match name.contains('/') {
            true => read_text(Path::new(name))?,
            false => build::find(directories, name)?.config()?,
        };
        Ok(build::parse_config(&text))
    };
    let differing = build::difference(&read(first)?, &read(second)?);
    if format == Format::Json {
        let list: Vec<_> = differing
            .iter()
            .map(|line| json!({"symbol": line.symbol, "first": line.first, "second": line.second}))
            .collect();
        return print_json(&list);
    }
    let rows = differing
        .iter()
        .map(|line| vec![line.symbol.clone(), line.first.clone(), line.second.clone()]);
    table(&["SYMBOL", first, second], rows);
    Ok(())
}

/// Progress on stderr: a bar on a terminal, a line now and then elsewhere.
struct Shown {
    bar: Option<ProgressBar>,
    quiet: bool,
    stage: Option<SetupStage>,
    tenth: u64,
    started: Instant,
    started_at: u64,
}

impl Shown {
    fn new(quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_style(
                ProgressStyle::with_template("{spinner} {msg} {elapsed}")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner()),
            );
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self {
            bar,
            quiet,
            stage: None,
            tenth: 0,
            started: Instant::now(),
            started_at: 0,
        }
    }

    fn event(&mut self, event: &SetupEvent) {
        if self.stage != Some(event.stage) {
            self.stage = Some(event.stage);
            self.tenth = 0;
            self.started = Instant::now();
            self.started_at = event.done;
            if self.bar.is_none() && !self.quiet {
                eprintln!("{}", crate::commands::setup::describe(event));
            }
        }
        let text = self.text(event);
        if let Some(bar) = &self.bar {
            bar.set_message(text);
            return;
        }
        let total = event.total.unwrap_or(0).max(1);
        let tenth = event.done.saturating_mul(TENTHS) / total;
        if event.stage == SetupStage::Build && tenth > self.tenth && !self.quiet {
            self.tenth = tenth;
            eprintln!("{text}");
        }
    }

    fn text(&self, event: &SetupEvent) -> String {
        let (SetupStage::Build, Some(total)) = (event.stage, event.total) else {
            return crate::commands::setup::describe(event);
        };
        let done_here = event.done.saturating_sub(self.started_at);
        let left = match done_here {
            0..20 => String::new(),
            _ => {
                let seconds = self.started.elapsed().as_secs_f64() / done_here as f64
                    * total.saturating_sub(event.done) as f64;
                format!(", about {} min left", (seconds / 60.0).ceil())
            }
        };
        format!(
            "building: {} of {total} objects{left} ({})",
            event.done, event.detail
        )
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
