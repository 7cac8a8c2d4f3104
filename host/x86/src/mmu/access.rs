//! Loads, stores and read-modify-writes: the quick way through the TLB, and the slow one.

use std::sync::atomic::Ordering;

use super::tlb::{Fill, Privilege};
use super::walk::{Access, Translation};
use super::{PAGE_OFFSET, is_canonical};
use crate::cpu::Cpu;
use crate::exec::op::slot;
use crate::exec::value::Value;
use crate::exec::{Exception, Result};
use crate::host::{HostValue, compare_exchange_16};
use crate::memory::RamPage;
use crate::profile::Doing;

#[expect(unsafe_code, reason = "guest memory is reached by pointer")]
impl Cpu {
    /// Loads from a linear address.
    #[inline(always)]
    pub(crate) fn load<T: Value>(&mut self, address: u64, seg: u8) -> Result<T> {
        let entry = self.tlb.entry(address);
        if entry.reads(address, T::BYTES) {
            // SAFETY: the entry serves all bytes, which lie in one page of RAM.
            return Ok(unsafe { T::load(entry.host(address)) });
        }
        let value = self.load_slow(address, T::BYTES, seg, self.privilege())?;
        Ok(T::from_u64(value))
    }

    /// Stores to a linear address.
    #[inline(always)]
    pub(crate) fn store<T: Value>(&mut self, address: u64, seg: u8, value: T) -> Result {
        let entry = self.tlb.entry(address);
        if entry.writes(address, T::BYTES) {
            // SAFETY: the entry serves all bytes, which lie in one page of RAM.
            unsafe { T::store(entry.host(address), value) };
            entry.mark(self.mark);
            return Ok(());
        }
        self.store_slow(
            address,
            T::BYTES,
            seg,
            value.zero_extend(),
            self.privilege(),
        )
    }

    /// Replaces what is at a linear address; `change` returns the new value and a result.
    #[inline(always)]
    pub(crate) fn modify<T: Value, R>(
        &mut self,
        address: u64,
        seg: u8,
        change: impl Fn(T) -> (T, R),
    ) -> Result<R> {
        let entry = self.tlb.entry(address);
        if entry.writes(address, T::BYTES) {
            // SAFETY: the entry serves all bytes, which lie in one page of RAM. What may be
            // written may be read.
            let (new, result) = change(unsafe { T::load(entry.host(address)) });
            // SAFETY: as above.
            unsafe { T::store(entry.host(address), new) };
            entry.mark(self.mark);
            return Ok(result);
        }
        let old = self.prepare_modify(address, T::BYTES, seg)?;
        let (new, result) = change(T::from_u64(old));
        self.store_slow(address, T::BYTES, seg, new.zero_extend(), self.privilege())?;
        Ok(result)
    }

    /// The same as one access that no other processor can come between.
    #[inline]
    pub(crate) fn modify_locked<T: Value, R>(
        &mut self,
        address: u64,
        seg: u8,
        change: impl Fn(T) -> (T, R),
    ) -> Result<R> {
        let mut entry = self.tlb.entry(address);
        if !entry.writes(address, T::BYTES) {
            // Enters the page for writing if it is plain RAM.
            let old = self.prepare_modify(address, T::BYTES, seg)?;
            entry = self.tlb.entry(address);
            if !entry.writes(address, T::BYTES) {
                // A device, code, or two pages: the halves cannot be locked together.
                let (new, result) = change(T::from_u64(old));
                self.store_slow(address, T::BYTES, seg, new.zero_extend(), self.privilege())?;
                return Ok(result);
            }
        }
        let host = entry.host(address);
        // SAFETY: the entry serves all bytes, which lie in one page of RAM.
        let mut old = unsafe { T::load(host) };
        loop {
            let (new, result) = change(old);
            // SAFETY: as above.
            match unsafe { T::compare_exchange(host, old, new) } {
                Ok(()) => {
                    entry.mark(self.mark);
                    return Ok(result);
                }
                Err(found) => old = found,
            }
        }
    }

