//! The PCI transport (virtio 1.2, 4.1): one BAR with registers, doorbells and the MSI-X table.

mod layout;
mod registers;
mod saved;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use dunlin_guest::{Memory, MsiSink, RestoreError, SavedState};
use vmm_sys_util::eventfd::EventFd;

use self::layout::{Access, BAR, MAX_QUEUES, Target};
use self::registers::{Action, Phase, Registers};
use super::log_limit::LogLimit;
use super::worker::{Work, Worker};
use super::{
    DeviceConfig, DeviceType, Interrupt, Queue, QueuePosition, Queues, RingError, Suppression,
    VirtioDevice, feature,
};
use crate::component::{Component, Reach};
use crate::lock;
use crate::pci::{Address, BarDoorbell, ConfigError, ConfigSpace, Function, Identity, Msix};

pub use saved::{QueueState, VirtioPciState};

/// PCI vendor of virtio devices.
const VENDOR: u16 = 0x1af4;
/// Modern device IDs are this base plus the virtio device ID.
const DEVICE_BASE: u16 = 0x1040;

/// Version of the saved state's schema.
const VERSION: u32 = 1;

/// Why a device could not be put on PCI.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// The device has more queues than the registers can carry.
    #[error("device \"{name}\" has {queues} queues, more than {MAX_QUEUES}")]
    TooManyQueues {
        /// Name of the component.
        name: String,
        /// Its queues.
        queues: usize,
    },
    /// Configuration space has no room.
    #[error("failed to describe device \"{name}\"")]
    Config {
        /// Name of the component.
        name: String,
        /// What does not fit.
        #[source]
        source: ConfigError,
    },
    /// The host gave no descriptor or thread.
    #[error("failed to start the worker of device \"{name}\"")]
    Worker {
        /// Name of the component.
        name: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

/// What the vCPUs see, and whether the machine runs.
#[derive(Debug)]
struct Front {
    registers: Registers,
    paused: bool,
}

/// A virtio device as a PCI function. Built paused: [`Component::resume`] lets it run.
#[derive(Debug)]
pub struct VirtioPci {
    name: String,
    device_type: DeviceType,
    memory: Memory,
    config: Mutex<ConfigSpace>,
    /// Offset of the capability for access through configuration space.
    access: u16,
    /// Held while the worker finishes a round for a reset: only the driver that resets, and other
    /// accesses to the same device, wait for it. The worker itself never takes it.
    front: Mutex<Front>,
    device_config: Arc<DeviceConfig>,
    interrupt: Arc<Interrupt>,
    doorbells: Vec<Arc<EventFd>>,
    worker: Worker,
    log_limit: LogLimit,
}

impl VirtioPci {
    /// Puts `device` on PCI. Its worker starts parked.
    ///
    /// # Errors
    /// [`VirtioPciError`] when the device does not fit or the host gives no thread.
    pub fn new(
        address: Address,
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        sink: Arc<dyn MsiSink>,
    ) -> Result<Arc<Self>, VirtioPciError> {
        let name = format!("pci/{address}");
        let sizes = device.queue_sizes();
        let queues = sizes.len();
        if queues > MAX_QUEUES {
            return Err(VirtioPciError::TooManyQueues { name, queues });
        }
        let device_type = device.device_type();
        let device_config = device.config();
        let msix = Msix::new(queues as u16 + 1, layout::MSIX, sink);
        let described = config_space(device_type, queues, &device_config, &msix);
        let (config, access) = described.map_err(|source| VirtioPciError::Config {
            name: name.clone(),
            source,
        })?;
        let offered = device.features() | feature::ALL;
        let interrupt = Arc::new(Interrupt::new(msix, queues));
        let start = || {
            let event = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new);
            let doorbells = (0..queues).map(event).collect::<Result<Vec<_>, _>>()?;
            let worker = Worker::new(&name, device, doorbells.clone(), Arc::clone(&interrupt))?;
            Ok((doorbells, worker))
        };
        let (doorbells, worker) = start().map_err(|source| VirtioPciError::Worker {
            name: name.clone(),
            source,
        })?;
        Ok(Arc::new(Self {
            name,
            device_type,
            memory,
            config: Mutex::new(config),
            access,
            front: Mutex::new(Front {
                registers: Registers::new(offered, &sizes),
                paused: true,
            }),
            device_config,
            interrupt,
            doorbells,
            worker,
            log_limit: LogLimit::default(),
        }))
    }

    /// What the device is.
    pub fn device_type(&self) -> DeviceType {
        self.device_type
    }

    /// Changes the device-specific configuration and tells the driver.
    pub fn change_config(&self, offset: usize, data: &[u8]) {
        self.device_config.update(offset, data);
        self.interrupt.signal_config();
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut front = lock(&self.front);
        match front.registers.write(offset, data, &self.interrupt) {
            Action::None => {}
            Action::Reset => {
                self.worker.park(|work| {
                    work.queues = None;
                    work.device.reset();
                });
                front.registers.reset();
                self.interrupt.reset();
            }
            Action::Activate => self.activate(&front),
        }
    }

    fn activate(&self, front: &Front) {
        let positions = vec![QueuePosition::default(); front.registers.queues.len()];
        match self.queues(&front.registers, &positions) {
            Ok(queues) => {
                let features = front.registers.driver_features;
                let start = |work: &mut Work| {
                    work.queues = Some(queues);
                    work.device.activate(features);
                };
                if front.paused {
                    self.worker.with(start);
                } else {
                    self.worker.run(start);
                }
            }
            Err(error) => {
                if self.log_limit.allows() {
                    tracing::warn!(device = self.name, %error, "driver set up an impossible queue");
                }
                self.interrupt.fail();
            }
        }
    }

    /// The enabled queues, going on from the positions.
    fn queues(
        &self,
        registers: &Registers,
        positions: &[QueuePosition],
    ) -> Result<Queues, RingError> {
        let suppression = match registers.driver_features & feature::EVENT_INDEX {
            0 => Suppression::Flags,
            _ => Suppression::EventIndex,
        };
        let mut queues = Vec::with_capacity(registers.queues.len());
        for (queue, position) in registers.queues.iter().zip(positions) {
            queues.push(if queue.enabled {
                let memory = self.memory.clone();
                Some(Queue::new(memory, queue.layout, *position, suppression)?)
            } else {
                None
            });
        }
        let interrupt = Arc::clone(&self.interrupt);
        Ok(Queues::new(queues, interrupt, self.worker.waiting()))
    }

    fn ring(&self, queue: usize) {
        if let Some(event) = self.doorbells.get(queue) {
            // A full counter means that the worker has not looked yet, and will.
            let _ = event.write(1);
        }
    }

    /// The window through configuration space, if an access there means its data register.
    fn access_window(&self, offset: u16, length: usize) -> Option<Access> {
        let data = usize::from(self.access + Access::DATA);
        let start = usize::from(offset);
        if start >= data + 4 || start + length <= data {
            return None;
        }
        Access::of(&lock(&self.config), self.access)
    }
}

