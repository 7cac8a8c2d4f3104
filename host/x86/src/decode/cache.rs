//! Decoded blocks by physical page, and the ways to find one.

use std::cell::Cell;
use std::collections::HashMap;

use super::block::{Block, CodePage, Hasher};
use super::{Mode, lower};
use crate::cpu::{AbortReason, Cpu};
use crate::exec::op::slot;
use crate::exec::{Abort, Result};
use crate::memory::RamPage;
use crate::mmu::{Access, PAGE_OFFSET, Privilege, is_canonical};
#[cfg(target_arch = "x86_64")]
use crate::native::{JUMPS as JUMPS_TRANSLATED, KnownJump};
use crate::profile::Doing;

const JUMPS: usize = 1 << 15;
/// Generations of a context that translated code tells apart.
const GENERATIONS: u64 = 1 << 14;
const FETCHES: usize = 256;
/// Operations beyond which all code is dropped, so that a guest cannot fill the host's memory by
/// executing all of its own. A kernel's boot decodes half a million.
const MOST_OPERATIONS: usize = 4_000_000;
/// Operations of dropped blocks beyond which all translated code is forgotten.
#[cfg(target_arch = "x86_64")]
const MOST_BURIED: usize = 500_000;
/// What a page costs, in operations.
const PAGE_COST: usize = 200;
/// Longest instruction.
const MAX_BYTES: usize = 15;

/// A block by its linear address, valid in one context.
#[derive(Debug, Clone, Copy)]
struct Jump {
    linear: u64,
    context: u64,
    block: *const Block,
}

/// A page that may be executed from.
#[derive(Debug, Clone, Copy)]
struct Fetch {
    /// Linear page, or 1.
    page: u64,
    frame: u64,
    code: *mut CodePage,
    global: bool,
    large: bool,
}

const NO_FETCH: Fetch = Fetch {
    page: 1,
    frame: 0,
    code: std::ptr::null_mut(),
    global: false,
    large: false,
};

