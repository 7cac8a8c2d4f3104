//! What the instructions do.
//!
//! # Writing a handler
//!
//! A handler is a plain function `fn(&mut Cpu, &Op) -> Result<(), Abort>`, made the body of a
//! decoded instruction by [`op::straight`]. What [`Op`] holds for it:
//!
//! * `op.dst`, `op.src`: register numbers (any meaning that the lowering gives them),
//!   `op.imm`: 64 bits of its own;
//! * the memory operand, if the instruction has one: [`Cpu::ea`] gives its *linear* address
//!   (segment base added, wrapped to the address size; in 16- and 32-bit modes the segment's
//!   limit and rights have been checked before the handler runs).
//!
//! General registers: `cpu.reg::<T>(number)` and `cpu.set_reg::<T>(number, value)` with `T` of
//! `u8`, `u16`, `u32` (zero-extends), `u64`; byte registers AH..BH have numbers `0x20..=0x23`.
//! Flags: `cpu.flags` ([`flags::Flags`]); `Flags::from_rflags(ZF | PF | CF bits)` sets them.
//!
//! Memory, at the operand or at any linear address (`seg` says #SS or #GP for a non-canonical
//! address; pass `op.seg`):
//!
//! * `cpu.read::<T>(op)?`, `cpu.write::<T>(op, value)?` — 1, 2, 4, 8 bytes at the operand;
//! * `cpu.load::<T>(address, seg)?`, `cpu.store::<T>(address, seg, value)?` — the same elsewhere;
//! * `cpu.read_u128(op)?`, `cpu.write_u128(op, value)?` — 16 bytes, unaligned;
//!   `cpu.check_aligned(op, 16)?` first for the forms that demand alignment (#GP(0));
//! * `cpu.read_bytes(address, seg, &mut bytes)?`, `cpu.write_bytes(address, seg, &bytes)?` — any
//!   size (10, 28, 108, 512, ...); the write checks every page before it changes any.
//!
//! Every access may end the instruction: a fault, or a device that must be asked first. So a
//! handler changes no register and no flag before its last `?`. After a device has answered, the
//! handler is run again from its start and gets the answer in place of the access.
//!
//! Exceptions: `return Err(cpu.raise(Exception::...))`, or the short forms `cpu.undefined()`
//! (#UD), `cpu.general_protection(code)`, `cpu.device_not_available()`.
//! Before an AVX instruction: `cpu.check_avx()?`; before one of general registers with a VEX prefix:
//! `cpu.check_vex()?` (real and virtual-8086 mode).
//! Before an SSE instruction: `cpu.check_sse()?` (CR0.EM, CR0.TS, CR4.OSFXSR); before x87 or MMX:
//! `cpu.check_x87()?` (CR0.EM, CR0.TS; raises #MF for a pending exception) or
//! `cpu.check_x87_nowait()?`; before FWAIT: `cpu.check_wait()?`.

pub(crate) mod alu;
pub(crate) mod bits;
pub(crate) mod branch;
pub(crate) mod far;
pub(crate) mod flags;
pub(crate) mod gate;
pub(crate) mod interrupt;
pub(crate) mod moves;
pub(crate) mod msr;
pub(crate) mod op;
pub(crate) mod segment;
pub(crate) mod shift;
pub(crate) mod stack;
pub(crate) mod string;
pub(crate) mod system;
pub(crate) mod task;
pub(crate) mod value;
pub(crate) mod xsave;

use crate::cpu::Cpu;
#[cfg(target_arch = "x86_64")]
use crate::float::{XSAVE_AVX, XSAVE_SSE};
use op::{Op, slot};
use value::Value;

/// What AVX needs in XCR0.
#[cfg(target_arch = "x86_64")]
const AVX_STATE: u64 = XSAVE_SSE | XSAVE_AVX;

/// The instruction ended before it changed anything; why is in the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abort;

/// The outcome of a handler or a memory access.
pub(crate) type Result<T = ()> = std::result::Result<T, Abort>;

/// An exception as the architecture names it (SDM vol. 3, 6.15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exception {
    DivideError,
    /// With the bits of DR6 to set.
    Debug(u64),
    BoundRange,
    InvalidOpcode,
    DeviceNotAvailable,
    DoubleFault,
    InvalidTss(u16),
    SegmentNotPresent(u16),
    StackFault(u16),
    GeneralProtection(u16),
    /// Linear address and error code.
    PageFault(u64, u32),
    X87,
    AlignmentCheck,
    Simd,
}

