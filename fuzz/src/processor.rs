//! A software CPU over a little RAM, which something always brings back from endless loops.

use std::ptr::NonNull;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use dunlin_x86::cpuid::X86_64_V3;
use dunlin_x86::kvmclock::GuestClock;
use dunlin_x86::lapic::{InterruptRouter, Mailbox};
use dunlin_x86::memory::{PhysicalMemory, RamPage};
use dunlin_x86::state::{CpuState, DescriptorTable, Segment, segment};
use dunlin_x86::{CodeMap, Cpu, CpuConfig, Stop, Translation};

/// Bytes of RAM.
pub const RAM: u64 = 256 << 10;
/// Where code starts; in the first 64 KiB, so that real mode reaches it.
pub const CODE: u64 = 0x8000;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
const HANDLER: u64 = 0x7000;
const STACK: u64 = 0x2_0000;
const KERNEL_STACK: u64 = 0x2_8000;

/// How long an input may run between two stops.
const PATIENCE: Duration = Duration::from_micros(500);
/// Stops of an input.
const STOPS: usize = 64;

/// How the processor starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 16-bit, without protection.
    Real,
    /// 32-bit, flat, without paging.
    Protected,
    /// 64-bit, ring 0.
    Kernel,
    /// 64-bit, ring 3.
    User,
}

/// On the heap, so that the sanitizer sees an access beyond its end.
#[derive(Debug)]
struct Ram {
    words: Vec<AtomicU64>,
    marks: Vec<AtomicU8>,
}

impl PhysicalMemory for Ram {
    fn ram_page(&self, frame: u64) -> Option<RamPage> {
        let frame = usize::try_from(frame).ok()?;
        let mark = self.marks.get(frame)?;
        Some(RamPage {
            host: NonNull::from(&self.words[frame * 512]).cast(),
            mark: NonNull::from(mark),
        })
    }
}

#[derive(Debug)]
struct Alone;

impl InterruptRouter for Alone {
    fn send_ipi(&self, _from: u32, _icr: u64) {}
}

/// A processor, its RAM, and the way to interrupt it.
#[derive(Debug)]
pub struct Machine {
    /// The processor.
    pub cpu: Cpu,
    ram: Arc<Ram>,
    mailbox: Arc<Mailbox>,
}

impl Machine {
    /// A processor in `mode` about to execute `code`, which translates what has run so often.
    pub fn new(mode: Mode, runs: NonZeroU32, code: &[u8]) -> Self {
        let ram = Arc::new(Ram {
            words: (0..RAM / 8).map(|_| AtomicU64::new(0)).collect(),
            marks: (0..RAM / 4096).map(|_| AtomicU8::new(0)).collect(),
        });
        let mailbox = Arc::new(Mailbox::new(0));
        let config = CpuConfig {
            id: 0,
            cpus: 1,
            baseline: &X86_64_V3,
            clock: Arc::new(GuestClock::new(2_000_000)),
            code: Arc::new(CodeMap::new()),
            mark: std::num::NonZeroU8::MIN,
            translation: Translation::Verified(runs),
        };
        let memory = Arc::clone(&ram) as Arc<dyn PhysicalMemory>;
        let cpu = Cpu::new(config, memory, Arc::clone(&mailbox), Arc::new(Alone));
        let mut machine = Self { cpu, ram, mailbox };
        machine.set_up_tables(mode);
        let room = (RAM - CODE) as usize;
        machine.write(CODE, &code[..code.len().min(room)]);
        let state = start_state(mode, machine.cpu.state());
        let accepted = machine.cpu.set_state(&state);
        accepted.expect("a state that a guest can reach");
        machine
    }

