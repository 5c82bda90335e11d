//! A program for guests, built by the suite as one static file: what busybox has no applet for.
//!
//! Without arguments it waits for ever: as the guest's process 1 it is an agent that never speaks.

use std::net::UdpSocket;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["udp-echo", port] => udp_echo(port.parse().expect("a port")),
        _ => loop {
            std::thread::park();
        },
    }
}

/// Sends every datagram back to where it came from.
fn udp_echo(port: u16) {
    let socket = UdpSocket::bind(("0.0.0.0", port)).expect("a socket");
    println!("ready");
    let mut datagram = [0; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut datagram) {
        let _ = socket.send_to(&datagram[..length], from);
    }
}
