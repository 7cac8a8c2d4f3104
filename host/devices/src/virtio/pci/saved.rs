//! The saved state of a device on PCI: registers, queues, configuration, the device's own.

use dunlin_guest::{RestoreError, SavedState};

use super::registers::{Phase, QueueRegisters, Registers, status};
use super::{Front, VirtioPci};
use crate::lock;
use crate::pci::ConfigState;
use crate::virtio::{QueueLayout, QueuePosition};

/// Saved state of [`VirtioPci`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct VirtioPciState {
    /// Configuration space with the MSI-X table.
    #[prost(message, optional, tag = "1")]
    pub config: Option<ConfigState>,
    /// Device status, without the bit that asks for a reset.
    #[prost(uint32, tag = "2")]
    pub status: u32,
    /// Features that the driver wrote.
    #[prost(uint64, tag = "3")]
    pub driver_features: u64,
    /// Register of the same name.
    #[prost(uint32, tag = "4")]
    pub device_feature_select: u32,
    /// Register of the same name.
    #[prost(uint32, tag = "5")]
    pub driver_feature_select: u32,
    /// Register of the same name.
    #[prost(uint32, tag = "6")]
    pub queue_select: u32,
    /// Vector for configuration changes.
    #[prost(uint32, tag = "7")]
    pub config_vector: u32,
    /// The queues in order.
    #[prost(message, repeated, tag = "8")]
    pub queues: Vec<QueueState>,
    /// Interrupt status register.
    #[prost(uint32, tag = "9")]
    pub interrupt_status: u32,
    /// The driver broke a rule and has not reset the device yet.
    #[prost(bool, tag = "10")]
    pub needs_reset: bool,
    /// Device-specific configuration.
    #[prost(bytes = "vec", tag = "11")]
    pub device_config: Vec<u8>,
    /// The device's own state.
    #[prost(bytes = "vec", tag = "12")]
    pub device: Vec<u8>,
}

/// Saved state of one queue.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct QueueState {
    /// Number of descriptors.
    #[prost(uint32, tag = "1")]
    pub size: u32,
    /// Guest physical address of the descriptor table.
    #[prost(uint64, tag = "2")]
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    #[prost(uint64, tag = "3")]
    pub available: u64,
    /// Guest physical address of the used ring.
    #[prost(uint64, tag = "4")]
    pub used: u64,
    /// Did the driver enable it?
    #[prost(bool, tag = "5")]
    pub enabled: bool,
    /// MSI-X vector; one that does not exist becomes "no vector".
    #[prost(uint32, tag = "6")]
    pub vector: u32,
    /// Next entry of the available ring.
    #[prost(uint32, tag = "7")]
    pub next_available: u32,
    /// Next entry of the used ring.
    #[prost(uint32, tag = "8")]
    pub next_used: u32,
}

/// A saved state that fits the device.
struct Checked {
    registers: Registers,
    positions: Vec<QueuePosition>,
    queue_vectors: Vec<u16>,
    config_vector: u16,
    interrupt_status: u8,
}

impl VirtioPci {
    pub(super) fn state(&self) -> VirtioPciState {
        let Self {
            name: _,
            device_type: _,
            memory: _,
            config,
            access: _,
            front,
            device_config,
            interrupt,
            doorbells: _,
            worker,
            log_limit: _,
        } = self;
        let Front {
            registers,
            paused: _,
        } = &*lock(front);
        let Registers {
            offered: _,
            status,
            driver_features,
            device_feature_select,
            driver_feature_select,
            queue_select,
            queues,
        } = registers;
        let needs_reset = interrupt.needs_reset();
        let (positions, device) = worker.with(|work| {
            let positions: Vec<QueuePosition> = match &work.queues {
                // Queues whose rules were broken are not used again, whatever their positions.
                Some(queues) if !needs_reset => queues
                    .iter()
                    .map(|queue| queue.map(|queue| queue.position()).unwrap_or_default())
                    .collect(),
                _ => vec![QueuePosition::default(); queues.len()],
            };
            (positions, work.device.save())
        });
        let queues = queues.iter().zip(positions).enumerate();
        VirtioPciState {
            config: Some(lock(config).save()),
            status: u32::from(*status),
            driver_features: *driver_features,
            device_feature_select: *device_feature_select,
            driver_feature_select: *driver_feature_select,
            queue_select: u32::from(*queue_select),
            config_vector: u32::from(interrupt.config_vector()),
            queues: queues
                .map(|(index, (queue, position))| {
                    queue_state(queue, position, interrupt.queue_vector(index))
                })
                .collect(),
            interrupt_status: u32::from(interrupt.status()),
            needs_reset,
            device_config: device_config.bytes(),
            device,
        }
    }

