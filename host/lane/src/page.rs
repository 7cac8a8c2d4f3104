//! The contract of page lanes.

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

/// Why a lane did not carry on. After any of these but `TimedOut` the lane is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// What was waited for did not come about until the deadline. The lane is whole: the call may
    /// be repeated.
    #[error("peer {peer} did not respond in time")]
    TimedOut {
        /// The peer's address.
        peer: String,
    },
    /// The peer closed the lane, or died.
    #[error("peer {peer} closed the lane")]
    Closed {
        /// The peer's address.
        peer: String,
    },
    /// The transport below failed.
    #[error("lane to {peer} failed")]
    Io {
        /// The peer's address.
        peer: String,
        /// What the kernel or the library said.
        #[source]
        source: io::Error,
    },
    /// What arrived is damaged, or no lane of this kind says such a thing.
    #[error("lane to {peer} is corrupted: {reason}")]
    Corrupted {
        /// The peer's address.
        peer: String,
        /// What does not fit.
        reason: String,
    },
    /// A write would go outside of what was granted.
    #[error(
        "write to {start:#x}..{end:#x} is outside of the windows granted on the lane to {peer}"
    )]
    NotGranted {
        /// The peer's address.
        peer: String,
        /// First byte, in the receiver's numbering.
        start: u64,
        /// Behind the last byte.
        end: u64,
    },
    /// A message or write is larger than [`LaneTraits`] allows.
    #[error(
        "{bytes} bytes are too many for one operation on the lane to {peer}, at most {limit} fit"
    )]
    TooLarge {
        /// The peer's address.
        peer: String,
        /// What was asked for.
        bytes: usize,
        /// What fits.
        limit: usize,
    },
}

/// What a lane offers. Both ends have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneTraits {
    /// For reports: `tcp`, `tls`, `unix`, `memory`.
    pub name: &'static str,
    /// Bytes in one buffer, and so in one write, at most.
    pub buffer_bytes: usize,
    /// Buffers that exist; posting more waits for a completion.
    pub buffers: usize,
    /// Placements in one write, at most.
    pub placements: usize,
    /// Bytes in one message, at most.
    pub message_bytes: usize,
    /// Does granting a window take time and pin its memory? Then grant windows of moderate size,
    /// ahead of the writes; otherwise one window over everything costs nothing.
    pub registers: bool,
    /// Does the lane keep others from reading and forging what it carries?
    pub confidential: bool,
}

/// A range of the receiver's numbering (for guest RAM: RAM offsets), in bytes.
pub type WindowRange = Range<u64>;

/// Memory of the receiver that the peer may write to.
#[derive(Clone)]
pub struct Window {
    range: WindowRange,
    start: NonNull<u8>,
    keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a window is an address and a length whose memory `keep` holds for as long as the window
// lives; `Window::new` demands that it may be written from any thread.
#[expect(unsafe_code, reason = "a window names memory that other threads write")]
unsafe impl Send for Window {}
// SAFETY: as above; a shared window is only read for its address.
#[expect(unsafe_code, reason = "a window names memory that other threads write")]
unsafe impl Sync for Window {}

impl Window {
    /// The memory at `start`, which the peer addresses as `range`.
    ///
    /// # Safety
    /// `start` must be valid for writes of the length of `range` for as long as `keep` lives, from
    /// any thread, and nothing may hold a Rust reference into it: lanes write it by raw copies or by
    /// the kernel at any time.
    #[expect(unsafe_code, reason = "the caller vouches for the memory")]
    pub unsafe fn new(
        range: WindowRange,
        start: NonNull<u8>,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self { range, start, keep }
    }

    /// What the peer calls it.
    pub fn range(&self) -> &WindowRange {
        &self.range
    }

