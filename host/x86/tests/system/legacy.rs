//! What cases in 32-bit protected mode have in place of 64-bit mode's.

use iced_x86::code_asm::*;

use crate::guest::{Guest, LEGACY_FIELDS, RESET};
use crate::layout::*;

pub(crate) fn lay(guest: &mut Guest) {
    guest.set_32(TSS + 4, INNER_STACK as u32);
    guest.set_16(TSS + 8, KERNEL_SS);
    guest.set_16(TSS + 102, 104);
    guest.code(32, ENTRY, |a| {
        a.lgdt(fword_ptr(GDTR)).unwrap();
        a.lidt(fword_ptr(IDTR)).unwrap();
        // JMP 8:ENTRY + 0x80
        a.db(&[0xea]).unwrap();
        a.dd(&[ENTRY as u32 + 0x80]).unwrap();
        a.dw(&[KERNEL_CS]).unwrap();
    });
    guest.code(32, ENTRY + 0x80, |a| {
        a.mov(eax, u32::from(KERNEL_SS)).unwrap();
        for segment in [ds, es, ss] {
            a.mov(segment, eax).unwrap();
        }
        a.mov(eax, u32::from(TASK)).unwrap();
        a.ltr(ax).unwrap();
        a.mov(dword_ptr(RESUME), CODE as u32).unwrap();
        a.mov(eax, (HANDLER + RESET) as u32).unwrap();
        a.jmp(eax).unwrap();
    });
    guest.code(32, HANDLER, handler);
    guest.code(32, HANDLER + RESET, reset);
}

fn handler(a: &mut CodeAssembler) {
    let mut again = a.create_label();
    for register in [eax, ecx, edx, esi] {
        a.push(register).unwrap();
    }
    a.cld().unwrap();
    a.mov(eax, cr2).unwrap();
    a.push(eax).unwrap();
    a.mov(eax, dr6).unwrap();
    a.push(eax).unwrap();
    a.mov(esi, esp).unwrap();
    a.mov(ecx, LEGACY_FIELDS as u32 * 4).unwrap();
    a.mov(edx, u32::from(REPORT_PORT)).unwrap();
    // From the stack: the data segments may be anything.
    a.db(&[0xf3, 0x36, 0x6e]).unwrap();
    a.db(&[0x36]).unwrap();
    a.cmp(dword_ptr(CHAIN), 0).unwrap();
    a.je(again).unwrap();
    a.db(&[0x36]).unwrap();
    a.dec(dword_ptr(CHAIN)).unwrap();
    a.mov(eax, 0xffff_0ff0u32).unwrap();
    a.mov(dr6, eax).unwrap();
    a.db(&[0x36]).unwrap();
    a.mov(eax, dword_ptr(SKIP as u32)).unwrap();
    a.add(dword_ptr(esp + 32), eax).unwrap();
    a.add(esp, 8).unwrap();
    for register in [esi, edx, ecx, eax] {
        a.pop(register).unwrap();
    }
    a.add(esp, 8).unwrap();
    a.iretd().unwrap();
    a.set_label(&mut again).unwrap();
    a.mov(eax, (HANDLER + RESET) as u32).unwrap();
    a.jmp(eax).unwrap();
}

fn reset(a: &mut CodeAssembler) {
    a.cli().unwrap();
    a.mov(eax, u32::from(KERNEL_SS)).unwrap();
    for segment in [ds, es, ss, fs, gs] {
        a.mov(segment, eax).unwrap();
    }
    a.mov(esp, KERNEL_STACK as u32).unwrap();
    a.push(2).unwrap();
    a.popfd().unwrap();
    a.mov(eax, 0x400).unwrap();
    a.mov(dr7, eax).unwrap();
    a.mov(eax, 0xffff_0ff0u32).unwrap();
    a.mov(dr6, eax).unwrap();
    a.mov(eax, 0x33).unwrap();
    a.mov(cr0, eax).unwrap();
    for register in [ecx, edx, ebx, ebp, esi, edi] {
        a.xor(register, register).unwrap();
    }
    a.mov(eax, dword_ptr(RESUME)).unwrap();
    a.jmp(eax).unwrap();
}
