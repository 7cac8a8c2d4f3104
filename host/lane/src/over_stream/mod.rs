//! Page lanes over any byte stream.
//!
//! A stream brings bytes in order, so operations follow one another, each with a head:
//!
//! | offset | bytes | field |
//! |---:|---:|---|
//! | 0 | 1 | kind: 1 write, 2 message |
//! | 1 | 1 | flags: 1 the payload has a checksum |
//! | 2 | 2 | entries in the placement table, 0 for messages |
//! | 4 | 4 | bytes of payload |
//! | 8 | 8 | sequence number: 0, 1, 2, … |
//! | 16 | 4 | CRC-32 of the payload, or 0 |
//! | 20 | 4 | CRC-32 of the placement table |
//! | 24 | 4 | CRC-32 of the bytes 0..24 |
//! | 28 | 12 each | placement table: first byte in the receiver's numbering (8), bytes (4) |
//!
//! and the payload behind it; all numbers are little-endian. A write's payload is cut by the
//! table, in order, without a gap. The receiver checks the table against the windows that it has
//! granted before it takes the first byte of payload, and then lets the transport put the payload
//! where it belongs, without a copy of its own.
//!
//! Payloads have checksums where the transport does not keep forgers off by itself
//! ([`crate::stream::StreamTraits::confidential`]): TCP's own sum misses too much, and under TLS
//! every record is authenticated anyway. Both sides know their transport, and a receiver accepts
//! nothing else than what fits it.
//!
//! Nothing is registered, so nothing is announced, and a grant stays with the receiver. No
//! operation is acknowledged: the transport's own flow control holds a sender back, and a
//! completion means that the transport has taken the bytes.

mod ahead;
mod header;
mod placing;
mod receiver;
mod sender;

use crate::LaneError;
use crate::page::LaneTraits;
use crate::stream::{StreamTraits, TlsFailure, TransportError};

pub use receiver::StreamReceiver;
pub use sender::StreamSender;

/// The sizes of a lane. Sender and receiver have to agree on them, or the receiver refuses what is
/// larger than it expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLane {
    /// Bytes in one buffer, and so in one write.
    pub buffer_bytes: usize,
    /// Buffers of the sender; they are made when they are first asked for.
    pub buffers: usize,
    /// Placements in one write, at most 65535.
    pub placements: usize,
    /// Bytes in one message, at most.
    pub message_bytes: usize,
}

impl Default for StreamLane {
    /// Buffers that are larger than a second-level cache, since the receiver takes a write in as few
    /// reads as it can, and each read lets the kernel wake the sender and send for it: with 256 KiB
    /// the receiver was measured to spend nearly twice the time as with 2 MiB, and the sender no
    /// less. One placement for each page of one.
    fn default() -> Self {
        Self {
            buffer_bytes: 2 << 20,
            buffers: 4,
            placements: 1024,
            message_bytes: 1 << 20,
        }
    }
}

impl StreamLane {
    fn traits(&self, stream: StreamTraits) -> LaneTraits {
        LaneTraits {
            name: stream.name,
            buffer_bytes: self.buffer_bytes.clamp(1, u32::MAX as usize),
            buffers: self.buffers.max(1),
            placements: self.placements.clamp(1, usize::from(u16::MAX)),
            message_bytes: self.message_bytes.min(u32::MAX as usize),
            registers: false,
            confidential: stream.confidential,
        }
    }
}

/// What the transport below said, in the words of a lane.
fn lane_error(error: TransportError) -> LaneError {
    match error {
        TransportError::TimedOut { peer } => LaneError::TimedOut { peer },
        TransportError::Closed { peer } => LaneError::Closed { peer },
        TransportError::Io { peer, source }
        | TransportError::Connect { peer, source }
        | TransportError::Listen {
            address: peer,
            source,
        } => LaneError::Io { peer, source },
        TransportError::Tls {
            peer,
            source: source @ (TlsFailure::Damaged | TlsFailure::Unexpected { .. }),
        } => LaneError::Corrupted {
            peer,
            reason: source.to_string(),
        },
        TransportError::Tls { ref peer, .. } | TransportError::Stopped { ref peer } => {
            LaneError::Io {
                peer: peer.clone(),
                source: std::io::Error::other(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::page::{PageReceiver, PageSender, Placement, Window};
    use crate::stream::SocketTransport;

    fn pair() -> (StreamSender, StreamReceiver) {
        let (out, into) = std::os::unix::net::UnixStream::pair().unwrap();
        let options = StreamLane::default();
        let transport = |stream| Box::new(SocketTransport::unix(stream, "test").unwrap());
        (
            StreamSender::new(transport(out), options),
            StreamReceiver::new(transport(into), options),
        )
    }

    #[test]
    fn a_write_lies_where_it_belongs_when_the_message_behind_it_comes() {
        let (mut sender, mut receiver) = pair();
        let memory: Arc<Vec<u8>> = Arc::new(vec![0; 4 << 20]);
        let start = NonNull::new(memory.as_ptr().cast_mut()).unwrap();
        // SAFETY: the vector is kept, and looked at only when the lane has written it.
        #[expect(unsafe_code, reason = "the test vouches for its memory")]
        let window = unsafe { Window::new(0..4 << 20, start, Arc::<Vec<u8>>::clone(&memory)) };
        let deadline = Instant::now() + Duration::from_secs(10);
        receiver.grant(window, deadline).unwrap();
        let writer = std::thread::spawn(move || {
            let mut buffer = sender.buffer(deadline).unwrap();
            buffer.extend(300_000).unwrap().fill(7);
            let places = [(1 << 20, 100_000), (5, 200_000)];
            let places = places.map(|(target, length)| Placement { target, length });
            sender.write(buffer, &places, deadline).unwrap();
            sender.send(b"written", deadline).unwrap();
        });
        let mut message = Vec::new();
        receiver.receive(&mut message, deadline).unwrap();
        writer.join().unwrap();
        assert_eq!(message, b"written");
        assert!(
            memory[1 << 20..(1 << 20) + 100_000]
                .iter()
                .all(|&byte| byte == 7)
        );
        assert!(memory[5..200_005].iter().all(|&byte| byte == 7));
        assert_eq!(
            memory.iter().map(|&byte| u64::from(byte)).sum::<u64>(),
            7 * 300_000
        );
    }
}
