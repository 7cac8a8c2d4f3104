//! Paging: rights, reserved bits, accessed and dirty bits, error codes (SDM vol. 3, chapter 4).

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::layout::*;

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;
/// Error code bits of a page fault: what they say of the access.
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const RSVD: u64 = 1 << 3;
const FETCH: u64 = 1 << 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Fetch,
}

/// Which entry of the walk has the bits at hand.
const LEVELS: [(&str, u64); 4] = [
    ("PML4E", PML4 + 8),
    ("PDPTE", TABLES),
    ("PDE", TABLES + 0x1000),
    ("PTE", TABLES + 0x2000),
];
/// The address that those entries map.
const ADDRESS: u64 = 1 << 39;

fn lay_walk(guest: &mut Guest) {
    guest.set(PML4 + 8, TABLES | 7);
    guest.set(TABLES, (TABLES + 0x1000) | 7);
    guest.set(TABLES + 0x1000, (TABLES + 0x2000) | 7);
    guest.set(TABLES + 0x2000, FRAME | 7);
    // RET, for those who come to execute.
    guest.write(FRAME, &[0xc3]);
}

fn reach(guest: &mut Guest, access: Access) -> Place {
    guest.a.mov(rbx, ADDRESS).unwrap();
    let place = guest.mark();
    match access {
        Access::Read => guest.a.mov(rax, qword_ptr(rbx)).unwrap(),
        Access::Write => guest.a.mov(byte_ptr(rbx), 0xc3u32 as i32).unwrap(),
        Access::Fetch => guest.a.call(rbx).unwrap(),
    }
    place
}

/// Every right of every level, for every kind of access.
fn rights() -> Vec<Case> {
    let mut cases = Vec::new();
    for (level, at) in LEVELS {
        for (bits, cleared) in [("not present", P), ("read-only", RW), ("supervisor", US)] {
            for user in [false, true] {
                for wp in [false, true] {
                    for access in [Access::Read, Access::Write, Access::Fetch] {
                        let refused = cleared == P
                            || cleared == RW && access == Access::Write && (user || wp)
                            || cleared == US && user;
                        cases.push(right(
                            format!("{access:?} by user {user}, WP {wp}, {level} {bits}"),
                            (at, cleared),
                            (user, wp, access),
                            refused,
                        ));
                    }
                }
            }
        }
        for user in [false, true] {
            cases.push(no_execute(level, at, user));
        }
    }
    cases
}

fn right(
    name: String,
    (at, cleared): (u64, u64),
    (user, wp, access): (bool, bool, Access),
    refused: bool,
) -> Case {
    long(name, "SDM 3, 4.6 and 4.7", |guest| {
        lay_walk(guest);
        guest.a.and(qword_ptr(at), !(cleared as i32)).unwrap();
        if !wp {
            guest.a.mov(rax, CR0 & !(1 << 16)).unwrap();
            guest.a.mov(cr0, rax).unwrap();
        }
        if user {
            to_user(guest, 2);
        }
        let place = reach(guest, access);
        if refused {
            let error = u64::from(cleared != P)
                | if access == Access::Write { WRITE } else { 0 }
                | if access == Access::Fetch { FETCH } else { 0 }
                | if user { USER } else { 0 };
            let event = event(14, error).cr2(ADDRESS);
            guest.expect(match access {
                Access::Fetch => event.rip(ADDRESS),
                _ => event.at(place),
            });
        } else {
            guest.expect_end();
        }
    })
}

fn no_execute(level: &str, at: u64, user: bool) -> Case {
    long(
        format!("fetch from NX in {level}, user {user}"),
        "SDM 3, 4.6",
        |guest| {
            lay_walk(guest);
            guest.a.bts(qword_ptr(at), 63).unwrap();
            if user {
                to_user(guest, 2);
            }
            // Reads are none of its business, and may put the page into the TLB.
            reach(guest, Access::Read);
            reach(guest, Access::Fetch);
            let error = 1 | FETCH | if user { USER } else { 0 };
            guest.expect(event(14, error).cr2(ADDRESS).rip(ADDRESS));
        },
    )
}

