//! A processor of the KVM engine.

use std::sync::Arc;
use std::thread::ThreadId;

use dunlin_x86::cpuid::{Baseline, CpuidContext};
use dunlin_x86::state::CpuState;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use super::kick::Kick;
use super::routes::Interrupts;
use super::{ENGINE, Shared, cpuid, host_error};
use crate::{EngineError, Exit, Vcpu, VcpuExitCounts, VcpuHandle, VcpuId};

/// Why KVM_RUN returned, detached from the run page.
#[derive(Debug, Clone, Copy)]
enum Raised {
    /// The next element of the port access that the run page describes.
    Port,
    MmioRead {
        address: u64,
        size: usize,
    },
    MmioWrite {
        address: u64,
        size: usize,
        data: [u8; 8],
    },
    EndOfInterrupt(u8),
    Shutdown,
    /// A signal or an inter-processor event; perhaps a kick.
    Interrupted,
}

/// The access that the last exit asked for, completed by the next KVM_RUN.
#[derive(Debug, Clone, Copy)]
enum Access {
    None,
    /// Element `index` of a port access (string instructions have several).
    Port {
        index: usize,
    },
    MmioRead {
        size: usize,
    },
    Write,
}

/// The port access in the run page.
#[derive(Debug, Clone, Copy)]
struct PortAccess {
    port: u16,
    write: bool,
    size: usize,
    count: usize,
    /// Where the elements are, from the start of the run page.
    offset: usize,
}

/// Where the guest's clocks lie, as the paravirtual clock's registers have it.
#[derive(Debug, Clone, Copy)]
pub(super) struct GuestClocks {
    pub(super) system_time: u64,
    pub(super) wall: u64,
}

#[derive(Debug)]
pub(super) struct KvmVcpu {
    pub(super) id: VcpuId,
    pub(super) fd: VcpuFd,
    pub(super) shared: Arc<Shared>,
    pub(super) interrupts: Arc<Interrupts>,
    /// The model-specific registers of a state that this kernel knows.
    pub(super) known_msrs: Vec<u32>,
    /// The baseline has XSAVE, so that XCR0 exists.
    pub(super) has_xsave: bool,
    /// Of a restored state that has not run yet; see [`KvmVcpu::place_clocks`].
    pub(super) pending_clocks: Option<GuestClocks>,
    kick: Arc<Kick>,
    thread: Option<ThreadId>,
    access: Access,
    /// An exit that `quiesce` met and `run` must still return.
    ready: Option<Raised>,
    data: [u8; 8],
    counts: VcpuExitCounts,
}

impl KvmVcpu {
    pub(super) fn new(
        id: VcpuId,
        shared: Arc<Shared>,
        interrupts: Arc<Interrupts>,
    ) -> Result<Self, EngineError> {
        let mut fd = shared
            .vm
            .create_vcpu(id.0.into())
            .map_err(host_error("create a vCPU"))?;
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        Ok(Self {
            id,
            fd,
            shared,
            interrupts,
            known_msrs: Vec::new(),
            has_xsave: false,
            pending_clocks: None,
            kick: Arc::new(Kick::new(immediate_exit)),
            thread: None,
            access: Access::None,
            ready: None,
            data: [0; 8],
            counts: VcpuExitCounts::default(),
        })
    }

    /// Sets what CPUID shows, and the clock.
    pub(super) fn set_up(
        &mut self,
        kvm: &Kvm,
        baseline: &Baseline,
        cpus: u32,
    ) -> Result<(), EngineError> {
        let context = CpuidContext {
            apic_id: self.id.0,
            cpus,
            apic_enabled: true,
            osxsave: false,
            xcr0: 1,
            tsc_khz: self.shared.clock.tsc_khz(),
        };
        cpuid::check(kvm, baseline)?;
        self.fd
            .set_cpuid2(&cpuid::table(baseline, context)?)
            .map_err(host_error("set CPUID"))?;
        self.has_xsave = baseline.has("xsave");
        self.find_known_msrs();
        self.set_tsc(0)
    }

    fn stuck(&self, reason: String) -> EngineError {
        let place = match self.fd.get_regs() {
            Ok(regs) => format!("{reason}, at rip {:#x}", regs.rip),
            Err(_) => reason,
        };
        EngineError::Stuck {
            vcpu: self.id.0,
            reason: place,
        }
    }

