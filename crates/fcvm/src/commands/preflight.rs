//! `fcvm setup preflight`: what this host has, what it means, and the remedy for what is missing.

use std::fs::File;
use std::path::Path;

use fcvm_hypervisor::HypervisorError;
use fcvm_types::ByteSize;
use serde::Serialize;

use crate::args::Format;
use crate::context::Context;
use crate::output::table;

/// Less free space than this stops the first image.
const LITTLE_SPACE: ByteSize = ByteSize::from_mib(2048);
/// The exit code when `run` could not work.
const EXIT_NOT_READY: u8 = 1;

/// What a finding means for `run`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// It is there.
    Ok,
    /// `run` works without it, or less well.
    Limited,
    /// `run` cannot work.
    Missing,
}

/// A row of the table.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    meaning: String,
    remedy: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>, meaning: &str) -> Self {
        Self {
            check,
            verdict: Verdict::Ok,
            found: found.into(),
            meaning: meaning.to_owned(),
            remedy: None,
        }
    }

    fn lacking(
        check: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        meaning: &str,
        remedy: &str,
    ) -> Self {
        let remedy = (!remedy.is_empty()).then(|| remedy.to_owned());
        Self {
            check,
            verdict,
            found: found.into(),
            meaning: meaning.to_owned(),
            remedy,
        }
    }
}

pub(crate) fn run(context: &Context, format: Format) -> anyhow::Result<u8> {
    let mut findings = vec![
        accelerator(context),
        qemu(context),
        firecracker(context),
        host_kernel(),
        guest_kernel(context),
        agent(context),
    ];
    findings.extend([
        user_namespaces(),
        device("tun", "/dev/net/tun", "bridged networking (later)"),
        fuse(context),
        userfaultfd(),
    ]);
    findings.extend([reflink(context), free_space(context)]);
    findings.extend(tools(context));
    findings.push(processor());
    let ready = findings
        .iter()
        .all(|finding| finding.verdict != Verdict::Missing);
    if format == Format::Json {
        println!(
            "{}",
            serde_json::to_string_pretty(
                &serde_json::json!({ "ready": ready, "checks": findings })
            )?
        );
    } else {
        let rows = findings.iter().map(|finding| {
            let verdict = match finding.verdict {
                Verdict::Ok => "ok",
                Verdict::Limited => "limited",
                Verdict::Missing => "MISSING",
            };
            let meaning = match &finding.remedy {
                Some(remedy) => format!("{}; {remedy}", finding.meaning),
                None => finding.meaning.clone(),
            };
            vec![
                finding.check.to_owned(),
                verdict.to_owned(),
                finding.found.clone(),
                meaning,
            ]
        });
        table(&["CHECK", "VERDICT", "FOUND", "MEANING AND REMEDY"], rows);
        println!(
            "{}",
            if ready {
                "This host can run VMs."
            } else {
                "This host cannot run VMs yet: see MISSING above."
            }
        );
    }
    Ok(if ready {
        crate::EXIT_SUCCESS
    } else {
        EXIT_NOT_READY
    })
}

fn accelerator(context: &Context) -> Finding {
    use fcvm_hypervisor::probe::KvmUsability;
    const CHECK: &str = "accelerator";
    const SLOWER: &str =
        "VMs run under TCG, QEMU's software emulation: the same, several times slower";
    match super::setup::probe_anew(context).kvm {
        KvmUsability::Usable => Finding::ok(
            CHECK,
            "kvm: a test guest ran",
            "VMs run at the processor's speed",
        ),
        KvmUsability::Absent => Finding::lacking(
            CHECK,
            Verdict::Limited,
            "no /dev/kvm",
            SLOWER,
            "switch virtualisation on in the firmware, or nested virtualisation on the host of this VM, and load kvm_intel or kvm_amd",
        ),
        KvmUsability::NoPermission => Finding::lacking(
            CHECK,
            Verdict::Limited,
            "/dev/kvm cannot be opened",
            SLOWER,
            "join the group kvm ('usermod -aG kvm USER') and log in again",
        ),
        KvmUsability::Unusable { reason } => Finding::lacking(
            CHECK,
            Verdict::Limited,
            format!("/dev/kvm: {reason}"),
            SLOWER,
            "",
        ),
        KvmUsability::Emulating { reason } => Finding::lacking(
            CHECK,
            Verdict::Limited,
            format!("/dev/kvm is there and does not run guests: {reason}"),
            SLOWER,
            "use a host with hardware virtualisation for speed",
        ),
    }
}

fn qemu(context: &Context) -> Finding {
    const CHECK: &str = "qemu";
    match crate::owner::qemu(context).and_then(|qemu| {
        let version = qemu.check_version()?;
        qemu.check_machine()?;
        Ok((qemu.program().display().to_string(), version))
    }) {
        Ok((path, version)) => Finding::ok(
            CHECK,
            format!("{version} at {path}"),
            "the hypervisor of this version",
        ),
        Err(error) => Finding::lacking(
            CHECK,
            Verdict::Missing,
            "not usable",
            &format!("{error:#}"),
            "",
        ),
    }
}

