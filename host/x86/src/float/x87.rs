//! x87 and MMX state: what is not arithmetic (SDM vol. 1, chapter 8; environments: 8.1.10).

use super::host;
use super::state::FloatState;

const EXCEPTIONS: u16 = 0x3f;
/// Invalid operation, overflow, underflow: those that keep a store from being done.
const STOPS_STORE: u16 = 0x19;

/// Which x87 instruction.
///
/// Only instructions that neither wait nor load or store control state may be made into one;
/// [`FloatState`] executes those itself. The number is the place in the table of routines that
/// [`super::host`] has: eight times 64 register forms, then eight times eight memory forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct X87Routine(pub(super) u16);

impl X87Routine {
    pub(super) const MEMORY: u16 = 512;

    /// `opcode` is D8 to DF, `form` the second byte, C0 to FF.
    pub(super) fn register(opcode: u8, form: u8) -> Self {
        Self(u16::from(opcode & 7) << 6 | u16::from(form & 0x3f))
    }

    /// `opcode` is D8 to DF, `group` the middle field of ModRM.
    pub(super) fn memory(opcode: u8, group: u8) -> Self {
        Self(Self::MEMORY + (u16::from(opcode & 7) << 3 | u16::from(group & 7)))
    }
}

/// The memory operand of an x87 instruction, read or written by it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub(super) struct X87Operand(pub(super) [u8; 16]);

/// Where the processor stands when an x87 instruction executes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Address of the instruction.
    pub(super) instruction_pointer: u64,
    /// Address of the memory operand.
    pub(super) data_pointer: Option<u64>,
    /// Low 11 bits of the opcode.
    pub(super) opcode: u16,
}

/// The layout of an environment in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// 28 bytes rather than 14.
    pub(super) wide: bool,
    /// Protected and long mode rather than real and virtual-8086 mode.
    pub(super) protected: bool,
}

impl Layout {
    /// Bytes of the environment.
    pub(super) fn environment_bytes(self) -> usize {
        if self.wide { 28 } else { 14 }
    }

    /// Bytes of environment and registers.
    pub(super) fn save_bytes(self) -> usize {
        self.environment_bytes() + 80
    }
}

/// Room for the largest FNSAVE image.
pub(super) type SaveImage = [u8; 108];

/// What an arithmetic instruction left.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outcome {
    /// RFLAGS after FCOMI and its like.
    pub(super) flags: u64,
    /// A store to memory was done.
    pub(super) stores: bool,
}

impl FloatState {
    /// Executes an arithmetic instruction. No exception may be pending.
    pub(super) fn execute_x87(
        &mut self,
        routine: X87Routine,
        place: Place,
        operand: &mut X87Operand,
        flags: u64,
    ) -> Outcome {
        let data_pointer = place.data_pointer.unwrap_or(self.data_pointer);
        let old_flags = self.status & EXCEPTIONS;
        self.status &= !EXCEPTIONS;
        let flags = host::x87(routine, self, operand, flags);
        let raised = self.status & EXCEPTIONS;
        self.status |= old_flags;
        self.instruction_pointer = place.instruction_pointer;
        self.data_pointer = data_pointer;
        self.opcode = place.opcode;
        Outcome {
            flags,
            stores: raised & !self.control & STOPS_STORE == 0,
        }
    }

    /// The tag word as FNSTENV stores it: two bits a physical register.
    fn full_tags(&self) -> u16 {
        let top = self.top();
        (0..8).fold(0, |word, physical| {
            let tag = if self.tags >> physical & 1 == 0 {
                3
            } else {
                classify(self.st[(physical + 8 - top) & 7])
            };
            word | tag << (physical * 2)
        })
    }

    fn set_full_tags(&mut self, word: u16) {
        self.tags = (0..8).fold(0, |tags, physical| {
            tags | u8::from(word >> (physical * 2) & 3 != 3) << physical
        });
    }

