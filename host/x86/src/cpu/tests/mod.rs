//! Small machine-code programs, and what the processor makes of them.

mod access;
mod avx;
mod branches;
mod calls;
mod code;
mod events;
mod hot;
mod kernel;
mod lockstep;
mod modes;
mod paging;
#[cfg(target_arch = "x86_64")]
mod programs;
mod robust;
mod sharing;
mod strings;
mod traces;
mod x87;

use std::num::{NonZeroU8, NonZeroU32};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use iced_x86::code_asm::CodeAssembler;

use super::{Cpu, CpuConfig, Stop, Translation};
use crate::cpuid::{self, Baseline};
use crate::kvmclock::GuestClock;
use crate::lapic::{InterruptRouter, Mailbox};
use crate::memory::{PhysicalMemory, RamPage};
use crate::mmu::CodeMap;
use crate::state::{Activity, CpuState, DescriptorTable, Segment, segment};

const RAM: u64 = 4 << 20;
/// What the processor leaves in the dirty log.
const MARK: NonZeroU8 = NonZeroU8::new(7).unwrap();
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
/// Identity map of the first 2 MiB in pages of 4 KiB; the rest of the first gigabyte in large
/// pages, so that MMIO above RAM can be reached.
const PML4: u64 = 0x10000;
const PDPT: u64 = 0x11000;
const PD: u64 = 0x12000;
const PT: u64 = 0x13000;
/// Handlers of vectors, 16 bytes each; each is a HLT.
const HANDLERS: u64 = 0x20000;
const STACK: u64 = 0x80000;
const KERNEL_STACK: u64 = 0x70000;
const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x18_0000;
/// Physical address space without RAM.
const MMIO: u64 = 0x1000_0000;

/// Bits of a page table's entry.
const PRESENT: u64 = 1;
const PRESENT_WRITABLE: u64 = 3;

const KERNEL_CS: u16 = 0x08;
const KERNEL_SS: u16 = 0x10;
const USER_CS: u16 = 0x2b;
const USER_SS: u16 = 0x23;
const CODE_32: u16 = 0x38;
const DATA_32: u16 = 0x40;

/// Zeros, and a page behind them that nobody may touch.
#[derive(Debug)]
struct Words(NonNull<AtomicU64>);

#[expect(unsafe_code, reason = "a page without access is mapped by hand")]
impl Words {
    fn new() -> Self {
        use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect};
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let length = RAM as usize + 4096;
        // SAFETY: a new mapping touches no other; its last page is not part of the slice.
        let start = unsafe {
            let nowhere = std::ptr::null_mut();
            let start = mmap_anonymous(nowhere, length, rights, MapFlags::PRIVATE).unwrap();
            mprotect(start.byte_add(RAM as usize), 4096, MprotectFlags::empty()).unwrap();
            start
        };
        Self(NonNull::new(start.cast()).unwrap())
    }
}

#[expect(unsafe_code, reason = "the mapping is reached by pointer")]
impl std::ops::Deref for Words {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped until `self` is dropped.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), RAM as usize / 8) }
    }
}

#[expect(unsafe_code, reason = "rustix unmaps by address")]
impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nothing refers to it any more.
        unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), RAM as usize + 4096) }.unwrap();
    }
}

#[expect(unsafe_code, reason = "the pointer is an owned mapping")]
// SAFETY: atomics that any thread may reach.
unsafe impl Send for Words {}
#[expect(unsafe_code, reason = "the pointer is an owned mapping")]
// SAFETY: as above.
unsafe impl Sync for Words {}

#[derive(Debug)]
struct Ram {
    words: Words,
    marks: Vec<AtomicU8>,
}

impl Ram {
    fn new() -> Self {
        Self {
            words: Words::new(),
            marks: (0..RAM / 4096).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            let at = at as usize + index;
            let shift = at % 8 * 8;
            let word = &self.words[at / 8];
            let old = word.load(Ordering::Relaxed);
            word.store(
                old & !(0xff << shift) | u64::from(*byte) << shift,
                Ordering::Relaxed,
            );
        }
    }

