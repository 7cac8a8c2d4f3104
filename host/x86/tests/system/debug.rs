//! Breakpoints, single steps, alignment (SDM vol. 3, chapter 18 and 6.15, #AC).

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::layout::*;

const TF: i32 = 0x102;
/// DR6: a single step, a protected debug register.
const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;
/// The bits of DR6 that say what happened.
const CAUSES: u64 = 0xe00f;

fn trap(causes: u64) -> Event {
    event(1, 0).bits(Field::Dr6, CAUSES, causes)
}

fn set_trap_flag(guest: &mut Guest) {
    guest.a.push(TF).unwrap();
    guest.a.popfq().unwrap();
}

fn steps() -> Vec<Case> {
    vec![
        long(
            "a step behind each instruction",
            "SDM 3, 18.3.1.4",
            |guest| {
                set_trap_flag(guest);
                guest.a.nop().unwrap();
                let first = guest.mark();
                guest.a.nop().unwrap();
                let second = guest.mark();
                guest.returns(1);
                guest.expect(trap(BS).at(first));
                guest.expect(trap(BS).at(second));
            },
        ),
        long(
            "a step behind each round of REP",
            "SDM 3, 18.3.1.4",
            |guest| {
                guest.a.mov(ecx, 2).unwrap();
                guest.a.mov(edi, DATA as u32).unwrap();
                set_trap_flag(guest);
                let place = guest.mark();
                guest.a.rep().stosb().unwrap();
                let next = guest.mark();
                guest.returns(1);
                guest.expect(trap(BS).at(place).is(Field::Rcx, 1));
                guest.expect(trap(BS).at(next).is(Field::Rcx, 0));
            },
        ),
        long("no step behind MOV SS", "SDM 3, 6.8.3", |guest| {
            guest.a.mov(eax, u32::from(KERNEL_SS)).unwrap();
            set_trap_flag(guest);
            guest.a.mov(ss, eax).unwrap();
            guest.a.nop().unwrap();
            let place = guest.mark();
            guest.expect(trap(BS).at(place));
        }),
        long("no step behind INT n", "SDM 3, 18.3.1.4", |guest| {
            set_trap_flag(guest);
            guest.a.int(0x80).unwrap();
            let place = guest.mark();
            guest.expect(event(0x80, 0).at(place).flags(0x100, 0x100));
        }),
        long(
            "a step behind POPF that clears TF",
            "SDM 3, 18.3.1.4",
            |guest| {
                guest.a.push(2).unwrap();
                set_trap_flag(guest);
                guest.a.popfq().unwrap();
                let place = guest.mark();
                guest.expect(trap(BS).at(place).flags(0x100, 0));
            },
        ),
        long(
            "no step into a handler of SYSCALL that masks TF",
            "SDM 2, SYSCALL",
            |guest| {
                guest.a.mov(ecx, 0xc000_0084u32).unwrap();
                guest.a.mov(eax, 0x100).unwrap();
                guest.a.xor(edx, edx).unwrap();
                guest.a.wrmsr().unwrap();
                guest.a.mov(ecx, 0xc000_0081u32).unwrap();
                guest
                    .a
                    .mov(edx, u32::from(KERNEL_CS) | u32::from(USER_CS_32) << 16)
                    .unwrap();
                guest.a.wrmsr().unwrap();
                guest.a.mov(ecx, 0xc000_0082u32).unwrap();
                guest.a.mov(eax, MORE_CODE as u32).unwrap();
                guest.a.xor(edx, edx).unwrap();
                guest.a.wrmsr().unwrap();
                guest.code(64, MORE_CODE, |a| a.ud2().unwrap());
                to_user(guest, 0x102);
                guest.a.syscall().unwrap();
                guest.expect(event(6, 0).rip(MORE_CODE).flags(0x100, 0));
            },
        ),
        long("ICEBP", "SDM 2, INT n", |guest| {
            to_user(guest, 2);
            guest.a.int1().unwrap();
            let place = guest.mark();
            guest.expect(trap(0).at(place));
        }),
    ]
}

/// A breakpoint at `address`: DR0, and DR7 with `control` (type and length).
fn enable(guest: &mut Guest, address: u64, control: u64) {
    guest.a.mov(rax, address).unwrap();
    guest.a.mov(dr0, rax).unwrap();
    guest.a.mov(rax, 0x401 | control << 16).unwrap();
    guest.a.mov(dr7, rax).unwrap();
    guest.a.xor(eax, eax).unwrap();
}