    /// CMPXCHG16B on an aligned address: the old value, and whether it was replaced.
    pub(crate) fn compare_exchange_16(
        &mut self,
        address: u64,
        seg: u8,
        (old, new): ((u64, u64), (u64, u64)),
    ) -> Result<std::result::Result<(), (u64, u64)>> {
        self.check_writable(address, 16, seg)?;
        let entry = self.tlb.entry(address);
        if entry.writes(address, 16) {
            // SAFETY: the entry serves all bytes; the caller has checked the alignment.
            let outcome = unsafe { compare_exchange_16(entry.host(address), old, new) };
            entry.mark(self.mark);
            return Ok(outcome);
        }
        let found = (
            self.load::<u64>(address, seg)?,
            self.load::<u64>(address.wrapping_add(8), seg)?,
        );
        let value = if found == old { new } else { found };
        self.store_pair(address, seg, value)?;
        Ok(if found == old { Ok(()) } else { Err(found) })
    }

    /// Stores 16 bytes.
    #[inline]
    pub(crate) fn store_pair(&mut self, address: u64, seg: u8, (low, high): (u64, u64)) -> Result {
        let entry = self.tlb.entry(address);
        if entry.writes(address, 16) {
            // SAFETY: the entry serves all bytes, which lie in one page of RAM.
            unsafe {
                u64::store(entry.host(address), low);
                u64::store(entry.host(address.wrapping_add(8)), high);
            }
            entry.mark(self.mark);
            return Ok(());
        }
        let bytes = (u128::from(low) | u128::from(high) << 64).to_le_bytes();
        self.write_bytes(address, seg, &bytes)
    }

    /// Loads any number of bytes.
    pub(crate) fn read_bytes(&mut self, address: u64, seg: u8, bytes: &mut [u8]) -> Result {
        // Its parts are not accesses of their own.
        let alignment = std::mem::take(&mut self.watch.alignment);
        let outcome = self.read_parts(address, seg, bytes);
        self.watch.alignment = alignment;
        outcome
    }

    fn read_parts(&mut self, address: u64, seg: u8, bytes: &mut [u8]) -> Result {
        let mut at = address;
        for chunk in bytes.chunks_mut(8) {
            if let Ok(whole) = <&mut [u8; 8]>::try_from(&mut *chunk) {
                *whole = self.load::<u64>(at, seg)?.to_le_bytes();
            } else {
                for (index, byte) in chunk.iter_mut().enumerate() {
                    *byte = self.load::<u8>(at.wrapping_add(index as u64), seg)?;
                }
            }
            at = at.wrapping_add(8);
        }
        Ok(())
    }

    /// Stores any number of bytes; all pages are checked before any is written.
    pub(crate) fn write_bytes(&mut self, address: u64, seg: u8, bytes: &[u8]) -> Result {
        let alignment = std::mem::take(&mut self.watch.alignment);
        let outcome = self.write_parts(address, seg, bytes);
        self.watch.alignment = alignment;
        outcome
    }

    fn write_parts(&mut self, address: u64, seg: u8, bytes: &[u8]) -> Result {
        self.check_writable(address, bytes.len() as u64, seg)?;
        let mut at = address;
        for chunk in bytes.chunks(8) {
            if let Ok(whole) = <[u8; 8]>::try_from(chunk) {
                self.store(at, seg, u64::from_le_bytes(whole))?;
            } else {
                for (index, byte) in chunk.iter().enumerate() {
                    self.store(at.wrapping_add(index as u64), seg, *byte)?;
                }
            }
            at = at.wrapping_add(8);
        }
        Ok(())
    }

    /// Raises the fault that a store of `bytes` would raise, and changes nothing else.
    pub(crate) fn check_writable(&mut self, address: u64, bytes: u64, seg: u8) -> Result {
        if bytes == 0 || self.tlb.entry(address).writes(address, bytes) {
            return Ok(());
        }
        let last = address.wrapping_add(bytes - 1);
        self.check_canonical(address, last, seg)?;
        let privilege = self.privilege();
        let mut page = address;
        loop {
            self.translate_filling(page, Access::Write, privilege)?;
            if (page ^ last) & !PAGE_OFFSET == 0 {
                return Ok(());
            }
            page = (page & !PAGE_OFFSET).wrapping_add(PAGE_OFFSET + 1);
        }
    }

