//! The parts of guest physical address space in which BARs may lie.

use dunlin_guest::layout;

use super::config::{Bar, BarKind};

/// Hands out addresses for BARs, as firmware does: each aligned to its size, never given back.
#[derive(Debug)]
pub struct Windows {
    next32: u64,
    next64: u64,
}

impl Default for Windows {
    fn default() -> Self {
        Self {
            next32: layout::PCI_MMIO32_START,
            next64: layout::PCI_MMIO64_START,
        }
    }
}

impl Windows {
    /// An address for the BAR, or `None` when its window is full.
    pub fn allocate(&mut self, bar: &Bar) -> Option<u64> {
        let next = match bar.kind {
            BarKind::Memory32 => &mut self.next32,
            BarKind::Memory64 => &mut self.next64,
        };
        // A page at least, so that no two functions share one.
        let start = next.checked_next_multiple_of(bar.size.max(0x1000))?;
        if !contains(bar.kind, start, bar.size) {
            return None;
        }
        *next = start + bar.size;
        Some(start)
    }
}

/// May a BAR of that kind lie at `start`?
pub(super) fn contains(kind: BarKind, start: u64, size: u64) -> bool {
    let in_window = |window: u64, length: u64| {
        start >= window
            && start
                .checked_add(size)
                .is_some_and(|end| end <= window + length)
    };
    let low = in_window(layout::PCI_MMIO32_START, layout::PCI_MMIO32_SIZE);
    match kind {
        BarKind::Memory32 => low,
        BarKind::Memory64 => low || in_window(layout::PCI_MMIO64_START, layout::PCI_MMIO64_SIZE),
    }
}
