//! A split virtqueue from the device's side (virtio 1.2, 2.7).
//!
//! Everything in the rings is what a driver says, and is checked when it is read: a chain is
//! copied out once, descriptor by descriptor, and its buffers lie within RAM afterwards. What
//! breaks the rules is a [`RingError`]; the device then stops and asks to be reset.
//!
//! Nothing is in flight between two rounds of a device: a chain that was popped is either used or
//! given back by [`Queue::undo_pop`], so that the two positions are all there is to save.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use dunlin_guest::{GuestAddress, Memory};
use vm_memory::{Bytes, GuestMemoryBackend};

use super::chain::{Chain, Segment};

/// Bytes of a descriptor.
const DESCRIPTOR_SIZE: u64 = 16;
/// Bytes of an element of the used ring.
const USED_ELEMENT_SIZE: u64 = 8;
/// Bytes before the elements of both rings: flags and index.
const RING_HEADER_SIZE: u64 = 4;
/// The largest queue that the specification allows.
pub const MAX_QUEUE_SIZE: u16 = 32768;
/// Most buffers in a chain. Drivers that use indirect tables make chains of up to about 130.
const MAX_SEGMENTS: usize = 1024;

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
const DESCRIPTOR_INDIRECT: u16 = 4;
/// Flag of the available ring: the driver wants no interrupts.
const NO_INTERRUPT: u16 = 1;

/// How the driver broke the rules of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is no power of two or beyond the device's.
    #[error("queue size {size} is no power of two up to {limit}")]
    Size {
        /// What the driver set.
        size: u16,
        /// What the device offers.
        limit: u16,
    },
    /// A ring or buffer is not in RAM.
    #[error("{length} bytes at {address:#x} are not in RAM")]
    OutsideRam {
        /// First guest physical address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// A ring is not aligned.
    #[error("ring address {address:#x} is not a multiple of {alignment}")]
    Misaligned {
        /// Guest physical address.
        address: u64,
        /// What it must be a multiple of.
        alignment: u64,
    },
    /// More chains are available than the queue has descriptors.
    #[error("available index is {distance} ahead in a queue of {size}")]
    Jump {
        /// How many chains would be waiting.
        distance: u16,
        /// Descriptors of the queue.
        size: u16,
    },
    /// A head or next index does not exist.
    #[error("descriptor {index} is outside of a table of {size}")]
    Index {
        /// What the driver wrote.
        index: u16,
        /// Descriptors in the table.
        size: u16,
    },
    /// A chain with a loop, or longer than allowed.
    #[error("descriptor chain is a loop or too long")]
    Endless,
    /// A buffer to read follows a buffer to write.
    #[error("readable buffer after a writable one")]
    Order,
    /// An indirect table that is not allowed where it is, or has a size that no table has.
    #[error("invalid indirect table of {length} bytes")]
    Indirect {
        /// Bytes that the driver says.
        length: u32,
    },
}

/// Where the driver put a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueLayout {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
}

impl QueueLayout {
    /// Checks size, alignment and that all of it is in RAM.
    ///
    /// # Errors
    /// [`RingError`] when the queue cannot be there.
    pub fn check(&self, memory: &Memory, limit: u16) -> Result<(), RingError> {
        let Self {
            size,
            descriptors,
            available,
            used,
        } = *self;
        if !size.is_power_of_two() || size > limit.min(MAX_QUEUE_SIZE) {
            return Err(RingError::Size { size, limit });
        }
        let entries = u64::from(size);
        // Both rings end with the index at which the other side wants to hear.
        let parts = [
            (descriptors, 16, DESCRIPTOR_SIZE * entries),
            (available, 2, RING_HEADER_SIZE + 2 * entries + 2),
            (used, 4, RING_HEADER_SIZE + USED_ELEMENT_SIZE * entries + 2),
        ];
        for (address, alignment, length) in parts {
            if address % alignment != 0 {
                return Err(RingError::Misaligned { address, alignment });
            }
            check_ram(memory, address, length)?;
        }
        Ok(())
    }
}

/// How far a queue has come: all that must be saved of one at rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueuePosition {
    /// Index of the next chain to take from the available ring.
    pub next_available: u16,
    /// Index of the next element to write to the used ring.
    pub next_used: u16,
}

/// Does the driver say by index when it wants an interrupt, and hear so when to notify?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suppression {
    /// By flags (2.7.7, 2.7.8 without the feature).
    Flags,
    /// `VIRTIO_F_EVENT_IDX`.
    EventIndex,
}