    /// FNSTENV: the image; afterwards all exceptions are masked.
    pub(super) fn store_environment(&mut self, layout: Layout) -> SaveImage {
        let mut image = [0; 108];
        let (instruction, data) = (self.instruction_pointer as u32, self.data_pointer as u32);
        let opcode = u32::from(self.opcode);
        let mut fields = [
            u32::from(self.control) | 0xffff_0000,
            u32::from(self.status) | 0xffff_0000,
            u32::from(self.full_tags()) | 0xffff_0000,
            instruction,
            opcode << 16,
            data,
            0xffff_0000,
        ];
        if !layout.protected {
            fields[3] = instruction & 0xffff;
            fields[4] = instruction >> 16 << 12 | opcode;
            fields[5] = data & 0xffff;
            fields[6] = data >> 16 << 12;
        }
        let step = if layout.wide { 4 } else { 2 };
        if !layout.wide && layout.protected {
            fields[4] = 0;
        }
        for (slot, field) in image.chunks_exact_mut(step).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes()[..step]);
        }
        self.set_control(self.control | EXCEPTIONS);
        image
    }

    /// FLDENV, from the first bytes of `image`.
    pub(super) fn load_environment(&mut self, image: &SaveImage, layout: Layout) {
        let step = if layout.wide { 4 } else { 2 };
        let field = |index: usize| {
            let mut bytes = [0; 4];
            bytes[..step].copy_from_slice(&image[index * step..(index + 1) * step]);
            u32::from_le_bytes(bytes)
        };
        let status = field(1) as u16;
        self.rotate_to(usize::from(status >> 11 & 7));
        self.status = status;
        self.set_control(field(0) as u16);
        self.set_full_tags(field(2) as u16);
        if layout.protected {
            self.instruction_pointer = u64::from(field(3));
            self.data_pointer = u64::from(field(5));
            self.opcode = if layout.wide {
                (field(4) >> 16) as u16 & 0x7ff
            } else {
                0
            };
        } else {
            self.instruction_pointer = u64::from(field(3) & 0xffff | field(4) >> 12 << 16);
            self.data_pointer = u64::from(field(5) & 0xffff | field(6) >> 12 << 16);
            self.opcode = field(4) as u16 & 0x7ff;
        }
    }

    /// FNSAVE: the image; afterwards the x87 part is as FNINIT leaves it.
    pub(super) fn store_all(&mut self, layout: Layout) -> SaveImage {
        let mut image = self.store_environment(layout);
        let registers = &mut image[layout.environment_bytes()..];
        for (slot, register) in registers.chunks_exact_mut(10).zip(self.st) {
            slot.copy_from_slice(&register.to_le_bytes()[..10]);
        }
        self.init_x87();
        image
    }

    /// FRSTOR.
    pub(super) fn load_all(&mut self, image: &SaveImage, layout: Layout) {
        self.load_environment(image, layout);
        let registers = &image[layout.environment_bytes()..];
        for (register, slot) in self.st.iter_mut().zip(registers.chunks_exact(10)) {
            let mut bytes = [0; 16];
            bytes[..10].copy_from_slice(slot);
            *register = u128::from_le_bytes(bytes);
        }
    }

    /// FNCLEX.
    pub(super) fn clear_exceptions(&mut self) {
        self.status &= 0x7f00;
    }

    /// What every MMX instruction but EMMS does to the x87 state: registers are addressed
    /// absolutely, and all are in use.
    pub(super) fn enter_mmx(&mut self) {
        self.rotate_to(0);
        self.tags = 0xff;
    }

    /// An MMX register, before [`Self::enter_mmx`] as well as after.
    pub(super) fn mmx_before_entry(&self, index: usize) -> u64 {
        self.st[index.wrapping_sub(self.top()) & 7] as u64
    }

    /// An MMX register, after [`Self::enter_mmx`].
    pub(super) fn mmx(&self, index: usize) -> u64 {
        self.st[index & 7] as u64
    }

    /// Writes an MMX register, after [`Self::enter_mmx`].
    pub(super) fn set_mmx(&mut self, index: usize, value: u64) {
        self.st[index & 7] = u128::from(value) | 0xffff << 64;
    }

    /// EMMS.
    pub(super) fn leave_mmx(&mut self) {
        self.rotate_to(0);
        self.tags = 0;
    }
}

