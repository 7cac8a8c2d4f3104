//! MSI-X: a table of messages in a BAR, one per vector, each of which can be masked.
//!
//! ```text
//!  trigger ─┬─ MSI-X disabled ──────────────► dropped (there is no INTx)
//!           ├─ vector or function masked ───► pending bit ──unmask──► message
//!           └─ else ────────────────────────► message
//! ```
//!
//! PCI Local Bus 3.0, 6.8.2.

use std::sync::{Arc, Mutex};

use dunlin_guest::{Msi, MsiSink, RestoreError, SavedState};

use crate::lock;

/// Bytes of a table entry: address (8), data (4), vector control (4).
const ENTRY_SIZE: u32 = 16;
/// Bit of the vector control register.
const VECTOR_MASKED: u32 = 1;
/// The most vectors that a function can have.
const MAX_VECTORS: u16 = 2048;

/// Where table and pending bits lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixLayout {
    /// Index of the BAR that holds both.
    pub bar: u8,
    /// Offset of the table, a multiple of 8.
    pub table: u32,
    /// Offset of the pending bits, a multiple of 8.
    pub pending: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

impl Entry {
    /// Vectors are masked after reset.
    const RESET: Self = Self {
        address: 0,
        data: 0,
        control: VECTOR_MASKED,
        pending: false,
    };

    fn to_bytes(self) -> [u8; ENTRY_SIZE as usize] {
        let mut bytes = [0; ENTRY_SIZE as usize];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    fn set_bytes(&mut self, bytes: [u8; ENTRY_SIZE as usize]) {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        // Bits 0 and 1 of the address are always zero: messages are aligned.
        self.address = u64::from(word(0) & !3) | u64::from(word(4)) << 32;
        self.data = word(8);
        self.control = word(12) & VECTOR_MASKED;
    }
}

#[derive(Debug)]
struct Table {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
}

/// The interrupts of one function; shared by its registers and its worker threads.
#[derive(Debug)]
pub struct Msix {
    layout: MsixLayout,
    vectors: u16,
    table: Mutex<Table>,
    sink: Arc<dyn MsiSink>,
}

/// Saved state of [`Msix`]; enable and function mask are in the configuration space.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MsixState {
    /// The vectors in order.
    #[prost(message, repeated, tag = "1")]
    pub vectors: Vec<VectorState>,
}

/// Saved state of one vector.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct VectorState {
    /// Message address.
    #[prost(uint64, tag = "1")]
    pub address: u64,
    /// Message data.
    #[prost(uint32, tag = "2")]
    pub data: u32,
    /// Vector control: bit 0 masks.
    #[prost(uint32, tag = "3")]
    pub control: u32,
    /// Was triggered while masked.
    #[prost(bool, tag = "4")]
    pub pending: bool,
}

