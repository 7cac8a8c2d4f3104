//! The software TLB: direct-mapped, one half for the supervisor, one for user mode.

use std::num::NonZeroU8;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use super::PAGE_OFFSET;
use crate::memory::RamPage;

const ENTRIES: usize = 1024;
/// Never the page of an address.
const NONE: u64 = 1;

/// Whose accesses an entry serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Privilege {
    Supervisor = 0,
    User = 1,
}

/// A page of RAM at a linear address.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Entry {
    read: u64,
    write: u64,
    /// Host address less linear address.
    addend: usize,
    mark: NonNull<AtomicU8>,
}

impl Entry {
    const fn empty() -> Self {
        Self {
            read: NONE,
            write: NONE,
            addend: 0,
            mark: NonNull::dangling(),
        }
    }

    /// May `bytes` at `address` be read through this entry? Not when they cross its page.
    #[inline(always)]
    pub(crate) fn reads(&self, address: u64, bytes: u64) -> bool {
        self.read == address.wrapping_add(bytes - 1) & !PAGE_OFFSET
    }

    /// May they be written?
    #[inline(always)]
    pub(crate) fn writes(&self, address: u64, bytes: u64) -> bool {
        self.write == address.wrapping_add(bytes - 1) & !PAGE_OFFSET
    }

    /// Where the byte at `address` is.
    #[inline(always)]
    pub(crate) fn host(&self, address: u64) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.addend.wrapping_add(address as usize))
    }

    /// Marks the page in the dirty log: after the store.
    #[inline(always)]
    pub(crate) fn mark(&self, mark: NonZeroU8) {
        // SAFETY: a mark is reached only through an entry that was found to serve a write, and
        // such entries hold a mark of `PhysicalMemory`, which lives as long as the processor.
        #[expect(unsafe_code, reason = "the dirty log is reached by pointer")]
        unsafe {
            self.mark.as_ref().store(mark.get(), Ordering::Release);
        }
    }
}

/// What is entered into the TLB.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fill {
    pub(crate) address: u64,
    pub(crate) ram: RamPage,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) global: bool,
    /// Part of a page larger than 4 KiB.
    pub(crate) large: bool,
}

#[derive(Debug)]
pub(crate) struct Tlb {
    entries: Box<[Entry; 2 * ENTRIES]>,
    /// Entries of non-global pages, which a load of CR3 drops.
    local: Vec<u16>,
    is_local: Box<[bool; 2 * ENTRIES]>,
    /// There may be entries of large pages in the lower and in the upper half.
    large: [bool; 2],
    /// The entries for the current privilege.
    current: *const Entry,
}

impl Tlb {
    pub(crate) fn new() -> Self {
        let entries = Box::new([Entry::empty(); 2 * ENTRIES]);
        let mut tlb = Self {
            entries,
            local: Vec::with_capacity(2 * ENTRIES),
            is_local: Box::new([false; 2 * ENTRIES]),
            large: [false; 2],
            current: std::ptr::null(),
        };
        tlb.set_privilege(Privilege::Supervisor);
        tlb
    }

    pub(crate) fn set_privilege(&mut self, privilege: Privilege) {
        self.current = self.entries[privilege as usize * ENTRIES..].as_ptr();
    }

    /// The entry that may serve `address` for the current privilege.
    #[inline(always)]
    pub(crate) fn entry(&self, address: u64) -> Entry {
        // SAFETY: `current` points to ENTRIES entries of the box, and the index is below that.
        #[expect(unsafe_code, reason = "the innermost look-up of every memory access")]
        unsafe {
            *self.current.add(index(address))
        }
    }

    /// The entry for another privilege than the current one.
    #[inline(always)]
    pub(crate) fn entry_of(&self, privilege: Privilege, address: u64) -> Entry {
        self.entries[privilege as usize * ENTRIES + index(address)]
    }

    pub(crate) fn fill(&mut self, privilege: Privilege, fill: &Fill) {
        let page = fill.address & !PAGE_OFFSET;
        let at = privilege as usize * ENTRIES + index(page);
        self.entries[at] = Entry {
            read: if fill.readable { page } else { NONE },
            write: if fill.writable { page } else { NONE },
            addend: fill
                .ram
                .host
                .as_ptr()
                .expose_provenance()
                .wrapping_sub(page as usize),
            mark: fill.ram.mark,
        };
        if !fill.global && !self.is_local[at] {
            self.is_local[at] = true;
            self.local.push(at as u16);
        }
        if fill.large {
            self.large[(page >> 63) as usize] = true;
        }
    }

    /// Drops all entries but those of global pages.
    pub(crate) fn flush_local(&mut self) {
        for at in self.local.drain(..) {
            self.entries[usize::from(at)] = Entry::empty();
            self.is_local[usize::from(at)] = false;
        }
    }

    /// Drops all entries.
    pub(crate) fn flush(&mut self) {
        self.local.clear();
        self.is_local.fill(false);
        self.entries.fill(Entry::empty());
        self.large = [false; 2];
    }

    /// Drops what may be the translation of `address`.
    pub(crate) fn flush_page(&mut self, address: u64) {
        if self.large[(address >> 63) as usize] {
            // The page may be a gigabyte large.
            let region = address >> 30;
            for entry in self.entries.iter_mut() {
                let page = if entry.read == NONE {
                    entry.write
                } else {
                    entry.read
                };
                if page >> 30 == region {
                    *entry = Entry::empty();
                }
            }
            return;
        }
        for half in [0, ENTRIES] {
            self.entries[half + index(address)] = Entry::empty();
        }
    }

    /// Drops write access to the page at `host`.
    pub(crate) fn withhold_writes_to(&mut self, host: NonNull<u8>) {
        let host = host.as_ptr().expose_provenance();
        for entry in self.entries.iter_mut() {
            if entry.write != NONE && entry.addend.wrapping_add(entry.write as usize) == host {
                entry.write = NONE;
            }
        }
    }

    /// Drops write access to all pages.
    pub(crate) fn withhold_writes(&mut self) {
        for entry in self.entries.iter_mut() {
            entry.write = NONE;
        }
    }
}

#[inline(always)]
fn index(address: u64) -> usize {
    (address >> 12) as usize % ENTRIES
}
