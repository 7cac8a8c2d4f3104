//! Instructions of the kernel's, and those on strings, where they run often.

use super::*;
use crate::state::{gpr, segment};
use iced_x86::code_asm::*;

#[test]
fn instructions_of_the_kernel_do_the_same_each_time() {
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(r12, DATA).unwrap();
        a.mov(r10d, 5).unwrap();
        a.set_label(&mut again).unwrap();
        a.sti().unwrap();
        a.nop().unwrap();
        a.cmp(r10d, 3).unwrap();
        a.pushfq().unwrap();
        a.cli().unwrap();
        a.pushfq().unwrap();
        a.pop(r9).unwrap();
        a.pop(r8).unwrap();
        // What was pushed in each round, 16 bytes apart.
        a.mov(r11d, r10d).unwrap();
        a.shl(r11d, 4).unwrap();
        a.mov(qword_ptr(r12 + r11), r8).unwrap();
        a.mov(qword_ptr(r12 + r11 + 8), r9).unwrap();
        // Bits beyond the operand, before it too.
        a.mov(r11d, 64 * 16 + 5).unwrap();
        a.bts(qword_ptr(r12 + 0x100), r11).unwrap();
        a.setc(al).unwrap();
        a.movzx(eax, al).unwrap();
        a.add(r13d, eax).unwrap();
        a.mov(r14, -3i64).unwrap();
        a.btc(dword_ptr(r12 + 0x110), r14d).unwrap();
        a.bt(qword_ptr(r12 + 0x110), r14).unwrap();
        a.adc(r13d, 0).unwrap();
        // Compares equal, and then not.
        a.mov(eax, 1).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(ebx, 7).unwrap();
        a.mov(rcx, r10).unwrap();
        a.mov(qword_ptr(r12 + 0x200), 1).unwrap();
        a.lock().cmpxchg16b(xmmword_ptr(r12 + 0x200)).unwrap();
        a.cmpxchg16b(xmmword_ptr(r12 + 0x200)).unwrap();
        a.mov(r15, rdx).unwrap();
        a.mov(qword_ptr(r12 + 0x208), 0).unwrap();
        a.dec(r10d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    let state = machine.halt();
    for (round, flags) in [(1, 0x83), (2, 0x83), (3, 0x42), (4, 2), (5, 2)] {
        let pushed = [0, 8].map(|at| machine.ram.get(DATA + round * 16 + at));
        assert_eq!(pushed[1], pushed[0] & !0x200, "round {round}");
        assert_eq!(pushed[0] & 0x200, 0x200, "round {round}");
        assert_eq!(pushed[0] & 0xc3, flags, "round {round}: {pushed:x?}");
    }
    assert_eq!(machine.ram.get(DATA + 0x180), 1 << 5);
    assert_eq!(machine.ram.get(DATA + 0x108), 1 << 61);
    // Four rounds found the first bit set; of the other, five rounds left every second one set.
    assert_eq!(state.gpr[13], 4 + 3);
    // The second comparison found what the first had stored.
    assert_eq!(state.gpr[15], 1);
    assert_eq!(machine.ram.get(DATA + 0x200), 7);
}

#[test]
fn rows_of_memory_are_filled_and_copied() {
    // Within a page again and again, then across one, backward, and none at all.
    let mut machine = Machine::assembled(|a| {
        let mut again = a.create_label();
        a.mov(r12d, 4).unwrap();
        a.set_label(&mut again).unwrap();
        a.mov(rdi, DATA + 0x10).unwrap();
        a.mov(rax, 0x0101_0101_0101_0101u64).unwrap();
        a.mov(ecx, 5).unwrap();
        a.rep().stosq().unwrap();
        a.mov(r8, rdi).unwrap();
        a.mov(rsi, DATA + 0x0f).unwrap();
        a.mov(rdi, DATA + 0x101).unwrap();
        a.mov(ecx, 7).unwrap();
        a.rep().movsb().unwrap();
        a.mov(r9, rsi).unwrap();
        a.mov(rdi, DATA + 0xffe).unwrap();
        a.mov(ecx, 3).unwrap();
        a.rep().stosb().unwrap();
        a.xor(ecx, ecx).unwrap();
        a.rep().stosb().unwrap();
        a.std().unwrap();
        a.mov(rdi, DATA + 0x208).unwrap();
        a.mov(ecx, 2).unwrap();
        a.rep().stosd().unwrap();
        a.cld().unwrap();
        // Onto itself, so that each byte is the one before.
        a.mov(byte_ptr(DATA + 0x300), 9).unwrap();
        a.mov(rsi, DATA + 0x300).unwrap();
        a.mov(rdi, DATA + 0x301).unwrap();
        a.mov(ecx, 15).unwrap();
        a.rep().movsb().unwrap();
        a.dec(r12d).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    });
    let state = machine.halt();
    let ram = |at| machine.ram.get(DATA + at);
    let ones = 0x0101_0101_0101_0101;
    assert_eq!(
        [ram(8), ram(0x10), ram(0x30), ram(0x38)],
        [0, ones, ones, 0]
    );
    assert_eq!([ram(0x100), ram(0x108)], [0x0101_0101_0101_0000, 0]);
    assert_eq!([ram(0xff8), ram(0x1000)], [0x0101 << 48, 1]);
    assert_eq!(
        [ram(0x200), ram(0x208)],
        [ones & !0xffff_ffff, ones & 0xffff_ffff]
    );
    assert_eq!(
        [ram(0x300), ram(0x308), ram(0x310)],
        [0x0909_0909_0909_0909; 2]
            .iter()
            .copied()
            .chain([0])
            .collect::<Vec<_>>()[..]
    );
    assert_eq!((state.gpr[8], state.gpr[9]), (DATA + 0x38, DATA + 0x16));
}

/// 64-bit code at a privilege in between.
fn in_ring(ring: u16, code: &[u8]) -> Machine {
    Machine::long(code).with(|state| {
        let data = Segment {
            selector: KERNEL_SS | ring,
            base: 0,
            limit: u32::MAX,
            access: 0xc093 | ring << 5,
            unusable: false,
        };
        state.segments = [data; 6];
        state.segments[segment::CS] = Segment {
            selector: KERNEL_CS | ring,
            access: 0xa09b | ring << 5,
            ..data
        };
    })
}

#[test]
fn rings_1_and_2_are_not_the_supervisor() {
    // NOP, and CLI, STI or SWAPGS.
    for (ring, code) in [
        (1, &[0x90, 0xfa, 0xf4][..]),
        (1, &[0x90, 0xfb, 0x90, 0xf4]),
        (2, &[0x90, 0x0f, 0x01, 0xf8, 0xf4]),
    ] {
        let frame = in_ring(ring, code).fault(13);
        assert_eq!(frame[1], CODE + 1, "{code:x?}");
    }
}

#[test]
fn rows_end_where_they_should_at_the_borders_of_pages() {
    for (op, size) in [
        (&[0xf3u8, 0xaa][..], 1u64),
        (&[0xf3, 0xab], 4),
        (&[0xf3, 0x48, 0xab], 8),
    ] {
        for count in [0u64, 1, 3, 511, 512, 513, 4095, 4096, 4097] {
            for back in [0u64, 1, 7, 8, 9, 4095] {
                let at = DATA + 0x3000 - back;
                let mut code = assemble(64, CODE, |a| {
                    for page in 0..12u64 {
                        a.mov(rdi, DATA + page * 0x1000).unwrap();
                        a.mov(qword_ptr(rdi), 0).unwrap();
                    }
                    a.mov(rdi, at).unwrap();
                    a.mov(rcx, count).unwrap();
                    a.mov(rax, -1i64).unwrap();
                });
                code.extend_from_slice(op);
                code.push(0xf4);
                let mut machine = Machine::long(&code);
                let state = machine.halt();
                assert_eq!(state.gpr[gpr::RCX], 0);
                assert_eq!(state.gpr[gpr::RDI], at + count * size);
                let mut expected = vec![0u8; 0x20000];
                let from = (at - DATA) as usize;
                expected[from..from + (count * size) as usize].fill(0xff);
                for (n, word) in expected.chunks(8).enumerate() {
                    let word = u64::from_le_bytes(word.try_into().unwrap());
                    let found = machine.ram.get(DATA + n as u64 * 8);
                    assert_eq!(found, word, "{count} {back} {n}");
                }
            }
        }
    }
}
