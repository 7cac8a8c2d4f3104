//! Guest RAM as the software CPU touches it.

use std::ptr::NonNull;

use dunlin_guest::{Memory, PAGE_SIZE};
use dunlin_x86::memory::{PhysicalMemory, RamPage};

/// Keeps the mapping and its dirty log alive for as long as a processor may hold pointers.
#[derive(Debug)]
pub(super) struct GuestRam(pub(super) Memory);

impl PhysicalMemory for GuestRam {
    fn ram_page(&self, frame: u64) -> Option<RamPage> {
        let page = self.0.page_of(frame.checked_mul(PAGE_SIZE)?)?;
        let mark = self.0.dirty_log().marks().get(page.0 as usize)?;
        Some(RamPage {
            host: self.0.host_page(page)?,
            mark: NonNull::from(mark),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_ram_comes_with_its_own_mark() {
        let memory = Memory::new(1 << 20).unwrap();
        let ram = GuestRam(memory.clone());
        let page = ram.ram_page(5).unwrap();
        assert_eq!(
            Some(page.host),
            memory.host_page(memory.page_of(5 * 4096).unwrap())
        );
        assert_eq!(page.mark, NonNull::from(&memory.dirty_log().marks()[5]));
        assert!(ram.ram_page(256).is_none());
        assert!(ram.ram_page(u64::MAX).is_none());
    }
}
