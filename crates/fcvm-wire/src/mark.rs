//! Marks: how a connection begins anew in the middle of a byte stream.
//!
//! A clone wakes up in whatever its source was saying: its agent may hold half a frame from the
//! source's owner, and half a frame of its own may be under way in the virtual hardware. The clone's
//! owner therefore sends a mark that only the source's owner and the agent know; the agent drops what
//! it has and answers with the mark's complement, and what follows either of them is a new
//! connection.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Length of a mark in bytes.
pub const MARK_BYTES: usize = 16;

/// Random bytes that stand for the beginning of a new connection. Text form: 32 hexadecimal
/// characters.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mark([u8; MARK_BYTES]);

/// Text that is no mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a mark is {} hexadecimal characters", 2 * MARK_BYTES)]
pub struct NotAMark;

impl Mark {
    /// A mark of these bytes, which must be random.
    pub const fn from_random(bytes: [u8; MARK_BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; MARK_BYTES] {
        &self.0
    }

    /// What the agent answers.
    pub fn answer(&self) -> Self {
        Self(self.0.map(|byte| !byte))
    }
}

/// It is a secret.
impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mark")
    }
}

impl From<Mark> for String {
    fn from(mark: Mark) -> Self {
        mark.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl TryFrom<String> for Mark {
    type Error = NotAMark;

    fn try_from(text: String) -> Result<Self, NotAMark> {
        text.parse()
    }
}

impl FromStr for Mark {
    type Err = NotAMark;

    fn from_str(text: &str) -> Result<Self, NotAMark> {
        // No sign, no multi-byte character: only digits of one byte are left after this.
        if text.len() != 2 * MARK_BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(NotAMark);
        }
        let mut bytes = [0; MARK_BYTES];
        for (index, byte) in bytes.iter_mut().enumerate() {
            let digits = &text[2 * index..2 * index + 2];
            *byte = u8::from_str_radix(digits, 16).map_err(|_| NotAMark)?;
        }
        Ok(Self(bytes))
    }
}

/// Looks for a mark in bytes that arrive in pieces.
#[derive(Debug)]
pub struct MarkScanner {
    mark: Mark,
    /// The end of what came before, shorter than a mark.
    tail: Vec<u8>,
}

impl MarkScanner {
    /// A scanner for one mark.
    pub fn new(mark: Mark) -> Self {
        Self {
            mark,
            tail: Vec::with_capacity(2 * MARK_BYTES),
        }
    }

    /// Looks at the next bytes; where the mark ends in them, the index after it.
    pub fn scan(&mut self, bytes: &[u8]) -> Option<usize> {
        let mark = self.mark.as_bytes();
        // A mark that began in an earlier piece ends in the first bytes of this one.
        let before = self.tail.len();
        let head = bytes.len().min(MARK_BYTES - 1);
        self.tail.extend_from_slice(&bytes[..head]);
        if let Some(start) = find(&self.tail, mark) {
            self.tail.clear();
            return Some(start + MARK_BYTES - before);
        }
        if let Some(start) = find(bytes, mark) {
            self.tail.clear();
            return Some(start + MARK_BYTES);
        }
        if bytes.len() >= MARK_BYTES {
            self.tail.clear();
            self.tail
                .extend_from_slice(&bytes[bytes.len() - (MARK_BYTES - 1)..]);
        } else {
            let excess = self.tail.len().saturating_sub(MARK_BYTES - 1);
            self.tail.drain(..excess);
        }
        None
    }
}

fn find(bytes: &[u8], mark: &[u8; MARK_BYTES]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = bytes.get(from..)?.iter().position(|byte| *byte == mark[0]) {
        let start = from + at;
        if bytes[start..].starts_with(mark) {
            return Some(start);
        }
        from = start + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Mark = Mark([0, 1, 0, 1, 0, 2, 0, 1, 0, 1, 0, 3, 0, 1, 0, 4]);

    #[test]
    fn a_mark_is_found_wherever_the_pieces_are_cut() {
        let mut stream = vec![0, 1, 0, 1, 0, 2, 0, 1, 0, 1, 0, 3, 0, 0, 1];
        stream.extend(&MARK.0[..15]);
        stream.extend(MARK.0);
        stream.extend(b"after");
        let end = stream.len() - 5;
        for first in 0..=stream.len() {
            for second in first..=stream.len() {
                let mut scanner = MarkScanner::new(MARK);
                let mut offset = 0;
                let mut found = None;
                for piece in [&stream[..first], &stream[first..second], &stream[second..]] {
                    if let Some(index) = scanner.scan(piece) {
                        found = Some(offset + index);
                        break;
                    }
                    offset += piece.len();
                }
                assert_eq!(found, Some(end), "cut at {first} and {second}");
            }
        }
    }

    #[test]
    fn single_bytes_are_pieces_too() {
        let mut scanner = MarkScanner::new(MARK);
        let stream = [&[0; 40][..], &MARK.0[..9], &MARK.0].concat();
        let found: Vec<_> = stream
            .iter()
            .enumerate()
            .filter_map(|(index, byte)| scanner.scan(&[*byte]).map(|after| index + after))
            .collect();
        assert_eq!(found, [stream.len()]);
    }

    #[test]
    fn text_form_is_checked() {
        let text = String::from(MARK);
        assert_eq!(text.parse(), Ok(MARK));
        assert_eq!(MARK.answer().answer(), MARK);
        for bad in [
            "",
            "00",
            &text[1..],
            &format!("+{}", &text[1..]),
            &"é".repeat(16),
        ] {
            assert_eq!(bad.parse::<Mark>(), Err(NotAMark), "{bad}");
        }
        assert!(!format!("{MARK:?}").contains('1'));
    }
}
