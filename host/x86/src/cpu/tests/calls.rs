//! Branches out of a page: by calls, returns, and to where no code can be.

use super::*;
use crate::state::gpr;
use iced_x86::code_asm::*;

/// Jumps to addresses that are not canonical, made so that address and context together are those of
/// a jump that is known.
fn jump_nowhere(before: impl FnOnce(&mut CodeAssembler), target: u64) -> Machine {
    let machine = Machine::assembled(|a| {
        for _ in 0..2 {
            a.mov(rax, DATA).unwrap();
            a.call(rax).unwrap();
        }
        before(a);
        // The stack may be written again, so that the call is tried by translated code.
        a.push(rax).unwrap();
        a.pop(rax).unwrap();
        a.mov(rax, target).unwrap();
        a.call(rax).unwrap();
        a.mov(esi, 0x77).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.write(
        DATA,
        &assemble(64, DATA, |a| {
            a.mov(eax, 3).unwrap();
            a.cpuid().unwrap();
            a.ret().unwrap();
        }),
    );
    machine
}

#[test]
fn a_jump_to_nowhere_finds_no_code_of_a_generation_before() {
    let change = |a: &mut CodeAssembler| a.mov(byte_ptr(DATA + 1), 9).unwrap();
    let mut machine = jump_nowhere(change, DATA.wrapping_sub(1 << 50));
    let _frame = machine.fault(13);
}

#[test]
fn a_jump_to_nowhere_finds_no_code_that_was_freed() {
    let change_and_spin = |a: &mut CodeAssembler| {
        let mut spin = a.create_label();
        a.mov(byte_ptr(DATA + 1), 9).unwrap();
        a.mov(ecx, 2000).unwrap();
        a.set_label(&mut spin).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(spin).unwrap();
    };
    let mut machine = jump_nowhere(change_and_spin, DATA.wrapping_sub(1 << 50));
    let _frame = machine.fault(13);
}

#[test]
fn a_jump_to_nowhere_is_none_to_an_empty_entry() {
    // `with` flushes: the contexts are those of the code that runs.
    let mut machine = Machine::assembled(|a| a.jmp(rax).unwrap()).with(|_| {});
    let key = machine.cpu.blocks.keys[0];
    machine.cpu.regs[gpr::RAX] = key.wrapping_add(1).wrapping_neg();
    let _frame = machine.fault(13);
}

#[test]
fn user_code_does_not_reach_the_supervisors_by_a_jump_to_nowhere() {
    let user = CODE + 0x1000;
    let mut machine = Machine::assembled(|a| {
        for _ in 0..2 {
            a.mov(rax, DATA).unwrap();
            a.call(rax).unwrap();
        }
        for value in [USER_SS.into(), 0x9_0000, 2, USER_CS.into(), user as i32] {
            a.push(value).unwrap();
        }
        a.iretq().unwrap();
    });
    let call = |a: &mut CodeAssembler| {
        for _ in 0..2 {
            a.push(rax).unwrap();
            a.pop(rax).unwrap();
        }
        a.mov(rax, DATA.wrapping_sub(1 << 49)).unwrap();
        a.call(rax).unwrap();
        a.hlt().unwrap();
    };
    machine.ram.write(user, &assemble(64, user, call));
    machine
        .ram
        .set(PT + (DATA >> 12) * 8, DATA | PRESENT_WRITABLE);
    let count = |a: &mut CodeAssembler| {
        a.inc(r8d).unwrap();
        a.ret().unwrap();
    };
    machine.ram.write(DATA, &assemble(64, DATA, count));
    assert_eq!(machine.halt().gpr[8], 2);
}

#[test]
fn a_jump_may_be_further_from_its_page_than_from_itself() {
    const ALL: u64 = 7;
    let (source, goal) = (0x8010_0f00u64, 0x1_0010_0800u64);
    let distance = goal - (source + 5);
    assert!(distance <= 0x7fff_ffff && 0xf05 + distance > 0x7fff_ffff);
    let mut machine = Machine::assembled(|a| {
        a.mov(rbx, source).unwrap();
        a.mov(rbp, CODE + 0x800).unwrap();
        for (target, times) in [(rbp, 3), (rbx, 5)] {
            for _ in 0..times {
                a.call(target).unwrap();
            }
        }
        a.hlt().unwrap();
    });
    for (gigabyte, tables, page) in [(2, 0x30_0000, 0x2000), (4, 0x30_2000, 0x3000)] {
        machine.ram.set(PDPT + gigabyte * 8, tables | ALL);
        machine.ram.set(tables, (tables + 0x1000) | ALL);
        machine.ram.set(tables + 0x1800, (CODE + page) | ALL);
    }
    let mut jump = vec![0xe9];
    jump.extend_from_slice(&(distance as u32).to_le_bytes());
    machine.ram.write(CODE + 0x2f00, &jump);
    // INC R8; RET where it goes, INC R9; RET four gigabytes before that.
    machine.ram.write(CODE + 0x3800, &[0x49, 0xff, 0xc0, 0xc3]);
    machine.ram.write(CODE + 0x800, &[0x49, 0xff, 0xc1, 0xc3]);
    let state = machine.halt();
    assert_eq!((state.gpr[8], state.gpr[9]), (5, 3));
}

#[test]
fn returns_go_where_the_stack_says() {
    let mut machine = Machine::assembled(|a| {
        let (mut again, mut routine, mut twice, mut deep, mut end) = (
            a.create_label(),
            a.create_label(),
            a.create_label(),
            a.create_label(),
            a.create_label(),
        );
        a.mov(r12d, 50).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(routine).unwrap();
        a.inc(r8).unwrap();
        // Returns over its caller's head.
        a.call(twice).unwrap();
        // A call that is none, and a return that is a jump.
        let mut here = a.create_label();
        a.call(here).unwrap();
        a.set_label(&mut here).unwrap();
        a.pop(rax).unwrap();
        a.lea(rdx, ptr(end)).unwrap();
        a.push(rdx).unwrap();
        a.ret().unwrap();
        a.ud2().unwrap();
        a.set_label(&mut end).unwrap();
        a.mov(ecx, 300).unwrap();
        a.call(deep).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut routine).unwrap();
        a.inc(r9).unwrap();
        a.ret().unwrap();
        a.set_label(&mut twice).unwrap();
        let mut inner = a.create_label();
        a.call(inner).unwrap();
        a.ud2().unwrap();
        a.set_label(&mut inner).unwrap();
        a.pop(rax).unwrap();
        a.inc(r10).unwrap();
        a.ret().unwrap();
        a.set_label(&mut deep).unwrap();
        let mut bottom = a.create_label();
        a.dec(ecx).unwrap();
        a.jz(bottom).unwrap();
        a.call(deep).unwrap();
        a.inc(r11).unwrap();
        a.set_label(&mut bottom).unwrap();
        a.ret().unwrap();
    });
    let state = machine.halt();
    let counts = [8, 9, 10, 11].map(|register| state.gpr[register]);
    assert_eq!(counts, [50, 50, 50, 50 * 299]);
    assert_eq!(state.gpr[gpr::RSP], STACK);
}

#[test]
fn calls_that_never_return_do_not_use_up_the_hosts_stack() {
    // A page of calls to the next instruction, again and again on the same few pages of stack.
    let machine = Machine::long(&[]);
    let mut code = [0xe8, 0, 0, 0, 0].repeat(700);
    code.extend(assemble(64, CODE + code.len() as u64, |a| {
        a.add(rsp, 700 * 8).unwrap();
        a.dec(r12d).unwrap();
        let mut end = a.create_label();
        a.jz(end).unwrap();
        a.jmp(CODE).unwrap();
        a.set_label(&mut end).unwrap();
        a.hlt().unwrap();
    }));
    machine.ram.write(CODE, &code);
    let mut machine = machine.with(|state| state.gpr[12] = 3000);
    // On a small stack: what 512 blocks of 700 calls each would take is not there.
    let thread = std::thread::Builder::new().stack_size(1 << 20);
    let ended = thread.spawn(move || machine.halt().gpr[gpr::RSP]).unwrap();
    assert_eq!(ended.join().unwrap(), STACK);
}

#[test]
fn a_return_to_nowhere_fails_before_it_has_popped() {
    let mut machine = Machine::assembled(|a| {
        let (mut again, mut routine) = (a.create_label(), a.create_label());
        a.mov(r12d, 5).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(routine).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.mov(rax, 1u64 << 62).unwrap();
        a.push(rax).unwrap();
        a.jmp(routine).unwrap();
        a.set_label(&mut routine).unwrap();
        a.ret().unwrap();
    });
    let code = machine.ram.get(CODE);
    assert_ne!(code, 0);
    let frame = machine.fault(13);
    let ret = (CODE..CODE + 0x40)
        .rev()
        .find(|&at| machine.ram.get(at) & 0xff == 0xc3);
    // Error code, RIP, and RSP.
    assert_eq!((frame[0], Some(frame[1]), frame[4]), (0, ret, STACK - 8));
}

#[test]
fn a_return_behind_the_end_of_the_lower_half_fails_before_it_has_popped() {
    const LAST: u64 = 0x7fff_ffff_f000;
    let mut machine = Machine::assembled(|a| {
        a.mov(r12d, 60).unwrap();
        a.mov(rbp, LAST + 0xffb).unwrap();
        a.jmp(rbp).unwrap();
    })
    .on_another_stack(13);
    for (table, at, next) in [
        (PML4, 255, 0x14000),
        (0x14000, 511, 0x15000),
        (0x15000, 511, 0x16000),
        (0x16000, 511, CODE + 0x3000),
    ] {
        machine.ram.set(table + at * 8, next | 7);
    }
    // Calls whose next instruction would be the first address that is none; the last returns.
    let routine = assemble(64, LAST + 0xf00, |a| {
        let mut returns = a.create_label();
        a.dec(r12d).unwrap();
        a.jz(returns).unwrap();
        a.add(rsp, 8).unwrap();
        a.jmp(LAST + 0xffb).unwrap();
        a.set_label(&mut returns).unwrap();
        a.ret().unwrap();
    });
    let call = assemble(64, LAST + 0xffb, |a| a.call(LAST + 0xf00).unwrap());
    assert_eq!(call.len(), 5);
    machine.ram.write(CODE + 0x3f00, &routine);
    machine.ram.write(CODE + 0x3ffb, &call);
    let frame = machine.fault(13);
    let ret = LAST + 0xf00 + routine.len() as u64 - 1;
    assert_eq!((frame[1], frame[4]), (ret, STACK - 8));
}
