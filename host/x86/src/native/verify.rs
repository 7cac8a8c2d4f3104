//! Lockstep: each block, or trace of blocks, is interpreted and run as translated code, from the same
//! state, and both have to come to the same end.
//!
//! The interpreter goes first, with a journal of what its stores replace; its end is noted, and
//! everything taken back. Then the translation runs, until it leaves the trace, and what it has made is
//! compared.
//! Blocks are cut around instructions that translated code leaves to the interpreter in any case: what
//! those do to devices and clocks must not be done twice.

use std::fmt::Write;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use iced_x86::{Decoder, DecoderOptions, FastFormatter, Instruction, Mnemonic, OpKind};

use crate::cpu::{AbortReason, Cpu};
use crate::decode::Block;
use crate::exec::Exception;
use crate::exec::flags::ARITHMETIC;
use crate::exec::op::{At, Exit, slot};
use crate::float::FloatState;
use crate::host::HostValue;

/// How often a block that came to two ends is tried again: a device may have written in between what
/// it read.
const TRIES: usize = 4;

/// A store that can be taken back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Replaced {
    pub(crate) at: *mut u8,
    /// What was there.
    pub(crate) byte: u8,
    /// What is there when the interpreter is done, if later stores changed nothing: see `interpret`.
    pub(crate) stored: u8,
    /// Where the dirty log hears of it.
    pub(crate) mark: NonNull<AtomicU8>,
}

/// What the guest can see of a processor between two instructions.
#[derive(Clone, PartialEq, Eq)]
struct Seen {
    regs: [u64; 16],
    rip: u64,
    flags: u64,
    system_flags: u64,
    float: FloatState,
    /// The exception that an instruction raised, and the operation that did: of which block.
    fault: Option<(Exception, u16, usize)>,
}

/// What the interpreter made of a trace.
struct Interpreted {
    seen: Seen,
    stores: Vec<Replaced>,
    /// The blocks that ran.
    blocks: Vec<&'static Block>,
}

impl Cpu {
    fn seen(&self) -> Seen {
        let mut regs = [0; 16];
        regs.copy_from_slice(&self.regs[..16]);
        Seen {
            regs,
            rip: self.rip,
            flags: self.flags.to_rflags(),
            system_flags: self.system_flags,
            float: self.float.clone(),
            fault: None,
        }
    }

    /// What can be seen where the block ended that ran last. `None`: it was not done.
    fn seen_after(&self, exit: Exit) -> Option<Seen> {
        let block = self.current_block();
        let mut seen = self.seen();
        if exit == Exit::Abort {
            let AbortReason::Exception(exception) = self.abort else {
                return None;
            };
            let at = self.abort_at.pointer();
            let op = block.ops.iter().position(|op| std::ptr::eq(op, at));
            seen.fault = Some((exception, block.start, op?));
            // It is worked out from the operation.
            seen.rip = 0;
        }
        Some(seen)
    }

    fn set_seen(&mut self, seen: &Seen) {
        self.regs[..16].copy_from_slice(&seen.regs);
        self.rip = seen.rip;
        self.flags = crate::exec::flags::Flags::from_rflags(seen.flags);
        self.system_flags = seen.system_flags;
        self.float.clone_from(&seen.float);
    }