/// Bits that must be zero.
fn reserved() -> Vec<Case> {
    let mut cases = Vec::new();
    for (level, at) in LEVELS {
        for bit in [40, 45, 51] {
            cases.push(reserved_bit(format!("{level} bit {bit}"), at, bit, EFER));
        }
        cases.push(reserved_bit(
            format!("{level} NX without NXE"),
            at,
            63,
            EFER & !(1 << 11),
        ));
    }
    cases.push(reserved_bit("PML4E PS".into(), PML4 + 8, 7, EFER));
    // Pages of 1 GiB are not offered.
    cases.push(reserved_bit("PDPTE PS".into(), TABLES, 7, EFER));
    for bit in [13, 20] {
        cases.push(long(
            format!("2 MiB page, bit {bit}"),
            "SDM 3, table 4-18",
            |guest| {
                lay_walk(guest);
                guest.set(TABLES + 0x1000, 7 | PS | 1 << bit);
                let place = reach(guest, Access::Read);
                guest.expect(event(14, 1 | RSVD).cr2(ADDRESS).at(place));
            },
        ));
    }
    for bit in [52, 58, 9, 11] {
        cases.push(long(
            format!("PTE ignores bit {bit}"),
            "SDM 3, table 4-20",
            |guest| {
                lay_walk(guest);
                guest.set(TABLES + 0x2000, FRAME | 7 | 1 << bit);
                reach(guest, Access::Write);
                guest.expect_end();
            },
        ));
    }
    cases
}

fn reserved_bit(name: String, at: u64, bit: u32, efer: u64) -> Case {
    long(format!("reserved: {name}"), "SDM 3, 4.7", |guest| {
        lay_walk(guest);
        guest.a.mov(ecx, 0xc000_0080u32).unwrap();
        guest.a.xor(edx, edx).unwrap();
        guest.a.mov(eax, efer as u32).unwrap();
        guest.a.wrmsr().unwrap();
        guest.a.bts(qword_ptr(at), bit).unwrap();
        let place = reach(guest, Access::Write);
        guest.expect(event(14, 1 | RSVD | WRITE).cr2(ADDRESS).at(place));
    })
}

/// What the processor notes in the entries: RAX is the last one's low bits afterwards.
fn noted() -> Vec<Case> {
    let mut cases = Vec::new();
    for access in [Access::Read, Access::Write, Access::Fetch] {
        for flush in ["CR3", "INVLPG", "none"] {
            cases.push(long(
                format!("accessed and dirty after {access:?}, flush {flush}"),
                "SDM 3, 4.8",
                |guest| note(guest, access, flush),
            ));
        }
    }
    cases
}

fn note(guest: &mut Guest, access: Access, flush: &str) {
    lay_walk(guest);
    for (_, at) in LEVELS {
        guest.a.and(qword_ptr(at), !((A | D) as i32)).unwrap();
    }
    match flush {
        "CR3" => {
            guest.a.mov(rax, cr3).unwrap();
            guest.a.mov(cr3, rax).unwrap();
        }
        _ => {
            guest.a.mov(rbx, ADDRESS).unwrap();
            guest.a.invlpg(qword_ptr(rbx)).unwrap();
        }
    }
    if flush == "none" {
        // A read first: the write that follows meets the page in the TLB.
        reach(guest, Access::Read);
    }
    reach(guest, access);
    let a = &mut guest.a;
    a.mov(rcx, qword_ptr(LEVELS[0].1)).unwrap();
    a.and(rcx, qword_ptr(LEVELS[1].1)).unwrap();
    a.and(rcx, qword_ptr(LEVELS[2].1)).unwrap();
    a.mov(rax, qword_ptr(LEVELS[3].1)).unwrap();
    a.and(eax, 0xfff).unwrap();
    a.and(ecx, A as i32).unwrap();
    let dirty = if access == Access::Write { D } else { 0 };
    guest.expect(end().rax(7 | A | dirty).is(Field::Rcx, A));
}