impl Exception {
    /// Says in the error code that something outside of the program led to it (EXT).
    pub(crate) fn mark_external(&mut self) {
        if let Self::InvalidTss(code)
        | Self::SegmentNotPresent(code)
        | Self::StackFault(code)
        | Self::GeneralProtection(code) = self
        {
            *code |= 1;
        }
    }

    /// Vector and error code.
    pub(crate) fn vector(self) -> (u8, Option<u32>) {
        match self {
            Self::DivideError => (0, None),
            Self::Debug(_) => (1, None),
            Self::BoundRange => (5, None),
            Self::InvalidOpcode => (6, None),
            Self::DeviceNotAvailable => (7, None),
            Self::DoubleFault => (8, Some(0)),
            Self::InvalidTss(code) => (10, Some(code.into())),
            Self::SegmentNotPresent(code) => (11, Some(code.into())),
            Self::StackFault(code) => (12, Some(code.into())),
            Self::GeneralProtection(code) => (13, Some(code.into())),
            Self::PageFault(_, code) => (14, Some(code)),
            Self::X87 => (16, None),
            Self::AlignmentCheck => (17, Some(0)),
            Self::Simd => (19, None),
        }
    }
}

/// Registers and operands, as handlers see them.
#[expect(
    unsafe_code,
    reason = "register numbers are checked once, when an instruction is lowered"
)]
impl Cpu {
    /// The register in `slot`, whole.
    #[inline(always)]
    pub(crate) fn slot(&self, slot: u8) -> u64 {
        // SAFETY: masked to the 32 slots that there are.
        unsafe { *self.regs.get_unchecked(usize::from(slot & 31)) }
    }

    /// The general register `number`.
    #[inline(always)]
    pub(crate) fn reg<T: Value>(&self, number: u8) -> T {
        T::from_register(self.slot(number), number)
    }

    /// Writes the general register `number`.
    #[inline(always)]
    pub(crate) fn set_reg<T: Value>(&mut self, number: u8, value: T) {
        // SAFETY: masked to the 32 slots that there are.
        let register = unsafe { self.regs.get_unchecked_mut(usize::from(number & 31)) };
        *register = value.into_register(*register, number);
    }

    /// The linear address of the memory operand.
    #[inline(always)]
    pub(crate) fn ea(&self, op: &Op) -> u64 {
        // SAFETY: `base`, `index` and `seg` are below 32: the lowering sets them, from `slot`'s
        // constants and from the numbers of address registers, and nothing else does.
        let slot = |number: u8| unsafe { *self.regs.get_unchecked(usize::from(number)) };
        slot(op.base)
            .wrapping_add(slot(op.index).wrapping_shl(op.scale.into()))
            .wrapping_add(op.disp as u64)
            .wrapping_add(slot(op.seg))
    }

    /// The memory operand's offset in its segment (LEA).
    #[inline(always)]
    pub(crate) fn offset(&self, op: &Op) -> u64 {
        self.slot(op.base)
            .wrapping_add(self.slot(op.index) << (op.scale & 3))
            .wrapping_add(op.disp as u64)
    }

    /// Reads the memory operand.
    #[inline(always)]
    pub(crate) fn read<T: Value>(&mut self, op: &Op) -> Result<T> {
        self.load(self.ea(op), op.seg)
    }

    /// Writes the memory operand.
    #[inline(always)]
    pub(crate) fn write<T: Value>(&mut self, op: &Op, value: T) -> Result {
        self.store(self.ea(op), op.seg, value)
    }

    /// Reads 16 bytes at the memory operand.
    #[inline]
    pub(crate) fn read_u128(&mut self, op: &Op) -> Result<u128> {
        let at = self.ea(op);
        let low: u64 = self.load(at, op.seg)?;
        let high: u64 = self.load(at.wrapping_add(8), op.seg)?;
        Ok(u128::from(low) | u128::from(high) << 64)
    }

    /// Writes 16 bytes at the memory operand.
    #[inline]
    pub(crate) fn write_u128(&mut self, op: &Op, value: u128) -> Result {
        self.store_pair(self.ea(op), op.seg, (value as u64, (value >> 64) as u64))
    }

