//! Where the structures of a virtio device lie in its one BAR, and the capabilities that say so
//! (virtio 1.2, 4.1.4).

use super::registers::COMMON_SIZE;
use crate::pci::{Bar, BarKind, ConfigError, ConfigSpace, MsixLayout, capability};

/// The BAR with everything in it.
pub(super) const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
/// Each structure has a page of its own, so that doorbells share theirs with nothing.
const PAGE: u64 = 0x1000;

const COMMON: u64 = 0;
const INTERRUPT_STATUS: u64 = PAGE;
const DEVICE: u64 = 2 * PAGE;
const NOTIFY: u64 = 3 * PAGE;

pub(super) const MSIX: MsixLayout = MsixLayout {
    bar: BAR,
    table: 0x4000,
    pending: 0x5000,
};

/// Bytes between the doorbells of two queues.
const NOTIFY_MULTIPLIER: u64 = 4;

/// Most queues of a device: their vectors and one more fit into the MSI-X table's page.
pub(super) const MAX_QUEUES: usize = 64;

/// What an address in the BAR means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Common(u64),
    InterruptStatus,
    Device(u64),
    /// The doorbell of a queue, which may not exist.
    Notify(usize),
    Nothing,
}

impl Target {
    pub(super) fn of(offset: u64) -> Self {
        let within = offset % PAGE;
        match offset - within {
            COMMON => Self::Common(within),
            INTERRUPT_STATUS if within == 0 => Self::InterruptStatus,
            DEVICE => Self::Device(within),
            NOTIFY => Self::Notify((within / NOTIFY_MULTIPLIER) as usize),
            _ => Self::Nothing,
        }
    }
}

/// Where the doorbell of a queue lies in the BAR.
pub(super) fn doorbell_offset(queue: usize) -> u64 {
    NOTIFY + NOTIFY_MULTIPLIER * queue as u64
}

/// Types of virtio's vendor capabilities.
mod kind {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const INTERRUPT_STATUS: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const CONFIG_ACCESS: u8 = 5;
}

/// Adds BAR and capabilities; returns the offset of the one for access through configuration space.
pub(super) fn describe(
    config: &mut ConfigSpace,
    queues: usize,
    device_config: usize,
) -> Result<u16, ConfigError> {
    config.add_bar(Bar {
        index: BAR,
        size: BAR_SIZE,
        kind: BarKind::Memory32,
    })?;
    let notify_size = NOTIFY_MULTIPLIER * queues as u64;
    let multiplier = (NOTIFY_MULTIPLIER as u32).to_le_bytes();
    add(config, kind::COMMON, (COMMON, COMMON_SIZE as u64), &[])?;
    add(config, kind::NOTIFY, (NOTIFY, notify_size), &multiplier)?;
    add(config, kind::INTERRUPT_STATUS, (INTERRUPT_STATUS, 1), &[])?;
    if device_config > 0 {
        add(config, kind::DEVICE, (DEVICE, device_config as u64), &[])?;
    }
    let access = add(config, kind::CONFIG_ACCESS, (0, 0), &[0; 4])?;
    // BAR, then offset, length and data.
    config.allow(usize::from(access) + 4, &[0xff]);
    config.allow(usize::from(access) + 8, &[0xff; 12]);
    Ok(u16::from(access))
}

fn add(
    config: &mut ConfigSpace,
    kind: u8,
    (offset, length): (u64, u64),
    rest: &[u8],
) -> Result<u8, ConfigError> {
    let mut body = vec![(16 + rest.len()) as u8, kind, BAR, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(rest);
    config.add_capability(capability::VENDOR, &body)
}

/// A window through which configuration space reaches the BAR (4.1.4.9): what the driver set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) offset: u64,
    pub(super) length: usize,
}

impl Access {
    /// The data register, from the capability's start.
    pub(super) const DATA: u16 = 16;

    /// What the registers of the capability at `capability` say, if the BAR can be accessed so.
    pub(super) fn of(config: &ConfigSpace, capability: u16) -> Option<Self> {
        let mut bar = [0];
        let (mut offset, mut length) = ([0; 4], [0; 4]);
        config.read(capability + 4, &mut bar);
        config.read(capability + 8, &mut offset);
        config.read(capability + 12, &mut length);
        let (offset, length) = (u32::from_le_bytes(offset), u32::from_le_bytes(length));
        let valid = bar == [BAR]
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && u64::from(offset) < BAR_SIZE;
        valid.then_some(Self {
            offset: u64::from(offset),
            length: length as usize,
        })
    }
}
