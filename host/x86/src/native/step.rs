//! Between translated code and the interpreter.

use super::{Context, Kind, Leaving, enter};
use crate::cpu::Cpu;
use crate::decode::Block;
use crate::exec::op::{At, Exit, Handler, Op, slot};
use crate::float::FloatState;
use crate::mmu::PAGE_OFFSET;

/// Operations of one instruction, and one behind them.
pub(super) const MOST: usize = 16;
/// In the budget: no block follows by itself.
pub(crate) const ALONE: u32 = 1 << 31;

const STOP: Handler = |_cpu, _at| Exit::Stepped;

pub(super) fn no_operations() -> [Op; MOST] {
    [Op {
        handler: STOP,
        imm: 0,
        disp: 0,
        dst: 0,
        src: 0,
        base: slot::ZERO,
        index: slot::ZERO,
        scale: 0,
        seg: slot::ZERO,
        offset: 0,
    }; MOST]
}

impl Cpu {
    /// Runs translated code until it goes where there is none.
    #[inline(never)]
    pub(crate) fn run_translated(&mut self, code: *const u8) -> Exit {
        self.native.page = self.rip & !PAGE_OFFSET;
        self.blocks.remember_translated(self.rip, code);
        self.native.bottom = self.translator.bottom;
        // The first block looks by itself whether something is due.
        self.budget = self.budget.max(1);
        let mut target = code;
        loop {
            self.native.set_flags(self.flags);
            self.native.sse_blocked = u64::from(!self.sse_runs());
            self.native.avx_blocked = u64::from(!self.avx_runs());
            self.native.arithmetic_blocked = u64::from(!self.float.is_plain());
            FloatState::clear_host_flags();
            // SAFETY: the code was made for this processor, which has nothing else to do meanwhile.
            #[expect(unsafe_code, reason = "translated code is run")]
            let number = unsafe { enter::enter(self, target) };
            self.flags = self.native.flags();
            if self.native.arithmetic_done != 0 {
                self.native.arithmetic_done = 0;
                self.float.take_host_flags();
            }
            let Leaving { block, kind } = self.translator.leavings[number as usize];
            // SAFETY: the block's code has just run, and blocks are freed between blocks only.
            #[expect(unsafe_code, reason = "blocks are found by pointer")]
            let block = unsafe { &*block };
            self.begin_block(block);
            let Context { page, .. } = self.native;
            match kind {
                Kind::Look => {
                    self.rip = self.slot(slot::RIP);
                    return Exit::Next;
                }
                Kind::Away { offset } => {
                    self.rip = page.wrapping_add_signed(offset.into());
                    return Exit::Next;
                }
                Kind::Link {
                    link,
                    offset,
                    calls,
                    place,
                } => {
                    self.rip = page + u64::from(offset);
                    let next = block.link(link.into()).map(|next| next.code.get());
                    match next.filter(|next| !next.is_null()) {
                        Some(next) => {
                            let forward = !calls && offset > block.start;
                            self.translator.link(place, next, forward);
                            target = next;
                        }
                        None if link == 0 => return Exit::Taken,
                        None => return Exit::FallThrough,
                    }
                }
                Kind::Step { op, count, resume } => {
                    let (first, behind) = (usize::from(op), usize::from(op + count));
                    let exit = self.step(block, first, count.into());
                    // What translated code does is not counted; what is interpreted for it is.
                    let interpreted = match exit {
                        // Whoever hears of it takes back the whole block, and counts up to the fault.
                        Exit::Abort => {
                            u64::from(block.instructions) - block.instructions_in(0..first)
                        }
                        _ => block.instructions_in(first..behind),
                    };
                    self.instructions = self.instructions.wrapping_add(interpreted);
                    match exit {
                        Exit::Stepped if self.budget == 0 => {
                            let next = block.ops[behind].offset;
                            self.rip = self.slot(slot::RIP).wrapping_add(next.into());
                            return Exit::Next;
                        }
                        Exit::Stepped => target = self.translator.address(resume),
                        exit => return exit,
                    }
                }
            }
        }
    }

    /// The block that translated code is in.
    fn begin_block(&mut self, block: &'static Block) {
        self.set_current(block);
        self.regs[usize::from(slot::RIP)] = self.native.page + u64::from(block.start);
    }

    /// Interprets one instruction of a block: `count` operations from `op` on.
    fn step(&mut self, block: &'static Block, op: usize, count: usize) -> Exit {
        let operations = &mut *self.translator.step;
        operations[..count].copy_from_slice(&block.ops[op..op + count]);
        operations[count] = Op {
            handler: STOP,
            ..block.ops[op + count]
        };
        let first = At::first(operations);
        self.budget |= ALONE;
        let exit = (first.get().handler)(self, first);
        self.budget &= !ALONE;
        if exit == Exit::Abort {
            self.aborted_in(block, op, first);
        }
        exit
    }
}
