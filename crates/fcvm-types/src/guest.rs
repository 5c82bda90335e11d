//! What the guest's agent is asked to set up and to run.
//!
//! These are the contents of the messages in `fcvm-wire`; how they travel is told there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Serial number of the virtio disk that holds the read-only root image (EROFS).
pub const ROOT_DISK_SERIAL: &str = "fcvm-root";
/// Serial number of the virtio disk that holds the VM's writable layer (ext4).
pub const SCRATCH_DISK_SERIAL: &str = "fcvm-scratch";
/// Name of the virtio-serial port that carries the protocol.
pub const AGENT_PORT_NAME: &str = "fcvm.agent.0";
/// Port of the host to which the agent connects over vsock, where its channel is there.
pub const AGENT_VSOCK_PORT: u32 = 5252;
/// Argument of the kernel's command line that says where the agent's channel is: [`VSOCK_CHANNEL`],
/// or the virtio-serial port where it is absent.
pub const CHANNEL_ARGUMENT: &str = "fcvm.channel";
/// The channel over vsock.
pub const VSOCK_CHANNEL: &str = "vsock";
/// Argument of the kernel's command line with what would be the serial numbers of the virtio disks,
/// in the order of the disks, where the hypervisor gives them no serial numbers of their own.
pub const DISKS_ARGUMENT: &str = "fcvm.disks";

/// Everything the agent needs between boot and the container's first instruction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestPlan {
    /// Who the guest is.
    pub identity: GuestIdentity,
    /// Host's realtime clock when the plan was sent, nanoseconds since 1970.
    pub realtime_ns: u64,
    /// No writable layer: the container sees the root image read-only (`--read-only`), with a
    /// tmpfs on /run, /tmp and /var/tmp as Podman gives it.
    pub read_only: bool,
    /// No capability is dropped and no path of /proc and /sys is masked.
    pub privileged: bool,
    /// The container's first process.
    pub process: ProcessPlan,
}

/// What tells one guest from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestIdentity {
    /// Host name of the guest and of the container.
    pub hostname: String,
    /// Content of `/etc/machine-id`: 32 hexadecimal characters.
    pub machine_id: String,
    /// Address configuration; the guest has only its loopback where absent.
    pub network: Option<GuestNetwork>,
    /// Lines added to the container's /etc/hosts: address, then names.
    pub extra_hosts: Vec<(IpAddr, String)>,
}

/// What makes a clone, which wakes up as a copy of another guest, a guest of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClonePlan {
    /// Who it is from now on.
    pub identity: GuestIdentity,
    /// Host's realtime clock when the plan was sent, nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Random bytes of the host, fresh for each clone, hexadecimal: without them all clones would
    /// return the same random numbers.
    pub entropy: String,
}

/// Address configuration of the guest's one network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// IPv4 address of the guest.
    pub address: Ipv4Addr,
    /// Length of its network prefix, in bits.
    pub prefix_length: u8,
    /// IPv4 default gateway.
    pub gateway: Ipv4Addr,
    /// Static IPv6 address, prefix length and gateway, where the backend has IPv6.
    pub ipv6: Option<GuestIpv6>,
    /// Name servers for the container's resolv.conf.
    pub dns_servers: Vec<IpAddr>,
    /// Search domains for the container's resolv.conf.
    pub dns_search: Vec<String>,
    /// Largest packet, in bytes.
    pub mtu: u16,
}

/// IPv6 side of [`GuestNetwork`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestIpv6 {
    /// Address of the guest.
    pub address: Ipv6Addr,
    /// Length of its network prefix, in bits.
    pub prefix_length: u8,
    /// Default gateway.
    pub gateway: Ipv6Addr,
}

/// A process of the container: its first one, or one started by `exec`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessPlan {
    /// Program and its arguments. The program is looked up in the PATH of `env` unless it has a '/'.
    pub args: Vec<String>,
    /// Environment, each entry `NAME=value`. HOME is added from the user's passwd entry where absent.
    pub env: Vec<String>,
    /// Working directory; created where missing (as Podman does). Empty means "/".
    pub cwd: String,
    /// `user[:group]`, each a name or a number, resolved in the container's own passwd and group.
    /// Empty means root.
    pub user: String,
    /// A pseudo-terminal of this size in place of three pipes.
    pub terminal: Option<TerminalSize>,
    /// The process reads its standard input from the host; otherwise it reads /dev/null.
    pub stdin: bool,
    /// Capabilities kept, by their names (`CAP_CHOWN`, ...).
    pub capabilities: Vec<String>,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// The process can gain no privileges through setuid programs.
    pub no_new_privileges: bool,
}

/// Size of a terminal in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters per line.
    pub columns: u16,
}

/// A resource limit, `setrlimit(2)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// Name as in `ulimit` options of Podman: `nofile`, `nproc`, `core`, ...
    pub name: String,
    /// Soft limit; `u64::MAX` is unlimited.
    pub soft: u64,
    /// Hard limit; `u64::MAX` is unlimited.
    pub hard: u64,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It returned this code.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
}

impl ExitStatus {
    /// The code a shell reports: the process's own, or 128 + the signal's number.
    pub fn shell_code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128_u8.saturating_add(signal),
        }
    }
}

/// A process in the guest, a row of `fcvm top`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestProcess {
    /// Process id in the container's PID namespace.
    pub pid: u32,
    /// Its parent's.
    pub parent_pid: u32,
    /// Name of the user, or the number where the container's passwd has no name for it.
    pub user: String,
    /// State letter of `/proc/PID/stat`.
    pub state: char,
    /// Start, nanoseconds since the guest's boot.
    pub started_ns: u64,
    /// Processor time used, nanoseconds.
    pub cpu_ns: u64,
    /// Resident memory in bytes.
    pub rss_bytes: u64,
    /// Controlling terminal, `?` where there is none.
    pub tty: String,
    /// Command line.
    pub command: String,
}

/// Counters of a guest, for `fcvm stats`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// Nanoseconds since the guest's boot.
    pub uptime_ns: u64,
    /// Processor time used by the whole guest, nanoseconds, all processors together.
    pub cpu_ns: u64,
    /// Memory the guest's kernel manages, bytes.
    pub memory_total_bytes: u64,
    /// Memory available without swapping, bytes (MemAvailable).
    pub memory_available_bytes: u64,
    /// Bytes received by the network interface.
    pub network_received_bytes: u64,
    /// Bytes sent by the network interface.
    pub network_sent_bytes: u64,
    /// Bytes read from the disks.
    pub disk_read_bytes: u64,
    /// Bytes written to the disks.
    pub disk_written_bytes: u64,
    /// Processes of the container.
    pub process_count: u32,
    /// Resident memory of the agent itself, bytes.
    pub agent_rss_bytes: u64,
}