    pub(super) fn set_state(
        &self,
        state: VirtioPciState,
        of: &SavedState,
    ) -> Result<(), RestoreError> {
        let mut front = lock(&self.front);
        let checked = check(&front.registers, &state, of)?;
        let Some(config) = &state.config else {
            return Err(of.invalid("configuration space is missing"));
        };
        if state.device_config.len() != self.device_config.bytes().len() {
            return Err(of.invalid("device configuration has another size"));
        }
        let running = checked.registers.phase() == Phase::Running;
        let queues = if running && !state.needs_reset {
            let queues = self.queues(&checked.registers, &checked.positions);
            Some(queues.map_err(|error| of.invalid(error.to_string()))?)
        } else {
            None
        };
        let features = checked.registers.driver_features;
        lock(&self.config).restore(config, of)?;
        let restored: Result<(), String> = self.worker.park(|work| {
            work.queues = None;
            work.device.reset();
            if running {
                work.device.activate(features);
                work.device.restore(features, &state.device)?;
                work.queues = queues;
            }
            Ok(())
        });
        if let Err(reason) = restored {
            self.worker.park(|work| work.device.reset());
            front.registers.reset();
            self.interrupt.reset();
            return Err(of.invalid(reason));
        }
        self.device_config.update(0, &state.device_config);
        self.interrupt.set_status(checked.interrupt_status);
        self.interrupt.set_needs_reset(state.needs_reset);
        self.interrupt.set_config_vector(checked.config_vector);
        for (index, vector) in checked.queue_vectors.into_iter().enumerate() {
            self.interrupt.set_queue_vector(index, vector);
        }
        front.registers = checked.registers;
        Ok(())
    }
}

fn queue_state(queue: &QueueRegisters, position: QueuePosition, vector: u16) -> QueueState {
    let QueueRegisters {
        limit: _,
        layout,
        enabled,
    } = *queue;
    let QueueLayout {
        size,
        descriptors,
        available,
        used,
    } = layout;
    let QueuePosition {
        next_available,
        next_used,
    } = position;
    QueueState {
        size: u32::from(size),
        descriptors,
        available,
        used,
        enabled,
        vector: u32::from(vector),
        next_available: u32::from(next_available),
        next_used: u32::from(next_used),
    }
}

/// Does the state fit a device with these registers?
fn check(
    own: &Registers,
    state: &VirtioPciState,
    of: &SavedState,
) -> Result<Checked, RestoreError> {
    let status = u8::try_from(state.status).ok();
    let Some(status) = status.filter(|status| status & !status::WRITABLE == 0) else {
        return Err(of.invalid(format!("device status {:#x}", state.status)));
    };
    if Phase::of(status) != Phase::Negotiating && !own.accepts(state.driver_features) {
        let features = state.driver_features & !own.offered;
        return Err(of.invalid(format!("features {features:#x} are not offered here")));
    }
    if state.queues.len() != own.queues.len() {
        return Err(of.invalid(format!("expected {} queues", own.queues.len())));
    }
    let mut checked = Checked {
        registers: Registers {
            offered: own.offered,
            status,
            driver_features: state.driver_features,
            device_feature_select: state.device_feature_select,
            driver_feature_select: state.driver_feature_select,
            queue_select: small(state.queue_select, of)?,
            queues: Vec::new(),
        },
        positions: Vec::new(),
        queue_vectors: Vec::new(),
        config_vector: small(state.config_vector, of)?,
        interrupt_status: state.interrupt_status as u8,
    };
    for (own, saved) in own.queues.iter().zip(&state.queues) {
        let (queue, position) = check_queue(own.limit, saved, of)?;
        checked.registers.queues.push(queue);
        checked.positions.push(position);
        checked.queue_vectors.push(small(saved.vector, of)?);
    }
    Ok(checked)
}

/// Addresses are checked when the queue is built.
fn check_queue(
    limit: u16,
    state: &QueueState,
    of: &SavedState,
) -> Result<(QueueRegisters, QueuePosition), RestoreError> {
    let QueueState {
        size,
        descriptors,
        available,
        used,
        enabled,
        vector: _,
        next_available,
        next_used,
    } = *state;
    let size = small(size, of)?;
    if !size.is_power_of_two() || size > limit {
        return Err(of.invalid(format!("queue size {size} is not offered here")));
    }
    let position = QueuePosition {
        next_available: small(next_available, of)?,
        next_used: small(next_used, of)?,
    };
    if position.next_available.wrapping_sub(position.next_used) > size {
        return Err(of.invalid("more buffers are outstanding than the queue has"));
    }
    let layout = QueueLayout {
        size,
        descriptors,
        available,
        used,
    };
    let queue = QueueRegisters {
        limit,
        layout,
        enabled,
    };
    Ok((queue, position))
}

fn small(value: u32, of: &SavedState) -> Result<u16, RestoreError> {
    u16::try_from(value).or(Err(of.invalid(format!("{value} in a 16-bit register"))))
}
