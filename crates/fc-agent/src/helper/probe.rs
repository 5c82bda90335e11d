//! One HTTP GET from inside the guest: the status code is all that is asked for.
//!
//! HTTP/1.0 without TLS and without redirects: what a health check of a server in the same guest needs.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use fcvm_wire::{Failure, Outcome};

use crate::failure::{bad_request, guest};
use crate::files;

/// Longest time limit, in milliseconds.
const MAX_TIMEOUT_MS: u64 = 600_000;
/// Longest status line that is read.
const MAX_STATUS_BYTES: usize = 1024;

/// Asks for a URL and gives the status code.
pub(super) fn get(url: &str, timeout_ms: u64) -> Result<Outcome, Failure> {
    let target = Target::parse(url)?;
    let limit = Duration::from_millis(timeout_ms.clamp(1, MAX_TIMEOUT_MS));
    let deadline = Instant::now() + limit;
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::TimedOut | std::io::ErrorKind::WouldBlock => guest(format!(
            "{url} did not answer within {} ms",
            limit.as_millis()
        )),
        _ => guest(format!("{url} cannot be asked: {error}")),
    };
    let mut socket = TcpStream::connect_timeout(&target.address()?, limit).map_err(failed)?;
    socket.set_write_timeout(Some(limit)).map_err(failed)?;
    socket
        .write_all(target.request().as_bytes())
        .map_err(failed)?;
    let mut head = Vec::new();
    while !head.contains(&b'\n') && head.len() < MAX_STATUS_BYTES {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = left.max(Duration::from_millis(1));
        socket.set_read_timeout(Some(left)).map_err(failed)?;
        let mut buffer = [0; 256];
        match socket.read(&mut buffer).map_err(failed)? {
            0 => break,
            length => head.extend_from_slice(&buffer[..length]),
        }
        if Instant::now() >= deadline {
            return Err(failed(std::io::ErrorKind::TimedOut.into()));
        }
    }
    status(&head)
        .map(Outcome::Http)
        .ok_or_else(|| guest(format!("{url} does not answer with HTTP")))
}

/// Status code of an answer's first line.
fn status(head: &[u8]) -> Option<u16> {
    let line = head.split(|byte| *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?;
    let rest = line.strip_prefix("HTTP/")?;
    rest.split_whitespace()
        .nth(1)?
        .parse()
        .ok()
        .filter(|code| (100..1000).contains(code))
}

#[derive(Debug, PartialEq, Eq)]
struct Target<'a> {
    host: &'a str,
    port: u16,
    path: &'a str,
}

impl<'a> Target<'a> {
    fn parse(url: &'a str) -> Result<Self, Failure> {
        let wrong = || {
            bad_request(format!(
                "'{url}' is no URL of the form http://host[:port]/path"
            ))
        };
        let rest = url.strip_prefix("http://").ok_or_else(wrong)?;
        let end = rest.find('/').unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        if url.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            return Err(wrong());
        }
        let port = |text: &str| text.parse().map_err(|_| wrong());
        let (host, port) = match authority.strip_prefix('[') {
            Some(bracketed) => match bracketed.split_once(']').ok_or_else(wrong)? {
                (host, "") => (host, 80),
                (host, rest) => (host, port(rest.strip_prefix(':').ok_or_else(wrong)?)?),
            },
            None => match authority.split_once(':') {
                Some((host, text)) => (host, port(text)?),
                None => (authority, 80),
            },
        };
        if host.is_empty() {
            return Err(wrong());
        }
        let path = if path.is_empty() { "/" } else { path };
        Ok(Self { host, port, path })
    }

    fn request(&self) -> String {
        let host = if self.host.contains(':') {
            format!("[{}]", self.host)
        } else {
            self.host.to_owned()
        };
        format!(
            "GET {} HTTP/1.0\r\nHost: {host}:{}\r\nUser-Agent: fcvm\r\nConnection: close\r\n\r\n",
            self.path, self.port
        )
    }

    /// The address: a number, localhost, or a name in the container's hosts file.
    fn address(&self) -> Result<SocketAddr, Failure> {
        let address = if let Ok(address) = self.host.parse() {
            address
        } else if self.host == "localhost" {
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        } else {
            let hosts = std::fs::read_to_string(format!("{}/hosts", files::DIRECTORY));
            lookup(&hosts.unwrap_or_default(), self.host).ok_or_else(|| {
                bad_request(format!(
                    "the host '{}' of a health check must be an address, localhost or a name in \
                     the container's /etc/hosts",
                    self.host
                ))
            })?
        };
        Ok(SocketAddr::new(address, self.port))
    }
}

fn lookup(hosts: &str, wanted: &str) -> Option<IpAddr> {
    hosts.lines().find_map(|line| {
        let line = line.split('#').next()?;
        let mut words = line.split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|name| name == wanted).then_some(address)
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn parsed(url: &str) -> Option<(String, u16, String)> {
        let target = Target::parse(url).ok()?;
        Some((target.host.into(), target.port, target.path.into()))
    }

    #[test]
    fn urls_are_taken_apart() {
        let is = |url: &str, host: &str, port: u16, path: &str| {
            assert_eq!(parsed(url), Some((host.into(), port, path.into())), "{url}");
        };
        is("http://localhost", "localhost", 80, "/");
        is(
            "http://127.0.0.1:8080/health?x=1",
            "127.0.0.1",
            8080,
            "/health?x=1",
        );
        is("http://[::1]:81/", "::1", 81, "/");
        is("http://[fd00::1]/a", "fd00::1", 80, "/a");
        for url in [
            "https://localhost/",
            "http://",
            "http://:80/",
            "http://a:b/",
            "http://a:70000/",
            "http://a/\r\nX: y",
            "http://[::1/",
            "localhost:80",
        ] {
            assert_eq!(parsed(url), None, "{url}");
        }
    }

    #[test]
    fn status_lines_are_read() {
        assert_eq!(status(b"HTTP/1.1 204 No Content\r\n"), Some(204));
        assert_eq!(status(b"HTTP/1.0 200\n"), Some(200));
        assert_eq!(status(b"SSH-2.0-x\r\n"), None);
        assert_eq!(status(b"HTTP/1.1 99 x\r\n"), None);
        assert_eq!(status(b""), None);
    }

    #[test]
    fn names_are_looked_up_in_hosts() {
        let hosts = "127.0.0.1 localhost\n# 192.0.2.1 web\n192.0.2.2\tdb web # x\n";
        assert_eq!(lookup(hosts, "web"), Some("192.0.2.2".parse().unwrap()));
        assert_eq!(lookup(hosts, "x"), None);
    }

    #[test]
    fn a_server_is_asked_and_a_silent_one_is_given_up() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/ready", server.local_addr().unwrap());
        let answering = std::thread::spawn(move || {
            let (mut socket, _) = server.accept().unwrap();
            let mut request = [0; 512];
            let length = socket.read(&mut request).unwrap();
            socket.write_all(b"HTTP/1.0 503 Not yet\r\n\r\n").unwrap();
            (
                String::from_utf8_lossy(&request[..length]).into_owned(),
                server,
            )
        });
        assert_eq!(get(&url, 60_000), Ok(Outcome::Http(503)));
        let (request, _server) = answering.join().unwrap();
        assert!(request.starts_with("GET /ready HTTP/1.0\r\n"), "{request}");
        let failure = get(&url, 20).unwrap_err();
        assert!(
            failure.message.ends_with("did not answer within 20 ms"),
            "{failure:?}"
        );
    }
}
