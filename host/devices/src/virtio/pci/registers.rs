//! The common configuration structure (virtio 1.2, 4.1.4.3) and the device status (2.1).

use crate::virtio::interrupt::Interrupt;
use crate::virtio::ring::QueueLayout;
use crate::virtio::{DeviceConfig, feature};

/// Bits of the device status register.
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    pub(crate) const DRIVER: u8 = 2;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
    pub(crate) const FAILED: u8 = 128;
    pub(crate) const WRITABLE: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// Bytes of the structure.
pub(super) const COMMON_SIZE: usize = 0x40;

/// How far driver and device have come; the status register's bits say it.
///
/// ```text
///                     FEATURES_OK, if              DRIVER_OK
///                     the features fit
///  Negotiating ───────────────────────► Configuring ────────► Running
///       ▲                                    │                   │
///       └──────────── 0 is written ◄─────────┴───────────────────┘
/// ```
///
/// A device that met a broken rule stays in `Running` with `NEEDS_RESET` set and does nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// After a reset: the driver may write features.
    Negotiating,
    /// Features are final: the driver may set up queues.
    Configuring,
    /// The device works; features and queues are final.
    Running,
}

impl Phase {
    pub(super) fn of(status: u8) -> Self {
        if status & status::DRIVER_OK != 0 {
            Self::Running
        } else if status & status::FEATURES_OK != 0 {
            Self::Configuring
        } else {
            Self::Negotiating
        }
    }
}

/// What the device must do about a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing more.
    None,
    /// Stop and forget the driver.
    Reset,
    /// Start with the features and queues as they are now.
    Activate,
}

/// One queue as the driver has set it up so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    /// The largest size that the device offers.
    pub(super) limit: u16,
    pub(super) layout: QueueLayout,
    pub(super) enabled: bool,
}

impl QueueRegisters {
    fn new(limit: u16) -> Self {
        Self {
            limit,
            layout: QueueLayout {
                size: limit,
                ..QueueLayout::default()
            },
            enabled: false,
        }
    }
}

/// The registers, apart from the vectors, which [`Interrupt`] has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) offered: u64,
    pub(super) status: u8,
    pub(super) driver_features: u64,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueRegisters>,
}

impl Registers {
    pub(super) fn new(offered: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered,
            status: 0,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            queues: queue_sizes
                .iter()
                .map(|&size| QueueRegisters::new(size))
                .collect(),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        Phase::of(self.status)
    }

    /// Everything as after construction.
    pub(super) fn reset(&mut self) {
        let limits: Vec<u16> = self.queues.iter().map(|queue| queue.limit).collect();
        *self = Self::new(self.offered, &limits);
    }

    /// Are these features ones that the device can run with?
    pub(super) fn accepts(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & feature::VERSION_1 != 0
    }

    /// The structure as a driver reads it.
    pub(super) fn image(&self, interrupt: &Interrupt, config: &DeviceConfig) -> [u8; COMMON_SIZE] {
        let mut image = [0; COMMON_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| {
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let device_features = half(self.offered, self.device_feature_select);
        let driver_features = half(self.driver_features, self.driver_feature_select);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &device_features.to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &driver_features.to_le_bytes());
        put(0x10, &interrupt.config_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        let failed = match interrupt.needs_reset() {
            true => status::NEEDS_RESET,
            false => 0,
        };
        put(0x14, &[self.status | failed, config.generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        let index = usize::from(self.queue_select);
        if let Some(queue) = self.queues.get(index) {
            put(0x18, &queue.layout.size.to_le_bytes());
            put(0x1a, &interrupt.queue_vector(index).to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.layout.descriptors.to_le_bytes());
            put(0x28, &queue.layout.available.to_le_bytes());
            put(0x30, &queue.layout.used.to_le_bytes());
        }
        image
    }

    /// A store to the structure. What is read-only, final or of a wrong width is ignored.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], interrupt: &Interrupt) -> Action {
        match *data {
            [value] if offset == 0x14 => return self.write_status(value),
            [a, b] => self.write_word(offset, u16::from_le_bytes([a, b]), interrupt),
            [a, b, c, d] => self.write_double_word(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if matches!(offset, 0x20 | 0x28 | 0x30) => {
                self.write_double_word(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_double_word(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Action::None
    }

    fn write_status(&mut self, value: u8) -> Action {
        if value == 0 {
            return Action::Reset;
        }
        // A driver takes bits back by a reset only (2.1.1).
        let mut new = self.status | value & status::WRITABLE;
        if new & status::FEATURES_OK != 0 && self.phase() == Phase::Negotiating {
            let ready = status::ACKNOWLEDGE | status::DRIVER;
            if new & ready != ready || !self.accepts(self.driver_features) {
                new &= !status::FEATURES_OK;
            }
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        let starts = Phase::of(new) == Phase::Running && self.phase() != Phase::Running;
        self.status = new;
        match starts {
            true => Action::Activate,
            false => Action::None,
        }
    }

    fn write_word(&mut self, offset: u64, value: u16, interrupt: &Interrupt) {
        match offset {
            0x10 => interrupt.set_config_vector(value),
            0x16 => self.queue_select = value,
            0x18 => {
                if let Some(queue) = self.queue_to_set_up()
                    && value.is_power_of_two()
                    && value <= queue.limit
                {
                    queue.layout.size = value;
                }
            }
            0x1a => interrupt.set_queue_vector(usize::from(self.queue_select), value),
            0x1c => {
                if let Some(queue) = self.queue_to_set_up() {
                    queue.enabled = value == 1;
                }
            }
            _ => {}
        }
    }

    fn write_double_word(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.device_feature_select = value,
            0x08 => self.driver_feature_select = value,
            0x0c if self.phase() == Phase::Negotiating => {
                set_half(&mut self.driver_features, self.driver_feature_select, value);
            }
            0x20..0x38 => {
                let Some(queue) = self.queue_to_set_up() else {
                    return;
                };
                let field = match offset & !7 {
                    0x20 => &mut queue.layout.descriptors,
                    0x28 => &mut queue.layout.available,
                    _ => &mut queue.layout.used,
                };
                match offset & 7 {
                    0 => set_half(field, 0, value),
                    4 => set_half(field, 1, value),
                    _ => {}
                }
            }
            _ => {}
        }
    }

    /// The selected queue, while the driver may change it: before it is enabled.
    fn queue_to_set_up(&mut self) -> Option<&mut QueueRegisters> {
        if self.phase() != Phase::Configuring {
            return None;
        }
        let queue = self.queues.get_mut(usize::from(self.queue_select))?;
        (!queue.enabled).then_some(queue)
    }
}

/// 32 of 64 bits; beyond them there are zeros.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        _ => {}
    }
}
