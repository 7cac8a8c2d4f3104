//! Random programs, interpreted and translated: they come to the same end.
//!
//! Lockstep compares one trace at a time, each entered anew. What one leaves to the next in translated
//! code (calls that are open, links, jumps that are known) shows here.

use super::*;
use iced_x86::code_asm::*;

/// Routines, 256 bytes each, in pages that follow each other.
const ROUTINES: u64 = 64;
const ROOM: u64 = 0x100;
/// A page of the routines is also seen here, and all of them in the upper half.
const ALIAS: u64 = 0x15000;
const UPPER: u64 = 0xffff_ff80_0000_0000;
/// Where all exceptions go, and where a program ends.
const COMMON: u64 = 0x2f000;
const END: u64 = 0x2f800;
/// Addresses that are called or read through.
const TABLE: u64 = DATA + 0x8000;
/// Objects that lie across the borders of pages, of which some are missing or not to be written.
const OBJECTS: u64 = DATA + 0x1_0000;

/// A small generator; each program has a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }

    fn routine(&mut self) -> u64 {
        CODE + self.below(ROUTINES) * ROOM
    }

    /// One of the addresses that a routine has.
    fn address(&mut self) -> u64 {
        let routine = self.routine();
        match self.below(8) {
            0 => ALIAS + (routine & 0xfff),
            1 => UPPER + routine,
            _ => routine,
        }
    }

    fn object(&mut self) -> u64 {
        OBJECTS + self.below(4) * 0x1000 + 0xf00 + self.below(0x200)
    }
}

/// Uses up some of what ends the program.
fn spend(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.dec(r12d)?;
    a.jle(END)
}

fn operation(
    a: &mut CodeAssembler,
    random: &mut Random,
    page: u64,
) -> Result<(), iced_x86::IcedError> {
    let near = page + random.below(16) * ROOM;
    let field = random.below(200) as i32 - 100;
    match random.below(34) {
        0..4 => a.call(near),
        4..6 => a.call(random.routine()),
        6..8 => {
            a.mov(rax, random.address())?;
            a.call(rax)
        }
        8 => a.call(qword_ptr(TABLE + random.below(64) * 8)),
        9 => {
            // A return that is a jump.
            a.mov(rax, random.address())?;
            a.push(rax)?;
            a.ret()
        }
        10 => {
            // A call that is none.
            let mut here = a.create_label();
            a.call(here)?;
            a.set_label(&mut here)?;
            a.pop(rsi)?;
            a.add(rcx, rsi)
        }
        11 => a.pop(rdx),
        12 => a.push(rcx),
        13 if random.below(4) == 0 => a.ret_1(8),
        14 if random.below(8) == 0 => a.mov(byte_ptr(random.routine() + 7), random.below(9) as u32),
        15 if random.below(4) == 0 => {
            a.mov(rax, random.below(2) * 0x1000 + CODE + 7)?;
            a.mov(qword_ptr(PT + (ALIAS >> 12) * 8), rax)?;
            a.invlpg(byte_ptr(ALIAS))
        }
        16 if random.below(4) == 0 => {
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)
        }
        17 => a.mov(r8, rsp),
        18 => {
            // Leaves calls behind.
            spend(a)?;
            a.mov(rsp, r8)
        }
        19 => {
            spend(a)?;
            a.xchg(r9, rsp)
        }
        20 => {
            a.mov(rdi, rsp)?;
            a.push(i32::from(KERNEL_SS))?;
            a.push(rdi)?;
            a.pushfq()?;
            a.push(i32::from(KERNEL_CS))?;
            a.mov(rax, random.address())?;
            a.push(rax)?;
            a.iretq()
        }
        21 => a.jmp(near),
        22 => {
            let mut on = a.create_label();
            a.test(r12d, 1 << random.below(3))?;
            a.jz(on)?;
            a.call(near)?;
            a.set_label(&mut on)?;
            a.nop()
        }
        23 => {
            a.pushfq()?;
            a.pop(rdx)?;
            a.xor(rcx, rdx)
        }
        24..26 => a.mov(rbx, random.object()),
        26 => {
            a.mov(qword_ptr(rbx + field), rcx)?;
            a.add(ecx, dword_ptr(rbx + field + 20))
        }
        27 => {
            a.add(rcx, qword_ptr(rbx + field))?;
            a.adc(dword_ptr(rbx + 4), ecx)?;
            a.movzx(edx, byte_ptr(rbx + field + 3))
        }
        28 => {
            a.push(rbp)?;
            a.sub(rsp, 0x28)?;
            a.mov(qword_ptr(rsp + 8), rcx)?;
            a.xor(edx, dword_ptr(rsp + 12))?;
            a.add(rsp, 0x28)?;
            a.pop(rbp)
        }
        29 => {
            a.movups(xmm1, xmmword_ptr(rbx + field))?;
            a.paddd(xmm1, xmm1)?;
            a.movups(xmmword_ptr(rbx + 16), xmm1)
        }
        // Nothing that leaves flags undefined, which would be seen.
        _ => a.lea(ecx, ptr(rcx + rcx * 4 + 0x1_0003)),
    }
}

fn routine(random: &mut Random, at: u64) -> Vec<u8> {
    loop {
        let code = assemble(64, at, |a| {
            spend(a).unwrap();
            // What stores to code change is the immediate of an instruction behind this.
            a.add(ecx, 1).unwrap();
            for _ in 0..random.below(7) {
                operation(a, random, at & !0xfff).unwrap();
            }
            a.ret().unwrap();
        });
        if code.len() as u64 <= ROOM {
            return code;
        }
    }
}