    /// Loads on behalf of the processor itself: descriptors, task state, interrupt tables.
    pub(crate) fn load_system<T: Value>(&mut self, address: u64) -> Result<T> {
        let entry = self.tlb.entry_of(Privilege::Supervisor, address);
        if entry.reads(address, T::BYTES) {
            // SAFETY: the entry serves all bytes, which lie in one page of RAM.
            return Ok(unsafe { T::load(entry.host(address)) });
        }
        let value = self.load_linear(address, T::BYTES, slot::ZERO, Privilege::Supervisor)?;
        Ok(T::from_u64(value))
    }

    /// Stores on behalf of the processor itself.
    pub(crate) fn store_system<T: Value>(&mut self, address: u64, value: T) -> Result {
        self.store_linear(
            address,
            T::BYTES,
            slot::ZERO,
            value.zero_extend(),
            Privilege::Supervisor,
        )
    }

    /// The current privilege.
    #[inline(always)]
    pub(crate) fn privilege(&self) -> Privilege {
        if self.cpl == 3 {
            Privilege::User
        } else {
            Privilege::Supervisor
        }
    }

    fn check_canonical(&mut self, first: u64, last: u64, seg: u8) -> Result {
        if is_canonical(first) && is_canonical(last) {
            return Ok(());
        }
        Err(self.raise(if seg == slot::SS {
            Exception::StackFault(0)
        } else {
            Exception::GeneralProtection(0)
        }))
    }

