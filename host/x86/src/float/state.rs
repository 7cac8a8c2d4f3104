//! The x87, SSE and AVX registers, and their image in memory (SDM vol. 1, 10.5.1 and 13.4).

use thiserror::Error;

/// Bytes of the FXSAVE image, which is also the legacy region of the XSAVE format.
pub const FXSAVE_BYTES: usize = 512;

/// Bytes of the standard XSAVE format with x87 and SSE: legacy region and header.
pub const XSAVE_BYTES: usize = FXSAVE_BYTES + 64;

/// The bits of MXCSR that exist: six flags, DAZ, six masks, rounding, flush to zero.
pub const MXCSR_MASK: u32 = 0xffff;

/// The x87 bit of XCR0 and of the XSAVE header.
pub const XSAVE_X87: u64 = 1 << 0;

/// The SSE bit of XCR0 and of the XSAVE header.
pub const XSAVE_SSE: u64 = 1 << 1;

/// The bit of XCR0 and of the XSAVE header for the upper halves of the YMM registers.
pub const XSAVE_AVX: u64 = 1 << 2;

/// Bytes of those upper halves in the XSAVE format; in the standard one they follow the header.
pub const XSAVE_AVX_BYTES: usize = 256;

/// XCR0 of a processor without XSAVE, as far as there is one: x87 and SSE.
pub const XCR0_LEGACY: u64 = XSAVE_X87 | XSAVE_SSE;

const MXCSR_RESET: u32 = 0x1f80;
const CONTROL_INIT: u16 = 0x037f;
/// Bits of the x87 control word that software can change; bit 6 reads as one.
const CONTROL_WRITABLE: u16 = 0x1f3f;
const CONTROL_FIXED: u16 = 0x0040;
const EXCEPTIONS: u16 = 0x3f;
const SUMMARY: u16 = 1 << 7;
const BUSY: u16 = 1 << 15;

/// A memory image that the processor would refuse with #GP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FloatStateError {
    /// MXCSR has reserved bits set.
    #[error("reserved bits set in MXCSR {0:#x}")]
    ReservedMxcsr(u32),
    /// The header names state components that the software CPU does not have, or a compacted
    /// format.
    #[error("unsupported state in XSAVE header: XSTATE_BV {xstate_bv:#x}, XCOMP_BV {xcomp_bv:#x}")]
    Header {
        /// Bytes 512..520.
        xstate_bv: u64,
        /// Bytes 520..528.
        xcomp_bv: u64,
    },
    /// Bytes 528..576 must be zero.
    #[error("reserved bytes set in XSAVE header")]
    ReservedHeader,
    /// Fewer bytes than the format has.
    #[error("XSAVE image of {0} bytes is too short")]
    Truncated(usize),
}

/// The x87, MMX and SSE registers, laid out as FXSAVE64 does, and behind them what AVX adds.
///
/// Invariants, kept by the setters: reserved bits of the control word and of MXCSR are as the
/// processor reads them, the error summary follows the flags and masks, and bits 80..128 of the
/// x87 registers are zero.
#[derive(Debug, Clone, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct FloatState {
    /// x87 control word.
    pub(crate) control: u16,
    /// x87 status word with TOP in bits 11-13.
    pub(crate) status: u16,
    /// Abridged tags: bit *i* is set when *physical* register *i* is in use.
    pub(crate) tags: u8,
    reserved: u8,
    /// Low 11 bits of the last x87 instruction's opcode.
    pub(crate) opcode: u16,
    /// Address of the last x87 instruction.
    pub(crate) instruction_pointer: u64,
    /// Address of the last x87 memory operand.
    pub(crate) data_pointer: u64,
    pub(crate) mxcsr: u32,
    mxcsr_mask: u32,
    /// ST(0) to ST(7), relative to TOP.
    pub(crate) st: [u128; 8],
    /// XMM0 to XMM15.
    pub(crate) xmm: [u128; 16],
    unused: [u8; 96],
    /// Bits 128 to 255 of YMM0 to YMM15.
    pub(crate) upper: [u128; 16],
}

const _: () = assert!(std::mem::offset_of!(FloatState, upper) == FXSAVE_BYTES);

