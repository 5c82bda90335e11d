//! QEMU's command line: the machine and its devices, the boot, and why each part is as it is.

use fcvm_types::guest::AGENT_PORT_NAME;
use fcvm_types::{ByteSize, PortMapping};
use serde::{Deserialize, Serialize};

use crate::spec::{Accelerator, DiskFormat, MemoryMapping};
use crate::version::Version;

/// Descriptor set of the console. Those of disks have the number of their descriptor, above 2.
const CONSOLE_SET: i32 = 0;
/// Descriptor set of the pipe that device state is saved to.
pub(super) const STATE_SET: i32 = 1;

/// A VM without its descriptors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Machine {
    pub(super) cpu_count: u32,
    pub(super) memory: ByteSize,
    pub(super) mapping: MemoryMapping,
    pub(super) accelerator: Accelerator,
    pub(super) translation_cache: ByteSize,
    pub(super) disks: Vec<Disk>,
    pub(super) network: Option<Network>,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) serial: String,
    pub(super) read_only: bool,
    /// Formats of its files, the lowest first.
    pub(super) layers: Vec<DiskFormat>,
}

/// The network interface as the guest sees it, and which kind of backend it is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Network {
    pub(super) mac: [u8; 6],
    pub(super) backend: Backend,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Backend {
    Stream,
    User {
        forwards: Vec<PortMapping>,
        ipv6: bool,
    },
}

/// Numbers of the descriptors in QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptors {
    pub(super) memory: i32,
    pub(super) control: i32,
    pub(super) agent: i32,
    pub(super) console: i32,
    /// Where device state is written.
    pub(super) state: i32,
    /// The files of each disk.
    pub(super) disks: Vec<Vec<i32>>,
    pub(super) network: Option<i32>,
}

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Boot {
    pub(super) kernel: String,
    pub(super) initramfs: Option<String>,
    pub(super) extra_args: Vec<String>,
}

/// The virtual hardware, word for word, and the QEMU that made it. A snapshot can be loaded only
/// into the same; QEMU itself checks little of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceLine {
    /// QEMU's version.
    pub qemu_version: Version,
    /// The arguments that make what the guest sees, without what stands behind it on the host.
    pub arguments: Vec<String>,
}

impl DeviceLine {
    /// What of `saved` this hardware is not, as one clause; nothing where they are the same.
    pub fn difference(&self, saved: &Self) -> Option<String> {
        if self.qemu_version != saved.qemu_version {
            return Some(format!(
                "it was made by QEMU {} and this is QEMU {}",
                saved.qemu_version, self.qemu_version
            ));
        }
        if self.arguments == saved.arguments {
            return None;
        }
        let pairs = saved.arguments.iter().zip(&self.arguments);
        let (then, now) = pairs
            .clone()
            .find(|(then, now)| then != now)
            .map_or(("more parts", "fewer parts"), |(then, now)| {
                (then.as_str(), now.as_str())
            });
        Some(format!(
            "its virtual hardware has '{then}' where this VM has '{now}'"
        ))
    }
}

impl Machine {
    /// The record of this machine's hardware.
    pub(super) fn device_line(&self, qemu_version: Version) -> DeviceLine {
        let mut line = Line::default();
        self.devices(&mut line);
        // The state of the network card's backend is part of the device state for QEMU's own.
        let backend = self.network.as_ref().map(|network| &network.backend);
        match backend {
            Some(Backend::Stream) => line.option("-netdev", "stream".to_owned()),
            Some(Backend::User { .. }) => line.option("-netdev", "user".to_owned()),
            None => {}
        }
        DeviceLine {
            qemu_version,
            arguments: line.0,
        }
    }

    /// Arguments that make the virtual hardware and what stands behind it.
    pub(super) fn hardware(&self, fds: &Descriptors) -> Vec<String> {
        let mut line = Line::default();
        // Nothing that was not asked for: no default devices, no configuration file of the user.
        line.flag("-nodefaults");
        line.flag("-no-user-config");
        self.backends(&mut line, fds);
        self.devices(&mut line);
        line.0
    }

