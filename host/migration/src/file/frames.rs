//! The frames of the wire protocol in a file: the same headers and checksums, without a peer.

use std::io::{ErrorKind, Read, Write};

use super::error::SnapshotError;
use crate::protocol::frame::HEADER_LENGTH;
use crate::protocol::{Header, Kind, Message, ProtocolError};

/// Writes frames one behind the other.
pub(super) struct FrameWriter<W> {
    into: W,
    sequence: u64,
    bytes: u64,
}

impl<W: Write> FrameWriter<W> {
    pub(super) fn new(into: W) -> Self {
        Self::after(0, into)
    }

    /// Goes on elsewhere, behind so many frames.
    pub(super) fn after(frames: u64, into: W) -> Self {
        Self {
            into,
            sequence: frames,
            bytes: 0,
        }
    }

    /// Frames written.
    pub(super) fn frames(&self) -> u64 {
        self.sequence
    }

    /// Bytes written.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What the frames were written to.
    pub(super) fn into_inner(self) -> W {
        self.into
    }

    pub(super) fn message(&mut self, message: &Message) -> Result<(), SnapshotError> {
        self.frame(message.kind(), &message.encode())
    }

    pub(super) fn frame(&mut self, kind: Kind, payload: &[u8]) -> Result<(), SnapshotError> {
        let limit = u64::from(kind.max_payload());
        let length = payload.len() as u64;
        let fits = u32::try_from(length).ok().filter(|_| length <= limit);
        let Some(length) = fits else {
            return Err(ProtocolError::Length {
                kind,
                length,
                limit,
            }
            .into());
        };
        let header = Header {
            length,
            kind,
            sequence: self.sequence,
            payload_crc: crc32fast::hash(payload),
        };
        self.sequence += 1;
        self.bytes += (HEADER_LENGTH + payload.len()) as u64;
        let written = self
            .into
            .write_all(&header.encode())
            .and_then(|()| self.into.write_all(payload));
        written.map_err(SnapshotError::io("write"))
    }
}

/// Reads frames one behind the other.
pub(super) struct FrameReader<R> {
    from: R,
    sequence: u64,
}

impl<R: Read> FrameReader<R> {
    pub(super) fn new(from: R) -> Self {
        Self::after(0, from)
    }

    /// Goes on elsewhere, behind so many frames.
    pub(super) fn after(frames: u64, from: R) -> Self {
        Self {
            from,
            sequence: frames,
        }
    }

    /// What the frames were read from.
    pub(super) fn into_inner(self) -> R {
        self.from
    }

    /// Frames read.
    pub(super) fn frames(&self) -> u64 {
        self.sequence
    }

    /// The next frame, whose checksums fit.
    pub(super) fn frame(&mut self) -> Result<(Kind, Vec<u8>), SnapshotError> {
        let mut bytes = [0; HEADER_LENGTH];
        self.from.read_exact(&mut bytes).map_err(ends_or_fails)?;
        let header = Header::decode(&bytes, self.sequence)?;
        self.sequence += 1;
        // Memory grows with what is there, not with what the header says.
        let mut payload = Vec::new();
        let length = u64::from(header.length);
        let read = (&mut self.from).take(length).read_to_end(&mut payload);
        if (read.map_err(ends_or_fails)? as u64) < length {
            return Err(SnapshotError::not_whole("it ends within a frame"));
        }
        header.check_payload(crc32fast::hash(&payload))?;
        Ok((header.kind, payload))
    }

    /// Nothing may follow.
    pub(super) fn at_end(&mut self) -> Result<(), SnapshotError> {
        match self.from.read(&mut [0]).map_err(ends_or_fails)? {
            0 => Ok(()),
            _ => Err(SnapshotError::not_whole("it goes on behind its end")),
        }
    }

    /// The next frame, which has to be a control message.
    pub(super) fn message(&mut self) -> Result<Message, SnapshotError> {
        let (kind, payload) = self.frame()?;
        Ok(Message::decode(kind, &payload)?)
    }
}

fn ends_or_fails(error: std::io::Error) -> SnapshotError {
    match error.kind() {
        ErrorKind::UnexpectedEof => SnapshotError::not_whole("it ends too early"),
        _ => SnapshotError::io("read")(error),
    }
}
