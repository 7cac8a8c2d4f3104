//! The software TLB: direct-mapped, one half for the supervisor, one for user mode.

use std::num::NonZeroU8;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use super::PAGE_OFFSET;
use crate::memory::RamPage;

const ENTRIES: usize = 2048;
/// Which bits of an address say where it is in the TLB: those of the page, and one that tells kernels'
/// map of all memory from their code and stacks.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(dead_code, reason = "for the translator")
)]
pub(crate) const TLB_BITS: u64 = (PAGES as u64 - 1) << 12 | 1 << REGION;
const PAGES: usize = ENTRIES / 2;
const REGION: u32 = 46;

/// The tag of an entry at `at` that serves nothing: that of a page whose addresses are looked up
/// elsewhere.
const fn nothing(at: usize) -> u64 {
    (((at % PAGES) ^ (PAGES / 2)) as u64)
        .wrapping_mul(PAGE_OFFSET + 1)
        .wrapping_neg()
}

/// Whose accesses an entry serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Privilege {
    Supervisor = 0,
    User = 1,
}

/// A page of RAM at a linear address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    /// The page's address, negated, for reading and for writing: an address and this make the offset
    /// in the page, or something larger.
    read: u64,
    write: u64,
    /// Host address less linear address.
    addend: usize,
    mark: NonNull<AtomicU8>,
}

impl Entry {
    #[cfg(target_arch = "x86_64")]
    const fn empty(at: usize) -> Self {
        Self {
            read: nothing(at),
            write: nothing(at),
            addend: 0,
            mark: NonNull::dangling(),
        }
    }

    /// May `bytes` at `address` be read through this entry? Not when they cross its page.
    #[inline(always)]
    pub(crate) fn reads(&self, address: u64, bytes: u64) -> bool {
        self.read.wrapping_add(address).wrapping_add(bytes - 1) <= PAGE_OFFSET
    }

    /// May they be written?
    #[inline(always)]
    pub(crate) fn writes(&self, address: u64, bytes: u64) -> bool {
        self.write.wrapping_add(address).wrapping_add(bytes - 1) <= PAGE_OFFSET
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

/// The fields of all entries, each in a row of its own: those of the supervisor, and those of user mode.
/// Translated code reaches them by their distance from the processor's state.
#[derive(Debug)]
pub(crate) struct Entries {
    read: [u64; 2 * ENTRIES],
    write: [u64; 2 * ENTRIES],
    addend: [usize; 2 * ENTRIES],
    mark: [NonNull<AtomicU8>; 2 * ENTRIES],
}

impl Entries {
    #[cfg(target_arch = "x86_64")]
    pub(crate) const READ: usize = std::mem::offset_of!(Self, read);
    #[cfg(target_arch = "x86_64")]
    pub(crate) const WRITE: usize = std::mem::offset_of!(Self, write);
    #[cfg(target_arch = "x86_64")]
    pub(crate) const ADDEND: usize = std::mem::offset_of!(Self, addend);
    #[cfg(target_arch = "x86_64")]
    pub(crate) const MARK: usize = std::mem::offset_of!(Self, mark);
    /// An item of each row has two to the power of this bytes.
    #[cfg(target_arch = "x86_64")]
    pub(crate) const SHIFT: u8 = 3;

    fn new() -> Self {
        Self {
            read: std::array::from_fn(nothing),
            write: std::array::from_fn(nothing),
            addend: [0; 2 * ENTRIES],
            mark: [NonNull::dangling(); 2 * ENTRIES],
        }
    }

    /// The entry at `at`, which is below the number of all.
    #[inline(always)]
    fn get(&self, at: usize) -> Entry {
        debug_assert!(at < 2 * ENTRIES);
        // SAFETY: all rows are as long as there are entries.
        #[expect(unsafe_code, reason = "the innermost look-up of every memory access")]
        unsafe {
            Entry {
                read: *self.read.get_unchecked(at),
                write: *self.write.get_unchecked(at),
                addend: *self.addend.get_unchecked(at),
                mark: *self.mark.get_unchecked(at),
            }
        }
    }

    fn set(&mut self, at: usize, entry: Entry) {
        self.read[at] = entry.read;
        self.write[at] = entry.write;
        self.addend[at] = entry.addend;
        self.mark[at] = entry.mark;
    }

    fn clear(&mut self, at: usize) {
        self.read[at] = nothing(at);
        self.write[at] = nothing(at);
    }
}

#[derive(Debug)]
pub(crate) struct Tlb {
    pub(crate) entries: Entries,
    /// Where those are that serve now.
    base: usize,
    /// The same, to be used while stores are only tried: none of these serves writes.
    tried: Vec<Entry>,
    trying: bool,
    /// Something was dropped since stores were last tried.
    stale: bool,
    /// Entries of non-global pages, which a load of CR3 drops.
    local: Vec<u16>,
    is_local: Box<[bool; 2 * ENTRIES]>,
    /// There may be entries of large pages in the lower and in the upper half.
    large: [bool; 2],
}

impl Tlb {
    pub(crate) fn new() -> Self {
        Self {
            entries: Entries::new(),
            base: 0,
            tried: Vec::new(),
            trying: false,
            stale: false,
            local: Vec::with_capacity(2 * ENTRIES),
            is_local: Box::new([false; 2 * ENTRIES]),
            large: [false; 2],
        }
    }

    /// From the TLB's beginning to the entries of a privilege.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn distance(privilege: Privilege) -> usize {
        std::mem::offset_of!(Self, entries) + ((privilege as usize * ENTRIES) << Entries::SHIFT)
    }

    pub(crate) fn set_privilege(&mut self, privilege: Privilege) {
        self.base = privilege as usize * ENTRIES;
    }

    /// From here on stores are only tried, or no longer.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn set_trying(&mut self, trying: bool) {
        if trying && (std::mem::take(&mut self.stale) || self.tried.is_empty()) {
            self.tried.clear();
            self.tried.extend((0..2 * ENTRIES).map(Entry::empty));
        }
        self.trying = trying;
    }