    fn set(&self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    fn get(&self, at: u64) -> u64 {
        let bytes = std::array::from_fn(|index| {
            let at = at as usize + index;
            (self.words[at / 8].load(Ordering::Relaxed) >> (at % 8 * 8)) as u8
        });
        u64::from_le_bytes(bytes)
    }

    fn take_mark(&self, at: u64) -> u8 {
        self.marks[(at / 4096) as usize].swap(0, Ordering::Relaxed)
    }
}

impl PhysicalMemory for Ram {
    fn ram_page(&self, frame: u64) -> Option<RamPage> {
        let mark = self.marks.get(usize::try_from(frame).ok()?)?;
        Some(RamPage {
            host: NonNull::from(&self.words[frame as usize * 512]).cast(),
            mark: NonNull::from(mark),
        })
    }
}

#[derive(Debug, Default)]
struct Sent(Mutex<Vec<u64>>);

impl InterruptRouter for Sent {
    fn send_ipi(&self, _from: u32, icr: u64) {
        self.0.lock().unwrap().push(icr);
    }
}

struct Machine {
    ram: Arc<Ram>,
    code: Arc<CodeMap>,
    mailbox: Arc<Mailbox>,
    sent: Arc<Sent>,
    cpu: Cpu,
}

impl Machine {
    /// A processor after reset.
    fn reset(id: u32) -> Self {
        Self::beside(id, Arc::new(Ram::new()), Arc::new(CodeMap::new()))
    }

    fn beside(id: u32, ram: Arc<Ram>, code: Arc<CodeMap>) -> Self {
        Self::of(&cpuid::X86_64_V2, id, ram, code)
    }

    fn of(baseline: &'static Baseline, id: u32, ram: Arc<Ram>, code: Arc<CodeMap>) -> Self {
        // These tests are there three times. What ran only once leads nowhere yet.
        let runs = match module_path!() {
            path if path.ends_with("translated") => NonZeroU32::new(1),
            path if path.ends_with("translated_in_traces") => NonZeroU32::new(2),
            _ => None,
        };
        let translation = runs.map_or(Translation::Never, Translation::After);
        Self::made((baseline, translation), id, ram, code)
    }

