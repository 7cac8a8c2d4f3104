//! The few instructions that translated code has besides the guest's own, as bytes.
//!
//! None of them changes a flag: the guest's flags live in the host's from one of its instructions
//! to the next.

/// A register by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reg(pub(super) u8);

pub(super) const RCX: Reg = Reg(1);
pub(super) const R10: Reg = Reg(10);
pub(super) const R11: Reg = Reg(11);
pub(super) const R13: Reg = Reg(13);
pub(super) const R14: Reg = Reg(14);
pub(super) const R15: Reg = Reg(15);

/// A place in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mem {
    base: Reg,
    index: Option<(Reg, u8)>,
    disp: i32,
}

impl Mem {
    /// What lies so much further.
    pub(super) fn beyond(self, bytes: i32) -> Self {
        Self {
            disp: self.disp + bytes,
            ..self
        }
    }
}

/// What lies `disp` from the register.
pub(super) fn at(base: Reg, disp: i32) -> Mem {
    Mem {
        base,
        index: None,
        disp,
    }
}

/// The same, and `index << scale` further.
pub(super) fn at_index(base: Reg, index: Reg, scale: u8, disp: i32) -> Mem {
    Mem {
        base,
        index: Some((index, scale)),
        disp,
    }
}

/// Where a block's code lies. What rarely runs is kept away from what often does, so that the host's
/// caches hold more of the latter.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    #[default]
    Often,
    Rarely,
}

/// Places from here on are in the part that rarely runs.
const RARELY: usize = 1 << 30;

/// Code in the making.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    /// Of the part that is written now.
    bytes: Vec<u8>,
    /// Of the other part.
    other: Vec<u8>,
    part: Part,
    /// From the start of the part that often runs to that of the other.
    apart: isize,
    /// LOOP is quick on this host: what is looked for makes RCX 1, and LOOP goes on by falling through.
    /// Without it RCX becomes 0, and JRCXZ has to be taken, for which the host needs a place in its
    /// table of branches: too many of those are what translated code waits for most.
    loops: bool,
    /// R10 has changed since somebody asked last.
    r10_changed: bool,
}

/// A jump whose distance is not known yet: where its four bytes are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Jump(usize);

impl Assembler {
    /// Has the host's quick way to look for something.
    pub(super) fn set_loops(&mut self, loops: bool) {
        self.loops = loops;
    }

    /// Something changes a register.
    pub(super) fn changes(&mut self, reg: Reg) {
        self.r10_changed |= reg == R10;
    }

    /// Has R10 changed since this was asked last?
    pub(super) fn take_r10_changed(&mut self) -> bool {
        std::mem::take(&mut self.r10_changed)
    }

    /// Begins anew; `apart`: from the start of the part that often runs to that of the other.
    pub(super) fn begin(&mut self, apart: isize) {
        self.bytes.clear();
        self.other.clear();
        self.part = Part::Often;
        self.apart = apart;
    }

    /// Goes on in this part.
    pub(super) fn go_on_in(&mut self, part: Part) {
        if part != self.part {
            std::mem::swap(&mut self.bytes, &mut self.other);
            self.part = part;
        }
    }

    /// The part that is written now.
    pub(super) fn part(&self) -> Part {
        self.part
    }

    /// Where the next instruction goes.
    pub(super) fn here(&self) -> usize {
        self.bytes.len() + self.start()
    }

    fn start(&self) -> usize {
        match self.part {
            Part::Often => 0,
            Part::Rarely => RARELY,
        }
    }

