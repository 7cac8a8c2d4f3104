//! A decoded instruction and how one leads to the next.
//!
//! A handler does its work and then calls the handler of the next instruction. In optimised
//! builds that is a jump; elsewhere the calls nest, at most as deep as a block is long.

use super::{Abort, Result};
use crate::cpu::Cpu;

/// Slots of `Cpu::regs` beyond the sixteen general registers.
pub(crate) mod slot {
    pub(crate) const RAX: u8 = 0;
    pub(crate) const RCX: u8 = 1;
    pub(crate) const RDX: u8 = 2;
    pub(crate) const RBX: u8 = 3;
    pub(crate) const RSP: u8 = 4;
    pub(crate) const RBP: u8 = 5;
    pub(crate) const RSI: u8 = 6;
    pub(crate) const RDI: u8 = 7;
    /// RIP of the block's first instruction.
    pub(crate) const RIP: u8 = 16;
    /// Always zero.
    pub(crate) const ZERO: u8 = 17;
    /// The address that a preceding address operation worked out.
    pub(crate) const ADDRESS: u8 = 18;
    /// The bases of ES, CS, SS, DS, FS, GS: zero in 64-bit mode for the first four.
    pub(crate) const SEGMENT: u8 = 24;
    pub(crate) const CS: u8 = SEGMENT + 1;
    pub(crate) const SS: u8 = SEGMENT + 2;
}

/// What a handler leaves to the block's loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The block ended; `Cpu::rip` says where to go on.
    Next,
    /// The same, and the target is the block's first link.
    Taken,
    /// The same, and the target is the block's second link.
    FallThrough,
    /// An instruction ended early; `Cpu::abort_op` is the one.
    Abort,
    /// An instruction that was to be done by itself is done.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "for the translator")
    )]
    Stepped,
}

/// Runs an instruction and all that follow it in its block.
pub(crate) type Handler = fn(&mut Cpu, At) -> Exit;

/// A decoded instruction.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Op {
    pub(crate) handler: Handler,
    pub(crate) imm: u64,
    pub(crate) disp: i64,
    pub(crate) dst: u8,
    pub(crate) src: u8,
    pub(crate) base: u8,
    pub(crate) index: u8,
    pub(crate) scale: u8,
    pub(crate) seg: u8,
    /// Bytes from the block's start to the instruction.
    pub(crate) offset: u16,
}

const _: () = assert!(size_of::<Op>() == 32);

impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Op")
            .field("imm", &self.imm)
            .field("disp", &self.disp)
            .field("dst", &self.dst)
            .field("src", &self.src)
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

/// A place in a block. The block outlives it: blocks are freed between blocks only.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At(*const Op);

#[expect(
    unsafe_code,
    reason = "blocks are walked by pointer, one step an instruction"
)]
impl At {
    pub(crate) fn null() -> Self {
        Self(std::ptr::null())
    }

    /// The first instruction of a block.
    #[inline(always)]
    pub(crate) fn first(ops: &[Op]) -> Self {
        Self(ops.as_ptr())
    }

    /// The first of these instructions.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn of(ops: &[Op]) -> Self {
        Self::first(ops)
    }

    /// How many instructions it is behind another place of the same block.
    pub(crate) fn since(self, first: Self) -> usize {
        (self.0.addr() - first.0.addr()) / size_of::<Op>()
    }

    #[inline(always)]
    pub(crate) fn pointer(self) -> *const Op {
        self.0
    }

    /// The instruction.
    #[inline(always)]
    pub(crate) fn get<'a>(self) -> &'a Op {
        // SAFETY: made by `first` of a live, non-empty block, and advanced only by `next`.
        unsafe { &*self.0 }
    }

    /// The following one. Every block ends with an operation whose handler does not go on, and
    /// one more that is never run, so that there always is a following one.
    #[inline(always)]
    pub(crate) fn next(self) -> Self {
        // SAFETY: see above: within the block's operations.
        Self(unsafe { self.0.add(1) })
    }

    /// RIP of the instruction that follows in memory.
    #[inline(always)]
    pub(crate) fn next_rip(self, cpu: &Cpu) -> u64 {
        cpu.slot(slot::RIP)
            .wrapping_add(self.next().get().offset.into())
    }
}

#[inline(always)]
fn conjure<F: Copy + 'static>() -> F {
    const {
        assert!(
            size_of::<F>() == 0,
            "only function items, which have no size"
        )
    };
    // SAFETY: a value of type F was given to the function that names this instance; it is `Copy`
    // and has no bytes, so that reading it from anywhere non-null and aligned makes another.
    #[expect(unsafe_code, reason = "a function item as a type")]
    unsafe {
        std::ptr::NonNull::<F>::dangling().read()
    }
}

/// The handler of an instruction after which the next one in memory is run.
pub(crate) fn straight<F>(_body: F) -> Handler
where
    F: Fn(&mut Cpu, &Op) -> Result + Copy + 'static,
{
    |cpu, at| match conjure::<F>()(cpu, at.get()) {
        Ok(()) => {
            let next = at.next();
            (next.get().handler)(cpu, next)
        }
        Err(Abort) => cpu.aborted(at),
    }
}

/// The handler of an instruction that ends its block: it sets `Cpu::rip` and says how it went on.
pub(crate) fn ending<F>(_body: F) -> Handler
where
    F: Fn(&mut Cpu, At) -> Result<Exit> + Copy + 'static,
{
    |cpu, at| match conjure::<F>()(cpu, at) {
        Ok(exit) => cpu.chain(exit),
        Err(Abort) => cpu.aborted(at),
    }
}
