//! `fcvm kernel tune`: reads the machine, shows the plan, writes it where asked.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use fcvm_kernel::tuning::{
    self, ArcChoice, Place, Plan, PlannedFile, Request, ZfsVersion, machine,
};
use fcvm_types::ByteSize;
use serde_json::json;

use crate::EXIT_SUCCESS;
use crate::args::Format;
use crate::args::kernel::tune::{ArcMax, Hugepages, TuneArguments, Workload};
use crate::output;

const MEMINFO: &str = "/proc/meminfo";
const CPUS_ONLINE: &str = "/sys/devices/system/cpu/online";
const ZFS_VERSION: &str = "/sys/module/zfs/version";
/// There where ZFS is a module; a built-in one has no such directory.
const ZFS_MODULE_STATE: &str = "/sys/module/zfs/initstate";
/// Assumed where none is loaded: the one with the larger default.
const ZFS_ASSUMED: ZfsVersion = ZfsVersion { major: 2, minor: 3 };

pub(crate) fn run(arguments: &TuneArguments) -> anyhow::Result<u8> {
    let plan = tuning::plan(&request(arguments)?)?;
    let zfs_built_in = Path::new(ZFS_VERSION).exists() && !Path::new(ZFS_MODULE_STATE).exists();
    let files = plan.files(zfs_built_in);
    if let Some(root) = &arguments.apply_to {
        anyhow::ensure!(
            root.is_dir(),
            "{} is no directory: --apply-to needs the root of a system, for example /",
            root.display()
        );
    }
    let written = match &arguments.apply_to {
        Some(root) => write(&files, root)?,
        None => Vec::new(),
    };
    match arguments.format {
        Format::Json => print_json(&plan, zfs_built_in, &written)?,
        Format::Table => print_text(&plan, zfs_built_in, &written),
    }
    Ok(EXIT_SUCCESS)
}

fn request(arguments: &TuneArguments) -> anyhow::Result<Request> {
    let meminfo = fs::read_to_string(MEMINFO)
        .ok()
        .as_deref()
        .and_then(machine::parse_meminfo);
    let memory_bytes = match (arguments.memory, meminfo) {
        (Some(size), _) => size.bytes(),
        (None, Some(facts)) => facts.total_bytes,
        (None, None) => anyhow::bail!("cannot read {MEMINFO}: say the memory with --memory"),
    };
    let running_count = match arguments.memory {
        Some(_) => 0,
        None => meminfo.map_or(0, |facts| facts.hugepage_count),
    };
    let cpu_count = match arguments.cpus {
        Some(count) => count,
        None => fs::read_to_string(CPUS_ONLINE)
            .ok()
            .as_deref()
            .and_then(machine::count_cpus)
            .with_context(|| {
                format!("cannot read {CPUS_ONLINE}: say the processors with --cpus")
            })?,
    };
    Ok(Request {
        memory_bytes,
        hugepage_bytes: arguments.hugepage_size.map_or_else(
            || meminfo.map_or(2 << 20, |facts| facts.hugepage_bytes),
            ByteSize::bytes,
        ),
        hugepage_count: match arguments.hugepages {
            Some(Hugepages::Auto) => None,
            Some(Hugepages::Count(count)) => Some(count),
            None => Some(running_count),
        },
        guest_count: arguments.guests,
        guest_memory_bytes: arguments.guest_memory.map_or(0, ByteSize::bytes),
        cpu_count,
        pool_tib: (!arguments.no_zfs).then_some(arguments.pool_tib),
        workload: match arguments.workload {
            Workload::Latency => tuning::Workload::Latency,
            Workload::Throughput => tuning::Workload::Throughput,
        },
        zfs: zfs_version(arguments.zfs.as_deref())?,
        arc: match arguments.arc_max {
            None => ArcChoice::Planned,
            Some(ArcMax::Default) => ArcChoice::ModuleDefault,
            Some(ArcMax::Size(size)) => ArcChoice::Bytes(size.bytes()),
        },
    })
}

