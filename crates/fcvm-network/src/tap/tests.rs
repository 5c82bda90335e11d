//! Tap devices with the real passt behind them; the test plays the hypervisor.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::sockopt;

use super::{BRIDGE, BRIDGE_MAC, HYPERVISOR_TAP, make_tap, raw};
use crate::attach::GUEST_MAC;
use crate::{
    Attachment, Backend, Card, HostResolver, HostRoutes, NetworkError, NetworkMode, NetworkOptions,
    attach, find_passt,
};

/// After so long a wait a test fails rather than hangs.
const PATIENCE: Timespec = Timespec {
    tv_sec: 60,
    tv_nsec: 0,
};
const HEADER: [u8; 10] = [0; 10];

/// Not a test: the child that makes the device.
#[test]
#[ignore = "started by the other tests"]
fn maker() {
    make_tap(std::io::stdin()).unwrap();
}

fn card() -> Card {
    let mut maker = Command::new(std::env::current_exe().unwrap());
    // With one test at a time the process has one thread.
    maker.args(["--exact", "tap::tests::maker", "--ignored"]);
    maker.args(["--nocapture", "--test-threads", "1"]);
    Card::Tap { maker }
}

/// A network with a tap device, the hypervisor's end of that, and its namespace; says why it is skipped without one.
async fn attached(ports: &[String]) -> Option<(Attachment, File, OwnedFd)> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can enter the device's namespace with one thread");
        return None;
    }
    let Some(passt) = find_passt(&std::env::var("PATH").unwrap_or_default()) else {
        println!("skipped: passt is not installed");
        return None;
    };
    let options = NetworkOptions {
        ports: ports.iter().map(|text| text.parse().unwrap()).collect(),
        passt: Some(passt),
        resolver: HostResolver::default(),
        routes: HostRoutes::read(),
    };
    let mut attachment = match attach(NetworkMode::Rootless, &options, card()).await {
        Ok(attachment) => attachment,
        Err(error @ (NetworkError::NoTunDevice | NetworkError::NamespaceForbidden { .. })) => {
            println!("skipped: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    attachment.ready().await.unwrap();
    let Backend::Tap(tap) = std::mem::replace(&mut attachment.backend, Backend::None) else {
        panic!("{:?}", attachment.backend);
    };
    assert_eq!(tap.name, HYPERVISOR_TAP);
    let mut namespaces = tap.namespaces;
    // Root needs no other than the network's.
    let namespace = namespaces.pop().unwrap();
    assert!(namespaces.is_empty());
    let device = enter(&namespace);
    Some((attachment, device, namespace))
}

/// Opens the device as a hypervisor does.
fn enter(namespace: &OwnedFd) -> File {
    inside(namespace, || {
        let device = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        raw::make_tap(&device, HYPERVISOR_TAP).unwrap();
        rustix::io::ioctl_fionbio(&device, true).unwrap();
        device
    })
}

/// What a thread in the namespace makes.
fn inside<T: Send>(namespace: &OwnedFd, make: impl FnOnce() -> T + Send) -> T {
    let make = || {
        rustix::thread::move_into_link_name_space(namespace.as_fd(), None).unwrap();
        make()
    };
    std::thread::scope(|scope| scope.spawn(make).join().unwrap())
}

/// Waits for what happens to the device.
fn wait(device: &File) -> PollFlags {
    let mut fds = [PollFd::new(device, PollFlags::IN)];
    let happened = rustix::event::poll(&mut fds, Some(&PATIENCE)).unwrap();
    assert_eq!(happened, 1, "waited in vain");
    fds[0].revents()
}

/// The next frame for the guest that fits.
fn frame(mut device: &File, fits: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut packet = vec![0; 70_000];
    loop {
        let Ok(count) = device.read(&mut packet) else {
            wait(device);
            continue;
        };
        let frame = &packet[HEADER.len()..count];
        if fits(frame) {
            return frame.to_vec();
        }
    }
}

fn send(mut device: &File, frame: &[u8]) {
    device.write_all(&[&HEADER[..], frame].concat()).unwrap();
}

fn is_readable_soon(device: &File) -> bool {
    let mut fds = [PollFd::new(device, PollFlags::IN)];
    let soon = Timespec::try_from(Duration::from_millis(20)).unwrap();
    rustix::event::poll(&mut fds, Some(&soon)).unwrap() == 1
}

/// Sends until there is an answer: the bridge lets frames through a moment after the device was opened.
fn wait_for_bridge(device: &File) {
    let question = crate::passt::arp_question();
    send(device, &question);
    while !is_readable_soon(device) {
        send(device, &question);
    }
    frame(device, |frame| frame[12..14] == [8, 6]);
}

fn free_udp_port() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

#[tokio::test]
async fn frames_of_any_size_come_through_both_ways() {
    const PAYLOAD: usize = 60_000;
    let port = free_udp_port();
    let Some((_attachment, device, _)) = attached(&[format!("127.0.0.1:{port}:7777/udp")]).await
    else {
        return;
    };
    wait_for_bridge(&device);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    client.connect(("127.0.0.1", port)).unwrap();
    for payload in [&b"question"[..], &vec![b'q'; PAYLOAD]] {
        client.send(payload).unwrap();
        let question = frame(&device, |frame| {
            frame[12..14] == [8, 0] && frame[23] == 17 && frame.ends_with(payload)
        });
        // The same back: addresses and ports change places, which changes no sum.
        let mut answer = question.clone();
        for (from, to, length) in [
            (0, 6, 6),
            (6, 0, 6),
            (26, 30, 4),
            (30, 26, 4),
            (34, 36, 2),
            (36, 34, 2),
        ] {
            answer[to..to + length].copy_from_slice(&question[from..from + length]);
        }
        send(&device, &answer);
        let mut received = vec![0; PAYLOAD + 1];
        let length = client.recv(&mut received).unwrap();
        assert_eq!(&received[..length], payload);
    }
}

#[tokio::test]
async fn many_frames_at_once_are_all_answered() {
    // passt has room for 128 frames at once.
    const BURST: usize = 100;
    let Some((attachment, device, _)) = attached(&[]).await else {
        return;
    };
    wait_for_bridge(&device);
    let counters = || attachment.relay.as_ref().unwrap().counters();
    let before = counters().frames_from_guest;
    let question = crate::passt::arp_question();
    for _ in 0..BURST {
        send(&device, &question);
    }
    for _ in 0..BURST {
        frame(&device, |frame| frame[12..14] == [8, 6]);
    }
    assert!(counters().frames_from_guest - before >= BURST as u64);
    assert_eq!(counters().frames_dropped, 0);
}

/// Has the bridge say something of its own, until the guest's side hears it: a report of the multicast
/// groups that it is in, RFC 3376.
fn let_bridge_speak(namespace: &OwnedFd, device: &File) -> Vec<u8> {
    let group = Ipv4Addr::new(239, 1, 2, 3);
    let (socket, bridge) = inside(namespace, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        let bridge = rustix::net::netdevice::name_to_index(&socket, BRIDGE).unwrap();
        (socket, bridge)
    });
    loop {
        let any = Ipv4Addr::UNSPECIFIED;
        sockopt::set_ip_add_membership_with_ifindex(&socket, &group, &any, bridge).unwrap();
        if is_readable_soon(device) {
            return frame(device, |frame| frame[12..14] == [8, 0] && frame[23] == 2);
        }
        sockopt::set_ip_drop_membership_with_ifindex(&socket, &group, &any, bridge).unwrap();
    }
}

/// A clone's guest may be silent: it asked for passt's address when it was its source.
#[tokio::test]
async fn a_guest_that_is_silent_is_reached() {
    // More than a few, so that passt has seen what came from the bridge.
    const QUESTIONS: u8 = 20;
    let port = free_udp_port();
    let published = format!("127.0.0.1:{port}:7777/udp");
    let Some((attachment, device, namespace)) = attached(&[published]).await else {
        return;
    };
    let report = let_bridge_speak(&namespace, &device);
    assert_eq!(report[6..12], BRIDGE_MAC);
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(("127.0.0.1", port)).unwrap();
    for question in 0..QUESTIONS {
        client.send(&[b'q', question]).unwrap();
        let heard = frame(&device, |frame| frame.ends_with(&[b'q', question]));
        assert_eq!(heard[..6], GUEST_MAC);
    }
    let relay = attachment.relay.as_ref().unwrap();
    assert_eq!(relay.counters().frames_from_guest, 0);
}

/// The kernel takes a namespace and all in it away with the last descriptor and process.
#[tokio::test]
async fn nothing_holds_the_namespace_of_a_network_that_was_dropped() {
    let Some((attachment, device, namespace)) = attached(&[]).await else {
        return;
    };
    wait_for_bridge(&device);
    let held = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    let name = std::fs::read_link(held).unwrap();
    let helper = attachment.helper.as_ref().unwrap().identity();
    drop((attachment, device, namespace));
    assert!(!fcvm_process::is_running(helper));
    let held = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let links = held.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    assert!(!links.into_iter().any(|link| link == name), "{name:?}");
}

#[tokio::test]
async fn without_passt_there_is_no_tap_device() {
    let options = NetworkOptions::default();
    let error = attach(NetworkMode::Rootless, &options, card())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("install the package passt"));
}

#[tokio::test]
async fn a_maker_that_fails_is_told() {
    let Some(passt) = find_passt(&std::env::var("PATH").unwrap_or_default()) else {
        println!("skipped: passt is not installed");
        return;
    };
    let options = NetworkOptions {
        passt: Some(passt),
        ..NetworkOptions::default()
    };
    for (program, words) in [
        ("/nowhere/maker", "cannot run /nowhere/maker"),
        (
            "/bin/false",
            "the process that makes the tap device has failed",
        ),
    ] {
        let maker = Command::new(program);
        let error = attach(NetworkMode::Rootless, &options, Card::Tap { maker })
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(words), "{error}");
    }
}
