//! Saved states, and programs that nobody wrote.

use super::*;
use proptest::prelude::*;

#[test]
fn a_state_survives_the_round_trip() {
    let mut machine = Machine::assembled(|a| {
        a.stc().unwrap();
        a.hlt().unwrap();
    });
    let saved = machine.halt();
    let mut other = Machine::beside(0, Arc::clone(&machine.ram), Arc::new(CodeMap::new()));
    other.cpu.set_state(&saved).unwrap();
    let mut again = other.cpu.state();
    assert!(again.tsc >= saved.tsc);
    (again.tsc, again.realtime_ns) = (saved.tsc, saved.realtime_ns);
    again.kvmclock_ns = saved.kvmclock_ns;
    assert_eq!(again, saved);
}

#[test]
fn hostile_states_are_refused() {
    type Change = fn(&mut CpuState);
    let changes: [(&str, Change); 12] = [
        ("paging without protection", |s| s.cr0 &= !1),
        ("reserved CR0", |s| s.cr0 |= 1 << 63),
        ("reserved CR4", |s| s.cr4 |= 1 << 40),
        ("CR3 beyond the address space", |s| s.cr3 = 1 << 52),
        ("long mode without PAE", |s| s.cr4 &= !0x20),
        ("LMA without LME", |s| s.msrs.efer &= !0x100),
        ("a base that is not canonical", |s| {
            s.segments[segment::GS].base = 1 << 60
        }),
        ("LSTAR that is not canonical", |s| s.msrs.lstar = 1 << 47),
        ("64-bit and 32-bit code", |s| {
            s.segments[segment::CS].access |= 1 << 14
        }),
        ("a data segment in CS", |s| {
            s.segments[segment::CS].access = 0xc093
        }),
        ("reserved flags", |s| s.rflags |= 1 << 40),
        ("a truncated image", |s| s.xsave.truncate(100)),
    ];
    for (what, change) in changes {
        let mut machine = Machine::assembled(|a| a.hlt().unwrap());
        let good = machine.cpu.state();
        let mut bad = good.clone();
        change(&mut bad);
        assert!(machine.cpu.set_state(&bad).is_err(), "{what}");
        assert_eq!(machine.cpu.state().gpr, good.gpr);
        machine.halt();
    }
}

/// Runs a while, answering every access.
fn run(machine: &mut Machine) {
    let mailbox = Arc::clone(&machine.mailbox);
    for _ in 0..60 {
        let resumed = if machine.cpu.replay.is_empty() {
            None
        } else {
            machine.cpu.run_alone()
        };
        match resumed.or_else(|| machine.cpu.advance()) {
            Some(Stop::PortRead { .. } | Stop::MmioRead { .. }) => {
                machine.cpu.complete_read(0x5a5a);
            }
            Some(Stop::PortWrite { .. } | Stop::MmioWrite { .. }) => machine.cpu.complete_write(),
            Some(Stop::Halted) => mailbox.post_nmi(),
            Some(Stop::Shutdown) => break,
            Some(Stop::Differs) => panic!("{:?}", machine.cpu.difference()),
            Some(Stop::EndOfInterrupt { .. } | Stop::Kicked) | None => {}
        }
    }
    machine.cpu.finish_access();
    let state = machine.cpu.state();
    // What the processor says of itself, it accepts.
    let accepted = machine.cpu.set_state(&state);
    assert!(accepted.is_ok(), "{accepted:?}");
}

#[test]
fn the_bounded_run_executes_instructions() {
    let mut machine = Machine::long(&[0x90; 64]);
    run(&mut machine);
    assert!(machine.cpu.instructions() > 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_code_does_not_panic(
        code in proptest::collection::vec(any::<u8>(), 64..400),
        registers in any::<[u64; 16]>(),
        mode in 0..4,
    ) {
        let mut machine = Machine::long(&code).with(|state| {
            for (register, value) in state.gpr.iter_mut().zip(registers) {
                // Mostly addresses in RAM.
                *register = if value & 7 == 0 { value } else { value % RAM };
            }
            if mode >= 2 {
                state.msrs.efer = 0;
                state.cr4 = 0x600;
                state.cr0 &= !(1 << 31);
                state.segments[segment::CS].access = if mode == 2 { 0xc09b } else { 0x9b };
            }
        });
        if mode == 1 {
            machine = machine.user();
        }
        run(&mut machine);
    }

    #[test]
    fn random_states_are_refused_or_run(
        cr in any::<[u64; 4]>(),
        access in any::<[u16; 8]>(),
        bases in any::<[u32; 8]>(),
        rflags in any::<u64>(),
        rip in any::<u64>(),
        keep in any::<u16>(),
    ) {
        let mut machine = Machine::long(&[0x90; 64]);
        let mut state = machine.cpu.state();
        let pick = |bit: u32, old: u64, new: u64| if keep >> bit & 1 != 0 { old } else { new };
        state.cr0 = pick(0, state.cr0, cr[0] & 0xe005_003f);
        state.cr3 = pick(1, state.cr3, cr[1] & 0xff_ffff_ffff);
        state.cr4 = pick(2, state.cr4, cr[2] & 0x7ff);
        state.msrs.efer = pick(3, state.msrs.efer, cr[3] & 0xd01);
        state.rflags = pick(4, state.rflags, rflags & 0x3f_7fd5 | 2);
        state.rip = pick(5, state.rip, rip & 0x3f_ffff);
        for (index, value) in state.segments.iter_mut().enumerate() {
            if keep >> (6 + index) & 1 == 0 {
                value.access = access[index];
                value.base = bases[index].into();
                value.limit = bases[7 - index];
                value.unusable = access[7] & 1 != 0;
            }
        }
        if machine.cpu.set_state(&state).is_ok() {
            run(&mut machine);
        }
    }
}