fn zfs_version(told: Option<&str>) -> anyhow::Result<ZfsVersion> {
    match told {
        Some(text) => machine::parse_zfs_version(text)
            .with_context(|| format!("'{text}' is no version of ZFS: write for example 2.3")),
        None => Ok(fs::read_to_string(ZFS_VERSION)
            .ok()
            .as_deref()
            .and_then(machine::parse_zfs_version)
            .unwrap_or(ZFS_ASSUMED)),
    }
}

/// Writes what is not written yet; each file with what was done.
fn write(files: &[PlannedFile], root: &Path) -> anyhow::Result<Vec<(String, &'static str)>> {
    files
        .iter()
        .map(|file| {
            let path = root.join(file.path).display().to_string();
            if file.is_written(root) {
                return Ok((path, "unchanged"));
            }
            file.write(root)?;
            Ok((path, "written"))
        })
        .collect()
}

fn print_json(
    plan: &Plan,
    zfs_built_in: bool,
    written: &[(String, &'static str)],
) -> anyhow::Result<()> {
    let mut value = serde_json::to_value(plan)?;
    value["command_line"] = json!(plan.command_line(zfs_built_in));
    value["files"] = written
        .iter()
        .map(|(path, state)| json!({ "path": path, "state": state }))
        .collect();
    println!("{}", serde_json::to_string_pretty(&value)?);
    Ok(())
}

fn print_text(plan: &Plan, zfs_built_in: bool, written: &[(String, &'static str)]) {
    let total = ByteSize::from_bytes(plan.memory.total_bytes);
    println!("Memory: {total}");
    let free = (
        "free",
        plan.memory.free_bytes,
        "page cache, slack".to_owned(),
    );
    let shares = plan.memory.shares.iter();
    output::table(
        &["SHARE", "SIZE", "WHY"],
        shares
            .map(|share| (share.name, share.bytes, share.reason.clone()))
            .chain([free])
            .map(|(name, bytes, reason)| {
                vec![
                    name.to_owned(),
                    ByteSize::from_bytes(bytes).to_string(),
                    reason,
                ]
            }),
    );
    println!("\nProcessors: {}", plan.cpus.cpu_count);
    println!("{}", plan.cpus.reason);
    output::table(
        &["THREADS", "POLICY", "PRIORITY", "CPUS", "WHY"],
        plan.cpus.threads.iter().map(|thread| {
            vec![
                thread.pattern.to_owned(),
                thread.policy.to_owned(),
                thread.priority.to_string(),
                thread.cpus.clone().unwrap_or_else(|| "-".to_owned()),
                thread.reason.to_owned(),
            ]
        }),
    );
    for (place, title) in [
        (Place::Sysctl, "sysctl"),
        (Place::ZfsModule, "options of the module zfs"),
        (Place::CommandLine, "kernel command line"),
        (Place::Sysfs, "sysfs"),
    ] {
        let settings = plan
            .settings
            .iter()
            .filter(|setting| setting.place == place);
        let rows: Vec<Vec<String>> = settings
            .map(|setting| vec![setting.assignment(), setting.reason.clone()])
            .collect();
        if !rows.is_empty() {
            println!("\nSettings: {title}");
            output::table(&["SETTING", "WHY"], rows.into_iter());
        }
    }
    println!("\nCommand line:\n{}", plan.command_line(zfs_built_in));
    for warning in &plan.warnings {
        println!("\nWarning: {warning}");
    }
    for (path, state) in written {
        println!("{state}: {path}");
    }
    if !written.is_empty() {
        println!(
            "sysctl --system loads the first at once; the others count from the next boot on, the command line once the \
             boot loader has it, module options once the initramfs is made anew, and the threads' places with \
             'systemctl enable --now fcvm-kernel-threads'"
        );
    }
}
