//! Runs an instruction on the software CPU: user mode, with the native side's addresses.
//!
//! Every exception leads through the IDT to an OUT to the port of its vector, at which a run ends. The
//! code behind loads the next input from a page of its own and returns to user mode, so that a run may
//! begin with the TLB as the one before left it.

#![expect(
    unsafe_code,
    reason = "hands out pointers to the pages that stand for RAM"
)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use dunlin_x86::cpuid::X86_64_V3;
use dunlin_x86::kvmclock::GuestClock;
use dunlin_x86::lapic::{InterruptRouter, Mailbox};
use dunlin_x86::memory::{PhysicalMemory, RamPage};
use dunlin_x86::state::{CpuState, DescriptorTable, Segment, gpr, segment};
use dunlin_x86::{CodeMap, Cpu, CpuConfig, Stop, Translation};

use crate::layout::*;

/// Page frames of the software CPU's memory.
mod frame {
    pub(crate) const ROOT: usize = 1;
    pub(crate) const LOW_DIRECTORIES: usize = 2;
    pub(crate) const LOW_DIRECTORY: usize = 3;
    pub(crate) const CODE_TABLE: usize = 4;
    pub(crate) const DATA_TABLE: usize = 5;
    pub(crate) const HIGH_DIRECTORIES: usize = 6;
    pub(crate) const HIGH_DIRECTORY: usize = 7;
    pub(crate) const HIGH_TABLE: usize = 8;
    pub(crate) const GDT: usize = 9;
    pub(crate) const IDT: usize = 10;
    pub(crate) const TASK: usize = 11;
    pub(crate) const STACK: usize = 12;
    pub(crate) const HANDLERS: usize = 13;
    pub(crate) const INPUT: usize = 14;
    pub(crate) const USER_CODE: usize = 16;
    pub(crate) const USER_DATA: usize = 32;
    pub(crate) const USER_STACK: usize = 34;
    pub(crate) const COUNT: usize = 35;
}

/// Where the kernel's pages are: page frame number times page size above it.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const HANDLER_BYTES: u64 = 16;
/// Where in the page of handlers the code is that loads an input.
const RESTART: usize = 0x800;
/// Where in the page of inputs the general registers are, and what IRETQ takes. XRSTOR's image is before.
const INPUT_GPR: usize = 0x400;
const INPUT_FRAME: usize = 0x500;
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED_DIRTY: u64 = 3 << 5;
const NO_EXECUTE: u64 = 1 << 63;

#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// Pages that both the processor and the test touch, by turns.
struct Ram {
    pages: NonNull<Page>,
    marks: Vec<AtomicU8>,
}

// SAFETY: the pages live until the process ends, and one thread uses them.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ram")
    }
}

impl Ram {
    fn new() -> Self {
        let pages: Box<[Page]> = (0..frame::COUNT).map(|_| Page([0; PAGE])).collect();
        let pages = NonNull::new(Box::leak(pages).as_mut_ptr()).expect("a box is not null");
        Self {
            pages,
            marks: (0..frame::COUNT).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    #[expect(
        clippy::mut_from_ref,
        reason = "shared with the processor, which does not run now"
    )]
    fn bytes(&self, first: usize, pages: usize) -> &mut [u8] {
        assert!(first + pages <= frame::COUNT);
        // SAFETY: within the pages; no other reference is alive while the caller has this one.
        unsafe {
            let start = self.pages.as_ptr().add(first).cast::<u8>();
            std::slice::from_raw_parts_mut(start, pages * PAGE)
        }
    }

