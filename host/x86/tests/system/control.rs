//! Control registers, EFER and other MSRs: bits that do not exist, combinations that cannot be
//! (SDM vol. 3, 2.5 and 10; AMD APM vol. 2, 3.1).

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::layout::*;

/// Writes to control registers in 64-bit mode.
fn registers() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, value, refused) in [
        ("CR0 as it is", CR0, false),
        ("CR0 without PE", CR0 & !1, true),
        ("CR0 without PG, in 64-bit mode", CR0 & !(1 << 31), true),
        ("CR0 with NW and without CD", CR0 | 1 << 29, true),
        ("CR0 with NW and CD", CR0 | 3 << 29, false),
        ("CR0 bit 32", CR0 | 1 << 32, true),
        ("CR0 bit 63", CR0 | 1 << 63, true),
    ] {
        cases.push(write(name, value, refused, |a| a.mov(cr0, rax).unwrap()));
    }
    for (name, value, refused) in [
        ("CR3 bit 40", PML4 | 1 << 40, true),
        ("CR3 bit 51", PML4 | 1 << 51, true),
        ("CR3 bit 63", PML4 | 1 << 63, true),
        ("CR3 bits 3 and 4", PML4 | 3 << 3, false),
    ] {
        cases.push(write(name, value, refused, |a| a.mov(cr3, rax).unwrap()));
    }
    for (name, value, refused) in [
        ("CR4 without PAE, in 64-bit mode", CR4 & !(1 << 5), true),
        ("CR4 bit 15", CR4 | 1 << 15, true),
        ("CR4.SMEP, which is not offered", CR4 | 1 << 20, true),
        ("CR4.SMAP, which is not offered", CR4 | 1 << 21, true),
        ("CR4.UMIP, which is not offered", CR4 | 1 << 11, true),
        ("CR4.FSGSBASE, which is not offered", CR4 | 1 << 16, true),
        ("CR4.PCIDE, which is not offered", CR4 | 1 << 17, true),
        ("CR4.LA57, which is not offered", CR4 | 1 << 12, true),
        ("CR4 bit 32", CR4 | 1 << 32, true),
        ("CR4 bit 63", CR4 | 1 << 63, true),
    ] {
        cases.push(write(name, value, refused, |a| a.mov(cr4, rax).unwrap()));
    }
    for (name, value, refused) in [("CR8 of 15", 15, false), ("CR8 of 16", 16, true)] {
        cases.push(write(name, value, refused, |a| {
            a.mov(cr8, rax).unwrap();
            a.xor(eax, eax).unwrap();
            a.mov(cr8, rax).unwrap();
        }));
    }
    for (name, value, refused) in [
        ("DR6 bit 32", 1 << 32, true),
        ("DR7 bit 32", 1 << 32 | 0x400, true),
        ("DR7 bit 10 alone", 0x400, false),
    ] {
        let six = name.starts_with("DR6");
        cases.push(write(name, value, refused, move |a| {
            if six {
                a.mov(dr6, rax).unwrap();
            } else {
                a.mov(dr7, rax).unwrap();
            }
        }));
    }
    cases
}

fn write(name: &str, value: u64, refused: bool, build: impl FnOnce(&mut CodeAssembler)) -> Case {
    long(name, "SDM 2, MOV to control and debug registers", |guest| {
        guest.differs_if(refused, Peer::Tcg, "checks little of control registers");
        guest.a.mov(rax, value).unwrap();
        let place = guest.mark();
        build(&mut guest.a);
        guest.expect(if refused {
            event(13, 0).at(place)
        } else {
            end()
        });
    })
}

/// EFER and other MSRs.
fn msrs() -> Vec<Case> {
    const EFER_MSR: u32 = 0xc000_0080;
    const CANONICAL: u64 = 1 << 47;
    let mut cases = Vec::new();
    for (name, msr, value, refused) in [
        ("EFER as it is", EFER_MSR, EFER, false),
        (
            "EFER without LME, under paging",
            EFER_MSR,
            EFER & !(1 << 8),
            true,
        ),
        ("EFER bit 1", EFER_MSR, EFER | 1 << 1, true),
        ("EFER bit 9", EFER_MSR, EFER | 1 << 9, true),
        ("EFER bit 63", EFER_MSR, EFER | 1 << 63, true),
        ("LSTAR, not canonical", 0xc000_0082, CANONICAL, true),
        ("CSTAR, not canonical", 0xc000_0083, CANONICAL, true),
        ("FS base, not canonical", 0xc000_0100, CANONICAL, true),
        ("GS base, not canonical", 0xc000_0101, CANONICAL, true),
        (
            "kernel GS base, not canonical",
            0xc000_0102,
            CANONICAL,
            true,
        ),
        ("SYSENTER_EIP, not canonical", 0x176, CANONICAL, true),
        (
            "PAT of a type that is reserved",
            0x277,
            0x0007_0406_0007_0402,
            true,
        ),
        ("PAT as after a reset", 0x277, 0x0007_0406_0007_0406, false),
        ("an MSR that is not there", 0x4000_ffff, 0, true),
    ] {
        cases.push(long(format!("WRMSR: {name}"), "SDM 2, WRMSR", |guest| {
            if name.contains("canonical") {
                guest.differs(Peer::Tcg, "takes any base or target");
            }
            if matches!(msr, EFER_MSR if refused) {
                guest.differs(Peer::Tcg, "ignores bits of EFER that it does not know");
            }
            if matches!(msr, 0x4000_ffff) {
                guest.differs(Peer::Tcg, "ignores MSRs that it does not know");
            }
            if msr == 0x277 && refused {
                guest.differs(Peer::Tcg, "takes any PAT");
            }
            guest.a.mov(ecx, msr).unwrap();
            guest.a.mov(eax, value as u32).unwrap();
            guest.a.mov(edx, (value >> 32) as u32).unwrap();
            let place = guest.mark();
            guest.a.wrmsr().unwrap();
            guest.expect(if refused {
                event(13, 0).at(place)
            } else {
                end()
            });
        }));
    }
    cases
}

