//! `fcvm setup`: the guest kernel, the initramfs and the checks of this host.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail};
use fcvm_hypervisor::firecracker::release::{self, ReleaseOptions};
use fcvm_hypervisor::probe::{HostProbe, probe_host};
use fcvm_kernel::build::{self, BuildError};
use fcvm_kernel::{Architecture, Devices, GuestKernel, SetupEvent, SetupOptions};
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::Format;
use crate::args::system::{SetupArguments, SetupStep};
use crate::context::Context;

pub(crate) async fn run(context: &Context, arguments: SetupArguments) -> anyhow::Result<u8> {
    match arguments.step {
        Some(SetupStep::Preflight { format }) => super::preflight::run(context, format),
        Some(SetupStep::Firecracker {
            version,
            sha256,
            server,
        }) => {
            let options = ReleaseOptions {
                server,
                version,
                sha256,
            };
            firecracker(context, &options).await
        }
        Some(SetupStep::Kernel { force, profile }) => {
            kernel(context, force, profile.as_deref())?;
            Ok(crate::EXIT_SUCCESS)
        }
        None => {
            kernel(context, false, None)?;
            super::preflight::run(context, Format::Table)
        }
    }
}

/// Where releases of Firecracker are.
pub(crate) fn firecracker_directory(context: &Context) -> PathBuf {
    context.data_dir.join("firecracker")
}

/// Fetches a release of Firecracker.
async fn firecracker(context: &Context, options: &ReleaseOptions) -> anyhow::Result<u8> {
    let bar = ProgressBar::new(0);
    bar.set_style(
        ProgressStyle::with_template("fetching Firecracker {bar:30} {bytes}/{total_bytes}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    let directory = firecracker_directory(context);
    let mut progress = |done: u64, total: Option<u64>| {
        bar.set_length(total.unwrap_or(done));
        bar.set_position(done);
    };
    let fetched = release::fetch(&directory, options, &mut progress).await;
    bar.finish_and_clear();
    let release = fetched?;
    let already = if release.is_new {
        ""
    } else {
        " (it was there)"
    };
    println!("Firecracker {}{already}", release.version);
    println!("  firecracker  {}", release.firecracker.display());
    println!("  jailer       {}", release.jailer.display());
    Ok(crate::EXIT_SUCCESS)
}

/// What `--profile` calls Debian's packaged kernel.
const PACKAGED: &str = "packaged";

/// Makes the kernel ready and packs the initramfs.
fn kernel(context: &Context, force: bool, profile: Option<&str>) -> anyhow::Result<()> {
    let directories = super::kernel::build::directories(context);
    let kernel = match profile {
        Some(PACKAGED) => {
            build::select(&directories, None)?;
            None
        }
        Some(name) => {
            let built = match build::find(&directories, name) {
                Ok(built) if !force => built,
                Err(BuildError::Ambiguous { .. }) => build::find(&directories, name)?,
                _ => super::kernel::build::build_default(context, name)?,
            };
            build::select(&directories, Some(&built))?;
            Some(built.guest_kernel())
        }
        None => selected(context)?,
    };
    let kernel = match kernel {
        Some(kernel) => kernel,
        None => packaged(context, force)?,
    };
    let initramfs = initramfs(context, &kernel, Devices::Qemu)?;
    let package = kernel
        .package
        .as_deref()
        .map_or(String::new(), |package| format!(" from {package}"));
    println!("Guest kernel {}{package}", kernel.version);
    println!("  kernel     {}", kernel.vmlinux.display());
    println!(
        "  initramfs  {} (the agent and its modules)",
        initramfs.display()
    );
    Ok(())
}

/// Fetches Debian's kernel.
fn packaged(context: &Context, force: bool) -> anyhow::Result<GuestKernel> {
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
    Ok(kernel?)
}

/// The kernel from source that is in use, where one is.
fn selected(context: &Context) -> anyhow::Result<Option<GuestKernel>> {
    let built = build::selected(&super::kernel::build::directories(context)).context(
        "the kernel in use is damaged: choose it anew with 'fcvm setup kernel --profile'",
    )?;
    Ok(built.map(|built| built.guest_kernel()))
}

pub(crate) fn describe(event: &SetupEvent) -> String {
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

/// The kernel that setup made ready.
pub(crate) fn installed_kernel(context: &Context) -> anyhow::Result<Option<GuestKernel>> {
    if let Some(kernel) = selected(context)? {
        return Ok(Some(kernel));
    }
    Ok(fcvm_kernel::installed(&kernels(context))?)
}

/// The kernel to boot: the user's own or one from source, else the one that setup made ready.
pub(crate) fn guest_kernel(context: &Context, own: Option<&Path>) -> anyhow::Result<GuestKernel> {
    match own {
        // A word that names no file is the name of a built kernel, or of a profile.
        Some(name) if name.components().count() == 1 && !name.exists() => {
            let name = name.to_string_lossy();
            let built = build::find(&super::kernel::build::directories(context), &name)?;
            built.check()?;
            if built.used_for == build::Use::Host {
                bail!(
                    "{} is a host's kernel: guests have the profiles guest-min, guest and guest-zfs",
                    built.name
                );
            }
            Ok(built.guest_kernel())
        }
        Some(path) => Ok(fcvm_kernel::from_file(&kernels(context), path)?),
        None => installed_kernel(context)?.context(
            "there is no guest kernel yet: run 'fcvm setup' once, or name one with --kernel",
        ),
    }
}

/// The initramfs for a kernel, packed where it is not there yet.
pub(crate) fn initramfs(
    context: &Context,
    kernel: &GuestKernel,
    devices: Devices,
) -> anyhow::Result<PathBuf> {
    Ok(fcvm_kernel::initramfs(
        &kernels(context),
        kernel,
        &context.agent_binary()?,
        devices,
    )?)
}

/// What the host can do; probed once per boot.
pub(crate) fn probe(context: &Context) -> HostProbe {
    let mut child = Command::new("/proc/self/exe");
    // Its environment is empty, and would not say where an ordinary user has their data; it needs none.
    child.args(["--data-dir", "/", "probe-guest"]);
    // A data directory that is not there yet is made by what follows; until then nothing is kept.
    probe_host(Some(&probe_cache(context)), child)
}

/// `fcvm probe-guest`: what `probe` starts, in a process that may hang or die.
pub(crate) fn probe_guest() -> anyhow::Result<u8> {
    fcvm_hypervisor::probe::run_probe_guest();
    Ok(crate::EXIT_SUCCESS)
}

/// `fcvm make-tap`: what the owner of a VM starts, as a process of one thread can enter namespaces.
pub(crate) fn make_tap() -> anyhow::Result<u8> {
    fcvm_network::make_tap(std::io::stdin()).context("this command is for fcvm's own use")?;
    Ok(crate::EXIT_SUCCESS)
}

/// `fcvm jail-init`: runs a command to its end, as the process with which a PID namespace ends.
pub(crate) fn jail_init(command: &[std::ffi::OsString]) -> anyhow::Result<u8> {
    use std::os::unix::process::ExitStatusExt as _;
    let (program, arguments) = command.split_first().context("there is nothing to run")?;
    let status = Command::new(program)
        .args(arguments)
        .status()
        .with_context(|| format!("cannot run {}", Path::new(program).display()))?;
    if let Some(signal) = status.signal() {
        // Nobody can send the first process of a namespace this signal from within.
        bail!("firecracker was ended by signal {signal}");
    }
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}
