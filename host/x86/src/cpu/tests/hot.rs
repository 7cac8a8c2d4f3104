//! Code that runs often: what the interpreter and translated code do to each other.

use super::*;
use crate::state::gpr;
use iced_x86::code_asm::*;

const PRESENT_WRITABLE: u64 = 3;

fn unmap(machine: &Machine, address: u64) {
    machine.ram.set(PT + (address >> 12) * 8, 0);
}

#[test]
fn loops_and_calls_across_pages_come_to_the_same_sum() {
    let far = CODE + 0x3000;
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(r12d, 1000).unwrap();
        a.xor(r15d, r15d).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(r14, far).unwrap();
        a.mov(edi, r12d).unwrap();
        a.call(far).unwrap();
        a.call(r14).unwrap();
        a.add(r15, rax).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.write(
        far,
        &assemble(64, far, |a| {
            let mut odd = a.create_label();
            a.push(rbx).unwrap();
            a.push(r13).unwrap();
            a.push(r15).unwrap();
            a.mov(r13, rdi).unwrap();
            a.test(r13b, 1).unwrap();
            a.jnz(odd).unwrap();
            a.add(r13, r13).unwrap();
            a.set_label(&mut odd).unwrap();
            a.lea(rax, r13 + 1).unwrap();
            a.pop(r15).unwrap();
            a.pop(r13).unwrap();
            a.pop(rbx).unwrap();
            a.ret().unwrap();
        }),
    );
    let expected: u64 = (1..=1000)
        .map(|n| if n % 2 == 1 { n + 1 } else { 2 * n + 1 })
        .sum();
    let state = machine.halt();
    assert_eq!(state.gpr[15], expected);
    assert_eq!(state.gpr[gpr::RSP], STACK);
    #[cfg(target_arch = "x86_64")]
    assert_eq!(
        machine.cpu.translator.has_code(),
        module_path!().contains("translated")
    );
}

#[test]
fn a_push_in_a_row_that_faults_finds_those_before_it_done() {
    let mut machine = Machine::assembled(|a| {
        a.push(rax).unwrap();
        a.push(rbx).unwrap();
        a.push(rcx).unwrap();
        a.push(rdx).unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        state.gpr[gpr::RAX] = 1;
        state.gpr[gpr::RBX] = 2;
        state.gpr[gpr::RSP] = 0x9_0010;
    })
    .on_another_stack(14);
    unmap(&machine, 0x8_f000);
    let frame = machine.fault(14);
    // Error code (write, not present), RIP of the third push, and RSP as it found it.
    assert_eq!((frame[0], frame[1], frame[4]), (2, CODE + 2, 0x9_0000));
    assert_eq!(machine.cpu.state().cr2, 0x8_fff8);
    assert_eq!(machine.ram.get(0x9_0008), 1);
    assert_eq!(machine.ram.get(0x9_0000), 2);
}

#[test]
fn flags_that_somebody_reads_are_there_at_a_fault() {
    let mut machine = Machine::assembled(|a| {
        let mut on = a.create_label();
        a.mov(eax, 5).unwrap();
        a.cmp(eax, 9).unwrap();
        a.mov(rbx, qword_ptr(0x9_0000)).unwrap();
        a.jb(on).unwrap();
        a.set_label(&mut on).unwrap();
        a.hlt().unwrap();
    })
    .on_another_stack(14);
    unmap(&machine, 0x9_0000);
    let frame = machine.fault(14);
    // CF, PF, AF and SF.
    assert_eq!(frame[3] & 0x8d5, 0x95);
}