/// A queue that the driver has enabled.
#[derive(Debug)]
pub struct Queue {
    memory: Memory,
    layout: QueueLayout,
    suppression: Suppression,
    next_available: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// `next_used` when the driver was last considered for an interrupt.
    considered: Wrapping<u16>,
}

impl Queue {
    /// A queue at `layout` that goes on from `position`.
    ///
    /// # Errors
    /// [`RingError`] when the queue cannot be there.
    pub fn new(
        memory: Memory,
        layout: QueueLayout,
        position: QueuePosition,
        suppression: Suppression,
    ) -> Result<Self, RingError> {
        layout.check(&memory, MAX_QUEUE_SIZE)?;
        Ok(Self {
            memory,
            layout,
            suppression,
            next_available: Wrapping(position.next_available),
            next_used: Wrapping(position.next_used),
            considered: Wrapping(position.next_used),
        })
    }

    /// How far the queue has come.
    pub fn position(&self) -> QueuePosition {
        let Self {
            memory: _,
            layout: _,
            suppression: _,
            next_available,
            next_used,
            considered: _,
        } = self;
        QueuePosition {
            next_available: next_available.0,
            next_used: next_used.0,
        }
    }

    /// Guest RAM.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How many chains wait in the available ring.
    fn waiting(&self) -> Result<u16, RingError> {
        // Acquire: what the driver wrote before the index is visible after it was read.
        let index: u16 = self.load(self.layout.available + 2, Ordering::Acquire)?;
        let distance = (Wrapping(u16::from_le(index)) - self.next_available).0;
        if distance > self.layout.size {
            return Err(RingError::Jump {
                distance,
                size: self.layout.size,
            });
        }
        Ok(distance)
    }