    /// How much was written.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() + self.other.len()
    }

    pub(super) fn bytes(&self, part: Part) -> &[u8] {
        if part == self.part {
            &self.bytes
        } else {
            &self.other
        }
    }

    /// From the start of the part that often runs to a place.
    pub(super) fn distance(&self, place: usize) -> isize {
        match place.checked_sub(RARELY) {
            Some(place) => place as isize + self.apart,
            None => place as isize,
        }
    }

    /// Appends an instruction that is encoded already.
    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// ModRM, SIB and displacement.
    fn operand(&mut self, reg: u8, mem: Mem) {
        let (mode, wide) = match mem.disp {
            0 if mem.base.0 & 7 != 5 => (0, None),
            -128..=127 => (1, Some(false)),
            _ => (2, Some(true)),
        };
        let reg = (reg & 7) << 3;
        match mem.index {
            Some((index, scale)) => {
                self.bytes.push(mode << 6 | reg | 4);
                let sib = scale << 6 | (index.0 & 7) << 3 | mem.base.0 & 7;
                self.bytes.push(sib);
            }
            None if mem.base.0 & 7 == 4 => {
                self.bytes.push(mode << 6 | reg | 4);
                self.bytes.push(0x24);
            }
            None => self.bytes.push(mode << 6 | reg | mem.base.0 & 7),
        }
        match wide {
            Some(true) => self.raw(&mem.disp.to_le_bytes()),
            Some(false) => self.bytes.push(mem.disp as u8),
            None => {}
        }
    }

    /// An instruction of one opcode byte with a register and a memory operand.
    fn legacy(&mut self, wide: bool, opcode: u8, reg: u8, mem: Mem) {
        let index = mem.index.map_or(0, |(index, _)| index.0 >> 3);
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3) << 2 | index << 1 | mem.base.0 >> 3;
        if rex != 0x40 {
            self.bytes.push(rex);
        }
        self.bytes.push(opcode);
        self.operand(reg, mem);
    }

    pub(super) fn load(&mut self, to: Reg, from: Mem) {
        self.changes(to);
        self.legacy(true, 0x8b, to.0, from);
    }

    pub(super) fn load_32(&mut self, to: Reg, from: Mem) {
        self.changes(to);
        self.legacy(false, 0x8b, to.0, from);
    }

    pub(super) fn store(&mut self, to: Mem, from: Reg) {
        self.legacy(true, 0x89, from.0, to);
    }

    pub(super) fn store_32(&mut self, to: Mem, from: Reg) {
        self.legacy(false, 0x89, from.0, to);
    }

    pub(super) fn store_imm_32(&mut self, to: Mem, value: u32) {
        self.legacy(false, 0xc7, 0, to);
        self.raw(&value.to_le_bytes());
    }

    /// Sign-extended to 64 bits.
    pub(super) fn store_imm_64(&mut self, to: Mem, value: i32) {
        self.legacy(true, 0xc7, 0, to);
        self.raw(&value.to_le_bytes());
    }

    pub(super) fn store_imm_8(&mut self, to: Mem, value: u8) {
        self.legacy(false, 0xc6, 0, to);
        self.bytes.push(value);
    }

    pub(super) fn copy(&mut self, to: Reg, from: Reg) {
        self.changes(to);
        let rex = 0x48 | (from.0 >> 3) << 2 | to.0 >> 3;
        self.raw(&[rex, 0x89, 0xc0 | (from.0 & 7) << 3 | to.0 & 7]);
    }

    pub(super) fn lea(&mut self, to: Reg, mem: Mem) {
        self.changes(to);
        self.legacy(true, 0x8d, to.0, mem);
    }

    pub(super) fn lea_32(&mut self, to: Reg, mem: Mem) {
        self.changes(to);
        self.legacy(false, 0x8d, to.0, mem);
    }

    /// LEA of `index << scale` and a displacement.
    pub(super) fn lea_scaled(&mut self, to: Reg, index: Reg, scale: u8, disp: i32) {
        self.changes(to);
        let rex = 0x48 | (to.0 >> 3) << 2 | (index.0 >> 3) << 1;
        let sib = scale << 6 | (index.0 & 7) << 3 | 5;
        self.raw(&[rex, 0x8d, (to.0 & 7) << 3 | 4, sib]);
        self.raw(&disp.to_le_bytes());
    }

    /// Sign-extended to 64 bits.
    pub(super) fn set(&mut self, to: Reg, value: i32) {
        self.changes(to);
        self.raw(&[0x48 | to.0 >> 3, 0xc7, 0xc0 | to.0 & 7]);
        self.raw(&value.to_le_bytes());
    }

    pub(super) fn set_wide(&mut self, to: Reg, value: u64) {
        self.changes(to);
        self.raw(&[0x48 | to.0 >> 3, 0xb8 | to.0 & 7]);
        self.raw(&value.to_le_bytes());
    }

    /// Forgets what was written from `place` on.
    pub(super) fn cut(&mut self, place: usize) {
        self.bytes.truncate(place - self.start());
    }

    /// PEXT: the bits of `from` that the mask in memory names, together.
    pub(super) fn pext(&mut self, to: Reg, from: Reg, mask: Mem) {
        // VEX.LZ.F3.0F38.W1 F5 /r
        self.bits(2, to, from, mask);
    }

    fn bits(&mut self, prefix: u8, to: Reg, from: Reg, mask: Mem) {
        self.changes(to);
        let inverted = |reg: u8| u8::from(reg < 8);
        let index = mask.index.map_or(0, |(index, _)| index.0);
        let first = inverted(to.0) << 7 | inverted(index) << 6 | inverted(mask.base.0) << 5 | 2;
        let second = 0x80 | (!from.0 & 15) << 3 | prefix;
        self.raw(&[0xc4, first, second, 0xf5]);
        self.operand(to.0, mask);
    }

    /// SHRX: a linear address in a register becomes the number of its page. R15 ends with the count.
    pub(super) fn page_of(&mut self, reg: Reg) {
        self.changes(reg);
        let inverted = |bit: u8| u8::from(reg.0 < 8) << bit;
        // VEX.LZ.F2.0F38.W1 F7 /r, with R15 as the count.
        let first = inverted(7) | 1 << 6 | inverted(5) | 2;
        self.raw(&[0xc4, first, 0x83, 0xf7, 0xc0 | (reg.0 & 7) << 3 | reg.0 & 7]);
    }

    /// PDEP: the low bits of `from` where the mask in memory has ones.
    pub(super) fn pdep(&mut self, to: Reg, from: Reg, mask: Mem) {
        // VEX.LZ.F2.0F38.W1 F5 /r
        self.bits(3, to, from, mask);
    }

    /// The jump is taken when RCX is not zero. RCX changes.
    pub(super) fn unless_rcx_zero(&mut self) -> Jump {
        if self.loops {
            self.lea(RCX, at(RCX, 1));
        }
        self.unless_matched()
    }

    /// The jump is taken when the address of an operand is not zero. RCX changes.
    pub(super) fn unless_zero(&mut self, address: Mem) -> Jump {
        self.lea(RCX, address.beyond(i32::from(self.loops)));
        self.unless_matched()
    }

    /// The jump is taken when the address of an operand is not below that of the second page. RCX
    /// changes.
    pub(super) fn unless_in_first_page(&mut self, address: Mem) -> Jump {
        self.lea(RCX, address.beyond(i32::from(self.loops) << 12));
        self.page_of(RCX);
        self.unless_matched()
    }

    /// The jump is taken when RCX is not what it is on a match. On a match it becomes zero.
    fn unless_matched(&mut self) -> Jump {
        if self.loops {
            // LOOP into the NOP that follows, whose last five bytes are the jump.
            self.raw(&[0xe2, 3, 0x0f, 0x1f, 0x84]);
        } else {
            // JRCXZ over the jump.
            self.raw(&[0xe3, 5]);
        }
        self.jump()
    }

    /// JRCXZ to a jump that follows.
    pub(super) fn if_rcx_zero(&mut self) -> Jump {
        self.raw(&[0xe3, 2, 0xeb, 5]);
        self.jump()
    }

    /// JECXZ to a place at most 128 bytes before.
    pub(super) fn back_if_ecx_zero(&mut self, to: usize) {
        let distance = to as isize - (self.here() as isize + 3);
        self.raw(&[0x67, 0xe3, distance as i8 as u8]);
    }

    /// MOVAPS from memory to a vector register.
    pub(super) fn load_vector(&mut self, to: u8, from: Mem) {
        self.vector(0x28, to, from);
    }

    /// MOVAPS from a vector register to memory.
    pub(super) fn store_vector(&mut self, to: Mem, from: u8) {
        self.vector(0x29, from, to);
    }

    /// VINSERTF128: the upper half of a vector register from memory at a base of R8 to R15.
    pub(super) fn load_upper(&mut self, to: u8, from: Mem) {
        self.upper(0x18, to, (!to & 15) << 3, from);
    }

    /// VEXTRACTF128: the upper half of a vector register to such memory.
    pub(super) fn store_upper(&mut self, to: Mem, from: u8) {
        self.upper(0x19, from, 15 << 3, to);
    }

    fn upper(&mut self, opcode: u8, reg: u8, vvvv: u8, mem: Mem) {
        debug_assert!(reg < 8 && mem.base.0 >= 8 && mem.index.is_none());
        // VEX.256.66.0F3A.W0 /r 1
        self.raw(&[0xc4, 0xc3, vvvv | 5, opcode]);
        self.operand(reg, mem);
        self.raw(&[1]);
    }

    /// XORPS of a vector register with itself.
    pub(super) fn zero_vector(&mut self, reg: u8) {
        self.raw(&[0x0f, 0x57, 0xc0 | reg << 3 | reg]);
    }

    /// VZEROUPPER.
    pub(super) fn zero_uppers(&mut self) {
        self.raw(&[0xc5, 0xf8, 0x77]);
    }

    fn vector(&mut self, opcode: u8, reg: u8, mem: Mem) {
        let rex = 0x40 | (reg >> 3) << 2 | mem.base.0 >> 3;
        if rex != 0x40 {
            self.bytes.push(rex);
        }
        self.raw(&[0x0f, opcode]);
        self.operand(reg, mem);
    }

    /// A jump to be landed later.
    pub(super) fn jump(&mut self) -> Jump {
        self.raw(&[0xe9, 0, 0, 0, 0]);
        Jump(self.here() - 4)
    }

    /// A call to be landed later, as a jump.
    pub(super) fn call(&mut self) -> Jump {
        self.raw(&[0xe8, 0, 0, 0, 0]);
        Jump(self.here() - 4)
    }

    pub(super) fn call_mem(&mut self, mem: Mem) {
        self.legacy(false, 0xff, 2, mem);
    }

    /// Onto the host's stack.
    pub(super) fn push_mem(&mut self, mem: Mem) {
        self.legacy(false, 0xff, 6, mem);
    }

    /// From the host's stack.
    pub(super) fn pop(&mut self, to: Reg) {
        self.changes(to);
        if to.0 >= 8 {
            self.bytes.push(0x41);
        }
        self.bytes.push(0x58 | to.0 & 7);
    }

    /// Changes no flag.
    pub(super) fn not(&mut self, reg: Reg) {
        self.changes(reg);
        self.raw(&[0x48 | reg.0 >> 3, 0xf7, 0xd0 | reg.0 & 7]);
    }

    pub(super) fn ret(&mut self) {
        self.bytes.push(0xc3);
    }

    /// A jump on a condition, by its encoding.
    pub(super) fn jump_if(&mut self, condition: u8) -> Jump {
        self.raw(&[0x0f, 0x80 | condition & 15, 0, 0, 0, 0]);
        Jump(self.here() - 4)
    }

    pub(super) fn jump_to_mem(&mut self, mem: Mem) {
        self.legacy(false, 0xff, 4, mem);
    }

    /// The jump goes here.
    pub(super) fn land(&mut self, jump: Jump) {
        self.land_at(jump, self.distance(self.here()));
    }

    /// The jump goes to a place `target` bytes from the start of the part that often runs, which may
    /// lie elsewhere.
    pub(super) fn land_at(&mut self, jump: Jump, target: isize) {
        let distance = (target - (self.distance(jump.0) + 4)) as i32;
        let (part, at) = match jump.0.checked_sub(RARELY) {
            Some(at) => (Part::Rarely, at),
            None => (Part::Often, jump.0),
        };
        let bytes = if part == self.part {
            &mut self.bytes
        } else {
            &mut self.other
        };
        bytes[at..at + 4].copy_from_slice(&distance.to_le_bytes());
    }
}

