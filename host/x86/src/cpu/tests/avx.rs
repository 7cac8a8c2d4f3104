//! What x86-64-v3 adds: where VEX-coded instructions exist, XCR0, XSAVE and XRSTOR.

use super::*;
use crate::state::{gpr, segment};
use iced_x86::code_asm::*;

const AREA: u64 = DATA + 0x40;
const CR4_OSXSAVE: u64 = 1 << 18;

/// 64-bit mode on x86-64-v3, with all state enabled.
fn machine(code: &[u8]) -> Machine {
    let (ram, map) = (Arc::new(Ram::new()), Arc::new(CodeMap::new()));
    let mut machine = Machine::of(&cpuid::X86_64_V3, 0, ram, map);
    machine.lay_tables();
    machine.enter_long(code);
    machine.with(|state| {
        state.cr4 |= CR4_OSXSAVE;
        state.xcr0 = 7;
    })
}

fn assembled(build: impl FnOnce(&mut CodeAssembler)) -> Machine {
    machine(&assemble(64, CODE, build))
}

/// AVX is executed by the host's processor.
fn host_has_avx2() -> bool {
    let has = Cpu::missing_features(&cpuid::X86_64_V3).is_empty();
    if !has {
        eprintln!("SKIP: the host's processor lacks AVX2");
    }
    has
}

#[test]
fn encodings_that_no_vex_instruction_has_are_undefined() {
    let codes: [(&str, &[u8]); 12] = [
        ("andn with VEX.L", &[0xc4, 0xe2, 0x7c, 0xf2, 0xc1]),
        ("bzhi with VEX.L", &[0xc4, 0xe2, 0x7c, 0xf5, 0xc1]),
        (
            "rorx with a register in VEX.vvvv",
            &[0xc4, 0xe3, 0x73, 0xf0, 0xc1, 1],
        ),
        ("vmovaps with one", &[0xc5, 0xf0, 0x28, 0xc1]),
        ("LOCK", &[0xf0, 0xc4, 0xe2, 0x78, 0xf2, 0xc1]),
        ("66", &[0x66, 0xc4, 0xe2, 0x78, 0xf2, 0xc1]),
        ("F2", &[0xf2, 0xc5, 0xf8, 0x28, 0xc1]),
        ("F3", &[0xf3, 0xc5, 0xf8, 0x28, 0xc1]),
        ("REX", &[0x48, 0xc5, 0xf8, 0x28, 0xc1]),
        (
            "a gather with one register twice",
            &[0xc4, 0xe2, 0x71, 0x90, 0x04, 0x08],
        ),
        ("vpermq of 128 bits", &[0xc4, 0xe3, 0xf9, 0x00, 0xc1, 0]),
        ("vbroadcastsd to 128 bits", &[0xc4, 0xe2, 0x79, 0x19, 0xc1]),
    ];
    for (what, code) in codes {
        eprintln!("{what}");
        machine(code).fault(6);
    }
}

#[test]
fn real_and_virtual_8086_mode_have_no_vex() {
    // ANDN EAX, EAX, ECX; HLT.
    let code = [0xc4, 0xe2, 0x78, 0xf2, 0xc1, 0xf4];
    let (ram, map) = (Arc::new(Ram::new()), Arc::new(CodeMap::new()));
    let machine = Machine::of(&cpuid::X86_64_V3, 0, ram, map);
    machine.ram.write(0x8000, &code);
    // The handler of #UD is an HLT.
    machine.ram.write(6 * 4, &[0x00, 0x90, 0, 0]);
    machine.ram.write(0x9000, &[0xf4]);
    let mut machine = machine.with(|state| {
        state.segments[segment::CS].selector = 0;
        state.segments[segment::CS].base = 0;
        state.gpr[gpr::RSP] = 0x7000;
        state.rip = 0x8000;
        state.activity = Activity::Running;
    });
    assert_eq!(machine.halt().rip, 0x9001);
    // 16-bit protected mode has it.
    let mut machine = machine.with(|state| {
        state.cr0 |= 1;
        state.rip = 0x8000;
        state.gpr[gpr::RAX] = 0xff;
        state.gpr[gpr::RCX] = 0x1234;
        state.activity = Activity::Running;
    });
    let state = machine.halt();
    assert_eq!((state.rip, state.gpr[gpr::RAX]), (0x8006, 0x1200));
}

