//! Interrupt, trap, task and call gates; double and triple faults (SDM vol. 3, 5.8 and chapter 6).

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::layout::*;

/// INT n through gates of every type and privilege.
fn interrupts() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in [Mode::Long, Mode::Legacy] {
        for kind in 0..16u8 {
            for (dpl, present, user) in [
                (0, true, false),
                (3, true, true),
                (0, true, true),
                (3, false, true),
                (0, false, true),
            ] {
                if mode == Mode::Legacy && matches!(kind, 5..=7) {
                    // Tasks and 16-bit gates have cases of their own.
                    continue;
                }
                cases.push(interrupt(mode, kind, dpl, present, user));
            }
        }
    }
    cases
}

fn interrupt(mode: Mode, kind: u8, dpl: u8, present: bool, user: bool) -> Case {
    let name =
        format!("{mode:?}: INT by type {kind:#x}, DPL {dpl}, present {present}, user {user}");
    make(mode, name, "SDM 3, 6.12", |guest| {
        let access = kind | dpl << 5 | if present { 0x80 } else { 0 };
        guest.gate(0x80, KERNEL_CS, HANDLERS + 0x800, access, 0);
        if user {
            to_user(guest, 2);
        }
        let place = guest.mark();
        guest.a.int(0x80).unwrap();
        let next = guest.mark();
        let fits = matches!(kind, 0xe | 0xf);
        let refused = !fits || user && dpl != 3 || !present;
        guest.differs_if(
            refused && mode == Mode::Long,
            Peer::Tcg,
            "counts entries of 16 bytes twice in the error code",
        );
        guest.expect(match (fits && (!user || dpl == 3), present) {
            (false, _) => event(13, 0x402).at(place),
            (true, false) => event(11, 0x402).at(place),
            (true, true) => event(0x80, 0).at(next).flags(1 << 16, 0),
        });
    })
}

/// The code segment that a gate leads to.
fn targets() -> Vec<Case> {
    let mut cases = Vec::new();
    let long_code = 0x00af_9b00_0000_ffffu64;
    // An exception by a gate says EXT; INT n does not.
    for (external, name, raw, vector, error) in [
        (false, "null", None, 13, 0),
        (true, "null", None, 13, 1),
        (
            false,
            "data",
            Some(0x00cf_9300_0000_ffff),
            13,
            u64::from(OWN),
        ),
        (
            true,
            "data",
            Some(0x00cf_9300_0000_ffff),
            13,
            u64::from(OWN) | 1,
        ),
        (
            true,
            "32-bit code",
            Some(0x00cf_9b00_0000_ffff),
            13,
            u64::from(OWN) | 1,
        ),
        (
            true,
            "code of L and D",
            Some(0x00ef_9b00_0000_ffff),
            13,
            u64::from(OWN) | 1,
        ),
        (
            false,
            "not present",
            Some(long_code & !(1 << 47)),
            11,
            u64::from(OWN),
        ),
        (
            true,
            "not present",
            Some(long_code & !(1 << 47)),
            11,
            u64::from(OWN) | 1,
        ),
        (
            false,
            "of privilege 3",
            Some(long_code | 3 << 45),
            13,
            u64::from(OWN),
        ),
    ] {
        cases.push(long(
            format!("a gate to a segment that is {name}, external {external}"),
            "SDM 3, 6.12 and 6.13",
            |guest| {
                if external {
                    guest.differs(Peer::Tcg, "never sets EXT");
                }
                let selector = match raw {
                    Some(raw) => guest.descriptor(raw),
                    None => 0,
                };
                let gate = if external { 6 } else { 0x80 };
                guest.gate(gate, selector, HANDLERS + gate * 16, 0xee, 0);
                let place = guest.mark();
                if external {
                    guest.a.ud2().unwrap();
                } else {
                    guest.a.int(0x80).unwrap();
                }
                guest.expect(event(vector, error).at(place));
            },
        ));
    }
    for external in [false, true] {
        cases.push(long(
            format!("a gate beyond the IDT's limit, external {external}"),
            "SDM 3, 6.13",
            |guest| {
                if external {
                    guest.differs(Peer::Tcg, "never sets EXT");
                }
                // Room for 20 vectors: #AC's, 17, is there; SIMD's, 19, too; 0x80 is not.
                guest.set_16(IDTR, if external { 16 * 16 - 1 } else { 0x7ff });
                let place = guest.place();
                if external {
                    // #MF, 16: an exception that waits, and NE.
                    guest.a.fninit().unwrap();
                    guest.a.mov(word_ptr(DATA), 0x37b).unwrap();
                    guest.a.fldcw(word_ptr(DATA)).unwrap();
                    guest.a.fld1().unwrap();
                    guest.a.fldz().unwrap();
                    guest.a.fdivp(st1, st0).unwrap();
                    guest.set_place(place);
                    guest.a.wait().unwrap();
                    guest.expect(event(13, 16 << 3 | 2 | 1).at(place));
                } else {
                    guest.set_place(place);
                    guest.a.int(0x80).unwrap();
                    guest.expect(event(13, 0x402).at(place));
                }
                guest.cleanup(|a| a.fninit().unwrap());
            },
        ));
    }
    cases.push(long(
        "a handler that is not canonical",
        "SDM 3, 6.12",
        |guest| {
            guest.differs(Peer::Tcg, "goes there, and faults at the fetch");
            guest.gate(0x80, KERNEL_CS, 1 << 47, 0xee, 0);
            let place = guest.mark();
            guest.a.int(0x80).unwrap();
            guest.expect(event(13, 0).at(place));
        },
    ));
    cases
}

