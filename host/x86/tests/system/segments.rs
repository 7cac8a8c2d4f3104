//! Loads of segment registers, LDTR and TR (SDM vol. 3, 3.4, 5.4 and 5.7).

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::layout::*;

/// A descriptor of base 0 and limit 4 GiB with the access byte `kind`.
fn flat(kind: u64) -> u64 {
    0x00cf_0000_0000_ffff | kind << 40
}

/// Every type and privilege, loaded into a data segment register and into SS.
fn types(mode: Mode) -> Vec<Case> {
    let mut cases = Vec::new();
    for stack in [false, true] {
        for rpl in [0, 3] {
            for user in [false, true] {
                cases.push(load_all(mode, stack, rpl, user));
            }
        }
    }
    cases
}

/// All access bytes whose privilege is 0 or 3, one after the other: an event for each.
fn load_all(mode: Mode, stack: bool, rpl: u16, user: bool) -> Case {
    let register = if stack { ss } else { es };
    let name = format!(
        "{mode:?}: all types into {}, RPL {rpl}, user {user}",
        if stack { "SS" } else { "ES" }
    );
    make(mode, name, "SDM 3, 5.4.1, 5.5 and 5.7", |guest| {
        let cpl = if user { 3 } else { 0 };
        let (mut selectors, mut refusals) = (Vec::new(), 0);
        for kind in 0..=255u64 {
            // Nothing could be pushed to a stack that ends where it begins.
            let no_room = stack && kind & 0xc == 4;
            if matches!(kind >> 5 & 3, 0 | 3) && !no_room {
                let selector = OWN + 8 * selectors.len() as u16;
                guest.set(GDT + u64::from(selector), flat(kind));
                selectors.push((kind, selector));
            }
        }
        if user {
            to_user(guest, 2);
        }
        for (kind, selector) in selectors {
            let a = &mut guest.a;
            a.mov(eax, u32::from(selector | rpl)).unwrap();
            let place = guest.mark();
            guest.a.mov(register, eax).unwrap();
            let Some((vector, error)) = refusal(stack, kind, rpl, cpl, selector) else {
                continue;
            };
            guest.expect(event(vector, error.into()).at(place));
            refusals += 1;
        }
        // Behind a refused load, of two bytes, the next one follows.
        guest.returns_behind(refusals, 2);
        guest.expect_end();
    })
}

fn refusal(stack: bool, kind: u64, rpl: u16, cpl: u16, selector: u16) -> Option<(u64, u16)> {
    let dpl = (kind >> 5 & 3) as u16;
    let (code, writable, conforming) = (kind & 8 != 0, kind & 2 != 0, kind & 4 != 0);
    let fits = kind & 0x10 != 0
        && if stack {
            !code && writable && rpl == cpl && dpl == cpl
        } else {
            (!code || writable) && (code && conforming || rpl.max(cpl) <= dpl)
        };
    match (fits, kind & 0x80 != 0) {
        (false, _) => Some((13, selector)),
        (true, false) => Some((if stack { 12 } else { 11 }, selector)),
        (true, true) => None,
    }
}

/// Null selectors and those beyond the table.
fn borders() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, selector, error) in [
        ("the null selector into DS", 0u32, None),
        ("the null selector of RPL 3 into DS", 3, None),
        ("a selector beyond the GDT", 0x800, Some(0x800)),
        ("a selector of an LDT that is not there", 0x84, Some(0x84)),
    ] {
        cases.push(long(name, "SDM 3, 3.4.2 and 3.4.3", |guest| {
            guest.a.mov(eax, selector).unwrap();
            let place = guest.mark();
            guest.a.mov(ds, eax).unwrap();
            match error {
                Some(error) => guest.expect(event(13, error).at(place)),
                None => guest.expect_end(),
            }
        }));
    }
    for (user, rpl, fits) in [
        (false, 0, true),
        (false, 3, false),
        (true, 0, false),
        (true, 3, false),
    ] {
        cases.push(long(
            format!("null into SS, RPL {rpl}, user {user}"),
            "SDM 2, MOV",
            |guest| {
                if user {
                    to_user(guest, 2);
                }
                guest.a.mov(eax, rpl).unwrap();
                let place = guest.mark();
                guest.a.mov(ss, eax).unwrap();
                guest.expect(if fits {
                    end().is(Field::Ss, 0)
                } else {
                    event(13, 0).at(place)
                });
            },
        ));
    }
    cases.push(protected(
        "null into SS in protected mode",
        "SDM 2, MOV",
        |guest| {
            guest.a.xor(eax, eax).unwrap();
            let place = guest.mark();
            guest.a.mov(ss, eax).unwrap();
            guest.expect(event(13, 0).at(place));
        },
    ));
    cases.push(protected(
        "access through a null DS",
        "SDM 3, 3.4.2",
        |guest| {
            guest.a.xor(eax, eax).unwrap();
            guest.a.mov(ds, eax).unwrap();
            let place = guest.mark();
            guest.a.mov(ecx, dword_ptr(eax)).unwrap();
            guest.expect(event(13, 0).at(place));
        },
    ));
    cases.push(long(
        "MOV marks a descriptor accessed",
        "SDM 3, 3.4.5.1",
        |guest| {
            let selector = guest.descriptor(flat(0x92));
            let a = &mut guest.a;
            a.mov(byte_ptr(GDT + u64::from(selector) + 5), 0x92u32 as i32)
                .unwrap();
            a.mov(eax, u32::from(selector)).unwrap();
            a.mov(ds, eax).unwrap();
            a.movzx(eax, byte_ptr(GDT + u64::from(selector) + 5))
                .unwrap();
            guest.expect(end().rax(0x93));
        },
    ));
    cases
}