#[test]
fn avx_runs_where_the_system_has_enabled_it() {
    if !host_has_avx2() {
        return;
    }
    type Change = fn(&mut CpuState);
    let refused: [(Change, u64); 5] = [
        (|state| state.cr4 &= !CR4_OSXSAVE, 6),
        (|state| state.xcr0 = 3, 6),
        (|state| state.xcr0 = 1, 6),
        (|state| state.cr0 |= 8, 7),
        (
            |state| (state.cr4, state.cr0) = (state.cr4 & !CR4_OSXSAVE, state.cr0 | 8),
            6,
        ),
    ];
    for (change, vector) in refused {
        assembled(|a| a.vaddps(ymm0, ymm1, ymm2).unwrap())
            .with(change)
            .fault(vector);
    }
    // Unlike SSE, it does not care for CR0.EM and CR4.OSFXSR.
    let mut machine = assembled(|a| {
        a.vpcmpeqd(ymm0, ymm0, ymm0).unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        state.cr0 |= 4;
        state.cr4 &= !0x200;
    });
    assert_eq!(machine.halt().xsave[576..592], [0xff; 16]);
}

#[test]
fn xcr0_takes_what_the_baseline_has() {
    let set = |index: u32, low: u32| {
        assembled(move |a| {
            a.mov(ecx, index).unwrap();
            a.mov(eax, low).unwrap();
            a.xor(edx, edx).unwrap();
            a.xsetbv().unwrap();
            a.xor(ecx, ecx).unwrap();
            a.xgetbv().unwrap();
            a.hlt().unwrap();
        })
    };
    for value in [1, 3, 7] {
        let state = set(0, value).halt();
        assert_eq!(
            (state.gpr[gpr::RAX], state.gpr[gpr::RDX]),
            (value.into(), 0)
        );
        assert_eq!(state.xcr0, value.into());
    }
    for (index, value) in [(0, 0), (0, 2), (0, 5), (0, 0xf), (0, 0x1_0003), (1, 7)] {
        set(index, value).fault(13);
    }
    set(0, 7).user().fault(13);
    set(0, 7).with(|state| state.cr4 &= !CR4_OSXSAVE).fault(6);
    let read = |a: &mut CodeAssembler| {
        a.mov(ecx, 1).unwrap();
        a.xgetbv().unwrap();
    };
    assembled(read).fault(13);
    // CPUID tells how much XSAVE writes.
    let mut machine = assembled(|a| {
        a.mov(eax, 0xd).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.cpuid().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(machine.halt().gpr[gpr::RBX], 832);
    let mut machine = machine.with(|state| {
        (state.xcr0, state.rip) = (3, CODE);
        state.activity = Activity::Running;
    });
    assert_eq!(machine.halt().gpr[gpr::RBX], 576);
}

fn pattern(state: &mut CpuState) {
    for (index, byte) in state.xsave[160..416].iter_mut().enumerate() {
        *byte = index as u8 | 1;
    }
    state.xsave[512] = 7;
    state.xsave.resize(832, 0);
    for (index, byte) in state.xsave[576..832].iter_mut().enumerate() {
        *byte = !(index as u8 & 0x7f);
    }
}

#[test]
fn xsave_and_xrstor_keep_what_is_asked_for() {
    // XSAVE of EAX, XRSTOR of EBX after all registers were cleared.
    let build = |a: &mut CodeAssembler| {
        a.mov(esi, AREA as i32).unwrap();
        a.xor(edx, edx).unwrap();
        a.xsave64(ptr(rsi)).unwrap();
        a.mov(ecx, DATA as i32 + 0x1000).unwrap();
        a.mov(eax, 7).unwrap();
        a.xrstor64(ptr(rcx)).unwrap();
        a.mov(eax, ebx).unwrap();
        a.xrstor64(ptr(rsi)).unwrap();
        a.hlt().unwrap();
    };
    for (saved, restored) in [
        (7, 7),
        (7, 4),
        (7, 2),
        (4, 7),
        (3, 7),
        (2, 2),
        (0, 7),
        (6, 6),
    ] {
        let mut machine = assembled(build).with(|state| {
            pattern(state);
            state.gpr[gpr::RAX] = saved;
            state.gpr[gpr::RBX] = restored;
        });
        // XRSTOR reads MXCSR also where its header says that nothing is there.
        machine.ram.write(DATA + 0x1000 + 24, &[0x80, 0x1f, 0, 0]);
        machine.ram.write(AREA + 24, &[0x80, 0x1f, 0, 0]);
        let before = machine.cpu.state();
        let after = machine.halt();
        assert_eq!(machine.ram.get(AREA + 512), saved, "{saved} {restored}");
        let both = saved & restored;
        let parts = [(2, 160..416), (4, 576..832)];
        for (component, range) in parts {
            let (kept, now) = (&before.xsave[range.clone()], &after.xsave[range.clone()]);
            if both & component != 0 {
                assert_eq!(kept, now, "{saved} {restored}");
            } else {
                assert!(now.iter().all(|byte| *byte == 0), "{saved} {restored}");
            }
        }
    }
}

#[test]
fn xsave_says_when_the_upper_halves_are_zero() {
    let mut machine = assembled(|a| {
        a.mov(esi, AREA as i32).unwrap();
        a.mov(eax, -1).unwrap();
        a.mov(edx, -1).unwrap();
        a.xsave(ptr(rsi)).unwrap();
        a.hlt().unwrap();
    });
    // A component that is not enabled keeps its bit.
    machine.ram.set(AREA + 512, 0x204);
    machine.halt();
    assert_eq!(machine.ram.get(AREA + 512), 0x203);
}

#[test]
fn xsave_areas_that_a_processor_refuses_fault() {
    let xrstor = |a: &mut CodeAssembler| {
        a.mov(esi, AREA as i32).unwrap();
        a.mov(eax, 7).unwrap();
        a.xor(edx, edx).unwrap();
        a.xrstor(ptr(rsi)).unwrap();
        a.hlt().unwrap();
    };
    assembled(xrstor).halt();
    for (at, value) in [(512, 8), (520, 1), (528, 1), (24, 1 << 16)] {
        let mut machine = assembled(xrstor);
        machine.ram.set(AREA + at, value);
        machine.fault(13);
    }
    let mut machine = assembled(xrstor).with(|state| state.xcr0 = 3);
    machine.ram.set(AREA + 512, 4);
    machine.fault(13);
    assembled(xrstor).with(|state| state.cr0 |= 8).fault(7);
    assembled(xrstor)
        .with(|state| state.cr4 &= !CR4_OSXSAVE)
        .fault(6);
    let unaligned = |a: &mut CodeAssembler| {
        a.mov(esi, AREA as i32 + 16).unwrap();
        a.xsave(ptr(rsi)).unwrap();
    };
    assembled(unaligned).fault(13);
    // Across a page that is not there: nothing is written.
    let mut machine = assembled(|a| {
        a.mov(esi, DATA as i32 + 0xfc0 - 0x240).unwrap();
        a.mov(eax, 7).unwrap();
        a.xor(edx, edx).unwrap();
        a.xsave(ptr(rsi)).unwrap();
    })
    .with(pattern);
    let page = (DATA + 0x1000) >> 12;
    machine.ram.set(PT + page * 8, 0);
    let frame = machine.fault(14);
    assert_eq!((frame[0], machine.cpu.state().cr2), (2, DATA + 0x1000));
    assert_eq!(machine.ram.get(DATA + 0xfc0 - 0x240 + 160), 0);
}

#[test]
fn a_state_with_ymm_registers_fits_the_baseline_that_has_them() {
    let state = assembled(|a| a.hlt().unwrap()).with(pattern).cpu.state();
    assert_eq!(state.xsave.len(), 832);
    let mut same = assembled(|a| a.hlt().unwrap());
    same.cpu.set_state(&state).unwrap();
    assert_eq!(same.cpu.state().xsave, state.xsave);
    let mut older = Machine::assembled(|a| a.hlt().unwrap());
    assert!(older.cpu.set_state(&state).is_err());
    // What an older baseline has saved goes on as it is.
    let old = older.cpu.state();
    assert_eq!((old.xcr0, old.xsave.len()), (3, 576));
    older.cpu.set_state(&old).unwrap();
    for xcr0 in [0, 2, 4, 5, 9] {
        let mut bad = state.clone();
        bad.xcr0 = xcr0;
        assert!(same.cpu.set_state(&bad).is_err(), "XCR0 {xcr0:#x}");
    }
}

#[test]
fn a_gather_goes_on_behind_a_page_fault_where_it_stopped() {
    if !host_has_avx2() {
        return;
    }
    // Elements 0 and 1 are there, 2 is not.
    let mut machine = assembled(|a| {
        a.mov(esi, DATA as i32).unwrap();
        a.vpcmpeqd(xmm2, xmm2, xmm2).unwrap();
        // VPGATHERDD XMM0, [RSI + XMM1 * 4], XMM2.
        a.db(&[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x8e]).unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        state.xsave[512] = 7;
        for (lane, index) in [0_i32, 1, 0x400, 3].into_iter().enumerate() {
            state.xsave[176 + lane * 4..][..4].copy_from_slice(&index.to_le_bytes());
        }
    });
    for index in [0, 1, 3, 0x400] {
        machine
            .ram
            .write(DATA + index * 4, &(index as u32 + 100).to_le_bytes());
    }
    let entry = PT + ((DATA + 0x1000) >> 12) * 8;
    let page = machine.ram.get(entry);
    machine.ram.set(entry, 0);
    let frame = machine.fault(14);
    let state = machine.cpu.state();
    assert_eq!(state.cr2, DATA + 0x1000);
    let lanes = |at: usize| -> [u32; 4] {
        std::array::from_fn(|lane| {
            let bytes = state.xsave[at + lane * 4..].first_chunk().unwrap();
            u32::from_le_bytes(*bytes)
        })
    };
    assert_eq!(lanes(160)[..2], [100, 101]);
    assert_eq!(lanes(192), [0, 0, u32::MAX, u32::MAX]);
    machine.ram.set(entry, page);
    let mut machine = machine.with(|state| {
        state.rip = frame[1];
        state.activity = Activity::Running;
    });
    let state = machine.halt();
    let lanes = |at: usize| -> [u32; 4] {
        std::array::from_fn(|lane| {
            let bytes = state.xsave[at + lane * 4..].first_chunk().unwrap();
            u32::from_le_bytes(*bytes)
        })
    };
    assert_eq!(lanes(160), [100, 101, 0x400 + 100, 103]);
    assert_eq!(lanes(192), [0; 4]);
}

#[test]
fn ymm_registers_and_memory_in_a_loop_come_to_the_same_sums() {
    if !host_has_avx2() {
        return;
    }
    let mut machine = assembled(|a| {
        let mut again = a.create_label();
        a.mov(r10d, DATA as i32).unwrap();
        a.mov(r12d, 10).unwrap();
        a.vpxor(ymm1, ymm1, ymm1).unwrap();
        a.set_label(&mut again).unwrap();
        a.vmovdqu(ymm0, ptr(r10 + 4)).unwrap();
        a.vpaddd(ymm1, ymm1, ymm0).unwrap();
        a.vpaddd(ymm1, ymm1, ptr(r10 + 64)).unwrap();
        a.vmovdqa(ptr(r10 + 128), ymm1).unwrap();
        a.vmovdqu(xmm3, ptr(r10 + 1)).unwrap();
        a.vcvtdq2ps(ymm4, ymm1).unwrap();
        a.vfmadd231ps(ymm5, ymm4, ymm4).unwrap();
        a.vpextrd(r11d, xmm1, 1).unwrap();
        a.andn(r13d, r12d, r11d).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        // Beside its alignment: it has run often, and faults.
        a.add(r10, 16).unwrap();
        a.mov(r12d, 1).unwrap();
        a.jmp(again).unwrap();
    })
    .with(|state| {
        state.xsave[512] = 7;
        state.xsave[576..832].fill(0xee);
        state.xsave[576 + 5 * 16..][..16].fill(0);
    });
    for index in 0..64_u32 {
        machine
            .ram
            .write(DATA + u64::from(index) * 4, &index.to_le_bytes());
    }
    let frame = machine.fault(13);
    let state = machine.cpu.state();
    assert_eq!(frame[0], 0);
    let lane = |at: usize| {
        let bytes = state.xsave[at..].first_chunk().unwrap();
        u32::from_le_bytes(*bytes)
    };
    for index in 0..8_u32 {
        let stored = machine.ram.get(DATA + 128 + u64::from(index) * 4) as u32;
        assert_eq!(stored, 10 * (index + 1 + index + 16), "lane {index}");
        let half = if index < 4 { 160 } else { 576 };
        let at = |register: usize| half + register * 16 + (index as usize & 3) * 4;
        // One round more has added what lies 16 bytes on.
        let sum = stored + (index + 5) + (index + 20);
        assert_eq!(lane(at(1)), sum, "lane {index}");
        let mut squares = 0.0_f32;
        for round in 1..=10_u32 {
            let value = (round * (2 * index + 17)) as f32;
            squares = value.mul_add(value, squares);
        }
        assert_eq!(f32::from_bits(lane(at(5))), squares, "lane {index}");
    }
    assert_eq!(state.xsave[576 + 3 * 16..][..16], [0; 16]);
    assert_eq!(state.xsave[576 + 6 * 16..][..16], [0xee; 16]);
    assert_eq!(state.gpr[11], u64::from(10 * (2 + 17_u32)));
    assert_eq!(state.gpr[13], state.gpr[11] & !1);
}