/// The tag of a register in use: valid, zero or special.
fn classify(register: u128) -> u16 {
    let (exponent, mantissa) = (register >> 64 & 0x7fff, register as u64);
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, mantissa) if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: u128 = 0x3fff_8000_0000_0000_0000;

    fn busy_state() -> FloatState {
        let mut state = FloatState::default();
        state.set_control(0x0c7f);
        state.set_status(5 << 11 | 0x4500);
        state.tags = 0b1110_0000;
        state.st[0] = ONE;
        state.st[1] = 0;
        state.st[2] = 0x7fff_8000_0000_0000_0000;
        state.opcode = 0x1c5;
        state.instruction_pointer = 0x000a_bcde;
        state.data_pointer = 0x0005_4321;
        state
    }

    const LAYOUTS: [Layout; 4] = [
        Layout {
            wide: false,
            protected: false,
        },
        Layout {
            wide: false,
            protected: true,
        },
        Layout {
            wide: true,
            protected: false,
        },
        Layout {
            wide: true,
            protected: true,
        },
    ];

    #[test]
    fn a_saved_state_comes_back_in_every_layout() {
        for layout in LAYOUTS {
            let state = busy_state();
            let mut after = state.clone();
            let image = after.store_all(layout);
            assert_eq!((after.control, after.status, after.tags), (0x37f, 0, 0));
            after.load_all(&image, layout);
            let mut expected = state;
            if layout.protected && !layout.wide {
                expected.opcode = 0;
                expected.instruction_pointer &= 0xffff;
                expected.data_pointer &= 0xffff;
            }
            assert_eq!(after, expected, "{layout:?}");
        }
    }

    #[test]
    fn environments_are_laid_out_as_the_manual_draws_them() {
        let image = |layout| {
            let mut state = busy_state();
            state.store_environment(layout)
        };
        let [real_16, protected_16, real_32, protected_32] = LAYOUTS.map(image);
        let tags = 0b1001_0011_1111_1111_u16;
        for image in [real_16, protected_16] {
            assert_eq!(image[0..2], 0x0c7f_u16.to_le_bytes());
            assert_eq!(image[2..4], 0x6d00_u16.to_le_bytes());
            assert_eq!(image[4..6], tags.to_le_bytes());
            assert_eq!(image[6..8], 0xbcde_u16.to_le_bytes());
            assert_eq!(image[10..12], 0x4321_u16.to_le_bytes());
        }
        assert_eq!(real_16[8..10], 0xa1c5_u16.to_le_bytes());
        assert_eq!(real_16[12..14], 0x5000_u16.to_le_bytes());
        assert_eq!(real_32[12..16], 0x0000_bcde_u32.to_le_bytes());
        assert_eq!(real_32[16..20], 0x0000_a1c5_u32.to_le_bytes());
        assert_eq!(
            protected_32[8..12],
            (0xffff_0000 | u32::from(tags)).to_le_bytes()
        );
        assert_eq!(protected_32[12..16], 0x000a_bcde_u32.to_le_bytes());
        assert_eq!(protected_32[16..20], 0x01c5_0000_u32.to_le_bytes());
        assert_eq!(protected_32[20..24], 0x0005_4321_u32.to_le_bytes());
    }

    #[test]
    fn mmx_registers_are_the_physical_ones() {
        let mut state = busy_state();
        let before: Vec<u64> = (0..8).map(|index| state.mmx_before_entry(index)).collect();
        state.enter_mmx();
        let after: Vec<u64> = (0..8).map(|index| state.mmx(index)).collect();
        assert_eq!(before, after);
        assert_eq!(after[5], ONE as u64);
        assert_eq!((state.top(), state.tags), (0, 0xff));
        state.leave_mmx();
        assert_eq!(state.tags, 0);
    }

    #[test]
    fn arithmetic_runs_on_the_guests_stack() {
        let mut state = busy_state();
        let place = Place {
            instruction_pointer: 0x1000,
            data_pointer: None,
            opcode: 0xc0,
        };
        // FADD ST(0), ST(0).
        let add = X87Routine::register(0xd8, 0xc0);
        let outcome = state.execute_x87(add, place, &mut X87Operand::default(), 0);
        assert!(outcome.stores);
        assert_eq!(state.st[0], 0x4000_8000_0000_0000_0000);
        assert_eq!(state.instruction_pointer, 0x1000);
        assert_eq!(state.top(), 5);
        // FDIV ST(0), ST(1): by zero, unmasked.
        state.set_control(0x037f & !4);
        let divide = X87Routine::register(0xd8, 0xf1);
        state.execute_x87(divide, place, &mut X87Operand::default(), 0);
        assert!(state.exception_pending());
        assert_eq!(state.st[0], 0x4000_8000_0000_0000_0000);
    }
}
