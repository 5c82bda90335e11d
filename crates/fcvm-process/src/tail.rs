//! The last bytes that a helper wrote to standard error.

use std::collections::VecDeque;

/// Bytes kept.
const TAIL_BYTES: usize = 4096;

/// Keeps the last [`TAIL_BYTES`] bytes pushed into it.
#[derive(Debug, Default)]
pub(crate) struct Tail(VecDeque<u8>);

impl Tail {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        let excess = (self.0.len() + kept.len()).saturating_sub(TAIL_BYTES);
        self.0.drain(..excess);
        self.0.extend(kept);
    }

    /// The text kept, with control characters other than the line feed shown as '?', so that it
    /// can go to a terminal.
    pub(crate) fn text(&self) -> String {
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        String::from_utf8_lossy(&bytes)
            .chars()
            .map(|c| if c.is_control() && c != '\n' { '?' } else { c })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_end_and_hides_control_characters() {
        let mut tail = Tail::default();
        tail.push(&[b'a'; TAIL_BYTES]);
        tail.push(b"end\x1b[2J\n");
        let text = tail.text();
        assert_eq!(text.len(), TAIL_BYTES);
        assert!(text.starts_with('a') && text.ends_with("end?[2J\n"));
        tail.push(&[b'b'; 3 * TAIL_BYTES]);
        assert_eq!(tail.text(), "b".repeat(TAIL_BYTES));
    }
}
