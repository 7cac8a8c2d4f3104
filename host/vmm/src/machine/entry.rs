//! From an empty machine to a kernel's first instruction.

use dunlin_boot::{EntryState, LoadContext, LoadError};
use dunlin_devices::acpi::{self, AcpiError};
use dunlin_x86::state::{Activity, CpuState, Segment, gpr, segment};

use super::{Machine, VcpuError};

/// Why the guest could not be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The firmware tables do not fit.
    #[error("failed to describe the machine to the guest")]
    Acpi(#[from] AcpiError),
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The first processor does not take its state.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

impl Machine {
    /// Loads the kernel, and puts the first processor at its entry.
    pub(crate) fn load_kernel(&self) -> Result<(), BootError> {
        let rsdp = acpi::build(&self.memory, self.config.cpus)?;
        let entry = dunlin_boot::load(&LoadContext {
            memory: &self.memory,
            kernel: &self.config.kernel,
            initrd: self.config.initrd.as_deref(),
            command_line: &self.config.command_line,
            rsdp,
        })?;
        if let Some(first) = self.vcpus.first() {
            let mut state = first.save()?;
            enter(&mut state, entry);
            first.restore(state)?;
        }
        Ok(())
    }
}

/// CR0 with protection enabled and the fixed extension type.
const CR0_PROTECTED: u64 = 0x11;

/// The PVH boot protocol's initial machine state; see [`EntryState`].
fn enter(state: &mut CpuState, entry: EntryState) {
    let flat = |selector, access| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
        unusable: false,
    };
    state.rip = u64::from(entry.entry);
    state.gpr[gpr::RBX] = u64::from(entry.start_info);
    state.rflags = 2;
    state.cr0 = CR0_PROTECTED;
    state.cr4 = 0;
    state.msrs.efer = 0;
    state.segments[segment::CS] = flat(0x10, 0xc09b);
    for data in [segment::DS, segment::ES, segment::SS] {
        state.segments[data] = flat(0x18, 0xc093);
    }
    state.tr = Segment {
        selector: 0x20,
        base: 0,
        limit: 0x67,
        access: 0x8b,
        unusable: false,
    };
    state.activity = Activity::Running;
}
