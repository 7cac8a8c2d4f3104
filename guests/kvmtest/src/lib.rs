//! A tiny guest that proves an engine. It needs no toolchain: [`load`] writes its machine code, page
//! tables and descriptor tables into guest memory, [`boot_state`] is where it starts.
//!
//! It begins as PVH does (32-bit protected mode, flat, no paging), switches to long mode, and runs
//! one of two programs:
//! - [`Program::Count`]: in ring 3, writes a known page each round and reports every
//!   [`ROUNDS_PER_REPORT`] rounds by MMIO; checks what it reads ([`mmio_answer`]) and says so when
//!   that is wrong. [`dirty_pages`] predicts what it writes.
//! - [`Program::Interrupts`]: in ring 0, echoes what it reads from a port, then sleeps in HLT and
//!   reports each interrupt that arrives; on demand arms the TSC-deadline timer, or starts a second
//!   processor.
//!
//! [`pair`] is another guest, a kernel for whole machines: two processors that count and print.
//!
//! Data flows from here into guest memory and from the guest to whoever serves its I/O; knows no
//! engine.

mod assembler;
pub mod pair;
mod programs;

use std::collections::BTreeSet;

use dunlin_guest::{Memory, PageIndex};
use dunlin_x86::state::{Activity, CpuState, DescriptorTable, Segment, gpr, segment};
use vm_memory::{Bytes, GuestAddress};

/// Bytes of RAM that the guest needs.
pub const MEMORY: u64 = 8 << 20;

/// IN, 4 bytes, and then 2 bytes from [`PORT_ECHO`]: any answer.
pub const PORT_QUESTION: u16 = 0x514;
/// OUT, 4 bytes, then 2: the answers.
pub const PORT_ECHO: u16 = 0x518;
/// OUT, 1 byte: the vector of an interrupt that arrived.
pub const PORT_INTERRUPT: u16 = 0x520;
/// OUT, 1 byte: [`Program::Interrupts`] is ready.
pub const PORT_READY: u16 = 0x521;
/// OUT, 1 byte: the second processor runs.
pub const PORT_SECOND: u16 = 0x522;

/// 8-byte store: the number of rounds.
pub const MMIO_REPORT: u64 = 0xd000_0000;
/// 8-byte load: must answer [`mmio_answer`].
pub const MMIO_QUESTION: u64 = MMIO_REPORT + 8;
/// 8-byte store: an answer was wrong.
pub const MMIO_FAILED: u64 = MMIO_REPORT + 0x18;
/// 4-byte store after each report: a place for a doorbell.
pub const MMIO_DOORBELL: u64 = MMIO_REPORT + 0x10;

/// Rounds from one report to the next.
pub const ROUNDS_PER_REPORT: u64 = 256;
/// Pages that [`Program::Count`] writes, one a round.
pub const DATA_PAGES: u64 = 1024;
/// First of them.
pub const DATA: u64 = 4 << 20;
/// The page that holds the number of rounds and, 8 bytes on, the sum of all of them, which is
/// kept in an SSE register.
pub const COUNTER: u64 = 0x9000;

/// An interrupt whose handler only reports.
pub const VECTOR_PLAIN: u8 = 0x40;
/// Another; sent level-triggered.
pub const VECTOR_LEVEL: u8 = 0x41;
/// An interrupt whose handler arms the timer.
pub const VECTOR_ARM_TIMER: u8 = 0x42;
/// An interrupt whose handler starts processor 1.
pub const VECTOR_START_SECOND: u8 = 0x43;
/// The timer's interrupt.
pub const VECTOR_TIMER: u8 = 0x50;
/// TSC ticks from arming the timer to its interrupt.
pub const TIMER_TICKS: u32 = 2_000_000;

const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const PD_LOW: u64 = 0x4000;
const PD_MMIO: u64 = 0x5000;
const GDT: u64 = 0x6000;
const GDT_POINTER: u64 = 0x6100;
const IDT_POINTER: u64 = 0x6110;
const STACK_TOP: u64 = 0x8000;
const IDT: u64 = 0xa000;
/// Where the second processor starts, in real mode: below 1 MiB, on a page border.
const SECOND: u64 = 0xb000;
const BOOT: u64 = 0x1_0000;
const PROGRAM: u64 = 0x1_1000;

const CODE_64: u16 = 0x08;
const DATA_0: u16 = 0x10;
const DATA_3: u16 = 0x18 | 3;
const CODE_3: u16 = 0x20 | 3;