    /// What the guest sees.
    fn devices(&self, line: &mut Line) {
        line.option("-machine", "microvm,memory-backend=memory".to_owned());
        line.option("-m", format!("{}B", self.memory.bytes()));
        line.option("-smp", self.cpu_count.to_string());
        let cpu = match self.accelerator {
            Accelerator::Kvm => "host",
            // With the "fast string" flags the kernel clears and copies memory by one instruction,
            // which QEMU emulates byte by byte.
            Accelerator::Tcg { .. } => "max,-erms,-fsrm",
        };
        line.option("-cpu", cpu.to_owned());
        line.option("-global", "virtio-mmio.force-legacy=false".to_owned());
        line.option("-serial", "chardev:console".to_owned());
        // The agent's port is number 1; for each that there could be the guest sets queues up.
        line.option(
            "-device",
            "virtio-serial-device,id=serial0,max_ports=2".to_owned(),
        );
        line.option(
            "-device",
            format!("virtserialport,chardev=agent,name={AGENT_PORT_NAME},nr=1"),
        );
        for Disk { serial, .. } in &self.disks {
            // A full file system of the host stops the VM until there is space, so that nothing is
            // lost; every other error is the guest's to handle.
            line.option(
                "-device",
                format!(
                    "virtio-blk-device,drive={serial},serial={serial},werror=enospc,rerror=report"
                ),
            );
        }
        if let Some(network) = &self.network {
            let mac = network.mac.map(|byte| format!("{byte:02x}")).join(":");
            line.option(
                "-device",
                format!("virtio-net-device,netdev=net0,mac={mac}"),
            );
        }
    }

    /// What stands behind the devices on the host.
    fn backends(&self, line: &mut Line, fds: &Descriptors) {
        // A file from the start, so that a fork can take the memory over without a copy. The
        // descriptor is the owner's memfd: /proc/self/fd is how QEMU is told of it.
        let share = match self.mapping {
            MemoryMapping::Shared => "on",
            MemoryMapping::CopyOnWrite => "off",
        };
        line.option(
            "-object",
            format!(
                "memory-backend-file,id=memory,size={},mem-path=/proc/self/fd/{},share={share}",
                self.memory.bytes(),
                fds.memory
            ),
        );
        let accelerator = match self.accelerator {
            Accelerator::Kvm => "kvm".to_owned(),
            // The cache of translated code grows to 1 GiB where it may.
            Accelerator::Tcg { .. } => format!(
                "tcg,thread=multi,tb-size={}",
                self.translation_cache.bytes() >> 20
            ),
        };
        line.option("-accel", accelerator);
        // The console is a file to QEMU: it may be a pipe as well, and a descriptor set is the one
        // way to name an inherited descriptor there. Without append it would be truncated, which no
        // pipe can be.
        line.option(
            "-add-fd",
            format!("fd={},set={CONSOLE_SET},opaque=console", fds.console),
        );
        line.option(
            "-chardev",
            format!("file,id=console,path=/dev/fdset/{CONSOLE_SET},append=on"),
        );
        line.option(
            "-add-fd",
            format!("fd={},set={STATE_SET},opaque=state", fds.state),
        );
        line.option("-chardev", format!("socket,id=agent,fd={}", fds.agent));
        for (disk, fds) in self.disks.iter().zip(&fds.disks) {
            block_device(line, disk, fds);
        }
        if let Some(network) = &self.network {
            network_backend(line, network, fds.network);
        }
        // Device state is saved without a section about the machine: the device line is checked
        // instead, and whole.
        line.option("-global", "migration.send-configuration=off".to_owned());
    }

