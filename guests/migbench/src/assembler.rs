//! Encodes the few forms of 64-bit instructions that the guest is made of.
//!
//! Operands are 64 bits wide unless a name says otherwise; addresses of memory are a base register
//! and a displacement, or one below 2 GiB alone. Jumps have 32-bit displacements. Encodings are
//! those of the SDM, volume 2.

/// A general register; its number is its encoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Register {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

/// An operation of two operands; its number is in the opcode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Add = 0,
    Or = 1,
    And = 4,
    Sub = 5,
    Xor = 6,
    Compare = 7,
}

/// When a jump is taken; its number is in the opcode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    Below = 2,
    Equal = 4,
    NotEqual = 5,
    Above = 7,
    Less = 12,
    NotLess = 13,
    Greater = 15,
}

/// Where bytes of memory are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// At an address below 2 GiB.
    At(u32),
    /// At a register's value plus a displacement.
    By(Register, i32),
}

/// A place in the code that jumps lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Label(usize);

/// Code under construction.
#[derive(Debug, Default)]
pub(crate) struct Code {
    bytes: Vec<u8>,
    /// Where each label is, once it is known.
    labels: Vec<Option<usize>>,
    /// Displacements to fill in: where they are, and the label that they lead to.
    jumps: Vec<(usize, Label)>,
}

impl Code {
    /// Appends encoded instructions.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends an opcode with a 32-bit immediate or displacement.
    pub(crate) fn imm32(&mut self, opcode: &[u8], value: u32) -> &mut Self {
        self.raw(opcode).raw(&value.to_le_bytes())
    }

    /// Bytes so far.
    pub(crate) fn length(&self) -> usize {
        self.bytes.len()
    }

    /// A label whose place is said later by [`Code::place`].
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// A label here.
    pub(crate) fn here(&mut self) -> Label {
        let label = self.label();
        self.place(label);
        label
    }

    /// The label is here.
    pub(crate) fn place(&mut self, label: Label) -> &mut Self {
        self.labels[label.0] = Some(self.bytes.len());
        self
    }

    /// Offset of a label that has its place.
    pub(crate) fn offset(&self, label: Label) -> usize {
        self.labels[label.0].expect("every label that is asked for has been placed")
    }

    /// `mov register, value`, as short as the value allows.
    pub(crate) fn set(&mut self, register: Register, value: u64) -> &mut Self {
        let (high, low) = split(register);
        match u32::try_from(value) {
            Ok(value) => {
                if high != 0 {
                    self.raw(&[0x41]);
                }
                self.imm32(&[0xb8 + low], value)
            }
            Err(_) => self
                .raw(&[0x48 | high, 0xb8 + low])
                .raw(&value.to_le_bytes()),
        }
    }

    /// `mov to, from`.
    pub(crate) fn copy(&mut self, to: Register, from: Register) -> &mut Self {
        self.registers(&[0x89], from, to)
    }

    /// `mov to, [place]`.
    pub(crate) fn load(&mut self, to: Register, place: Place) -> &mut Self {
        self.memory(Width::Eight, &[0x8b], to, place)
    }

    /// `movzx to, byte [place]`.
    pub(crate) fn load_byte(&mut self, to: Register, place: Place) -> &mut Self {
        self.memory(Width::Eight, &[0x0f, 0xb6], to, place)
    }

    /// `mov to, dword [place]`; the upper half becomes zero.
    pub(crate) fn load_four(&mut self, to: Register, place: Place) -> &mut Self {
        self.memory(Width::Four, &[0x8b], to, place)
    }

    /// `mov [place], from`.
    pub(crate) fn store(&mut self, place: Place, from: Register) -> &mut Self {
        self.memory(Width::Eight, &[0x89], from, place)
    }

    /// `mov dword [place], from`.
    pub(crate) fn store_four(&mut self, place: Place, from: Register) -> &mut Self {
        self.memory(Width::Four, &[0x89], from, place)
    }

