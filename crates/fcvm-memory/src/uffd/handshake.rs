//! The first message of a hypervisor: where its guest's memory is, and a userfaultfd for it.
//!
//! The message is that of Firecracker: a JSON array with an object for each region (`base_host_virt_addr`,
//! `size`, `offset` in the memory file, `page_size`; all in bytes), and one descriptor (SCM_RIGHTS).
//! The sender may be run by a hostile guest: everything is bounded and checked before it is used.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};

use super::raw::Userfault;
use crate::PAGE_BYTES;

/// Longest message in bytes.
pub const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// Most regions: a hypervisor has two, and some more for memory that is plugged in.
pub const REGIONS_MAX: usize = 64;
/// Size of a hugepage in bytes, on x86-64.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// Where addresses of processes end, with five levels of page tables.
const ADDRESS_END: u64 = 1 << 56;
/// Descriptors there is room for; more are refused by the kernel, and one is right.
const DESCRIPTORS_MAX: usize = 4;

/// What is wrong with a message.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// Nothing came.
    #[error("the connection was closed before a message came")]
    Closed,
    /// It is longer than any message can be.
    #[error("its message is longer than {MESSAGE_BYTES_MAX} bytes")]
    TooLong,
    /// It came without the descriptor, or with others.
    #[error("its message carries {0} descriptors, and one is expected")]
    Descriptors(String),
    /// The descriptor is of something else.
    #[error("its descriptor cannot be used: {0}")]
    Descriptor(io::Error),
    /// It is no array of regions.
    #[error("its message is no list of regions: {0}")]
    Syntax(#[from] serde_json::Error),
    /// It has no region, or too many.
    #[error("it tells of {0} regions: 1 to {REGIONS_MAX} can be")]
    Count(usize),
    /// A region cannot be served.
    #[error("its region {index} cannot be: {reason}")]
    Region {
        /// Place in the message, from 0.
        index: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// The regions are not the memory that is served.
    #[error(
        "its regions have {found_bytes} bytes together, and the memory of the snapshot has {expected_bytes}"
    )]
    Size {
        /// Sum of the regions.
        found_bytes: u64,
        /// Size of the memory.
        expected_bytes: u64,
    },
    /// The socket failed, or the message did not come in time.
    #[error("cannot read its message: {0}")]
    Socket(#[from] io::Error),
}

/// A part of a guest's memory in its hypervisor's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Address in the hypervisor.
    #[serde(rename = "base_host_virt_addr")]
    pub address: u64,
    /// Size in bytes.
    #[serde(rename = "size")]
    pub bytes: u64,
    /// Offset in the memory file.
    pub offset: u64,
    /// Size of its pages in bytes: 4096 or 2 MiB.
    #[serde(rename = "page_size")]
    pub page_bytes: u64,
}

impl Region {
    /// Whether an address is in it.
    pub fn contains(&self, address: u64) -> bool {
        address >= self.address && address - self.address < self.bytes
    }

    fn check(&self, memory_bytes: u64) -> Result<(), &'static str> {
        let is_page = |number: u64| number.is_multiple_of(self.page_bytes);
        if ![PAGE_BYTES, HUGE_PAGE_BYTES].contains(&self.page_bytes) {
            return Err("its pages have neither 4096 bytes nor 2 MiB");
        }
        if self.bytes == 0 || !is_page(self.bytes) {
            return Err("its size is not a number of whole pages");
        }
        if !is_page(self.address) || !is_page(self.offset) {
            return Err("it does not begin at a page");
        }
        let ends_at_most = |start: u64, limit: u64| matches!(start.checked_add(self.bytes), Some(end) if end <= limit);
        if self.address == 0 || !ends_at_most(self.address, ADDRESS_END) {
            return Err("no process has such addresses");
        }
        if !ends_at_most(self.offset, memory_bytes) {
            return Err("it ends behind the memory of the snapshot");
        }
        Ok(())
    }
}

/// Where all of a guest's memory is, checked: regions do not overlap, and are the whole memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestLayout {
    /// By address.
    regions: Vec<Region>,
}

