//! Page walks: 32-bit, PAE and four-level paging (SDM vol. 3, chapter 4).

use std::sync::atomic::Ordering;

use super::tlb::Privilege;
use crate::cpu::Cpu;
use crate::cpu::control::{CR0_PG, CR0_WP, CR4_PAE, CR4_PGE, CR4_PSE, EFER_LMA, EFER_NXE};
use crate::cpuid::PHYSICAL_BITS;
use crate::exec::{Exception, Result};
use crate::host::HostValue;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;

/// Bits 12 and up of a physical address.
const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xfff;
/// Address bits that this processor does not have.
const RESERVED: u64 = ((1 << 52) - 1) & !((1 << PHYSICAL_BITS) - 1);
/// Bits that 64-bit paging leaves to software and PAE paging reserves.
const RESERVED_PAE: u64 = ((1 << 63) - 1) & !((1 << 52) - 1);
/// What 4 MiB pages reserve without PSE-36, which no baseline offers.
const RESERVED_4M: u64 = 0x3f_e000;

/// What an access wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}

/// A translation, with what else may be done through it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Translation {
    pub(crate) physical: u64,
    pub(crate) writable: bool,
    pub(crate) global: bool,
    pub(crate) large: bool,
}

/// How a mode of paging reads its tables.
struct Format {
    /// Bytes of an entry: 4 or 8.
    entry: u64,
    /// Lowest address bit that each level indexes, from the root.
    levels: &'static [u32],
    index_bits: u32,
}

const FOUR_LEVELS: Format = Format {
    entry: 8,
    levels: &[39, 30, 21, 12],
    index_bits: 9,
};
const PAE: Format = Format {
    entry: 8,
    levels: &[21, 12],
    index_bits: 9,
};
const TWO_LEVELS: Format = Format {
    entry: 4,
    levels: &[22, 12],
    index_bits: 10,
};

