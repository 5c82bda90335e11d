//! Networks: published ports, outbound connections, names, and none at all.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::time::Duration;

use crate::base::{IMAGE, find};
use crate::lab::{Lab, is_root};
use crate::process::limit;

/// A port of the host that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// The host's own address that is not its loopback. Nothing is sent.
fn host_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("198.51.100.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

/// A web server on the host's own address.
pub(crate) struct HostService {
    pub(crate) url: String,
    requests: mpsc::Receiver<String>,
}

impl HostService {
    /// `None` where a guest cannot get at one; it is told why.
    pub(crate) fn start() -> Option<Self> {
        let Some(address) = host_address() else {
            println!("skipped: the host has no address but its loopback");
            return None;
        };
        if find("passt").is_none() {
            println!("skipped: passt is not installed");
            return None;
        }
        let server = TcpListener::bind((address, 0)).unwrap();
        let port = server.local_addr().unwrap().port();
        let (heard, requests) = mpsc::channel();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = server.accept() {
                if let Ok(request) = Self::answer(stream) {
                    let _ = heard.send(request);
                }
            }
        });
        let url = format!("http://{address}:{port}/from-inside");
        Some(Self { url, requests })
    }

    fn answer(mut stream: TcpStream) -> std::io::Result<String> {
        let mut request = Vec::new();
        // A client that closes its side early would meet a passt before 2024 that forgets the rest.
        while !request.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            request.extend(byte);
        }
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfrom the host\n")?;
        Ok(String::from_utf8_lossy(&request).into_owned())
    }
}