/// Large pages.
fn large() -> Vec<Case> {
    let mut cases = Vec::new();
    for access in [Access::Read, Access::Write] {
        for user in [false, true] {
            for rights in [P, P | RW, P | US, P | RW | US] {
                let refused =
                    user && rights & US == 0 || access == Access::Write && rights & RW == 0;
                cases.push(long(
                    format!("2 MiB page of rights {rights:#x}: {access:?}, user {user}"),
                    "SDM 3, 4.5",
                    |guest| {
                        lay_walk(guest);
                        guest.set(TABLES + 0x1000, rights | PS);
                        if user {
                            to_user(guest, 2);
                        }
                        guest.a.mov(rbx, ADDRESS + VARIABLES + 0x200).unwrap();
                        let place = guest.mark();
                        if access == Access::Read {
                            guest.a.mov(rax, qword_ptr(rbx)).unwrap();
                        } else {
                            guest.a.mov(qword_ptr(rbx), rbx).unwrap();
                        }
                        if refused {
                            let error = 1
                                | if access == Access::Write { WRITE } else { 0 }
                                | if user { USER } else { 0 };
                            let address = ADDRESS + VARIABLES + 0x200;
                            guest.expect(event(14, error).cr2(address).at(place));
                        } else {
                            guest.expect_end();
                        }
                    },
                ));
            }
        }
    }
    cases.push(long(
        "INVLPG drops all of a 2 MiB page",
        "SDM 3, 4.10.4.1",
        |guest| {
            lay_walk(guest);
            let a = &mut guest.a;
            a.mov(qword_ptr(TABLES + 0x1000), (7 | PS) as i32).unwrap();
            a.mov(rbx, ADDRESS + VARIABLES).unwrap();
            a.mov(rax, qword_ptr(rbx)).unwrap();
            a.mov(rax, qword_ptr(rbx + 0x1000)).unwrap();
            a.and(qword_ptr(TABLES + 0x1000), !1).unwrap();
            a.invlpg(byte_ptr(rbx + 0x5_0000)).unwrap();
            let place = guest.mark();
            guest.a.mov(rax, qword_ptr(rbx + 0x1000)).unwrap();
            let address = ADDRESS + VARIABLES + 0x1000;
            guest.expect(event(14, 0).cr2(address).at(place));
        },
    ));
    cases
}

/// What outlives a flush and what does not.
fn global() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, global, flush) in [
        ("a global page ends with INVLPG", true, "INVLPG"),
        ("a global page ends with CR4.PGE", true, "PGE"),
        (
            "a global page ends with CR0.PG's kin: CR4.PAE stays",
            false,
            "CR3",
        ),
    ] {
        cases.push(long(name, "SDM 3, 4.10.4.1", |guest| {
            lay_walk(guest);
            let entry = FRAME | 7 | if global { 1 << 8 } else { 0 };
            let a = &mut guest.a;
            a.mov(qword_ptr(TABLES + 0x2000), entry as i32).unwrap();
            a.mov(rbx, ADDRESS).unwrap();
            a.mov(rax, qword_ptr(rbx)).unwrap();
            a.and(qword_ptr(TABLES + 0x2000), !1).unwrap();
            match flush {
                "INVLPG" => a.invlpg(byte_ptr(rbx)).unwrap(),
                "PGE" => {
                    a.mov(eax, (CR4 & !(1 << 7)) as u32).unwrap();
                    a.mov(cr4, rax).unwrap();
                }
                _ => {
                    a.mov(rax, cr3).unwrap();
                    a.mov(cr3, rax).unwrap();
                }
            }
            let place = guest.mark();
            guest.a.mov(rax, qword_ptr(rbx)).unwrap();
            guest.expect(event(14, 0).cr2(ADDRESS).at(place));
        }));
    }
    cases
}