    /// The entry that may serve `address` for the current privilege.
    #[inline(always)]
    pub(crate) fn entry(&self, address: u64) -> Entry {
        let at = self.base + index(address);
        if self.trying {
            return self.tried[at];
        }
        self.entries.get(at)
    }

    /// The entry for another privilege than the current one.
    #[inline(always)]
    pub(crate) fn entry_of(&self, privilege: Privilege, address: u64) -> Entry {
        let at = privilege as usize * ENTRIES + index(address);
        if self.trying {
            return self.tried[at];
        }
        self.entries.get(at)
    }

    pub(crate) fn fill(&mut self, privilege: Privilege, fill: &Fill) {
        let page = fill.address & !PAGE_OFFSET;
        let at = privilege as usize * ENTRIES + index(page);
        let entry = Entry {
            read: if fill.readable {
                page.wrapping_neg()
            } else {
                nothing(at)
            },
            write: if fill.writable {
                page.wrapping_neg()
            } else {
                nothing(at)
            },
            addend: fill
                .ram
                .host
                .as_ptr()
                .expose_provenance()
                .wrapping_sub(page as usize),
            mark: fill.ram.mark,
        };
        if self.trying {
            self.tried[at] = entry;
            return;
        }
        self.entries.set(at, entry);
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
        self.stale = true;
        for at in self.local.drain(..) {
            self.entries.clear(at.into());
            self.is_local[usize::from(at)] = false;
        }
    }

    /// Drops all entries.
    pub(crate) fn flush(&mut self) {
        self.stale = true;
        self.local.clear();
        self.is_local.fill(false);
        (0..2 * ENTRIES).for_each(|at| self.entries.clear(at));
        self.large = [false; 2];
    }

    /// Drops what may be the translation of `address`.
    pub(crate) fn flush_page(&mut self, address: u64) {
        self.stale = true;
        if self.large[(address >> 63) as usize] {
            // The page may be a gigabyte large.
            let region = address >> 30;
            for at in 0..2 * ENTRIES {
                let entry = self.entries.get(at);
                let tag = if entry.read == nothing(at) {
                    entry.write
                } else {
                    entry.read
                };
                if tag.wrapping_neg() >> 30 == region {
                    self.entries.clear(at);
                }
            }
            return;
        }
        for half in [0, ENTRIES] {
            let at = half + index(address);
            self.entries.clear(at);
        }
    }

    /// Drops write access to the page at `host`.
    pub(crate) fn withhold_writes_to(&mut self, host: NonNull<u8>) {
        let host = host.as_ptr().expose_provenance();
        let rows = self.entries.write.iter_mut().zip(&self.entries.addend);
        for (at, (write, addend)) in rows.enumerate() {
            let page = write.wrapping_neg();
            if *write != nothing(at) && addend.wrapping_add(page as usize) == host {
                *write = nothing(at);
            }
        }
    }

    /// Drops write access to all pages.
    pub(crate) fn withhold_writes(&mut self) {
        for (at, write) in self.entries.write.iter_mut().enumerate() {
            *write = nothing(at);
        }
    }
}

#[inline(always)]
fn index(address: u64) -> usize {
    (address >> 12) as usize % PAGES + (address >> REGION & 1) as usize * PAGES
}