impl Msix {
    /// `vectors` (1 to 2048; brought into that range) masked vectors that send to `sink`.
    pub fn new(vectors: u16, layout: MsixLayout, sink: Arc<dyn MsiSink>) -> Arc<Self> {
        let vectors = vectors.clamp(1, MAX_VECTORS);
        Arc::new(Self {
            layout,
            vectors,
            table: Mutex::new(Table {
                entries: vec![Entry::RESET; usize::from(vectors)],
                enabled: false,
                masked: false,
            }),
            sink,
        })
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Where table and pending bits lie.
    pub fn layout(&self) -> MsixLayout {
        self.layout
    }

    /// Do table and pending bits fit into a BAR of that size, aligned and apart?
    pub(super) fn fits(&self, bar_size: u64) -> bool {
        let MsixLayout { table, pending, .. } = self.layout;
        let (table, pending) = (u64::from(table), u64::from(pending));
        let (table_end, pending_end) = (table + self.table_size(), pending + self.pending_size());
        table % 8 == 0
            && pending % 8 == 0
            && table_end.max(pending_end) <= bar_size
            && (table_end <= pending || pending_end <= table)
    }

    fn table_size(&self) -> u64 {
        u64::from(self.vectors) * u64::from(ENTRY_SIZE)
    }

    fn pending_size(&self) -> u64 {
        u64::from(self.vectors).div_ceil(64) * 8
    }

    /// Interrupts the guest. A vector that does not exist (0xffff, "no vector") is ignored.
    pub fn trigger(&self, vector: u16) {
        let mut table = lock(&self.table);
        let (enabled, masked) = (table.enabled, table.masked);
        let Some(entry) = table.entries.get_mut(usize::from(vector)) else {
            return;
        };
        if !enabled {
            return;
        }
        entry.pending = true;
        if !masked {
            // Under the lock, so that no message follows after the guest has masked the vector.
            self.flush(entry);
        }
    }

    /// Was MSI-X enabled by the guest?
    pub fn is_enabled(&self) -> bool {
        lock(&self.table).enabled
    }

    /// What the message control register says; pending messages that are now unmasked are sent.
    pub(super) fn set_control(&self, enabled: bool, masked: bool) {
        let mut table = lock(&self.table);
        table.enabled = enabled;
        table.masked = masked;
        if enabled && !masked {
            table.entries.iter_mut().for_each(|entry| self.flush(entry));
        }
    }

    fn flush(&self, entry: &mut Entry) {
        if entry.pending && entry.control & VECTOR_MASKED == 0 {
            entry.pending = false;
            self.sink.signal(Msi {
                address: entry.address,
                data: entry.data,
            });
        }
    }

    /// Answers a load from a BAR if it falls into table or pending bits; false if it does not.
    pub fn read(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        if bar != self.layout.bar {
            return false;
        }
        if let Some(within) = inside(offset, self.layout.table, self.table_size()) {
            let table = lock(&self.table);
            fill(data, within, |at| {
                let entry = table.entries.get((at / u64::from(ENTRY_SIZE)) as usize)?;
                Some(entry.to_bytes()[(at % u64::from(ENTRY_SIZE)) as usize])
            });
            return true;
        }
        if let Some(within) = inside(offset, self.layout.pending, self.pending_size()) {
            let table = lock(&self.table);
            fill(data, within, |at| {
                let first = usize::try_from(at).ok()?.checked_mul(8)?;
                let bits = table.entries.iter().skip(first).take(8).enumerate();
                Some(bits.fold(0, |byte, (bit, e)| byte | u8::from(e.pending) << bit))
            });
            return true;
        }
        false
    }

    /// Takes a store to a BAR if it falls into table or pending bits; false if it does not.
    pub fn write(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        if bar != self.layout.bar {
            return false;
        }
        if let Some(within) = inside(offset, self.layout.table, self.table_size()) {
            self.write_table(within, data);
            return true;
        }
        // Pending bits are read-only.
        inside(offset, self.layout.pending, self.pending_size()).is_some()
    }

    fn write_table(&self, offset: u64, data: &[u8]) {
        // The specification allows aligned 4- and 8-byte stores only; others are ignored.
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let size = u64::from(ENTRY_SIZE);
        let mut table = lock(&self.table);
        let may_send = table.enabled && !table.masked;
        let Some(entry) = table.entries.get_mut((offset / size) as usize) else {
            return;
        };
        let mut bytes = entry.to_bytes();
        let at = (offset % size) as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        entry.set_bytes(bytes);
        if may_send {
            self.flush(entry);
        }
    }

    /// Masks and forgets everything: what a reset of the function does. Enable and function mask
    /// belong to the configuration space and stay.
    pub fn reset(&self) {
        lock(&self.table).entries.fill(Entry::RESET);
    }

    pub(super) fn save(&self) -> MsixState {
        let Self {
            layout: _,
            vectors: _,
            table,
            sink: _,
        } = self;
        let Table {
            entries,
            enabled: _,
            masked: _,
        } = &*lock(table);
        let vectors = entries.iter().map(|entry| {
            let Entry {
                address,
                data,
                control,
                pending,
            } = *entry;
            VectorState {
                address,
                data,
                control,
                pending,
            }
        });
        MsixState {
            vectors: vectors.collect(),
        }
    }

    /// The table is disabled afterwards, until [`Msix::set_control`] says what the saved
    /// configuration space says.
    pub(super) fn restore(&self, state: &MsixState, of: &SavedState) -> Result<(), RestoreError> {
        let MsixState { vectors } = state;
        if vectors.len() != usize::from(self.vectors) {
            return Err(of.invalid(format!("expected {} MSI-X vectors", self.vectors)));
        }
        let entries: Result<Vec<Entry>, RestoreError> =
            vectors.iter().map(|v| entry_of(v, of)).collect();
        let entries = entries?;
        *lock(&self.table) = Table {
            entries,
            enabled: false,
            masked: true,
        };
        Ok(())
    }
}

fn entry_of(state: &VectorState, of: &SavedState) -> Result<Entry, RestoreError> {
    let VectorState {
        address,
        data,
        control,
        pending,
    } = *state;
    if address % 4 != 0 || control & !VECTOR_MASKED != 0 {
        return Err(of.invalid("MSI-X vector with reserved bits set"));
    }
    Ok(Entry {
        address,
        data,
        control,
        pending,
    })
}

/// How far `offset` lies inside of the `size` bytes from `start`.
fn inside(offset: u64, start: u32, size: u64) -> Option<u64> {
    offset
        .checked_sub(u64::from(start))
        .filter(|within| *within < size)
}

fn fill(data: &mut [u8], offset: u64, byte_at: impl Fn(u64) -> Option<u8>) {
    for (at, byte) in (offset..).zip(data) {
        *byte = byte_at(at).unwrap_or(0);
    }
}