    fn made(
        (baseline, translation): (&'static Baseline, Translation),
        id: u32,
        ram: Arc<Ram>,
        code: Arc<CodeMap>,
    ) -> Self {
        let mailbox = Arc::new(Mailbox::new(id));
        let sent = Arc::new(Sent::default());
        let config = CpuConfig {
            id,
            cpus: 2,
            baseline,
            clock: Arc::new(GuestClock::new(2_000_000)),
            code: Arc::clone(&code),
            mark: MARK,
            translation,
        };
        let memory = Arc::clone(&ram) as Arc<dyn PhysicalMemory>;
        let router = Arc::clone(&sent) as Arc<dyn InterruptRouter>;
        let cpu = Cpu::new(config, memory, Arc::clone(&mailbox), router);
        Self {
            ram,
            code,
            mailbox,
            sent,
            cpu,
        }
    }

    /// 64-bit mode at privilege 0, about to run `code`.
    fn long(code: &[u8]) -> Self {
        let mut machine = Self::reset(0);
        machine.lay_tables();
        machine.enter_long(code);
        machine
    }

    /// The same with code from the assembler.
    fn assembled(build: impl FnOnce(&mut CodeAssembler)) -> Self {
        Self::long(&assemble(64, CODE, build))
    }

    fn lay_tables(&self) {
        let ram = &self.ram;
        ram.set(PML4, PDPT | 7);
        ram.set(PDPT, PD | 7);
        ram.set(PD, PT | 7);
        for page in 0..512 {
            ram.set(PT + page * 8, page << 12 | 7);
        }
        for large in 1..512 {
            ram.set(PD + large * 8, large << 21 | 0x87);
        }
        for (index, descriptor) in [
            0,
            0x00af_9b00_0000_ffffu64,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            // The task state segment at 0x30 takes two entries; see below.
            0,
            0x00cf_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
        ]
        .into_iter()
        .enumerate()
        {
            ram.set(GDT + index as u64 * 8, descriptor);
        }
        for vector in 0..256 {
            self.set_gate(vector, HANDLERS + vector * 16, 0);
            ram.write(HANDLERS + vector * 16, &[0xf4]);
        }
        ram.set(TSS + 4, KERNEL_STACK);
    }

    fn set_gate(&self, vector: u64, target: u64, stack: u64) {
        let low = target & 0xffff
            | u64::from(KERNEL_CS) << 16
            | stack << 32
            | 0xee00 << 32
            | (target >> 16 & 0xffff) << 48;
        self.ram.set(IDT + vector * 16, low);
        self.ram.set(IDT + vector * 16 + 8, target >> 32);
    }

    fn enter_long(&mut self, code: &[u8]) {
        self.ram.write(CODE, code);
        let mut state = self.cpu.state();
        let data = Segment {
            selector: KERNEL_SS,
            base: 0,
            limit: u32::MAX,
            access: 0xc093,
            unusable: false,
        };
        state.segments = [data; 6];
        state.segments[segment::CS] = Segment {
            selector: KERNEL_CS,
            access: 0xa09b,
            ..data
        };
        state.tr = Segment {
            selector: 0x30,
            base: TSS,
            limit: 0x67,
            access: 0x8b,
            unusable: false,
        };
        state.gdtr = DescriptorTable {
            base: GDT,
            limit: 0x4f,
        };
        state.idtr = DescriptorTable {
            base: IDT,
            limit: 0xfff,
        };
        state.cr0 = 0x8001_0031;
        state.cr3 = PML4;
        state.cr4 = 0x6a0;
        state.msrs.efer = 0xd01;
        state.activity = Activity::Running;
        state.rip = CODE;
        state.rflags = 2;
        state.gpr[4] = STACK;
        self.cpu.set_state(&state).unwrap();
    }

    /// Changes the state.
    fn with(mut self, change: impl FnOnce(&mut CpuState)) -> Self {
        let mut state = self.cpu.state();
        change(&mut state);
        self.cpu.set_state(&state).unwrap();
        self
    }

    /// The handler of `vector` gets a stack of its own.
    fn on_another_stack(self, vector: u64) -> Self {
        self.ram.set(TSS + 36, KERNEL_STACK);
        self.set_gate(vector, HANDLERS + vector * 16, 1);
        self
    }

    /// At privilege 3.
    fn user(self) -> Self {
        self.with(|state| {
            let data = Segment {
                selector: USER_SS,
                base: 0,
                limit: u32::MAX,
                access: 0xc0f3,
                unusable: false,
            };
            state.segments = [data; 6];
            state.segments[segment::CS] = Segment {
                selector: USER_CS,
                access: 0xa0fb,
                ..data
            };
        })
    }

    /// Maps a page to itself with these bits, or not at all.
    fn map(&self, address: u64, bits: u64) {
        let page = address & !0xfff;
        let entry = if bits == 0 { 0 } else { page | bits };
        self.ram.set(PT + (page >> 12) * 8, entry);
    }

    /// Runs to HLT.
    fn halt(&mut self) -> CpuState {
        assert_eq!(self.cpu.run(), Stop::Halted);
        self.cpu.state()
    }

    /// Runs what has no end until it is kicked.
    fn run_until_kicked(&mut self) {
        let mailbox = Arc::clone(&self.mailbox);
        let kicker = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(30));
            mailbox.kick();
        });
        assert_eq!(self.cpu.run(), Stop::Kicked);
        kicker.join().unwrap();
    }

    /// Runs into the handler of `vector`; returns the frame that it was given, lowest address
    /// first.
    fn fault(&mut self, vector: u64) -> [u64; 6] {
        let state = self.halt();
        assert_eq!(
            state.rip,
            HANDLERS + vector * 16 + 1,
            "cr2 {:#x}",
            state.cr2
        );
        std::array::from_fn(|index| self.ram.get(state.gpr[4] + index as u64 * 8))
    }
}

fn assemble(bits: u32, at: u64, build: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).unwrap();
    build(&mut assembler);
    assembler.assemble(at).unwrap()
}
