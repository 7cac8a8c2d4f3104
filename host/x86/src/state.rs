//! The architectural state of one logical processor, the same for every engine.
//!
//! Plain data in the units of the architecture (Intel SDM vol. 3, chapters 2 and 11). A processor
//! saved by one engine is resumed by another from this type alone.

/// One segment register: the selector and the cached descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, already scaled by the granularity bit.
    pub limit: u32,
    /// Descriptor bits 40..56: type (0-3), S (4), DPL (5-6), P (7), zero (8-11), AVL (12),
    /// L (13), D/B (14), G (15). The layout of VMX access rights.
    pub access: u16,
    /// Loaded with a null selector (VMX "unusable").
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Indices into [`CpuState::gpr`], in the order of instruction encoding.
#[expect(missing_docs, reason = "named as the registers are")]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Indices into [`CpuState::segments`], in the order of instruction encoding.
#[expect(missing_docs, reason = "named as the registers are")]
pub mod segment {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// What the processor does between instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activity {
    /// Executes instructions.
    #[default]
    Running,
    /// HLT: waits for an interrupt.
    Halted,
    /// An application processor after INIT: waits for a start-up IPI.
    WaitForSipi,
}

/// An event that was taken but not yet delivered through the IDT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PendingEvents {
    /// Vector of an external interrupt that was acknowledged at the local APIC but not injected.
    pub injected_interrupt: Option<u8>,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// Interrupts are blocked for one instruction (MOV SS, STI).
    pub interrupt_shadow: bool,
}

/// The model-specific registers that a guest can change. Addresses: SDM vol. 4, chapter 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Msrs {
    /// 0xc0000080.
    pub efer: u64,
    /// 0xc0000081.
    pub star: u64,
    /// 0xc0000082.
    pub lstar: u64,
    /// 0xc0000083.
    pub cstar: u64,
    /// 0xc0000084.
    pub sfmask: u64,
    /// 0xc0000102.
    pub kernel_gs_base: u64,
    /// 0x174.
    pub sysenter_cs: u64,
    /// 0x175.
    pub sysenter_esp: u64,
    /// 0x176.
    pub sysenter_eip: u64,
    /// 0x277.
    pub pat: u64,
    /// 0x1a0.
    pub misc_enable: u64,
    /// 0xc0000103.
    pub tsc_aux: u64,
    /// 0x3b.
    pub tsc_adjust: u64,
    /// 0x2ff.
    pub mtrr_def_type: u64,
    /// 0x4b564d01: guest physical address of this processor's kvmclock page, bit 0 enables.
    pub kvmclock_system_time: u64,
    /// 0x4b564d00: guest physical address of the wall clock.
    pub kvmclock_wall_clock: u64,
}

/// The local APIC: its register page and what is not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalApicState {
    /// 0x1b: base address, enable, x2APIC and BSP bits.
    pub base: u64,
    /// The 4 KiB register page in xAPIC layout (`KVM_GET_LAPIC`'s form); in x2APIC mode the ID
    /// register holds the 32-bit ID.
    pub registers: Box<[u8; 1024]>,
    /// 0x6e0: the TSC value at which the timer fires in TSC-deadline mode; 0 when disarmed.
    pub tsc_deadline: u64,
}

impl Default for LocalApicState {
    fn default() -> Self {
        Self {
            base: 0,
            registers: Box::new([0; 1024]),
            tsc_deadline: 0,
        }
    }
}

/// Everything that the architecture calls the state of one logical processor.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15 (see [`gpr`]).
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags, all of them materialised.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS (see [`segment`]).
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Global descriptor table.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority.
    pub cr8: u64,
    /// DR0-DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// XCR0.
    pub xcr0: u64,
    /// x87, SSE and (by XCR0) further state in the standard XSAVE format, at least 576 bytes:
    /// 512 of legacy region, 64 of header.
    pub xsave: Vec<u8>,
    /// Model-specific registers.
    pub msrs: Msrs,
    /// Time-stamp counter at the moment of saving.
    pub tsc: u64,
    /// Frequency of the time-stamp counter that the guest was told, in kHz.
    pub tsc_khz: u64,
    /// CLOCK_REALTIME at the moment at which `tsc` was read, in nanoseconds. A destination adds
    /// the time that has passed since, so that the guest's clock does not lose its blackout.
    pub realtime_ns: u64,
    /// Reading of the paravirtual clock (kvmclock) when the counter read `tsc`, in nanoseconds.
    pub kvmclock_ns: u64,
    /// Local APIC.
    pub apic: LocalApicState,
    /// Events between instructions.
    pub events: PendingEvents,
    /// Running, halted or waiting.
    pub activity: Activity,
}
