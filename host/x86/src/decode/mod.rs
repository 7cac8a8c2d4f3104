//! From bytes to blocks of operations, and where blocks are kept.

mod block;
mod branches;
mod cache;
mod cold;
mod lower;
mod tables;

pub(crate) use block::Block;
pub(crate) use cache::BlockCache;
pub(crate) use cold::Cold;
#[cfg(target_arch = "x86_64")]
pub(crate) use tables::{is_general_vex, is_offered};

/// The size of code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Bits16 = 0,
    Bits32 = 1,
    Bits64 = 2,
}

impl Mode {
    pub(crate) fn bits(self) -> u32 {
        16 << self as u32
    }
}