/// Limits of segments, both ways.
fn limits() -> Vec<Case> {
    let mut cases = Vec::new();
    // (name, descriptor, offset, refused)
    for (name, raw, offset, refused) in [
        ("below the limit", 0x0040_9300_0000_0fffu64, 0xffcu32, false),
        ("across the limit", 0x0040_9300_0000_0fff, 0xffd, true),
        ("beyond the limit", 0x0040_9300_0000_0fff, 0x1000, true),
        ("in pages", 0x00c0_9300_0000_0000, 0xffc, false),
        ("beyond pages", 0x00c0_9300_0000_0000, 0xffd, true),
        ("expand-down, above", 0x0040_9700_0000_0fff, 0x1000, false),
        (
            "expand-down, at the limit",
            0x0040_9700_0000_0fff,
            0xfff,
            true,
        ),
        (
            "expand-down of 64 KiB, across its top",
            0x0000_9700_0000_0fff,
            0xfffd,
            true,
        ),
        (
            "expand-down of 64 KiB, below its top",
            0x0000_9700_0000_0fff,
            0xfffc,
            false,
        ),
        ("read-only", 0x00cf_9100_0000_ffff, 0x1000, true),
        ("code", 0x00cf_9b00_0000_ffff, 0x1000, true),
    ] {
        cases.push(protected(
            format!("a store {name}"),
            "SDM 3, 5.3 and 5.5",
            |guest| {
                let base = FRAME;
                let selector = guest.descriptor(raw | base << 16);
                guest.a.mov(eax, u32::from(selector)).unwrap();
                guest.a.mov(es, eax).unwrap();
                guest.a.mov(ebx, offset).unwrap();
                let place = guest.mark();
                guest.a.mov(dword_ptr(ebx).es(), eax).unwrap();
                guest.expect(if refused {
                    event(13, 0).at(place)
                } else {
                    end()
                });
            },
        ));
    }
    cases
}

/// LLDT and LTR.
fn system() -> Vec<Case> {
    let mut cases = Vec::new();
    for mode in [Mode::Long, Mode::Legacy] {
        for kind in 0..32u64 {
            for present in [true, false] {
                for task in [false, true] {
                    cases.push(load_system(mode, kind, present, task));
                }
            }
        }
    }
    for (name, selector, task, error) in [
        ("LTR of null", 0u32, true, Some(0)),
        ("LLDT of null", 0, false, None),
        ("LTR of an LDT's selector", 0x84, true, Some(0x84)),
        ("LLDT of an LDT's selector", 0x84, false, Some(0x84)),
        ("LTR of half a descriptor", 0x7f8, true, Some(0x7f8)),
    ] {
        cases.push(long(name, "SDM 2, LTR and LLDT", |guest| {
            guest.set(GDT + 0x7f8, 0x0000_8900_0000_0067 | TSS << 16);
            guest.a.mov(eax, selector).unwrap();
            let place = guest.mark();
            if task {
                guest.a.ltr(ax).unwrap();
            } else {
                guest.a.lldt(ax).unwrap();
            }
            guest.expect(match error {
                Some(error) => event(13, error).at(place),
                None => end(),
            });
        }));
    }
    for task in [false, true] {
        cases.push(long(
            format!("LTR {task} or LLDT in user mode"),
            "SDM 2",
            |guest| {
                to_user(guest, 2);
                guest.a.xor(eax, eax).unwrap();
                let place = guest.mark();
                if task {
                    guest.a.ltr(ax).unwrap();
                } else {
                    guest.a.lldt(ax).unwrap();
                }
                guest.expect(event(13, 0).at(place));
            },
        ));
    }
    cases
}

fn load_system(mode: Mode, kind: u64, present: bool, task: bool) -> Case {
    let name = format!(
        "{mode:?}: {} of type {kind:#x}, present {present}",
        if task { "LTR" } else { "LLDT" }
    );
    make(mode, name, "SDM 2, LTR and LLDT", |guest| {
        guest.differs_if(
            task && kind == 1 && mode == Mode::Long,
            Peer::Tcg,
            "takes a 16-bit task state in IA-32e mode",
        );
        let access = kind | if present { 0x80 } else { 0 };
        let at = GDT + u64::from(OWN);
        guest
            .a
            .mov(dword_ptr(at as u32 + 4), (access << 8) as i32)
            .unwrap();
        guest.set(at, access << 40 | TSS << 16 | 0x67);
        // The type comes back each round: LTR makes it busy.
        guest.a.mov(eax, u32::from(OWN)).unwrap();
        let place = guest.mark();
        if task {
            guest.a.ltr(ax).unwrap();
        } else {
            guest.a.lldt(ax).unwrap();
        }
        let fits = match (task, mode) {
            (false, _) => kind == 2,
            (true, Mode::Long) => kind == 9,
            (true, Mode::Legacy) => matches!(kind, 1 | 9),
        };
        let event = match (fits, present) {
            (false, _) => event(13, OWN.into()).at(place),
            (true, false) => event(11, OWN.into()).at(place),
            (true, true) => {
                guest.a.mov(eax, dword_ptr(at as u32 + 4)).unwrap();
                guest.a.and(eax, 0xff00).unwrap();
                end().rax((access | if task { 2 } else { 0 }) << 8)
            }
        };
        guest.expect(event);
    })
}

pub(crate) fn cases() -> Vec<Case> {
    [
        types(Mode::Long),
        types(Mode::Legacy),
        borders(),
        limits(),
        system(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