impl Cpu {
    /// Translates a linear address, or ends the instruction with a page fault.
    pub(crate) fn translate(
        &mut self,
        address: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<Translation> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(Translation {
                physical: address & 0xffff_ffff,
                writable: true,
                global: false,
                large: false,
            });
        }
        match self.walk(address, access, privilege) {
            Ok(translation) => Ok(translation),
            Err(cause) => {
                let mut code = cause;
                code |= match access {
                    Access::Read => 0,
                    Access::Write => 1 << 1,
                    Access::Execute
                        if self.msrs.efer & EFER_NXE != 0 && self.cr4 & CR4_PAE != 0 =>
                    {
                        1 << 4
                    }
                    Access::Execute => 0,
                };
                if privilege == Privilege::User {
                    code |= 1 << 2;
                }
                Err(self.raise(Exception::PageFault(address, code)))
            }
        }
    }

    /// The walk; `Err` holds the present and reserved bits of the error code.
    fn walk(
        &mut self,
        address: u64,
        access: Access,
        privilege: Privilege,
    ) -> std::result::Result<Translation, u32> {
        const NOT_PRESENT: u32 = 0;
        const PROTECTION: u32 = 1;
        const RESERVED_BIT: u32 = 1 | 1 << 3;

        let long = self.msrs.efer & EFER_LMA != 0;
        let pae = self.cr4 & CR4_PAE != 0;
        let (format, mut table) = if long {
            (&FOUR_LEVELS, self.cr3 & ADDRESS)
        } else if pae {
            let pointer = self.pdpte[(address >> 30 & 3) as usize];
            if pointer & PRESENT == 0 {
                return Err(NOT_PRESENT);
            }
            (&PAE, pointer & ADDRESS)
        } else {
            (&TWO_LEVELS, self.cr3 & 0xffff_f000)
        };
        let mut rights = WRITABLE | USER;
        let mut no_execute = false;
        let mut reserved = RESERVED;
        if self.msrs.efer & EFER_NXE == 0 {
            reserved |= NO_EXECUTE;
        }
        if !long {
            reserved |= RESERVED_PAE;
        }
        for (level, &shift) in format.levels.iter().enumerate() {
            let index = address >> shift & ((1 << format.index_bits) - 1);
            let at = table + index * format.entry;
            let entry = self.read_entry(at, format.entry).ok_or(NOT_PRESENT)?;
            if entry & PRESENT == 0 {
                return Err(NOT_PRESENT);
            }
            if format.entry == 8 && entry & reserved != 0 {
                return Err(RESERVED_BIT);
            }
            rights &= entry;
            no_execute |= format.entry == 8 && entry & NO_EXECUTE != 0;
            let last = shift == 12;
            let large_allowed = match format.entry {
                // Pages of 1 GiB are offered by no baseline.
                8 => shift == 21,
                _ => self.cr4 & CR4_PSE != 0,
            };
            let large = !last && entry & LARGE != 0 && (large_allowed || format.entry == 8);
            if large && !large_allowed {
                return Err(RESERVED_BIT);
            }
            if !last && !large {
                self.set_bits(at, entry, ACCESSED, format.entry);
                table = entry
                    & if format.entry == 8 {
                        ADDRESS
                    } else {
                        0xffff_f000
                    };
                continue;
            }
            if level + 1 == format.levels.len() && !last {
                return Err(NOT_PRESENT);
            }
            let mask = (1u64 << shift) - 1;
            let mut frame = entry & ADDRESS & !mask;
            if format.entry == 8 && large && entry & ADDRESS & mask & !0x1fff != 0 {
                return Err(RESERVED_BIT);
            }
            if format.entry == 4 {
                if large && entry & RESERVED_4M != 0 {
                    return Err(RESERVED_BIT);
                }
                frame = entry & 0xffff_ffff & !mask;
            }
            let user = rights & USER != 0;
            let writable = rights & WRITABLE != 0
                || privilege == Privilege::Supervisor && self.cr0 & CR0_WP == 0;
            let allowed = (privilege == Privilege::Supervisor || user)
                && match access {
                    Access::Read => true,
                    Access::Write => writable,
                    Access::Execute => !no_execute,
                };
            if !allowed {
                return Err(PROTECTION);
            }
            let mut wanted = ACCESSED;
            if access == Access::Write {
                wanted |= DIRTY;
            }
            self.set_bits(at, entry, wanted, format.entry);
            return Ok(Translation {
                physical: frame | address & mask,
                writable: writable && (entry | wanted) & DIRTY != 0,
                global: self.cr4 & CR4_PGE != 0 && entry & GLOBAL != 0,
                large,
            });
        }
        Err(NOT_PRESENT)
    }

    /// A paging-structure entry; `None` outside of RAM.
    #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
    fn read_entry(&self, at: u64, bytes: u64) -> Option<u64> {
        let page = self.memory.ram_page(at >> 12)?;
        // SAFETY: an aligned entry lies within the page that `ram_page` vouches for.
        unsafe {
            let at = page.host.as_ptr().add((at & 0xfff) as usize);
            Some(if bytes == 8 {
                u64::load(at)
            } else {
                u64::from(u32::load(at))
            })
        }
    }

    /// Sets accessed and dirty bits, unless the entry has changed since it was read: the next
    /// walk, if there is one, does it again.
    #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
    fn set_bits(&self, at: u64, entry: u64, bits: u64, bytes: u64) {
        if entry & bits == bits {
            return;
        }
        let Some(page) = self.memory.ram_page(at >> 12) else {
            return;
        };
        // SAFETY: as in `read_entry`; the mark belongs to the page.
        unsafe {
            let host = page.host.as_ptr().add((at & 0xfff) as usize);
            let _changed = if bytes == 8 {
                u64::compare_exchange(host, entry, entry | bits).is_err()
            } else {
                u32::compare_exchange(host, entry as u32, (entry | bits) as u32).is_err()
            };
            page.mark.as_ref().store(self.mark.get(), Ordering::Release);
        }
    }

    /// Loads the four page-directory pointers of PAE paging; false when one is malformed.
    pub(crate) fn load_pdptes(&mut self, cr3: u64) -> bool {
        let mut pointers = [0; 4];
        for (index, pointer) in pointers.iter_mut().enumerate() {
            let at = (cr3 & 0xffff_ffe0) + index as u64 * 8;
            *pointer = self.read_entry(at, 8).unwrap_or(0);
            if *pointer & PRESENT != 0
                && *pointer & (RESERVED | RESERVED_PAE | NO_EXECUTE | 0x1e6) != 0
            {
                return false;
            }
        }
        self.pdpte = pointers;
        true
    }
}
