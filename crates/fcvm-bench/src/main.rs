//! `fcvm-bench`: measures the fcvm binary from outside, against a floor or a peer in the same run.
//!
//! What is measured is what users start, except for the conversion of images, which `fcvm` does only
//! on the way to a VM: there the library is called in a process of its own; for the relay of a
//! VM's network, whose two sides are played here; and for the memory server, whose clients are
//! processes of this program. A part whose tools are
//! missing is skipped in one line. docs/design/performance.md tells what each figure means.

#![forbid(unsafe_code)]

mod boot;
mod conditions;
mod conversion;
mod forks;
mod images;
mod kernels;
mod lab;
mod memory;
mod process;
mod relay;
mod report;
mod restore;
mod session;
mod streams;
mod uffd;
mod warm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};

use lab::Lab;
use report::Report;

const USAGE: &str = "\
Usage: fcvm-bench [OPTIONS]
  --fcvm FILE        the binary to measure [default: beside this program]
  --agent FILE       the guest's agent [default: as fcvm finds it]
  --data-dir DIR     images and kernels, kept between runs [default: target/bench-data]
  --output FILE      results as JSON [default: target/bench-results.json]
  --rounds N         rounds of what is measured alternately [default: 7]
  --quick            a few samples of each of fork, clones and pause
  --only NAME,...    boot, warm, session, streams, memory, relay,
                     conversion, fork, clones, pause, restore, uffd, kernels [default: all]
  --peer-kernel FILE a vmlinux to boot beside guest-min and the packaged kernel";

/// What the command line asks for.
struct Options {
    fcvm: PathBuf,
    agent: Option<PathBuf>,
    data_dir: PathBuf,
    output: PathBuf,
    rounds: usize,
    quick: bool,
    only: Vec<String>,
    peer_kernel: Option<String>,
}

impl Options {
    fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == part)
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fcvm-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [conversion::CHILD, store, source] =
        arguments.iter().map(String::as_str).collect::<Vec<_>>()[..]
    {
        return conversion::convert(store.as_ref(), source);
    }
    if let [uffd::CHILD, backing] = arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        return uffd::client(backing);
    }
    let Some(options) = parse()? else {
        println!("{USAGE}");
        return Ok(());
    };
    let needs_lab = options.only.iter().any(|part| part != "uffd") || options.only.is_empty();
    let lab = needs_lab.then(|| Lab::prepare(&options)).transpose()?;
    let mut report = Report::new(conditions::read(lab.as_ref(), options.rounds));
    if options.wants("uffd") {
        uffd::measure(options.rounds, &mut report).context("uffd")?;
    }
    if let Some(lab) = &lab {
        measure_vms(&options, lab, &mut report)?;
    }
    report.conditions.load_after = conditions::load();
    println!("{report}");
    let json = serde_json::to_vec_pretty(&report)?;
    std::fs::write(&options.output, json)
        .with_context(|| format!("cannot write {}", options.output.display()))?;
    println!("{}", options.output.display());
    Ok(())
}

/// What takes VMs, or fcvm's programs.
fn measure_vms(options: &Options, lab: &Lab, report: &mut Report) -> anyhow::Result<()> {
    if options.wants("boot") {
        boot::measure(lab, options.rounds, report).context("boot")?;
    }
    if ["session", "streams", "memory"]
        .iter()
        .any(|part| options.wants(part))
    {
        let vm = lab.start_vm()?;
        let shown = lab.inspect(&vm.name)?;
        report.conditions.accelerator = shown["accelerator"].as_str().map(str::to_owned);
        if options.wants("memory") {
            memory::measure(lab, &vm, report).context("memory")?;
        }
        if options.wants("session") {
            session::measure(lab, &vm, report).context("session")?;
        }
        if options.wants("streams") {
            streams::measure(lab, &vm, report).context("streams")?;
        }
    }
    if options.wants("warm") {
        warm::measure(lab, options.rounds, report).context("warm")?;
    }
    if options.wants("restore") {
        restore::measure(lab, options.rounds, report).context("restore")?;
    }
    if options.wants("kernels") {
        let peer = options.peer_kernel.as_deref();
        kernels::measure(lab, peer, options.rounds, report).context("kernels")?;
    }
    if options.wants("relay") {
        relay::measure(options.rounds, report).context("relay")?;
    }
    if options.wants("conversion") {
        conversion::measure(lab, options.rounds, report).context("conversion")?;
    }
    if ["fork", "clones", "pause"]
        .iter()
        .any(|part| options.wants(part))
    {
        let scale = forks::Scale::new(options.rounds, options.quick);
        forks::measure(lab, |part| options.wants(part), scale, report)?;
    }
    Ok(())
}

/// The options; `None` when help was asked for.
fn parse() -> anyhow::Result<Option<Options>> {
    use lexopt::prelude::*;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut options = Options {
        fcvm: program.with_file_name("fcvm"),
        agent: None,
        data_dir: PathBuf::from("target/bench-data"),
        output: PathBuf::from("target/bench-results.json"),
        rounds: 7,
        quick: false,
        only: Vec::new(),
        peer_kernel: None,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("fcvm") => options.fcvm = parser.value()?.into(),
            Long("agent") => options.agent = Some(parser.value()?.into()),
            Long("data-dir") => options.data_dir = parser.value()?.into(),
            Long("output") => options.output = parser.value()?.into(),
            Long("rounds") => options.rounds = parser.value()?.parse()?,
            Long("quick") => options.quick = true,
            Long("only") => {
                options.only = parser
                    .value()?
                    .string()?
                    .split(',')
                    .map(str::to_owned)
                    .collect();
            }
            Long("peer-kernel") => options.peer_kernel = Some(parser.value()?.string()?),
            Short('h') | Long("help") => return Ok(None),
            other => return Err(other.unexpected().into()),
        }
    }
    if options.rounds == 0 {
        bail!("--rounds 0 measures nothing: 1 is the least");
    }
    const PARTS: [&str; 13] = [
        "boot",
        "warm",
        "session",
        "streams",
        "memory",
        "relay",
        "conversion",
        "fork",
        "clones",
        "pause",
        "restore",
        "uffd",
        "kernels",
    ];
    if let Some(unknown) = options
        .only
        .iter()
        .find(|name| !PARTS.contains(&name.as_str()))
    {
        bail!("'{unknown}' is no part: {} are", PARTS.join(", "));
    }
    Ok(Some(options))
}
