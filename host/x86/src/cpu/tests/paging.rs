//! Page walks: their rights, their bits, their faults.

use super::*;
use crate::state::gpr;
use iced_x86::code_asm::*;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;

fn entry(address: u64) -> u64 {
    PT + (address >> 12) * 8
}

#[test]
fn reads_set_accessed_and_writes_set_dirty() {
    let mut machine = Machine::assembled(|a| {
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.mov(qword_ptr(DATA + 0x1000), rax).unwrap();
        a.hlt().unwrap();
    });
    machine.halt();
    let bits = |address| machine.ram.get(entry(address)) & (ACCESSED | DIRTY);
    assert_eq!(bits(DATA), ACCESSED);
    assert_eq!(bits(DATA + 0x1000), ACCESSED | DIRTY);
    assert_eq!(machine.ram.get(PML4) & (ACCESSED | DIRTY), ACCESSED);
    let mark = machine.ram.take_mark(entry(DATA));
    assert_eq!(mark, MARK.get(), "the tables are RAM too");
}

#[test]
fn a_write_after_a_read_still_sets_dirty() {
    let mut machine = Machine::assembled(|a| {
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.mov(qword_ptr(DATA), rax).unwrap();
        a.hlt().unwrap();
    });
    machine.halt();
    assert_ne!(machine.ram.get(entry(DATA)) & DIRTY, 0);
}

#[test]
fn faults_say_what_was_missing() {
    let read = |a: &mut CodeAssembler| {
        a.mov(rbx, qword_ptr(DATA + 8)).unwrap();
    };
    let write = |a: &mut CodeAssembler| {
        a.mov(dword_ptr(DATA + 8), 7).unwrap();
    };
    type Build = fn(&mut CodeAssembler);
    let cases: [(Build, bool, u64, u64); 6] = [
        (read, false, 0, 0),
        (write, false, 0, 2),
        (write, false, PRESENT | USER, 3),
        (read, true, PRESENT | WRITABLE, 5),
        (write, true, PRESENT | USER, 7),
        (read, false, PRESENT | 1 << 45, 9),
    ];
    for (build, user, bits, code) in cases {
        let mut machine = Machine::assembled(build);
        machine.ram.set(entry(DATA), DATA | bits);
        if user {
            machine = machine.user();
        }
        let frame = machine.fault(14);
        assert_eq!(frame[0], code, "entry {bits:#x}");
        assert_eq!(frame[1], CODE, "RIP is that of the instruction");
        assert_eq!(machine.cpu.state().cr2, DATA + 8);
    }
}

#[test]
fn write_protection_binds_the_supervisor_only_with_wp() {
    let mut machine = Machine::assembled(|a| {
        a.mov(dword_ptr(DATA), 7).unwrap();
        a.hlt().unwrap();
    })
    .with(|state| state.cr0 &= !(1 << 16));
    machine.ram.set(entry(DATA), DATA | PRESENT | USER);
    machine.halt();
    assert_eq!(machine.ram.get(DATA), 7);
}

#[test]
fn a_page_without_execution_faults_at_the_fetch() {
    let mut machine = Machine::assembled(|a| {
        a.mov(rax, DATA).unwrap();
        a.jmp(rax).unwrap();
    });
    machine.ram.set(entry(DATA), DATA | 7 | NO_EXECUTE);
    let frame = machine.fault(14);
    assert_eq!((frame[0], frame[1]), (0x11, DATA));
}

#[test]
fn a_changed_entry_counts_after_invlpg_and_after_cr3() {
    for by_cr3 in [false, true] {
        let mut machine = Machine::assembled(|a| {
            a.mov(rax, qword_ptr(DATA)).unwrap();
            a.mov(qword_ptr(entry(DATA)), rbx).unwrap();
            if by_cr3 {
                a.mov(rcx, cr3).unwrap();
                a.mov(cr3, rcx).unwrap();
            } else {
                a.invlpg(byte_ptr(DATA)).unwrap();
            }
            a.mov(rdx, qword_ptr(DATA)).unwrap();
            a.hlt().unwrap();
        })
        .with(|state| state.gpr[gpr::RBX] = (DATA + 0x1000) | 7);
        machine.ram.set(DATA, 1);
        machine.ram.set(DATA + 0x1000, 2);
        let state = machine.halt();
        assert_eq!((state.gpr[gpr::RAX], state.gpr[gpr::RDX]), (1, 2));
    }
}

#[test]
fn global_pages_outlive_cr3_but_not_cr4() {
    for flush_all in [false, true] {
        let mut machine = Machine::assembled(|a| {
            a.mov(rax, qword_ptr(DATA)).unwrap();
            a.mov(qword_ptr(entry(DATA)), rbx).unwrap();
            a.mov(rcx, cr3).unwrap();
            a.mov(cr3, rcx).unwrap();
            if flush_all {
                a.mov(rcx, cr4).unwrap();
                a.xor(rcx, 0x80).unwrap();
                a.mov(cr4, rcx).unwrap();
            }
            a.mov(rdx, qword_ptr(DATA)).unwrap();
            a.hlt().unwrap();
        })
        .with(|state| state.gpr[gpr::RBX] = (DATA + 0x1000) | 7);
        machine.ram.set(entry(DATA), DATA | 7 | 1 << 8);
        machine.ram.set(DATA, 1);
        machine.ram.set(DATA + 0x1000, 2);
        let state = machine.halt();
        assert_eq!(state.gpr[gpr::RDX], if flush_all { 2 } else { 1 });
    }
}

#[test]
fn an_address_that_is_not_canonical_is_a_general_protection_or_stack_fault() {
    let mut machine = Machine::assembled(|a| {
        a.mov(rax, qword_ptr(rbx)).unwrap();
    })
    .with(|state| state.gpr[gpr::RBX] = 1 << 47);
    assert_eq!(machine.fault(13)[0], 0);
    // The same with the stack pointer: the handler then needs a good stack.
    let mut machine = Machine::assembled(|a| {
        a.push(rax).unwrap();
    })
    .with(|state| state.gpr[gpr::RSP] = 1 << 47 | 0x100);
    machine.set_gate(12, HANDLERS + 12 * 16, 1);
    machine.ram.set(TSS + 36, STACK);
    assert_eq!(machine.fault(12)[0], 0);
}

#[test]
fn tables_outside_of_ram_are_a_fault() {
    let mut machine = Machine::assembled(|a| {
        a.mov(rax, qword_ptr(0x4000_0000)).unwrap();
    });
    machine.ram.set(PDPT + 8, MMIO | 7);
    assert_eq!(machine.fault(14)[0], 0);
}

#[test]
fn each_store_marks_its_page() {
    let mut machine = Machine::assembled(|a| {
        a.mov(byte_ptr(DATA), 1).unwrap();
        a.inc(dword_ptr(DATA + 0x1000)).unwrap();
        a.lock().add(qword_ptr(DATA + 0x2000), 1).unwrap();
        a.mov(qword_ptr(DATA + 0x3ffc), rax).unwrap();
        a.push(rax).unwrap();
        a.mov(rax, qword_ptr(DATA + 0x6000)).unwrap();
        a.hlt().unwrap();
    });
    machine.halt();
    for (page, marked) in [
        (0, true),
        (1, true),
        (2, true),
        (3, true),
        (4, true),
        (6, false),
    ] {
        assert_eq!(
            machine.ram.take_mark(DATA + page * 0x1000),
            if marked { MARK.get() } else { 0 },
            "page {page}"
        );
    }
    assert_eq!(machine.ram.take_mark(STACK - 8), MARK.get());
}
