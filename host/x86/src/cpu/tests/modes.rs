//! Modes and the ways between them.

use super::*;
use crate::state::{gpr, segment};
use iced_x86::code_asm::*;

#[test]
fn real_mode_leads_to_64_bit_mode() {
    let machine = Machine::reset(0);
    machine.lay_tables();
    let real = assemble(16, 0x8000, |a| {
        a.lgdt(fword_ptr(0x9000)).unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 1).unwrap();
        a.mov(cr0, eax).unwrap();
        // JMP far 0x38:0x8100.
        a.db(&[0x66, 0xea, 0x00, 0x81, 0x00, 0x00, CODE_32 as u8, 0x00])
            .unwrap();
    });
    let protected = assemble(32, 0x8100, |a| {
        a.mov(eax, i32::from(DATA_32)).unwrap();
        a.mov(ds, ax).unwrap();
        a.mov(ss, ax).unwrap();
        a.mov(esp, STACK as i32).unwrap();
        a.push(0x55).unwrap();
        a.pop(edi).unwrap();
        a.mov(eax, 0x20).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, PML4 as i32).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(ecx, 0xc000_0080u32).unwrap();
        a.mov(eax, 0x100).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 0x8000_0000u32).unwrap();
        a.mov(cr0, eax).unwrap();
        a.db(&[0xea, 0x00, 0x82, 0x00, 0x00, KERNEL_CS as u8, 0x00])
            .unwrap();
    });
    let long = assemble(64, 0x8200, |a| {
        a.mov(rbx, 0x1234_5678_9abc_def0u64).unwrap();
        a.hlt().unwrap();
    });
    for (at, code) in [(0x8000, real), (0x8100, protected), (0x8200, long)] {
        machine.ram.write(at, &code);
    }
    machine.ram.set(0x9000, 0x4f | GDT << 16);
    let mut machine = machine.with(|state| {
        state.segments[segment::CS].selector = 0;
        state.segments[segment::CS].base = 0;
        state.rip = 0x8000;
    });
    let state = machine.halt();
    assert_eq!(state.gpr[gpr::RBX], 0x1234_5678_9abc_def0);
    assert_eq!(state.gpr[gpr::RDI], 0x55);
    assert_eq!(state.msrs.efer, 0x500);
}

#[test]
fn system_calls_go_to_the_kernel_and_back() {
    let mut machine = Machine::assembled(|a| {
        a.mov(ebx, 1).unwrap();
        a.syscall().unwrap();
        a.mov(ebx, 2).unwrap();
        a.hlt().unwrap();
    });
    let kernel = assemble(64, 0x30000, |a| {
        a.mov(rsi, r11).unwrap();
        a.sysretq().unwrap();
    });
    machine.ram.write(0x30000, &kernel);
    machine = machine.user().with(|state| {
        state.msrs.star = 0x001b << 48 | 0x0008 << 32;
        state.msrs.lstar = 0x30000;
        state.msrs.sfmask = 0x200;
        state.rflags |= 0x200;
    });
    // HLT in user mode is a general protection fault.
    let frame = machine.fault(13);
    let state = machine.cpu.state();
    assert_eq!(state.gpr[gpr::RBX], 2);
    assert_eq!(state.gpr[gpr::RSI] & 0x202, 0x202);
    assert_eq!(
        frame[2],
        u64::from(USER_CS),
        "the fault came from user mode"
    );
    assert_eq!(frame[5], u64::from(USER_SS));
    assert_eq!(state.gpr[gpr::RSP], KERNEL_STACK - 48);
}

#[test]
fn iret_leads_to_user_mode_and_drops_kernel_segments() {
    let mut machine = Machine::assembled(|a| {
        for value in [
            USER_SS.into(),
            0x7000,
            0x202,
            USER_CS.into(),
            CODE as i32 + 0x100,
        ] {
            a.push(value).unwrap();
        }
        a.iretq().unwrap();
    });
    let user = assemble(64, CODE + 0x100, |a| {
        a.mov(eax, ds).unwrap();
        a.cli().unwrap();
    });
    machine.ram.write(CODE + 0x100, &user);
    let frame = machine.fault(13);
    let state = machine.cpu.state();
    assert_eq!(state.gpr[gpr::RAX], 0);
    assert_eq!(
        (frame[2], frame[4], frame[5]),
        (USER_CS.into(), 0x7000, USER_SS.into())
    );
    assert_eq!(frame[3] & 0x200, 0x200);
}

