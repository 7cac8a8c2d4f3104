//! What RFLAGS lets pass: POPF, CLI, STI and ports by IOPL (SDM vol. 3, 5.9; vol. 1, 19.5).

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::layout::*;

const IF: u64 = 1 << 9;
const IOPL: u64 = 3 << 12;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for user in [false, true] {
        for iopl in [0, 3] {
            let may = !user || iopl == 3;
            let before = 2 | iopl << 12;
            cases.push(long(
                format!("POPF of IF and IOPL, user {user}, IOPL {iopl}"),
                "SDM 2, POPF",
                |guest| {
                    begin(guest, user, before);
                    guest.a.push((2 | IF | IOPL) as i32).unwrap();
                    guest.a.popfq().unwrap();
                    guest.a.pushfq().unwrap();
                    guest.a.pop(rax).unwrap();
                    let interrupts = if may { IF } else { 0 };
                    let level = if user { iopl << 12 } else { IOPL };
                    guest.expect(end().bits(Field::Rax, IF | IOPL, interrupts | level));
                },
            ));
            for set in [false, true] {
                cases.push(long(
                    format!("STI {set} or CLI, user {user}, IOPL {iopl}"),
                    "SDM 2",
                    |guest| {
                        begin(guest, user, before);
                        let place = guest.mark();
                        if set {
                            guest.a.sti().unwrap();
                        } else {
                            guest.a.cli().unwrap();
                        }
                        guest.expect(if may {
                            end().flags(IF, if set { IF } else { 0 })
                        } else {
                            event(13, 0).at(place)
                        });
                    },
                ));
            }
        }
    }
    // The map of ports: its place, port, bytes, which bit refuses.
    for (name, map, limit, port, bytes, bit, refused) in [
        ("open", 0x68u16, 0x1ffu16, 0x80u32, 1, None, false),
        ("closed", 0x68, 0x1ff, 0x80, 1, Some(0x80u32), true),
        (
            "open beside a closed one",
            0x68,
            0x1ff,
            0x80,
            1,
            Some(0x81),
            false,
        ),
        (
            "two bytes, the second closed",
            0x68,
            0x1ff,
            0x80,
            2,
            Some(0x81),
            true,
        ),
        (
            "four bytes, the last closed, across bytes of the map",
            0x68,
            0x1ff,
            0x86,
            4,
            Some(0x89),
            true,
        ),
        ("beyond the map", 0x68, 0x78, 0x88, 1, None, true),
        ("no map", 0xffff, 0x1ff, 0x80, 1, None, true),
    ] {
        cases.push(long(format!("a port: {name}"), "SDM 1, 19.5.2", |guest| {
            let task = guest.descriptor(0);
            guest.descriptor(0);
            let at = GDT + u64::from(task);
            guest.set(at, 0x0000_8900_0000_0000 | TSS << 16 | u64::from(limit));
            guest.set_16(TSS + 102, map);
            if let Some(bit) = bit {
                guest.write(TSS + u64::from(map) + u64::from(bit / 8), &[1 << (bit % 8)]);
            }
            guest.a.mov(dword_ptr(at + 4), 0x8900).unwrap();
            guest.a.mov(eax, u32::from(task)).unwrap();
            guest.a.ltr(ax).unwrap();
            to_user(guest, 2);
            guest.a.mov(edx, port).unwrap();
            let place = guest.mark();
            match bytes {
                1 => guest.a.out(dx, al).unwrap(),
                2 => guest.a.out(dx, ax).unwrap(),
                _ => guest.a.out(dx, eax).unwrap(),
            }
            guest.expect(if refused {
                event(13, 0).at(place)
            } else {
                end()
            });
        }));
    }
    cases.push(long(
        "IRET with NT in 64-bit mode",
        "SDM 2, IRET",
        |guest| {
            guest.a.push(0x4002).unwrap();
            guest.a.popfq().unwrap();
            let place = guest.mark();
            guest.a.iretq().unwrap();
            guest.expect(event(13, 0).at(place));
        },
    ));
    cases
}

fn begin(guest: &mut Guest, user: bool, rflags: u64) {
    if user {
        to_user(guest, rflags);
    } else {
        guest.a.push(rflags as i32).unwrap();
        guest.a.popfq().unwrap();
    }
}