fn firecracker(context: &Context) -> Finding {
    const CHECK: &str = "firecracker";
    const USE: &str = "VMs run under it where KVM is usable";
    let located = crate::owner::firecracker(context, &context.runtime_dir);
    let found = located.and_then(|firecracker| {
        let version = firecracker.check_version()?;
        Ok(format!("{version} at {}", firecracker.program().display()))
    });
    match found {
        Ok(found) => Finding::ok(CHECK, found, USE),
        Err(error) if is_absent(&error) && context.firecracker.is_none() => {
            Finding::ok(CHECK, "none", USE)
        }
        Err(error) => Finding::lacking(
            CHECK,
            Verdict::Limited,
            "not usable",
            &format!("{error:#}"),
            "",
        ),
    }
}

fn is_absent(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(HypervisorError::NotFound { .. }))
}

fn host_kernel() -> Finding {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    Finding::ok(
        "host kernel",
        format!("{} {}", release, name.machine().to_string_lossy()),
        "pidfd and close_range are there since 5.9",
    )
}

fn guest_kernel(context: &Context) -> Finding {
    const CHECK: &str = "guest kernel";
    match super::setup::installed_kernel(context) {
        Ok(Some(kernel)) => Finding::ok(CHECK, kernel.version.clone(), "VMs boot it"),
        Ok(None) => Finding::lacking(
            CHECK,
            Verdict::Missing,
            "none",
            "there is nothing to boot",
            "run 'fcvm setup kernel', or give 'run' a --kernel",
        ),
        Err(error) => Finding::lacking(
            CHECK,
            Verdict::Missing,
            "damaged",
            &format!("{error:#}"),
            "run 'fcvm setup kernel --force'",
        ),
    }
}

fn agent(context: &Context) -> Finding {
    match context.agent_binary() {
        Ok(path) => Finding::ok(
            "guest agent",
            path.display().to_string(),
            "it becomes the guest's process 1",
        ),
        Err(error) => Finding::lacking(
            "guest agent",
            Verdict::Missing,
            "none",
            &format!("{error:#}"),
            "",
        ),
    }
}

