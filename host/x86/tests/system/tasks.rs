//! Task switches by the processor, in protected mode (SDM vol. 3, chapter 7).

use iced_x86::code_asm::*;

use crate::guest::*;
use crate::layout::*;

/// The second task begins here.
const OTHER: u64 = MORE_CODE;
const OTHER_STACK: u64 = IST_STACK;

/// The second task's state in [`SPARE`]; returns its selector and that of a task gate to it.
fn lay(guest: &mut Guest) -> (u16, u16) {
    let task = guest.descriptor(0);
    let gate = guest.descriptor(u64::from(task) << 16 | 0xe5 << 40);
    for (at, value) in [
        (0x20u64, OTHER),
        (0x24, 2),
        (0x28, 0x1234),
        (0x38, OTHER_STACK),
        (0x48, KERNEL_SS.into()),
        (0x4c, KERNEL_CS.into()),
        (0x50, KERNEL_SS.into()),
        (0x54, KERNEL_SS.into()),
    ] {
        guest
            .a
            .mov(dword_ptr((SPARE + at) as u32), value as i32)
            .unwrap();
    }
    // Both tasks as they are at first: this one busy, the other not.
    let descriptor = GDT + u64::from(task);
    guest
        .a
        .mov(dword_ptr(descriptor as u32), (SPARE << 16 | 0x67) as i32)
        .unwrap();
    guest
        .a
        .mov(dword_ptr(descriptor as u32 + 4), 0x8900)
        .unwrap();
    let own = GDT + u64::from(TASK);
    guest.a.mov(dword_ptr(own as u32 + 4), 0x8900).unwrap();
    guest.a.mov(eax, u32::from(TASK)).unwrap();
    guest.a.ltr(ax).unwrap();
    (task, gate)
}

fn far(guest: &mut Guest, call: bool, selector: u16) -> Place {
    let place = guest.mark();
    guest.a.db(&[if call { 0x9a } else { 0xea }]).unwrap();
    guest.a.dd(&[0]).unwrap();
    guest.a.dw(&[selector]).unwrap();
    place
}

/// What the second task sees: EAX as its state says, ECX its back link, EDX whether the first is busy,
/// ESI what the first's state holds of its EIP.
fn observe(a: &mut CodeAssembler) {
    a.mov(ecx, dword_ptr(SPARE as u32)).unwrap();
    a.movzx(edx, byte_ptr((GDT + u64::from(TASK) + 5) as u32))
        .unwrap();
    a.mov(esi, dword_ptr((TSS + 0x20) as u32)).unwrap();
    a.ud2().unwrap();
}

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for call in [false, true] {
        for gate in [false, true] {
            cases.push(protected(
                format!("a switch by CALL {call}, by a task gate {gate}"),
                "SDM 3, 7.3",
                |guest| {
                    guest.set_32(SPARE, 0);
                    guest.code(32, OTHER, observe);
                    let (task, by) = lay(guest);
                    far(guest, call, if gate { by } else { task });
                    let next = guest.mark();
                    let (link, busy, nested) = if call {
                        (TASK.into(), 0x8b, 1 << 14)
                    } else {
                        (0, 0x89, 0)
                    };
                    guest.expect(
                        event(6, 0)
                            .rax(0x1234)
                            .bits(Field::Rcx, 0xffff, link)
                            .is(Field::Rdx, busy)
                            .points(Field::Rsi, next)
                            .flags(1 << 14, nested),
                    );
                },
            ));
        }
    }
    cases.push(protected(
        "IRET returns to the task that called",
        "SDM 3, 7.4",
        |guest| {
            guest.code(32, OTHER, |a| a.iretd().unwrap());
            let (task, _) = lay(guest);
            far(guest, true, task);
            guest
                .a
                .movzx(eax, byte_ptr((GDT + u64::from(task) + 5) as u32))
                .unwrap();
            guest.a.mov(ecx, cr0).unwrap();
            guest.a.clts().unwrap();
            guest.expect(end().rax(0x89).bits(Field::Rcx, 8, 8));
        },
    ));
    cases.push(protected(
        "an exception by a task gate",
        "SDM 3, 6.12.2",
        |guest| {
            guest.code(32, OTHER, |a| {
                // The error code is on the new stack.
                a.mov(ecx, dword_ptr(esp)).unwrap();
                a.mov(esi, dword_ptr((TSS + 0x20) as u32)).unwrap();
                a.ud2().unwrap();
            });
            let (task, _) = lay(guest);
            guest.set(IDT + 13 * 8, u64::from(task) << 16 | 0x85 << 40);
            guest.a.mov(eax, 0x840).unwrap();
            let place = guest.mark();
            guest.a.mov(ds, eax).unwrap();
            guest.expect(event(6, 0).is(Field::Rcx, 0x840).points(Field::Rsi, place));
        },
    ));
    for (name, access, limit, vector) in [
        ("a busy task", 0x8b00, 0x67u64, 13),
        ("a task that is not present", 0x0900, 0x67, 11),
        ("a task state that is too short", 0x8900, 0x66, 10),
    ] {
        cases.push(protected(
            format!("a jump to {name}"),
            "SDM 3, 7.3",
            |guest| {
                let (task, _) = lay(guest);
                let descriptor = GDT + u64::from(task);
                guest
                    .a
                    .mov(dword_ptr(descriptor as u32), (SPARE << 16 | limit) as i32)
                    .unwrap();
                guest
                    .a
                    .mov(dword_ptr(descriptor as u32 + 4), access)
                    .unwrap();
                let place = far(guest, false, task);
                guest.expect(event(vector, task.into()).at(place));
            },
        ));
    }
    cases
}