/// What a web server says.
fn get(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(limit())).unwrap();
    stream
        .write_all(b"GET /index.html HTTP/1.0\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Sends datagrams until one comes back.
fn echo(port: u16) -> Vec<u8> {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(("127.0.0.1", port)).unwrap();
    // A datagram may get lost on the way: it is sent again after a while.
    socket
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    let deadline = std::time::Instant::now() + limit();
    let mut answer = [0; 100];
    loop {
        socket.send(b"datagram").unwrap();
        match socket.recv(&mut answer) {
            Ok(length) => return answer[..length].to_vec(),
            Err(error) => assert!(
                std::time::Instant::now() < deadline,
                "no datagram came back: {error}"
            ),
        }
    }
}

fn published_ports(lab: &Lab) {
    let (tcp, udp) = (free_port(), free_port());
    let (publish_tcp, publish_udp) = (format!("127.0.0.1:{tcp}:80"), format!("{udp}:7/udp"));
    let services = "trap 'exit 0' TERM; httpd -p 80 -h /var/www; tool udp-echo 7 & while :; do sleep 1000 & wait $!; done";
    lab.fcvm(&[
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        &publish_tcp,
        "-p",
        &publish_udp,
        IMAGE,
        "sh",
        "-c",
        services,
    ]);
    let listed = lab.json(&["ls", "--format", "json"]);
    assert_eq!(listed[0]["ports"][0]["host_port"], tcp);
    assert_eq!(listed[0]["ports"][1]["protocol"], "udp");
    assert!(
        listed[0]["network"]
            .as_str()
            .unwrap()
            .starts_with("rootless"),
        "{listed}"
    );
    assert!(
        lab.ok(&["ls"])
            .contains(&format!("127.0.0.1:{tcp}->80/tcp"))
    );
    lab.sh("web", "until netstat -ltn | grep -q ':80 '; do usleep 10000; done; until netstat -lun | grep -q ':7 '; do usleep 10000; done");
    let answer = get(tcp);
    assert!(
        answer.starts_with("HTTP/1.") && answer.ends_with("served by the guest\n"),
        "{answer}"
    );
    assert_eq!(echo(udp), b"datagram");

    // Taken: one line that names the port, and nothing is left of the second VM.
    let line = lab.fails(
        125,
        &[
            "run",
            "--rm",
            "--name",
            "second",
            "-p",
            &publish_tcp,
            IMAGE,
            "true",
        ],
    );
    assert!(line.contains(&tcp.to_string()), "{line}");
    assert_eq!(lab.ok(&["ls", "-a", "-q"]).lines().count(), 1);
    lab.ok(&["stop", "web"]);
    lab.wait_for_no_process();
    assert!(
        TcpStream::connect(("127.0.0.1", tcp)).is_err(),
        "the port is still open"
    );
    lab.ok(&["rm", "web"]);
}

#[test]
fn ports_are_published_through_passt() {
    let Some(lab) = Lab::new() else { return };
    if find("passt").is_none() {
        println!("skipped: passt is not installed");
        return;
    }
    published_ports(&lab);
    lab.finish();
}

#[test]
fn ports_are_published_without_passt() {
    let Some(mut lab) = Lab::of_qemu("has a network of its own, without passt") else {
        return;
    };
    lab.without_program("passt");
    let output = lab.fcvm(&["run", "--rm", IMAGE, "cat", "/etc/resolv.conf"]);
    assert_eq!(output.code, 0, "{output:?}");
    assert!(
        output.stderr.contains("passt is not installed"),
        "{output:?}"
    );
    assert!(output.text().contains("nameserver"), "{output:?}");
    published_ports(&lab);
    lab.finish();
}

/// passt shuts itself in a user namespace, and some hosts have none.
#[test]
fn a_host_without_user_namespaces_has_qemus_network() {
    let Some(lab) = Lab::of_qemu("has a network of its own, without passt") else {
        return;
    };
    if find("passt").is_none() {
        println!("skipped: passt is not installed");
        return;
    }
    // The limit of a namespace counts for what is in it.
    let script = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$@\"";
    let fcvm = lab.program();
    let shell = ["--user", "--map-root-user", "sh", "-c", script, "sh", fcvm];
    let run = |flags: &[&str]| {
        let run = [&["run", "--rm"], flags, &[IMAGE, "cat", "/etc/resolv.conf"]].concat();
        crate::process::run(lab.tool("unshare", &[&shell[..], &run].concat()))
    };
    let output = run(&[]);
    assert_eq!(output.code, 0, "{output:?}");
    assert!(
        output.stderr.contains("this host forbids them"),
        "{output:?}"
    );
    assert!(output.text().contains("nameserver"), "{output:?}");
    let output = run(&["--publish", "[::1]:8080:80"]);
    assert_eq!(output.code, 125, "{output:?}");
    assert!(
        output.stderr.contains("allow user namespaces"),
        "{output:?}"
    );
    lab.finish();
}

#[test]
fn the_guest_reaches_the_hosts_network_and_not_its_loopback() {
    let Some(lab) = Lab::new() else { return };
    let Some(service) = HostService::start() else {
        return;
    };
    lab.idle_vm("box", &[]);
    assert_eq!(
        lab.ok(&["exec", "box", "wget", "-q", "-O", "-", &service.url]),
        "from the host\n"
    );
    let request = service.requests.recv().unwrap();
    assert!(request.starts_with("GET /from-inside "), "{request}");

    let inner = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = inner.local_addr().unwrap().port();
    inner.set_nonblocking(true).unwrap();
    for gateway in ["10.0.2.2", "127.0.0.1"] {
        let tried = lab.fcvm(&[
            "exec",
            "box",
            "sh",
            "-c",
            &format!("echo x | nc -w 3 {gateway} {port}"),
        ]);
        assert_ne!(tried.code, 0, "{gateway}: {tried:?}");
    }
    assert!(
        inner.accept().is_err(),
        "the guest reached the host's loopback"
    );
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}

/// A name server that knows one name, `inside.test`, and nothing else.
struct NameServer(SocketAddr);

const KNOWN_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 77);