/// The frames that handlers find, and their stacks.
fn frames() -> Vec<Case> {
    let mut cases = Vec::new();
    for misaligned in [0, 1, 8, 15] {
        cases.push(long(
            format!("the frame is aligned, RSP {misaligned} off"),
            "SDM 3, 6.14.2",
            |guest| {
                let top = KERNEL_STACK - 0x100 + misaligned;
                guest.a.mov(rsp, top).unwrap();
                guest.a.ud2().unwrap();
                guest.expect(
                    event(6, 0)
                        .is(Field::Rsp, top)
                        .is(Field::Ss, KERNEL_SS.into()),
                );
            },
        ));
    }
    cases.push(long(
        "from user mode, the stack is the task's",
        "SDM 3, 6.14.4",
        |guest| {
            to_user(guest, 0x202);
            let place = guest.mark();
            guest.a.ud2().unwrap();
            guest.expect(
                event(6, 0)
                    .at(place)
                    .is(Field::Cs, USER_CS.into())
                    .is(Field::Ss, USER_SS.into())
                    .is(Field::Rsp, USER_STACK)
                    .flags(0x1_0202, 0x1_0202),
            );
        },
    ));
    for user in [false, true] {
        cases.push(long(
            format!("a task's stack pointer that is not canonical, user {user}"),
            "SDM 3, 6.12",
            |guest| {
                guest.differs(Peer::Tcg, "says #GP");
                guest.set(TSS + 44, (1 << 47) + 0x100);
                // Vector 0x80 on IST 2.
                guest.gate(0x80, KERNEL_CS, HANDLERS + 0x800, 0xee, 2);
                if user {
                    to_user(guest, 2);
                }
                let place = guest.mark();
                guest.a.int(0x80).unwrap();
                guest.expect(event(12, 0).at(place));
            },
        ));
    }
    cases.push(long(
        "a task state too short for the stack",
        "SDM 3, 6.15, #TS",
        |guest| {
            let selector = guest.descriptor(0);
            let at = GDT + u64::from(selector);
            let _second = guest.descriptor(0);
            // Up to RSP0 and no further: the interrupt stack lies beyond.
            guest.set(at, 0x0000_8900_0000_0000 | TSS << 16 | 0x1f);
            guest.gate(0x80, KERNEL_CS, HANDLERS + 0x800, 0xee, 1);
            guest.a.mov(dword_ptr(at + 4), 0x8900).unwrap();
            guest.a.mov(eax, u32::from(selector)).unwrap();
            guest.a.ltr(ax).unwrap();
            let place = guest.mark();
            guest.a.int(0x80).unwrap();
            guest.expect(event(10, selector.into()).at(place));
        },
    ));
    cases
}