    /// Translates and enters the page into the TLB, if it is RAM.
    pub(crate) fn translate_filling(
        &mut self,
        address: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<(Translation, Option<RamPage>)> {
        let before = self.begin(Doing::FillingTlb);
        let found = self.fill_tlb(address, access, privilege);
        self.go_back(before);
        found
    }

    fn fill_tlb(
        &mut self,
        address: u64,
        access: Access,
        privilege: Privilege,
    ) -> Result<(Translation, Option<RamPage>)> {
        let translation = self.translate(address, access, privilege)?;
        let frame = translation.physical >> 12;
        if Some(translation.physical & !PAGE_OFFSET) == self.apic_page {
            return Ok((translation, None));
        }
        let ram = self.memory.ram_page(frame);
        if let Some(ram) = ram.filter(|_| !self.watch.accesses) {
            let writable =
                translation.writable && !self.config.code.holds_code(frame) && !self.is_trying();
            self.counters.tlb_fills += 1;
            self.tlb.fill(
                privilege,
                &Fill {
                    address,
                    ram,
                    readable: true,
                    writable,
                    global: translation.global,
                    large: translation.large,
                },
            );
        }
        Ok((translation, ram))
    }

    #[cold]
    #[inline(never)]
    fn load_slow(
        &mut self,
        address: u64,
        bytes: u64,
        seg: u8,
        privilege: Privilege,
    ) -> Result<u64> {
        if self.watch.accesses {
            self.look_at_access(address, bytes, false)?;
        }
        self.load_linear(address, bytes, seg, privilege)
    }

    fn load_linear(
        &mut self,
        address: u64,
        bytes: u64,
        seg: u8,
        privilege: Privilege,
    ) -> Result<u64> {
        let last = address.wrapping_add(bytes - 1);
        self.check_canonical(address, last, seg)?;
        let first = self.translate_filling(address, Access::Read, privilege)?;
        let in_first = (PAGE_OFFSET + 1 - (address & PAGE_OFFSET)).min(bytes);
        if in_first == bytes {
            return self.load_physical(first, bytes);
        }
        let second = self.translate_filling(last & !PAGE_OFFSET, Access::Read, privilege)?;
        let low = self.load_physical(first, in_first)?;
        let high = self.load_physical(second, bytes - in_first)?;
        Ok(low | high << (8 * in_first))
    }

    #[cold]
    #[inline(never)]
    #[expect(clippy::too_many_arguments, reason = "what a store is, in registers")]
    fn store_slow(
        &mut self,
        address: u64,
        bytes: u64,
        seg: u8,
        value: u64,
        privilege: Privilege,
    ) -> Result {
        if self.watch.accesses {
            self.look_at_access(address, bytes, true)?;
        }
        self.store_linear(address, bytes, seg, value, privilege)
    }

    #[expect(clippy::too_many_arguments, reason = "what a store is, in registers")]
    fn store_linear(
        &mut self,
        address: u64,
        bytes: u64,
        seg: u8,
        value: u64,
        privilege: Privilege,
    ) -> Result {
        let last = address.wrapping_add(bytes - 1);
        self.check_canonical(address, last, seg)?;
        let first = self.translate_filling(address, Access::Write, privilege)?;
        let in_first = (PAGE_OFFSET + 1 - (address & PAGE_OFFSET)).min(bytes);
        if in_first == bytes {
            return self.store_physical(first, bytes, value);
        }
        let second = self.translate_filling(last & !PAGE_OFFSET, Access::Write, privilege)?;
        self.before_store(second, bytes - in_first)?;
        self.store_physical(first, in_first, value)?;
        self.store_physical(second, bytes - in_first, value >> (8 * in_first))
    }

    /// Loads what is to be replaced, after all checks that the store will make.
    #[cold]
    #[inline(never)]
    fn prepare_modify(&mut self, address: u64, bytes: u64, seg: u8) -> Result<u64> {
        if self.watch.accesses {
            self.look_at_access(address, bytes, true)?;
        }
        self.check_writable(address, bytes, seg)?;
        self.load_slow(address, bytes, seg, self.privilege())
    }

    fn load_physical(
        &mut self,
        (translation, ram): (Translation, Option<RamPage>),
        bytes: u64,
    ) -> Result<u64> {
        let Some(ram) = ram else {
            return self.device_read(translation.physical, bytes as u8);
        };
        let offset = (translation.physical & PAGE_OFFSET) as usize;
        // SAFETY: the bytes lie in the page, which `ram_page` vouches for.
        unsafe {
            let at = ram.host.as_ptr().add(offset);
            Ok(match bytes {
                1 => u8::load(at).into(),
                2 => u16::load(at).into(),
                4 => u32::load(at).into(),
                8 => u64::load(at),
                _ => (0..bytes as usize)
                    .map(|index| u64::from(u8::load(at.add(index))) << (8 * index))
                    .sum(),
            })
        }
    }

    /// Drops the code that a store will hit; ends the instruction if it is in the midst of it.
    fn before_store(
        &mut self,
        (translation, ram): (Translation, Option<RamPage>),
        bytes: u64,
    ) -> Result {
        if ram.is_some() && self.config.code.holds_code(translation.physical >> 12) {
            self.drop_code(translation.physical, bytes)?;
        }
        Ok(())
    }

    /// What a store replaces, where it is only tried.
    #[cfg(target_arch = "x86_64")]
    fn note_replaced(&mut self, ram: RamPage, offset: u64, bytes: u64) {
        let Some(journal) = &mut self.journal else {
            return;
        };
        for index in offset..offset + bytes {
            let at = ram.host.as_ptr().wrapping_add(index as usize);
            // SAFETY: the bytes lie in the page, which `ram_page` vouches for.
            let byte = unsafe { u8::load(at) };
            journal.push(crate::native::Replaced {
                at,
                byte,
                stored: byte,
                mark: ram.mark,
            });
        }
    }

    fn store_physical(
        &mut self,
        (translation, ram): (Translation, Option<RamPage>),
        bytes: u64,
        value: u64,
    ) -> Result {
        let Some(ram) = ram else {
            return self.device_write(translation.physical, bytes as u8, value);
        };
        self.before_store((translation, Some(ram)), bytes)?;
        #[cfg(target_arch = "x86_64")]
        self.note_replaced(ram, translation.physical & PAGE_OFFSET, bytes);
        let offset = (translation.physical & PAGE_OFFSET) as usize;
        // SAFETY: the bytes lie in the page, which `ram_page` vouches for; so does the mark.
        unsafe {
            let at = ram.host.as_ptr().add(offset);
            match bytes {
                1 => u8::store(at, value as u8),
                2 => u16::store(at, value as u16),
                4 => u32::store(at, value as u32),
                8 => u64::store(at, value),
                _ => {
                    for index in 0..bytes as usize {
                        u8::store(at.add(index), (value >> (8 * index)) as u8);
                    }
                }
            }
            ram.mark.as_ref().store(self.mark.get(), Ordering::Release);
        }
        let frame = translation.physical >> 12;
        if self.config.code.holds_code(frame) {
            let count = self.config.code.stored(frame);
            self.blocks.stored(frame, count);
        }
        Ok(())
    }
}
