//! What lockstep notices.

use super::*;
use crate::state::gpr;
use iced_x86::code_asm::*;

/// Runs a loop in lockstep, spoils its translation, and says what is found then.
#[cfg(target_arch = "x86_64")]
fn spoiled(old: &[u8], new: &[u8]) -> Option<String> {
    let mut machine = Machine::assembled(|a| {
        let (mut start, mut again) = (a.create_label(), a.create_label());
        a.mov(rbx, DATA).unwrap();
        a.set_label(&mut start).unwrap();
        a.mov(ecx, 30).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(eax, 0x33).unwrap();
        a.mov(qword_ptr(rbx), rax).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.out(0x80, al).unwrap();
        a.jmp(start).unwrap();
    });
    machine.cpu.translator.verifies = true;
    let stop = machine.cpu.run();
    assert!(matches!(stop, Stop::PortWrite { .. }), "{stop:?}");
    assert_eq!(machine.cpu.difference(), None);
    assert!(machine.cpu.verified() >= 30, "{}", machine.cpu.verified());
    let mut count = 0;
    while machine.cpu.translator.spoil(old, new) {
        count += 1;
    }
    assert!(count > 0, "there is such code");
    machine.cpu.complete_write();
    (machine.cpu.run() == Stop::Differs).then(|| machine.cpu.difference().unwrap().to_owned())
}

#[cfg(target_arch = "x86_64")]
#[test]
fn lockstep_stops_where_translated_code_is_wrong() {
    if module_path!().ends_with("translated::lockstep") {
        // ADD EAX, 0x33 becomes ADD EAX, 0x34.
        let report = spoiled(&[0x05, 0x33, 0, 0, 0], &[0x05, 0x34, 0, 0, 0]).unwrap();
        assert!(report.contains("0x66               0x67  <--"), "{report}");
        assert!(report.contains("instead of 0x66"), "{report}");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn lockstep_sees_stores_of_translated_code() {
    if module_path!().ends_with("translated::lockstep") {
        // MOV [R10], RAX becomes MOV [R10], RDX.
        let report = spoiled(&[0x49, 0x89, 0x02], &[0x49, 0x89, 0x12]).unwrap();
        assert!(report.contains("a byte of RAM became"), "{report}");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn lockstep_sees_a_page_that_is_not_marked() {
    if module_path!().ends_with("translated::lockstep") {
        // MOV BYTE PTR [R11], the mark, becomes NOP DWORD PTR [RAX].
        let mark = [0x41, 0xc6, 0x03, MARK.get()];
        let report = spoiled(&mark, &[0x0f, 0x1f, 0x40, 0]).unwrap();
        assert!(report.contains("not marked dirty"), "{report}");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn what_lockstep_cannot_do_in_the_middle_of_a_trace_is_done_by_the_right_block() {
    // The local APIC's registers where the tables reach.
    const APIC: u64 = 0x1000_0000;
    if !module_path!().ends_with("translated::lockstep") {
        return;
    }
    let mut machine = Machine::assembled(|a| {
        let (mut again, mut done) = (a.create_label(), a.create_label());
        a.mov(ecx, 0x1b).unwrap();
        a.mov(eax, APIC as u32 | 0x900).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(rbx, DATA).unwrap();
        a.mov(ecx, 60).unwrap();
        a.xor(r8d, r8d).unwrap();
        a.set_label(&mut again).unwrap();
        a.inc(edx).unwrap();
        a.test(ecx, ecx).unwrap();
        a.je(done).unwrap();
        // Memory at first, and a device later.
        a.mov(eax, dword_ptr(rbx)).unwrap();
        a.dec(ecx).unwrap();
        a.cmp(ecx, 20).unwrap();
        a.jne(again).unwrap();
        a.mov(rbx, APIC + 0x20).unwrap();
        a.inc(r8d).unwrap();
        a.jmp(again).unwrap();
        a.set_label(&mut done).unwrap();
        a.hlt().unwrap();
    });
    machine.cpu.translator.verifies = true;
    // So that it is known by then what follows what.
    machine.cpu.translator.after = 3;
    let state = machine.halt();
    assert_eq!(machine.cpu.difference(), None);
    assert!(machine.cpu.verified() > 30, "{}", machine.cpu.verified());
    assert_eq!([state.gpr[gpr::RDX], state.gpr[8]], [61, 1]);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_shift_by_nothing_leaves_flags_as_undefined_as_they_were() {
    if !module_path!().ends_with("translated::lockstep") {
        return;
    }
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.xor(r8d, r8d).unwrap();
        a.mov(ecx, 30).unwrap();
        a.set_label(&mut again).unwrap();
        a.xchg(rcx, r8).unwrap();
        // All flags but ZF are undefined then, and this counts to nothing.
        a.bsf(ax, r8w).unwrap();
        a.sar(si, cl).unwrap();
        a.xchg(rcx, r8).unwrap();
        a.loop_(again).unwrap();
        a.hlt().unwrap();
    });
    machine.cpu.translator.verifies = true;
    machine.halt();
    assert_eq!(machine.cpu.difference(), None);
    assert!(machine.cpu.verified() > 20, "{}", machine.cpu.verified());
}
