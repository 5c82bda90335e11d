//! `fcvm run`: image, kernel and plan are made ready here; the owner does the rest.

pub(crate) mod capabilities;
mod health;
mod hypervisor;
mod image;
pub(crate) mod process;
pub(super) mod warm;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, bail};
use fcvm_types::{ByteSize, VmId};

use crate::args::run::{HypervisorChoice, NetworkMode, RunArguments};
use crate::context::Context;
use crate::errors::ExitError;
use crate::owner::spec::{Readiness, VmSpec};
use crate::owner::{self, Front, Stopwatch};
use crate::state::{StateStore, random};

/// Less does not boot a kernel with its initramfs.
const MIN_MEMORY: ByteSize = ByteSize::from_mib(64);
/// Smallest file system that still has room for a container's files.
const MIN_DISK: ByteSize = ByteSize::from_mib(16);

pub(crate) async fn run(context: &Context, arguments: RunArguments) -> anyhow::Result<u8> {
    refuse_what_is_not_there(&arguments)?;
    let store = context.state()?;
    if let Some(name) = &arguments.name {
        // Known before minutes of pulling; the owner checks again, under the lock.
        if let Some(record) = store
            .list()?
            .into_iter()
            .find(|record| record.name == *name)
        {
            bail!(
                "the name '{name}' is in use by VM {}: choose another name, or remove that VM with 'fcvm rm {name}'",
                record.id.short()
            );
        }
    }
    let mut spec = make_spec(context, &store, &arguments).await?;
    if arguments.warm {
        spec.warm = Some(crate::warm::key(context, &spec)?);
    }
    let id = spec.id.clone();
    let cidfile = arguments
        .cidfile
        .as_deref()
        .map(|path| IdFile::create(path, &id))
        .transpose()?;
    let code = if arguments.detach {
        detach(context, &spec)?;
        println!("{id}");
        crate::EXIT_SUCCESS
    } else {
        let origin = warm::origin(context, &mut spec).await?;
        owner::run(
            context,
            spec,
            origin,
            Front::Terminal {
                interactive: arguments.interactive,
            },
        )
        .await?
    };
    if let Some(file) = cidfile {
        file.keep();
    }
    Ok(code)
}

/// What other versions have is refused, never ignored.
pub(super) fn refuse_what_is_not_there(arguments: &RunArguments) -> anyhow::Result<()> {
    if !arguments.volume.is_empty() {
        bail!(
            "volumes (-v, --volume, --map) are not in this version yet: 'fcvm cp' brings files into a running VM"
        );
    }
    if arguments.start.network == NetworkMode::Bridged {
        bail!("--network bridged is not in this version yet: rootless and none are");
    }
    if arguments.start.hypervisor == HypervisorChoice::Firecracker {
        hypervisor::refuse_what_firecracker_has_not(arguments)?;
    }
    if arguments.start.network == NetworkMode::None && !arguments.publish.is_empty() {
        bail!(
            "a VM without a network cannot publish ports: leave out -p, or choose --network rootless"
        );
    }
    if arguments.start.memory < MIN_MEMORY {
        bail!(
            "{} of memory is too little to boot: --memory {MIN_MEMORY} is the least",
            arguments.start.memory
        );
    }
    if arguments.start.disk_size < MIN_DISK {
        bail!(
            "a disk of {} is too small: --disk-size {MIN_DISK} is the least",
            arguments.start.disk_size
        );
    }
    if arguments.warm && (arguments.tty || arguments.interactive) {
        bail!(
            "--warm restores a container that nobody types into: leave out -i and -t, or --warm, and use 'fcvm exec -it'"
        );
    }
    if arguments.tty && arguments.interactive && arguments.detach {
        bail!(
            "-d and -it exclude each other: nobody could type; start it with -d and use 'fcvm exec -it'"
        );
    }
    Ok(())
}

