//! Code that runs often: what the interpreter and translated code do to each other.

use super::*;
use crate::state::{gpr, segment};
use iced_x86::code_asm::*;

#[test]
fn loops_and_calls_across_pages_come_to_the_same_sum() {
    let far = CODE + 0x3000;
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(r12d, 1000).unwrap();
        a.xor(r15d, r15d).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(r14, far).unwrap();
        a.mov(edi, r12d).unwrap();
        a.call(far).unwrap();
        a.call(r14).unwrap();
        a.add(r15, rax).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.write(
        far,
        &assemble(64, far, |a| {
            let mut odd = a.create_label();
            a.push(rbx).unwrap();
            a.push(r13).unwrap();
            a.push(r15).unwrap();
            a.mov(r13, rdi).unwrap();
            a.test(r13b, 1).unwrap();
            a.jnz(odd).unwrap();
            a.add(r13, r13).unwrap();
            a.set_label(&mut odd).unwrap();
            a.lea(rax, r13 + 1).unwrap();
            a.pop(r15).unwrap();
            a.pop(r13).unwrap();
            a.pop(rbx).unwrap();
            a.ret().unwrap();
        }),
    );
    let expected: u64 = (1..=1000)
        .map(|n| if n % 2 == 1 { n + 1 } else { 2 * n + 1 })
        .sum();
    let state = machine.halt();
    assert_eq!(state.gpr[15], expected);
    assert_eq!(state.gpr[gpr::RSP], STACK);
    #[cfg(target_arch = "x86_64")]
    assert_eq!(
        machine.cpu.translator.has_code(),
        module_path!().contains("translated")
    );
}

#[test]
fn a_push_in_a_row_that_faults_finds_those_before_it_done() {
    let mut machine = Machine::assembled(|a| {
        a.push(rax).unwrap();
        a.push(rbx).unwrap();
        a.push(rcx).unwrap();
        a.push(rdx).unwrap();
        a.hlt().unwrap();
    })
    .with(|state| {
        state.gpr[gpr::RAX] = 1;
        state.gpr[gpr::RBX] = 2;
        state.gpr[gpr::RSP] = 0x9_0010;
    })
    .on_another_stack(14);
    machine.map(0x8_f000, 0);
    let frame = machine.fault(14);
    // Error code (write, not present), RIP of the third push, and RSP as it found it.
    assert_eq!((frame[0], frame[1], frame[4]), (2, CODE + 2, 0x9_0000));
    assert_eq!(machine.cpu.state().cr2, 0x8_fff8);
    assert_eq!(machine.ram.get(0x9_0008), 1);
    assert_eq!(machine.ram.get(0x9_0000), 2);
}

#[test]
fn flags_that_somebody_reads_are_there_at_a_fault() {
    let mut machine = Machine::assembled(|a| {
        let mut on = a.create_label();
        a.mov(eax, 5).unwrap();
        a.cmp(eax, 9).unwrap();
        a.mov(rbx, qword_ptr(0x9_0000)).unwrap();
        a.jb(on).unwrap();
        a.set_label(&mut on).unwrap();
        a.hlt().unwrap();
    })
    .on_another_stack(14);
    machine.map(0x9_0000, 0);
    let frame = machine.fault(14);
    // CF, PF, AF and SF.
    assert_eq!(frame[3] & 0x8d5, 0x95);
}