/// All decoded code of a processor.
#[derive(Debug)]
pub(crate) struct BlockCache {
    pages: HashMap<u64, Box<CodePage>, Hasher>,
    jumps: Box<[Jump]>,
    fetches: Box<[[Fetch; FETCHES]; 2]>,
    /// Contexts of the lower and the upper half of the linear addresses: a generation, and the
    /// privilege and mode.
    context: [u64; 2],
    generation: [u64; 2],
    /// The same as translated code adds it to an address: in the bits that every canonical address
    /// of a half has alike.
    pub(crate) keys: [u64; 2],
    /// Translated code by linear address.
    #[cfg(target_arch = "x86_64")]
    translated: Box<[KnownJump]>,
    /// Where that is, for translated code.
    #[cfg(target_arch = "x86_64")]
    pub(crate) translated_at: *const KnownJump,
    /// Entries of `fetches` were replaced by others, so that jumps may lead where none does.
    evicted: [bool; 2],
    /// Code in the upper half whose translation is not global.
    local_upper: bool,
    /// Operations decoded since all code was last dropped, pages included.
    size: usize,
    /// Blocks that were dropped while one of them may have been running.
    #[expect(clippy::vec_box, reason = "links and jumps point to them")]
    dropped: Vec<Box<Block>>,
    /// Those of them that were translated, by themselves or with others: what was made of them refers to
    /// them until all of it is forgotten.
    #[expect(clippy::vec_box, reason = "translated code points to them")]
    buried: Vec<Box<Block>>,
    /// Operations of the buried.
    buried_size: usize,
    /// Pages decoded lately, which another processor may still be storing to unseen.
    young: Vec<(u64, u8)>,
    /// `CodeMap::stores` when all code was last known to be true.
    stores: u32,
    /// The single instruction that is run by itself.
    single: Option<Box<Block>>,
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        #[cfg(target_arch = "x86_64")]
        let translated = vec![KnownJump::NONE; JUMPS_TRANSLATED].into_boxed_slice();
        Self {
            pages: HashMap::default(),
            jumps: vec![
                Jump {
                    linear: 0,
                    context: 0,
                    block: std::ptr::null(),
                };
                JUMPS
            ]
            .into_boxed_slice(),
            fetches: Box::new([[NO_FETCH; FETCHES]; 2]),
            context: [0; 2],
            generation: [1; 2],
            keys: [0; 2],
            #[cfg(target_arch = "x86_64")]
            translated_at: translated.as_ptr(),
            #[cfg(target_arch = "x86_64")]
            translated,
            evicted: [false; 2],
            local_upper: false,
            size: 0,
            dropped: Vec::new(),
            buried: Vec::new(),
            buried_size: 0,
            young: Vec::new(),
            stores: 0,
            single: None,
        }
    }

    /// The mode or the privilege has changed.
    pub(crate) fn set_context(&mut self, mode: Mode, user: bool) {
        let low = (mode as u64) << 1 | u64::from(user);
        self.context = self.generation.map(|generation| generation << 4 | low);
        self.set_keys();
    }

    fn set_keys(&mut self) {
        for half in 0..2 {
            let generation = self.generation[half] & (GENERATIONS - 1);
            let user = self.context[half] & 1;
            self.keys[half] = (generation << 2 | user << 1 | half as u64) << 48;
        }
    }

    fn forget_jumps(&mut self, halves: [bool; 2]) {
        for (half, forget) in halves.into_iter().enumerate() {
            if forget {
                self.generation[half] += 1;
                self.context[half] += 1 << 4;
                self.evicted[half] = false;
                #[cfg(target_arch = "x86_64")]
                if self.generation[half].is_multiple_of(GENERATIONS) {
                    self.translated.fill(KnownJump::NONE);
                }
            }
        }
        self.set_keys();
    }

    /// All translations of addresses are void, or all but global ones.
    pub(crate) fn flush(&mut self, keep_global: bool) {
        for fetch in self.fetches.iter_mut().flatten() {
            if !(keep_global && fetch.global) {
                *fetch = NO_FETCH;
            }
        }
        // Where no translation is left that is not global, none is a jump's.
        let local_upper = std::mem::take(&mut self.local_upper);
        self.forget_jumps([true, !keep_global || local_upper]);
    }

    /// The translation of one address is void.
    pub(crate) fn flush_page(&mut self, address: u64) {
        let upper = address >> 63 != 0;
        let mut found = self.evicted[usize::from(upper)];
        for fetch in self.fetches.iter_mut().flatten() {
            let hit = fetch.page == address & !PAGE_OFFSET
                || fetch.large && fetch.page >> 30 == address >> 30;
            if hit {
                *fetch = NO_FETCH;
                found = true;
            }
        }
        self.forget_jumps([found && !upper, found && upper]);
    }

    /// The block at a linear address, if it was entered lately.
    #[inline(always)]
    pub(crate) fn jump(&self, linear: u64) -> Option<&'static Block> {
        let jump = &self.jumps[jump_index(linear)];
        let context = self.context[(linear >> 63) as usize];
        if jump.linear == linear && jump.context == context {
            // SAFETY: blocks live until `collect`, which the loop calls between blocks only, and
            // the context of every entry changes when a block is dropped.
            #[expect(unsafe_code, reason = "blocks are found by pointer")]
            return Some(unsafe { &*jump.block });
        }
        None
    }

    fn remember(&mut self, linear: u64, block: *const Block) {
        self.jumps[jump_index(linear)] = Jump {
            linear,
            context: self.context[(linear >> 63) as usize],
            block,
        };
    }

    /// The translation of the block at a linear address, for jumps of other translations.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn remember_translated(&mut self, linear: u64, code: *const u8) {
        let key = self.keys[(linear >> 63) as usize];
        self.translated[KnownJump::index(linear)] = KnownJump::new(linear, key, code);
    }

    /// Forgets all translations. None of them may be running.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn forget_translated(&mut self) {
        for block in self.pages.values().flat_map(|page| page.blocks.values()) {
            block.code.set(std::ptr::null());
            block.woven.set(false);
            block.runs.set(0);
        }
        self.translated.fill(KnownJump::NONE);
        self.buried.clear();
        self.buried_size = 0;
    }

    /// Is so much of what was translated dropped that it is time to forget all of it?
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_buried_many(&self) -> bool {
        self.buried_size > MOST_BURIED
    }

    /// Blocks with which translated code of other blocks goes on.
    #[cfg(all(test, target_arch = "x86_64"))]
    pub(crate) fn woven(&self) -> usize {
        let blocks = self.pages.values().flat_map(|page| page.blocks.values());
        blocks.filter(|block| block.woven.get()).count()
    }

    /// A block of the same page and privilege as another one, of 64-bit code.
    #[cfg(target_arch = "x86_64")]
    #[expect(unsafe_code, reason = "blocks are found by pointer")]
    pub(crate) fn block_behind(&self, block: &Block, offset: u16) -> Option<&'static Block> {
        let page = self.pages.get(&block.frame?)?;
        let found = page.blocks.get(&key(offset, block.user, Mode::Bits64))?;
        let found: *const Block = &raw const **found;
        // SAFETY: dropped blocks live until `collect`, between blocks, or with what they were woven into.
        let found = unsafe { &*found };
        (found.second.is_none() && u64::from(offset) <= PAGE_OFFSET).then_some(found)
    }

    /// The bytes of a block of 64-bit code, unless it was dropped.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn bytes_of(&self, block: &Block) -> Option<Vec<u8>> {
        let page = self.pages.get(&block.frame?)?;
        let key = key(block.start, block.user, Mode::Bits64);
        let known = page.blocks.get(&key)?;
        if !std::ptr::eq(&raw const **known, block) {
            return None;
        }
        let bytes = page.copy[block.start.into()..].iter();
        let bytes = bytes.copied().take(block.bytes.into());
        let Some(second) = block.second else {
            return Some(bytes.collect());
        };
        let rest = self.pages.get(&second)?.copy.iter().copied();
        Some(bytes.chain(rest).take(block.bytes.into()).collect())
    }

    /// Frees what was dropped. No block may be running.
    pub(crate) fn collect(&mut self) {
        self.dropped.clear();
    }

    /// This processor has stored to a page that holds code; `count` is the page's counter since.
    pub(crate) fn stored(&mut self, frame: u64, count: u64) {
        if let Some(page) = self.pages.get_mut(&frame)
            && page.count.wrapping_add(1) == count
        {
            page.count = count;
        }
        self.stores = self.stores.wrapping_add(1);
    }

    /// Drops the code of a page, which stays known.
    fn clear_page(&mut self, frame: u64) {
        if let Some(page) = self.pages.get_mut(&frame) {
            page.lines = 0;
            let mut dropped: Vec<_> = page.blocks.drain().map(|(_, block)| block).collect();
            for (first, key) in std::mem::take(&mut page.entered) {
                let blocks = self.pages.get_mut(&first).map(|page| &mut page.blocks);
                if let Some(blocks) = blocks
                    && blocks.get(&key).and_then(|block| block.second) == Some(frame)
                {
                    dropped.extend(blocks.remove(&key));
                }
            }
            for block in dropped {
                self.bury(block);
            }
            self.forget_jumps([true; 2]);
        }
    }

    /// Drops a block that may be running. It may go on, but not be entered in any table again.
    fn bury(&mut self, block: Box<Block>) {
        if block.code.replace(std::ptr::null()).is_null() && !block.woven.get() {
            self.dropped.push(block);
        } else {
            self.buried_size += block.ops.len();
            self.buried.push(block);
        }
    }

    /// Forgets a page; false when it was not known.
    fn remove_page(&mut self, frame: u64) -> bool {
        self.clear_page(frame);
        for fetch in self.fetches.iter_mut().flatten() {
            if fetch.frame == frame {
                *fetch = NO_FETCH;
            }
        }
        self.pages.remove(&frame).is_some()
    }

    /// Is there more decoded code than is good for the host?
    pub(crate) fn is_full(&self) -> bool {
        self.size > MOST_OPERATIONS
    }
}