#[test]
fn arithmetic_leaves_its_flags_in_mxcsr_and_rounds_as_it_says() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 40).unwrap();
        a.set_label(&mut again).unwrap();
        a.movsd_2(xmm1, qword_ptr(DATA)).unwrap();
        a.divsd(xmm1, qword_ptr(DATA + 8)).unwrap();
        a.movsd_2(qword_ptr(DATA + 16), xmm1).unwrap();
        a.stmxcsr(dword_ptr(DATA + 24)).unwrap();
        // Towards minus infinity, then up.
        a.xor(dword_ptr(DATA + 28), 0x6000).unwrap();
        a.ldmxcsr(dword_ptr(DATA + 28)).unwrap();
        a.movsd_2(xmm2, qword_ptr(DATA)).unwrap();
        a.divsd(xmm2, qword_ptr(DATA + 8)).unwrap();
        a.movsd_2(qword_ptr(DATA + 32), xmm2).unwrap();
        a.ldmxcsr(dword_ptr(DATA + 40)).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.set(DATA, 1.0_f64.to_bits());
    machine.ram.set(DATA + 8, 10.0_f64.to_bits());
    // To be changed to 0x3f80 (down) and 0x5f80 (up) in turn.
    machine.ram.set(DATA + 24, 0x5f80 << 32);
    machine.ram.set(DATA + 40, 0x1f80);
    machine.halt();
    let nearest = machine.ram.get(DATA + 16);
    assert_eq!(nearest, 0.1_f64.to_bits());
    assert_eq!(machine.ram.get(DATA + 24) as u32, 0x1fa0, "inexact");
    // 40 times: the last is up, and 0.1 is above a tenth already.
    assert_eq!(machine.ram.get(DATA + 32), nearest);
    let down = machine.ram.get(DATA + 28) as u32;
    assert_eq!(down, 0x5f80);
}

#[test]
fn code_knows_where_it_runs_when_its_page_is_mapped_twice() {
    let alias = 0x1_5000;
    let code = CODE + 0x5000;
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 60).unwrap();
        a.xor(r8, r8).unwrap();
        a.xor(r9, r9).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(code).unwrap();
        a.add(r8, rax).unwrap();
        a.call(alias).unwrap();
        a.add(r9, rax).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    machine
        .ram
        .set(PT + (alias >> 12) * 8, code | PRESENT_WRITABLE);
    machine.ram.write(
        code,
        &assemble(64, code, |a| {
            let (mut here, mut inner) = (a.create_label(), a.create_label());
            a.call(inner).unwrap();
            a.set_label(&mut here).unwrap();
            a.lea(rdx, qword_ptr(here)).unwrap();
            a.sub(rdx, rax).unwrap();
            a.add(rax, rdx).unwrap();
            a.ret().unwrap();
            a.set_label(&mut inner).unwrap();
            a.mov(rax, qword_ptr(rsp)).unwrap();
            a.ret().unwrap();
        }),
    );
    let state = machine.halt();
    assert_eq!(state.gpr[8], 60 * (code + 5));
    assert_eq!(state.gpr[9], 60 * (alias + 5));
}

#[test]
fn a_division_fails_where_it_fails() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 50).unwrap();
        a.set_label(&mut again).unwrap();
        a.dec(ecx).unwrap();
        a.mov(eax, 1000).unwrap();
        a.xor(edx, edx).unwrap();
        a.div(ecx).unwrap();
        a.mov(eax, -1000).unwrap();
        a.cdq().unwrap();
        a.mov(ebx, -7).unwrap();
        a.idiv(ebx).unwrap();
        a.add(esi, eax).unwrap();
        a.jmp(again).unwrap();
    });
    let frame = machine.fault(0);
    // Past MOV and DEC, MOV, XOR: the DIV, when the counter has come to zero.
    assert_eq!(frame[0], CODE + 5 + 2 + 5 + 2);
    assert_eq!(machine.cpu.state().gpr[gpr::RSI], 49 * 142);
}

#[test]
fn a_loop_without_end_hears_a_kick() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(rax).unwrap();
        a.jmp(again).unwrap();
    });
    let mailbox = Arc::clone(&machine.mailbox);
    let kicker = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(30));
        mailbox.kick();
    });
    assert_eq!(machine.cpu.run(), Stop::Kicked);
    kicker.join().unwrap();
    assert!(machine.cpu.state().gpr[gpr::RAX] > 1000);
    assert!(machine.cpu.instructions() > 2000);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn lockstep_stops_where_translated_code_is_wrong() {
    if !module_path!().contains("translated") {
        return;
    }
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
    // ADD EAX, 0x33 becomes ADD EAX, 0x34.
    let (old, new) = ([0x05, 0x33, 0, 0, 0], [0x05, 0x34, 0, 0, 0]);
    while machine.cpu.translator.spoil(&old, &new) {}
    machine.cpu.complete_write();
    assert_eq!(machine.cpu.run(), Stop::Differs);
    let report = machine.cpu.difference().unwrap();
    assert!(report.contains("0x66               0x67  <--"), "{report}");
    assert!(report.contains("instead of 0x66"), "{report}");
}
