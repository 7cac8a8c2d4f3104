//! Memory as the processor sees it: paging, the software TLB, accesses.
//!
//! # How decoded code stays true
//!
//! A page that holds decoded code never has a write entry in the TLB of any processor, so that
//! every store to it takes the slow path, where the code it hits is dropped. When a page comes to
//! hold code, the processor that decodes drops its own write entries; the others drop all of theirs
//! at their next look at the [`CodeMap`], at block borders. Stores by other processors are seen by
//! their count in the map at serialising moments (interrupts, IRET, CR writes, CPUID, INVLPG);
//! stores by devices when the page is entered for execution (its code is compared with what was
//! decoded), which every mapping of a freshly read page leads through. A store that hits decoded
//! code drops that of its whole page, and the page may be written quickly again.

mod access;
mod code_map;
mod tlb;
mod walk;

pub use code_map::CodeMap;
#[cfg(target_arch = "x86_64")]
pub(crate) use tlb::{Entries as TlbEntries, TLB_BITS};
pub(crate) use tlb::{Privilege, Tlb};
pub(crate) use walk::Access;

/// Bytes of a page, less one.
pub(crate) const PAGE_OFFSET: u64 = 0xfff;

/// Is the address canonical with 48 bits?
#[inline(always)]
pub(crate) fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}
