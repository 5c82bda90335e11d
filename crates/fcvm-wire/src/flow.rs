//! Flow control: each channel of each stream has its own credit, so that a reader that does not
//! read stops only its own stream.
//!
//! A sender starts with [`INITIAL_WINDOW_BYTES`] of credit and gets more as the reader takes bytes
//! out. A sender that exceeds its credit breaks the protocol: the receiver's buffer is bounded by
//! the window, whatever the guest does.

/// Bytes that may be under way on a channel before the first credit arrives.
pub const INITIAL_WINDOW_BYTES: u32 = 256 * 1024;

/// The sender's side of a channel.
#[derive(Debug)]
pub struct SendWindow {
    available: u32,
}

impl Default for SendWindow {
    fn default() -> Self {
        Self {
            available: INITIAL_WINDOW_BYTES,
        }
    }
}

impl SendWindow {
    /// Bytes that may be sent now.
    pub fn available(&self) -> usize {
        self.available as usize
    }

    /// Counts bytes sent; at most [`SendWindow::available`].
    pub fn sent(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.available());
        self.available = self
            .available
            .saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// Counts credit received. A peer cannot raise the window over its initial size.
    pub fn credited(&mut self, bytes: u32) {
        self.available = self
            .available
            .saturating_add(bytes)
            .min(INITIAL_WINDOW_BYTES);
    }
}

/// The peer sent more than its credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer sent more data than it was given credit for")]
pub struct WindowExceeded;

/// The receiver's side of a channel.
#[derive(Debug)]
pub struct ReceiveWindow {
    outstanding: u32,
    taken: u32,
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self {
            outstanding: INITIAL_WINDOW_BYTES,
            taken: 0,
        }
    }
}

impl ReceiveWindow {
    /// Counts bytes received.
    pub fn received(&mut self, bytes: usize) -> Result<(), WindowExceeded> {
        let bytes = u32::try_from(bytes).map_err(|_| WindowExceeded)?;
        self.outstanding = self.outstanding.checked_sub(bytes).ok_or(WindowExceeded)?;
        Ok(())
    }

    /// Counts bytes that the reader took out; returns credit to send once it is worth a frame
    /// (a quarter of the window).
    pub fn taken(&mut self, bytes: usize) -> Option<u32> {
        self.taken = self
            .taken
            .saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.taken < INITIAL_WINDOW_BYTES / 4 {
            return None;
        }
        let credit = std::mem::take(&mut self.taken);
        self.outstanding = self
            .outstanding
            .saturating_add(credit)
            .min(INITIAL_WINDOW_BYTES);
        Some(credit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_keeps_a_channel_going_and_bounds_it() {
        let (mut send, mut receive) = (SendWindow::default(), ReceiveWindow::default());
        let mut moved = 0_usize;
        while moved < 10 << 20 {
            let bytes = send.available().min(32 * 1024);
            assert!(bytes > 0, "credit ran out after {moved} bytes");
            send.sent(bytes);
            receive.received(bytes).unwrap();
            if let Some(credit) = receive.taken(bytes) {
                send.credited(credit);
            }
            moved += bytes;
        }
    }

    #[test]
    fn a_sender_without_credit_is_found_out() {
        let mut receive = ReceiveWindow::default();
        receive.received(INITIAL_WINDOW_BYTES as usize).unwrap();
        assert_eq!(receive.received(1), Err(WindowExceeded));
    }

    #[test]
    fn credit_cannot_raise_the_window() {
        let mut send = SendWindow::default();
        send.credited(u32::MAX);
        assert_eq!(send.available(), INITIAL_WINDOW_BYTES as usize);
    }
}
