//! Parking: the connection to the host is given up before the guest is saved, and made anew when it goes on.
//!
//! Connections over vsock do not outlive a snapshot, so nothing may be under way in one. The host says `Park`
//! last; the agent stops the container, sends what it has, says `Park` itself and is silent. The connection
//! then ends, in the guest that was saved and in each that begins with its state, and the agent connects
//! again. It shows the mark that only it and the host know: other processes can connect over vsock too. Who
//! answers decides: the same host goes on, another one adopts the guest.

use std::time::Duration;

use fcvm_wire::{Frame, FrameKind};

use crate::console;
use crate::devices::Carrier;
use crate::link::Link;
use crate::server::{End, Server};

/// First and longest time between two attempts to connect.
const RETRY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// How far it has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Parking {
    /// The connection is in use.
    Not,
    /// All has been said; the connection is about to end.
    Silent,
    /// It has ended. The next attempt is so far away.
    Lost(Duration),
    /// There is a new one, and the host has not said who it is.
    Anew,
}

impl Server {
    /// How long the event loop may wait at most: nothing tells when vsock can be connected to.
    pub(crate) fn patience(&self) -> Option<Duration> {
        match (self.parking, self.carrier) {
            (Parking::Lost(retry), Carrier::Vsock) => Some(retry),
            _ => None,
        }
    }

    /// The host is going to save this guest.
    pub(crate) fn park(&mut self, frame: &Frame) -> Result<(), End> {
        if frame.stream != 0 || self.mark.is_none() {
            return Err(End::Broken(
                "the host sent a Park frame out of place".into(),
            ));
        }
        if let Some(container) = &mut self.container
            && let Err(failure) = container.freeze()
        {
            // A clone's processes then run for an instant before it is one of its own.
            console::limited(&failure.message);
        }
        self.link.send(&Frame::new(FrameKind::Park, 0, Vec::new()));
        self.parking = Parking::Silent;
        Ok(())
    }

    /// The connection has ended, which was to be.
    pub(crate) fn connection_lost(&mut self) {
        self.parking = match self.parking {
            Parking::Lost(retry) => Parking::Lost(retry),
            // One that ended at once would do so again.
            Parking::Anew => Parking::Lost(RETRY.0),
            Parking::Not | Parking::Silent => Parking::Lost(Duration::ZERO),
        };
        self.connected = false;
    }

    /// Connects again, where nothing but trying tells whether that is possible.
    pub(crate) fn connect_again(&mut self) -> Result<(), End> {
        let (Parking::Lost(waited), Carrier::Vsock) = (self.parking, self.carrier) else {
            return Ok(());
        };
        match self.carrier.reopen() {
            Ok(socket) => {
                self.link = Link::new(socket);
                self.watch_link()
                    .map_err(|failure| End::Broken(failure.message))?;
                self.begin_anew();
            }
            Err(errno) => {
                console::limited(&format!("the host cannot be reached yet: {errno}"));
                self.parking = Parking::Lost((2 * waited).clamp(RETRY.0, RETRY.1));
            }
        }
        Ok(())
    }

    /// The host is there again: shows it who this is.
    pub(crate) fn begin_anew(&mut self) {
        self.parking = Parking::Anew;
        self.connected = true;
        self.greeted = false;
        if let Some(mark) = self.mark {
            self.link.begin_with(mark);
        }
        self.say_hello();
    }

    /// The host has said who it is: the one from before, or that of a clone.
    pub(crate) fn recognise(&mut self, session: u64) -> Result<(), End> {
        let before = self.host.replace(session);
        if std::mem::replace(&mut self.parking, Parking::Not) != Parking::Anew {
            return Ok(());
        }
        let broken = |failure: fcvm_wire::Failure| End::Broken(failure.message);
        if before != Some(session) {
            // The container goes on when it has been adopted.
            return self.orphan_streams().map_err(broken);
        }
        match &mut self.container {
            Some(container) => container.thaw().map_err(broken),
            None => Ok(()),
        }
    }
}