    /// `operation to, from`.
    pub(crate) fn apply(
        &mut self,
        operation: Operation,
        to: Register,
        from: Register,
    ) -> &mut Self {
        self.registers(&[(operation as u8) << 3 | 1], from, to)
    }

    /// `operation to, value`, the value sign-extended.
    pub(crate) fn apply_value(
        &mut self,
        operation: Operation,
        to: Register,
        value: i32,
    ) -> &mut Self {
        let (high, low) = split(to);
        self.raw(&[0x48 | high, 0x81, 0xc0 | (operation as u8) << 3 | low])
            .raw(&value.to_le_bytes())
    }

    /// `operation to, [place]`.
    pub(crate) fn apply_memory(
        &mut self,
        operation: Operation,
        to: Register,
        place: Place,
    ) -> &mut Self {
        self.memory(Width::Eight, &[(operation as u8) << 3 | 3], to, place)
    }

    /// `shl register, count`.
    pub(crate) fn shift_left(&mut self, register: Register, count: u8) -> &mut Self {
        let (high, low) = split(register);
        self.raw(&[0x48 | high, 0xc1, 0xe0 | low, count])
    }

    /// `shr register, count`.
    pub(crate) fn shift_right(&mut self, register: Register, count: u8) -> &mut Self {
        let (high, low) = split(register);
        self.raw(&[0x48 | high, 0xc1, 0xe8 | low, count])
    }

    /// `imul to, from`.
    pub(crate) fn multiply(&mut self, to: Register, from: Register) -> &mut Self {
        self.registers(&[0x0f, 0xaf], to, from)
    }

    /// `xor edx, edx; div divisor`: RAX becomes the quotient, RDX the remainder.
    pub(crate) fn divide(&mut self, divisor: Register) -> &mut Self {
        let (high, low) = split(divisor);
        self.raw(&[0x31, 0xd2, 0x48 | high, 0xf7, 0xf0 | low])
    }

    /// `rdtsc` as one number in RAX; changes RDX.
    pub(crate) fn time(&mut self) -> &mut Self {
        self.raw(&[0x0f, 0x31]).shift_left(Register::Rdx, 32).apply(
            Operation::Or,
            Register::Rax,
            Register::Rdx,
        )
    }

    /// `jmp label`.
    pub(crate) fn jump(&mut self, label: Label) -> &mut Self {
        self.branch(&[0xe9], label)
    }

    /// `jcc label`.
    pub(crate) fn jump_if(&mut self, condition: Condition, label: Label) -> &mut Self {
        self.branch(&[0x0f, 0x80 | condition as u8], label)
    }

    /// `call label`.
    pub(crate) fn call(&mut self, label: Label) -> &mut Self {
        self.branch(&[0xe8], label)
    }

    /// `ret`.
    pub(crate) fn done(&mut self) -> &mut Self {
        self.raw(&[0xc3])
    }

