//! `fcvm run`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use fcvm_types::{ByteSize, PortMapping, VmName};

use super::Format;

/// Options of `fcvm run`, in Podman's spelling where Podman has them.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
        fcvm run --rm debian:bookworm uname -a\n  \
        fcvm run -it --rm debian:bookworm bash\n  \
        fcvm run -d --name web -p 127.0.0.1:8080:80 -e MODE=test IMAGE\n  \
        fcvm run --cpus 2 -m 1g --network none IMAGE ./untrusted\n  \
        sudo fcvm run --hypervisor firecracker --jail IMAGE ./untrusted")]
pub(crate) struct RunArguments {
    /// Name of the VM and, unless --hostname is given, of the guest
    #[arg(long, value_name = "NAME", value_parser = super::parse_vm_name)]
    pub(crate) name: Option<VmName>,
    /// Run in the background and print the id
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Restore the started state that an earlier run or 'fcvm prepare' has kept, or keep it: once the
    /// container runs, or with a health check at its first success
    #[arg(long)]
    pub(crate) warm: bool,
    /// Remove the VM when it has ended
    #[arg(long)]
    pub(crate) rm: bool,
    /// Pass standard input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the container a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Host name of the guest
    #[arg(long, value_name = "NAME", help_heading = "Container")]
    pub(crate) hostname: Option<String>,
    /// Add a line to /etc/hosts
    #[arg(long, value_name = "NAME:ADDRESS", help_heading = "Container")]
    pub(crate) add_host: Vec<String>,
    /// Signal that stop sends first [default: the image's, else TERM]
    #[arg(long, value_name = "SIGNAL", help_heading = "Container")]
    pub(crate) stop_signal: Option<String>,
    /// Seconds between the stop signal and the end
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10,
        help_heading = "Container"
    )]
    pub(crate) stop_timeout: u32,
    /// Label of the VM
    #[arg(short, long, value_name = "NAME[=VALUE]", help_heading = "Container")]
    pub(crate) label: Vec<String>,
    /// Shell command that each clone runs before it answers anything: told by $FCVM_CLONE and
    /// $FCVM_PARENT who it is, it drops what must not be shared
    #[arg(long, value_name = "CMD", help_heading = "Container")]
    pub(crate) on_fork: Option<String>,
    /// Keep so many clones ready for 'fcvm fork': their processes wait, about 80 MB each
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Container", value_parser = clap::value_parser!(u16).range(..=32))]
    pub(crate) standby: u16,
    /// Publish a port of the guest
    #[arg(
        short,
        long,
        value_name = "[IP:]HOST:GUEST[/PROTO]",
        help_heading = "Network"
    )]
    pub(crate) publish: Vec<PortMapping>,
    /// Name servers of the guest [default: the host's]
    #[arg(long, value_name = "ADDRESS", help_heading = "Network")]
    pub(crate) dns: Vec<std::net::IpAddr>,
    /// Run Firecracker under its jailer: with a user, a file system and processes of the VM's own, and
    /// limits of its memory, processes and processor time; needs root. Clones then have copies
    /// of the memory [default: where root runs Firecracker, the jailer is there, and neither --warm nor
    /// --standby is given]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", overrides_with = "jail", help_heading = "Machine")]
    pub(crate) jail: Option<bool>,
    /// Memory of a VM of Firecracker in the host's pages of 2 MiB (vm.nr_hugepages): fewer faults. It is cloned
    /// by snapshots, whose memory a memory server brings, and not by 'fcvm fork'
    #[arg(long, conflicts_with_all = ["warm", "standby"], help_heading = "Machine")]
    pub(crate) hugepages: bool,
    /// Directory of the host in the guest (not in this version)
    #[arg(short, long, alias = "map", value_name = "HOST:GUEST", hide = true)]
    pub(crate) volume: Vec<String>,
    /// Write the id to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// What is run, in which machine
    #[command(flatten)]
    pub(crate) start: StartArguments,
}

