//! Boots an ELF kernel by PVH on the bare software CPU, without a machine around it: RAM, and a
//! serial port that only prints. Shows how fast the CPU is and how far a kernel gets.
//!
//! `cargo run --release -p dunlin-x86 --example boot_pvh -- VMLINUX [INITRAMFS] [SECONDS]`

use std::error::Error;
use std::io::Write;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64};
use std::time::{Duration, Instant};

use dunlin_x86::kvmclock::GuestClock;
use dunlin_x86::lapic::{InterruptRouter, Mailbox};
use dunlin_x86::memory::{PhysicalMemory, RamPage};
use dunlin_x86::state::{Segment, segment};
use dunlin_x86::{CodeMap, Cpu, CpuConfig, Stop, Translation, cpuid};

const RAM: usize = 512 << 20;
const COMMAND_LINE: &str = "earlyprintk=serial,ttyS0,115200,keep panic=-1 acpi=off reboot=k";

#[derive(Debug)]
struct Ram {
    words: Vec<AtomicU64>,
    marks: Vec<AtomicU8>,
}

impl Ram {
    fn write(&self, at: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            let word = &self.words[(at + index) / 8];
            let shift = (at + index) % 8 * 8;
            let old = word.load(std::sync::atomic::Ordering::Relaxed);
            let new = old & !(0xff << shift) | u64::from(*byte) << shift;
            word.store(new, std::sync::atomic::Ordering::Relaxed);
        }
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

#[derive(Debug)]
struct Nobody;

impl InterruptRouter for Nobody {
    fn send_ipi(&self, _from: u32, _icr: u64) {}
}

fn field<const N: usize>(file: &[u8], at: usize) -> Result<[u8; N], Box<dyn Error>> {
    Ok(file.get(at..at + N).ok_or("truncated ELF")?.try_into()?)
}

fn number(file: &[u8], at: usize) -> Result<usize, Box<dyn Error>> {
    Ok(u64::from_le_bytes(field(file, at)?) as usize)
}

/// Loads the segments; returns the PVH entry point and the end of what was loaded.
fn load(ram: &Ram, file: &[u8]) -> Result<(u64, usize), Box<dyn Error>> {
    let headers = number(file, 32)?;
    let count = u16::from_le_bytes(field(file, 56)?);
    let (mut entry, mut end) = (None, 0);
    for index in 0..usize::from(count) {
        let at = headers + index * 56;
        let kind = u32::from_le_bytes(field(file, at)?);
        let (offset, physical) = (number(file, at + 8)?, number(file, at + 24)?);
        let (file_size, memory_size) = (number(file, at + 32)?, number(file, at + 40)?);
        let bytes = file
            .get(offset..offset + file_size)
            .ok_or("truncated segment")?;
        if kind == 1 {
            ram.write(physical, bytes);
            end = end.max(physical + memory_size);
        } else if kind == 4 {
            let mut note = 0;
            while note + 12 <= bytes.len() {
                let word = |at: usize| field(bytes, at).map(u32::from_le_bytes);
                let (name, size, kind) = (word(note)?, word(note + 4)?, word(note + 8)?);
                let body = note + 12 + (name as usize).next_multiple_of(4);
                if kind == 18 {
                    entry = Some(u64::from(word(body)?));
                }
                note = body + (size as usize).next_multiple_of(4);
            }
        }
    }
    Ok((entry.ok_or("no PVH entry point")?, end))
}

/// Writes the start information of PVH; returns its address.
fn start_info(ram: &Ram, initramfs: Option<(usize, usize)>) -> u64 {
    let (info, map, modules, line) = (0x6000, 0x6100, 0x6200, 0x7000);
    let mut words = [0u64; 7];
    words[0] = 0x336e_c578 | 1 << 32;
    words[1] = u64::from(u32::from(initramfs.is_some())) << 32;
    words[2] = if initramfs.is_some() { modules } else { 0 };
    words[3] = line;
    words[5] = map;
    words[6] = 2;
    let put = |at: u64, words: &[u64]| {
        for (index, word) in words.iter().enumerate() {
            ram.write(at as usize + index * 8, &word.to_le_bytes());
        }
    };
    put(info, &words);
    put(map, &[0, 0x9fc00, 1, 1 << 20, RAM as u64 - (1 << 20), 1]);
    if let Some((start, size)) = initramfs {
        put(modules, &[start as u64, size as u64, 0, 0]);
    }
    ram.write(line as usize, COMMAND_LINE.as_bytes());
    info
}

fn enter(cpu: &mut Cpu, entry: u64, info: u64) -> Result<(), Box<dyn Error>> {
    let mut state = cpu.state();
    let data = Segment {
        selector: 0x10,
        base: 0,
        limit: u32::MAX,
        access: 0xc093,
        unusable: false,
    };
    state.segments = [data; 6];
    state.segments[segment::CS] = Segment {
        selector: 8,
        access: 0xc09b,
        ..data
    };
    state.cr0 = 0x11;
    state.gpr = [0; 16];
    state.gpr[3] = info;
    state.rip = entry;
    state.rflags = 2;
    Ok(cpu.set_state(&state)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let kernel = std::fs::read(
        arguments
            .next()
            .ok_or("usage: boot_pvh VMLINUX [INITRAMFS]")?,
    )?;
    let initramfs = arguments.next().filter(|path| !path.is_empty());
    let seconds = arguments.next().map_or(Ok(60), |text| text.parse())?;
    let ram = Arc::new(Ram {
        words: (0..RAM / 8).map(|_| AtomicU64::new(0)).collect(),
        marks: (0..RAM / 4096).map(|_| AtomicU8::new(0)).collect(),
    });
    let (entry, end) = load(&ram, &kernel)?;
    let mut module = None;
    if let Some(path) = initramfs {
        let bytes = std::fs::read(path)?;
        let start = (end + (1 << 20)).next_multiple_of(4096);
        ram.write(start, &bytes);
        module = Some((start, bytes.len()));
    }
    let info = start_info(&ram, module);
    let mailbox = Arc::new(Mailbox::new(0));
    let config = CpuConfig {
        id: 0,
        cpus: 1,
        baseline: &cpuid::X86_64_V2,
        clock: Arc::new(GuestClock::new(2_600_000)),
        code: Arc::new(CodeMap::new()),
        mark: std::num::NonZeroU8::MIN,
        translation: Translation::default(),
    };
    let mut cpu = Cpu::new(config, ram, Arc::clone(&mailbox), Arc::new(Nobody));
    enter(&mut cpu, entry, info)?;

    let start = Instant::now();
    let stop = Arc::clone(&mailbox);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(seconds));
        stop.kick();
    });
    let mut out = std::io::stdout().lock();
    loop {
        match cpu.run() {
            Stop::PortRead { port, size } => cpu.complete_read(match (port, size) {
                (0x3fd, _) => 0x60,
                (0x64, _) => 0,
                (_, 1) => 0xff,
                _ => u64::MAX,
            }),
            Stop::PortWrite { port, value, .. } => {
                if port == 0x3f8 {
                    out.write_all(&[value as u8])?;
                }
                cpu.complete_write();
                if (port, value) == (0x64, 0xfe) {
                    eprintln!("reset by the keyboard controller");
                    break;
                }
            }
            Stop::MmioRead { .. } => cpu.complete_read(u64::MAX),
            Stop::MmioWrite { .. } => cpu.complete_write(),
            Stop::EndOfInterrupt { .. } => {}
            Stop::Halted => match cpu.wake_after() {
                Some(wait) => mailbox.wait_until(Some(Instant::now() + wait)),
                None => break,
            },
            Stop::Differs => {
                eprintln!("\n{}", cpu.difference().unwrap_or_default());
                break;
            }
            stop @ (Stop::Shutdown | Stop::Kicked) => {
                eprintln!("\n{stop:?}");
                break;
            }
        }
    }
    let took = start.elapsed().as_secs_f64();
    let count = cpu.instructions();
    eprintln!("{cpu:?}");
    eprintln!(
        "{count} instructions interpreted, {took:.3} s, {:.1} MIPS of those",
        count as f64 / took / 1e6
    );
    Ok(())
}
