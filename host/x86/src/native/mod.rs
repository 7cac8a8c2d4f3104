//! Hot 64-bit code as the host's own instructions.
//!
//! A block that has run often is translated: guest registers live in host registers, the guest's
//! arithmetic flags in the host's. An instruction is the guest's own, with its registers renamed
//! and its memory operand replaced by an address that an inline look-up in the software TLB gave.
//! Whatever translated code does not do itself — a miss in the TLB, a device, a rare instruction, a
//! fault — it leaves to the interpreter, one instruction at a time: at each instruction's border
//! the guest's state is complete, so the interpreter can take over there and give back behind it.
//!
//! | guest | host |
//! |---|---|
//! | RAX RDX RBX RBP RSI RDI R8 R9 R12 | the same |
//! | RCX, RSP | R13, R14 |
//! | R10 R11 R13 R14 R15 | in memory |
//! | arithmetic flags | the same: nothing that is added to the guest's code changes a flag |
//!
//! RCX, R10 and R11 are free, R15 leads to the processor ([`Context`]), RSP is the host's stack.
//!
//! Code is linked directly within a page, whose blocks are dropped together. All else goes through
//! a table of jumps by linear address, whose entries are valid in one context (see
//! [`BlockCache`](crate::decode::BlockCache)).
//! Calls and returns are the host's own as well; on the host's stack lie the calls that are open, until
//! something leaves.

mod avx;
mod branches;
mod code;
mod emit;
#[expect(unsafe_code, reason = "registers are set by hand")]
mod enter;
mod made;
mod operands;
mod plain;
mod sharing;
mod sse;
mod stack;
mod step;
mod system;
mod trace;
mod translate;
mod verify;

use std::mem::offset_of;

use iced_x86::Encoder;

use crate::cpu::{Cpu, Translation};
use crate::decode::Block;
use crate::exec::flags::{ARITHMETIC, Flags, OF};
use crate::exec::op::Op;
pub(crate) use code::CodeMemory;
use emit::Assembler;
pub(crate) use emit::Part;
pub(crate) use step::ALONE;
pub(crate) use translate::is_known;
pub(crate) use verify::Replaced;

/// Bytes for translated code, half of them for what runs often. All of it is dropped when either half
/// has no room for another block.
const CODE: usize = 64 << 20;
/// Jumps that are known.
pub(crate) const JUMPS: usize = 1 << 15;

/// What translated code reaches by R15; [`enter`] has a few more.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Context {
    /// The linear page that runs.
    pub(crate) page: u64,
    /// Which bits of a linear address say where it is in the TLB.
    tlb_bits: u64,
    /// Where a hash goes to lead into the table of jumps.
    jump_bits: u64,
    /// Not zero: an SSE instruction raises an exception here.
    sse_blocked: u64,
    /// Not zero: rounding is not that of the host, or exceptions are not masked.
    arithmetic_blocked: u64,
    /// For whoever needs it between two instructions.
    scratch: [u64; 3],
    /// OF in bit 0, SF, ZF, AF, PF and CF in bits 8 to 15 as in RFLAGS.
    flags: u16,
    /// Floating-point arithmetic was done, whose flags are in the host's MXCSR.
    arithmetic_done: u8,
    /// Where translated code left.
    exit: u32,
    /// Not zero: an AVX instruction raises an exception here.
    avx_blocked: u64,
    /// The low five bits.
    low_bits_wide: u64,
    /// The low four bits, and the signs of 32 and of 64 bits.
    low_bits: u64,
    sign_bits: [u64; 2],
    /// DF of RFLAGS, all but IF, and the arithmetic flags.
    direction_bit: u64,
    not_interrupt_bit: u64,
    arithmetic_bits: u64,
    /// System flags that PUSHF shows.
    pushed_bits: u64,
    /// Bits of a bit's offset: too far, which unit it is in, and where in that, for units of 32 and 64
    /// bits.
    bit_far: [u64; 2],
    bit_unit: [u64; 2],
    bit_within: [u64; 2],
    /// Not zero: an interrupt waits for the flag that permits it.
    due: u64,
    /// The host's stack as translated code was entered with it.
    host_stack: u64,
    /// Where translated code returns to that was not called by any.
    bottom: u64,
    not_direction_bit: u64,
    /// Where the host has bytes that several operands of a block share a look for, and the mark of their
    /// page.
    shared: [[u64; 2]; sharing::SLOTS],
}