/// Faults upon faults.
fn composed() -> Vec<Case> {
    let mut cases = Vec::new();
    // The gates of vectors are broken, one by one: not present.
    for (name, first, broken, expected) in [
        (
            "#UD, then #NP: one after the other",
            "ud",
            vec![6],
            event(11, 6 << 3 | 2 | 1),
        ),
        ("#GP, then #NP: double", "gp", vec![13], event(8, 0)),
        ("#PF, then #NP: double", "pf", vec![14], event(8, 0)),
        ("#UD, #NP, #NP: double", "ud", vec![6, 11], event(8, 0)),
        ("INT n, then #NP: one", "int", vec![0x80], event(11, 0x402)),
        (
            "INT n, #NP, #NP: double",
            "int",
            vec![0x80, 11],
            event(8, 0),
        ),
    ] {
        cases.push(long(name, "SDM 3, table 6-5", |guest| {
            if first == "ud" && broken.len() == 1 {
                guest.differs(Peer::Tcg, "never sets EXT");
            }
            guest.differs_if(
                first == "int" && broken.len() == 1,
                Peer::Tcg,
                "counts entries of 16 bytes twice in the error code",
            );
            break_gates(guest, &broken);
            let event = provoke(guest, first, expected);
            guest.expect(event);
        }));
    }
    for (name, first, broken) in [
        ("#GP, #DF: shutdown", "gp", vec![13, 8]),
        ("#PF, #DF: shutdown", "pf", vec![14, 8]),
        ("INT n, #NP, #NP, #DF: shutdown", "int", vec![0x80, 11, 8]),
    ] {
        cases.push(long(name, "SDM 3, 6.15, #DF", |guest| {
            break_gates(guest, &broken);
            provoke(guest, first, end());
            guest.expect_shutdown();
        }));
    }
    cases.push(long(
        "#GP, then #PF: one after the other",
        "SDM 3, table 6-5",
        |guest| {
            // The stack of #GP's handler is not mapped.
            guest.set(TSS + 44, TEST + 0x3000);
            guest.gate(13, KERNEL_CS, HANDLERS + 13 * 16, 0x8e, 2);
            let event = provoke(guest, "gp", event(14, 2).cr2(TEST + 0x2ff8));
            guest.expect(event);
        },
    ));
    cases.push(long("#PF, then #PF: double", "SDM 3, table 6-5", |guest| {
        guest.set(TSS + 44, TEST + 0x3000);
        guest.gate(14, KERNEL_CS, HANDLERS + 14 * 16, 0x8e, 2);
        let event = provoke(guest, "pf", event(8, 0).cr2(TEST + 0x2ff8));
        guest.expect(event);
    }));
    cases
}

fn break_gates(guest: &mut Guest, vectors: &[u64]) {
    for &vector in vectors {
        let dpl = if vector == 0x80 { 0x60 } else { 0 };
        guest.gate(vector, KERNEL_CS, HANDLERS + vector * 16, 0x0e | dpl, 0);
    }
}

fn provoke(guest: &mut Guest, what: &str, expected: Event) -> Event {
    let place = guest.place();
    match what {
        "ud" => {
            guest.set_place(place);
            guest.a.ud2().unwrap();
        }
        "gp" => {
            guest.a.mov(rax, 1u64 << 47).unwrap();
            guest.set_place(place);
            guest.a.mov(rax, qword_ptr(rax)).unwrap();
        }
        "pf" => {
            guest.a.mov(rax, TEST + 0x3000).unwrap();
            guest.set_place(place);
            guest.a.mov(rax, qword_ptr(rax)).unwrap();
        }
        _ => {
            guest.set_place(place);
            guest.a.int(0x80).unwrap();
        }
    }
    expected.at(place)
}

