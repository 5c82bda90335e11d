//! The token that says where a stream goes on.

use super::Position;
use crate::error::{PoolError, Result};

pub(crate) fn encode(stream_id: u64, (object, record): Position) -> String {
    let text = format!("1-{stream_id:016x}-{object}-{record}");
    let checksum = crc32c::crc32c(text.as_bytes());
    format!("{text}-{checksum:08x}")
}

pub(crate) fn decode(token: &str) -> Result<(u64, Position)> {
    let refused = || PoolError::Token {
        token: token.to_owned(),
    };
    let (text, checksum) = token.rsplit_once('-').ok_or_else(refused)?;
    if format!("{:08x}", crc32c::crc32c(text.as_bytes())) != checksum {
        return Err(refused());
    }
    let parts: Vec<&str> = text.split('-').collect();
    let ["1", id, object, record] = parts[..] else {
        return Err(refused());
    };
    let id = u64::from_str_radix(id, 16).map_err(|_| refused())?;
    let object = object.parse().map_err(|_| refused())?;
    let record = record.parse().map_err(|_| refused())?;
    Ok((id, (object, record)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_and_a_mistyped_one_is_not() {
        let token = encode(0xfeed, (3, 77));
        assert_eq!(decode(&token).unwrap(), (0xfeed, (3, 77)));
        for at in 0..token.len() {
            let mut other = token.clone().into_bytes();
            other[at] = if other[at] == b'5' { b'6' } else { b'5' };
            let other = String::from_utf8(other).unwrap();
            assert!(decode(&other).is_err(), "{other}");
        }
        for text in ["", "-", "1-2-3", "1-0000000000000001-0-0"] {
            assert!(decode(text).is_err(), "{text}");
        }
    }
}