    /// Where `range` lies in this process; `None` when it is not within the window.
    pub fn address_of(&self, range: &WindowRange) -> Option<NonNull<u8>> {
        let within = range.start <= range.end
            && range.start >= self.range.start
            && range.end <= self.range.end;
        let offset = range.start.checked_sub(self.range.start)? as usize;
        within
            .then(|| NonNull::new(self.start.as_ptr().wrapping_add(offset)))
            .flatten()
    }

    /// What keeps the memory mapped.
    pub fn keep(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.keep
    }
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window")
            .field("range", &self.range)
            .finish_non_exhaustive()
    }
}

/// Memory of a lane that is ready for sending (registered, where the lane needs that).
#[derive(Debug)]
pub struct Buffer {
    /// Which of the lane's buffers this is.
    slot: usize,
    bytes: Box<[u8]>,
    used: usize,
}

impl Buffer {
    /// For implementations of lanes: buffer number `slot`.
    pub fn new(slot: usize, bytes: Box<[u8]>) -> Self {
        let used = 0;
        Self { slot, bytes, used }
    }

    /// Which of the lane's buffers this is.
    pub fn slot(&self) -> usize {
        self.slot
    }

    /// What has been filled in.
    pub fn filled(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    /// Room that is left.
    pub fn room(&self) -> usize {
        self.bytes.len() - self.used
    }

    /// The next `length` bytes to fill; `None` when there is no such room.
    pub fn extend(&mut self, length: usize) -> Option<&mut [u8]> {
        let start = self.used;
        let end = start
            .checked_add(length)
            .filter(|&end| end <= self.bytes.len())?;
        self.used = end;
        Some(&mut self.bytes[start..end])
    }

    /// Takes back the last `length` bytes.
    pub fn truncate_by(&mut self, length: usize) {
        self.used = self.used.saturating_sub(length);
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.used = 0;
    }
}

/// Where a part of a write lands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// First byte, in the receiver's numbering.
    pub target: u64,
    /// Bytes.
    pub length: u32,
}

/// Names one posted operation of a lane; later ones compare greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

impl Ticket {
    /// Comes after all others: stands for whatever has been posted so far.
    pub const ALL: Self = Self(u64::MAX);
}

/// The end of a page lane that writes.
pub trait PageSender: Send {
    /// What this lane offers.
    fn traits(&self) -> LaneTraits;

    /// The peer's address, for messages.
    fn peer(&self) -> &str;

    /// Says that writes to `range` will follow, so that the peer can grant it ahead of them. A lane
    /// that does not register may pass over it.
    ///
    /// # Errors
    /// [`LaneError`] when the lane broke.
    fn announce(&mut self, range: WindowRange, deadline: Instant) -> Result<(), LaneError>;

    /// Waits until the peer has granted all of `range`.
    ///
    /// # Errors
    /// [`LaneError::TimedOut`] when it has not until `deadline`.
    fn await_grant(&mut self, range: WindowRange, deadline: Instant) -> Result<(), LaneError>;

    /// A free buffer, empty; waits for a completion when all are posted.
    ///
    /// # Errors
    /// [`LaneError::TimedOut`] when none became free until `deadline`.
    fn buffer(&mut self, deadline: Instant) -> Result<Buffer, LaneError>;

    /// Gives back a buffer that is not needed after all.
    fn recycle(&mut self, buffer: Buffer);

    /// Posts a write of the filled part of `from`, cut into `to` in order: each place within one
    /// granted window, no byte in two of them. The lane owns the
    /// buffer until the completion. When the deadline strikes in the middle of the write, the lane
    /// keeps the rest and goes on with it in the next call: after `TimedOut` the write *is* posted
    /// ([`Ticket::ALL`] stands for it).
    ///
    /// # Errors
    /// [`LaneError::NotGranted`], [`LaneError::TooLarge`] (nothing was posted; also when the lengths
    /// of `to` do not add up), or the lane broke.
    fn write(
        &mut self,
        from: Buffer,
        to: &[Placement],
        deadline: Instant,
    ) -> Result<Ticket, LaneError>;

