//! Which block's code is where, for profiles.

use std::ops::Range;

use super::{CODE, Translator};
use crate::decode::Block;

/// Translated blocks, in the order of their code.
#[derive(Debug, Default)]
pub(super) struct Made(Vec<MadeBlock>);

/// A block that was translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MadeBlock {
    /// Where its code is entered, in the code cache.
    code: u32,
    /// Offset in the guest's page.
    pub(crate) start: u16,
    pub(crate) user: bool,
}

impl Made {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

impl Translator {
    /// Notes where a block's code is. Code is only ever appended.
    pub(crate) fn remember_made(&mut self, block: &Block, code: *const u8) {
        let code = (code as usize).wrapping_sub(self.mapping().start) as u32;
        debug_assert!(self.made.0.last().is_none_or(|last| last.code < code));
        self.made.0.push(MadeBlock {
            code,
            start: block.start,
            user: block.user,
        });
    }

    /// The block whose code is at an offset in the code cache. The few bytes before the place where it
    /// is entered, which run when something is due, count as the block's before it.
    pub(crate) fn made_at(&self, offset: u32) -> Option<MadeBlock> {
        let after = self.made.0.partition_point(|made| made.code <= offset);
        self.made.0.get(after.checked_sub(1)?).copied()
    }

    /// Addresses at which translated code runs.
    pub(crate) fn mapping(&self) -> Range<usize> {
        let start = self.address(0) as usize;
        let size = if self.memory.is_some() { CODE } else { 0 };
        start..start + size
    }

    /// Bytes of translated code.
    pub(crate) fn used(&self) -> usize {
        self.memory.as_ref().map_or(0, |memory| memory.used())
    }
}