    /// Interprets a block and runs its translation. `None`: the interpreter is to do it alone.
    pub(crate) fn run_verified(&mut self, block: &'static Block, code: *const u8) -> Option<Exit> {
        let before = self.seen();
        let (budget, counted) = (self.budget, self.instructions);
        let mut first = None;
        let mut most = usize::MAX;
        for _ in 0..TRIES {
            let interpreted = self.interpret(block, most);
            self.set_seen(&before);
            self.set_current(block);
            let done = std::mem::replace(&mut self.instructions, counted);
            let Interpreted {
                seen: mut expected,
                stores,
                blocks,
            } = interpreted?;
            for mark in marks(&stores) {
                mark.store(0, Ordering::Relaxed);
            }
            // The second block that follows finds that something is due.
            self.budget = 2;
            let exit = self.run_translated(code);
            self.budget = budget;
            let now = self.seen_after(exit);
            let mut now = now.unwrap_or_else(|| self.seen());
            if now.flags != expected.flags {
                // Where an instruction has raised an exception, what others leave undefined is not
                // known.
                let masked = match now.fault {
                    Some(_) => ARITHMETIC,
                    None => self.undefined_flags(&blocks),
                };
                now.flags |= masked;
                expected.flags |= masked;
            }
            let memory = differing(&stores);
            let mut unmarked = false;
            for mark in marks(&stores) {
                // Whatever became of it, the page was written.
                unmarked |= mark.swap(self.mark.get(), Ordering::AcqRel) == 0;
            }
            if now == expected && memory.is_none() && !unmarked {
                self.translator.verified += 1;
                self.translator.spare_journal = stores;
                self.instructions = done;
                return Some(exit);
            }
            let report = || {
                let mut text = self.describe(&blocks, [&before, &expected, &now]);
                let _ = writeln!(text, "  left by {exit:?}");
                if unmarked {
                    let _ = writeln!(text, "  a page that was written is not marked dirty");
                }
                if let Some(memory) = &memory {
                    let _ = writeln!(text, "  {memory}");
                }
                text
            };
            // A trace may end early, where the interpreter did its branch: then no more is compared.
            let last = self.current_block();
            let ended = blocks.iter().position(|&block| std::ptr::eq(block, last));
            match ended.filter(|ended| ended + 1 < blocks.len()) {
                Some(ended) => most = ended + 1,
                None => {
                    first.get_or_insert_with(report);
                }
            }
            for store in stores.iter().rev() {
                put(store.at, store.byte);
            }
            self.set_seen(&before);
            self.instructions = counted;
        }
        let report = first.unwrap_or_default();
        tracing::error!("the interpreter and translated code differ:\n{report}");
        self.translator.difference = Some(report);
        self.set_current(block);
        // The interpreter is right until shown otherwise.
        self.budget = 0;
        None
    }

    /// Interprets the trace that begins with a block, as far as it is followed, but no more than `most`
    /// blocks, and takes back what it did. `None`: the block has to be done by itself.
    fn interpret(&mut self, block: &'static Block, most: usize) -> Option<Interpreted> {
        let trace = self.translator.trace_of(block);
        let mut blocks = vec![block];
        self.tlb.set_trying(true);
        let mut journal = std::mem::take(&mut self.translator.spare_journal);
        journal.clear();
        self.journal = Some(journal);
        let mut exit = self.interpret_block(block);
        for (link, block) in trace.into_iter().take(most - 1) {
            let followed = match exit {
                Exit::Taken => link == 0,
                Exit::FallThrough => link == 1,
                Exit::Next | Exit::Stepped | Exit::Abort => false,
            };
            if !followed {
                break;
            }
            blocks.push(block);
            exit = self.interpret_block(block);
        }
        self.tlb.set_trying(false);
        let mut stores = self.journal.take().unwrap_or_default();
        let after = self.seen_after(exit);
        for replaced in stores.iter_mut().rev() {
            replaced.stored = get(replaced.at);
            put(replaced.at, replaced.byte);
        }
        Some(Interpreted {
            seen: after?,
            stores,
            blocks,
        })
    }

    /// Interprets one block.
    fn interpret_block(&mut self, block: &'static Block) -> Exit {
        self.instructions += u64::from(block.instructions);
        self.set_current(block);
        self.regs[usize::from(slot::RIP)] = self.rip;
        self.budget |= super::step::ALONE;
        let at = At::first(&block.ops);
        let exit = (at.get().handler)(self, at);
        self.budget &= !super::step::ALONE;
        exit
    }

    /// The flags that the architecture leaves undefined at the end of blocks.
    fn undefined_flags(&self, blocks: &[&Block]) -> u64 {
        let instructions = self.instructions_of(blocks);
        let undefined = instructions.iter().fold(0, |undefined, i| {
            let written = match may_leave_flags(i) {
                true => 0,
                false => i.rflags_written() | i.rflags_cleared() | i.rflags_set(),
            };
            undefined & !written | i.rflags_undefined()
        });
        let bits = [
            (iced_x86::RflagsBits::OF, crate::exec::flags::OF),
            (iced_x86::RflagsBits::SF, crate::exec::flags::SF),
            (iced_x86::RflagsBits::ZF, crate::exec::flags::ZF),
            (iced_x86::RflagsBits::AF, crate::exec::flags::AF),
            (iced_x86::RflagsBits::CF, crate::exec::flags::CF),
            (iced_x86::RflagsBits::PF, crate::exec::flags::PF),
        ];
        let named = bits.iter().filter(|(bit, _)| undefined & bit != 0);
        named.fold(0, |flags, (_, flag)| flags | flag) & ARITHMETIC
    }

