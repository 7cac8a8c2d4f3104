//! What a peer may say on a page lane.
//!
//! An input is a script: one byte for the sizes of what arrives at a time, and then one step after
//! the other, each made into an operation with the checksums that belong to it, since no random
//! input would ever have them:
//!
//! | first byte, modulo 4 | step |
//! |---|---|
//! | 0 | a write: places (1), and for each where to (2) and how many bytes (1); the content is made up |
//! | 1 | a message: its length (1), and as many bytes |
//! | 2 | a header as it comes, but for its checksum: kind, flags, places (2), length (4) |
//! | 3 | bytes as they are: their number (1), and as many |
//!
//! Shared by the fuzz target and the test that runs its regression corpus.

use std::io::{IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use dunlin_lane::stream::{StreamTraits, Transport, TransportError};
use dunlin_lane::{LaneError, PageReceiver, StreamLane, StreamReceiver, Window};

/// Memory, of which the middle is granted.
const MEMORY: usize = 3 * PART;
const PART: usize = 4096;
const PEER: &str = "a script";
const SIZES: StreamLane = StreamLane {
    buffer_bytes: 4096,
    buffers: 1,
    placements: 16,
    message_bytes: 300,
};

/// What the receiver made of a script.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The messages that came.
    pub messages: Vec<Vec<u8>>,
    /// Was the end the peer's, and not a fault in what it said?
    pub orderly: bool,
    granted: Vec<u8>,
}

/// Lets a receiver hear a script, once as a whole and once in bits: the outcome is the same, and no
/// byte outside of what was granted is touched.
pub fn play(script: &[u8]) -> Outcome {
    let Some((&grain, steps)) = script.split_first() else {
        return hear(Vec::new(), usize::MAX);
    };
    let said = said(steps);
    let whole = hear(said.clone(), usize::MAX);
    let in_bits = hear(said, usize::from(grain) + 1);
    assert_eq!(whole.messages, in_bits.messages, "reads in bits differ");
    assert_eq!(
        whole.orderly, in_bits.orderly,
        "reads in bits end otherwise"
    );
    if whole.orderly {
        assert!(
            whole.granted == in_bits.granted,
            "reads in bits place otherwise"
        );
    }
    whole
}

/// The stream that a script stands for.
fn said(mut steps: &[u8]) -> Vec<u8> {
    let mut said = Vec::new();
    let mut sequence = 0;
    while let Some((&kind, rest)) = steps.split_first() {
        steps = rest;
        match kind % 4 {
            0 => {
                let places = usize::from(take(&mut steps, 1).first().copied().unwrap_or(0)) % 20;
                let mut table = Vec::new();
                let mut length = 0;
                for _ in 0..places {
                    let [low, high, count] = fixed(&mut steps);
                    let target = u64::from(u16::from_le_bytes([low, high]));
                    table.extend_from_slice(&target.to_le_bytes());
                    table.extend_from_slice(&u32::from(count).to_le_bytes());
                    length += usize::from(count);
                }
                let content: Vec<u8> = (0..length).map(|at| at as u8 | 1).collect();
                let fields = fields(1, 1, places as u16, length as u32);
                operation(&mut said, (fields, sequence), &table, &content);
            }
            1 => {
                let count = usize::from(take(&mut steps, 1).first().copied().unwrap_or(0)) * 2;
                let content = take(&mut steps, count);
                let fields = fields(2, 1, 0, content.len() as u32);
                operation(&mut said, (fields, sequence), &[], content);
            }
            2 => operation(&mut said, (fixed(&mut steps), sequence), &[], &[]),
            _ => {
                let count = usize::from(take(&mut steps, 1).first().copied().unwrap_or(0));
                said.extend_from_slice(take(&mut steps, count));
                continue;
            }
        }
        sequence += 1;
    }
    said
}

fn fields(kind: u8, flags: u8, places: u16, length: u32) -> [u8; 8] {
    let [p0, p1] = places.to_le_bytes();
    let [l0, l1, l2, l3] = length.to_le_bytes();
    [kind, flags, p0, p1, l0, l1, l2, l3]
}

