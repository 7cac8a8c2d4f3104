//! Interrupts, exceptions, and what lies between instructions.

use super::*;
use crate::lapic::Trigger;
use crate::state::{Activity, gpr};
use iced_x86::code_asm::*;

/// A program behind one that enables the local APIC, in x2APIC mode.
fn with_apic(build: impl FnOnce(&mut CodeAssembler)) -> Machine {
    let mut machine = Machine::assembled(|a| {
        enable_apic(a);
        a.hlt().unwrap();
        build(a);
    });
    machine.halt();
    machine.with(|state| state.activity = Activity::Running)
}

fn enable_apic(a: &mut CodeAssembler) {
    for (msr, value) in [(0x1b, 0xfee0_0d00u32), (0x80f, 0x1ff)] {
        a.mov(ecx, msr).unwrap();
        a.mov(eax, value).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
    }
}

#[test]
fn a_posted_interrupt_waits_for_the_flag_and_its_shadow() {
    let mut machine = with_apic(|a| {
        a.hlt().unwrap();
        a.xor(ebx, ebx).unwrap();
        a.sti().unwrap();
        a.inc(ebx).unwrap();
        a.inc(ebx).unwrap();
        a.hlt().unwrap();
    });
    machine.halt();
    machine.mailbox.post_vector(0x41, Trigger::Edge);
    // HLT without IF is left by nothing but an NMI; go on behind it by hand.
    assert_eq!(machine.cpu.run(), Stop::Halted);
    machine = machine.with(|state| state.activity = Activity::Running);
    let frame = machine.fault(0x41);
    assert_eq!(
        machine.cpu.state().gpr[gpr::RBX],
        1,
        "one instruction runs after STI"
    );
    assert_eq!(frame[2] & 0x200, 0x200);
    assert_eq!(
        machine.cpu.state().rflags & 0x200,
        0,
        "an interrupt gate clears IF"
    );
}

#[test]
fn sti_and_hlt_are_not_torn_apart() {
    let mut machine = with_apic(|a| {
        a.sti().unwrap();
        a.hlt().unwrap();
        a.mov(ebx, 7).unwrap();
        a.cli().unwrap();
        a.hlt().unwrap();
    });
    machine.mailbox.post_vector(0x41, Trigger::Edge);
    // The handler: IRETQ.
    machine.ram.write(HANDLERS + 0x410, &[0x48, 0xcf]);
    // HLT is run in the shadow of STI, then the interrupt ends it, and the program goes on.
    assert_eq!(machine.halt().gpr[gpr::RBX], 7);
}

