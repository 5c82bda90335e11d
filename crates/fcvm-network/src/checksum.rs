//! The Internet's checksum, and whether a frame is as it was sent by its own account.

/// Ethernet's header: two addresses and the type.
const HEADER_BYTES: usize = 14;
/// Protocols with a sum: ICMP, TCP, UDP, ICMPv6.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// RFC 1071, over parts of which all but the last have whole words; never 0, which in UDP says that there is none.
/// What has its sum in it gives 0xffff.
pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for part in parts {
        let (words, last) = part.as_chunks::<2>();
        sum += words
            .iter()
            .map(|word| u64::from(u16::from_be_bytes(*word)))
            .sum::<u64>();
        sum += last.iter().map(|last| u64::from(*last) << 8).sum::<u64>();
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !(sum as u16) {
        0 => 0xffff,
        sum => sum,
    }
}

/// Whether a frame is an ARP or IP packet whose sums are right, as a guest's are that computes them itself.
pub(crate) fn is_intact(frame: &[u8]) -> bool {
    let Some((header, packet)) = frame.split_at_checked(HEADER_BYTES) else {
        return false;
    };
    match [header[12], header[13]] {
        [0x08, 0x06] => true,
        [0x08, 0x00] => is_ipv4_intact(packet).unwrap_or(false),
        [0x86, 0xdd] => is_ipv6_intact(packet).unwrap_or(false),
        _ => false,
    }
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    let field = bytes.get(at..at + 2)?;
    Some(usize::from(u16::from_be_bytes([field[0], field[1]])))
}

fn is_ipv4_intact(packet: &[u8]) -> Option<bool> {
    let first = *packet.first()?;
    let header_bytes = usize::from(first & 0xf) * 4;
    let header = packet.get(..header_bytes.max(20))?;
    if first >> 4 != 4 || checksum(&[header]) != 0xffff {
        return Some(false);
    }
    let payload = packet.get(header_bytes..number(packet, 2)?)?;
    // The sum of a fragmented packet is over all of its fragments.
    let is_fragment = number(packet, 6)? & 0x3fff != 0;
    Some(is_fragment || is_payload_intact(packet[9], &packet[12..20], payload))
}

fn is_ipv6_intact(packet: &[u8]) -> Option<bool> {
    let payload = packet.get(40..40 + number(packet, 4)?)?;
    Some(packet[0] >> 4 == 6 && is_payload_intact(packet[6], &packet[8..40], payload))
}

fn is_payload_intact(protocol: u8, addresses: &[u8], payload: &[u8]) -> bool {
    let length = (payload.len() as u32).to_be_bytes();
    let pseudo = [addresses, &length, &[0, 0, 0, protocol], payload];
    match protocol {
        ICMP => checksum(&[payload]) == 0xffff,
        UDP if payload.get(6..8) == Some(&[0, 0]) => true,
        TCP | UDP | ICMPV6 => checksum(&pseudo) == 0xffff,
        _ => true,
    }
}

/// A UDP packet in a frame, for tests.
#[cfg(test)]
pub(crate) fn udp_frame(sender: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let addresses = [10, 0, 2, 15, 192, 0, 2, 1];
    let udp_bytes = (8 + payload.len()) as u16;
    let mut udp = vec![0x1e, 0x61, 0x30, 0x39];
    udp.extend(udp_bytes.to_be_bytes());
    udp.extend([0; 2]);
    udp.extend(payload);
    let length = u32::from(udp_bytes).to_be_bytes();
    let sum = checksum(&[&addresses, &length, &[0, 0, 0, UDP], &udp]);
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_bytes).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, UDP, 0, 0]);
    ip.extend(addresses);
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    [&[2; 6][..], &sender, &[0x08, 0x00], &ip, &udp].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_is_noticed_and_a_foreign_frame() {
        for payload in [&b""[..], b"odd", b"even", &[0xff; 3000]] {
            let frame = udp_frame([7; 6], payload);
            assert!(is_intact(&frame));
            for at in 14..frame.len() {
                let mut other = frame.clone();
                other[at] ^= 0x40;
                assert!(!is_intact(&other), "{at}");
            }
            for end in 0..frame.len() {
                assert!(!is_intact(&frame[..end]), "{end}");
            }
        }
        assert!(!is_intact(&[0; 60]));
    }
}