fn machine(seed: u64, translation: Translation) -> Machine {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let (ram, code) = (Arc::new(Ram::new()), Arc::new(CodeMap::new()));
    let mut machine = Machine::made((&cpuid::X86_64_V2, translation), 0, ram, code);
    machine.lay_tables();
    machine.enter_long(&[]);
    let ram = &machine.ram;
    ram.set(PML4 + 511 * 8, PDPT | 7);
    ram.set(PT + (ALIAS >> 12) * 8, CODE | 7);
    machine.map(OBJECTS + 0x2000, PRESENT);
    machine.map(OBJECTS + 0x4000, 0);
    ram.set(TSS + 36, KERNEL_STACK);
    for vector in 0..32 {
        let at = HANDLERS + vector * 16;
        machine.set_gate(vector, at, 1);
        ram.write(at, &assemble(64, at, |a| a.jmp(COMMON).unwrap()));
    }
    // Takes in what it was called with, and goes on somewhere.
    let common = |a: &mut CodeAssembler| -> Result<(), iced_x86::IcedError> {
        for n in 1..7 {
            a.rol(rcx, 7)?;
            a.xor(rcx, qword_ptr(KERNEL_STACK - n * 8))?;
        }
        a.mov(rax, cr2)?;
        a.add(rcx, rax)?;
        spend(a)?;
        a.mov(rsp, STACK)?;
        a.mov(r8, rsp)?;
        a.lea(r9, ptr(rsp - 0x2000))?;
        a.mov(rbx, OBJECTS)?;
        a.mov(rax, 6_364_136_223_846_793_005_u64)?;
        a.imul_2(r13, rax)?;
        a.add(r13, 12345)?;
        a.mov(rax, r13)?;
        a.shr(rax, 40)?;
        a.and(eax, ROUTINES as i32 - 1)?;
        a.shl(eax, 8)?;
        a.add(rax, CODE as i32)?;
        a.call(rax)?;
        a.jmp(COMMON)
    };
    ram.write(COMMON, &assemble(64, COMMON, |a| common(a).unwrap()));
    ram.write(END, &[0xf4]);
    for n in 0..64 {
        ram.set(TABLE + n * 8, random.address());
    }
    for n in 0..ROUTINES {
        let at = CODE + n * ROOM;
        ram.write(at, &routine(&mut random, at));
    }
    machine.with(|state| {
        state.gpr[12] = 3000;
        state.gpr[13] = seed;
        state.gpr[8] = STACK;
        state.gpr[9] = STACK - 0x2000;
        state.rip = COMMON;
    })
}

/// Runs to the end; `None`: the program has none that can be compared.
fn run(machine: &mut Machine) -> Option<CpuState> {
    let mailbox = Arc::clone(&machine.mailbox);
    let (ended, end) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if end
            .recv_timeout(std::time::Duration::from_secs(20))
            .is_err()
        {
            mailbox.kick();
        }
    });
    let stop = loop {
        match machine.cpu.run() {
            // Its stack went too far.
            Stop::MmioRead { .. } => machine.cpu.complete_read(3),
            Stop::MmioWrite { .. } => machine.cpu.complete_write(),
            stop => break stop,
        }
    };
    ended.send(()).ok();
    watch.join().unwrap();
    match stop {
        Stop::Halted => Some(machine.cpu.state()),
        // It goes in circles, its stack where nothing can be delivered, or it among its data.
        _ => None,
    }
}

#[test]
fn random_programs_come_to_the_same_end() {
    if !module_path!().ends_with("translated::programs") {
        return;
    }
    let mut compared = 0;
    for seed in 1..=24 {
        let mut interpreted = machine(seed, Translation::Never);
        let Some(expected) = run(&mut interpreted) else {
            // It spends nothing and goes in circles.
            continue;
        };
        compared += 1;
        for (after, elsewhere, verified) in [
            (1, false, false),
            (3, false, false),
            (2, true, false),
            (2, false, true),
        ] {
            let after = NonZeroU32::new(after).unwrap();
            let after = if verified {
                Translation::Verified(after)
            } else {
                Translation::After(after)
            };
            let mut translated = machine(seed, after);
            if elsewhere {
                translated.cpu.translator.look_as_elsewhere();
            }
            let state = run(&mut translated).expect("an end");
            assert_eq!(translated.cpu.verified() > 0, verified);
            let context = format!("seed {seed}, {after:?}, as on other hosts: {elsewhere}");
            assert_eq!(state.gpr, expected.gpr, "{context}");
            let [now, then] = [&state, &expected].map(|s| (s.rip, s.rflags, s.cr2));
            assert_eq!(now, then, "{context}");
            for at in (0..RAM).step_by(8) {
                let [now, then] = [&translated, &interpreted].map(|m| m.ram.get(at));
                assert_eq!(now, then, "RAM at {at:#x}, {context}");
            }
            for at in (0..RAM).step_by(4096) {
                let [now, then] = [&translated, &interpreted].map(|m| m.ram.take_mark(at));
                if now != 0 || then != 0 {
                    assert!(now != 0, "mark of {at:#x}, {context}");
                }
            }
        }
    }
    assert!(compared > 20, "{compared} programs ended");
}
