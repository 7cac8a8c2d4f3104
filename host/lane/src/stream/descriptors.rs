//! A unix stream that carries descriptors beside its bytes, between processes of one user.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use super::socket::{failed, wait_or_time_out};
use super::{StreamTraits, Transport, TransportError};

/// Most descriptors that wait to be taken, and that go with one write.
pub const MAX_DESCRIPTORS: usize = 96;

/// A connected unix stream socket whose peer runs as the same user.
///
/// Descriptors travel in the order in which they were attached, and have arrived when the first
/// byte that was written after them has: the kernel does not let a read pass them by.
#[derive(Debug)]
pub struct DescriptorTransport {
    stream: UnixStream,
    peer: String,
    outgoing: Vec<OwnedFd>,
    incoming: VecDeque<OwnedFd>,
}

impl DescriptorTransport {
    /// Takes a connected socket. `peer` names it in messages.
    ///
    /// # Errors
    /// Permission denied when the peer runs as another user; else what the kernel said.
    pub fn new(stream: UnixStream, peer: impl Into<String>) -> io::Result<Self> {
        let credentials = rustix::net::sockopt::socket_peercred(&stream)?;
        if credentials.uid != rustix::process::geteuid() {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the peer runs as another user",
            ));
        }
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            peer: peer.into(),
            outgoing: Vec::new(),
            incoming: VecDeque::new(),
        })
    }

    fn receive(&mut self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            rustix::net::recvmsg(&self.stream, into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.incoming.extend(descriptors);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.incoming.len() > MAX_DESCRIPTORS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "more descriptors came than anybody sends",
            ));
        }
        Ok(received.bytes)
    }

    fn send(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let borrowed: Vec<BorrowedFd<'_>> = self.outgoing.iter().map(OwnedFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let sent = rustix::net::sendmsg(&self.stream, from, &mut control, SendFlags::NOSIGNAL)?;
        self.outgoing.clear();
        Ok(sent)
    }

    /// Repeats `operation` until it moves bytes, waiting for `events` in between.
    fn move_bytes(
        &mut self,
        events: libc::c_short,
        deadline: Instant,
        mut operation: impl FnMut(&mut Self) -> io::Result<usize>,
    ) -> Result<usize, TransportError> {
        loop {
            match operation(self) {
                Ok(0) => {
                    return Err(TransportError::Closed {
                        peer: self.peer.clone(),
                    });
                }
                Ok(count) => return Ok(count),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        wait_or_time_out(self.stream.as_raw_fd(), events, deadline, &self.peer)?;
                    }
                    _ => return Err(failed(error, &self.peer)),
                },
            }
        }
    }
}

impl Transport for DescriptorTransport {
    fn traits(&self) -> StreamTraits {
        StreamTraits {
            name: "unix",
            confidential: false,
        }
    }

    fn read(
        &mut self,
        into: &mut [IoSliceMut<'_>],
        deadline: Instant,
    ) -> Result<usize, TransportError> {
        self.move_bytes(libc::POLLIN, deadline, |this| this.receive(into))
    }

    fn write(&mut self, from: &[IoSlice<'_>], deadline: Instant) -> Result<usize, TransportError> {
        self.move_bytes(libc::POLLOUT, deadline, |this| this.send(from))
    }

    fn shutdown(&mut self, how: Shutdown) {
        // A peer that is gone already is no news here.
        let _gone = self.stream.shutdown(how);
    }

    fn peer(&self) -> &str {
        &self.peer
    }

    fn attach(&mut self, descriptors: Vec<OwnedFd>) -> Result<(), TransportError> {
        if self.outgoing.len() + descriptors.len() > MAX_DESCRIPTORS {
            return Err(failed(io::ErrorKind::InvalidInput.into(), &self.peer));
        }
        self.outgoing.extend(descriptors);
        Ok(())
    }

    fn detach(&mut self) -> Vec<OwnedFd> {
        self.incoming.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::time::Duration;

    fn pair() -> (DescriptorTransport, DescriptorTransport) {
        let (one, other) = UnixStream::pair().unwrap();
        (
            DescriptorTransport::new(one, "one").unwrap(),
            DescriptorTransport::new(other, "other").unwrap(),
        )
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn file(text: &str) -> OwnedFd {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        file.into()
    }

    #[test]
    fn descriptors_arrive_in_order_with_the_bytes_that_follow_them() {
        let (mut one, mut other) = pair();
        one.write(&[IoSlice::new(b"before")], soon()).unwrap();
        one.attach(vec![file("first"), file("second")]).unwrap();
        one.write(&[IoSlice::new(b"with")], soon()).unwrap();
        one.attach(vec![file("third")]).unwrap();
        one.write(&[IoSlice::new(b"last")], soon()).unwrap();
        let mut got = Vec::new();
        let mut byte = [0];
        while got.len() < 6 {
            other
                .read(&mut [IoSliceMut::new(&mut byte)], soon())
                .unwrap();
            got.push(byte[0]);
        }
        assert!(other.detach().is_empty(), "nothing came with {got:?}");
        while got.len() < 14 {
            other
                .read(&mut [IoSliceMut::new(&mut byte)], soon())
                .unwrap();
            got.push(byte[0]);
        }
        assert_eq!(got, b"beforewithlast");
        let texts: Vec<String> = (other.detach().into_iter())
            .map(|descriptor| std::io::read_to_string(std::fs::File::from(descriptor)).unwrap())
            .collect();
        assert_eq!(texts, ["first", "second", "third"]);
    }

    #[test]
    fn a_flood_of_descriptors_ends_the_stream() {
        let (mut one, mut other) = pair();
        let one_file = file("x");
        for _ in 0..2 {
            let copies = (0..MAX_DESCRIPTORS - 1).map(|_| one_file.try_clone().unwrap());
            one.attach(copies.collect()).unwrap();
            one.write(&[IoSlice::new(b"x")], soon()).unwrap();
        }
        let too_many = (0..=MAX_DESCRIPTORS).map(|_| one_file.try_clone().unwrap());
        assert!(one.attach(too_many.collect()).is_err());
        let mut byte = [0];
        other
            .read(&mut [IoSliceMut::new(&mut byte)], soon())
            .unwrap();
        let flooded = other.read(&mut [IoSliceMut::new(&mut byte)], soon());
        assert!(
            matches!(flooded, Err(TransportError::Io { .. })),
            "{flooded:?}"
        );
    }

    #[test]
    fn a_stream_without_descriptors_is_an_ordinary_one() {
        let (mut one, other) = pair();
        one.write(&[IoSlice::new(b"a"), IoSlice::new(b"bc")], soon())
            .unwrap();
        one.shutdown(Shutdown::Write);
        let DescriptorTransport { mut stream, .. } = other;
        stream.set_nonblocking(false).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
        let brief = Instant::now();
        let late = one.read(&mut [IoSliceMut::new(&mut [0])], brief);
        assert!(matches!(late, Err(TransportError::TimedOut { .. })));
    }
}