    /// Takes the next chain into `chain`; false when none waits, and the driver then notifies
    /// when it adds one.
    ///
    /// # Errors
    /// [`RingError`] when the driver broke the rules; the queue must not be used any more.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if self.waiting()? == 0 && !self.arm()? {
            return Ok(false);
        }
        let slot = u64::from(self.next_available.0 % self.layout.size);
        let element = self.layout.available + RING_HEADER_SIZE + 2 * slot;
        let head = u16::from_le(self.load(element, Ordering::Relaxed)?);
        self.read_chain(head, chain)?;
        self.next_available += 1;
        Ok(true)
    }

    /// Gives back the chain that was popped last: the next `pop` returns it again.
    pub fn undo_pop(&mut self) {
        self.next_available -= 1;
    }

    /// How many chains wait; if none, the driver notifies when it adds one.
    ///
    /// # Errors
    /// [`RingError`] when the driver broke the rules; the queue must not be used any more.
    pub fn available(&mut self) -> Result<u16, RingError> {
        match self.waiting()? {
            0 if self.arm()? => self.waiting(),
            count => Ok(count),
        }
    }

    /// Returns the chain of that head to the driver, with the number of bytes written to it.
    ///
    /// # Errors
    /// [`RingError`] when the used ring is not in RAM.
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        let slot = u64::from(self.next_used.0 % self.layout.size);
        let element = self.layout.used + RING_HEADER_SIZE + USED_ELEMENT_SIZE * slot;
        let mut bytes = [0; USED_ELEMENT_SIZE as usize];
        bytes[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        bytes[4..].copy_from_slice(&written.to_le_bytes());
        self.memory
            .mapping()
            .write_slice(&bytes, GuestAddress(element))
            .or(Err(outside(element, USED_ELEMENT_SIZE)))?;
        self.next_used += 1;
        let index = self.next_used.0.to_le();
        self.store(self.layout.used + 2, index, Ordering::Release)
    }

    /// Shall the driver be interrupted for what was used since the last call?
    ///
    /// # Errors
    /// [`RingError`] when the available ring is not in RAM.
    pub fn needs_interrupt(&mut self) -> Result<bool, RingError> {
        let old = std::mem::replace(&mut self.considered, self.next_used);
        if old == self.next_used {
            return Ok(false);
        }
        // The driver writes its wish, then looks at the index; we do the reverse.
        fence(Ordering::SeqCst);
        match self.suppression {
            Suppression::Flags => {
                let flags: u16 = self.load(self.layout.available, Ordering::Relaxed)?;
                Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
            }
            Suppression::EventIndex => {
                let at = self.layout.available + RING_HEADER_SIZE + 2 * self.entries();
                let event = Wrapping(u16::from_le(self.load(at, Ordering::Relaxed)?));
                Ok(self.next_used - event - Wrapping(1) < self.next_used - old)
            }
        }
    }

    /// Was any buffer ever returned?
    pub fn has_used(&self) -> bool {
        self.next_used.0 != 0
    }

    /// Asks the driver to notify at the next chain; true when one came meanwhile.
    fn arm(&mut self) -> Result<bool, RingError> {
        if self.suppression == Suppression::EventIndex {
            let at = self.layout.used + RING_HEADER_SIZE + USED_ELEMENT_SIZE * self.entries();
            self.store(at, self.next_available.0.to_le(), Ordering::Relaxed)?;
            // The driver adds a chain, then looks at the event index; we do the reverse.
            fence(Ordering::SeqCst);
        }
        Ok(self.waiting()? > 0)
    }

    fn read_chain(&self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.clear(head);
        let mut table = Table {
            address: self.layout.descriptors,
            size: self.layout.size,
            indirect: false,
        };
        let mut index = head;
        let mut left = MAX_SEGMENTS;
        let mut total = 0u64;
        loop {
            left = left.checked_sub(1).ok_or(RingError::Endless)?;
            let descriptor = self.descriptor(&table, index)?;
            if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
                table = self.indirect(&table, &descriptor)?;
                index = 0;
                continue;
            }
            total += u64::from(descriptor.length);
            if total > u64::from(u32::MAX) {
                return Err(RingError::Endless);
            }
            self.add_segment(&descriptor, chain)?;
            if descriptor.flags & DESCRIPTOR_NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn add_segment(&self, descriptor: &Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let Descriptor {
            address,
            length,
            flags,
            next: _,
        } = *descriptor;
        if length == 0 {
            return Ok(());
        }
        check_ram(&self.memory, address, u64::from(length))?;
        let segment = Segment { address, length };
        if flags & DESCRIPTOR_WRITE != 0 {
            chain.push_writable(segment);
        } else if chain.writable.is_empty() {
            chain.push_readable(segment);
        } else {
            return Err(RingError::Order);
        }
        Ok(())
    }

    /// The table that an indirect descriptor names (2.7.5.3): not within another, the last of
    /// its chain, and a whole number of descriptors.
    fn indirect(&self, table: &Table, descriptor: &Descriptor) -> Result<Table, RingError> {
        let length = descriptor.length;
        let entries = u64::from(length) / DESCRIPTOR_SIZE;
        let whole = u64::from(length).is_multiple_of(DESCRIPTOR_SIZE);
        let last = descriptor.flags & DESCRIPTOR_NEXT == 0;
        if table.indirect || !last || !whole || !(1..=MAX_SEGMENTS as u64).contains(&entries) {
            return Err(RingError::Indirect { length });
        }
        check_ram(&self.memory, descriptor.address, u64::from(length))?;
        Ok(Table {
            address: descriptor.address,
            size: entries as u16,
            indirect: true,
        })
    }

    fn descriptor(&self, table: &Table, index: u16) -> Result<Descriptor, RingError> {
        if index >= table.size {
            return Err(RingError::Index {
                index,
                size: table.size,
            });
        }
        let address = table.address + DESCRIPTOR_SIZE * u64::from(index);
        let mut bytes = [0; DESCRIPTOR_SIZE as usize];
        self.memory
            .mapping()
            .read_slice(&mut bytes, GuestAddress(address))
            .or(Err(outside(address, DESCRIPTOR_SIZE)))?;
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        Ok(Descriptor {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            length: u32::from_le_bytes([i, j, k, l]),
            flags: u16::from_le_bytes([m, n]),
            next: u16::from_le_bytes([o, p]),
        })
    }

    fn entries(&self) -> u64 {
        u64::from(self.layout.size)
    }

    fn load(&self, address: u64, order: Ordering) -> Result<u16, RingError> {
        self.memory
            .mapping()
            .load(GuestAddress(address), order)
            .or(Err(outside(address, 2)))
    }

    fn store(&self, address: u64, value: u16, order: Ordering) -> Result<(), RingError> {
        self.memory
            .mapping()
            .store(value, GuestAddress(address), order)
            .or(Err(outside(address, 2)))
    }
}

#[derive(Debug)]
struct Table {
    address: u64,
    size: u16,
    indirect: bool,
}

#[derive(Debug)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

fn outside(address: u64, length: u64) -> RingError {
    RingError::OutsideRam { address, length }
}

fn check_ram(memory: &Memory, address: u64, length: u64) -> Result<(), RingError> {
    let inside = usize::try_from(length)
        .is_ok_and(|length| memory.mapping().check_range(GuestAddress(address), length));
    if inside {
        Ok(())
    } else {
        Err(outside(address, length))
    }
}

#[cfg(test)]
mod tests;
