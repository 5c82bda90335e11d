//! Networks with the real passt: it starts, reports what it can not do, and ends with its owner.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use fcvm_network::{
    Attachment, Backend, Card, HostResolver, HostRoutes, NetworkError, NetworkMode, NetworkOptions,
    attach, find_passt,
};
use fcvm_types::record::ProcessIdentity;

/// After so long a wait a test fails rather than hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn passt() -> Option<PathBuf> {
    let found = find_passt(&std::env::var("PATH").unwrap_or_default());
    if found.is_none() {
        println!("skipped: passt is not installed");
    }
    found
}

fn options(passt: PathBuf, ports: &[String]) -> NetworkOptions {
    NetworkOptions {
        ports: ports.iter().map(|text| text.parse().unwrap()).collect(),
        passt: Some(passt),
        resolver: HostResolver::parse("nameserver 127.0.0.53\nsearch corp.example\n"),
        routes: HostRoutes::read(),
    }
}

/// A network on which frames are carried.
async fn attached(options: &NetworkOptions) -> Attachment {
    let mut attachment = attach(NetworkMode::Rootless, options, Card::Stream)
        .await
        .unwrap();
    attachment.ready().await.unwrap();
    attachment
}

/// A TCP port that is free now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn socket(attachment: &Attachment) -> UnixStream {
    match &attachment.backend {
        Backend::Passt(socket) => {
            let socket = UnixStream::from(socket.try_clone().unwrap());
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        }
        other => panic!("{other:?}"),
    }
}

/// The next frame for the guest.
fn read_frame(mut socket: &UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    socket.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    socket.read_exact(&mut frame).unwrap();
    frame
}

fn is_udp_with(frame: &[u8], payload: &[u8]) -> bool {
    frame.len() > 42 && frame[12..14] == [8, 0] && frame[23] == 17 && frame.ends_with(payload)
}

/// An IPv4 UDP datagram in an Ethernet frame; UDP checksum 0 is "none".
fn udp_frame(guest_port: u16, to: std::net::SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let udp_length = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_length).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 2, 15]);
    ip.extend(to.ip().octets());
    let sum: u32 = ip
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = ((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&(!folded).to_be_bytes());
    let mut frame = vec![
        0x52, 0x54, 0, 0xfc, 0, 2, 0x52, 0x54, 0, 0xfc, 0, 0x0f, 8, 0,
    ];
    frame.extend(ip);
    for half in [guest_port, to.port(), udp_length, 0] {
        frame.extend(half.to_be_bytes());
    }
    frame.extend(payload);
    let mut message = (frame.len() as u32).to_be_bytes().to_vec();
    message.extend(frame);
    message
}

/// Bursts of frames, in between some that passt does not take: it loses none, and not its place.
#[tokio::test]
async fn many_frames_at_once_are_all_answered() {
    const ROUNDS: usize = 20;
    // passt has room for 128 frames at once.
    const BURST: usize = 100;
    let Some(passt) = passt() else { return };
    let attachment = attached(&options(passt, &[])).await;
    let socket = socket(&attachment);
    // Who has 10.0.2.2, tell 10.0.2.15: RFC 826.
    let mut question = vec![0xff; 6];
    question.extend([0x52, 0x54, 0, 0xfc, 0, 0x0f, 8, 6]);
    question.extend([0, 1, 8, 0, 6, 4, 0, 1, 0x52, 0x54, 0, 0xfc, 0, 0x0f]);
    question.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    let mut burst = Vec::new();
    for number in 0..BURST {
        // Each of another length, so that they end at any place of the kernel's buffers.
        let frame = [&question[..], &vec![0; number % 60]].concat();
        burst.extend((frame.len() as u32).to_be_bytes());
        burst.extend(frame);
        if number % 50 == 0 {
            burst.extend([0, 0, 0, 3, 1, 2, 3]);
        }
    }
    for round in 0..ROUNDS {
        (&socket).write_all(&burst).unwrap();
        for _ in 0..BURST {
            let frame = read_frame(&socket);
            assert_eq!(frame[12..14], [8, 6], "round {round}: {frame:?}");
        }
    }
    let relay = attachment.relay.as_ref().unwrap();
    let counters = relay.counters();
    assert_eq!(counters.frames_from_guest, (ROUNDS * BURST) as u64);
    assert_eq!(counters.frames_dropped, (ROUNDS * BURST / 50) as u64);
}

/// What a fork does: another hypervisor takes the network over, and a connection goes on.
#[tokio::test]
async fn successor_takes_the_network_over() {
    let Some(passt) = passt() else { return };
    let port = free_port();
    let options = options(passt, &[format!("127.0.0.1:{port}:7777/udp")]);
    let attachment = attached(&options).await;
    let old = socket(&attachment);
    let relay = attachment.relay.as_ref().unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(("127.0.0.1", port)).unwrap();
    let question = |text: &[u8], socket: &UnixStream| {
        client.send(text).unwrap();
        loop {
            let frame = read_frame(socket);
            if is_udp_with(&frame, text) {
                break u16::from_be_bytes([frame[34], frame[35]]);
            }
        }
    };
    let from_port = question(b"first", &old);
    let (successor, new) = relay.connect().unwrap();
    let new = UnixStream::from(new);
    new.set_read_timeout(Some(PATIENCE)).unwrap();
    relay.hold();
    client.send(b"while nobody runs").unwrap();
    assert!(relay.activate(successor));
    drop(old);
    while !is_udp_with(&read_frame(&new), b"while nobody runs") {}
    assert_eq!(question(b"second", &new), from_port);
    relay.disconnect(attachment.connection.unwrap());
    drop(new);
    assert_eq!(relay.ended().await, fcvm_network::RelayEnd::Hypervisor);
}

