//! Where things are: the same linear addresses natively and on the software CPU, below 2 GiB so
//! that every addressing form reaches them.

/// What both sides load before an instruction and store after it.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Machine {
    /// In the layout of FXSAVE64.
    pub float: [u8; 512],
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub rip: u64,
}

impl Machine {
    pub const ZERO: Self = Self {
        float: [0; 512],
        gpr: [0; 16],
        rflags: 2,
        rip: 0,
    };
}

/// The native side's own page.
pub const CONTROL: u64 = 0x1000_0000;
/// Instructions.
pub const CODE: u64 = 0x1010_0000;
pub const CODE_BYTES: usize = 0x1_0000;
/// One instruction has as much room; the rest are breakpoints to land on.
pub const SLOT_BYTES: usize = 64;
/// Bytes of a slot before its instruction.
pub const SLOT_LEAD: usize = 20;
pub const SLOTS: usize = CODE_BYTES / SLOT_BYTES;
/// Two pages of operands. The pages before and after do not exist.
pub const DATA: u64 = 0x1020_0000;
pub const DATA_BYTES: usize = 0x2000;
/// One page of stack, likewise alone.
pub const STACK: u64 = 0x1030_0000;
pub const STACK_BYTES: usize = 0x1000;

/// Everything that instructions may change, as one run of bytes.
pub const SCRATCH_BYTES: usize = DATA_BYTES + STACK_BYTES;

/// A page's bytes.
pub const PAGE: usize = 0x1000;

/// The instruction's address in `slot`.
pub fn slot_address(slot: usize) -> u64 {
    CODE + (slot * SLOT_BYTES + SLOT_LEAD) as u64
}

/// How an instruction ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// The next instruction is at this address.
    At(u64),
    /// An exception, with error code and, for page faults, the address.
    Fault { vector: u8, code: u64, address: u64 },
}