    /// Writes RAM.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            let at = at as usize + index;
            let bits = u64::from(*byte) << (8 * (at % 8));
            let keep = !(0xff << (8 * (at % 8)));
            let word = &self.ram.words[at / 8];
            word.store(
                word.load(Ordering::Relaxed) & keep | bits,
                Ordering::Relaxed,
            );
        }
    }

    fn set(&self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    /// Page tables (the first 2 MiB and the local APIC), descriptors, one handler for all vectors.
    fn set_up_tables(&self, mode: Mode) {
        self.set(PML4, PDPT | 7);
        self.set(PDPT, PD | 7);
        self.set(PDPT + 8 * 3, PD | 7);
        self.set(PD, 0x87);
        // 0xfee0_0000 in the fourth gigabyte.
        self.set(PD + 8 * 0x1f7, 0xfee0_0083);
        let descriptors = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_9b00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            TSS << 16 | 0x8b00_0000_0067,
            0,
        ];
        for (index, descriptor) in (0..).zip(descriptors) {
            self.set(GDT + 8 * index, descriptor);
        }
        self.set(TSS + 4, KERNEL_STACK);
        // HLT, then back to the interrupted program.
        let handler: &[u8] = &[0xf4, 0x48, 0xcf];
        let (handler, selector) = match mode {
            Mode::Kernel | Mode::User => (handler, 0x08),
            Mode::Real | Mode::Protected => (&[0xf4, 0xcf][..], 0x18),
        };
        self.write(HANDLER, handler);
        for vector in 0..256 {
            match mode {
                Mode::Real => {
                    self.write(4 * vector, &(HANDLER as u32).to_le_bytes());
                }
                Mode::Protected => {
                    self.set(
                        IDT + 8 * vector,
                        0x8e00_0000_0000 | selector << 16 | HANDLER,
                    );
                }
                // The table ends where the TSS begins.
                Mode::Kernel | Mode::User => {
                    self.set(
                        IDT + 16 * vector,
                        0x8e00_0000_0000 | selector << 16 | HANDLER,
                    );
                }
            }
        }
    }

    /// Runs until the program ends, loops, or has stopped often enough; then what the processor
    /// says of itself must be a state that it accepts.
    pub fn run(&mut self) {
        let watched = Watched::new(&self.mailbox);
        for _ in 0..STOPS {
            match self.cpu.run() {
                Stop::PortRead { size, .. } => {
                    assert!(matches!(size, 1 | 2 | 4), "port read of {size} bytes");
                    self.cpu.complete_read(0x5a5a_5a5a);
                }
                Stop::PortWrite { size, .. } => {
                    assert!(matches!(size, 1 | 2 | 4), "port write of {size} bytes");
                    self.cpu.complete_write();
                }
                Stop::MmioRead { size, .. } => {
                    assert!((1..=8).contains(&size), "load of {size} bytes");
                    self.cpu.complete_read(0x5a5a_5a5a_5a5a_5a5a);
                }
                Stop::MmioWrite { size, .. } => {
                    assert!((1..=8).contains(&size), "store of {size} bytes");
                    self.cpu.complete_write();
                }
                Stop::Halted => self.mailbox.post_nmi(),
                Stop::EndOfInterrupt { .. } => {}
                Stop::Shutdown | Stop::Kicked => break,
                Stop::Differs => panic!("{}", self.cpu.difference().unwrap_or_default()),
            }
        }
        drop(watched);
        self.cpu.finish_access();
        let state = self.cpu.state();
        let accepted = self.cpu.set_state(&state);
        accepted.expect("the processor accepts its own state");
    }
}

fn start_state(mode: Mode, mut state: CpuState) -> CpuState {
    let flat = |selector, access| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
        unusable: false,
    };
    state.rip = CODE;
    state.gpr[4] = STACK;
    // SSE for the operating system, and AVX where the host executes it.
    state.cr4 = 0x4_0600;
    state.xcr0 = 7;
    let (code, data) = match mode {
        Mode::Real => {
            let code = &mut state.segments[segment::CS];
            (code.selector, code.base) = (0, 0);
            // Further up there is what the handlers need.
            state.gpr[4] = 0xf000;
            return state;
        }
        Mode::Protected => (flat(0x18, 0xc09b), flat(0x10, 0xc093)),
        Mode::Kernel => (flat(0x08, 0xa09b), flat(0x10, 0xc093)),
        Mode::User => (flat(0x2b, 0xa0fb), flat(0x23, 0xc0f3)),
    };
    state.segments = [data; 6];
    state.segments[segment::CS] = code;
    state.tr = Segment {
        limit: 0x67,
        ..flat(0x30, 0x8b)
    };
    state.tr.base = TSS;
    state.gdtr = DescriptorTable {
        base: GDT,
        limit: 8 * 8 - 1,
    };
    state.idtr = DescriptorTable {
        base: IDT,
        limit: if mode == Mode::Protected {
            0x7ff
        } else {
            0xfff
        },
    };
    state.cr0 = 0x31;
    if mode != Mode::Protected {
        state.cr0 = 0x8001_0031;
        state.cr3 = PML4;
        state.cr4 |= 0x20;
        state.msrs.efer = 0xd01;
    }
    state
}

type Slot = Mutex<Option<(Arc<Mailbox>, std::time::Instant)>>;

/// While it lives, a thread kicks the processor.
struct Watched(&'static Slot);

impl Watched {
    fn new(mailbox: &Arc<Mailbox>) -> Self {
        static SLOT: OnceLock<&'static Slot> = OnceLock::new();
        let slot = *SLOT.get_or_init(|| {
            let slot: &'static Slot = Box::leak(Box::default());
            std::thread::spawn(|| {
                loop {
                    std::thread::sleep(PATIENCE / 2);
                    let watched = slot.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some((mailbox, since)) = &*watched
                        && since.elapsed() > PATIENCE
                    {
                        mailbox.kick();
                    }
                }
            });
            slot
        });
        let now = std::time::Instant::now();
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some((Arc::clone(mailbox), now));
        Self(slot)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
