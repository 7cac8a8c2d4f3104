//! How control messages and guest pages travel between two hosts.
//!
//! - a *control lane* is a duplex byte stream in order ([`stream::Transport`]); [`stream`] also has
//!   the places where one begins;
//! - a *page lane* ([`PageSender`], [`PageReceiver`]) goes one way and places bytes straight into
//!   memory that its receiver has granted.
//!
//! Page lanes promise no more than RDMA's reliable connections give, so that sockets, verbs and
//! user-space RoCE fit behind the same two traits:
//!
//! 1. A *write* places bytes in a granted window of the receiver. Nobody tells the receiver, and
//!    the bytes may land in any order, until
//! 2. a *message* that was sent later **on the same lane** arrives: all writes before it are then
//!    visible. Between two lanes nothing is ordered.
//! 3. A [`Buffer`] belongs to the lane from the call that posts it until its completion; the
//!    sender gets it back by [`PageSender::buffer`].
//! 4. Memory is granted explicitly, window by window, ahead of the writes to it: registration
//!    takes time and pins memory. A write outside of what was granted fails at the sender and, when
//!    the peer is hostile, at the receiver.
//! 5. A completion says that the buffer may be used again, and nothing about the peer. What the
//!    peer has, only a message of the layer above says.
//! 6. Writes with a message between them land in the order in which they were posted; writes
//!    without one in any order, also over each other.
//!
//! There are two kinds of page lanes: over any byte stream ([`over_stream`]), and within a process
//! ([`memory`]) with all the disorder that the contract allows, to test what is built above.
//!
//! This crate knows no guest and no protocol above it.

pub mod memory;
pub mod over_stream;
mod page;
pub mod stream;
mod windows;

pub use over_stream::{StreamLane, StreamReceiver, StreamSender};
pub use page::{
    Buffer, LaneError, LaneEvent, LaneTraits, PageReceiver, PageSender, Placement, Ticket, Window,
    WindowRange,
};