#[test]
fn compatibility_mode_runs_32_bit_code_and_returns() {
    let mut machine = Machine::assembled(|a| {
        a.push(i32::from(CODE_32)).unwrap();
        a.push(CODE as i32 + 0x100).unwrap();
        a.db(&[0x48, 0xcb]).unwrap();
    });
    let compatible = assemble(32, CODE + 0x100, |a| {
        a.mov(eax, -1).unwrap();
        a.inc(eax).unwrap();
        a.push(0x77).unwrap();
        a.pop(ebx).unwrap();
        a.call(CODE + 0x140).unwrap();
        a.db(&[0xea]).unwrap();
        a.dd(&[CODE as u32 + 0x180]).unwrap();
        a.dw(&[KERNEL_CS]).unwrap();
    });
    machine.ram.write(CODE + 0x100, &compatible);
    let function = assemble(32, CODE + 0x140, |a| {
        a.mov(ecx, dword_ptr(esp)).unwrap();
        a.ret().unwrap();
    });
    machine.ram.write(CODE + 0x140, &function);
    machine.ram.write(CODE + 0x180, &[0xf4]);
    let state = machine.halt();
    assert_eq!((state.gpr[gpr::RAX], state.gpr[gpr::RBX]), (0, 0x77));
    assert!((CODE + 0x100..CODE + 0x140).contains(&state.gpr[gpr::RCX]));
    assert_eq!(state.rip, CODE + 0x181);
}

#[test]
fn a_segment_ends_at_its_limit() {
    let code = assemble(32, CODE, |a| {
        a.mov(al, byte_ptr(0xffff)).unwrap();
        a.mov(eax, dword_ptr(0xfffd)).unwrap();
    });
    let mut machine = Machine::long(&code).with(|state| {
        state.msrs.efer = 0;
        state.cr0 &= !(1 << 31);
        state.cr4 = 0;
        state.segments[segment::CS].access = 0xc09b;
        state.segments[segment::DS].limit = 0xffff;
    });
    // A 32-bit interrupt gate for #GP, in a table of 8-byte gates.
    machine.ram.set(
        IDT + 13 * 8,
        0x0002_8e00_0008_00d0 & !0xffff_0000 | u64::from(CODE_32) << 16,
    );
    let state = machine.halt();
    assert_eq!(state.rip, HANDLERS + 13 * 16 + 1);
    let frame = machine.ram.get(state.gpr[gpr::RSP]);
    assert_eq!((frame as u32, (frame >> 32) as u32), (0, CODE as u32 + 5));
}

#[test]
fn sixteen_bit_code_wraps_its_addresses() {
    let machine = Machine::reset(0);
    // MOV BX, 0xffff; MOV AL, [BX+0x11]; PUSHA; POPA; LOOP $; HLT.
    machine.ram.write(
        0x8000,
        &[
            0xbb, 0xff, 0xff, 0x8a, 0x47, 0x11, 0x60, 0x61, 0xb9, 3, 0, 0xe2, 0xfe, 0xf4,
        ],
    );
    machine.ram.write(0x10, &[0x5a]);
    let mut machine = machine.with(|state| {
        state.segments[segment::CS].base = 0;
        state.segments[segment::CS].selector = 0;
        state.rip = 0x8000;
        state.gpr[gpr::RSP] = 0x7000;
    });
    let state = machine.halt();
    assert_eq!(state.gpr[gpr::RAX] & 0xff, 0x5a);
    assert_eq!((state.gpr[gpr::RCX], state.gpr[gpr::RSP]), (0, 0x7000));
}

#[test]
fn real_mode_interrupts_go_through_the_vector_table() {
    let machine = Machine::reset(0);
    machine.ram.write(0x8000, &[0xcd, 0x21, 0xf4]);
    // The handler: INC CX; IRET.
    machine.ram.write(0x9000, &[0x41, 0xcf]);
    machine.ram.write(0x21 * 4, &[0x00, 0x10, 0x00, 0x08]);
    let mut machine = machine.with(|state| {
        state.segments[segment::CS].base = 0;
        state.segments[segment::CS].selector = 0;
        state.rip = 0x8000;
        state.gpr[gpr::RSP] = 0x7000;
    });
    assert_eq!(machine.halt().gpr[gpr::RCX], 1);
}

#[test]
fn swapgs_and_the_gs_base_work_in_the_kernel_only() {
    let mut machine = Machine::assembled(|a| {
        a.swapgs().unwrap();
        a.mov(rax, qword_ptr(8).gs()).unwrap();
        a.hlt().unwrap();
    })
    .with(|state| state.msrs.kernel_gs_base = DATA);
    machine.ram.set(DATA + 8, 99);
    assert_eq!(machine.halt().gpr[gpr::RAX], 99);
    let mut machine = Machine::assembled(|a| {
        a.swapgs().unwrap();
    })
    .user();
    machine.fault(13);
}

#[test]
fn what_the_baseline_does_not_offer_is_undefined() {
    type Build = fn(&mut CodeAssembler);
    let builds: [Build; 4] = [
        |a| a.vzeroupper().unwrap(),
        |a| a.xgetbv().unwrap(),
        |a| a.andn(eax, ebx, ecx).unwrap(),
        |a| a.rdrand(eax).unwrap(),
    ];
    for build in builds {
        Machine::assembled(build).fault(6);
    }
    // TZCNT without BMI is BSF: it leaves its destination alone for 0.
    let mut machine = Machine::assembled(|a| {
        a.mov(eax, 77).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.tzcnt(eax, ebx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(machine.halt().gpr[gpr::RAX], 77);
}