    fn set_u64(&self, first: usize, index: usize, value: u64) {
        self.bytes(first, 1)[index * 8..index * 8 + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn u64(&self, first: usize, at: usize) -> u64 {
        let bytes = &self.bytes(first, 1)[at..at + 8];
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }
}

impl PhysicalMemory for Ram {
    fn ram_page(&self, frame: u64) -> Option<RamPage> {
        let index = usize::try_from(frame).ok()?;
        let mark = self.marks.get(index)?;
        // SAFETY: within the pages.
        let host = unsafe { self.pages.add(index) }.cast();
        Some(RamPage {
            host,
            mark: NonNull::from(mark),
        })
    }
}

#[derive(Debug)]
struct NoRouter;

impl InterruptRouter for NoRouter {
    fn send_ipi(&self, _from: u32, _icr: u64) {}
}

/// The software CPU with its memory.
pub(crate) struct Software {
    ram: Arc<Ram>,
    /// It has a TLB inside, too large for a few of them on a stack.
    cpu: Box<Cpu>,
    clock: Arc<GuestClock>,
    translation: Translation,
    state: CpuState,
}

fn segment(selector: u16, access: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
        unusable: false,
    }
}

fn processor(ram: &Arc<Ram>, clock: &Arc<GuestClock>, translation: Translation) -> Box<Cpu> {
    let config = CpuConfig {
        id: 0,
        cpus: 1,
        baseline: &X86_64_V3,
        clock: Arc::clone(clock),
        code: Arc::new(CodeMap::new()),
        mark: std::num::NonZeroU8::MIN,
        translation,
    };
    Box::new(Cpu::new(
        config,
        Arc::clone(ram) as Arc<dyn PhysicalMemory>,
        Arc::new(Mailbox::new(0)),
        Arc::new(NoRouter),
    ))
}

impl Software {
    pub(crate) fn new(translation: Translation, pages: CodePages) -> Self {
        let ram = Arc::new(Ram::new());
        page_tables(&ram, pages);
        descriptors(&ram);
        let clock = Arc::new(GuestClock::new(1_000_000));
        let mut cpu = processor(&ram, &clock, translation);
        let state = user_state(&mut cpu);
        Self {
            ram,
            cpu,
            clock,
            translation,
            state,
        }
    }

    /// Replaces the instructions. The processor is made anew, and with it what it had decoded.
    pub(crate) fn set_code(&mut self, code: &[u8]) {
        self.ram
            .bytes(frame::USER_CODE, CODE_BYTES / PAGE)
            .copy_from_slice(code);
        self.cpu = processor(&self.ram, &self.clock, self.translation);
    }

    /// The instructions, to be written before [`Self::run`], which notices.
    pub(crate) fn code(&mut self) -> &mut [u8] {
        self.ram.bytes(frame::USER_CODE, CODE_BYTES / PAGE)
    }

    /// Data and stack.
    pub(crate) fn scratch(&mut self) -> [&mut [u8]; 2] {
        let both = self.ram.bytes(frame::USER_DATA, 3);
        let (data, stack) = both.split_at_mut(DATA_BYTES);
        [data, stack]
    }

    /// Runs from `input.rip` to the next exception, with nothing in the TLB.
    pub(crate) fn run(&mut self, input: &Machine) -> (Machine, End) {
        let state = &mut self.state;
        state.gpr = input.gpr;
        state.rip = input.rip;
        state.rflags = input.rflags;
        state.xsave[..512].copy_from_slice(&input.float);
        state.xsave[576..832].copy_from_slice(&input.upper);
        if let Err(error) = self.cpu.set_state(state) {
            panic!("state refused: {error} {input:x?}", input = input.gpr);
        }
        self.run_to_exception()
    }

    /// The same behind another run, with what that left in the TLB.
    pub(crate) fn run_again(&mut self, input: &Machine) -> (Machine, End) {
        let page = self.ram.bytes(frame::INPUT, 1);
        page[..512].copy_from_slice(&input.float);
        page[512] = 7;
        page[576..832].copy_from_slice(&input.upper);
        let mut put = |at: usize, value: u64| {
            page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        };
        for (index, value) in input.gpr.into_iter().enumerate() {
            put(INPUT_GPR + 8 * index, value);
        }
        let stack = input.gpr[gpr::RSP];
        let frame = [
            input.rip,
            USER_CS.into(),
            input.rflags,
            stack,
            USER_SS.into(),
        ];
        for (index, value) in frame.into_iter().enumerate() {
            put(INPUT_FRAME + 8 * index, value);
        }
        self.cpu.complete_write();
        self.run_to_exception()
    }

    /// How the interpreter and translated code differ, where a run ended with that.
    pub(crate) fn difference(&self) -> Option<&str> {
        self.cpu.difference()
    }

