//! `fcvm setup`: the guest kernel, the initramfs and the checks of this host.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::probe::{HostProbe, probe_host};
use fcvm_kernel::{Architecture, GuestKernel, SetupEvent, SetupOptions};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::Format;
use crate::args::system::{SetupArguments, SetupStep};
use crate::context::Context;

pub(crate) async fn run(context: &Context, arguments: SetupArguments) -> anyhow::Result<u8> {
    match arguments.step {
        Some(SetupStep::Preflight { format }) => super::preflight::run(context, format),
        Some(SetupStep::Kernel { force }) => {
            kernel(context, force)?;
            Ok(crate::EXIT_SUCCESS)
        }
        None => {
            kernel(context, false)?;
            super::preflight::run(context, Format::Table)
        }
    }
}

/// Fetches the kernel and packs the initramfs.
fn kernel(context: &Context, force: bool) -> anyhow::Result<()> {
    let Some(architecture) = Architecture::host() else {
        bail!("guests need an x86-64 or AArch64 host");
    };
    let mut options = SetupOptions::new(architecture);
    options.upgrade = force;
    let bar = ProgressBar::new_spinner();
    bar.set_style(
        ProgressStyle::with_template("{spinner} {msg} {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    bar.enable_steady_tick(Duration::from_millis(100));
    let directory = kernels(context);
    let kernel = fcvm_kernel::setup(&directory, &options, &mut |event| {
        bar.set_message(describe(&event))
    });
    bar.finish_and_clear();
    let kernel = kernel?;
    let initramfs = initramfs(context, &kernel)?;
    let package = kernel
        .package
        .as_deref()
        .map_or(String::new(), |package| format!(" from {package}"));
    println!("Guest kernel {}{package}", kernel.version);
    println!("  kernel     {}", kernel.vmlinux.display());
    println!(
        "  initramfs  {} ({} modules and the agent)",
        initramfs.display(),
        kernel.modules.len()
    );
    Ok(())
}

fn describe(event: &SetupEvent) -> String {
    let stage = match &event.detail {
        detail if detail.is_empty() => event.stage.to_string(),
        detail => format!("{} ({detail})", event.stage),
    };
    match event.total {
        Some(total) if total > 0 => {
            format!("{stage}: {} %", event.done.saturating_mul(100) / total)
        }
        _ => stage,
    }
}

fn kernels(context: &Context) -> PathBuf {
    context.data_dir.join("kernels")
}

/// Where the probe's result is kept.
fn probe_cache(context: &Context) -> PathBuf {
    context.data_dir.join("host-probe.json")
}

/// What the host can do, probed anew: a verdict reached on an overloaded host does not stay.
pub(crate) fn probe_anew(context: &Context) -> HostProbe {
    // One that cannot be removed cannot be written either.
    let _ = std::fs::remove_file(probe_cache(context));
    probe(context)
}

/// The kernel that setup fetched.
pub(crate) fn installed_kernel(context: &Context) -> anyhow::Result<Option<GuestKernel>> {
    Ok(fcvm_kernel::installed(&kernels(context))?)
}

/// The kernel to boot: the user's own, else the one that setup fetched.
pub(crate) fn guest_kernel(context: &Context, own: Option<&Path>) -> anyhow::Result<GuestKernel> {
    match own {
        Some(path) => Ok(fcvm_kernel::from_file(&kernels(context), path)?),
        None => installed_kernel(context)?.context(
            "there is no guest kernel yet: run 'fcvm setup' once, or name one with --kernel",
        ),
    }
}

/// The initramfs for a kernel, packed where it is not there yet.
pub(crate) fn initramfs(context: &Context, kernel: &GuestKernel) -> anyhow::Result<PathBuf> {
    Ok(fcvm_kernel::initramfs(
        &kernels(context),
        kernel,
        &context.agent_binary()?,
    )?)
}

/// What the host can do; probed once per boot.
pub(crate) fn probe(context: &Context) -> HostProbe {
    let mut child = Command::new("/proc/self/exe");
    child.arg("probe-guest");
    // A data directory that is not there yet is made by what follows; until then nothing is kept.
    probe_host(Some(&probe_cache(context)), child)
}

/// `fcvm probe-guest`: what `probe` starts, in a process that may hang or die.
pub(crate) fn probe_guest() -> anyhow::Result<u8> {
    fcvm_hypervisor::probe::run_probe_guest();
    Ok(crate::EXIT_SUCCESS)
}