/// Call gates.
fn calls() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in [Mode::Long, Mode::Legacy] {
        for (name, access, to, user, jump, expected) in [
            (
                "from user mode inwards",
                0xecu64,
                KERNEL_CS,
                true,
                false,
                None,
            ),
            ("of the same privilege", 0x8c, KERNEL_CS, false, false, None),
            (
                "that is the kernel's",
                0x8c,
                KERNEL_CS,
                true,
                false,
                Some((13, OWN)),
            ),
            (
                "that is not present",
                0x6c,
                KERNEL_CS,
                true,
                false,
                Some((11, OWN)),
            ),
            (
                "to data",
                0xec,
                KERNEL_SS,
                true,
                false,
                Some((13, KERNEL_SS)),
            ),
            ("to null", 0xec, 0, true, false, Some((13, 0))),
            (
                "inwards, by a jump",
                0xec,
                KERNEL_CS,
                true,
                true,
                Some((13, KERNEL_CS)),
            ),
            ("by a jump", 0x8c, KERNEL_CS, false, true, None),
            (
                "that is a trap gate",
                0xef,
                KERNEL_CS,
                true,
                false,
                Some((13, OWN)),
            ),
        ] {
            cases.push(make(
                mode,
                format!("{mode:?}: a call gate {name}"),
                "SDM 3, 5.8.3 to 5.8.5",
                |guest| call(guest, mode, (access, to), (user, jump), expected),
            ));
        }
    }
    cases
}

fn call(
    guest: &mut Guest,
    mode: Mode,
    (access, to): (u64, u16),
    (user, jump): (bool, bool),
    expected: Option<(u64, u16)>,
) {
    let parameters = if mode == Mode::Legacy && user { 2 } else { 0 };
    let at = MORE_CODE;
    let gate = guest.descriptor(
        at & 0xffff | u64::from(to) << 16 | parameters << 32 | access << 40 | (at >> 16) << 48,
    );
    guest.descriptor(0);
    assert_eq!(gate, OWN);
    let size = if mode == Mode::Long { 8 } else { 4 };
    // At the gate's target: the frame, then the end.
    guest.code(if mode == Mode::Long { 64 } else { 32 }, at, |a| {
        if mode == Mode::Long {
            a.mov(rcx, qword_ptr(rsp + 8)).unwrap();
            a.mov(rsi, qword_ptr(rsp)).unwrap();
        } else {
            a.mov(ecx, dword_ptr(esp + 4)).unwrap();
            a.mov(esi, dword_ptr(esp)).unwrap();
            a.mov(edx, dword_ptr(esp + 8)).unwrap();
        }
        a.ud2().unwrap();
    });
    // Selector and offset of a far pointer in memory.
    guest.set_32(DATA, 0);
    guest.set_16(DATA + 4, gate | if user { 3 } else { 0 });
    if user {
        to_user(guest, 2);
        if parameters != 0 {
            guest.a.push(0x111).unwrap();
            guest.a.push(0x222).unwrap();
        }
    }
    let place = guest.mark();
    // CALL or JMP FAR [DATA], by its bytes.
    let form = if jump { 0x2c } else { 0x1c };
    if mode == Mode::Long {
        guest.a.db(&[0xff, form, 0x25]).unwrap();
    } else {
        guest.a.db(&[0xff, form | 1]).unwrap();
    }
    guest.a.dd(&[DATA as u32]).unwrap();
    let next = guest.mark();
    if let Some((vector, error)) = expected {
        guest.expect(event(vector, error.into()).at(place));
        return;
    }
    let mut event = event(6, 0).rip(at + if mode == Mode::Long { 9 } else { 11 });
    if !jump {
        let caller = if user { USER_CS } else { KERNEL_CS };
        event = event.is(Field::Rcx, caller.into()).points(Field::Rsi, next);
    }
    if parameters != 0 {
        event = event.is(Field::Rdx, 0x222);
    }
    if mode == Mode::Long {
        let top = match (user, jump) {
            (true, _) => INNER_STACK - 4 * size,
            (false, true) => KERNEL_STACK,
            (false, false) => KERNEL_STACK - 2 * size,
        };
        let stack = if user { 0 } else { KERNEL_SS };
        event = event.is(Field::Rsp, top).is(Field::Ss, stack.into());
    }
    guest.expect(event);
}

pub(crate) fn cases() -> Vec<Case> {
    [interrupts(), targets(), frames(), composed(), calls()]
        .into_iter()
        .flatten()
        .collect()
}