fn read(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

fn user_namespaces() -> Finding {
    const CHECK: &str = "user namespaces";
    const MEANING: &str = "'image bootstrap' without root needs them, and passt its sandbox";
    let limited = |found: &str, remedy: &str| {
        Finding::lacking(CHECK, Verdict::Limited, found, MEANING, remedy)
    };
    if read("/proc/sys/user/max_user_namespaces").is_none_or(|limit| limit == "0") {
        return limited(
            "switched off",
            "set the sysctl user.max_user_namespaces above 0",
        );
    }
    if read("/proc/sys/kernel/unprivileged_userns_clone").is_some_and(|value| value == "0") {
        return limited(
            "for root only",
            "set the sysctl kernel.unprivileged_userns_clone to 1",
        );
    }
    if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
        .is_some_and(|value| value == "1")
    {
        return limited(
            "restricted by AppArmor",
            "set the sysctl kernel.apparmor_restrict_unprivileged_userns to 0",
        );
    }
    Finding::ok(CHECK, "available", MEANING)
}

fn device(check: &'static str, path: &str, meaning: &str) -> Finding {
    match File::options().read(true).write(true).open(path) {
        Ok(_) => Finding::ok(check, format!("{path} opens"), meaning),
        Err(error) => Finding::lacking(
            check,
            Verdict::Limited,
            format!("{path}: {error}"),
            meaning,
            "",
        ),
    }
}

fn fuse(context: &Context) -> Finding {
    let finding = device("fuse", "/dev/fuse", "volumes and the pool (later)");
    if finding.verdict == Verdict::Ok
        && context.find_program("fusermount3").is_none()
        && !rustix::process::geteuid().is_root()
    {
        return Finding::lacking(
            "fuse",
            Verdict::Limited,
            "no fusermount3",
            "volumes and the pool (later)",
            "install the package fuse3",
        );
    }
    finding
}

/// A hypervisor under KVM needs all faults told: those of the kernel on a guest's behalf too. A hypervisor that finds
/// the device asks nothing else, so that its mode decides where it is there.
fn userfaultfd() -> Finding {
    use fcvm_memory::uffd::{Faults, Userfault};
    const CHECK: &str = "userfaultfd";
    const MEANING: &str = "'snapshot serve-memory' and its clones";
    const DEVICE: &str = "/dev/userfaultfd";
    let limited = |found: &str, remedy: &str| {
        Finding::lacking(CHECK, Verdict::Limited, found, MEANING, remedy)
    };
    let device = File::options().read(true).write(true).open(DEVICE);
    match (device, Userfault::create(Faults::All)) {
        (Err(error), _) if error.kind() == std::io::ErrorKind::PermissionDenied => limited(
            "/dev/userfaultfd cannot be opened",
            "give it to the group that has /dev/kvm ('chgrp kvm /dev/userfaultfd; chmod 660 /dev/userfaultfd', or a udev rule)",
        ),
        (_, Ok(_)) => Finding::ok(CHECK, "faults of guests can be served", MEANING),
        (_, Err(_)) if Userfault::create(Faults::OfUserMode).is_ok() => limited(
            "faults of programs only, not of guests under KVM",
            "set the sysctl vm.unprivileged_userfaultfd to 1",
        ),
        (_, Err(error)) => limited(
            &format!("not there: {error}"),
            "use a kernel with CONFIG_USERFAULTFD",
        ),
    }
}

/// The data directory, or the nearest parent that exists.
fn existing(context: &Context) -> &Path {
    context
        .data_dir
        .ancestors()
        .find(|path| path.is_dir())
        .unwrap_or(Path::new("/"))
}

fn reflink(context: &Context) -> Finding {
    const CHECK: &str = "reflink";
    match fcvm_storage::reflink_support(existing(context)) {
        Ok(true) => Finding::ok(
            CHECK,
            "the data directory's file system has it",
            "disks are cloned, not copied",
        ),
        Ok(false) => Finding::lacking(
            CHECK,
            Verdict::Limited,
            "the data directory's file system lacks it",
            "a new VM's empty disk is copied (a few hundred kilobytes)",
            "keep the data directory on btrfs or XFS to clone it",
        ),
        Err(error) => Finding::lacking(
            CHECK,
            Verdict::Limited,
            "unknown",
            &format!("{error:#}"),
            "check the permissions of the data directory",
        ),
    }
}

fn free_space(context: &Context) -> Finding {
    const CHECK: &str = "free space";
    let directory = existing(context);
    match fcvm_storage::free_bytes(directory) {
        Ok(bytes) if bytes >= LITTLE_SPACE.bytes() => Finding::ok(
            CHECK,
            ByteSize::from_bytes(bytes).to_string(),
            &format!("in {}", directory.display()),
        ),
        Ok(bytes) => Finding::lacking(
            CHECK,
            Verdict::Limited,
            ByteSize::from_bytes(bytes).to_string(),
            &format!("little for images in {}", directory.display()),
            "free some ('fcvm system prune'), or choose another --data-dir",
        ),
        Err(error) => Finding::lacking(
            CHECK,
            Verdict::Limited,
            "unknown",
            &format!("{error:#}"),
            "",
        ),
    }
}

fn tools(context: &Context) -> Vec<Finding> {
    const TOOLS: [(&str, &str, &str, bool); 5] = [
        (
            "passt",
            "passt",
            "the network of VMs; without it QEMU's own, slower",
            false,
        ),
        ("mkfs.ext4", "e2fsprogs", "the writable disks of VMs", true),
        ("mmdebstrap", "mmdebstrap", "'image bootstrap'", false),
        (
            "newuidmap",
            "uidmap",
            "'image bootstrap' without root",
            false,
        ),
        ("apt-get", "apt", "'setup kernel'", false),
    ];
    let finding =
        |(program, package, meaning, needed): (&'static str, &str, &str, bool)| match context
            .find_program(program)
        {
            Some(path) => Finding::ok(program, path.display().to_string(), meaning),
            None => {
                let verdict = if needed {
                    Verdict::Missing
                } else {
                    Verdict::Limited
                };
                Finding::lacking(
                    program,
                    verdict,
                    "not found",
                    meaning,
                    &format!("install the package {package}"),
                )
            }
        };
    TOOLS.into_iter().map(finding).collect()
}

/// The instructions that hashing, checksums and the pool use.
fn processor() -> Finding {
    const CHECK: &str = "processor";
    const MEANING: &str = "hashing and checksums at full speed";
    const WANTED: &[&str] = if cfg!(target_arch = "aarch64") {
        &["aes", "asimd", "crc32", "sha2"]
    } else {
        &["aes", "sha_ni", "sse4_2", "avx2"]
    };
    let text = read("/proc/cpuinfo").unwrap_or_default();
    let flags = text
        .lines()
        .find(|line| line.starts_with("flags") || line.starts_with("Features"))
        .unwrap_or_default();
    let (has, lacks): (Vec<&str>, Vec<&str>) = WANTED
        .iter()
        .partition(|wanted| flags.split_whitespace().any(|flag| flag == **wanted));
    if lacks.is_empty() {
        return Finding::ok(CHECK, has.join(" "), MEANING);
    }
    Finding::lacking(
        CHECK,
        Verdict::Limited,
        format!("{}, without {}", has.join(" "), lacks.join(" ")),
        MEANING,
        "",
    )
}
