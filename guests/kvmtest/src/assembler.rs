//! Machine code with labels for jumps back and forth.

/// Code under construction.
#[derive(Debug, Default)]
pub(crate) struct Code {
    bytes: Vec<u8>,
}

/// A jump whose target is not known yet: where its displacement is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Forward(usize);

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

    /// `mov dx, port`.
    pub(crate) fn port(&mut self, port: u16) -> &mut Self {
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes())
    }

    /// `mov ecx, msr; mov eax, low; mov edx, high; wrmsr`.
    pub(crate) fn wrmsr(&mut self, msr: u32, value: u64) -> &mut Self {
        self.imm32(&[0xb9], msr)
            .imm32(&[0xb8], value as u32)
            .imm32(&[0xba], (value >> 32) as u32)
            .raw(&[0x0f, 0x30])
    }

    /// Where the next instruction will be.
    pub(crate) fn here(&self) -> usize {
        self.bytes.len()
    }

    /// A jump (its opcode) with a 32-bit displacement back to `target`.
    pub(crate) fn back(&mut self, opcode: &[u8], target: usize) -> &mut Self {
        let after = self.here() + opcode.len() + 4;
        let displacement = target as i64 - after as i64;
        self.imm32(opcode, displacement as u32)
    }

    /// A jump with a 32-bit displacement to where [`Code::land`] will say.
    pub(crate) fn forward(&mut self, opcode: &[u8]) -> Forward {
        self.imm32(opcode, 0);
        Forward(self.here() - 4)
    }

    /// The jump goes here.
    pub(crate) fn land(&mut self, jump: Forward) -> &mut Self {
        let displacement = (self.here() - jump.0 - 4) as u32;
        self.bytes[jump.0..jump.0 + 4].copy_from_slice(&displacement.to_le_bytes());
        self
    }

    /// The finished code.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}