impl Context {
    pub(crate) fn new() -> Self {
        Self {
            page: 0,
            tlb_bits: crate::mmu::TLB_BITS,
            jump_bits: ((JUMPS - 1) * size_of::<KnownJump>()) as u64,
            avx_blocked: 0,
            low_bits_wide: 31,
            low_bits: 15,
            sign_bits: [1 << 31, 1 << 63],
            direction_bit: crate::exec::flags::DF,
            not_interrupt_bit: !crate::exec::flags::IF,
            arithmetic_bits: ARITHMETIC,
            pushed_bits: crate::exec::flags::ALL
                & !(crate::exec::flags::RF | crate::exec::flags::VM),
            bit_far: [1 << 31, !0x7fff_ffff],
            bit_unit: [0x7fff_ffe0, 0x7fff_ffc0],
            bit_within: [31, 63],
            due: 0,
            host_stack: 0,
            bottom: 0,
            not_direction_bit: !crate::exec::flags::DF,
            sse_blocked: 0,
            arithmetic_blocked: 0,
            scratch: [0; 3],
            shared: [[0; 2]; sharing::SLOTS],
            flags: 0,
            arithmetic_done: 0,
            exit: 0,
        }
    }

    /// An interrupt waits, or none does, for STI to look at.
    pub(crate) fn set_due(&mut self, due: bool) {
        self.due = due.into();
    }

    fn set_flags(&mut self, flags: Flags) {
        let rflags = flags.to_rflags();
        self.flags = (rflags as u16 & 0xff) << 8 | u16::from(rflags & OF != 0);
    }

    fn flags(&self) -> Flags {
        let overflow = if self.flags & 1 != 0 { OF } else { 0 };
        Flags::from_rflags(u64::from(self.flags >> 8) & ARITHMETIC | overflow)
    }
}

/// From R15 to a general register or another slot.
const fn slot_at(slot: u8) -> i32 {
    slot as i32 * 8 + offset_of!(Cpu, regs) as i32 - enter::BIAS as i32
}

/// A jump by its linear address.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct KnownJump {
    /// The address, negated.
    linear: u64,
    /// The context in which it is valid, negated. Compared by itself: a guest may jump to addresses
    /// that are not canonical, so that a sum of both would be met by others.
    context: u64,
    code: *const u8,
    page: u64,
}

impl KnownJump {
    pub(crate) const NONE: Self = Self {
        linear: 1,
        // No context is one.
        context: 1,
        code: std::ptr::null(),
        page: 0,
    };

    pub(crate) fn new(linear: u64, context: u64, code: *const u8) -> Self {
        Self {
            linear: linear.wrapping_neg(),
            context: context.wrapping_neg(),
            code,
            page: linear & !crate::mmu::PAGE_OFFSET,
        }
    }

    /// Where the jump to a linear address is in the table: translated code works it out as well. The
    /// host has SSE4.2, as any that translates.
    pub(crate) fn index(linear: u64) -> usize {
        // SAFETY: see above.
        #[expect(unsafe_code, reason = "the instruction that hashes")]
        let hash = unsafe { hash(linear) };
        hash as usize % JUMPS
    }
}

#[target_feature(enable = "sse4.2")]
fn hash(linear: u64) -> u64 {
    std::arch::x86_64::_mm_crc32_u64(0, linear)
}

/// A place where translated code leaves.
#[derive(Debug, Clone, Copy)]
struct Leaving {
    block: *const Block,
    kind: Kind,
}

/// Why it leaves.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Something is to be looked at; the block has not begun.
    Look,
    /// To another block of the page, at this offset in it. `place` is the jump to be linked.
    /// `calls`: it is a call, each of which takes from the host's stack, so that none may pass over the
    /// look whether something is due, which gives it back.
    Link {
        link: u8,
        offset: u16,
        calls: bool,
        place: u32,
    },
    /// To an offset from the page's beginning, out of the page.
    Away { offset: i32 },
    /// The interpreter is to do an instruction: operations of the block, and where the code goes on
    /// behind them.
    Step { op: u16, count: u16, resume: u32 },
}

/// Translates, and has what was translated.
pub(crate) struct Translator {
    /// `None`: this host cannot, or nothing is to be translated.
    memory: Option<CodeMemory>,
    /// Runs of a block after which it is translated.
    pub(crate) after: u32,
    leavings: Vec<Leaving>,
    made: made::Made,
    traces: trace::Traces,
    /// Where a return goes for which no call is known, and where that is done by the table.
    bottom: u64,
    by_table: usize,
    assembler: Assembler,
    encoder: Encoder,
    /// Operations that the interpreter does one at a time.
    step: Box<[Op; step::MOST]>,
    /// There was no room for a block.
    full: bool,
    /// Everything is interpreted as well.
    pub(crate) verifies: bool,
    /// Runs that came to the same end.
    pub(crate) verified: u64,
    /// The first that did not.
    pub(crate) difference: Option<String>,
    /// What a journal was, for the next.
    spare_journal: Vec<Replaced>,
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator")
            .field("memory", &self.memory)
            .field("leavings", &self.leavings.len())
            .finish_non_exhaustive()
    }
}