    fn enter(&mut self) -> Result<Raised, EngineError> {
        let reason = match self.fd.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
                self.access = Access::None;
                return Ok(Raised::Port);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                let size = data.len();
                return Ok(Raised::MmioRead { address, size });
            }
            Ok(VcpuExit::MmioWrite(address, from)) => {
                let (mut data, size) = ([0; 8], from.len());
                data[..size].copy_from_slice(from);
                return Ok(Raised::MmioWrite {
                    address,
                    size,
                    data,
                });
            }
            Ok(VcpuExit::IoapicEoi(vector)) => return Ok(Raised::EndOfInterrupt(vector)),
            Ok(VcpuExit::Shutdown) => return Ok(Raised::Shutdown),
            Ok(VcpuExit::Intr) => return Ok(Raised::Interrupted),
            Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Raised::Interrupted);
            }
            Err(errno) => return Err(host_error("run a vCPU")(errno)),
            Ok(VcpuExit::InternalError) => "KVM reports an internal error".to_owned(),
            Ok(other) => format!("KVM reports {other:?}"),
        };
        Err(self.stuck(reason))
    }

    /// Reads the description of a port access from the run page.
    fn port_access(&mut self) -> PortAccess {
        let run = self.fd.get_kvm_run();
        // SAFETY: called only after an exit for a port access, whose description this member is;
        // all bit patterns are valid for it.
        #[expect(unsafe_code, reason = "the run page holds a union")]
        let io = unsafe { run.__bindgen_anon_1.io };
        PortAccess {
            port: io.port,
            write: u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_OUT,
            size: usize::from(io.size).min(4),
            count: io.count as usize,
            offset: io.data_offset as usize,
        }
    }

    /// The bytes of element `index` of the port access.
    fn port_data(&mut self, access: PortAccess, index: usize) -> &mut [u8] {
        let run: *mut u8 = std::ptr::from_mut(self.fd.get_kvm_run()).cast();
        // SAFETY: the kernel placed `count` elements of `size` bytes at `offset` within the
        // mapping that the run page heads, and `index` is below `count`; the mapping lives as
        // long as `self.fd`, which the result borrows.
        #[expect(unsafe_code, reason = "the data lies behind the run page's structure")]
        unsafe {
            let element = run.add(access.offset + index * access.size);
            std::slice::from_raw_parts_mut(element, access.size)
        }
    }

    /// Writes the answer to the last access into the run page, where KVM_RUN takes it.
    fn answer(&mut self) {
        match std::mem::replace(&mut self.access, Access::None) {
            Access::None | Access::Write => {}
            Access::MmioRead { size } => {
                let data = self.data;
                // SAFETY: the last exit was for this MMIO access, whose member this is.
                #[expect(unsafe_code, reason = "the run page holds a union")]
                let mmio = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio };
                mmio.data[..size].copy_from_slice(&data[..size]);
            }
            Access::Port { index } => {
                let access = self.port_access();
                if !access.write {
                    let data = self.data;
                    self.port_data(access, index)
                        .copy_from_slice(&data[..access.size]);
                }
                if index + 1 < access.count {
                    self.access = Access::Port { index: index + 1 };
                    self.ready = Some(Raised::Port);
                }
            }
        }
    }

    fn port_exit(&mut self) -> Exit<'_> {
        let access = self.port_access();
        let index = match self.access {
            Access::Port { index } => index,
            _ => 0,
        };
        self.access = Access::Port { index };
        let (port, size) = (access.port, access.size);
        if access.write {
            self.counts.port_writes += 1;
            let mut data = [0; 8];
            data[..size].copy_from_slice(self.port_data(access, index));
            self.data = data;
            let data = &self.data[..size];
            Exit::PortWrite { port, data }
        } else {
            self.counts.port_reads += 1;
            self.data = [0xff; 8];
            let data = &mut self.data[..size];
            Exit::PortRead { port, data }
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.forget();
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit<'_>, EngineError> {
        let thread = std::thread::current().id();
        if self.thread != Some(thread) {
            self.kick.enter();
            self.thread = Some(thread);
        }
        self.answer();
        self.place_clocks()?;
        loop {
            let raised = match self.ready.take() {
                Some(raised) => raised,
                None => self.enter()?,
            };
            match raised {
                Raised::Port => return Ok(self.port_exit()),
                Raised::MmioRead { address, size } => {
                    self.counts.mmio_reads += 1;
                    self.access = Access::MmioRead { size };
                    self.data = [0xff; 8];
                    let data = &mut self.data[..size];
                    return Ok(Exit::MmioRead { address, data });
                }
                Raised::MmioWrite {
                    address,
                    size,
                    data,
                } => {
                    self.counts.mmio_writes += 1;
                    self.access = Access::Write;
                    self.data = data;
                    let data = &self.data[..size];
                    return Ok(Exit::MmioWrite { address, data });
                }
                Raised::EndOfInterrupt(vector) => return Ok(Exit::EndOfInterrupt { vector }),
                Raised::Shutdown => return Ok(Exit::Shutdown),
                Raised::Interrupted => {
                    if self.kick.take() {
                        self.counts.kicks += 1;
                        return Ok(Exit::Kicked);
                    }
                }
            }
        }
    }

    fn quiesce(&mut self) -> Result<(), EngineError> {
        let begun = !matches!(self.access, Access::None);
        self.answer();
        if self.ready.is_none() && begun {
            let kick = Arc::clone(&self.kick);
            match kick.without_entering(|| self.enter())? {
                Raised::Interrupted => {}
                raised => self.ready = Some(raised),
            }
        }
        match self.ready {
            None => Ok(()),
            Some(_) => Err(EngineError::Stuck {
                vcpu: self.id.0,
                reason: format!("engine \"{ENGINE}\" is amid a string or split access; run on"),
            }),
        }
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        self.kick.clone()
    }

    fn save(&mut self) -> Result<CpuState, EngineError> {
        self.read_state()
    }

    fn restore(&mut self, state: &CpuState) -> Result<(), EngineError> {
        let before = self.read_state()?;
        let result = self.write_state(state);
        if result.is_err() {
            self.write_state(&before)?;
        }
        result
    }

    fn exit_counts(&self) -> VcpuExitCounts {
        self.counts
    }
}