    fn instructions_of(&self, blocks: &[&Block]) -> Vec<Instruction> {
        let mut instructions = Vec::new();
        for block in blocks {
            let bytes = self.blocks.bytes_of(block).unwrap_or_default();
            let at = self.native.page + u64::from(block.start);
            instructions.extend(Decoder::with_ip(64, &bytes, at, DecoderOptions::NONE));
        }
        instructions
    }

    /// Blocks, and the states before them, after them as interpreted, and after them as translated.
    fn describe(&self, blocks: &[&Block], [before, interpreted, translated]: [&Seen; 3]) -> String {
        let mut text = String::new();
        let mut formatter = FastFormatter::new();
        for i in self.instructions_of(blocks) {
            let mut line = String::new();
            formatter.format(&i, &mut line);
            let _ = writeln!(text, "  {:#x}  {line}", i.ip());
        }
        let names = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        let _ = writeln!(
            text,
            "  {:6} {:>18} {:>18} {:>18}",
            "", "before", "interpreted", "translated"
        );
        let rows = names
            .iter()
            .zip(0..)
            .map(|(name, at): (_, usize)| {
                (
                    *name,
                    before.regs[at],
                    interpreted.regs[at],
                    translated.regs[at],
                )
            })
            .chain([
                ("rip", before.rip, interpreted.rip, translated.rip),
                ("flags", before.flags, interpreted.flags, translated.flags),
                (
                    "system",
                    before.system_flags,
                    interpreted.system_flags,
                    translated.system_flags,
                ),
                (
                    "mxcsr",
                    before.float.mxcsr.into(),
                    interpreted.float.mxcsr.into(),
                    translated.float.mxcsr.into(),
                ),
            ]);
        for (name, before, interpreted, translated) in rows {
            let mark = if interpreted == translated {
                ""
            } else {
                "  <--"
            };
            let _ = writeln!(
                text,
                "  {name:6} {before:#18x} {interpreted:#18x} {translated:#18x}{mark}"
            );
        }
        for (at, (a, b)) in interpreted
            .float
            .xmm
            .iter()
            .zip(&translated.float.xmm)
            .enumerate()
        {
            if a != b {
                let _ = writeln!(text, "  xmm{at} {a:#x} {b:#x}");
            }
        }
        if interpreted.fault != translated.fault {
            let _ = writeln!(
                text,
                "  fault  {:x?} {:x?}",
                interpreted.fault, translated.fault
            );
        }
        text
    }
}

/// Does it leave flags as they were when it counts to nothing?
fn may_leave_flags(i: &Instruction) -> bool {
    use Mnemonic::*;
    let last = i.op_kind(i.op_count().saturating_sub(1));
    match i.mnemonic() {
        Shl | Sal | Shr | Sar | Rol | Ror | Shld | Shrd => last != OpKind::Immediate8,
        // By the operand's size and one as well.
        Rcl | Rcr => true,
        _ => i.has_rep_prefix() || i.has_repne_prefix(),
    }
}

/// The marks of the pages that were stored to.
fn marks(stores: &[Replaced]) -> impl Iterator<Item = &AtomicU8> {
    let runs = stores.chunk_by(|one, next| one.mark == next.mark);
    runs.filter_map(|run| run.first()).map(|replaced| {
        // SAFETY: marks are `PhysicalMemory`'s, which lives as long as the processor.
        #[expect(unsafe_code, reason = "the dirty log is reached by pointer")]
        unsafe {
            replaced.mark.as_ref()
        }
    })
}

/// The first byte that was to be stored and is something else.
fn differing(stores: &[Replaced]) -> Option<String> {
    if stores
        .iter()
        .all(|replaced| get(replaced.at) == replaced.stored)
    {
        return None;
    }
    // Of bytes that were stored more than once, the last counts: it is the one that was read first
    // when they were taken back.
    let mut last = std::collections::HashMap::new();
    for replaced in stores.iter().rev() {
        last.entry(replaced.at).or_insert(replaced.stored);
    }
    last.into_iter().find_map(|(at, stored)| {
        let now = get(at);
        (now != stored)
            .then(|| format!("a byte of RAM became {now:#x} instead of {stored:#x} ({at:?} here)"))
    })
}

fn get(at: *mut u8) -> u8 {
    // SAFETY: the journal has addresses of guest RAM, which lives as long as the processor.
    #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
    unsafe {
        u8::load(at)
    }
}

fn put(at: *mut u8, byte: u8) {
    // SAFETY: as above.
    #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
    unsafe {
        u8::store(at, byte);
    }
}