/// What only privilege 0 may do.
fn privileged() -> Vec<Case> {
    type Build = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let list: [(&str, Build); 21] = [
        ("MOV from CR0", |a| a.mov(rax, cr0)),
        ("MOV to CR3", |a| a.mov(cr3, rax)),
        ("MOV from CR8", |a| a.mov(rax, cr8)),
        ("MOV from DR7", |a| a.mov(rax, dr7)),
        ("MOV to DR0", |a| a.mov(dr0, rax)),
        ("CLTS", |a| a.clts()),
        ("LMSW", |a| a.lmsw(ax)),
        ("HLT", |a| a.hlt()),
        ("INVLPG", |a| a.invlpg(byte_ptr(rsp))),
        ("INVD", |a| a.invd()),
        ("WBINVD", |a| a.wbinvd()),
        ("LGDT", |a| a.lgdt(tbyte_ptr(rsp))),
        ("LIDT", |a| a.lidt(tbyte_ptr(rsp))),
        ("RDMSR", |a| a.rdmsr()),
        ("WRMSR", |a| a.wrmsr()),
        ("SWAPGS", |a| a.swapgs()),
        ("SYSRET", |a| a.sysretq()),
        ("CLI", |a| a.cli()),
        ("STI", |a| a.sti()),
        ("IN", |a| a.in_(al, dx)),
        ("OUT", |a| a.out(dx, al)),
    ];
    list.into_iter()
        .map(|(name, build)| {
            long(format!("{name} in user mode"), "SDM 3, 5.9", |guest| {
                guest.set_16(TSS + 102, 0xffff);
                to_user(guest, 2);
                let place = guest.mark();
                build(&mut guest.a).unwrap();
                guest.expect(event(13, 0).at(place));
            })
        })
        .collect()
}

/// What is not offered, by its bytes.
fn absent() -> Vec<Case> {
    let list: [(&str, &[u8]); 10] = [
        ("CLAC", &[0x0f, 0x01, 0xca]),
        ("STAC", &[0x0f, 0x01, 0xcb]),
        ("XGETBV", &[0x0f, 0x01, 0xd0]),
        ("INVPCID", &[0x66, 0x0f, 0x38, 0x82, 0x04, 0x24]),
        ("RDFSBASE", &[0xf3, 0x48, 0x0f, 0xae, 0xc0]),
        ("MOV from CR1", &[0x0f, 0x20, 0xc8]),
        ("MOV to CR5", &[0x0f, 0x22, 0xe8]),
        ("MOV from DR8", &[0x44, 0x0f, 0x21, 0xc0]),
        ("LOCK NOP", &[0xf0, 0x90]),
        ("VMCALL's neighbour", &[0x0f, 0x01, 0xc0]),
    ];
    let mut cases = Vec::new();
    for (name, bytes) in list {
        for user in [false, true] {
            cases.push(long(
                format!("{name} is undefined, user {user}"),
                "SDM 2",
                |guest| {
                    if user {
                        to_user(guest, 2);
                    }
                    let place = guest.mark();
                    guest.a.db(bytes).unwrap();
                    guest.expect(event(6, 0).at(place));
                },
            ));
        }
    }
    cases
}

/// Combinations on the way to and from long mode, from protected mode.
fn legacy() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, value, refused) in [
        ("PG without PE", 0x8000_0032u32, true),
        ("NW without CD", 0x2000_0033, true),
    ] {
        cases.push(protected(format!("CR0: {name}"), "SDM 3, 2.5", |guest| {
            guest.differs_if(refused, Peer::Tcg, "checks little of control registers");
            guest.a.mov(eax, value).unwrap();
            let place = guest.mark();
            guest.a.mov(cr0, eax).unwrap();
            guest.expect(if refused {
                event(13, 0).at(place)
            } else {
                end()
            });
        }));
    }
    cases.push(protected(
        "long mode without PAE",
        "SDM 3, 10.8.5",
        |guest| {
            guest.differs(Peer::Tcg, "enters long mode without PAE");
            guest.a.mov(ecx, 0xc000_0080u32).unwrap();
            guest.a.xor(edx, edx).unwrap();
            guest.a.mov(eax, 0x100).unwrap();
            guest.a.wrmsr().unwrap();
            guest.a.xor(eax, eax).unwrap();
            guest.a.mov(cr4, eax).unwrap();
            guest.a.mov(eax, 0x8000_0033u32).unwrap();
            let place = guest.mark();
            guest.a.mov(cr0, eax).unwrap();
            guest.expect(event(13, 0).at(place));
        },
    ));
    cases.push(protected(
        "LMSW sets PE and cannot clear it",
        "SDM 2, LMSW",
        |guest| {
            guest.a.xor(eax, eax).unwrap();
            guest.a.lmsw(ax).unwrap();
            guest.a.mov(eax, cr0).unwrap();
            guest.expect(end().bits(Field::Rax, 0xf, 1));
        },
    ));
    cases
}

pub(crate) fn cases() -> Vec<Case> {
    [registers(), msrs(), privileged(), absent(), legacy()]
        .into_iter()
        .flatten()
        .collect()
}