    fn run_to_exception(&mut self) -> (Machine, End) {
        let vector = match self.cpu.run() {
            Stop::PortWrite { port, .. } => port as u8,
            Stop::Differs => return (Machine::ZERO, End::Differs),
            other => panic!("unexpected stop {other:?} at {:#x}", self.cpu.state().rip),
        };
        let after = self.cpu.state();
        let mut output = Machine {
            float: [0; 512],
            gpr: after.gpr,
            rflags: 0,
            rip: 0,
            upper: [0; 256],
        };
        output.float.copy_from_slice(&after.xsave[..512]);
        output.upper.copy_from_slice(&after.xsave[576..832]);
        let mut at = (after.gpr[gpr::RSP] as usize) % PAGE;
        let mut code = 0;
        if matches!(vector, 8 | 10..=14 | 17) {
            code = self.ram.u64(frame::STACK, at);
            at += 8;
        }
        output.rip = self.ram.u64(frame::STACK, at);
        output.rflags = self.ram.u64(frame::STACK, at + 16);
        output.gpr[gpr::RSP] = self.ram.u64(frame::STACK, at + 24);
        let end = match vector {
            3 => End::At(output.rip - 1),
            vector => End::Fault {
                vector,
                code,
                address: if vector == 14 { after.cr2 } else { 0 },
            },
        };
        (output, end)
    }
}

fn page_tables(ram: &Ram, pages: CodePages) {
    let entry = |frame: usize, bits: u64| (frame * PAGE) as u64 | bits | PRESENT | ACCESSED_DIRTY;
    let index = |address: u64, level: u32| (address >> (12 + 9 * level)) as usize & 511;
    let table = USER | WRITABLE;
    ram.set_u64(frame::ROOT, 0, entry(frame::LOW_DIRECTORIES, table));
    ram.set_u64(
        frame::LOW_DIRECTORIES,
        0,
        entry(frame::LOW_DIRECTORY, table),
    );
    ram.set_u64(
        frame::LOW_DIRECTORY,
        index(CODE, 1),
        entry(frame::CODE_TABLE, table),
    );
    ram.set_u64(
        frame::LOW_DIRECTORY,
        index(DATA, 1),
        entry(frame::DATA_TABLE, table),
    );
    let code = match pages {
        CodePages::Read => USER,
        CodePages::Write => USER | WRITABLE,
    };
    for page in 0..CODE_BYTES / PAGE {
        let place = index(CODE, 0) + page;
        ram.set_u64(
            frame::CODE_TABLE,
            place,
            entry(frame::USER_CODE + page, code),
        );
    }
    let data = USER | WRITABLE | NO_EXECUTE;
    for page in 0..DATA_BYTES / PAGE {
        let place = index(DATA, 0) + page;
        ram.set_u64(
            frame::DATA_TABLE,
            place,
            entry(frame::USER_DATA + page, data),
        );
    }
    ram.set_u64(
        frame::DATA_TABLE,
        index(STACK, 0),
        entry(frame::USER_STACK, data),
    );
    ram.set_u64(frame::ROOT, 256, entry(frame::HIGH_DIRECTORIES, WRITABLE));
    ram.set_u64(
        frame::HIGH_DIRECTORIES,
        0,
        entry(frame::HIGH_DIRECTORY, WRITABLE),
    );
    ram.set_u64(frame::HIGH_DIRECTORY, 0, entry(frame::HIGH_TABLE, WRITABLE));
    for kernel in frame::GDT..=frame::INPUT {
        ram.set_u64(frame::HIGH_TABLE, kernel, entry(kernel, WRITABLE));
    }
}

fn descriptors(ram: &Ram) {
    let at = |frame: usize| KERNEL + (frame * PAGE) as u64;
    ram.set_u64(frame::GDT, 2, 0x00af_9b00_0000_ffff);
    ram.set_u64(frame::GDT, 5, 0x00cf_f300_0000_ffff);
    ram.set_u64(frame::GDT, 6, 0x00af_fb00_0000_ffff);
    // RSP0.
    let stack = at(frame::STACK) + PAGE as u64 - 16;
    ram.bytes(frame::TASK, 1)[4..12].copy_from_slice(&stack.to_le_bytes());
    ram.bytes(frame::TASK, 1)[102..104].copy_from_slice(&0x68_u16.to_le_bytes());
    for vector in 0..32 {
        let handler = at(frame::HANDLERS) + vector * HANDLER_BYTES;
        let level: u64 = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low = handler & 0xffff
            | 0x10 << 16
            | 0xe << 40
            | level << 45
            | 1 << 47
            | (handler >> 16 & 0xffff) << 48;
        ram.set_u64(frame::IDT, vector as usize * 2, low);
        ram.set_u64(frame::IDT, vector as usize * 2 + 1, handler >> 32);
        let handler = (vector * HANDLER_BYTES) as usize;
        // OUT, and a jump to the restart.
        let mut code = [0xe6, vector as u8, 0xe9, 0, 0, 0, 0];
        let distance = RESTART - (handler + code.len());
        code[3..].copy_from_slice(&(distance as u32).to_le_bytes());
        ram.bytes(frame::HANDLERS, 1)[handler..handler + code.len()].copy_from_slice(&code);
    }
    let restart = restart(at(frame::INPUT));
    ram.bytes(frame::HANDLERS, 1)[RESTART..RESTART + restart.len()].copy_from_slice(&restart);
}

/// Code that loads an input and returns to user mode.
fn restart(input: u64) -> Vec<u8> {
    // MOV R15, input.
    let mut code = vec![0x49, 0xbf];
    code.extend_from_slice(&input.to_le_bytes());
    // MOV EAX, 7; XOR EDX, EDX; XRSTOR64 [R15].
    code.extend_from_slice(&[0xb8, 7, 0, 0, 0, 0x31, 0xd2, 0x49, 0x0f, 0xae, 0x2f]);
    // MOV register, [R15 + its place]; the base comes last.
    let load = |register: usize| {
        let high = register as u8 >> 3;
        let mut load = vec![0x49 | high << 2, 0x8b, 0x87 | (register as u8 & 7) << 3];
        load.extend_from_slice(&((INPUT_GPR + 8 * register) as u32).to_le_bytes());
        load
    };
    for register in (0..15).filter(|register| *register != gpr::RSP) {
        code.extend_from_slice(&load(register));
    }
    // LEA RSP, [R15 + frame].
    code.extend_from_slice(&[0x49, 0x8d, 0xa7]);
    code.extend_from_slice(&(INPUT_FRAME as u32).to_le_bytes());
    code.extend_from_slice(&load(15));
    code.extend_from_slice(&[0x48, 0xcf]);
    code
}

/// 64-bit user mode.
fn user_state(cpu: &mut Cpu) -> CpuState {
    let mut state = cpu.state();
    let at = |frame: usize| KERNEL + (frame * PAGE) as u64;
    state.segments = [Segment {
        unusable: true,
        ..Segment::default()
    }; 6];
    state.segments[segment::CS] = segment(USER_CS, 0xa0fb);
    state.segments[segment::SS] = segment(USER_SS, 0xc0f3);
    state.tr = Segment {
        base: at(frame::TASK),
        limit: 0x67,
        ..segment(0x40, 0x8b)
    };
    state.ldtr = Segment {
        unusable: true,
        ..Segment::default()
    };
    state.gdtr = DescriptorTable {
        base: at(frame::GDT),
        limit: 0x7f,
    };
    state.idtr = DescriptorTable {
        base: at(frame::IDT),
        limit: 0x1ff,
    };
    // Paging, alignment checks, write protection, native x87 errors; as Linux sets them.
    state.cr0 = 0x8005_0033;
    state.cr3 = (frame::ROOT * PAGE) as u64;
    // Physical address extension, FXSAVE, SSE exceptions, XSAVE.
    state.cr4 = 0x4_0620;
    // SYSCALL, long mode, no-execute.
    state.msrs.efer = 0xd01;
    state.xcr0 = 7;
    state.xsave = vec![0; 832];
    state.xsave[512] = 7;
    state
}
