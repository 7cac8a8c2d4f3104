//! What a vCPU's accesses to devices took, while a profile is taken.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dunlin_api::profile::DeviceTime;
use dunlin_devices::bus::Bus;

/// Addresses that are told apart; a guest may use any.
const ADDRESSES: usize = 4096;

/// Which bus, and which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Access {
    PortRead,
    PortWrite,
    MmioRead,
    MmioWrite,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    count: u64,
    time: Duration,
}

/// Accesses by address; nothing while no profile is taken.
#[derive(Debug, Default)]
pub(super) struct Ledger(Option<BTreeMap<(Access, u64), Sum>>);

impl Ledger {
    pub(super) fn open(&mut self) {
        self.0 = Some(BTreeMap::new());
    }

    /// An access begins.
    pub(super) fn begin(&self) -> Option<Instant> {
        self.0.as_ref().map(|_| Instant::now())
    }

    /// It has ended.
    pub(super) fn end(&mut self, begun: Option<Instant>, access: Access, address: u64) {
        let (Some(sums), Some(begun)) = (&mut self.0, begun) else {
            return;
        };
        let room = sums.len() < ADDRESSES;
        let key = (access, address);
        if room || sums.contains_key(&key) {
            let sum = sums.entry(key).or_default();
            sum.count += 1;
            sum.time += begun.elapsed();
        }
    }

    /// What was noted, by device, most time first; notes no more.
    pub(super) fn close(&mut self, ports: &Bus, mmio: &Bus) -> Vec<DeviceTime> {
        let mut devices: BTreeMap<String, DeviceTime> = BTreeMap::new();
        for ((access, address), sum) in self.0.take().unwrap_or_default() {
            let bus = match access {
                Access::PortRead | Access::PortWrite => ports,
                Access::MmioRead | Access::MmioWrite => mmio,
            };
            let device = bus.device_at(address);
            let device = device.map_or_else(|| "none".to_owned(), |(_, label)| label);
            let time = devices.entry(device.clone()).or_insert(DeviceTime {
                device,
                reads: 0,
                writes: 0,
                nanoseconds: 0,
            });
            match access {
                Access::PortRead | Access::MmioRead => time.reads += sum.count,
                Access::PortWrite | Access::MmioWrite => time.writes += sum.count,
            }
            time.nanoseconds += u64::try_from(sum.time.as_nanos()).unwrap_or(u64::MAX);
        }
        let mut devices: Vec<_> = devices.into_values().collect();
        devices.sort_by_key(|device| u64::MAX - device.nanoseconds);
        devices
    }
}