/// What the guest does once it is in long mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Counts, in ring 3.
    Count,
    /// Waits for interrupts, in ring 0.
    Interrupts,
}

/// What [`MMIO_QUESTION`] must answer after `rounds`.
pub fn mmio_answer(rounds: u64) -> u64 {
    !rounds
}

/// The pages that [`Program::Count`] writes in the rounds after `from`, up to and with `to`.
pub fn dirty_pages(from: u64, to: u64) -> BTreeSet<PageIndex> {
    let data = (from + 1..=to).map(|round| DATA / 4096 + round * 7 % DATA_PAGES);
    data.chain([COUNTER / 4096]).map(PageIndex).collect()
}

/// Pages that an engine may find written besides: the page tables, whose entries a processor may
/// mark as accessed (all are marked beforehand, yet some processors count a look as a store), the
/// GDT for the same reason, and ring 0's stack.
pub fn own_pages() -> BTreeSet<PageIndex> {
    let tables = PML4..=GDT;
    tables
        .step_by(4096)
        .chain([STACK_TOP - 4096])
        .map(|address| PageIndex(address / 4096))
        .collect()
}

/// Writes the guest into `memory`.
///
/// # Panics
/// When the memory is smaller than [`MEMORY`].
pub fn load(memory: &Memory, program: Program) {
    let write = |address: u64, bytes: &[u8]| {
        memory
            .mapping()
            .write_slice(bytes, GuestAddress(address))
            .expect("guest memory holds the test guest");
    };
    let entry = |address: u64, value: u64| write(address, &value.to_le_bytes());
    // A 64-bit interrupt gate for ring 0.
    let gate = |vector: u8, handler: u64| {
        let low = handler & 0xffff | u64::from(CODE_64) << 16 | 0x8e00 << 32;
        let at = IDT + u64::from(vector) * 16;
        entry(at, low | (handler >> 16 & 0xffff) << 48);
        entry(at + 8, handler >> 32);
    };
    // Present, writable, for users, accessed; in the leaves also dirty, 2 MiB.
    let (table, leaf) = (0x27, 0xe7);
    entry(PML4, PDPT | table);
    entry(PDPT, PD_LOW | table);
    entry(PDPT + 3 * 8, PD_MMIO | table);
    for index in 0..MEMORY >> 21 {
        entry(PD_LOW + index * 8, index << 21 | leaf);
    }
    let mmio_index = MMIO_REPORT >> 21 & 0x1ff;
    entry(PD_MMIO + mmio_index * 8, MMIO_REPORT & !0x1f_ffff | leaf);

    for (index, descriptor) in [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffffu64,
        0x00af_fb00_0000_ffff,
    ]
    .into_iter()
    .enumerate()
    {
        entry(GDT + index as u64 * 8, descriptor);
    }
    for (pointer, table, limit) in [(GDT_POINTER, GDT, 0x27u16), (IDT_POINTER, IDT, 0xfff)] {
        write(pointer, &limit.to_le_bytes());
        entry(pointer + 2, table);
    }
    write(BOOT, &programs::boot(program));
    match program {
        Program::Count => write(PROGRAM, &programs::count()),
        Program::Interrupts => {
            let (code, handlers) = programs::interrupts();
            write(PROGRAM, &code);
            for (vector, offset) in handlers {
                gate(vector, PROGRAM + offset as u64);
            }
            write(SECOND, &programs::second());
        }
    }
}

/// The state in which processor 0 starts, made from its reset state.
pub fn boot_state(reset: &CpuState) -> CpuState {
    let mut state = reset.clone();
    let flat = |selector, access| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
        unusable: false,
    };
    state.segments = [flat(DATA_0, 0xc093); 6];
    state.segments[segment::CS] = flat(CODE_64, 0xc09b);
    state.tr = Segment {
        limit: 0x67,
        ..flat(0, 0x8b)
    };
    state.gdtr = DescriptorTable {
        base: GDT,
        limit: 0x27,
    };
    state.idtr = DescriptorTable::default();
    state.gpr = [0; 16];
    state.gpr[gpr::RSP] = STACK_TOP;
    state.rip = BOOT;
    state.rflags = 2;
    state.cr0 = 0x11;
    state.cr3 = 0;
    state.cr4 = 0;
    state.msrs.efer = 0;
    state.activity = Activity::Running;
    state
}