    /// #GP(0) unless the memory operand's address is a multiple of `bytes`, a power of two.
    #[inline]
    pub(crate) fn check_aligned(&mut self, op: &Op, bytes: u64) -> Result {
        if self.ea(op) & (bytes - 1) != 0 {
            return Err(self.general_protection(0));
        }
        Ok(())
    }

    /// Ends the instruction with `exception`.
    #[cold]
    pub(crate) fn raise(&mut self, exception: Exception) -> Abort {
        self.abort = crate::cpu::AbortReason::Exception(exception);
        Abort
    }

    /// #UD.
    #[cold]
    pub(crate) fn undefined(&mut self) -> Abort {
        self.raise(Exception::InvalidOpcode)
    }

    /// #GP.
    #[cold]
    pub(crate) fn general_protection(&mut self, code: u16) -> Abort {
        self.raise(Exception::GeneralProtection(code))
    }

    /// #NM.
    #[cold]
    pub(crate) fn device_not_available(&mut self) -> Abort {
        self.raise(Exception::DeviceNotAvailable)
    }

    /// Does an SSE instruction run?
    #[inline]
    pub(crate) fn sse_runs(&self) -> bool {
        use crate::cpu::control::{CR0_EM, CR0_TS, CR4_OSFXSR};
        self.cr0 & (CR0_EM | CR0_TS) == 0 && self.cr4 & CR4_OSFXSR != 0
    }

    /// May an SSE instruction run?
    #[inline]
    pub(crate) fn check_sse(&mut self) -> Result {
        use crate::cpu::control::{CR0_EM, CR4_OSFXSR};
        if self.sse_runs() {
            return Ok(());
        }
        if self.cr0 & CR0_EM != 0 || self.cr4 & CR4_OSFXSR == 0 {
            return Err(self.undefined());
        }
        Err(self.device_not_available())
    }

    /// Does a VEX-coded instruction exist in this mode? Real and virtual-8086 mode have none.
    #[inline]
    pub(crate) fn check_vex(&mut self) -> Result {
        if self.cr0 & crate::cpu::control::CR0_PE == 0 || self.system_flags & flags::VM != 0 {
            return Err(self.undefined());
        }
        Ok(())
    }

    /// Does an AVX instruction run?
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(crate) fn avx_runs(&self) -> bool {
        use crate::cpu::control::{CR0_TS, CR4_OSXSAVE};
        self.cr0 & CR0_TS == 0 && self.cr4 & CR4_OSXSAVE != 0 && self.xcr0 & AVX_STATE == AVX_STATE
    }

    /// May an AVX instruction run (SDM vol. 2, 2.4)?
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(crate) fn check_avx(&mut self) -> Result {
        use crate::cpu::control::CR4_OSXSAVE;
        self.check_vex()?;
        if self.avx_runs() {
            return Ok(());
        }
        if self.cr4 & CR4_OSXSAVE == 0 || self.xcr0 & AVX_STATE != AVX_STATE {
            return Err(self.undefined());
        }
        Err(self.device_not_available())
    }

    /// May an x87 or MMX instruction run that does not wait for exceptions?
    #[inline]
    pub(crate) fn check_x87_nowait(&mut self) -> Result {
        use crate::cpu::control::{CR0_EM, CR0_TS};
        if self.cr0 & (CR0_EM | CR0_TS) != 0 {
            return Err(self.device_not_available());
        }
        Ok(())
    }

    /// May an x87 or MMX instruction run?
    #[inline]
    pub(crate) fn check_x87(&mut self) -> Result {
        self.check_x87_nowait()?;
        self.check_pending_x87()
    }

    /// May FWAIT run?
    pub(crate) fn check_wait(&mut self) -> Result {
        use crate::cpu::control::{CR0_MP, CR0_TS};
        if self.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
            return Err(self.device_not_available());
        }
        self.check_pending_x87()
    }

    /// #MF when an unmasked x87 exception waits.
    #[inline]
    pub(crate) fn check_pending_x87(&mut self) -> Result {
        if self.float.exception_pending() {
            return Err(self.raise(Exception::X87));
        }
        Ok(())
    }

    /// The stack pointer.
    #[inline(always)]
    pub(crate) fn rsp(&self) -> u64 {
        self.regs[usize::from(slot::RSP)]
    }
}
