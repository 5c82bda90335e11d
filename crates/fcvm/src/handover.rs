//! Messages with descriptors between processes of fcvm: how a clone gets its memory and its state.
//!
//! A socket that keeps messages apart (SOCK_SEQPACKET). Each message is one byte that carries
//! descriptors (SCM_RIGHTS, unix(7)); the first of them is an anonymous file that holds the message as
//! JSON, so that its length is no matter of the socket's buffers.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context as _, bail};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::unix::AsyncFd;

/// Descriptors of one message, the message's own included. The kernel allows 253.
const DESCRIPTORS_MAX: usize = 128;
/// Longest message: a specification with a large environment.
const MESSAGE_BYTES_MAX: u64 = 8 << 20;

/// One end.
#[derive(Debug)]
pub(crate) struct Handover(AsyncFd<OwnedFd>);

impl Handover {
    /// A connected pair: an end for this process, and one to give away.
    pub(crate) fn pair() -> anyhow::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC;
        let (own, other) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .context("cannot make a socket")?;
        Ok((Self::from_fd(own)?, other))
    }

    /// An end that another process gave.
    pub(crate) fn from_fd(fd: OwnedFd) -> anyhow::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true).context("cannot use the socket")?;
        Ok(Self(fcvm_process::watch_readable(fd)?))
    }

    /// Gives the end away.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0.into_inner()
    }

    /// Sends a message with descriptors.
    pub(crate) fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> anyhow::Result<()> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(
            rustix::fs::memfd_create("fcvm-message", flags).context("cannot make a message")?,
        );
        file.write_all_at(&serde_json::to_vec(message)?, 0)
            .context("cannot make a message")?;
        let mut all = vec![file.as_fd()];
        all.extend_from_slice(descriptors);
        if all.len() > DESCRIPTORS_MAX {
            bail!("a message would carry {} descriptors", all.len());
        }
        let mut space =
            vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&all));
        let byte = [IoSlice::new(b"m")];
        match rustix::net::sendmsg(self.0.get_ref(), &byte, &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(Errno::PIPE | Errno::CONNRESET) => bail!("the other process has ended"),
            Err(errno) => Err(errno).context("cannot send a message"),
        }
    }

    /// The next message and its descriptors; `None` when the other end is closed.
    pub(crate) async fn receive<M: DeserializeOwned>(
        &self,
    ) -> anyhow::Result<Option<(M, Vec<OwnedFd>)>> {
        let Some(mut descriptors) = self.next().await? else {
            return Ok(None);
        };
        if descriptors.is_empty() {
            bail!("a message without content arrived");
        }
        let file = File::from(descriptors.remove(0));
        let length = file.metadata()?.len();
        if length > MESSAGE_BYTES_MAX {
            bail!("a message of {length} bytes arrived");
        }
        let mut bytes = vec![0; usize::try_from(length)?];
        file.read_exact_at(&mut bytes, 0)
            .context("cannot read a message")?;
        let message = serde_json::from_slice(&bytes)
            .context("a message of another version of fcvm arrived")?;
        Ok(Some((message, descriptors)))
    }

    async fn next(&self) -> anyhow::Result<Option<Vec<OwnedFd>>> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|socket| receive(socket.get_ref())) {
                Ok(Ok(received)) => return Ok(received),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(None);
                }
                Ok(Err(error)) => return Err(error).context("cannot receive a message"),
                Err(_would_block) => {}
            }
        }
    }
}

fn receive(socket: &OwnedFd) -> io::Result<Option<Vec<OwnedFd>>> {
    let mut byte = [0];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut byte)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut buffers, &mut control, flags)?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok(Some(descriptors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_arrive_with_their_descriptors_and_apart() {
        let (own, other) = Handover::pair().unwrap();
        let other = Handover::from_fd(other).unwrap();
        let text = "x".repeat(1 << 20);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"content", 0).unwrap();
        own.send(&text, &[]).unwrap();
        own.send(&2, &[file.as_fd(), file.as_fd()]).unwrap();
        drop(own);
        let (first, descriptors) = other.receive::<String>().await.unwrap().unwrap();
        assert!(first == text && descriptors.is_empty());
        let (second, descriptors) = other.receive::<u32>().await.unwrap().unwrap();
        assert_eq!((second, descriptors.len()), (2, 2));
        let mut content = [0; 7];
        File::from(descriptors.into_iter().next().unwrap())
            .read_exact_at(&mut content, 0)
            .unwrap();
        assert_eq!(&content, b"content");
        assert!(other.receive::<u32>().await.unwrap().is_none());
        assert!(other.send(&1, &[]).is_err());
    }
}
