//! How a virtio device interrupts its driver (virtio 1.2, 4.1.4.5 and 4.1.5.1.3).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use crate::pci::Msix;

/// "No vector": the driver wants no interrupt for this event.
pub const NO_VECTOR: u16 = 0xffff;

/// Bit of the interrupt status register: a queue was used.
const STATUS_QUEUE: u8 = 1;
/// Bit of the interrupt status register: the configuration changed.
const STATUS_CONFIG: u8 = 2;

/// The interrupts of one device; shared by its registers and its worker.
#[derive(Debug)]
pub struct Interrupt {
    msix: Arc<Msix>,
    status: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    needs_reset: AtomicBool,
}

impl Interrupt {
    /// Interrupts for `queues` queues, none of which has a vector yet.
    pub fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            msix,
            status: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            needs_reset: AtomicBool::new(false),
        }
    }

    /// The MSI-X table.
    pub fn msix(&self) -> &Arc<Msix> {
        &self.msix
    }

    /// Tells the driver that a queue has used buffers.
    pub fn signal_queue(&self, queue: usize) {
        self.status.fetch_or(STATUS_QUEUE, Ordering::Release);
        if let Some(vector) = self.queue_vectors.get(queue) {
            self.msix.trigger(vector.load(Ordering::Acquire));
        }
    }

    /// Tells the driver that configuration or status changed.
    pub fn signal_config(&self) {
        self.status.fetch_or(STATUS_CONFIG, Ordering::Release);
        self.msix
            .trigger(self.config_vector.load(Ordering::Acquire));
    }

    /// The device cannot go on until the driver resets it.
    pub fn fail(&self) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.signal_config();
        }
    }

    /// Did the device [fail](Self::fail)?
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn set_needs_reset(&self, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// The interrupt status register; reading clears it.
    pub fn take_status(&self) -> u8 {
        self.status.swap(0, Ordering::AcqRel)
    }

    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn set_status(&self, status: u8) {
        let valid = status & (STATUS_QUEUE | STATUS_CONFIG);
        self.status.store(valid, Ordering::Release);
    }

    /// The vector for configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    /// Sets the vector for configuration changes; one that does not exist becomes "no vector".
    pub fn set_config_vector(&self, vector: u16) {
        let vector = self.existing(vector);
        self.config_vector.store(vector, Ordering::Release);
    }

    /// The vector of a queue.
    pub fn queue_vector(&self, queue: usize) -> u16 {
        let vector = self.queue_vectors.get(queue);
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// Sets the vector of a queue; one that does not exist becomes "no vector".
    pub fn set_queue_vector(&self, queue: usize, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(queue) {
            slot.store(self.existing(vector), Ordering::Release);
        }
    }

    /// What a reset of the device does: no vectors, no status.
    pub fn reset(&self) {
        let Self {
            msix: _,
            status,
            config_vector,
            queue_vectors,
            needs_reset,
        } = self;
        status.store(0, Ordering::Release);
        config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        needs_reset.store(false, Ordering::Release);
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }
}