    /// The kernel's command line.
    fn kernel_args(&self, extra: &[String]) -> String {
        let mut args = vec![
            // `quiet` keeps warnings, errors and panics, which is what the console log is for.
            "console=ttyS0 quiet".to_owned(),
            // A triple fault is the reset that works without any device; -no-reboot makes it an
            // exit. A panic resets at once.
            "reboot=t panic=-1".to_owned(),
            // Self tests of the ciphers: the largest part of a boot that can be left out.
            "cryptomgr.notests".to_owned(),
            "random.trust_cpu=on".to_owned(),
        ];
        if let Accelerator::Tcg { tsc_khz } = self.accelerator {
            // One processor's locked instructions are not locked in translated code, whatever they say: thousands of
            // places in the kernel need not be written over, and translated again.
            args.push("noreplace-smp".to_owned());
            if let Some(khz) = tsc_khz {
                // The guest's counter is the host's. Reliable: no watchdog that a loaded host upsets.
                args.push(format!("tsc_early_khz={khz} tsc=reliable"));
            }
        }
        args.extend_from_slice(extra);
        args.join(" ")
    }

    /// Arguments that are the process's own: its window to the owner and its fences.
    pub(super) fn process(fds: &Descriptors) -> Vec<String> {
        let mut line = Line::default();
        line.option("-display", "none".to_owned());
        // A guest that resets ends its VM.
        line.flag("-no-reboot");
        // The guest waits until the control channel is open, or an early end would go untold.
        line.flag("-S");
        line.option(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned(),
        );
        line.option("-chardev", format!("socket,id=control,fd={}", fds.control));
        line.option("-mon", "chardev=control,mode=control".to_owned());
        line.0
    }

    /// Arguments that say what is booted.
    pub(super) fn boot(&self, boot: &Boot) -> Vec<String> {
        let mut line = Line::default();
        line.option("-kernel", boot.kernel.clone());
        if let Some(initramfs) = &boot.initramfs {
            line.option("-initrd", initramfs.clone());
        }
        line.option("-append", self.kernel_args(&boot.extra_args));
        line.0
    }
}

/// The block nodes of a disk, one over the other. The uppermost has the serial as its name.
fn block_device(line: &mut Line, disk: &Disk, fds: &[i32]) {
    let serial = &disk.serial;
    let top = fds.len().saturating_sub(1);
    for (index, (format, fd)) in disk.layers.iter().zip(fds).enumerate() {
        line.option("-add-fd", format!("fd={fd},set={fd},opaque={serial}"));
        // No lock: a read-only file is shared by design, a writable one has no name by which another
        // could open it.
        let file = format!("file.driver=file,file.filename=/dev/fdset/{fd},file.locking=off");
        let name = if index == top {
            serial.clone()
        } else {
            layer_name(serial, index)
        };
        let mode = if disk.read_only || index < top {
            "read-only=on".to_owned()
        } else {
            // The disk ends with its VM and so can not outlive a crash of the host: the guest's
            // flushes need not reach the medium. What the guest discards goes back to the host's
            // file system.
            "discard=unmap,file.discard=unmap,cache.no-flush=on,file.cache.no-flush=on".to_owned()
        };
        let format = match format {
            DiskFormat::Raw => "driver=raw".to_owned(),
            DiskFormat::Qcow2 => format!(
                "driver=qcow2,backing={}",
                layer_name(serial, index.saturating_sub(1))
            ),
        };
        line.option(
            "-blockdev",
            format!("{format},node-name={name},{mode},{file}"),
        );
    }
}

/// Name of the block node of a frozen layer.
fn layer_name(serial: &str, index: usize) -> String {
    format!("{serial}.{index}")
}

fn network_backend(line: &mut Line, network: &Network, fd: Option<i32>) {
    let netdev = match &network.backend {
        Backend::Stream => format!(
            "stream,id=net0,server=off,addr.type=fd,addr.str={}",
            fd.unwrap_or(-1)
        ),
        Backend::User { forwards, ipv6 } => user_network(forwards, *ipv6),
    };
    line.option("-netdev", netdev);
}

