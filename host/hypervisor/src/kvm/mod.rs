//! The engine that runs the host's processor, through `/dev/kvm`.
//!
//! The local APICs are the kernel's, the I/O APIC is ours ("split irqchip"), so every interrupt
//! reaches the kernel as a message. [`KvmVm`] owns the VM's descriptor and memory slots.

mod convert;
mod cpuid;
mod kick;
mod ring0;
mod routes;
mod state;
mod vcpu;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use dunlin_guest::{
    Doorbell, InterruptLine, Memory, MsiSink, PAGE_SIZE, PageIndex, VectoredController,
};
use dunlin_x86::cpuid::Baseline;
use dunlin_x86::kvmclock::GuestClock;
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};

pub(crate) use cpuid::{check, missing_features};
pub use ring0::measure_ring0;

use crate::soft::host_tsc_khz;
use crate::{Engine, EngineError, Vcpu, VcpuId, Vm};
use routes::Interrupts;
use vcpu::KvmVcpu;

const ENGINE: &str = "kvm";

/// Where KVM keeps three pages for real mode on processors that cannot run it: above all that the
/// address map names.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Pins that the I/O APIC in user space has: the routes that KVM scans for level interrupts.
const IOAPIC_PINS: u64 = 24;

/// Turns what the kernel said about `action` into an error.
fn host_error<E: Into<io::Error>>(action: &'static str) -> impl Fn(E) -> EngineError {
    move |source| EngineError::Host {
        engine: ENGINE,
        action,
        source: source.into(),
    }
}

/// Opens `/dev/kvm`, or says what to do about it.
pub(crate) fn open() -> Result<Kvm, EngineError> {
    let unavailable = |reason: String| EngineError::Unavailable {
        engine: ENGINE,
        reason,
    };
    let kvm = Kvm::new().map_err(|errno| {
        let error = io::Error::from(errno);
        unavailable(match error.kind() {
            io::ErrorKind::NotFound => {
                "there is no /dev/kvm: the processor's virtualization is off, or this is a VM \
                 without nested virtualization"
                    .to_owned()
            }
            io::ErrorKind::PermissionDenied => {
                "no permission for /dev/kvm: join its group (usually \"kvm\")".to_owned()
            }
            _ => format!("/dev/kvm does not open: {error}"),
        })
    })?;
    let needed = [
        (Cap::SplitIrqchip, "split interrupt controllers"),
        (Cap::X2ApicApi, "32-bit APIC IDs"),
        (Cap::ImmediateExit, "immediate exits"),
        (Cap::SignalMsi, "message-signalled interrupts"),
        (Cap::Ioeventfd, "event descriptors for I/O"),
    ];
    for (cap, name) in needed {
        if !kvm.check_extension(cap) {
            return Err(unavailable(format!("the host's KVM lacks {name}")));
        }
    }
    Ok(kvm)
}

/// The frequency of the host's time-stamp counter in kHz, if the kernel tells it.
pub(crate) fn tsc_khz() -> Option<u64> {
    let kvm = Kvm::new().ok()?;
    if !kvm.check_extension(Cap::GetTscKhz) {
        return None;
    }
    let khz = kvm.create_vm().ok()?.create_vcpu(0).ok()?.get_tsc_khz();
    khz.ok().map(u64::from).filter(|khz| *khz != 0)
}

/// A slot of guest memory.
#[derive(Debug, Clone, Copy)]
struct Slot {
    region: kvm_userspace_memory_region,
    /// First page, by RAM offset.
    first: PageIndex,
}

/// What a VM's processors share.
#[derive(Debug)]
struct Shared {
    // Dropped before `memory`: the slots refer to its mapping.
    vm: VmFd,
    memory: Memory,
    clock: GuestClock,
    /// The kernel's paravirtual clock was set from a saved state.
    kvmclock_resumed: Mutex<bool>,
}

/// A VM on the host's processor.
#[derive(Debug)]
pub struct KvmVm {
    shared: Arc<Shared>,
    kvm: Kvm,
    slots: Vec<Slot>,
    interrupts: Arc<Interrupts>,
    baseline: &'static Baseline,
    cpus: u32,
}