impl Jump {
    /// Where its distance is.
    pub(super) fn place(self) -> usize {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, FastFormatter};

    use super::*;

    fn text(write: impl FnOnce(&mut Assembler)) -> String {
        let mut assembler = Assembler::default();
        write(&mut assembler);
        let mut decoder = Decoder::new(64, assembler.bytes(Part::Often), DecoderOptions::NONE);
        let mut formatter = FastFormatter::new();
        let mut lines = Vec::new();
        while decoder.can_decode() {
            let mut line = String::new();
            formatter.format(&decoder.decode(), &mut line);
            lines.push(line);
        }
        lines.join("; ")
    }

    #[test]
    fn the_bytes_are_the_instructions_that_they_should_be() {
        let cases = [
            (text(|a| a.load(R10, at(R15, -128))), "mov r10,[r15-80h]"),
            (text(|a| a.load(RCX, at(R15, 128))), "mov rcx,[r15+80h]"),
            (text(|a| a.load_32(RCX, at(R13, 0))), "mov ecx,[r13]"),
            (
                text(|a| a.store(at(Reg(12), 8), Reg(0))),
                "mov [r12+8h],rax",
            ),
            (text(|a| a.store_32(at(R15, 4), RCX)), "mov [r15+4h],ecx"),
            (
                text(|a| a.store_imm_32(at(R15, 4), 7)),
                "mov dword ptr [r15+4h],7h",
            ),
            (
                text(|a| a.store_imm_64(at(R10, 0), -1)),
                "mov qword ptr [r10],0FFFFFFFFFFFFFFFFh",
            ),
            (
                text(|a| a.store_imm_8(at(R11, 0), 3)),
                "mov byte ptr [r11],3h",
            ),
            (text(|a| a.copy(R14, Reg(0))), "mov r14,rax"),
            (
                text(|a| a.lea(R10, at_index(R14, R13, 3, -8))),
                "lea r10,[r14+r13*8-8h]",
            ),
            (text(|a| a.lea_32(RCX, at(RCX, -1))), "lea ecx,[rcx-1h]"),
            (
                text(|a| a.pext(R11, R10, at(R15, 200))),
                "pext r11,r10,[r15+0C8h]",
            ),
            (
                text(|a| a.pext(RCX, RCX, at(R15, 8))),
                "pext rcx,rcx,[r15+8h]",
            ),
            (
                text(|a| a.pdep(RCX, R10, at(R15, 8))),
                "pdep rcx,r10,[r15+8h]",
            ),
            (text(|a| a.page_of(RCX)), "shrx rcx,rcx,r15"),
            (text(|a| a.page_of(R10)), "shrx r10,r10,r15"),
            (
                text(|a| a.jump_to_mem(at(R11, 8))),
                "jmp qword ptr [r11+8h]",
            ),
            (
                text(|a| a.load_vector(1, at(R15, 0x100))),
                "movaps xmm1,[r15+100h]",
            ),
            (
                text(|a| a.store_vector(at(R15, 0x100), 0)),
                "movaps [r15+100h],xmm0",
            ),
            (
                text(|a| a.load_upper(2, at(R15, 0x100))),
                "vinsertf128 ymm2,ymm2,[r15+100h],1h",
            ),
            (
                text(|a| a.store_upper(at(R15, 0x100), 3)),
                "vextractf128 [r15+100h],ymm3,1h",
            ),
            (text(|a| a.zero_vector(7)), "xorps xmm7,xmm7"),
            (text(|a| a.zero_uppers()), "vzeroupper"),
            (text(|a| a.lea_scaled(R10, R13, 2, 5)), "lea r10,[r13*4+5h]"),
            (text(|a| a.set(R10, -1)), "mov r10,0FFFFFFFFFFFFFFFFh"),
            (
                text(|a| a.set_wide(R11, 0x1234_5678_9abc)),
                "mov r11,123456789ABCh",
            ),
            (
                text(|a| a.call_mem(at(R11, 16))),
                "call qword ptr [r11+10h]",
            ),
            (text(|a| a.push_mem(at(R15, 8))), "push qword ptr [r15+8h]"),
            (text(|a| a.pop(RCX)), "pop rcx"),
            (text(|a| a.pop(R10)), "pop r10"),
            (text(|a| a.not(R10)), "not r10"),
        ];
        for (found, expected) in cases {
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn jumps_go_where_they_land() {
        let jumps = text(|a| {
            let start = a.here();
            let slow = a.unless_rcx_zero();
            let taken = a.jump_if(5);
            a.back_if_ecx_zero(start);
            a.land(slow);
            a.land_at(taken, -100);
        });
        assert_eq!(jumps, "jrcxz 7h; jmp 10h; jne 0FFFFFFFFFFFFFF9Ch; jecxz 0h");
    }

    #[test]
    fn what_is_looked_for_falls_through_where_loop_is_quick() {
        let code = |loops| {
            let mut assembler = Assembler::default();
            assembler.set_loops(loops);
            let jump = assembler.unless_in_first_page(at_index(RCX, R10, 0, 7));
            assembler.land_at(jump, 0x1000);
            assembler
        };
        let decoded = |bytes: &[u8], skipped| {
            let mut decoder = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE);
            decoder.set_position(skipped).unwrap();
            decoder.set_ip(skipped as u64);
            let instructions: Vec<_> = decoder.into_iter().collect();
            instructions
        };
        for (loops, disp) in [(false, 7), (true, 0x1007)] {
            let assembler = code(loops);
            let bytes = assembler.bytes(Part::Often);
            let [lea, shift, branch, last] = decoded(bytes, 0).try_into().unwrap();
            assert_eq!(lea.memory_displacement64(), disp);
            assert_eq!(shift.mnemonic(), iced_x86::Mnemonic::Shrx);
            let away = if loops {
                assert_eq!(last.mnemonic(), iced_x86::Mnemonic::Nop);
                branch.near_branch_target() as usize
            } else {
                assert_eq!(branch.near_branch_target() as usize, bytes.len());
                last.ip() as usize
            };
            let [jump] = decoded(bytes, away).try_into().unwrap();
            assert_eq!(jump.near_branch_target(), 0x1000);
        }
    }

    #[test]
    fn jumps_lead_from_part_to_part() {
        let mut assembler = Assembler::default();
        assembler.begin(0x1000);
        let there = assembler.jump();
        let on = assembler.jump();
        assembler.go_on_in(Part::Rarely);
        let back = assembler.jump();
        assembler.land(there);
        let far = assembler.jump();
        assembler.land_at(far, 0x20);
        assembler.go_on_in(Part::Often);
        assembler.land(back);
        assembler.land(on);
        let distances = |part| -> Vec<i32> {
            let jumps = assembler.bytes(part).chunks(5);
            jumps
                .map(|jump| i32::from_le_bytes(jump[1..].try_into().unwrap()))
                .collect()
        };
        assert_eq!(distances(Part::Often), [0x1005 - 5, 10 - 10]);
        assert_eq!(distances(Part::Rarely), [10 - 0x1005, 0x20 - 0x100a]);
        assert_eq!(assembler.len(), 20);
    }
}