fn config_space(
    device_type: DeviceType,
    queues: usize,
    device_config: &DeviceConfig,
    msix: &Arc<Msix>,
) -> Result<(ConfigSpace, u16), ConfigError> {
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device_type.id(),
        class: device_type.class(),
        revision: 1,
        subsystem_vendor: VENDOR,
        subsystem: DEVICE_BASE + device_type.id(),
    });
    let access = layout::describe(&mut config, queues, device_config.bytes().len())?;
    config.add_msix(Arc::clone(msix))?;
    Ok((config, access))
}

impl Function for VirtioPci {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if self.interrupt.msix().read(bar, offset, data) {
            return;
        }
        data.fill(0);
        match Target::of(offset) {
            Target::Common(offset) => {
                let image = {
                    let front = lock(&self.front);
                    front.registers.image(&self.interrupt, &self.device_config)
                };
                let from = image.iter().skip(offset as usize);
                data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            }
            Target::InterruptStatus => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.interrupt.take_status();
                }
            }
            Target::Device(offset) => self.device_config.read(offset, data),
            Target::Notify(_) | Target::Nothing => {}
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if self.interrupt.msix().write(bar, offset, data) {
            return;
        }
        match Target::of(offset) {
            Target::Common(offset) => self.write_common(offset, data),
            Target::Notify(queue) => self.ring(queue),
            Target::InterruptStatus | Target::Device(_) | Target::Nothing => {}
        }
    }

    fn doorbells(&self) -> Vec<BarDoorbell> {
        let doorbell = |(queue, event): (usize, &Arc<EventFd>)| BarDoorbell {
            bar: BAR,
            offset: layout::doorbell_offset(queue),
            event: Arc::clone(event),
        };
        self.doorbells.iter().enumerate().map(doorbell).collect()
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if let Some(Access { offset, length }) = self.access_window(offset, data.len()) {
            let mut value = [0; 4];
            self.bar_read(BAR, offset, &mut value[..length]);
            let register = usize::from(self.access + Access::DATA);
            lock(&self.config).put(register, &value);
        }
        lock(&self.config).read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        lock(&self.config).write(offset, data);
        if let Some(Access { offset, length }) = self.access_window(offset, data.len()) {
            let mut value = [0; 4];
            lock(&self.config).read(self.access + Access::DATA, &mut value);
            self.bar_write(BAR, offset, &value[..length]);
        }
    }
}

impl Component for VirtioPci {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn pause(&self, reach: Reach) {
        // A driver that becomes ready after this finds the machine paused and does not start the
        // worker; so the registers need not stay locked while the device flushes.
        lock(&self.front).paused = true;
        self.worker.park(|work| work.device.pause(reach));
    }

    fn resume(&self) {
        let mut front = lock(&self.front);
        front.paused = false;
        if front.registers.phase() == Phase::Running {
            self.worker.run(|work| {
                if let Some(queues) = &work.queues {
                    queues.signal_again();
                }
            });
        }
    }

    fn save(&self) -> SavedState {
        let kind = self.device_type.saved_kind();
        SavedState::encode(&self.name, kind, VERSION, &self.state())
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        let decoded = state.decode(self.device_type.saved_kind(), VERSION)?;
        self.set_state(decoded, state)
    }
}