impl KvmVm {
    /// A VM with `cpus` processors of `baseline` over `memory`.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`] when the host cannot, [`EngineError::Host`] when it fails.
    pub fn new(
        memory: &Memory,
        baseline: &'static Baseline,
        cpus: u32,
    ) -> Result<Self, EngineError> {
        kick::install_handler()?;
        let kvm = open()?;
        check(&kvm, baseline)?;
        let vm = kvm.create_vm().map_err(host_error("create a VM"))?;
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(host_error("place its real-mode pages"))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(host_error("place its identity map"))?;
        enable(&vm, KVM_CAP_SPLIT_IRQCHIP, IOAPIC_PINS)?;
        let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(&vm, KVM_CAP_X2APIC_API, x2apic.into())?;
        let shared = Arc::new(Shared {
            vm,
            memory: memory.clone(),
            clock: GuestClock::new(host_tsc_khz()),
            kvmclock_resumed: Mutex::new(false),
        });
        let this = Self {
            slots: slots(memory),
            interrupts: Arc::new(Interrupts::new(Arc::clone(&shared))),
            shared,
            kvm,
            baseline,
            cpus,
        };
        this.set_slots(0)?;
        Ok(this)
    }

    fn set_slots(&self, flags: u32) -> Result<(), EngineError> {
        for slot in &self.slots {
            let region = kvm_userspace_memory_region {
                flags,
                ..slot.region
            };
            // SAFETY: the region lies in the mapping of `memory`, which `shared` keeps for as
            // long as the VM's descriptor; guest RAM is shared with the guest by design.
            #[expect(unsafe_code, reason = "the kernel maps the memory into the guest")]
            unsafe { self.shared.vm.set_user_memory_region(region) }
                .map_err(host_error("map guest memory"))?;
        }
        Ok(())
    }
}

fn slots(memory: &Memory) -> Vec<Slot> {
    memory
        .regions()
        .enumerate()
        .filter_map(|(index, region)| {
            let first = PageIndex(region.offset / PAGE_SIZE);
            let host = memory.host_page(first)?;
            Some(Slot {
                region: kvm_userspace_memory_region {
                    slot: index as u32,
                    flags: 0,
                    guest_phys_addr: region.start,
                    memory_size: region.size,
                    userspace_addr: host.as_ptr() as u64,
                },
                first,
            })
        })
        .collect()
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> Result<(), EngineError> {
    let mut request = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    request.args[0] = argument;
    vm.enable_cap(&request)
        .map_err(host_error("enable what the machine needs of KVM"))
}

impl Vm for KvmVm {
    fn engine(&self) -> Engine {
        Engine::Kvm
    }

    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>, EngineError> {
        if id.0 >= self.cpus {
            return Err(EngineError::InvalidState {
                vcpu: id.0,
                reason: format!("the VM has {} vCPUs", self.cpus),
            });
        }
        let mut vcpu = KvmVcpu::new(id, Arc::clone(&self.shared), Arc::clone(&self.interrupts))?;
        vcpu.set_up(&self.kvm, self.baseline, self.cpus)?;
        Ok(Box::new(vcpu))
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        self.interrupts.clone()
    }

    fn connect_controller(
        &self,
        _controller: Arc<dyn VectoredController>,
    ) -> Result<Arc<dyn InterruptLine>, EngineError> {
        Err(EngineError::Unavailable {
            engine: "kvm",
            reason: "it does not carry the interrupts of legacy controllers (--legacy), engine \
                     \"soft\" does"
                .to_owned(),
        })
    }

    fn add_doorbell(&self, doorbell: &Doorbell) -> Result<(), EngineError> {
        let address = IoEventAddress::Mmio(doorbell.address);
        self.shared
            .vm
            .register_ioevent(&doorbell.event, &address, NoDatamatch)
            .map_err(host_error("add a doorbell"))
    }

    fn remove_doorbell(&self, doorbell: &Doorbell) -> Result<(), EngineError> {
        let address = IoEventAddress::Mmio(doorbell.address);
        self.shared
            .vm
            .unregister_ioevent(&doorbell.event, &address, NoDatamatch)
            .map_err(host_error("remove a doorbell"))
    }

    fn start_dirty_tracking(&self) -> Result<(), EngineError> {
        self.set_slots(KVM_MEM_LOG_DIRTY_PAGES)
    }

    fn collect_dirty(&self) -> Result<(), EngineError> {
        let log = self.shared.memory.dirty_log();
        for slot in &self.slots {
            // The kernel clears its bits and write-protects the pages before it returns: what is
            // written from now on is in the next call's result.
            let words = self
                .shared
                .vm
                .get_dirty_log(slot.region.slot, slot.region.memory_size as usize)
                .map_err(host_error("read which pages the guest wrote"))?;
            for (index, word) in words.into_iter().enumerate() {
                let mut rest = word;
                while rest != 0 {
                    let bit = rest.trailing_zeros();
                    rest &= rest - 1;
                    let page = index as u64 * 64 + u64::from(bit);
                    log.mark(PageIndex(slot.first.0 + page));
                }
            }
        }
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> Result<(), EngineError> {
        self.set_slots(0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