/// Options that a started state depends on: what `fcvm run` and `fcvm prepare` have in common.
#[derive(Debug, Args)]
pub(crate) struct StartArguments {
    /// Set an environment variable (NAME=value, or NAME to pass the host's value)
    #[arg(short, long, value_name = "NAME[=VALUE]", help_heading = "Container")]
    pub(crate) env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE", help_heading = "Container")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR", help_heading = "Container")]
    pub(crate) workdir: Option<String>,
    /// Run as this user: name or number, with an optional group
    #[arg(short, long, value_name = "USER[:GROUP]", help_heading = "Container")]
    pub(crate) user: Option<String>,
    /// Program to run in place of the image's; an empty text removes the image's
    #[arg(long, value_name = "PROGRAM|JSON", help_heading = "Container")]
    pub(crate) entrypoint: Option<String>,
    /// The container cannot write to its root file system
    #[arg(long, help_heading = "Container")]
    pub(crate) read_only: bool,
    /// Add a capability (ALL for all)
    #[arg(long, value_name = "CAP", help_heading = "Container")]
    pub(crate) cap_add: Vec<String>,
    /// Drop a capability (ALL for all)
    #[arg(long, value_name = "CAP", help_heading = "Container")]
    pub(crate) cap_drop: Vec<String>,
    /// Keep all capabilities and mask nothing: the VM is the boundary
    #[arg(long, help_heading = "Container")]
    pub(crate) privileged: bool,
    /// Set a resource limit
    #[arg(long, value_name = "NAME=SOFT[:HARD]", help_heading = "Container")]
    pub(crate) ulimit: Vec<String>,
    /// no-new-privileges: setuid programs give nothing
    #[arg(long, value_name = "OPTION", help_heading = "Container")]
    pub(crate) security_opt: Vec<String>,
    /// Check that the service answers: an http:// URL asked from inside the guest, or a shell command
    /// [default: the image's HEALTHCHECK]
    #[arg(long, value_name = "URL|CMD", help_heading = "Container")]
    pub(crate) health_check: Option<String>,
    /// Time between two health checks [default: the image's, else 30s]
    #[arg(long, value_name = "DURATION", help_heading = "Container", value_parser = parse_duration)]
    pub(crate) health_interval: Option<std::time::Duration>,
    /// Time limit of a health check [default: the image's, else 30s]
    #[arg(long, value_name = "DURATION", help_heading = "Container", value_parser = parse_duration)]
    pub(crate) health_timeout: Option<std::time::Duration>,
    /// Time after the start in which a failure does not count [default: the image's, else 0s]
    #[arg(long, value_name = "DURATION", help_heading = "Container", value_parser = parse_duration)]
    pub(crate) health_start_period: Option<std::time::Duration>,
    /// Failures in a row that make the VM unhealthy [default: the image's, else 3]
    #[arg(long, value_name = "N", help_heading = "Container")]
    pub(crate) health_retries: Option<u32>,
    /// Do not check, even where the image has a HEALTHCHECK
    #[arg(long, help_heading = "Container", conflicts_with = "health_check")]
    pub(crate) no_healthcheck: bool,
    /// Network of the VM
    #[arg(long, value_enum, default_value = "rootless", help_heading = "Network")]
    pub(crate) network: NetworkMode,
    /// Virtual processors
    #[arg(long = "cpus", alias = "cpu", value_name = "N", default_value_t = 1, help_heading = "Machine", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) cpus: u32,
    /// Memory of the guest
    #[arg(
        short,
        long,
        alias = "mem",
        value_name = "SIZE",
        default_value = "512m",
        help_heading = "Machine"
    )]
    pub(crate) memory: ByteSize,
    /// Size of the VM's writable disk; it takes only what is written
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "10g",
        help_heading = "Machine"
    )]
    pub(crate) disk_size: ByteSize,
    /// Hypervisor
    #[arg(
        long,
        env = "FCVM_HYPERVISOR",
        value_enum,
        default_value = "auto",
        help_heading = "Machine"
    )]
    pub(crate) hypervisor: HypervisorChoice,
    /// Accelerator
    #[arg(
        long,
        env = "FCVM_ACCEL",
        value_enum,
        default_value = "auto",
        help_heading = "Machine"
    )]
    pub(crate) accel: AcceleratorChoice,
    /// Put the devices of a VM of Firecracker on a PCI bus: interrupts without exits
    /// (MSI-X), a longer boot
    #[arg(long, help_heading = "Machine")]
    pub(crate) pci: bool,
    /// Guest kernel: a vmlinux or bzImage, or a kernel or profile of 'fcvm kernel ls' [default: the one
    /// that setup made ready]
    #[arg(long, value_name = "FILE|NAME", help_heading = "Machine")]
    pub(crate) kernel: Option<PathBuf>,
    /// Time limit from the hypervisor's start to the agent's first word
    #[arg(long, value_name = "DURATION", default_value = "120s", help_heading = "Machine", value_parser = parse_duration)]
    pub(crate) boot_timeout: std::time::Duration,
    /// When to ask the registry for the image
    #[arg(long, value_enum, default_value = "missing", help_heading = "Image")]
    pub(crate) pull: PullPolicy,
    /// Check the registry's certificate, and refuse plain HTTP
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Image")]
    pub(crate) tls_verify: bool,
    /// The image
    pub(crate) image: String,
    /// Command in place of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