fn user_network(forwards: &[PortMapping], ipv6: bool) -> String {
    let ipv6 = if ipv6 { "on" } else { "off" };
    // QEMU takes a network with one family named to be without the other.
    let mut netdev =
        format!("user,id=net0,ipv4=on,ipv6={ipv6},net=10.0.2.0/24,host=10.0.2.2,dns=10.0.2.3");
    for forward in forwards {
        let address = forward
            .host_address
            .map_or_else(String::new, |address| address.to_string());
        netdev.push_str(&format!(
            ",hostfwd={}:{address}:{}-:{}",
            forward.protocol, forward.host_port, forward.guest_port
        ));
    }
    netdev
}

#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    fn option(&mut self, name: &str, value: String) {
        self.0.push(name.to_owned());
        self.0.push(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            cpu_count: 2,
            memory: ByteSize::from_mib(256),
            mapping: MemoryMapping::Shared,
            accelerator: Accelerator::Tcg {
                tsc_khz: Some(2_250_000),
            },
            translation_cache: ByteSize::from_mib(256),
            disks: vec![Disk {
                serial: "fcvm-root".to_owned(),
                read_only: true,
                layers: vec![DiskFormat::Raw],
            }],
            network: Some(Network {
                mac: [0x52, 0x54, 0, 1, 2, 3],
                backend: Backend::Stream,
            }),
        }
    }

    #[test]
    fn device_line_is_what_the_guest_sees_and_nothing_else() {
        let version = Version {
            major: 7,
            minor: 2,
            micro: 22,
        };
        let line = machine().device_line(version);
        let text = line.arguments.join(" ");
        assert!(text.contains("mac=52:54:00:01:02:03"), "{text}");
        assert!(!text.contains("fd"), "{text}");
        let clone = Machine {
            mapping: MemoryMapping::CopyOnWrite,
            translation_cache: ByteSize::from_mib(32),
            ..machine()
        };
        assert_eq!(line.difference(&clone.device_line(version)), None);
        let larger = Machine {
            memory: ByteSize::from_mib(512),
            ..machine()
        };
        let difference = line.difference(&larger.device_line(version)).unwrap();
        assert!(
            difference.contains("'536870912B' where this VM has '268435456B'"),
            "{difference}"
        );
        let newer = Version {
            major: 9,
            ..version
        };
        let difference = line.difference(&machine().device_line(newer)).unwrap();
        assert!(difference.contains("QEMU 9.2.22"), "{difference}");
    }

    #[test]
    fn layers_of_a_disk_lie_one_over_the_other() {
        let disk = Disk {
            serial: "data".to_owned(),
            read_only: false,
            layers: vec![DiskFormat::Raw, DiskFormat::Qcow2, DiskFormat::Qcow2],
        };
        let mut line = Line::default();
        block_device(&mut line, &disk, &[7, 8, 9]);
        let nodes: Vec<_> = line
            .0
            .iter()
            .filter(|text| text.contains("node-name"))
            .collect();
        assert!(nodes[0].starts_with("driver=raw,node-name=data.0,read-only=on,"));
        assert!(nodes[1].starts_with("driver=qcow2,backing=data.0,node-name=data.1,read-only=on,"));
        assert!(nodes[2].starts_with("driver=qcow2,backing=data.1,node-name=data,discard=unmap,"));
    }

    #[test]
    fn callers_kernel_arguments_come_last() {
        let args = machine().kernel_args(&["quiet=0".to_owned(), "loglevel=7".to_owned()]);
        assert!(args.ends_with("tsc_early_khz=2250000 tsc=reliable quiet=0 loglevel=7"));
        let kvm = Machine {
            accelerator: Accelerator::Kvm,
            ..machine()
        };
        assert!(!kvm.kernel_args(&[]).contains("tsc"));
    }

    #[test]
    fn published_ports_of_the_user_network() {
        let forwards = ["8080:80", "127.0.0.1:5300:53/udp"].map(|text| text.parse().unwrap());
        let netdev = user_network(&forwards, false);
        assert!(
            netdev.ends_with("dns=10.0.2.3,hostfwd=tcp::8080-:80,hostfwd=udp:127.0.0.1:5300-:53"),
            "{netdev}"
        );
    }
}
