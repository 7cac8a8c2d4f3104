//! What the software CPU must know of guest memory.

use std::fmt::Debug;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

/// A page of RAM as the software CPU touches it.
#[derive(Debug, Clone, Copy)]
pub struct RamPage {
    /// The page's 4096 bytes in this process. Other vCPUs and devices write them at any time.
    pub host: NonNull<u8>,
    /// The page's mark in the dirty log: after each store to the page, store what
    /// names the writer, or 1, with release order.
    pub mark: NonNull<AtomicU8>,
}

/// Guest physical memory, asked once for each entry that the software TLB takes.
pub trait PhysicalMemory: Debug + Send + Sync {
    /// The RAM page with guest physical page number `frame`; `None` where accesses are MMIO.
    /// The pointers stay valid for as long as `self` lives.
    fn ram_page(&self, frame: u64) -> Option<RamPage>;
}
