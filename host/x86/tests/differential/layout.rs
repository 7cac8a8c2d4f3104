//! Where things are: the same linear addresses natively and on the software CPU, below 2 GiB so
//! that every addressing form reaches them.

/// What both sides load before an instruction and store after it.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Machine {
    /// In the layout of FXSAVE64.
    pub(crate) float: [u8; 512],
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub(crate) gpr: [u64; 16],
    pub(crate) rflags: u64,
    pub(crate) rip: u64,
    /// Bits 128 to 255 of YMM0 to YMM15.
    pub(crate) upper: [u8; 256],
}

impl Machine {
    pub(crate) const ZERO: Self = Self {
        float: [0; 512],
        gpr: [0; 16],
        rflags: 2,
        rip: 0,
        upper: [0; 256],
    };
}

/// The native side's own page.
pub(crate) const CONTROL: u64 = 0x1000_0000;
/// Instructions.
pub(crate) const CODE: u64 = 0x1010_0000;
pub(crate) const CODE_BYTES: usize = 0x1_0000;
/// One instruction has as much room; the rest are breakpoints to land on.
pub(crate) const SLOT_BYTES: usize = 64;
/// Bytes of a slot before its instruction.
pub(crate) const SLOT_LEAD: usize = 20;
pub(crate) const SLOTS: usize = CODE_BYTES / SLOT_BYTES;
/// Two pages of operands. The pages before and after do not exist.
pub(crate) const DATA: u64 = 0x1020_0000;
pub(crate) const DATA_BYTES: usize = 0x2000;
/// One page of stack, likewise alone.
pub(crate) const STACK: u64 = 0x1030_0000;
pub(crate) const STACK_BYTES: usize = 0x1000;

/// A page's bytes.
pub(crate) const PAGE: usize = 0x1000;

/// The instruction's address in `slot`.
pub(crate) fn slot_address(slot: usize) -> u64 {
    CODE + (slot * SLOT_BYTES + SLOT_LEAD) as u64
}

/// What instructions may do to their own pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CodePages {
    Read,
    Write,
}

/// How an instruction ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// The next instruction is at this address.
    At(u64),
    /// An exception, with error code and, for page faults, the address.
    Fault { vector: u8, code: u64, address: u64 },
    /// Translated code is not what the interpreter does.
    Differs,
}