    /// Lends the lane memory that writes may come from without a copy by the caller (registered, where
    /// the lane needs that). False, as by default: the lane takes buffers only.
    ///
    /// # Errors
    /// [`LaneError`] when the lane broke, or the host refuses to register the memory.
    fn lend(&mut self, window: Window, deadline: Instant) -> Result<bool, LaneError> {
        let _ = (window, deadline);
        Ok(false)
    }

    /// Posts a write of lent memory: the bytes of each place lie in one lent window under the same
    /// number as at the receiver. They may change until the completion: each arrives as it was at
    /// some moment until then. Otherwise as [`PageSender::write`].
    ///
    /// # Errors
    /// [`LaneError::NotGranted`] when a place is not lent, and as [`PageSender::write`].
    fn write_lent(&mut self, places: &[Placement], deadline: Instant) -> Result<Ticket, LaneError> {
        let _ = deadline;
        let first = places.first().map_or(0, |place| place.target);
        Err(LaneError::NotGranted {
            peer: self.peer().to_owned(),
            start: first,
            end: first,
        })
    }

    /// Posts a message, of no bytes at least. When the peer has it, all writes posted before on this
    /// lane are visible there. As with `write`, after `TimedOut` it is posted, and the lane keeps a
    /// copy for as long as need be.
    ///
    /// # Errors
    /// [`LaneError::TooLarge`], or the lane broke.
    fn send(&mut self, message: &[u8], deadline: Instant) -> Result<Ticket, LaneError>;

    /// Waits for the completion of `ticket` and all before it: their buffers may be used again.
    /// It says nothing about what the peer has.
    ///
    /// # Errors
    /// [`LaneError::TimedOut`] when they are not complete until `deadline`.
    fn complete(&mut self, ticket: Ticket, deadline: Instant) -> Result<(), LaneError>;

    /// Bytes that have left so far, with what the lane adds: they grow as long as the peer takes
    /// any.
    fn bytes_sent(&self) -> u64;

    /// Ends the lane; the peer sees [`LaneError::Closed`] after what is complete by now. Operations
    /// that are not may get lost, so [`PageSender::complete`] comes first.
    fn close(&mut self);
}

/// What [`PageReceiver::receive`] brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneEvent {
    /// A message is in the caller's vector; all writes before it are visible.
    Message,
    /// The sender announced writes to this range: grant it, or not.
    Announced(WindowRange),
}

/// The end of a page lane that is written to.
pub trait PageReceiver: Send {
    /// What this lane offers.
    fn traits(&self) -> LaneTraits;

    /// The peer's address, for messages.
    fn peer(&self) -> &str;

    /// Lets the peer write to a window from now on, and tells it so.
    ///
    /// # Errors
    /// [`LaneError`] when the lane broke or the host refuses to register the memory.
    fn grant(&mut self, window: Window, deadline: Instant) -> Result<(), LaneError>;

    /// Takes back all windows that lie within `range`: from the return on the lane writes there
    /// no more, and a write that arrives for it breaks the lane. The layers above have agreed on it
    /// before.
    ///
    /// # Errors
    /// [`LaneError`] when the lane broke.
    fn revoke(&mut self, range: WindowRange) -> Result<(), LaneError>;

    /// Waits for the next message, which replaces the content of `message`, placing the writes
    /// that arrive meanwhile. `TimedOut` leaves the lane whole, also in the middle of an operation.
    /// A call whose deadline has passed already takes what is there, so that it can be repeated.
    ///
    /// # Errors
    /// [`LaneError::TimedOut`] when no event came until `deadline`, whatever was placed meanwhile;
    /// [`LaneError::Corrupted`] when a
    /// checksum does not fit or a write went outside of the granted windows: what lies in the
    /// windows is then worthless.
    fn receive(&mut self, message: &mut Vec<u8>, deadline: Instant)
    -> Result<LaneEvent, LaneError>;

    /// Ends the lane.
    fn close(&mut self);
}