impl NameServer {
    fn start(address: IpAddr) -> std::io::Result<Self> {
        let socket = UdpSocket::bind((address, 53))?;
        let address = socket.local_addr()?;
        std::thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut query) {
                if let Some(answer) = Self::answer(&query[..length]) {
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok(Self(address))
    }

    /// RFC 1035: the question back, and an A record for the one name.
    fn answer(query: &[u8]) -> Option<Vec<u8>> {
        const NAME: &[u8] = b"\x06inside\x04test\0";
        let end = 12 + query.get(12..)?.iter().position(|byte| *byte == 0)? + 1;
        let question = query.get(12..end + 4)?;
        let known = question[..question.len() - 4].eq_ignore_ascii_case(NAME);
        let is_a = known && question.ends_with(&[0, 1, 0, 1]);
        let mut answer = query[..2].to_vec();
        answer.extend([
            0x85,
            if known { 0x80 } else { 0x83 },
            0,
            1,
            0,
            u8::from(is_a),
            0,
            0,
            0,
            0,
        ]);
        answer.extend(question);
        if is_a {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(KNOWN_ADDRESS.octets());
        }
        Some(answer)
    }
}

#[test]
fn names_are_asked_of_the_given_server() {
    let Some(lab) = Lab::new() else { return };
    let Some(address) = host_address() else {
        println!("skipped: the host has no address but its loopback");
        return;
    };
    let server = match NameServer::start(address) {
        Ok(server) => server.0.ip().to_string(),
        Err(error) => {
            println!("skipped: a name server on port 53 of {address}: {error}");
            return;
        }
    };
    let script = "cat /etc/resolv.conf; nslookup -type=a inside.test; nslookup unknown.test";
    let output = lab.fcvm(&["run", "--rm", "--dns", &server, IMAGE, "sh", "-c", script]);
    assert!(
        output.text().starts_with(&format!("nameserver {server}\n")),
        "{output:?}"
    );
    assert!(
        output.text().contains(&KNOWN_ADDRESS.to_string()),
        "{output:?}"
    );
    assert_eq!(output.code, 1, "an unknown name: {output:?}");
    lab.finish();
}

/// A host whose name server is on its loopback, as systemd-resolved's is: passt forwards to it.
#[test]
fn names_are_forwarded_to_a_server_on_the_hosts_loopback() {
    let Some(mut lab) = Lab::new() else { return };
    // A pool would be mounted in the namespace that is made here, where nobody finds it later.
    lab.disk_store = Some("copy".to_owned());
    if !is_root() || find("passt").is_none() {
        println!(
            "skipped: another /etc/resolv.conf for fcvm needs root, and forwarding needs passt"
        );
        return;
    }
    let address = Ipv4Addr::new(127, 0, 0, 99);
    if let Err(error) = NameServer::start(address.into()) {
        println!("skipped: a name server on port 53 of {address}: {error}");
        return;
    }
    let resolver = lab.write(
        "resolv.conf",
        format!("nameserver {address}\nsearch corp.test\n"),
    );
    let script = format!(
        "mount --bind {resolver} /etc/resolv.conf && exec '{}' run --rm {IMAGE} sh -c 'cat /etc/resolv.conf; nslookup -type=a inside.test'",
        lab.program()
    );
    let output = crate::process::run(lab.tool("unshare", &["-m", "sh", "-c", &script]));
    assert_eq!(output.code, 0, "{output:?}");
    assert!(
        output.text().contains("nameserver 10.0.2.3\n"),
        "{output:?}"
    );
    assert!(output.text().contains("search corp.test\n"), "{output:?}");
    assert!(
        output.text().contains(&KNOWN_ADDRESS.to_string()),
        "{output:?}"
    );
    lab.finish();
}

#[test]
fn a_vm_without_network_has_its_loopback_only() {
    let Some(lab) = Lab::new() else { return };
    let script = "ls /sys/class/net; ip addr show lo | grep -c 'inet 127.0.0.1'; nc -w 1 10.0.2.2 80 || echo unreachable";
    let text = lab.ok(&[
        "run",
        "--rm",
        "--network",
        "none",
        IMAGE,
        "sh",
        "-c",
        &format!("({script}) 2>/dev/null"),
    ]);
    assert_eq!(text, "lo\n1\nunreachable\n");
    lab.finish();
}

/// passt dying takes the network, not the VM.
#[test]
fn a_vm_outlives_its_network() {
    let Some(lab) = Lab::new() else { return };
    let Some(passt) = find("passt") else {
        println!("skipped: passt is not installed");
        return;
    };
    lab.idle_vm("box", &[]);
    let name = passt.file_name().unwrap().to_str().unwrap().to_owned();
    for pid in lab.processes_of(&name) {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        assert!(crate::process::wait_gone(pid));
    }
    assert_eq!(lab.sh("box", "echo still here"), "still here\n");
    lab.ok(&["rm", "-f", "box"]);
    lab.finish();
}
