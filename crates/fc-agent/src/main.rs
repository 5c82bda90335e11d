//! The guest's process 1: sets the guest up, runs the container in namespaces of its own, and serves the
//! host over one framed channel.
//!
//! It is started as /init of an initramfs, lives in one thread, and never waits for the container: what
//! could block runs in a child. docs/format/guest.md tells what it expects of the guest,
//! docs/format/wire.md what it says to the host.

mod boot;
mod clone;
mod command;
mod console;
mod container;
mod devices;
mod disks;
mod failure;
mod files;
mod helper;
mod link;
mod netlink;
mod network;
mod parking;
mod power;
mod privileges;
mod rootfs;
mod server;
mod spawn;
mod stream;
mod sys;
mod users;

use fcvm_wire::Failure;
use server::Server;

fn main() {
    if std::process::id() != 1 {
        eprintln!("fc-agent is process 1 of a guest of fcvm; it does nothing elsewhere");
        std::process::exit(125);
    }
    console::line("started");
    match start() {
        Ok(mut server) => {
            let end = server.serve();
            server.power_off(end)
        }
        Err(failure) => {
            console::line(&format!("{}; powering off", failure.message));
            power::off()
        }
    }
}

fn start() -> Result<Server, Failure> {
    let events = devices::DeviceEvents::listen()?;
    boot::make_root()?;
    boot::load_modules();
    boot::enter_root()?;
    boot::harden();
    let (carrier, channel) = devices::open_channel(&events)?;
    Server::new(carrier, channel)
}
