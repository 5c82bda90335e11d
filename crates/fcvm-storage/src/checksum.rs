//! CRC-32C of files with holes, at the cost of what they hold.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::clone::for_each_extent;

/// Bytes read at a time.
const READ_BYTES: usize = 256 << 10;

/// CRC-32C (Castagnoli, RFC 3720) of all bytes of a file, those of its holes as the zeros that they
/// read as: the same for a file and its copy, whatever holes the copy has.
pub(crate) fn crc32c_of(file: &File) -> io::Result<u32> {
    let length = file.metadata()?.len();
    let mut buffer = vec![0; READ_BYTES];
    let (mut crc, mut at) = (0, 0);
    for_each_extent(file, length, |start, end| {
        crc = append_zeros(crc, start - at);
        at = start;
        while at < end {
            let wanted = usize::try_from(end - at)
                .unwrap_or(usize::MAX)
                .min(READ_BYTES);
            file.read_exact_at(&mut buffer[..wanted], at)?;
            crc = crc32c::crc32c_append(crc, &buffer[..wanted]);
            at += wanted as u64;
        }
        Ok(())
    })?;
    Ok(append_zeros(crc, length - at))
}

/// The checksum of what has the checksum `crc`, with `count` zeros behind it.
fn append_zeros(crc: u32, count: u64) -> u32 {
    // Two halves of zeros make twice as many: 64 steps at the most.
    let (mut crc, mut left) = (crc, count);
    let (mut power, mut bytes) = (crc32c::crc32c(&[0]), 1_u64);
    while left > 0 {
        if left & 1 == 1 {
            crc = combine(crc, power, bytes);
        }
        left >>= 1;
        if left > 0 {
            power = combine(power, power, bytes);
            bytes <<= 1;
        }
    }
    crc
}

/// The checksum of two pieces, one after the other.
fn combine(first: u32, second: u32, second_bytes: u64) -> u32 {
    // A file is never longer than i64::MAX.
    crc32c::crc32c_combine(
        first,
        second,
        usize::try_from(second_bytes).unwrap_or(usize::MAX),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_count_as_zeros() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(append_zeros(0, 32), 0x8a91_36aa);
        let file = tempfile::tempfile().unwrap();
        file.set_len(3_000_001).unwrap();
        assert_eq!(
            crc32c_of(&file).unwrap(),
            crc32c::crc32c(&vec![0; 3_000_001])
        );
        file.write_all_at(b"middle", 1_000_000).unwrap();
        file.write_all_at(b"end", 2_999_998).unwrap();
        let mut bytes = vec![0; 3_000_001];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(crc32c_of(&file).unwrap(), crc32c::crc32c(&bytes));
        let dense = tempfile::tempfile().unwrap();
        dense.write_all_at(&bytes, 0).unwrap();
        assert_eq!(crc32c_of(&dense).unwrap(), crc32c_of(&file).unwrap());
        assert_eq!(crc32c_of(&tempfile::tempfile().unwrap()).unwrap(), 0);
    }
}
