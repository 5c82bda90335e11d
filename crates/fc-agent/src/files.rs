//! The files of the container that belong to the VM, not to the image: hosts, host name,
//! resolv.conf, machine-id. They live on the agent's tmpfs and are bind-mounted, so that the
//! image's own files stay untouched.

use std::fmt::Write;
use std::fs;

use fcvm_types::guest::GuestIdentity;
use fcvm_wire::Failure;

use crate::failure::Context;

/// Directory of the agent that holds them.
pub(crate) const DIRECTORY: &str = "/files";

/// Name below [`DIRECTORY`] and path in the container.
pub(crate) const FILES: [(&str, &str); 4] = [
    ("hosts", "/etc/hosts"),
    ("hostname", "/etc/hostname"),
    ("resolv.conf", "/etc/resolv.conf"),
    ("machine-id", "/etc/machine-id"),
];

/// Writes them, in place: the container sees the new content through its mounts. Without network there is no resolv.conf: the image's own is as good.
pub(crate) fn write(identity: &GuestIdentity) -> Result<(), Failure> {
    let write = |name: &str, text: &str| {
        fs::write(format!("{DIRECTORY}/{name}"), text).context("writing the container's files")
    };
    write("hosts", &hosts(identity))?;
    write("hostname", &format!("{}\n", identity.hostname))?;
    write("machine-id", &format!("{}\n", identity.machine_id))?;
    match resolv_conf(identity) {
        Some(text) => write("resolv.conf", &text),
        None => Ok(()),
    }
}

fn hosts(identity: &GuestIdentity) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost localhost.localdomain\n");
    text.push_str("::1\tlocalhost localhost.localdomain\n");
    for (address, names) in &identity.extra_hosts {
        let _ = writeln!(text, "{address}\t{names}");
    }
    match &identity.network {
        Some(network) => {
            let _ = writeln!(text, "{}\t{}", network.address, identity.hostname);
            if let Some(ipv6) = &network.ipv6 {
                let _ = writeln!(text, "{}\t{}", ipv6.address, identity.hostname);
            }
        }
        None => {
            let _ = writeln!(text, "127.0.1.1\t{}", identity.hostname);
        }
    }
    text
}

fn resolv_conf(identity: &GuestIdentity) -> Option<String> {
    let network = identity.network.as_ref()?;
    let mut text = String::new();
    if !network.dns_search.is_empty() {
        let _ = writeln!(text, "search {}", network.dns_search.join(" "));
    }
    for server in &network.dns_servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use fcvm_types::guest::{GuestIpv6, GuestNetwork};

    use super::*;

    fn identity() -> GuestIdentity {
        GuestIdentity {
            hostname: "web".into(),
            machine_id: "0".repeat(32),
            network: Some(GuestNetwork {
                address: "10.0.2.15".parse().unwrap(),
                prefix_length: 24,
                gateway: "10.0.2.2".parse().unwrap(),
                ipv6: Some(GuestIpv6 {
                    address: "fd00::15".parse().unwrap(),
                    prefix_length: 64,
                    gateway: "fd00::2".parse().unwrap(),
                }),
                dns_servers: vec!["10.0.2.3".parse().unwrap(), "fd00::3".parse().unwrap()],
                dns_search: vec!["example".into(), "lan.example".into()],
                mtu: 1500,
            }),
            extra_hosts: vec![("192.0.2.7".parse().unwrap(), "db cache".into())],
        }
    }

    #[test]
    fn hosts_has_loopback_extras_and_the_own_name() {
        assert_eq!(
            hosts(&identity()),
            "127.0.0.1\tlocalhost localhost.localdomain\n\
             ::1\tlocalhost localhost.localdomain\n\
             192.0.2.7\tdb cache\n10.0.2.15\tweb\nfd00::15\tweb\n"
        );
        let offline = GuestIdentity {
            network: None,
            ..identity()
        };
        assert!(hosts(&offline).ends_with("127.0.1.1\tweb\n"));
    }

    #[test]
    fn resolv_conf_has_search_and_servers() {
        assert_eq!(
            resolv_conf(&identity()).unwrap(),
            "search example lan.example\nnameserver 10.0.2.3\nnameserver fd00::3\n"
        );
        let offline = GuestIdentity {
            network: None,
            ..identity()
        };
        assert_eq!(resolv_conf(&offline), None);
    }
}