impl GuestLayout {
    /// Reads and checks a message of a memory of so many bytes.
    ///
    /// # Errors
    ///
    /// Whatever of it cannot be.
    pub fn parse(message: &[u8], memory_bytes: u64) -> Result<Self, HandshakeError> {
        if message.len() > MESSAGE_BYTES_MAX {
            return Err(HandshakeError::TooLong);
        }
        let mut regions: Vec<Region> = serde_json::from_slice(message)?;
        if regions.is_empty() || regions.len() > REGIONS_MAX {
            return Err(HandshakeError::Count(regions.len()));
        }
        for (index, region) in regions.iter().enumerate() {
            let told = |reason| HandshakeError::Region { index, reason };
            region.check(memory_bytes).map_err(told)?;
            // Ends are within bounds since `check`.
            let overlaps = regions[..index].iter().any(|other| {
                let meets =
                    |one: u64, two: u64| one < two + other.bytes && two < one + region.bytes;
                meets(region.address, other.address) || meets(region.offset, other.offset)
            });
            if overlaps {
                return Err(told("it overlaps another one"));
            }
        }
        // Regions that do not overlap in the memory are no more than it.
        let found_bytes = regions.iter().map(|region| region.bytes).sum();
        if found_bytes != memory_bytes {
            return Err(HandshakeError::Size {
                found_bytes,
                expected_bytes: memory_bytes,
            });
        }
        regions.sort_by_key(|region| region.address);
        Ok(Self { regions })
    }

    /// The regions, by address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region of an address.
    pub fn at_address(&self, address: u64) -> Option<&Region> {
        let after = self
            .regions
            .partition_point(|region| region.address <= address);
        let region = self.regions.get(after.checked_sub(1)?)?;
        region.contains(address).then_some(region)
    }

    /// The region that holds an offset of the memory.
    pub fn at_offset(&self, offset: u64) -> Option<&Region> {
        self.regions
            .iter()
            .find(|region| offset >= region.offset && offset - region.offset < region.bytes)
    }
}

/// What came over a connection.
#[derive(Debug)]
pub(super) enum Received {
    /// A hypervisor's message with its descriptor, or what is wrong with it: it came with descriptors, and is no
    /// question.
    Hypervisor(Result<(Vec<u8>, OwnedFd), HandshakeError>),
    /// A message without descriptors, of somebody who asks.
    Question(Vec<u8>),
    /// A question with a descriptor.
    Handed(Vec<u8>, OwnedFd),
}

/// Receives one message.
pub(super) fn receive(socket: &UnixStream) -> Result<Received, HandshakeError> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        rustix::net::recvmsg(socket, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)
    })
    .map_err(io::Error::from)?;
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(HandshakeError::Closed);
    }
    let is_question = bytes.first() == Some(&b'{');
    let is_cut = received.flags.contains(ReturnFlags::CTRUNC);
    let has_descriptors = is_cut || !descriptors.is_empty();
    let checked = if received.bytes > MESSAGE_BYTES_MAX {
        Err(HandshakeError::TooLong)
    } else if is_cut {
        let found = format!("more than {DESCRIPTORS_MAX}, or than the server has room for");
        Err(HandshakeError::Descriptors(found))
    } else if descriptors.len() > 1 || !(is_question || has_descriptors) {
        Err(HandshakeError::Descriptors(descriptors.len().to_string()))
    } else {
        bytes.truncate(received.bytes);
        Ok((bytes, descriptors.pop()))
    };
    match checked {
        Ok((bytes, Some(descriptor))) if is_question => Ok(Received::Handed(bytes, descriptor)),
        Ok((bytes, Some(descriptor))) => Ok(Received::Hypervisor(Ok((bytes, descriptor)))),
        Ok((bytes, None)) => Ok(Received::Question(bytes)),
        Err(error) if has_descriptors && !is_question => Ok(Received::Hypervisor(Err(error))),
        Err(error) => Err(error),
    }
}

/// Sends the message of a hypervisor, as Firecracker does: for tests and measurements of the server.
///
/// # Errors
///
/// The server has gone.
pub fn send(socket: &UnixStream, regions: &[Region], userfault: &Userfault) -> io::Result<()> {
    send_message(
        socket,
        &serde_json::to_vec(regions)?,
        &[userfault.as_sent()],
    )
}

