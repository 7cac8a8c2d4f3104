//! The software CPU as the machine of a case.

use std::num::NonZeroU8;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use dunlin_x86::kvmclock::GuestClock;
use dunlin_x86::lapic::{InterruptRouter, Mailbox};
use dunlin_x86::memory::{PhysicalMemory, RamPage};
use dunlin_x86::state::{Activity, DescriptorTable, Segment, segment};
use dunlin_x86::{CodeMap, Cpu, CpuConfig, Stop, Translation, cpuid};

use crate::layout::*;
use crate::run::{End, Outcome};

#[derive(Debug)]
struct Ram {
    words: Vec<AtomicU64>,
    marks: Vec<AtomicU8>,
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

#[derive(Debug)]
struct Nobody;

impl InterruptRouter for Nobody {
    fn send_ipi(&self, _from: u32, _icr: u64) {}
}

/// Stops of a case, at most.
const STOPS: usize = 100_000;

/// Runs an image.
pub(crate) fn run(image: &[u8], translation: Translation) -> Outcome {
    let ram = Ram {
        words: (0..RAM / 8).map(|_| AtomicU64::new(0)).collect(),
        marks: (0..RAM / 4096).map(|_| AtomicU8::new(0)).collect(),
    };
    // Pages begin at multiples of their size in the guest only; nothing depends on the host's.
    for (index, bytes) in image.chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        ram.words[IMAGE as usize / 8 + index].store(u64::from_le_bytes(word), Ordering::Relaxed);
    }
    let mailbox = Arc::new(Mailbox::new(0));
    let config = CpuConfig {
        id: 0,
        cpus: 1,
        baseline: &cpuid::X86_64_V2,
        clock: Arc::new(GuestClock::new(2_000_000)),
        code: Arc::new(CodeMap::new()),
        mark: NonZeroU8::MIN,
        translation,
    };
    let mut cpu = Cpu::new(
        config,
        Arc::new(ram),
        Arc::clone(&mailbox),
        Arc::new(Nobody),
    );
    begin(&mut cpu);
    let mut report = Vec::new();
    for _ in 0..STOPS {
        match cpu.run() {
            Stop::PortWrite {
                port: REPORT_PORT,
                value,
                ..
            } => report.push(value as u8),
            Stop::PortWrite {
                port: EXIT_PORT, ..
            } => return Outcome::new(report, End::Exit),
            Stop::PortWrite { .. } => {}
            Stop::PortRead { .. } | Stop::MmioRead { .. } => {
                cpu.complete_read(u64::MAX);
                continue;
            }
            Stop::MmioWrite { .. } => {}
            Stop::Shutdown => return Outcome::new(report, End::Shutdown),
            Stop::Differs => {
                let how = cpu.difference().unwrap_or_default().to_owned();
                return Outcome::new(report, End::Stuck(how));
            }
            other => return Outcome::new(report, End::Stuck(format!("{other:?} {cpu:?}"))),
        }
        cpu.complete_write();
    }
    Outcome::new(report, End::Stuck("stops without end".to_owned()))
}

/// Flat 32-bit protected mode, as the ROM of the peers leaves it.
fn begin(cpu: &mut Cpu) {
    let mut state = cpu.state();
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
        access: 0xc09b,
        ..data
    };
    state.gdtr = DescriptorTable::default();
    state.idtr = DescriptorTable::default();
    state.cr0 = 0x33;
    state.rip = ENTRY;
    state.rflags = 2;
    state.activity = Activity::Running;
    cpu.set_state(&state).unwrap();
}