#[test]
fn arithmetic_leaves_its_flags_in_mxcsr_and_rounds_as_it_says() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 40).unwrap();
        a.set_label(&mut again).unwrap();
        a.movsd_2(xmm1, qword_ptr(DATA)).unwrap();
        a.divsd(xmm1, qword_ptr(DATA + 8)).unwrap();
        a.movsd_2(qword_ptr(DATA + 16), xmm1).unwrap();
        a.stmxcsr(dword_ptr(DATA + 24)).unwrap();
        // Towards minus infinity, then up.
        a.xor(dword_ptr(DATA + 28), 0x6000).unwrap();
        a.ldmxcsr(dword_ptr(DATA + 28)).unwrap();
        a.movsd_2(xmm2, qword_ptr(DATA)).unwrap();
        a.divsd(xmm2, qword_ptr(DATA + 8)).unwrap();
        a.movsd_2(qword_ptr(DATA + 32), xmm2).unwrap();
        a.ldmxcsr(dword_ptr(DATA + 40)).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.set(DATA, 1.0_f64.to_bits());
    machine.ram.set(DATA + 8, 10.0_f64.to_bits());
    // To be changed to 0x3f80 (down) and 0x5f80 (up) in turn.
    machine.ram.set(DATA + 24, 0x5f80 << 32);
    machine.ram.set(DATA + 40, 0x1f80);
    machine.halt();
    let nearest = machine.ram.get(DATA + 16);
    assert_eq!(nearest, 0.1_f64.to_bits());
    assert_eq!(machine.ram.get(DATA + 24) as u32, 0x1fa0, "inexact");
    // 40 times: the last is up, and 0.1 is above a tenth already.
    assert_eq!(machine.ram.get(DATA + 32), nearest);
    let down = machine.ram.get(DATA + 28) as u32;
    assert_eq!(down, 0x5f80);
}

#[test]
fn code_knows_where_it_runs_when_its_page_is_mapped_twice() {
    let alias = 0x1_5000;
    let code = CODE + 0x5000;
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 60).unwrap();
        a.xor(r8, r8).unwrap();
        a.xor(r9, r9).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(code).unwrap();
        a.add(r8, rax).unwrap();
        a.call(alias).unwrap();
        a.add(r9, rax).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    machine
        .ram
        .set(PT + (alias >> 12) * 8, code | PRESENT_WRITABLE);
    machine.ram.write(
        code,
        &assemble(64, code, |a| {
            let (mut here, mut inner) = (a.create_label(), a.create_label());
            a.call(inner).unwrap();
            a.set_label(&mut here).unwrap();
            a.lea(rdx, qword_ptr(here)).unwrap();
            a.sub(rdx, rax).unwrap();
            a.add(rax, rdx).unwrap();
            a.ret().unwrap();
            a.set_label(&mut inner).unwrap();
            a.mov(rax, qword_ptr(rsp)).unwrap();
            a.ret().unwrap();
        }),
    );
    let state = machine.halt();
    assert_eq!(state.gpr[8], 60 * (code + 5));
    assert_eq!(state.gpr[9], 60 * (alias + 5));
}

#[test]
fn a_division_fails_where_it_fails() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 50).unwrap();
        a.set_label(&mut again).unwrap();
        a.dec(ecx).unwrap();
        a.mov(eax, 1000).unwrap();
        a.xor(edx, edx).unwrap();
        a.div(ecx).unwrap();
        a.mov(eax, -1000).unwrap();
        a.cdq().unwrap();
        a.mov(ebx, -7).unwrap();
        a.idiv(ebx).unwrap();
        a.add(esi, eax).unwrap();
        a.jmp(again).unwrap();
    });
    let frame = machine.fault(0);
    // Past MOV and DEC, MOV, XOR: the DIV, when the counter has come to zero.
    assert_eq!(frame[0], CODE + 5 + 2 + 5 + 2);
    assert_eq!(machine.cpu.state().gpr[gpr::RSI], 49 * 142);
}

#[test]
fn a_loop_without_end_hears_a_kick() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.inc(rax).unwrap();
        a.jmp(again).unwrap();
    });
    machine.run_until_kicked();
    assert!(machine.cpu.state().gpr[gpr::RAX] > 1000);
    if !module_path!().contains("translated") {
        assert!(machine.cpu.instructions() > 2000);
    }
}

