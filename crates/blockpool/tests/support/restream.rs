//! Streams with wrong values under right checksums: docs/format/pool-stream.md.

/// Frames of a stream: type and content.
pub(crate) type Frames = Vec<(u32, Vec<u8>)>;

fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Takes a whole stream apart: its id and its frames.
pub(crate) fn split(stream: &[u8]) -> (u64, Frames) {
    let id = u64::from(number(&stream[16..])) | u64::from(number(&stream[20..])) << 32;
    let mut rest = &stream[24..];
    let mut frames = Frames::new();
    while rest.len() >= 12 {
        let length = number(&rest[8..]) as usize;
        frames.push((number(&rest[4..]), rest[12..12 + length].to_vec()));
        rest = &rest[12 + length..];
    }
    (id, frames)
}

/// Makes a stream of frames, with the checksums that they need.
pub(crate) fn join(id: u64, frames: &Frames) -> Vec<u8> {
    let mut stream = b"BLKSTRM\0\x02\0\0\0".to_vec();
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&stream), &id.to_le_bytes());
    stream.extend(checksum.to_le_bytes());
    stream.extend(id.to_le_bytes());
    for ((kind, content), index) in frames.iter().zip(0u64..) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend((content.len() as u32).to_le_bytes());
        bytes.extend(content);
        let seed = crc32c::crc32c_append(crc32c::crc32c(&id.to_le_bytes()), &index.to_le_bytes());
        stream.extend(crc32c::crc32c_append(seed, &bytes).to_le_bytes());
        stream.extend(bytes);
    }
    stream
}

/// Changes frames as 12 bytes say: one is changed, left out, doubled, moved, cut or made longer.
pub(crate) fn change(frames: &mut Frames, how: &[u8]) {
    if frames.is_empty() || how.len() < 12 {
        return;
    }
    let index = usize::from(how[1]) % frames.len();
    let other = usize::from(how[2]) % frames.len();
    let length = frames[index].1.len();
    match how[0] % 16 {
        0 => drop(frames.remove(index)),
        1 => {
            let frame = frames[index].clone();
            frames.insert(other, frame);
        }
        2 => frames.swap(index, other),
        3 => frames[index].1.truncate(usize::from(how[3]) % (length + 1)),
        4 => frames[index].1.extend(&how[4..]),
        5 => frames[index].0 = u32::from(how[3] % 12),
        _ => {
            let at = usize::from(how[3]);
            let count = 1 + usize::from(how[4] % 7);
            for (byte, value) in frames[index].1.iter_mut().skip(at).zip(&how[5..5 + count]) {
                *byte = *value;
            }
        }
    }
}