/// Options of `fcvm prepare`.
#[derive(Debug, Args)]
#[command(
    after_help = "What 'fcvm run --warm' restores is kept: the container as it is when its process has started, or\n\
        with a health check when that has succeeded for the first time. No VM is left.\n\n\
        Examples:\n  \
        fcvm prepare --health-check 'pg_isready' postgres:16\n  \
        fcvm run --warm -d --name db --health-check 'pg_isready' postgres:16"
)]
pub(crate) struct PrepareArguments {
    /// Form of the output
    #[arg(long, value_enum, default_value = "table")]
    pub(crate) format: Format,
    /// What is run, in which machine
    #[command(flatten)]
    pub(crate) start: StartArguments,
}

/// `--network`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
pub(crate) enum NetworkMode {
    /// User-mode networking: outbound, DNS, published ports; needs no privilege
    Rootless,
    /// A bridge of the host (not in this version)
    Bridged,
    /// Only a loopback interface
    None,
}

/// `--hypervisor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
pub(crate) enum HypervisorChoice {
    /// Firecracker where KVM is usable, it is installed and it has what is asked for, else QEMU
    Auto,
    /// QEMU microvm
    Qemu,
    /// Firecracker: with KVM
    Firecracker,
}

/// `--accel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
pub(crate) enum AcceleratorChoice {
    /// KVM where a probe shows that guests run, else TCG
    Auto,
    /// Hardware virtualisation
    Kvm,
    /// QEMU's software emulation
    Tcg,
}

/// `--pull`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
pub(crate) enum PullPolicy {
    /// When it is not in the store
    Missing,
    /// Every time
    Always,
    /// Never: it has to be in the store
    Never,
}

/// Reads a duration for clap: a number with s, m or h; a bare number is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    let unit_at = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let factor = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => {
            return Err(format!(
                "'{unit}' is not a unit of time: write ms, s, m, h or d"
            ));
        }
    };
    let seconds = number
        .parse::<f64>()
        .map_err(|_| format!("'{text}' is not a duration: write for example 30s or 5m"))?;
    std::time::Duration::try_from_secs_f64(seconds * factor)
        .map_err(|_| format!("'{text}' is too long"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_about_a_jail_counts() {
        use clap::Parser as _;
        let jail = |words: &[&str]| {
            let line = [&["fcvm", "run"], words, &["image"]].concat();
            match super::super::Arguments::try_parse_from(line)
                .unwrap()
                .command
            {
                super::super::Command::Run(run) => run.jail,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(jail(&[]), None);
        assert_eq!(jail(&["--jail=false", "--jail"]), Some(true));
        assert_eq!(jail(&["--jail", "--jail=false"]), Some(false));
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("90").unwrap().as_secs(), 90);
        assert_eq!(parse_duration("1.5m").unwrap().as_secs(), 90);
        assert_eq!(parse_duration("250ms").unwrap().as_millis(), 250);
        for bad in ["", "x", "-1s", "5 parsecs", "1e300h"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
