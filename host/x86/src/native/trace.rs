//! Blocks that are translated as one.
//!
//! Behind a branch, that of the two blocks it leads to follows in the same code which ran more often, if
//! it is in the page: nothing is looked at in between, and operands of both may share looks into the TLB. Behind a call, the block follows to which is returned. Each block may have code of its own
//! besides, for whoever comes to it by another way.
//!
//! A trace only leads on to higher addresses, as code that is entered without a look whether something
//! is due does: so what goes round in circles comes by that look.

use std::collections::HashMap;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind};

use super::Translator;
use super::translate::Site;
use crate::cpu::Cpu;
use crate::decode::Block;
use crate::mmu::PAGE_OFFSET;

/// Blocks of a trace, at most.
const MOST_BLOCKS: usize = 8;
/// Instructions with which no further block follows.
const ENOUGH: usize = 64;

/// A block of a trace.
pub(super) struct Segment<'a> {
    pub(super) block: &'a Block,
    pub(super) instructions: Vec<Instruction>,
    /// The block's link that leads to the segment which follows.
    pub(super) link: Option<u8>,
}

/// What follows the first block of a trace: by which link, and which block.
type Followers = Vec<(u8, &'static Block)>;

/// The traces that code was made of, for lockstep.
#[derive(Debug, Default)]
pub(super) struct Traces(HashMap<*const Block, Followers>);

impl Traces {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

impl Translator {
    /// Code was made of blocks that begin with this one.
    fn remember_trace(&mut self, trace: &[Segment<'static>]) {
        for segment in &trace[1..] {
            segment.block.woven.set(true);
        }
        if self.verifies && trace.len() > 1 {
            let links = trace.iter().filter_map(|segment| segment.link);
            let blocks = trace[1..].iter().map(|segment| segment.block);
            let first: *const Block = trace[0].block;
            self.traces.0.insert(first, links.zip(blocks).collect());
        }
    }

    /// What follows a block that was translated, in the same code.
    pub(super) fn trace_of(&self, block: &Block) -> Followers {
        let first: *const Block = block;
        self.traces.0.get(&first).cloned().unwrap_or_default()
    }
}

impl Cpu {
    /// Translates a block, and those that are best translated with it. Where the code is, if it became
    /// any.
    pub(crate) fn translate_from(&mut self, block: &'static Block) -> Option<*const u8> {
        let site = Site {
            page: self.rip & !PAGE_OFFSET,
            jumps: self.blocks.translated_at,
        };
        let about = (self.config.baseline, self.mark.get(), site);
        let mut trace = self.trace_from(block)?;
        loop {
            if let Some(code) = self.translator.translate(&trace, about) {
                self.translator.remember_trace(&trace);
                return Some(code);
            }
            if trace.len() == 1 {
                return None;
            }
            // Another block may have what cannot be translated.
            trace.truncate(1);
            trace[0].link = None;
        }
    }

    /// The block, and those that are to be translated with it; `None` when it was dropped.
    fn trace_from(&self, block: &'static Block) -> Option<Vec<Segment<'static>>> {
        let mut trace: Vec<Segment<'static>> = Vec::new();
        let mut next = Some(block);
        let mut count = 0;
        while let Some(block) = next {
            let Some(bytes) = self.blocks.bytes_of(block) else {
                break;
            };
            let decoder = Decoder::with_ip(64, &bytes, block.start.into(), DecoderOptions::NONE);
            let instructions: Vec<Instruction> = decoder.into_iter().collect();
            let full = trace.len() + 1 == MOST_BLOCKS || count + instructions.len() >= ENOUGH;
            let follower = instructions
                .last()
                .filter(|_| !full)
                .and_then(|last| self.follower(block, last));
            count += instructions.len();
            trace.push(Segment {
                block,
                instructions,
                link: follower.map(|(link, _)| link),
            });
            next = follower.map(|(_, next)| next);
        }
        trace.last_mut()?.link = None;
        Some(trace)
    }

    /// Of the blocks to which the branch leads that ends this one, the one that ran more often, and its
    /// link.
    fn follower(&self, block: &Block, last: &Instruction) -> Option<(u8, &'static Block)> {
        let jump = matches!(last.code(), Code::Jmp_rel8_64 | Code::Jmp_rel32_64);
        let conditional = last.is_jcc_short_or_near() && last.op0_kind() == OpKind::NearBranch64;
        if block.second.is_some() {
            return None;
        }
        if matches!(last.code(), Code::Call_rel32_64 | Code::Call_rm64) {
            // What is called returns to it, and has not been linked to yet.
            let behind = u16::try_from(last.next_ip()).ok()?;
            return Some((1, self.blocks.block_behind(block, behind)?));
        }
        if !(jump || conditional) {
            return None;
        }
        let runs = |next: &Block| match next.code.get().is_null() {
            true => next.runs.get(),
            // They are not counted any more.
            false => self.translator.after,
        };
        let taken = block.link(0).map(|next| (0, next));
        let past = block.link(1).filter(|_| conditional).map(|next| (1, next));
        let mostly = match (taken, past) {
            (Some(taken), Some(past)) if runs(taken.1) > runs(past.1) => Some(taken),
            (taken, past) => past.or(taken),
        };
        mostly.filter(|(_, next)| next.start > block.start)
    }
}
