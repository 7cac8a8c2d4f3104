//! From an empty machine to a kernel's first instruction.

use dunlin_boot::{EntryState, LoadContext, LoadError, Module};
use dunlin_devices::acpi::{self, AcpiError, LegacyDevices};
use dunlin_x86::state::{Activity, CpuState, LocalApicState, Segment, gpr, segment};

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
        let rsdp = acpi::build(
            &self.memory,
            self.config.cpus,
            match self.config.legacy {
                true => LegacyDevices::Present,
                false => LegacyDevices::Absent,
            },
        )?;
        let modules: Vec<Module> = (self.config.modules.iter())
            .map(|module| Module {
                path: module.path.clone(),
                arguments: module.arguments.clone(),
            })
            .collect();
        let entry = dunlin_boot::load(&LoadContext {
            memory: &self.memory,
            kernel: &self.config.kernel,
            initrd: self.config.initrd.as_deref(),
            modules: &modules,
            command_line: &self.config.command_line,
            rsdp,
        })?;
        if let Some(first) = self.vcpus.first() {
            let mut state = first.save()?;
            enter(&mut state, entry);
            if self.config.legacy {
                pass_external_interrupts(&mut state.apic);
            }
            first.restore(state)?;
        }
        Ok(())
    }
}

/// CR0 with protection enabled and the fixed extension type.
const CR0_PROTECTED: u64 = 0x11;

/// The initial machine state of the PVH boot protocol and of multiboot; see [`EntryState`].
fn enter(state: &mut CpuState, entry: EntryState) {
    let flat = |selector, access| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
        unusable: false,
    };
    state.rip = u64::from(entry.entry);
    state.gpr[gpr::RAX] = u64::from(entry.magic);
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

/// Virtual wire mode, in which firmware leaves the first processor for programs that know the legacy
/// controllers only: the local APIC is enabled, LINT0 is in ExtINT mode, LINT1 in NMI mode (MP
/// specification 1.4, 3.6.2.2).
fn pass_external_interrupts(apic: &mut LocalApicState) {
    const SPURIOUS_ENABLED: (usize, u32) = (0xf0, 0x1ff);
    const LINT0_EXTERNAL: (usize, u32) = (0x350, 7 << 8);
    const LINT1_NMI: (usize, u32) = (0x360, 4 << 8);
    for (register, value) in [SPURIOUS_ENABLED, LINT0_EXTERNAL, LINT1_NMI] {
        apic.registers[register..register + 4].copy_from_slice(&value.to_le_bytes());
    }
}