    /// The finished code.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        for (at, label) in std::mem::take(&mut self.jumps) {
            let displacement = self.offset(label) as i64 - (at as i64 + 4);
            self.bytes[at..at + 4].copy_from_slice(&(displacement as i32).to_le_bytes());
        }
        self.bytes
    }

    fn branch(&mut self, opcode: &[u8], label: Label) -> &mut Self {
        self.imm32(opcode, 0);
        self.jumps.push((self.bytes.len() - 4, label));
        self
    }

    /// An instruction whose operands are `register` (the field reg) and `other` (the field r/m).
    fn registers(&mut self, opcode: &[u8], register: Register, other: Register) -> &mut Self {
        let ((r, reg), (b, rm)) = (split(register), split(other));
        self.raw(&[0x48 | r << 2 | b])
            .raw(opcode)
            .raw(&[0xc0 | reg << 3 | rm])
    }

    fn memory(
        &mut self,
        width: Width,
        opcode: &[u8],
        register: Register,
        place: Place,
    ) -> &mut Self {
        let (r, reg) = split(register);
        let wide = match width {
            Width::Eight => 8,
            Width::Four => 0,
        };
        match place {
            // No base, no index: r/m says that a SIB byte follows, which says so.
            Place::At(address) => self
                .raw(&[0x40 | wide | r << 2])
                .raw(opcode)
                .raw(&[reg << 3 | 4, 0x25])
                .raw(&address.to_le_bytes()),
            Place::By(base, displacement) => {
                let (b, rm) = split(base);
                self.raw(&[0x40 | wide | r << 2 | b]).raw(opcode);
                self.raw(&[0x80 | reg << 3 | rm]);
                if rm == 4 {
                    // RSP and R12 as a base need a SIB byte.
                    self.raw(&[0x24]);
                }
                self.raw(&displacement.to_le_bytes())
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Width {
    Four,
    Eight,
}

/// The bit that goes to a prefix, and the three that go to the instruction.
fn split(register: Register) -> (u8, u8) {
    let number = register as u8;
    (number >> 3, number & 7)
}

#[cfg(test)]
mod tests {
    use super::Register::{R12, R13, R15, Rax, Rcx, Rdi, Rsp};
    use super::*;

    /// What an assembler makes of the same lines.
    #[test]
    fn encodings_are_those_of_the_manual() {
        let check = |expected: &[u8], write: &dyn Fn(&mut Code)| {
            let mut code = Code::default();
            write(&mut code);
            assert_eq!(code.finish(), expected);
        };
        check(&[0xb8, 5, 0, 0, 0], &|code| {
            code.set(Rax, 5);
        });
        check(&[0x41, 0xbf, 5, 0, 0, 0], &|code| {
            code.set(R15, 5);
        });
        check(&[0x49, 0xbf, 8, 7, 6, 5, 4, 3, 2, 1], &|code| {
            code.set(R15, 0x0102_0304_0506_0708);
        });
        check(&[0x4c, 0x89, 0xf9], &|code| {
            code.copy(Rcx, R15);
        });
        check(&[0x48, 0x8b, 0x0c, 0x25, 0x78, 0x56, 0x34, 0x12], &|code| {
            code.load(Rcx, Place::At(0x1234_5678));
        });
        check(&[0x4d, 0x89, 0xac, 0x24, 8, 0, 0, 0], &|code| {
            code.store(Place::By(R12, 8), R13);
        });
        check(&[0x44, 0x89, 0xbc, 0x24, 8, 0, 0, 0], &|code| {
            code.store_four(Place::By(Rsp, 8), R15);
        });
        check(&[0x49, 0x0f, 0xb6, 0x85, 0, 0, 0, 0], &|code| {
            code.load_byte(Rax, Place::By(R13, 0));
        });
        check(&[0x4c, 0x29, 0xf9], &|code| {
            code.apply(Operation::Sub, Rcx, R15);
        });
        check(&[0x49, 0x81, 0xff, 0xff, 0xff, 0xff, 0xff], &|code| {
            code.apply_value(Operation::Compare, R15, -1);
        });
        check(&[0x48, 0x3b, 0x8f, 0, 0, 0, 0], &|code| {
            code.apply_memory(Operation::Compare, Rcx, Place::By(Rdi, 0));
        });
        check(&[0x49, 0x0f, 0xaf, 0xc7], &|code| {
            code.multiply(Rax, R15);
        });
        check(&[0x31, 0xd2, 0x49, 0xf7, 0xf7], &|code| {
            code.divide(R15);
        });
        check(&[0x49, 0xc1, 0xe7, 3, 0x48, 0xc1, 0xe8, 7], &|code| {
            code.shift_left(R15, 3).shift_right(Rax, 7);
        });
    }

    #[test]
    fn jumps_lead_to_their_labels_in_both_directions() {
        let mut code = Code::default();
        let (top, end) = (code.here(), code.label());
        code.jump_if(Condition::Equal, end).jump(top).place(end);
        code.done();
        assert_eq!(
            code.finish(),
            [0x0f, 0x84, 5, 0, 0, 0, 0xe9, 0xf5, 0xff, 0xff, 0xff, 0xc3]
        );
    }
}