#[tokio::test]
async fn published_udp_port_leads_to_the_guest_and_its_answer_back() {
    let Some(passt) = passt() else { return };
    let port = free_port();
    let options = options(passt, &[format!("127.0.0.1:{port}:7777/udp")]);
    let attachment = attached(&options).await;
    let guest = attachment.guest.clone().unwrap();
    assert_eq!(guest.dns_servers, ["10.0.2.3".parse::<IpAddr>().unwrap()]);
    assert_eq!(guest.dns_search, ["corp.example"]);
    assert_eq!(guest.ipv6.is_some(), options.routes.has_ipv6());
    let socket = socket(&attachment);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.connect(("127.0.0.1", port)).unwrap();
    client.send(b"question").unwrap();
    let frame = loop {
        let frame = read_frame(&socket);
        if is_udp_with(&frame, b"question") {
            break frame;
        }
    };
    // From the gateway's address, to port 7777 of the guest.
    assert_eq!(frame[26..34], [10, 0, 2, 2, 10, 0, 2, 15]);
    assert_eq!(frame[36..38], 7777_u16.to_be_bytes());
    let from_port = u16::from_be_bytes([frame[34], frame[35]]);
    let back = format!("10.0.2.2:{from_port}").parse().unwrap();
    (&socket)
        .write_all(&udp_frame(7777, back, b"answer"))
        .unwrap();
    let mut answer = [0; 16];
    let length = client.recv(&mut answer).unwrap();
    assert_eq!(&answer[..length], b"answer");
}

#[tokio::test]
async fn published_tcp_port_listens_as_soon_as_the_network_is_ready() {
    let Some(passt) = passt() else { return };
    let port = free_port();
    let options = options(passt, &[format!("{port}:80")]);
    let attachment = attached(&options).await;
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    if options.routes.has_ipv6() {
        TcpStream::connect(("::1", port)).unwrap();
    }
    drop(attachment);
    TcpListener::bind(("127.0.0.1", port)).unwrap();
}

#[tokio::test]
async fn passt_ends_when_its_socket_is_closed() {
    let Some(passt) = passt() else { return };
    let attachment = attached(&options(passt, &[])).await;
    let helper = attachment.helper.unwrap();
    assert!(fcvm_process::is_running(helper.identity()));
    drop(attachment.backend);
    let exit = helper.wait().await;
    assert!(exit.status.success(), "{exit}");
}

#[tokio::test]
async fn taken_port_is_named() {
    let Some(passt) = passt() else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let options = options(passt, &[format!("{port}:80")]);
    let error = attach(NetworkMode::Rootless, &options, Card::Stream)
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&format!("port {port} of the host is taken")),
        "{text}"
    );
}

#[tokio::test]
async fn passt_that_gives_up_says_why() {
    let Some(passt) = passt() else { return };
    let mut options = options(passt, &[]);
    // The kernel has no such interface.
    options.routes = HostRoutes {
        ipv4_interface: None,
        ipv6_interface: Some("fcvm-missing".to_owned()),
    };
    let mut attachment = attach(NetworkMode::Rootless, &options, Card::Stream)
        .await
        .unwrap();
    let error = attachment.ready().await.unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, NetworkError::PasstFailed { .. }),
        "{error:?}"
    );
    assert!(
        text.contains("fcvm-missing") && !text.contains('\n'),
        "{text}"
    );
}

#[tokio::test]
async fn host_without_routes_still_has_published_ports() {
    let Some(passt) = passt() else { return };
    let port = free_port();
    let mut options = options(passt, &[format!("127.0.0.1:{port}:80")]);
    options.routes = HostRoutes::default();
    let _attachment = attached(&options).await;
    TcpStream::connect(("127.0.0.1", port)).unwrap();
}

#[tokio::test]
async fn without_passt_the_hypervisors_network_is_taken_with_a_note() {
    let options = NetworkOptions {
        ports: vec![format!("{}:80", free_port()).parse().unwrap()],
        ..NetworkOptions::default()
    };
    let attachment = attached(&options).await;
    assert_eq!(attachment.backend.name(), "user");
    assert!(
        attachment
            .note
            .unwrap()
            .contains("install the package passt")
    );
    let error = attach(NetworkMode::None, &options, Card::Stream)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("--network none"), "{error}");
    let nothing = NetworkOptions::default();
    let attachment = attach(NetworkMode::None, &nothing, Card::Stream)
        .await
        .unwrap();
    assert_eq!(attachment.backend.name(), "none");
    assert!(attachment.guest.is_none() && attachment.helper.is_none());
}

/// The test runs its own program a second time, as the owner.
#[tokio::test]
async fn killed_owner_takes_its_network_along() {
    const CHILD: &str = "FCVM_TEST_OWNER";
    let Some(passt) = passt() else { return };
    if std::env::var_os(CHILD).is_some() {
        let attachment = attached(&options(passt, &[])).await;
        let identity = attachment.helper.as_ref().unwrap().identity();
        println!("\npasst {} {}", identity.pid, identity.start_ticks);
        std::future::pending().await
    }
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "killed_owner_takes_its_network_along",
            "--nocapture",
        ])
        .env(CHILD, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    let identity = lines
        .find_map(|line| {
            let line = line.unwrap();
            let (pid, start_ticks) = line.strip_prefix("passt ")?.split_once(' ')?;
            Some(ProcessIdentity {
                pid: pid.parse().unwrap(),
                start_ticks: start_ticks.parse().unwrap(),
            })
        })
        .unwrap();
    assert!(fcvm_process::is_running(identity));
    owner.kill().unwrap();
    owner.wait().unwrap();
    fcvm_process::wait_gone(identity).await.unwrap();
}
