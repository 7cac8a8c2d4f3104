//! Operands that share a look into the TLB, where that look goes wrong.

use super::*;
use crate::state::gpr;
use iced_x86::code_asm::*;

/// A loop over fields of an object, which is moved across the end of a page.
#[test]
fn an_object_may_lie_in_two_pages() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(rbx, DATA + 0xf80).unwrap();
        a.mov(r12d, 0x100).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(dword_ptr(rbx + 24), r12d).unwrap();
        a.mov(word_ptr(rbx + 2), 0x7788).unwrap();
        a.mov(qword_ptr(rbx + 8), rbx).unwrap();
        a.mov(rcx, qword_ptr(rbx + 8)).unwrap();
        a.add(r15, rcx).unwrap();
        a.xor(r14w, word_ptr(rbx + 2)).unwrap();
        a.add(r13d, dword_ptr(rbx + 24)).unwrap();
        a.inc(rbx).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    let state = machine.halt();
    let sum: u64 = (DATA + 0xf80..).take(0x100).sum();
    assert_eq!(state.gpr[15], sum);
    assert_eq!(state.gpr[14] & 0xffff, 0);
    assert_eq!(state.gpr[13], 0x100 * 0x101 / 2);
    for page in [DATA, DATA + 0x1000] {
        assert_eq!(machine.ram.take_mark(page), MARK.get());
    }
}

/// Reads and then writes an object again and again, the last time in a page with other `bits`; the
/// frame of the fault.
fn last_round(bits: u64) -> ([u64; 6], CpuState) {
    let mut machine = Machine::assembled(|a| {
        let (mut again, mut start) = (a.create_label(), a.create_label());
        a.mov(ebx, DATA as u32).unwrap();
        a.mov(r12d, 30).unwrap();
        a.jmp(start).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(rax, qword_ptr(rbx + 16)).unwrap();
        a.inc(rdi).unwrap();
        a.mov(qword_ptr(rbx), rdi).unwrap();
        a.inc(rsi).unwrap();
        a.set_label(&mut start).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.mov(ebx, (DATA + 0x1000) as u32).unwrap();
        a.jmp(again).unwrap();
    })
    .on_another_stack(14);
    machine.ram.set(DATA + 0x1010, 77);
    machine.map(DATA + 0x1000, bits);
    (machine.fault(14), machine.cpu.state())
}

#[test]
fn what_may_only_be_read_is_read_before_the_store_fails() {
    let (frame, state) = last_round(PRESENT);
    // Present, and a write; behind JMP, the first instruction and the INC.
    assert_eq!(frame[0], 3);
    assert_eq!(state.cr2, DATA + 0x1000);
    assert_eq!(state.gpr[gpr::RAX], 77);
    assert_eq!((state.gpr[gpr::RDI], state.gpr[gpr::RSI]), (30, 29));
}

#[test]
fn what_is_missing_fails_at_the_first_that_looks() {
    let (frame, state) = last_round(0);
    assert_eq!(frame[0], 0);
    assert_eq!(state.cr2, DATA + 0x1010);
    assert_eq!((state.gpr[gpr::RDI], state.gpr[gpr::RSI]), (29, 29));
}

#[test]
fn a_frame_may_lie_in_two_pages() {
    let mut machine = Machine::assembled(|a| {
        let (mut again, mut routine) = (a.create_label(), a.create_label());
        a.mov(r12d, 60).unwrap();
        a.mov(rsp, STACK + 0x80).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(rdi, r12).unwrap();
        a.call(routine).unwrap();
        a.add(r15, rax).unwrap();
        a.sub(rsp, 4).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut routine).unwrap();
        a.push(rbp).unwrap();
        a.push(r15).unwrap();
        a.sub(rsp, 0x38).unwrap();
        a.mov(qword_ptr(rsp + 0x20), rdi).unwrap();
        a.mov(dword_ptr(rsp + 8), 5).unwrap();
        a.xor(r15d, r15d).unwrap();
        a.mov(eax, dword_ptr(rsp + 8)).unwrap();
        a.add(rax, qword_ptr(rsp + 0x20)).unwrap();
        a.add(rsp, 0x38).unwrap();
        a.pop(r15).unwrap();
        a.pop(rbp).unwrap();
        a.ret().unwrap();
    });
    let state = machine.halt();
    assert_eq!(state.gpr[15], 60 * 61 / 2 + 60 * 5);
    assert_eq!(state.gpr[gpr::RSP], STACK + 0x80 - 60 * 4);
}

#[test]
fn code_that_changes_itself_by_a_shared_look_runs_as_changed() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(r12d, 40).unwrap();
        a.mov(rbx, CODE + 0x800).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(rcx, qword_ptr(rbx + 0x40)).unwrap();
        // The immediate of what follows.
        a.add(byte_ptr(CODE + 0x23), 1).unwrap();
        a.mov(qword_ptr(rbx + 0x48), rcx).unwrap();
        a.add(r15d, 0).unwrap();
        a.mov(qword_ptr(rbx + 0x50), r15).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    let code = machine.ram.get(CODE + 0x20);
    assert_eq!(
        code & 0xffff_ffff,
        0x00c7_8341,
        "ADD R15D, 0 is there: {code:x}"
    );
    assert_eq!(machine.halt().gpr[15], (1..=40).sum());
}

/// The device has the object: each access is its.
#[test]
fn a_device_answers_each_operand() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(ebx, MMIO as u32).unwrap();
        a.mov(r12d, 8).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(eax, dword_ptr(rbx + 4)).unwrap();
        a.mov(dword_ptr(rbx + 12), eax).unwrap();
        a.mov(dword_ptr(DATA), r12d).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    let mut accesses = Vec::new();
    loop {
        match machine.cpu.run() {
            Stop::Halted => break,
            Stop::MmioRead { address, .. } => {
                accesses.push((address, None));
                machine.cpu.complete_read(7);
            }
            Stop::MmioWrite { address, value, .. } => {
                accesses.push((address, Some(value)));
                machine.cpu.complete_write();
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(accesses.len(), 16);
    for pair in accesses.chunks(2) {
        assert_eq!(pair, [(MMIO + 4, None), (MMIO + 12, Some(7))]);
    }
}
