//! What of the host's network the guest's depends on: routes and name servers.

use std::net::IpAddr;

/// Most name servers that a resolver library uses, resolv.conf(5).
const NAME_SERVERS_MAX: usize = 3;
/// Most search domains used, resolv.conf(5) of glibc before 2.26 and of musl.
const SEARCH_DOMAINS_MAX: usize = 6;
/// Longest domain name, RFC 1035.
const DOMAIN_BYTES_MAX: usize = 253;

/// The host's default routes: the network interface of each, where there is one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostRoutes {
    /// Interface of the IPv4 default route.
    pub ipv4_interface: Option<String>,
    /// Interface of the IPv6 default route.
    pub ipv6_interface: Option<String>,
}

impl HostRoutes {
    /// Reads them from /proc/net. A table that can not be read has no routes.
    pub fn read() -> Self {
        let read = |name: &str| {
            std::fs::read_to_string(format!("/proc/self/net/{name}")).unwrap_or_default()
        };
        Self {
            ipv4_interface: ipv4_default(&read("route")),
            ipv6_interface: ipv6_default(&read("ipv6_route")),
        }
    }

    /// The host has a way to the IPv6 Internet.
    pub fn has_ipv6(&self) -> bool {
        self.ipv6_interface.is_some()
    }
}

/// RTF_UP, and not RTF_REJECT: include/uapi/linux/route.h.
fn is_usable(flags: &str) -> bool {
    u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & 0x201 == 0x1)
}

/// Lines of `Iface Destination Gateway Flags RefCnt Use Metric Mask ...`, numbers in hexadecimal.
fn ipv4_default(table: &str) -> Option<String> {
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let default = fields.len() > 7
            && fields[1] == "00000000"
            && fields[7] == "00000000"
            && is_usable(fields[3]);
        default.then(|| fields[0].to_owned())
    })
}

/// Lines of `destination length source length gateway metric count use flags interface`.
fn ipv6_default(table: &str) -> Option<String> {
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let default = fields.len() == 10
            && fields[0].bytes().all(|digit| digit == b'0')
            && fields[1] == "00"
            && is_usable(fields[8])
            && fields[9] != "lo";
        default.then(|| fields[9].to_owned())
    })
}

/// The host's name servers and search domains.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostResolver {
    /// Name servers, in order. Those with a scope (`fe80::1%eth0`) mean nothing elsewhere and are
    /// left out.
    pub servers: Vec<IpAddr>,
    /// Search domains, in order.
    pub search: Vec<String>,
}

impl HostResolver {
    /// Reads the text of a resolv.conf(5).
    pub fn parse(text: &str) -> Self {
        let mut resolver = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    let server = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                    if resolver.servers.len() < NAME_SERVERS_MAX {
                        resolver.servers.extend(server);
                    }
                }
                // The last one counts.
                Some("search" | "domain") => {
                    let usable = |word: &&str| *word != "." && is_domain(word);
                    resolver.search = words
                        .filter(usable)
                        .take(SEARCH_DOMAINS_MAX)
                        .map(str::to_owned)
                        .collect();
                }
                _ => {}
            }
        }
        resolver
    }
}

fn is_domain(word: &str) -> bool {
    word.len() <= DOMAIN_BYTES_MAX
        && word
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_of_all_kinds() {
        let resolver = HostResolver::parse(
            "# made by hand\nnameserver 127.0.0.53\nnameserver fe80::1%eth0\n\
             nameserver 2001:db8::53\noptions edns0\ndomain old.example\n\
             search corp.example a;b example.\nnameserver 192.0.2.1\nnameserver 192.0.2.2\n",
        );
        let servers: Vec<String> = resolver.servers.iter().map(IpAddr::to_string).collect();
        assert_eq!(servers, ["127.0.0.53", "2001:db8::53", "192.0.2.1"]);
        assert_eq!(resolver.search, ["corp.example", "example."]);
        assert_eq!(HostResolver::parse(""), HostResolver::default());
    }

    #[test]
    fn default_routes_are_found_in_the_kernels_tables() {
        let ipv4 = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
                    eth1\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n\
                    eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\n";
        assert_eq!(ipv4_default(ipv4).as_deref(), Some("eth0"));
        assert_eq!(ipv4_default("Iface\tDestination\n"), None);
        let zero = "0".repeat(32);
        let ipv6 = format!(
            "{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n\
             {zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00000003 eth2\n"
        );
        assert_eq!(ipv6_default(&ipv6).as_deref(), Some("eth2"));
        let only_reject = ipv6.lines().next().unwrap();
        assert_eq!(ipv6_default(only_reject), None);
    }
}