/// An access across two pages faults at the one that refuses, and changes nothing.
fn crossing() -> Vec<Case> {
    let mut cases = Vec::new();
    for second in [false, true] {
        for write in [false, true] {
            cases.push(long(
                format!("8 bytes across pages, second refuses {second}, write {write}"),
                "SDM 3, 4.7",
                |guest| {
                    let entry = TEST_PT + 8 * u64::from(second);
                    guest.a.and(qword_ptr(entry), !1).unwrap();
                    guest.a.invlpg(byte_ptr(TEST)).unwrap();
                    guest.a.invlpg(byte_ptr(TEST + 0x1000)).unwrap();
                    guest.a.mov(rbx, TEST + 0xffc).unwrap();
                    guest.a.mov(rcx, -1i64 as u64).unwrap();
                    guest.a.xor(eax, eax).unwrap();
                    let place = guest.mark();
                    if write {
                        guest.a.mov(qword_ptr(rbx), rcx).unwrap();
                    } else {
                        guest.a.mov(rax, qword_ptr(rbx)).unwrap();
                    }
                    let address = if second { TEST + 0x1000 } else { TEST + 0xffc };
                    let error = if write { WRITE } else { 0 };
                    guest.expect(event(14, error).cr2(address).at(place).rax(0));
                },
            ));
        }
    }
    cases
}

