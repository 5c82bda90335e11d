//! QEMU's command line: the machine and its devices, the boot, and why each part is as it is.

use fcvm_types::guest::AGENT_PORT_NAME;
use fcvm_types::{ByteSize, PortMapping};
use serde::{Deserialize, Serialize};

use super::Version;
use crate::spec::Accelerator;

/// Everything of a VM that a snapshot of it depends on, descriptors left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Machine {
    pub(super) cpu_count: u32,
    pub(super) memory: ByteSize,
    pub(super) accelerator: Accelerator,
    pub(super) disks: Vec<Disk>,
    pub(super) network: Option<Network>,
}

/// A block device as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) serial: String,
    pub(super) read_only: bool,
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
    pub(super) disks: Vec<i32>,
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
    /// The arguments that make the hardware. Descriptors are numbered from 0, whatever they were.
    pub arguments: Vec<String>,
}

impl Machine {
    /// The record of this machine's hardware.
    pub(super) fn device_line(&self, qemu_version: Version) -> DeviceLine {
        let disks = (0..self.disks.len()).map(|index| 4 + index as i32);
        let numbered = Descriptors {
            memory: 0,
            control: 1,
            agent: 2,
            console: 3,
            disks: disks.collect(),
            network: self.network.as_ref().map(|_| 4 + self.disks.len() as i32),
        };
        DeviceLine {
            qemu_version,
            arguments: self.hardware(&numbered),
        }
    }

    /// Arguments that make the virtual hardware.
    pub(super) fn hardware(&self, fds: &Descriptors) -> Vec<String> {
        let mut line = Line::default();
        // Nothing that was not asked for: no default devices, no configuration file of the user.
        line.flag("-nodefaults");
        line.flag("-no-user-config");
        // A shared file from the start, so that a fork can take the memory over without a copy.
        // The descriptor is the owner's memfd: /proc/self/fd is how QEMU is told of it.
        line.option(
            "-object",
            format!(
                "memory-backend-file,id=memory,size={},mem-path=/proc/self/fd/{},share=on",
                self.memory.bytes(),
                fds.memory
            ),
        );
        line.option("-machine", "microvm,memory-backend=memory".to_owned());
        line.option("-m", format!("{}B", self.memory.bytes()));
        line.option("-smp", self.cpu_count.to_string());
        match self.accelerator {
            Accelerator::Kvm => {
                line.option("-cpu", "host".to_owned());
                line.option("-accel", "kvm".to_owned());
            }
            Accelerator::Tcg { .. } => {
                line.option("-cpu", "max".to_owned());
                // The cache of translated code grows to 1 GiB where it may. A boot fills a sixth of
                // this; a full one is thrown away and filled again.
                line.option("-accel", "tcg,thread=multi,tb-size=256".to_owned());
            }
        }
        line.option("-global", "virtio-mmio.force-legacy=false".to_owned());
        self.serial_devices(&mut line, fds);
        for (disk, &fd) in self.disks.iter().zip(&fds.disks) {
            block_device(&mut line, disk, fd);
        }
        if let Some(network) = &self.network {
            network_device(&mut line, network, fds.network);
        }
        line.0
    }

    fn serial_devices(&self, line: &mut Line, fds: &Descriptors) {
        // The console is a file to QEMU: it may be a pipe as well, and a descriptor set is the one
        // way to name an inherited descriptor there. Without append it would be truncated, which no
        // pipe can be.
        line.option(
            "-add-fd",
            format!("fd={},set=0,opaque=console", fds.console),
        );
        line.option(
            "-chardev",
            "file,id=console,path=/dev/fdset/0,append=on".to_owned(),
        );
        line.option("-serial", "chardev:console".to_owned());
        line.option("-device", "virtio-serial-device,id=serial0".to_owned());
        line.option("-chardev", format!("socket,id=agent,fd={}", fds.agent));
        line.option(
            "-device",
            format!("virtserialport,chardev=agent,name={AGENT_PORT_NAME},nr=1"),
        );
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
        if let Accelerator::Tcg { tsc_khz: Some(khz) } = self.accelerator {
            // The guest's counter is the host's. Reliable: no watchdog that a loaded host upsets.
            args.push(format!("tsc_early_khz={khz} tsc=reliable"));
        }
        args.extend_from_slice(extra);
        args.join(" ")
    }

    /// Arguments that are the process's own: its window to the owner, its fences, what it boots.
    pub(super) fn process(&self, fds: &Descriptors, boot: &Boot) -> Vec<String> {
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
        line.option("-kernel", boot.kernel.clone());
        if let Some(initramfs) = &boot.initramfs {
            line.option("-initrd", initramfs.clone());
        }
        line.option("-append", self.kernel_args(&boot.extra_args));
        line.0
    }
}

fn block_device(line: &mut Line, disk: &Disk, fd: i32) {
    let set = fd;
    let serial = &disk.serial;
    line.option("-add-fd", format!("fd={fd},set={set},opaque={serial}"));
    // No lock: a read-only image is shared by design and content-addressed, a writable one has no
    // name by which another could open it.
    let file = format!("file.driver=file,file.filename=/dev/fdset/{set},file.locking=off");
    let mode = if disk.read_only {
        "read-only=on".to_owned()
    } else {
        // The disk ends with its VM and so can not outlive a crash of the host: the guest's flushes
        // need not reach the medium. What the guest discards goes back to the host's file system.
        "discard=unmap,file.discard=unmap,cache.no-flush=on,file.cache.no-flush=on".to_owned()
    };
    line.option(
        "-blockdev",
        format!("driver=raw,node-name={serial},{mode},{file}"),
    );
    // A full file system of the host stops the VM until there is space, so that nothing is lost;
    // every other error is the guest's to handle.
    line.option(
        "-device",
        format!("virtio-blk-device,drive={serial},serial={serial},werror=enospc,rerror=report"),
    );
}

fn network_device(line: &mut Line, network: &Network, fd: Option<i32>) {
    let netdev = match &network.backend {
        Backend::Stream => format!(
            "stream,id=net0,server=off,addr.type=fd,addr.str={}",
            fd.unwrap_or(-1)
        ),
        Backend::User { forwards, ipv6 } => user_network(forwards, *ipv6),
    };
    line.option("-netdev", netdev);
    let mac = network.mac.map(|byte| format!("{byte:02x}")).join(":");
    line.option(
        "-device",
        format!("virtio-net-device,netdev=net0,mac={mac}"),
    );
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
            accelerator: Accelerator::Tcg {
                tsc_khz: Some(2_250_000),
            },
            disks: vec![Disk {
                serial: "fcvm-root".to_owned(),
                read_only: true,
            }],
            network: Some(Network {
                mac: [0x52, 0x54, 0, 1, 2, 3],
                backend: Backend::Stream,
            }),
        }
    }

    #[test]
    fn device_line_does_not_depend_on_descriptor_numbers_or_the_boot() {
        let version = Version {
            major: 7,
            minor: 2,
            micro: 22,
        };
        let line = machine().device_line(version);
        assert_eq!(line, machine().device_line(version));
        let text = line.arguments.join(" ");
        assert!(text.contains("mac=52:54:00:01:02:03"), "{text}");
        assert!(!text.contains("-kernel"), "{text}");
        let mut other = machine();
        other.disks[0].read_only = false;
        assert_ne!(line, other.device_line(version));
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