impl Default for FloatState {
    /// The state after FNINIT with cleared registers, which is also XSAVE's initial state.
    fn default() -> Self {
        Self {
            control: CONTROL_INIT,
            status: 0,
            tags: 0,
            reserved: 0,
            opcode: 0,
            instruction_pointer: 0,
            data_pointer: 0,
            mxcsr: MXCSR_RESET,
            mxcsr_mask: MXCSR_MASK,
            st: [0; 8],
            xmm: [0; 16],
            unused: [0; 96],
            upper: [0; 16],
        }
    }
}

impl FloatState {
    /// The state after power-up (SDM vol. 3, table 10-1).
    #[must_use]
    pub fn power_up() -> Self {
        Self {
            control: CONTROL_FIXED,
            tags: 0xff,
            ..Self::default()
        }
    }

    /// The XMM registers.
    #[must_use]
    pub fn xmm(&self) -> &[u128; 16] {
        &self.xmm
    }

    /// The XMM registers, to be changed.
    pub fn xmm_mut(&mut self) -> &mut [u128; 16] {
        &mut self.xmm
    }

    /// MXCSR.
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        self.mxcsr
    }

    /// Is SSE arithmetic what it is without a word in MXCSR: to nearest, all exceptions masked?
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn is_plain(&self) -> bool {
        self.mxcsr & !u32::from(EXCEPTIONS) == MXCSR_RESET
    }

    /// Before arithmetic of the host: its exception flags are clear.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn clear_host_flags() {
        super::host::clear_flags();
    }

    /// Takes the exception flags that arithmetic of the host has left since they were clear.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn take_host_flags(&mut self) {
        self.mxcsr |= super::host::flags();
    }

    /// Loads MXCSR.
    ///
    /// # Errors
    /// Reserved bits are set: the processor raises #GP.
    pub fn set_mxcsr(&mut self, value: u32) -> Result<(), FloatStateError> {
        if value & !MXCSR_MASK != 0 {
            return Err(FloatStateError::ReservedMxcsr(value));
        }
        self.mxcsr = value;
        Ok(())
    }

    /// The x87 control word.
    #[must_use]
    pub fn control(&self) -> u16 {
        self.control
    }

    /// The x87 status word.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.status
    }

    /// An unmasked x87 exception waits for the next waiting x87 instruction.
    #[must_use]
    pub fn exception_pending(&self) -> bool {
        self.status & SUMMARY != 0
    }

    pub(crate) fn set_control(&mut self, value: u16) {
        self.control = value & CONTROL_WRITABLE | CONTROL_FIXED;
        self.summarise();
    }

    #[cfg(test)]
    pub(crate) fn set_status(&mut self, value: u16) {
        self.status = value;
        self.summarise();
    }

    /// Sets ES and B as flags and masks demand.
    pub(super) fn summarise(&mut self) {
        if self.status & !self.control & EXCEPTIONS != 0 {
            self.status |= SUMMARY | BUSY;
        } else {
            self.status &= !(SUMMARY | BUSY);
        }
    }

    pub(crate) fn top(&self) -> usize {
        usize::from(self.status >> 11 & 7)
    }

    /// Resets the x87 part, as FNINIT does; the registers' contents stay.
    pub(crate) fn init_x87(&mut self) {
        self.rotate_to(0);
        self.control = CONTROL_INIT;
        self.status = 0;
        self.tags = 0;
        self.opcode = 0;
        self.instruction_pointer = 0;
        self.data_pointer = 0;
    }

    /// Puts the x87 part into its initial state, the registers' contents too.
    pub(crate) fn initialise_x87(&mut self) {
        self.init_x87();
        self.st = [0; 8];
    }

    /// Makes `top` the top of the stack; each physical register keeps its contents.
    pub(crate) fn rotate_to(&mut self, top: usize) {
        let by = (top + 8 - self.top()) & 7;
        self.st.rotate_left(by);
        self.status = self.status & !(7 << 11) | (top as u16 & 7) << 11;
    }

    /// The image that FXSAVE64 writes.
    #[must_use]
    pub fn to_fxsave(&self) -> [u8; FXSAVE_BYTES] {
        let mut image = [0; FXSAVE_BYTES];
        image[0..2].copy_from_slice(&self.control.to_le_bytes());
        image[2..4].copy_from_slice(&self.status.to_le_bytes());
        image[4] = self.tags;
        image[6..8].copy_from_slice(&self.opcode.to_le_bytes());
        image[8..16].copy_from_slice(&self.instruction_pointer.to_le_bytes());
        image[16..24].copy_from_slice(&self.data_pointer.to_le_bytes());
        image[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        let registers = self.st.iter().chain(&self.xmm);
        for (slot, register) in image[32..416].chunks_exact_mut(16).zip(registers) {
            slot.copy_from_slice(&register.to_le_bytes());
        }
        image
    }

    /// Loads the x87 registers from an image that FXSAVE64 wrote; reserved bits are dropped.
    pub(crate) fn load_x87(&mut self, image: &[u8; FXSAVE_BYTES]) {
        self.control = le16(image, 0) & CONTROL_WRITABLE | CONTROL_FIXED;
        self.status = le16(image, 2);
        self.summarise();
        self.tags = image[4];
        self.opcode = le16(image, 6) & 0x7ff;
        self.instruction_pointer = le64(image, 8);
        self.data_pointer = le64(image, 16);
        for (index, register) in self.st.iter_mut().enumerate() {
            *register = le128(image, 32 + index * 16) & ((1 << 80) - 1);
        }
    }

    /// Loads the first `count` XMM registers from an image.
    pub(crate) fn load_xmm(&mut self, image: &[u8; FXSAVE_BYTES], count: usize) {
        for (index, register) in self.xmm.iter_mut().take(count).enumerate() {
            *register = le128(image, 160 + index * 16);
        }
    }

    /// Takes an image that FXSAVE64 wrote. Reserved bits of the x87 part are dropped.
    ///
    /// # Errors
    /// Reserved bits of MXCSR are set.
    pub fn from_fxsave(image: &[u8; FXSAVE_BYTES]) -> Result<Self, FloatStateError> {
        let mut state = Self::default();
        state.set_mxcsr(le32(image, 24))?;
        state.load_x87(image);
        state.load_xmm(image, 16);
        Ok(state)
    }

    /// The image in the standard XSAVE format, with all components marked as present: x87, SSE, and
    /// AVX if it is in `enabled` or in use.
    #[must_use]
    pub fn to_xsave(&self, enabled: u64) -> Vec<u8> {
        let mut image = vec![0; XSAVE_BYTES];
        image[..FXSAVE_BYTES].copy_from_slice(&self.to_fxsave());
        let mut present = XCR0_LEGACY;
        if enabled & XSAVE_AVX != 0 || self.upper_in_use() {
            present |= XSAVE_AVX;
            image.extend(self.upper.iter().flat_map(|half| half.to_le_bytes()));
        }
        image[512..520].copy_from_slice(&present.to_le_bytes());
        image
    }

    /// Is an upper half of a YMM register not zero?
    pub(crate) fn upper_in_use(&self) -> bool {
        self.upper.iter().any(|half| *half != 0)
    }

    /// Loads the upper halves of the first YMM registers from their component.
    pub(crate) fn load_upper(&mut self, component: &[u8]) {
        for (half, bytes) in self.upper.iter_mut().zip(component.chunks_exact(16)) {
            *half = le128(bytes, 0);
        }
    }

    /// Takes an image in the standard XSAVE format with components of those `offered`; one that its
    /// header marks as absent gets its initial state. Bytes that belong to components that the header
    /// does not name are ignored.
    ///
    /// # Errors
    /// The image is short, or the processor would refuse it with #GP.
    pub fn from_xsave(image: &[u8], offered: u64) -> Result<Self, FloatStateError> {
        let (Some(legacy), Some(header)) =
            (image.first_chunk::<FXSAVE_BYTES>(), image.get(512..576))
        else {
            return Err(FloatStateError::Truncated(image.len()));
        };
        let (xstate_bv, xcomp_bv) = (le64(header, 0), le64(header, 8));
        if xstate_bv & !offered != 0 || xcomp_bv != 0 {
            return Err(FloatStateError::Header {
                xstate_bv,
                xcomp_bv,
            });
        }
        if header[16..].iter().any(|byte| *byte != 0) {
            return Err(FloatStateError::ReservedHeader);
        }
        let mut state = Self::default();
        state.set_mxcsr(le32(legacy, 24))?;
        if xstate_bv & XSAVE_X87 != 0 {
            state.load_x87(legacy);
        }
        if xstate_bv & XSAVE_SSE != 0 {
            state.load_xmm(legacy, 16);
        }
        if xstate_bv & XSAVE_AVX != 0 {
            let component = image.get(XSAVE_BYTES..XSAVE_BYTES + XSAVE_AVX_BYTES);
            state.load_upper(component.ok_or(FloatStateError::Truncated(image.len()))?);
        }
        Ok(state)
    }
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from(le16(bytes, at)) | u32::from(le16(bytes, at + 2)) << 16
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

fn le128(bytes: &[u8], at: usize) -> u128 {
    u128::from(le64(bytes, at)) | u128::from(le64(bytes, at + 8)) << 64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy_state() -> FloatState {
        let mut state = FloatState::default();
        state.set_control(0x0c72);
        state.set_status(0x3801);
        state.tags = 0xa5;
        state.opcode = 0x123;
        state.instruction_pointer = 0xffff_8000_1234_5678;
        state.data_pointer = 0x7fff_0000;
        state.mxcsr = 0x9fff;
        for (index, register) in state.st.iter_mut().enumerate() {
            *register = 0x3fff_8000_0000_0000_0000 + index as u128;
        }
        for (index, register) in state.xmm.iter_mut().enumerate() {
            *register = u128::MAX - index as u128;
        }
        for (index, half) in state.upper.iter_mut().enumerate() {
            *half = u128::MAX / 3 + index as u128;
        }
        state
    }

    #[test]
    fn images_round_trip() {
        const ALL: u64 = XCR0_LEGACY | XSAVE_AVX;
        let mut state = busy_state();
        let image = state.to_xsave(XCR0_LEGACY);
        assert_eq!(image.len(), XSAVE_BYTES + XSAVE_AVX_BYTES);
        assert_eq!(FloatState::from_xsave(&image, ALL).as_ref(), Ok(&state));
        state.upper = [0; 16];
        let image = state.to_xsave(XCR0_LEGACY);
        assert_eq!(image.len(), XSAVE_BYTES);
        for offered in [XCR0_LEGACY, ALL] {
            assert_eq!(FloatState::from_xsave(&image, offered).as_ref(), Ok(&state));
        }
        assert_eq!(
            FloatState::from_fxsave(&state.to_fxsave()).as_ref(),
            Ok(&state)
        );
    }

    #[test]
    fn an_absent_component_gets_its_initial_state() {
        let state = busy_state();
        let mut image = state.to_xsave(XCR0_LEGACY | XSAVE_AVX);
        image[512] = 0;
        let loaded = FloatState::from_xsave(&image, XCR0_LEGACY).unwrap();
        let expected = FloatState {
            mxcsr: state.mxcsr,
            ..FloatState::default()
        };
        assert_eq!(loaded, expected);
    }

    #[test]
    fn hostile_images_are_refused() {
        let mut state = busy_state();
        let all = XCR0_LEGACY | XSAVE_AVX;
        let with_avx = state.to_xsave(all);
        assert!(FloatState::from_xsave(&with_avx, XCR0_LEGACY).is_err());
        assert!(FloatState::from_xsave(&with_avx[..831], all).is_err());
        state.upper = [0; 16];
        let good = state.to_xsave(XCR0_LEGACY);
        for (at, value) in [(26, 1), (512, 4), (527, 0x80), (540, 1)] {
            let mut image = good.clone();
            image[at] = value;
            let loaded = FloatState::from_xsave(&image, XCR0_LEGACY);
            assert!(loaded.is_err(), "byte {at}");
        }
        assert_eq!(
            FloatState::from_xsave(&good[..575], XCR0_LEGACY),
            Err(FloatStateError::Truncated(575))
        );
    }

    #[test]
    fn reserved_x87_bits_are_dropped() {
        let mut image = busy_state().to_fxsave();
        image[0..2].copy_from_slice(&0xffff_u16.to_le_bytes());
        image[42..48].fill(0xff);
        let state = FloatState::from_fxsave(&image).unwrap();
        assert_eq!(state.control, 0x1f7f);
        assert_eq!(state.st[0] >> 80, 0);
        assert!(!state.exception_pending());
    }

    #[test]
    fn rotation_keeps_physical_registers() {
        let mut state = busy_state();
        assert_eq!(state.top(), 7);
        let physical_zero = state.st[1];
        state.rotate_to(0);
        assert_eq!(state.top(), 0);
        assert_eq!(state.st[0], physical_zero);
    }
}
