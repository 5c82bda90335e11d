//! Published ports.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Transport protocol of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Transmission Control Protocol.
    Tcp,
    /// User Datagram Protocol.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads to a port of the guest: `[ip:]host:guest[/proto]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortMapping {
    /// Address of the host to listen on; all addresses where absent.
    pub host_address: Option<IpAddr>,
    /// Port of the host.
    pub host_port: u16,
    /// Port of the guest.
    pub guest_port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
}

/// A text that is no port mapping.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is not a port mapping: {reason}; write [ip:]host:guest[/tcp|udp], for example 127.0.0.1:8080:80"
)]
pub struct PortError {
    text: String,
    reason: &'static str,
}

impl FromStr for PortMapping {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, PortError> {
        let refuse = |reason| PortError {
            text: text.to_owned(),
            reason,
        };
        let (ports, protocol) = match text.rsplit_once('/') {
            None | Some((_, "tcp")) => (text.strip_suffix("/tcp").unwrap_or(text), Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(refuse("the protocol is neither tcp nor udp")),
        };
        let (host, guest_port) = ports
            .rsplit_once(':')
            .ok_or_else(|| refuse("the guest's port is missing"))?;
        let (address, host_port) = match host.rsplit_once(':') {
            None => ("", host),
            Some((address, host_port)) => (address, host_port),
        };
        let port = |text: &str| match text.parse::<u16>() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(refuse("a port is a number from 1 to 65535")),
        };
        let address = address
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .unwrap_or(address);
        let host_address = if address.is_empty() {
            None
        } else {
            Some(
                address
                    .parse()
                    .map_err(|_| refuse("the address is not an IP address"))?,
            )
        };
        Ok(Self {
            host_address,
            host_port: port(host_port)?,
            guest_port: port(guest_port)?,
            protocol,
        })
    }
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_address {
            None => write!(f, "0.0.0.0:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
        }
        write!(
            f,
            "{}->{}/{}",
            self.host_port, self.guest_port, self.protocol
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_podman_are_understood() {
        for (text, shown) in [
            ("8080:80", "0.0.0.0:8080->80/tcp"),
            ("8080:80/tcp", "0.0.0.0:8080->80/tcp"),
            ("127.0.0.1:5300:53/udp", "127.0.0.1:5300->53/udp"),
            ("[::1]:8080:80", "[::1]:8080->80/tcp"),
        ] {
            assert_eq!(text.parse::<PortMapping>().unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "80",
            "a:80",
            "80:a",
            "0:80",
            "65536:80",
            "80:80/sctp",
            "1.2.3:80:80",
            "80:",
        ] {
            let error = bad.parse::<PortMapping>().unwrap_err().to_string();
            assert!(error.contains("write [ip:]host:guest"), "{error}");
        }
    }
}