/// Sends any bytes with any descriptors, for tests of what the server refuses.
///
/// # Errors
///
/// The server has gone.
pub fn send_message(
    socket: &UnixStream,
    message: &[u8],
    descriptors: &[std::os::fd::BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL;
    rustix::net::sendmsg(
        socket.as_fd(),
        &[IoSlice::new(message)],
        &mut control,
        flags,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn region(address: u64, bytes: u64, offset: u64, page_bytes: u64) -> Region {
        Region {
            address,
            bytes,
            offset,
            page_bytes,
        }
    }

    fn parse(regions: &[Region], memory_bytes: u64) -> Result<GuestLayout, HandshakeError> {
        GuestLayout::parse(&serde_json::to_vec(regions).unwrap(), memory_bytes)
    }

    #[test]
    fn a_message_of_firecracker_is_understood() {
        // As version 1.17 sends it; the last member is an older name of the one before.
        let message = br#"[{"base_host_virt_addr":139635810369536,"size":134217728,"offset":0,
            "page_size":4096,"page_size_kib":4096}]"#;
        let layout = GuestLayout::parse(message, 128 * MIB).unwrap();
        let expected = region(139_635_810_369_536, 128 * MIB, 0, 4096);
        assert_eq!(layout.regions(), [expected]);
    }

    #[test]
    fn addresses_and_offsets_are_found_in_their_regions() {
        let low = region(1 << 32, 4 * MIB, 2 * MIB, 4096);
        let high = region(1 << 40, 2 * MIB, 0, HUGE_PAGE_BYTES);
        let layout = parse(&[high, low], 6 * MIB).unwrap();
        assert_eq!(layout.regions(), [low, high]);
        assert_eq!(layout.at_address((1 << 32) - 1), None);
        assert_eq!(layout.at_address(1 << 32), Some(&low));
        assert_eq!(layout.at_address((1 << 32) + 4 * MIB - 1), Some(&low));
        assert_eq!(layout.at_address((1 << 32) + 4 * MIB), None);
        assert_eq!(layout.at_address((1 << 40) + 5), Some(&high));
        assert_eq!(layout.at_offset(0), Some(&high));
        assert_eq!(layout.at_offset(2 * MIB), Some(&low));
        assert_eq!(layout.at_offset(6 * MIB), None);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let good = region(1 << 32, 4 * MIB, 0, 4096);
        let refused = |change: &dyn Fn(&mut Region)| {
            let mut bad = good;
            change(&mut bad);
            parse(&[bad], 4 * MIB).unwrap_err().to_string()
        };
        assert!(parse(&[good], 4 * MIB).is_ok());
        for (change, reason) in [
            (
                &(|region: &mut Region| region.page_bytes = 0) as &dyn Fn(&mut Region),
                "neither 4096 bytes nor 2 MiB",
            ),
            (&|region| region.page_bytes = 1 << 30, "neither"),
            (&|region| region.bytes = 0, "whole pages"),
            (&|region| region.bytes += 1, "whole pages"),
            (&|region| region.address += 1, "begin at a page"),
            (&|region| region.offset = 512, "begin at a page"),
            (
                &|region| {
                    region.page_bytes = HUGE_PAGE_BYTES;
                    region.address += 4096;
                },
                "begin at a page",
            ),
            (&|region| region.address = 0, "no process"),
            (
                &|region| region.address = u64::MAX - 4095,
                "no process has such",
            ),
            (&|region| region.address = ADDRESS_END - 4096, "no process"),
            (&|region| region.offset = 4096, "ends behind"),
            (&|region| region.offset = u64::MAX - 4095, "ends behind"),
            (&|region| region.bytes = 8 * MIB, "ends behind"),
            (&|region| region.bytes = 2 * MIB, "2097152 bytes together"),
        ] {
            let told = refused(change);
            assert!(told.contains(reason), "{told}, not {reason}");
        }
    }

    #[test]
    fn overlapping_missing_and_too_many_regions_are_refused() {
        let half = |address: u64, offset: u64| region(address, 2 * MIB, offset, 4096);
        let told = |regions: &[Region]| parse(regions, 4 * MIB).unwrap_err().to_string();
        let address = 1 << 32;
        assert!(
            parse(
                &[half(address, 0), half(address + 2 * MIB, 2 * MIB)],
                4 * MIB
            )
            .is_ok()
        );
        assert!(told(&[half(address, 0), half(address + MIB, 2 * MIB)]).contains("overlaps"));
        assert!(told(&[half(address, 0), half(address + 2 * MIB, MIB)]).contains("overlaps"));
        assert!(told(&[]).contains("0 regions"));
        let many: Vec<Region> = (0..=REGIONS_MAX as u64)
            .map(|index| region(address + index * 4096, 4096, index * 4096, 4096))
            .collect();
        assert!(told(&many).contains("65 regions"));
        let long = vec![b' '; MESSAGE_BYTES_MAX + 1];
        let error = GuestLayout::parse(&long, 4096).unwrap_err();
        assert!(matches!(error, HandshakeError::TooLong));
        for nonsense in ["", "[", "{}", "[1]", "[{}]", r#"[{"size":-1}]"#, "\0\u{1}"] {
            let error = GuestLayout::parse(nonsense.as_bytes(), 4096).unwrap_err();
            assert!(matches!(error, HandshakeError::Syntax(_)), "{nonsense}");
        }
    }
}
