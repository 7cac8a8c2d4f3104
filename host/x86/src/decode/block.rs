//! A decoded block, and the page that it lies in.

use std::cell::Cell;
use std::collections::HashMap;

use crate::exec::op::Op;
use crate::memory::RamPage;

use super::Cold;

/// Bytes whose changes are told apart: a page has 64 of them, one bit each.
const LINE: u64 = 64;

/// Instructions in a row that are entered at the first and left at the last only.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) ops: Box<[Op]>,
    /// What the rare instructions need; the operations point into it.
    #[expect(dead_code, reason = "owned here, reached by pointer")]
    pub(crate) cold: Box<[Box<Cold>]>,
    pub(crate) instructions: u32,
    pub(crate) bytes: u16,
    /// Offset in its page.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "for the translator")
    )]
    pub(crate) start: u16,
    /// It is user mode's: translated code looks into the TLB of its privilege.
    pub(crate) user: bool,
    /// Its translation, if it has one.
    pub(crate) code: Cell<*const u8>,
    /// Translated code of other blocks goes on with it.
    pub(crate) woven: Cell<bool>,
    /// How often it was interpreted.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "for the translator")
    )]
    pub(crate) runs: Cell<u32>,
    /// The physical page that it is dropped with; `None` for one that no way may lead to
    /// without a look.
    pub(crate) frame: Option<u64>,
    /// The physical page in which its only instruction ends, if that is another one: it is dropped with
    /// that, too. Where the page is mapped is looked at by the ways that lead to it, so no link does.
    pub(crate) second: Option<u64>,
    /// Blocks of the same page that this one leads to: by its branch, and behind its end. They
    /// are dropped together with it.
    pub(crate) links: [Cell<*const Block>; 2],
}

impl Block {
    /// Does it go on behind its last instruction?
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "for the translator")
    )]
    pub(crate) fn goes_on(&self) -> bool {
        // Then there is an operation for that, before the one that is never run.
        let before = self
            .ops
            .len()
            .checked_sub(2)
            .and_then(|at| self.ops.get(at));
        before.is_some_and(|op| op.offset == self.bytes)
    }

    /// How many instructions these operations are.
    pub(crate) fn instructions_in(&self, ops: std::ops::Range<usize>) -> u64 {
        // An address operation precedes its instruction.
        let end = self.ops.len().min(ops.end + 1);
        let borders = self.ops[ops.start..end]
            .windows(2)
            .filter(|pair| pair[0].offset != pair[1].offset);
        borders.count() as u64
    }

    /// The block that a link leads to.
    #[inline(always)]
    pub(crate) fn link(&self, link: usize) -> Option<&'static Block> {
        // SAFETY: links lead to blocks of the same page, which are dropped together, and dropped
        // blocks live on until no block runs.
        #[expect(unsafe_code, reason = "blocks are chained by pointer")]
        unsafe {
            self.links[link].get().as_ref()
        }
    }
}

/// The decoded code of a physical page.
#[derive(Debug)]
pub(crate) struct CodePage {
    pub(crate) frame: u64,
    pub(crate) ram: RamPage,
    /// What was decoded.
    pub(crate) copy: Box<[u8; 4096]>,
    /// Lines that hold decoded code.
    pub(crate) lines: u64,
    /// The page's counter in the code map when it was last known to be true.
    pub(crate) count: u64,
    /// By offset, privilege and mode.
    pub(crate) blocks: HashMap<u16, Box<Block>, Hasher>,
    /// Blocks of other pages that end in this one: page and place among its blocks.
    pub(crate) entered: Vec<(u64, u16)>,
}

impl CodePage {
    pub(crate) fn new(frame: u64, ram: RamPage, count: u64) -> Self {
        Self {
            frame,
            ram,
            copy: Box::new([0; 4096]),
            lines: 0,
            count,
            blocks: HashMap::default(),
            entered: Vec::new(),
        }
    }

    /// Copies the lines that hold no code yet from RAM.
    pub(crate) fn refresh(&mut self) {
        for line in 0..64 {
            if self.lines >> line & 1 == 0 {
                let at = line * LINE as usize;
                let fresh = read_line(self.ram, at);
                self.copy[at..at + LINE as usize].copy_from_slice(&fresh);
            }
        }
    }

    /// Is the code still what was decoded?
    pub(crate) fn is_true(&self) -> bool {
        let mut rest = self.lines;
        while rest != 0 {
            let at = rest.trailing_zeros() as usize * LINE as usize;
            rest &= rest - 1;
            if read_line(self.ram, at) != self.copy[at..at + LINE as usize] {
                return false;
            }
        }
        true
    }

    /// The bits of the lines that `bytes` bytes at `offset` touch, within the page.
    pub(crate) fn lines_of(offset: u64, bytes: u64) -> u64 {
        let first = offset / LINE;
        let last = ((offset + bytes.max(1) - 1) / LINE).min(63);
        (u64::MAX << first) & (u64::MAX >> (63 - last))
    }
}

#[expect(unsafe_code, reason = "guest memory is reached by pointer")]
pub(crate) fn read_line(ram: RamPage, at: usize) -> [u8; LINE as usize] {
    use crate::host::HostValue;
    let mut line = [0; LINE as usize];
    for (index, word) in line.chunks_exact_mut(8).enumerate() {
        // SAFETY: `at` is below 4096 and a multiple of 64: the bytes lie in the page.
        let value = unsafe { u64::load(ram.host.as_ptr().add(at + index * 8)) };
        word.copy_from_slice(&value.to_le_bytes());
    }
    line
}

/// Spreads small keys; they come from no adversary that gains by collisions.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Hasher;

impl std::hash::BuildHasher for Hasher {
    type Hasher = Spread;
    fn build_hasher(&self) -> Spread {
        Spread(0)
    }
}

/// See [`Hasher`].
#[derive(Debug)]
pub(crate) struct Spread(u64);

impl std::hash::Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64((*byte).into());
        }
    }
    fn write_u16(&mut self, value: u16) {
        self.write_u64(value.into());
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}