/// 32-bit and PAE paging.
fn legacy() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, pse, entry, error) in [
        ("4 MiB page", true, 7 | PS, None),
        ("4 MiB page of the supervisor", true, 3 | PS, None),
        ("4 MiB page, read-only", true, 5 | PS, Some(1 | WRITE)),
        ("4 MiB page, not present", true, 6 | PS, Some(WRITE)),
        (
            "4 MiB page, bit 13",
            true,
            7 | PS | 1 << 13,
            Some(1 | WRITE | RSVD),
        ),
        (
            "4 MiB page, bit 21",
            true,
            7 | PS | 1 << 21,
            Some(1 | WRITE | RSVD),
        ),
    ] {
        cases.push(protected(
            format!("32-bit paging: {name}"),
            "SDM 3, 4.3",
            |guest| {
                if entry >> 13 & 1 != 0 {
                    guest.differs(Peer::Tcg, "takes bits 13-20 as an address, PSE-36 or not");
                }
                guest.set_32(PML4, 0x87);
                guest.set_32(PML4 + 4, 0);
                guest.set_32(PML4 + 8, entry as u32);
                enable_paging(guest, if pse { 1 << 4 } else { 0 }, PML4, 0);
                guest
                    .a
                    .mov(ebx, 0x80_0000 + VARIABLES as u32 + 0x200)
                    .unwrap();
                let place = guest.mark();
                guest.a.mov(dword_ptr(ebx), ebx).unwrap();
                guest.expect(match error {
                    None => end(),
                    Some(error) => event(14, error)
                        .cr2(0x80_0000 + VARIABLES + 0x200)
                        .at(place),
                });
            },
        ));
    }
    for nxe in [false, true] {
        cases.push(protected(
            format!("32-bit paging: a fetch is not told apart, NXE {nxe}"),
            "SDM 3, 4.7",
            |guest| {
                guest.set_32(PML4, 0x87);
                enable_paging(guest, 1 << 4, PML4, if nxe { 1 << 11 } else { 0 });
                guest.a.mov(ebx, 0x80_0000).unwrap();
                guest.a.call(ebx).unwrap();
                guest.expect(event(14, 0).cr2(0x80_0000).rip(0x80_0000));
            },
        ));
    }
    for (name, entry, error) in [
        ("2 MiB page", 7 | PS, None),
        (
            "bit 52 of a directory entry",
            7 | PS | 1 << 52,
            Some(1 | WRITE | RSVD),
        ),
        (
            "bit 62 of a directory entry",
            7 | PS | 1 << 62,
            Some(1 | WRITE | RSVD),
        ),
        (
            "bit 40 of a directory entry",
            7 | PS | 1 << 40,
            Some(1 | WRITE | RSVD),
        ),
        (
            "bit 13 of a 2 MiB page",
            7 | PS | 1 << 13,
            Some(1 | WRITE | RSVD),
        ),
        ("NX without NXE", 7 | PS | NX, Some(1 | WRITE | RSVD)),
    ] {
        cases.push(protected(format!("PAE: {name}"), "SDM 3, 4.4", |guest| {
            guest.set(PDPT, PD | 1);
            guest.set(PD, 0x87);
            guest.set(PD + 16, entry);
            enable_paging(guest, 1 << 5, PDPT, 0);
            guest
                .a
                .mov(ebx, 0x40_0000 + VARIABLES as u32 + 0x200)
                .unwrap();
            let place = guest.mark();
            guest.a.mov(dword_ptr(ebx), ebx).unwrap();
            guest.expect(match error {
                None => end(),
                Some(error) => event(14, error)
                    .cr2(0x40_0000 + VARIABLES + 0x200)
                    .at(place),
            });
        }));
    }
    for bit in [1, 2, 5, 8, 40, 52, 62, 63] {
        cases.push(protected(
            format!("PAE: bit {bit} of a directory pointer"),
            "SDM 3, 4.4.1",
            |guest| {
                guest.differs(
                    Peer::Tcg,
                    "reads the pointers at each walk, and checks none",
                );
                guest.set(PDPT, PD | 1);
                guest.set(PDPT + 24, PD | 1 | 1 << bit);
                guest.set(PD, 0x87);
                let place = enable_paging(guest, 1 << 5, PDPT, 0);
                guest.expect(event(13, 0).at(place));
            },
        ));
    }
    cases.push(protected("PAE: NX of a page", "SDM 3, 4.6", |guest| {
        guest.set(PDPT, PD | 1);
        guest.set(PD, 0x87);
        guest.set(PD + 16, 7 | PS | NX);
        enable_paging(guest, 1 << 5, PDPT, 1 << 11);
        guest.a.mov(ebx, 0x40_0000).unwrap();
        guest.a.call(ebx).unwrap();
        guest.expect(event(14, 1 | FETCH).cr2(0x40_0000).rip(0x40_0000));
    }));
    cases.push(protected(
        "PAE: pointers count when CR3 is loaded",
        "SDM 3, 4.4.1",
        |guest| {
            guest.differs(Peer::Tcg, "reads the pointers at each walk");
            guest.set(PDPT, PD | 1);
            guest.set(PD, 0x87);
            enable_paging(guest, 1 << 5, PDPT, 0);
            let a = &mut guest.a;
            // The first pointer changes in memory only, and nobody sees it.
            a.mov(dword_ptr(PDPT), 0).unwrap();
            a.mov(eax, dword_ptr(VARIABLES)).unwrap();
            a.invlpg(byte_ptr(VARIABLES)).unwrap();
            a.mov(eax, dword_ptr(VARIABLES)).unwrap();
            a.mov(dword_ptr(PDPT), (PD | 1) as i32).unwrap();
            guest.expect_end();
        },
    ));
    cases
}

/// Returns the place of the instruction that turns paging on.
fn enable_paging(guest: &mut Guest, cr4_bits: u32, root: u64, efer: u32) -> Place {
    let a = &mut guest.a;
    a.mov(ecx, 0xc000_0080u32).unwrap();
    a.xor(edx, edx).unwrap();
    a.mov(eax, efer).unwrap();
    a.wrmsr().unwrap();
    a.mov(eax, cr4_bits).unwrap();
    a.mov(cr4, eax).unwrap();
    a.mov(eax, root as u32).unwrap();
    a.mov(cr3, eax).unwrap();
    a.mov(eax, 0x8001_0033u32).unwrap();
    let place = guest.mark();
    guest.a.mov(cr0, eax).unwrap();
    place
}

pub(crate) fn cases() -> Vec<Case> {
    [
        rights(),
        reserved(),
        noted(),
        large(),
        global(),
        crossing(),
        legacy(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