#[test]
fn a_level_triggered_interrupt_reports_its_end() {
    let mut machine = with_apic(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    let handler = assemble(64, HANDLERS + 0x510, |a| {
        a.mov(ecx, 0x80b).unwrap();
        a.xor(eax, eax).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.hlt().unwrap();
    });
    machine.ram.write(HANDLERS + 0x510, &handler);
    machine.mailbox.post_vector(0x51, Trigger::Level);
    assert_eq!(machine.cpu.run(), Stop::EndOfInterrupt { vector: 0x51 });
    machine.halt();
}

#[test]
fn the_deadline_timer_fires() {
    let mut machine = Machine::assembled(|a| {
        enable_apic(a);
        for (msr, value) in [(0x832, 0x4_0042u32), (0x6e0, 1)] {
            a.mov(ecx, msr).unwrap();
            a.mov(eax, value).unwrap();
            a.xor(edx, edx).unwrap();
            a.wrmsr().unwrap();
        }
        a.sti().unwrap();
        let mut here = a.create_label();
        a.set_label(&mut here).unwrap();
        a.jmp(here).unwrap();
    });
    machine.fault(0x42);
}

#[test]
fn nmis_are_blocked_until_iret() {
    let mut machine = Machine::assembled(|a| {
        a.hlt().unwrap();
    });
    machine.halt();
    machine.mailbox.post_nmi();
    machine.fault(2);
    machine.mailbox.post_nmi();
    machine.halt();
    let state = machine.cpu.state();
    assert!(state.events.nmi_masked && state.events.nmi_pending);
}

#[test]
fn the_trap_flag_traps_after_the_instruction() {
    let mut machine = Machine::assembled(|a| {
        a.inc(ebx).unwrap();
        a.inc(ebx).unwrap();
        a.hlt().unwrap();
    })
    .with(|state| state.rflags |= 0x100);
    let frame = machine.fault(1);
    let state = machine.cpu.state();
    assert_eq!(state.gpr[gpr::RBX], 1);
    assert_eq!(frame[0], CODE + 2, "the next instruction");
    assert_eq!(frame[2] & 0x100, 0x100);
    assert_eq!(state.dr6 & 1 << 14, 1 << 14);
    assert_eq!(state.rflags & 0x100, 0);
}

#[test]
fn exceptions_carry_their_codes() {
    type Build = fn(&mut CodeAssembler);
    let cases: [(Build, u64, Option<u64>); 6] = [
        (|a| a.ud2().unwrap(), 6, None),
        (
            |a| {
                a.xor(ebx, ebx).unwrap();
                a.div(ebx).unwrap();
            },
            0,
            None,
        ),
        (
            |a| {
                a.mov(eax, 0x1234).unwrap();
                a.mov(ds, ax).unwrap();
            },
            13,
            Some(0x1234),
        ),
        (
            |a| {
                a.mov(ecx, 0xdead).unwrap();
                a.rdmsr().unwrap();
            },
            13,
            Some(0),
        ),
        (|a| a.int3().unwrap(), 3, None),
        (|a| a.int(0x80).unwrap(), 0x80, None),
    ];
    for (build, vector, code) in cases {
        let mut machine = Machine::assembled(build);
        let frame = machine.fault(vector);
        let at = if let Some(code) = code {
            assert_eq!(frame[0], code, "vector {vector}");
            1
        } else {
            0
        };
        assert_eq!(frame[at + 1], u64::from(KERNEL_CS));
        assert_eq!(frame[at + 3], STACK);
    }
}

#[test]
fn a_fault_in_delivery_is_a_double_fault_and_another_one_shuts_down() {
    let build = |a: &mut CodeAssembler| {
        a.ud2().unwrap();
    };
    // #UD cannot be delivered: its gate is not present. That is #NP, which cannot either.
    let mut machine = Machine::assembled(build);
    machine.ram.set(IDT + 6 * 16, 0);
    machine.ram.set(IDT + 13 * 16, 0);
    assert_eq!(machine.fault(8)[0], 0);
    let mut machine = Machine::assembled(build);
    for vector in [6, 13, 8] {
        machine.ram.set(IDT + vector * 16, 0);
    }
    assert_eq!(machine.cpu.run(), Stop::Shutdown);
}

#[test]
fn an_interrupt_stack_is_used_where_the_gate_names_one() {
    let mut machine = Machine::assembled(|a| {
        a.ud2().unwrap();
    });
    machine.set_gate(6, HANDLERS + 6 * 16, 3);
    machine.ram.set(TSS + 28 + 24, 0x6_0008);
    let frame = machine.fault(6);
    assert_eq!(frame[3], STACK);
    assert_eq!(
        machine.cpu.state().gpr[gpr::RSP],
        0x6_0000 - 40,
        "aligned to 16"
    );
}

#[test]
fn start_up_begins_in_real_mode_at_the_vector() {
    let mut machine = Machine::reset(1);
    assert_eq!(machine.cpu.run(), Stop::Halted);
    assert_eq!(machine.cpu.state().activity, Activity::WaitForSipi);
    // MOV AX, CS; HLT.
    machine.ram.write(0x9000, &[0x8c, 0xc8, 0xf4]);
    machine.mailbox.post_init();
    machine.mailbox.post_sipi(9);
    let state = machine.halt();
    assert_eq!(state.gpr[gpr::RAX], 0x900);
    assert_eq!(state.rip, 3);
}

#[test]
fn a_kick_stops_a_loop() {
    let mut machine = Machine::assembled(|a| {
        let mut here = a.create_label();
        a.set_label(&mut here).unwrap();
        a.jmp(here).unwrap();
    });
    machine.mailbox.kick();
    assert_eq!(machine.cpu.run(), Stop::Kicked);
    let mailbox = Arc::clone(&machine.mailbox);
    let kicker = std::thread::spawn(move || mailbox.kick());
    assert_eq!(machine.cpu.run(), Stop::Kicked);
    kicker.join().unwrap();
}

#[test]
fn what_was_posted_to_a_stopped_processor_is_saved_with_it() {
    let mut machine = with_apic(|a| {
        a.sti().unwrap();
        a.hlt().unwrap();
    });
    machine.halt();
    machine.mailbox.post_vector(0x41, Trigger::Edge);
    machine.mailbox.kick();
    let state = machine.cpu.state();
    // The IRR's third word holds vectors 0x40 to 0x5f.
    assert_eq!(state.apic.registers[0x220], 2);
    assert_eq!(machine.cpu.run(), Stop::Kicked);
    machine.fault(0x41);
}
