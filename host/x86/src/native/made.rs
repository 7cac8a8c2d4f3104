//! Which block's code is where, for profiles.

use std::ops::Range;

use super::emit::Part;
use super::{CODE, Translator};
use crate::decode::Block;

/// Translated blocks, in the order of their code, for each part of it.
#[derive(Debug, Default)]
pub(super) struct Made([Vec<MadeBlock>; 2]);

/// A block that was translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MadeBlock {
    /// Where its code is entered, or begins, in the code cache.
    code: u32,
    /// Offset in the guest's page.
    pub(crate) start: u16,
    pub(crate) user: bool,
}

impl Made {
    pub(super) fn clear(&mut self) {
        self.0.iter_mut().for_each(Vec::clear);
    }

    /// Notes where a block's code is. Code is only ever appended.
    pub(super) fn note(&mut self, block: &Block, part: Part, code: usize) {
        let made = &mut self.0[part as usize];
        let code = code as u32;
        debug_assert!(made.last().is_none_or(|last| last.code < code));
        made.push(MadeBlock {
            code,
            start: block.start,
            user: block.user,
        });
    }
}

impl Translator {
    /// The block whose code is at an offset in the code cache; that of a trace counts as its first
    /// block's. The few bytes before the place where it is entered, which run when something is due,
    /// count as the block's before it.
    pub(crate) fn made_at(&self, offset: u32) -> Option<MadeBlock> {
        let rarely = offset as usize >= CODE / 2;
        let made = &self.made.0[usize::from(rarely)];
        let after = made.partition_point(|made| made.code <= offset);
        made.get(after.checked_sub(1)?).copied()
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