#[test]
fn instructions_are_counted_once_when_a_device_ends_the_budget() {
    // The local APIC's registers where the tables reach.
    const APIC: u64 = 0x1000_0000;
    let mut machine = Machine::assembled(|a| {
        a.mov(ecx, 0x1b).unwrap();
        a.mov(eax, APIC as u32 | 0x900).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(esi, 10).unwrap();
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.mov(eax, dword_ptr(APIC + 0x20)).unwrap();
        for _ in 0..20 {
            a.nop().unwrap();
        }
        a.dec(esi).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    machine.halt();
    let counted = machine.cpu.instructions();
    if module_path!().contains("translated_in_traces") {
        // The first rounds as well.
        assert!((12..100).contains(&counted), "{counted}");
    } else if module_path!().contains("translated") {
        // WRMSR, what the APIC answers, and HLT.
        assert_eq!(counted, 12);
    } else {
        assert_eq!(counted, 5 + 10 * 23 + 1);
    }
}

#[test]
fn code_that_was_dropped_while_it_ran_is_not_found_again() {
    // X leads to P, then to P2 without an INVLPG, so that a store to P by its own address drops the
    // code that runs from X.
    const X: u64 = 0x14_0000;
    const P: u64 = CODE + 0x5000;
    const P2: u64 = CODE + 0x6000;
    // In the place of X among the pages to fetch from.
    const Y: u64 = X + 256 * 4096;
    let mut machine = Machine::assembled(|a| {
        let mut spin = a.create_label();
        a.xor(ecx, ecx).unwrap();
        a.mov(rbx, DATA).unwrap();
        for _ in 0..3 {
            a.mov(rax, X).unwrap();
            a.call(rax).unwrap();
        }
        a.mov(rax, Y).unwrap();
        a.call(rax).unwrap();
        a.mov(rdi, PT + (X >> 12) * 8).unwrap();
        a.mov(rsi, P2 | 7).unwrap();
        a.mov(qword_ptr(rdi), rsi).unwrap();
        a.mov(rax, X + 0x800).unwrap();
        a.call(rax).unwrap();
        a.mov(rbx, P + 0x3f).unwrap();
        a.mov(rax, X).unwrap();
        a.call(rax).unwrap();
        a.mov(ecx, 2000).unwrap();
        a.set_label(&mut spin).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(spin).unwrap();
        a.push(rax).unwrap();
        a.pop(rax).unwrap();
        a.mov(rax, X + 0x100).unwrap();
        a.call(rax).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.set(PT + (X >> 12) * 8, P | 7);
    machine.ram.write(Y, &[0xc3]);
    // MOV [RBX], DL; CMP CH, 0x55; JNE to 0x100; RET
    let store = [
        0x88, 0x13, 0x80, 0xfd, 0x55, 0x0f, 0x85, 0xf5, 0, 0, 0, 0xc3,
    ];
    machine.ram.write(P, &store);
    // INC R8D; CLD; CLD; RET
    let count = [0x41, 0xff, 0xc0, 0xfc, 0xfc, 0xc3];
    machine.ram.write(P + 0x100, &count);
    machine.ram.write(P2 + 0x800, &[0xc3]);
    // INC R9D; RET
    machine.ram.write(P2 + 0x100, &[0x41, 0xff, 0xc1, 0xc3]);
    let state = machine.halt();
    assert_eq!((state.gpr[8], state.gpr[9]), (4, 1));
}

/// Instructions with a memory operand at RDI that are translated: bytes, and bytes of the operand.
#[cfg(target_arch = "x86_64")]
fn with_memory() -> Vec<(Vec<u8>, usize)> {
    use iced_x86::{Decoder, DecoderOptions, OpKind, Register};
    let prefixes: [&[u8]; 9] = [
        &[],
        &[0x66],
        &[0xf2],
        &[0xf3],
        &[0x48],
        &[0x66, 0x48],
        &[0xf2, 0x48],
        &[0xf3, 0x48],
        &[0x66, 0xf3],
    ];
    let maps: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
    let mut seen = std::collections::HashSet::new();
    let mut found = Vec::new();
    for (prefix, map) in prefixes.iter().flat_map(|p| maps.map(|map| (*p, map))) {
        for (opcode, reg) in (0..=255).flat_map(|opcode| (0..8).map(move |reg| (opcode, reg))) {
            let mut bytes = [prefix, map, &[opcode, reg << 3 | 7]].concat();
            bytes.extend_from_slice(&[0; 8]);
            let mut decoder = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE);
            let i = decoder.decode();
            let suits = !i.is_invalid()
                && crate::native::is_known(&i)
                && i.flow_control() == iced_x86::FlowControl::Next
                && i.memory_base() == Register::RDI
                && (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
                && i.memory_size().size() != 0;
            if suits && seen.insert((i.code(), prefix)) {
                bytes.truncate(i.len());
                found.push((bytes, i.memory_size().size()));
            }
        }
    }
    found
}

#[cfg(target_arch = "x86_64")]
#[test]
fn nothing_behind_ram_is_touched() {
    let forms = with_memory();
    assert!(forms.len() > 500, "{}", forms.len());
    // The guard page behind RAM ends the test if anything reaches further than its operand.
    for (bytes, size) in forms {
        let mut code = assemble(64, CODE, |a| {
            a.mov(rdi, RAM - size as u64).unwrap();
            a.mov(rsp, STACK).unwrap();
            a.mov(bl, byte_ptr(rdi)).unwrap();
            a.mov(byte_ptr(rdi), bl).unwrap();
            a.xor(edx, edx).unwrap();
            a.mov(eax, 1).unwrap();
        });
        code.extend_from_slice(&bytes);
        code.push(0xf4);
        let mut machine = Machine::long(&code);
        machine.ram.write(RAM - 16, &[1; 16]);
        machine.halt();
    }
}

/// A subroutine at the end of the page at CODE + 0x3000: MOV EAX, 0x01010101, of which only the first
/// byte lies in that page, and RET.
fn across() -> (u64, Vec<u8>) {
    (CODE + 0x3fff, vec![0xb8, 1, 1, 1, 1, 0xc3])
}

#[test]
fn an_instruction_in_two_pages_changes_with_the_second() {
    let (routine, bytes) = across();
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(r12d, 10).unwrap();
        a.mov(rbp, routine).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.set_label(&mut again).unwrap();
        a.call(rbp).unwrap();
        a.add(ebx, eax).unwrap();
        a.inc(byte_ptr(CODE + 0x4000)).unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.write(routine, &bytes);
    assert_eq!(machine.halt().gpr[gpr::RBX], 10 * 0x0101_0101 + 45);
}

#[test]
fn an_instruction_in_two_pages_changes_with_what_is_mapped_behind_the_first() {
    let (routine, bytes) = across();
    let mut machine = Machine::assembled(|a| {
        a.mov(rbp, routine).unwrap();
        for entry in [CODE + 0x4000, CODE + 0x6000, CODE + 0x4000, 0] {
            for _ in 0..4 {
                a.call(rbp).unwrap();
                a.add(rbx, rax).unwrap();
            }
            a.mov(rdi, PT + ((CODE + 0x4000) >> 12) * 8).unwrap();
            a.mov(rax, entry | if entry == 0 { 0 } else { 7 }).unwrap();
            a.mov(qword_ptr(rdi), rax).unwrap();
            a.invlpg(byte_ptr(CODE + 0x4000)).unwrap();
        }
        a.call(rbp).unwrap();
        a.hlt().unwrap();
    });
    machine.ram.write(routine, &bytes);
    machine.ram.write(CODE + 0x6000, &[2, 1, 1, 1, 0xc3]);
    let frame = machine.fault(14);
    // Not present, at a fetch by the supervisor without NX; where it begins, and what is missing.
    assert_eq!((frame[0] & 1, frame[1]), (0, routine));
    assert_eq!(machine.cpu.state().cr2, CODE + 0x4000);
    assert_eq!(machine.cpu.state().gpr[gpr::RBX], 16 * 0x0101_0101 + 4);
}

/// An instruction that begins at the last address and ends at the first ones, which are mapped anew
/// between its runs; what it loaded, summed up.
fn across_the_top(flush: impl Fn(&mut CodeAssembler)) -> u64 {
    const PT2: u64 = 0x14000;
    let mut machine = Machine::assembled(|a| {
        a.mov(rbp, u64::MAX).unwrap();
        for entry in [CODE + 0x6000, CODE + 0x4000] {
            for _ in 0..4 {
                a.call(rbp).unwrap();
                a.add(rbx, rax).unwrap();
            }
            a.mov(rdi, PT).unwrap();
            a.mov(rax, entry | 7).unwrap();
            a.mov(qword_ptr(rdi), rax).unwrap();
            flush(a);
        }
        a.hlt().unwrap();
    });
    for (table, next) in [(PML4, PDPT), (PDPT, PD), (PD, PT2)] {
        machine.ram.set(table + 511 * 8, next | 7);
    }
    // Global.
    machine.ram.set(PT2 + 511 * 8, (CODE + 0x3000) | 0x107);
    machine.ram.set(PT, (CODE + 0x4000) | 7);
    machine.ram.write(CODE + 0x3fff, &[0xb8]);
    machine.ram.write(CODE + 0x4000, &[1, 1, 1, 1, 0xc3]);
    machine.ram.write(CODE + 0x6000, &[2, 1, 1, 1, 0xc3]);
    machine.halt().gpr[gpr::RBX]
}

#[test]
fn an_instruction_across_the_top_of_all_addresses_follows_what_is_mapped() {
    let expected = 8 * 0x0101_0101 + 4;
    let sum = across_the_top(|a| a.invlpg(byte_ptr(0)).unwrap());
    assert_eq!(sum, expected);
    let sum = across_the_top(|a| {
        a.mov(rax, cr3).unwrap();
        a.mov(cr3, rax).unwrap();
    });
    assert_eq!(sum, expected);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_hint_to_elide_a_lock_is_not_the_hosts() {
    if !module_path!().ends_with("translated::hot") {
        return;
    }
    // XACQUIRE LOCK BTS [RDX], EAX
    let code = [0xf2, 0xf0, 0x0f, 0xab, 0x02, 0xf4];
    let mut machine = Machine::long(&code).with(|state| state.gpr[gpr::RDX] = DATA);
    machine.halt();
    let mut is_there = |bytes: &[u8]| machine.cpu.translator.spoil(bytes, bytes);
    assert!(!is_there(&[0xf2, 0xf0, 0x41, 0x0f, 0xab]));
    assert!(!is_there(&[0xf0, 0xf2, 0x41, 0x0f, 0xab]));
    assert!(is_there(&[0xf0, 0x41, 0x0f, 0xab]));
}

/// BTS [EAX], ECX with 32-bit addresses: 0xffff_fff0 and 0x810 bytes further. The words at 0x800 in the
/// segment, and 4 GiB behind that.
fn bit_beyond_4_gib(base: Option<u64>) -> (u64, u64) {
    const PD3: u64 = 0x15000;
    let mut code = assemble(64, CODE, |a| {
        a.mov(rdi, 1u64 << 32).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.mov(rax, 0xffff_fff0u64).unwrap();
        a.mov(ecx, 0x4080).unwrap();
    });
    if base.is_some() {
        code.push(0x64);
    }
    code.extend_from_slice(&[0x67, 0x0f, 0xab, 0x08, 0xf4]);
    let mut machine = Machine::long(&code).with(|state| {
        state.segments[segment::FS].base = base.unwrap_or_default();
    });
    machine.ram.set(PDPT + 4 * 8, PD3 | 7);
    machine.ram.set(PD3, 0x20_0000 | 0x87);
    machine.halt();
    (machine.ram.get(0x800), machine.ram.get(0x20_0800))
}

#[test]
fn a_bits_offset_wraps_with_the_address_and_before_the_segment() {
    assert_eq!(bit_beyond_4_gib(None), (1, 0));
    assert_eq!(bit_beyond_4_gib(Some(1 << 32)), (0, 1));
}
