//! Code that changes, by this processor's hand or another's.

use super::*;
use crate::state::gpr;
use iced_x86::code_asm::*;

#[test]
fn an_instruction_may_change_the_next_one() {
    let mut machine = Machine::assembled(|a| {
        let mut target = a.create_label();
        a.lea(rbx, byte_ptr(target)).unwrap();
        a.mov(byte_ptr(rbx + 1), 42).unwrap();
        a.set_label(&mut target).unwrap();
        a.mov(eax, 1).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(machine.halt().gpr[gpr::RAX], 42);
}

#[test]
fn a_loop_may_change_itself_each_time_round() {
    let mut machine = Machine::assembled(|a| {
        let (mut again, mut target) = (a.create_label(), a.create_label());
        a.mov(ecx, 50).unwrap();
        a.lea(rbx, byte_ptr(target)).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(byte_ptr(rbx + 2), cl).unwrap();
        a.set_label(&mut target).unwrap();
        a.add(esi, 0x11).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(machine.halt().gpr[gpr::RSI], (1..=50).sum::<u64>());
}

#[test]
fn a_function_in_another_page_is_seen_to_change() {
    let mut machine = Machine::assembled(|a| {
        a.call(DATA).unwrap();
        a.mov(ebx, eax).unwrap();
        a.mov(byte_ptr(DATA + 1), 9).unwrap();
        a.call(DATA).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.write(
        DATA,
        &assemble(64, DATA, |a| {
            a.mov(eax, 3).unwrap();
            a.ret().unwrap();
        }),
    );
    let state = machine.halt();
    assert_eq!((state.gpr[gpr::RBX], state.gpr[gpr::RAX]), (3, 9));
}

#[test]
fn an_instruction_across_pages_is_seen_to_change_in_both() {
    let at = DATA - 2;
    let mut machine = Machine::assembled(|a| {
        a.call(at).unwrap();
        a.mov(ebx, eax).unwrap();
        a.mov(byte_ptr(DATA), 9).unwrap();
        a.call(at).unwrap();
        a.hlt().unwrap();
    });
    // MOV EAX, imm32 with its immediate's second byte first in the second page; RET.
    machine.ram.write(at, &[0xb8, 1, 2, 0, 0, 0xc3]);
    let state = machine.halt();
    assert_eq!((state.gpr[gpr::RBX], state.gpr[gpr::RAX]), (0x201, 0x901));
}

#[test]
fn what_another_processor_changed_counts_after_a_serialising_instruction() {
    let program = assemble(64, CODE, |a| {
        a.call(DATA).unwrap();
        a.hlt().unwrap();
        a.xor(eax, eax).unwrap();
        a.cpuid().unwrap();
        a.call(DATA).unwrap();
        a.hlt().unwrap();
    });
    let mut first = Machine::long(&program);
    first.ram.write(DATA, &[0xbb, 3, 0, 0, 0, 0xc3]);
    assert_eq!(first.halt().gpr[gpr::RBX], 3);
    let mut second = Machine::beside(1, Arc::clone(&first.ram), Arc::clone(&first.code));
    let writer = assemble(64, CODE + 0x800, |a| {
        a.mov(byte_ptr(DATA + 1), 5).unwrap();
        a.hlt().unwrap();
    });
    second.enter_long(&program);
    second.ram.write(CODE + 0x800, &writer);
    let mut second = second.with(|state| state.rip = CODE + 0x800);
    second.halt();
    let mut first = first.with(|state| state.activity = crate::state::Activity::Running);
    assert_eq!(first.halt().gpr[gpr::RBX], 5);
}

#[test]
fn what_a_device_wrote_counts_when_its_page_is_entered_anew() {
    let mut machine = Machine::assembled(|a| {
        a.call(DATA).unwrap();
        a.hlt().unwrap();
        a.mov(rcx, cr3).unwrap();
        a.mov(cr3, rcx).unwrap();
        a.call(DATA).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.write(DATA, &[0xbb, 3, 0, 0, 0, 0xc3]);
    assert_eq!(machine.halt().gpr[gpr::RBX], 3);
    machine.ram.write(DATA + 1, &[6]);
    let mut state = machine.cpu.state();
    state.activity = crate::state::Activity::Running;
    machine.cpu.activity = crate::state::Activity::Running;
    machine.cpu.budget = 0;
    assert_eq!(machine.halt().gpr[gpr::RBX], 6);
}

#[test]
fn data_beside_code_does_not_disturb_it() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(dword_ptr(CODE + 0xf00)).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    machine.halt();
    assert_eq!(machine.ram.get(CODE + 0xf00), 1000);
}

#[test]
fn a_page_whose_code_was_overwritten_is_plain_memory_again() {
    let mut machine = Machine::assembled(|a| {
        a.call(DATA).unwrap();
        a.hlt().unwrap();
        a.mov(dword_ptr(DATA), 0).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.write(DATA, &[0xc3]);
    machine.halt();
    assert!(machine.code.holds_code(DATA >> 12));
    let mut machine = machine.with(|state| state.activity = Activity::Running);
    machine.halt();
    assert!(!machine.code.holds_code(DATA >> 12));
}
