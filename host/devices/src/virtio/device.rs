//! The contract between a virtio device and what carries it: the registers in front, the worker
//! behind.

use std::fmt::Debug;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::interrupt::Interrupt;
use super::ring::{Queue, RingError};
use crate::component::Reach;
use crate::lock;

/// What kind of device it is (virtio 1.2, chapter 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceType {
    /// Network card.
    Net,
    /// Block device.
    Block,
    /// Console.
    Console,
    /// Entropy source.
    Entropy,
}

impl DeviceType {
    /// The virtio device ID.
    pub fn id(self) -> u16 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Console => 3,
            Self::Entropy => 4,
        }
    }

    /// PCI class, sub-class and programming interface: `0xCCSSPP`.
    pub fn class(self) -> u32 {
        match self {
            Self::Net => 0x02_00_00,
            Self::Block => 0x01_80_00,
            Self::Console => 0x07_80_00,
            Self::Entropy => 0xff_00_00,
        }
    }

    /// The kind of its saved state.
    pub fn saved_kind(self) -> &'static str {
        match self {
            Self::Net => "virtio-net",
            Self::Block => "virtio-blk",
            Self::Console => "virtio-console",
            Self::Entropy => "virtio-rng",
        }
    }
}

/// The device-specific configuration that a driver reads; shared between the registers and whoever
/// changes it. Drivers cannot write any field of the devices here.
#[derive(Debug)]
pub struct DeviceConfig {
    bytes: Mutex<Vec<u8>>,
    generation: AtomicU8,
}

impl DeviceConfig {
    /// A configuration with these bytes, as the device's structure in the specification has them.
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            generation: AtomicU8::new(0),
        })
    }

    /// A load by the driver; beyond the end there are zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = lock(&self.bytes);
        for (at, byte) in (offset..).zip(data) {
            let value = usize::try_from(at).ok().and_then(|at| bytes.get(at));
            *byte = value.copied().unwrap_or(0);
        }
    }

    /// Changes bytes from `offset` on. Tell the driver by an interrupt afterwards.
    pub fn update(&self, offset: usize, data: &[u8]) {
        let mut bytes = lock(&self.bytes);
        for (byte, value) in bytes.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Changes with each [`DeviceConfig::update`], so that a driver notices that it read halves.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }
}

/// The queues of a running device and the way to its driver.
#[derive(Debug)]
pub struct Queues {
    /// A queue that the driver has not enabled is missing.
    queues: Vec<Option<Queue>>,
    interrupt: Arc<Interrupt>,
    /// How many threads want the device.
    waiting: Arc<AtomicUsize>,
}

impl Queues {
    pub(super) fn new(
        queues: Vec<Option<Queue>>,
        interrupt: Arc<Interrupt>,
        waiting: Arc<AtomicUsize>,
    ) -> Self {
        Self {
            queues,
            interrupt,
            waiting,
        }
    }

    /// Queue `index`, if the driver enabled it.
    pub fn get(&mut self, index: usize) -> Option<&mut Queue> {
        self.queues.get_mut(index)?.as_mut()
    }

    /// Interrupts the driver if it wants to hear of what was used in queue `index`.
    ///
    /// # Errors
    /// [`RingError`] when the queue's rings are not in RAM.
    pub fn signal(&mut self, index: usize) -> Result<(), RingError> {
        if let Some(queue) = self.get(index)
            && queue.needs_interrupt()?
        {
            self.interrupt.signal_queue(index);
        }
        Ok(())
    }

    /// Interrupts for all that was ever used: after a move, since an interrupt may be lost.
    pub(super) fn signal_again(&self) {
        for (index, queue) in self.queues.iter().enumerate() {
            if queue.as_ref().is_some_and(Queue::has_used) {
                self.interrupt.signal_queue(index);
            }
        }
    }

    /// Somebody waits for this round to end (a pause, a reset): finish the request at hand only.
    pub fn should_yield(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Option<&Queue>> {
        self.queues.iter().map(Option::as_ref)
    }
}

/// What a device waits for after a round, besides its doorbells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wait {
    /// Its back end's descriptor is readable.
    pub readable: bool,
    /// So much time has passed. Zero: the device has more to do at once.
    pub retry_after: Option<Duration>,
}

impl Wait {
    /// The device has more to do at once.
    pub const MORE: Self = Self {
        readable: false,
        retry_after: Some(Duration::ZERO),
    };

    /// Waits for what any of both waits for.
    pub fn or(self, other: Self) -> Self {
        let retries = [self.retry_after, other.retry_after];
        Self {
            readable: self.readable || other.readable,
            retry_after: retries.into_iter().flatten().min(),
        }
    }
}

/// A device without its registers. Lives in its worker, which calls it from one thread at a time.
pub trait VirtioDevice: Debug + Send {
    /// What it is.
    fn device_type(&self) -> DeviceType;

    /// The feature bits of the device's type that it offers.
    fn features(&self) -> u64;

    /// The largest size of each queue, in order.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The device-specific configuration.
    fn config(&self) -> Arc<DeviceConfig>;

    /// The driver is ready and has accepted `features`.
    fn activate(&mut self, features: u64);

    /// The driver forgets the device: everything as after construction, except the back end.
    fn reset(&mut self);

    /// One bounded round: serves what waits in the queues and in the back end, and interrupts.
    /// Chains that cannot be served now are given back before it returns.
    ///
    /// # Errors
    /// [`RingError`] when the driver broke the rules: the device stops until it is reset.
    fn process(&mut self, queues: &mut Queues) -> Result<Wait, RingError>;

    /// The descriptor that [`Wait::readable`] speaks of.
    fn back_end(&self) -> Option<BorrowedFd<'_>>;

    /// The machine pauses. Where it may go on on another host, make durable what the driver
    /// believes to be.
    fn pause(&mut self, reach: Reach);

    /// The device's own state, encoded; queues, features and configuration are not part of it.
    fn save(&self) -> Vec<u8>;

    /// Takes over a state that `save` made; the driver had accepted `features`.
    ///
    /// # Errors
    /// What is wrong with the state; the device is unchanged or reset then.
    fn restore(&mut self, features: u64, state: &[u8]) -> Result<(), String>;
}