#[expect(
    unsafe_code,
    reason = "the processor is made on one thread and run on another"
)]
// SAFETY: the pointers lead to blocks that the same processor owns.
unsafe impl Send for Translator {}

impl Translator {
    pub(crate) fn new(translation: Translation) -> Self {
        let (after, wanted) = match translation {
            Translation::Never => (0, false),
            Translation::After(runs) | Translation::Verified(runs) => (runs.get(), true),
        };
        let able = wanted
            && std::arch::is_x86_feature_detected!("bmi2")
            && std::arch::is_x86_feature_detected!("sse4.2")
            && std::arch::is_x86_feature_detected!("popcnt");
        let memory = able.then(|| CodeMemory::new(CODE));
        let memory = memory.and_then(|memory| match memory {
            Ok(memory) => Some(memory),
            Err(error) => {
                tracing::warn!(%error, "no memory for translated code: the processor interprets");
                None
            }
        });
        let mut translator = Self {
            memory,
            after,
            leavings: Vec::new(),
            made: made::Made::default(),
            traces: trace::Traces::default(),
            bottom: 0,
            by_table: 0,
            assembler: Assembler::default(),
            encoder: Encoder::new(64),
            step: Box::new(step::no_operations()),
            full: false,
            verifies: matches!(translation, Translation::Verified(_)),
            verified: 0,
            difference: None,
            spare_journal: Vec::new(),
        };
        translator.assembler.set_loops(loop_is_quick());
        translator.begin();
        translator
    }

    /// Has things looked for as on other hosts.
    #[cfg(test)]
    pub(crate) fn look_as_elsewhere(&mut self) {
        self.assembler.set_loops(!loop_is_quick());
        self.clear();
    }

    /// Writes what all code needs.
    fn begin(&mut self) {
        let Some(memory) = &mut self.memory else {
            return;
        };
        // MOVABS R11, leave; JMP R11.
        let mut way_out = vec![0x49, 0xbb];
        let leave = enter::leave as unsafe extern "sysv64" fn();
        way_out.extend_from_slice(&(leave as usize as u64).to_le_bytes());
        way_out.extend_from_slice(&[0x41, 0xff, 0xe3]);
        let at = memory.append(Part::Often, &way_out);
        debug_assert_eq!(at, Some(WAY_OUT), "the first that is written");
        let start = memory.next(Part::Often);
        let asm = &mut self.assembler;
        asm.begin(0);
        let places = branches::write_returns(asm, start);
        let at = memory.append(Part::Often, asm.bytes(Part::Often));
        debug_assert_eq!(at, Some(start), "where it was made for");
        self.bottom = memory.address(start + places.bottom) as u64;
        self.by_table = start + places.by_table;
    }

    /// Is there any translated code?
    #[cfg(test)]
    pub(crate) fn has_code(&self) -> bool {
        !self.leavings.is_empty()
    }

    /// Puts other bytes in the place of some of the code; false when they are not there.
    #[cfg(test)]
    pub(crate) fn spoil(&mut self, old: &[u8], new: &[u8]) -> bool {
        let memory = self.memory.as_mut();
        memory.is_some_and(|memory| memory.spoil(old, new))
    }

    /// Shall all translated code be dropped, to make room?
    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    /// Forgets all code. No block refers to it any more, and none of it runs.
    pub(crate) fn clear(&mut self) {
        if let Some(memory) = &mut self.memory {
            memory.clear();
        }
        self.leavings.clear();
        self.made.clear();
        self.traces.clear();
        self.full = false;
        self.begin();
    }

    fn address(&self, offset: u32) -> *const u8 {
        self.memory
            .as_ref()
            .map_or(std::ptr::null(), |memory| memory.address(offset as usize))
    }
}

/// Is LOOP one operation of the host? It is on AMD's processors; on Intel's, published tables say, it is
/// seven and more.
fn loop_is_quick() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    matches!(name.as_flattened(), b"AuthenticAMD" | b"HygonGenuine")
}

/// Where the code is that leaves.
const WAY_OUT: usize = 0;