/// Where a block of a page is found.
fn key(offset: u16, user: bool, mode: Mode) -> u16 {
    offset << 3 | u16::from(user) << 2 | mode as u16
}

#[inline(always)]
fn jump_index(linear: u64) -> usize {
    (linear ^ linear >> 15) as usize % JUMPS
}

#[expect(unsafe_code, reason = "blocks and pages are found by pointer")]
impl Cpu {
    /// The block at `Cpu::rip`; decodes it if need be.
    pub(crate) fn find_block(&mut self) -> Result<&'static Block> {
        let linear = self.linear_rip();
        if let Some(block) = self.blocks.jump(linear) {
            return Ok(block);
        }
        let before = self.begin(Doing::Decoding);
        let found = self.look_up_block(linear);
        self.go_back(before);
        found
    }

    fn look_up_block(&mut self, linear: u64) -> Result<&'static Block> {
        let (fetch, privilege) = self.fetch(linear)?;
        let mode = self.mode;
        #[cfg(target_arch = "x86_64")]
        let apart: Option<lower::Apart> = self
            .translator
            .verifies
            .then_some(|i| !crate::native::is_known(i));
        #[cfg(not(target_arch = "x86_64"))]
        let apart = None;
        let offset = (linear & PAGE_OFFSET) as u16;
        let user = privilege == Privilege::User as usize;
        let key = key(offset, user, mode);
        // SAFETY: pages are boxed, and removed by stores and between blocks only.
        let code = unsafe { &mut *fetch.code };
        match code.blocks.get(&key).map(|block| block.second) {
            Some(None) => {}
            Some(Some(second)) => {
                let (rest, _) = self.fetch(self.next_page(linear))?;
                // SAFETY: as above; that look may have dropped blocks of the page.
                let code = unsafe { &mut *fetch.code };
                if rest.frame != second || !code.blocks.contains_key(&key) {
                    // The same page, and another one behind it.
                    if let Some(block) = code.blocks.remove(&key) {
                        self.blocks.bury(block);
                        self.blocks.forget_jumps([true; 2]);
                    }
                    self.decode_spanning((linear, user), fetch)?;
                }
            }
            None => {
                let in_page = PAGE_OFFSET as usize + 1 - usize::from(offset);
                code.refresh();
                let bytes = &code.copy[usize::from(offset)..];
                let lowered = lower::block(bytes, offset, mode, self.config.baseline, apart);
                match lowered {
                    Some(mut block) => {
                        self.counters.decoded_blocks += 1;
                        self.blocks.size += block.ops.len();
                        block.frame = Some(fetch.frame);
                        block.user = user;
                        code.lines |= CodePage::lines_of(offset.into(), block.bytes.into());
                        code.blocks.insert(key, Box::new(block));
                    }
                    None if in_page < MAX_BYTES => self.decode_spanning((linear, user), fetch)?,
                    None => return Err(self.undefined()),
                }
            }
        }
        // SAFETY: as above; nothing was removed meanwhile but a block.
        let code = unsafe { &mut *fetch.code };
        let Some(block) = code.blocks.get(&key) else {
            return Err(self.undefined());
        };
        let lasts = block.frame.is_some();
        let block: *const Block = &raw const **block;
        if lasts {
            self.blocks.remember(linear, block);
        }
        // SAFETY: dropped blocks live until `collect`, between blocks.
        Ok(unsafe { &*block })
    }

    /// The linear page behind that of an address.
    fn next_page(&self, linear: u64) -> u64 {
        let next = (linear & !PAGE_OFFSET).wrapping_add(PAGE_OFFSET + 1);
        if self.is_64_bit() {
            next
        } else {
            next & 0xffff_ffff
        }
    }

    /// Decodes the instruction that begins in the page of `first` and ends in the next one.
    fn decode_spanning(&mut self, (linear, user): (u64, bool), first: Fetch) -> Result {
        let (rest, _) = self.fetch(self.next_page(linear))?;
        let offset = (linear & PAGE_OFFSET) as u16;
        let mut bytes = [0; MAX_BYTES];
        let (head, tail) = bytes.split_at_mut(PAGE_OFFSET as usize + 1 - usize::from(offset));
        // SAFETY: pages are boxed, and removed by stores and between blocks only; one reference at a
        // time, since both may be the same page.
        let code = unsafe { &mut *first.code };
        code.refresh();
        head.copy_from_slice(&code.copy[usize::from(offset)..]);
        // SAFETY: as above.
        let second = unsafe { &mut *rest.code };
        second.refresh();
        tail.copy_from_slice(&second.copy[..tail.len()]);
        let in_tail = tail.len();
        let mut block = lower::single(&bytes, offset, self.mode, self.config.baseline);
        // From the upper half into the lower, which have contexts of their own, it is looked up each
        // time.
        block.frame = (linear >> 63 == self.next_page(linear) >> 63).then_some(first.frame);
        block.second = Some(rest.frame);
        block.user = user;
        let key = key(offset, user, self.mode);
        second.lines |= CodePage::lines_of(0, in_tail as u64);
        if !second.entered.contains(&(first.frame, key)) {
            second.entered.push((first.frame, key));
        }
        // SAFETY: as above.
        let code = unsafe { &mut *first.code };
        code.lines |= CodePage::lines_of(offset.into(), (MAX_BYTES - in_tail) as u64);
        code.blocks.insert(key, Box::new(block));
        self.blocks.size += PAGE_COST;
        Ok(())
    }

    /// A block of the one instruction at `Cpu::rip`, decoded anew.
    pub(crate) fn single_block(&mut self) -> Result<&'static Block> {
        let linear = self.linear_rip();
        let offset = (linear & PAGE_OFFSET) as usize;
        let (first, _) = self.fetch(linear)?;
        let mut bytes = [0; MAX_BYTES];
        let split = (PAGE_OFFSET as usize + 1 - offset).min(MAX_BYTES);
        // SAFETY: pages are boxed and never removed.
        let ram = unsafe { (*first.code).ram };
        copy_from(ram, offset, &mut bytes[..split]);
        let mut have = split;
        if split < MAX_BYTES && !lower::is_complete(&bytes[..split], self.mode) {
            let (second, _) = self.fetch(self.next_page(linear))?;
            // SAFETY: as above.
            let ram = unsafe { (*second.code).ram };
            copy_from(ram, 0, &mut bytes[split..]);
            have = MAX_BYTES;
        }
        let block = lower::single(
            &bytes[..have],
            offset as u16,
            self.mode,
            self.config.baseline,
        );
        let block: *const Block = &raw const **self.blocks.single.insert(Box::new(block));
        // SAFETY: it lives until the next call, which is after it has run.
        Ok(unsafe { &*block })
    }

    /// The page at a linear address, for execution.
    fn fetch(&mut self, linear: u64) -> Result<(Fetch, usize)> {
        let page = linear & !PAGE_OFFSET;
        let privilege = self.privilege();
        let at = (page >> 12) as usize % FETCHES;
        let known = self.blocks.fetches[privilege as usize][at];
        if known.page == page {
            return Ok((known, privilege as usize));
        }
        if !is_canonical(linear) {
            return Err(self.general_protection(0));
        }
        let before = self.begin(Doing::FillingTlb);
        let translation = self.translate(linear, Access::Execute, privilege);
        self.go_back(before);
        let translation = translation?;
        let frame = translation.physical >> 12;
        let Some(ram) = self.memory.ram_page(frame) else {
            // Nothing that could be executed answers there.
            return Err(self.general_protection(0));
        };
        let fetch = Fetch {
            page,
            frame,
            code: self.enter_page(frame, ram),
            global: translation.global,
            large: translation.large,
        };
        let upper = linear >> 63 != 0;
        if known.page != NO_FETCH.page {
            self.blocks.evicted[usize::from(known.page >> 63 != 0)] = true;
        }
        // Jumps into the upper half outlive a load of CR3.
        self.blocks.local_upper |= upper && !translation.global;
        self.blocks.fetches[privilege as usize][at] = fetch;
        Ok((fetch, privilege as usize))
    }

    /// The code of a page that is entered for execution, compared with what is there now.
    fn enter_page(&mut self, frame: u64, ram: RamPage) -> *mut CodePage {
        if let Some(page) = self.blocks.pages.get_mut(&frame) {
            let pointer: *mut CodePage = &raw mut **page;
            let count = self.config.code.count(frame);
            if page.is_true() {
                page.count = count;
            } else {
                self.blocks.clear_page(frame);
                if let Some(page) = self.blocks.pages.get_mut(&frame) {
                    page.count = count;
                }
            }
            return pointer;
        }
        self.blocks.size += PAGE_COST;
        let count = self.config.code.add(frame);
        self.tlb.withhold_writes_to(ram.host);
        self.blocks.young.push((frame, 8));
        let page = self
            .blocks
            .pages
            .entry(frame)
            .or_insert_with(|| Box::new(CodePage::new(frame, ram, count)));
        &raw mut **page
    }

    /// A store will hit a page that holds code. Drops what it hits; ends the instruction, to be
    /// run again by itself, when it belongs to a block of that page.
    pub(crate) fn drop_code(&mut self, physical: u64, bytes: u64) -> Result {
        if self.is_trying() {
            self.abort = AbortReason::Alone;
            return Err(Abort);
        }
        let frame = physical >> 12;
        let Some(page) = self.blocks.pages.get(&frame) else {
            return Ok(());
        };
        if page.lines & CodePage::lines_of(physical & PAGE_OFFSET, bytes) == 0 {
            return Ok(());
        }
        if !self.alone {
            let running = self.slot(slot::RIP).wrapping_add(self.slot(slot::CS));
            let running = if self.is_64_bit() {
                running
            } else {
                running & 0xffff_ffff
            };
            let at = (running >> 12) as usize % FETCHES;
            let fetch = self.blocks.fetches[self.privilege() as usize][at];
            // What is not known is taken to be the same page.
            if fetch.page != running & !PAGE_OFFSET || fetch.frame == frame {
                self.abort = AbortReason::Alone;
                return Err(Abort);
            }
        }
        self.release_page(frame);
        Ok(())
    }

    /// A serialising moment: code that other processors changed is dropped.
    pub(crate) fn synchronise_code(&mut self) {
        let stores = self.config.code.stores();
        if stores != self.blocks.stores {
            self.blocks.stores = stores;
            let changed: Vec<(u64, u64)> = self
                .blocks
                .pages
                .values()
                .map(|page| (page.frame, page.count, self.config.code.count(page.frame)))
                .filter(|(_, known, count)| known != count)
                .map(|(frame, _, count)| (frame, count))
                .collect();
            for (frame, count) in changed {
                self.verify_page(frame);
                if let Some(page) = self.blocks.pages.get_mut(&frame) {
                    page.count = count;
                }
            }
        }
        if !self.blocks.young.is_empty() {
            let mut young = std::mem::take(&mut self.blocks.young);
            young.retain_mut(|(frame, rounds)| {
                self.verify_page(*frame);
                *rounds -= 1;
                *rounds > 0
            });
            self.blocks.young = young;
        }
    }

    /// Drops a page's code; stores to it are quick again once no other processor holds any.
    fn release_page(&mut self, frame: u64) {
        if self.blocks.remove_page(frame) {
            self.config.code.release(frame);
        }
    }

    /// Drops all code. No block may be running.
    pub(crate) fn drop_all_code(&mut self) {
        let frames: Vec<u64> = self.blocks.pages.keys().copied().collect();
        for frame in frames {
            self.release_page(frame);
        }
        self.blocks.size = 0;
        self.blocks.collect();
    }

    fn verify_page(&mut self, frame: u64) {
        if self
            .blocks
            .pages
            .get(&frame)
            .is_some_and(|page| !page.is_true())
        {
            self.release_page(frame);
        }
    }
}

fn copy_from(ram: RamPage, at: usize, bytes: &mut [u8]) {
    use crate::host::HostValue;
    for (index, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: the caller stays within the page, which `ram_page` vouches for.
        #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
        unsafe {
            *byte = u8::load(ram.host.as_ptr().add((at + index) & 0xfff));
        }
    }
}

/// No link yet.
pub(crate) fn no_links() -> [Cell<*const Block>; 2] {
    [Cell::new(std::ptr::null()), Cell::new(std::ptr::null())]
}
