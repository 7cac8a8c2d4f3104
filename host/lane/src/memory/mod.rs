//! Page lanes within a process, with all the disorder that the contract allows.
//!
//! What is built on page lanes is tested over these: a write is cut into pieces that land in any
//! order and late, in a call of either end, but before a later message of the same lane is
//! received. Buffers come back as late as possible, and with other content. Two lanes know
//! nothing of each other. All of it follows from [`MemoryLane::seed`], as far as the threads that
//! use the two ends come in the same order.
//!
//! A lane can be made to fail at one operation ([`Fault`]).

mod channel;
mod ends;

use crate::over_stream::StreamLane;
use crate::page::LaneTraits;

pub use ends::{MemoryReceiver, MemorySender};

/// What one pair of ends is like.
#[derive(Debug, Clone, Copy)]
pub struct MemoryLane {
    /// Sizes, as other lanes have them.
    pub sizes: StreamLane,
    /// Operations on their way, at most: the next one waits.
    pub in_flight: usize,
    /// Which of all possible orders this is.
    pub seed: u64,
    /// Has memory to be granted before it is written to, as with RDMA? Otherwise writes land
    /// while the receiver waits for a message, as with streams.
    pub registers: bool,
    /// What goes wrong.
    pub fault: Option<Fault>,
}

impl Default for MemoryLane {
    fn default() -> Self {
        Self {
            sizes: StreamLane::default(),
            in_flight: 16,
            seed: 0,
            registers: true,
            fault: None,
        }
    }
}

/// What goes wrong with an operation, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The lane breaks at this operation. What came before arrives, or not.
    Cut(u64),
    /// The content of this operation is damaged on the way.
    Corrupt(u64),
    /// From this operation on nothing arrives.
    Stall(u64),
}

impl MemoryLane {
    fn traits(&self) -> LaneTraits {
        LaneTraits {
            name: "memory",
            buffer_bytes: self.sizes.buffer_bytes.max(1),
            buffers: self.sizes.buffers.max(1),
            placements: self.sizes.placements.max(1),
            message_bytes: self.sizes.message_bytes,
            registers: self.registers,
            confidential: true,
        }
    }
}

/// A lane: its two ends.
pub fn pair(options: MemoryLane) -> (MemorySender, MemoryReceiver) {
    ends::pair(options.traits(), channel::Channel::new(&options))
}