pub(super) async fn make_spec(
    context: &Context,
    store: &StateStore,
    arguments: &RunArguments,
) -> anyhow::Result<VmSpec> {
    let mut watch = Stopwatch::new(Vec::new());
    let kernel = super::setup::guest_kernel(context, arguments.start.kernel.as_deref())?;
    let chosen = hypervisor::choose(context, arguments, &kernel)?;
    watch.lap("kernel");
    let image = image::resolve(context, &arguments.start).await?;
    image::check_zfs(&image, &kernel)?;
    watch.lap("image");
    let root_image = image::root_image(context, &image)?;
    watch.lap("root image");
    let name = match &arguments.name {
        Some(name) => name.clone(),
        None => store.free_name()?,
    };
    let id = VmId::from_random(random()?);
    // As in Podman the host name is the id unless a name was chosen for it.
    let hostname = arguments
        .hostname
        .clone()
        .unwrap_or_else(|| id.short().to_owned());
    check_hostname(&hostname)?;
    let config = image::process(&image);
    let stop_signal = arguments
        .stop_signal
        .as_deref()
        .or(config.stop_signal.as_deref())
        .unwrap_or("TERM");
    let hosts = arguments.add_host.iter().map(|text| parse_host(text));
    Ok(VmSpec {
        hostname: hostname.clone(),
        image: image::shown_name(&image, &arguments.start.image),
        image_digest: image::digest(&image),
        root_image,
        kernel: kernel.vmlinux.clone(),
        initramfs: chosen.initramfs,
        stop_signal: crate::signals::parse(stop_signal)?,
        process: process::plan(config, arguments, &hostname)?,
        read_only: arguments.start.read_only,
        privileged: arguments.start.privileged,
        extra_hosts: hosts.collect::<anyhow::Result<_>>()?,
        cpu_count: arguments.start.cpus,
        memory_bytes: arguments.start.memory.mib_rounded_up() << 20,
        disk_bytes: arguments.start.disk_size.mib_rounded_up() << 20,
        hypervisor: chosen.kind,
        hypervisor_reason: chosen.reason,
        jail: chosen.jail,
        pci: arguments.start.pci,
        hugepages: arguments.hugepages,
        accelerator: arguments.start.accel,
        network: arguments.start.network,
        ports: arguments.publish.clone(),
        dns_servers: arguments.dns.clone(),
        labels: labels(&arguments.label)?,
        remove_on_exit: arguments.rm,
        stop_timeout: std::time::Duration::from_secs(arguments.stop_timeout.into()),
        boot_timeout: arguments.start.boot_timeout,
        health: health::check(&arguments.start, image.health_check.as_ref()),
        on_fork: arguments.on_fork.clone(),
        standby: arguments.standby,
        warm: None,
        timings_us: watch.laps,
        id,
        name,
    })
}

fn check_hostname(hostname: &str) -> anyhow::Result<()> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if hostname.is_empty() || hostname.len() > 64 || !hostname.bytes().all(fits) {
        bail!("'{hostname}' is no host name: use 1 to 64 letters, digits, '-', '_' or '.'");
    }
    Ok(())
}

fn parse_host(text: &str) -> anyhow::Result<(IpAddr, String)> {
    let refuse = || format!("'{text}' is no host entry: write NAME:ADDRESS");
    let (name, address) = text.split_once(':').with_context(refuse)?;
    check_hostname(name)?;
    Ok((address.parse().with_context(refuse)?, name.to_owned()))
}

fn labels(texts: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    for text in texts {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        if name.is_empty() {
            bail!("'{text}' is no label: write NAME=VALUE");
        }
        labels.insert(name.to_owned(), value.to_owned());
    }
    Ok(labels)
}

/// Starts the owner as a process of its own and waits for its report.
fn detach(context: &Context, spec: &VmSpec) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut owner = std::process::Command::new(program)
        .arg("--data-dir")
        .arg(&context.data_dir)
        .arg("--runtime-dir")
        .arg(&context.runtime_dir)
        .arg("owner")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
        .context("cannot start the owner process")?;
    let mut stdin = owner
        .stdin
        .take()
        .context("the owner process has no input")?;
    let sent = serde_json::to_vec(spec)
        .map_err(std::io::Error::other)
        .and_then(|bytes| stdin.write_all(&bytes));
    drop(stdin);
    let mut line = String::new();
    let stdout = owner
        .stdout
        .take()
        .context("the owner process has no output")?;
    BufReader::new(stdout)
        .read_line(&mut line)
        .context("cannot read the owner's report")?;
    match serde_json::from_str(&line) {
        Ok(Readiness::Started) => Ok(()),
        Ok(Readiness::Failed { code, message }) => Err(ExitError { code, message }.into()),
        Err(_) => {
            sent.context("cannot tell the owner process what to run")?;
            let status = owner.wait().context("cannot wait for the owner process")?;
            bail!("the owner process ended before the VM had started ({status})");
        }
    }
}

/// `fcvm owner`: the other side of `detach`.
pub(crate) async fn owner(context: &Context) -> anyhow::Result<u8> {
    let mut spec: VmSpec = serde_json::from_reader(std::io::stdin().lock())
        .context("this command is for fcvm's own use")?;
    let report = leave_command()?;
    let origin = warm::origin(context, &mut spec).await?;
    owner::run(context, spec, origin, Front::Detached { report }).await
}

/// Leaves the session, the process group and the standard streams of the command that started this
/// owner, which may end or be interrupted; gives the pipe on which it waits for a report.
pub(crate) fn leave_command() -> anyhow::Result<File> {
    rustix::process::setsid().context("cannot start a session")?;
    let report = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(report)
}

/// `--cidfile`: removed again when the VM could not be started.
struct IdFile<'a>(Option<&'a Path>);

impl<'a> IdFile<'a> {
    fn create(path: &'a Path, id: &VmId) -> anyhow::Result<Self> {
        let write =
            || File::create_new(path).and_then(|mut file| file.write_all(id.as_str().as_bytes()));
        write().with_context(|| format!("cannot write the id file {}", path.display()))?;
        Ok(Self(Some(path)))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for IdFile<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}