fn operation(said: &mut Vec<u8>, (fields, sequence): ([u8; 8], u64), table: &[u8], content: &[u8]) {
    let start = said.len();
    said.extend_from_slice(&fields);
    said.extend_from_slice(&sequence.to_le_bytes());
    said.extend_from_slice(&crc32fast::hash(content).to_le_bytes());
    said.extend_from_slice(&crc32fast::hash(table).to_le_bytes());
    let crc = crc32fast::hash(&said[start..]);
    said.extend_from_slice(&crc.to_le_bytes());
    said.extend_from_slice(table);
    said.extend_from_slice(content);
}

fn take<'a>(from: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (front, rest) = from.split_at(count.min(from.len()));
    *from = rest;
    front
}

fn fixed<const N: usize>(from: &mut &[u8]) -> [u8; N] {
    let front = take(from, N);
    std::array::from_fn(|at| front.get(at).copied().unwrap_or(0))
}

fn hear(said: Vec<u8>, grain: usize) -> Outcome {
    let memory: Arc<Vec<AtomicU8>> = Arc::new((0..MEMORY).map(|_| AtomicU8::new(0)).collect());
    let granted = &memory[PART..2 * PART];
    let start = NonNull::new(granted.as_ptr().cast_mut().cast()).expect("a slice has an address");
    let range = PART as u64..2 * PART as u64;
    let script = Script {
        said,
        at: 0,
        grain,
        dry: false,
    };
    let mut receiver = StreamReceiver::new(Box::new(script), SIZES);
    // SAFETY: the window keeps the memory, whose bytes may change under shared references.
    #[expect(unsafe_code, reason = "a window is made of raw memory")]
    let window = unsafe { Window::new(range, start, Arc::<Vec<AtomicU8>>::clone(&memory)) };
    let now = Instant::now();
    receiver
        .grant(window, now)
        .expect("a stream grants at once");
    let mut messages = Vec::new();
    let mut message = Vec::new();
    let end = loop {
        match receiver.receive(&mut message, now) {
            Ok(_) => messages.push(message.clone()),
            Err(LaneError::TimedOut { .. }) => {}
            Err(error) => break error,
        }
    };
    let bytes = |part: &[AtomicU8]| part.iter().map(|b| b.load(Ordering::Acquire)).collect();
    let outside: Vec<u8> = [bytes(&memory[..PART]), bytes(&memory[2 * PART..])].concat();
    assert!(outside.iter().all(|&byte| byte == 0), "written outside");
    Outcome {
        messages,
        orderly: matches!(end, LaneError::Closed { .. }),
        granted: bytes(granted),
    }
}

/// Brings what was said, so many bytes at a time, and says in between that nothing is there.
struct Script {
    said: Vec<u8>,
    at: usize,
    grain: usize,
    dry: bool,
}

impl Transport for Script {
    fn traits(&self) -> StreamTraits {
        StreamTraits {
            name: "script",
            confidential: false,
        }
    }

    fn read(
        &mut self,
        into: &mut [IoSliceMut<'_>],
        _deadline: Instant,
    ) -> Result<usize, TransportError> {
        self.dry = !self.dry && self.grain != usize::MAX;
        if self.dry {
            return Err(TransportError::TimedOut {
                peer: PEER.to_owned(),
            });
        }
        let mut rest = &self.said[self.at..];
        rest = &rest[..rest.len().min(self.grain)];
        if rest.is_empty() {
            return Err(TransportError::Closed {
                peer: PEER.to_owned(),
            });
        }
        let mut done = 0;
        for slice in into {
            let count = slice.len().min(rest.len());
            slice[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            done += count;
        }
        self.at += done;
        Ok(done)
    }

    fn write(&mut self, _: &[IoSlice<'_>], _: Instant) -> Result<usize, TransportError> {
        Err(TransportError::Closed {
            peer: PEER.to_owned(),
        })
    }

    fn shutdown(&mut self, _how: Shutdown) {}

    fn peer(&self) -> &str {
        PEER
    }
}