fn breakpoints() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, control, write, bytes_off, hit) in [
        ("a write of its byte", 0b0001u64, true, 0u64, true),
        ("a read of its byte, for writes", 0b0001, false, 0, false),
        ("a read of its byte, for both", 0b0011, false, 0, true),
        ("a write beside its byte", 0b0001, true, 1, false),
        ("a write within its 4 bytes", 0b1101, true, 3, true),
        ("a write behind its 4 bytes", 0b1101, true, 4, false),
        ("a write within its 8 bytes", 0b1001, true, 7, true),
    ] {
        cases.push(long(
            format!("a data breakpoint and {name}"),
            "SDM 3, 18.2.4 and 18.3.1.2",
            |guest| {
                // Once before: the page is in the TLB.
                guest.a.mov(rbx, DATA + bytes_off).unwrap();
                guest.a.mov(byte_ptr(rbx), cl).unwrap();
                enable(guest, DATA, control);
                if write {
                    guest.a.mov(byte_ptr(rbx), cl).unwrap();
                } else {
                    guest.a.mov(cl, byte_ptr(rbx)).unwrap();
                }
                let place = guest.mark();
                guest.a.nop().unwrap();
                guest.expect(if hit { trap(1).at(place) } else { end() });
            },
        ));
    }
    cases.push(long(
        "an instruction breakpoint",
        "SDM 3, 18.3.1.1",
        |guest| {
            let place = guest.place();
            guest.address_of(place);
            guest.a.mov(dr0, rax).unwrap();
            guest.a.mov(eax, 0x401).unwrap();
            guest.a.mov(dr7, rax).unwrap();
            guest.a.xor(ebx, ebx).unwrap();
            guest.set_place(place);
            guest.a.inc(ebx).unwrap();
            guest.expect(trap(1).at(place).flags(1 << 16, 0));
        },
    ));
    cases.push(long(
        "RF spares one instruction a breakpoint",
        "SDM 3, 18.3.1.1",
        |guest| {
            let place = guest.place();
            guest.address_of(place);
            guest.a.mov(dr0, rax).unwrap();
            guest.a.mov(ecx, 0x401).unwrap();
            guest.a.mov(dr7, rcx).unwrap();
            for value in [
                i32::from(KERNEL_SS),
                KERNEL_STACK as i32,
                0x1_0002,
                i32::from(KERNEL_CS),
            ] {
                guest.a.push(value).unwrap();
            }
            guest.a.push(rax).unwrap();
            guest.a.iretq().unwrap();
            guest.set_place(place);
            guest.a.nop().unwrap();
            guest.expect_end();
        },
    ));
    cases.push(long(
        "a breakpoint beyond MOV SS waits",
        "SDM 3, 6.8.3",
        |guest| {
            guest.differs(Peer::Tcg, "does not wait");
            guest.a.mov(dword_ptr(DATA), i32::from(KERNEL_SS)).unwrap();
            enable(guest, DATA, 0b0011);
            guest.a.mov(rbx, DATA).unwrap();
            guest.a.mov(ss, word_ptr(rbx)).unwrap();
            guest.a.nop().unwrap();
            let place = guest.mark();
            guest.a.nop().unwrap();
            guest.expect(trap(1).at(place));
        },
    ));
    for to in [false, true] {
        cases.push(long(
            format!("protected debug registers, write {to}"),
            "SDM 3, 18.2.4",
            |guest| {
                guest.a.mov(eax, 0x2400).unwrap();
                guest.a.mov(dr7, rax).unwrap();
                let place = guest.mark();
                if to {
                    guest.a.mov(dr1, rax).unwrap();
                } else {
                    guest.a.mov(rax, dr1).unwrap();
                }
                guest.expect(trap(BD).at(place));
            },
        ));
    }
    cases
}

fn alignment() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, user, am, ac, offset, refused) in [
        ("in user mode", true, true, true, 1, true),
        ("in user mode, aligned", true, true, true, 8, false),
        ("without AC", true, true, false, 1, false),
        ("without AM", true, false, true, 1, false),
        ("in the kernel", false, true, true, 1, false),
    ] {
        cases.push(long(
            format!("a misaligned access {name}"),
            "SDM 3, 6.15, #AC",
            |guest| {
                guest.differs_if(refused, Peer::Tcg, "checks no alignment");
                if am {
                    guest.a.mov(rax, CR0 | 1 << 18).unwrap();
                    guest.a.mov(cr0, rax).unwrap();
                }
                let flags = if ac { 0x4_0002 } else { 2 };
                if user {
                    to_user(guest, flags);
                } else {
                    guest.a.push(flags as i32).unwrap();
                    guest.a.popfq().unwrap();
                }
                guest.a.mov(rbx, DATA + offset).unwrap();
                let place = guest.mark();
                guest.a.mov(rcx, qword_ptr(rbx)).unwrap();
                guest.expect(if refused {
                    event(17, 0).at(place)
                } else {
                    end()
                });
            },
        ));
    }
    cases
}

pub(crate) fn cases() -> Vec<Case> {
    [steps(), breakpoints(), alignment()]
        .into_iter()
        .flatten()
        .collect()
}
