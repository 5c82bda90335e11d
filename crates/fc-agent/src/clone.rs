//! Becoming a guest of its own, in a clone: randomness, clock, names.
//!
//! All of it is done in one turn of the event loop, before the clone answers anything.

use fcvm_types::guest::ClonePlan;
use fcvm_wire::Failure;
use rustix::fs::{Mode, OFlags};
use rustix::thread::{
    LinkNameSpaceType, ThreadNameSpaceType, move_into_link_name_space, move_into_thread_name_spaces,
};
use std::os::fd::AsFd;

use crate::container::{self, Container};
use crate::failure::{Context, bad_request};
use crate::sys::{self, ENTROPY_BYTES};
use crate::{console, files};

/// Takes the identity of a plan.
pub(crate) fn adopt(plan: &ClonePlan, container: &Container) -> Result<(), Failure> {
    // First of all: what is random after this is not what another clone gets.
    reseed(&plan.entropy)?;
    container::set_clock(plan.realtime_ns)?;
    files::write(&plan.identity)?;
    container::set_host_name(&plan.identity)?;
    name_container(plan, container)
}

fn reseed(text: &str) -> Result<(), Failure> {
    let entropy = bytes(text)
        .ok_or_else(|| bad_request(format!("the entropy is not {ENTROPY_BYTES} bytes")))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let random = rustix::fs::open("/dev/urandom", flags, Mode::empty())
        .context("opening the random device")?;
    sys::reseed(random.as_fd(), &entropy).context("reseeding the random numbers")
}

/// From hexadecimal characters.
fn bytes(text: &str) -> Option<[u8; ENTROPY_BYTES]> {
    let mut bytes = [0; ENTROPY_BYTES];
    if text.len() != 2 * ENTROPY_BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

/// The container has a UTS namespace of its own. A container that has ended has no name any more.
fn name_container(plan: &ClonePlan, container: &Container) -> Result<(), Failure> {
    if container.ended {
        return Ok(());
    }
    let what = "entering the container's host name";
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let own = rustix::fs::open("/proc/self/ns/uts", flags, Mode::empty()).context(what)?;
    let uts = ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
    move_into_thread_name_spaces(container.pidfd.as_fd(), uts).context(what)?;
    let named = container::set_host_name(&plan.identity);
    let own_kind = LinkNameSpaceType::HostNameAndNISDomainName;
    if let Err(errno) = move_into_link_name_space(own.as_fd(), Some(own_kind)) {
        // Cannot happen: the namespace is the agent's. It would share the container's name.
        console::limited(&format!(
            "the agent's namespace cannot be restored: {errno}"
        ));
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_hexadecimal_and_whole() {
        let text = "0f".repeat(ENTROPY_BYTES);
        assert_eq!(bytes(&text), Some([15; ENTROPY_BYTES]));
        for bad in [
            "",
            &text[2..],
            &format!("+{}", &text[1..]),
            &"é".repeat(ENTROPY_BYTES),
        ] {
            assert_eq!(bytes(bad), None);
        }
    }
}
