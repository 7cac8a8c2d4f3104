//! An address space of devices: ports or memory-mapped registers.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, RwLock};

/// A device's registers. Called from vCPU threads, any of them at any time: a device locks its
/// own state, and never while it waits for another thread.
pub trait BusDevice: Debug + Send + Sync {
    /// What a person calls it, e.g. `serial`, `pci/00:02.0`.
    fn label(&self) -> String;

    /// A load of `data.len()` bytes (1, 2, 4 or 8) at `offset` from the start of the range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// A store at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be added.
#[derive(Debug, thiserror::Error)]
#[error("address range {start:#x}+{size:#x} is empty, wraps or overlaps another device")]
pub struct RangeError {
    /// First address.
    pub start: u64,
    /// Addresses.
    pub size: u64,
}

/// Routes accesses to devices by address. Cheap to clone; clones share the routes.
#[derive(Debug, Clone, Default)]
pub struct Bus {
    ranges: Arc<RwLock<BTreeMap<u64, Range>>>,
}

#[derive(Debug, Clone)]
struct Range {
    size: u64,
    device: Arc<dyn BusDevice>,
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Routes `size` addresses from `start` to `device`.
    ///
    /// # Errors
    /// [`RangeError`] when the range is empty, wraps or overlaps another.
    pub fn insert(
        &self,
        start: u64,
        size: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), RangeError> {
        let error = RangeError { start, size };
        let Some(last) = size.checked_sub(1).and_then(|s| start.checked_add(s)) else {
            return Err(error);
        };
        let mut ranges = self.write_lock();
        if let Some((&other, range)) = ranges.range(..=last).next_back()
            && other + (range.size - 1) >= start
        {
            return Err(error);
        }
        ranges.insert(start, Range { size, device });
        Ok(())
    }

    /// Takes away the range that starts at `start`.
    pub fn remove(&self, start: u64) {
        self.write_lock().remove(&start);
    }

    /// Takes away all devices. A bridge sits on the bus that it routes to, so without this neither
    /// it nor what is behind it would ever be dropped.
    pub fn clear(&self) {
        // Dropped after the lock is released: a device's end may take its time.
        let ranges = std::mem::take(&mut *self.write_lock());
        drop(ranges);
    }

    /// A load. Returns false, with `data` all ones, when no device decodes the whole access.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// A store. Returns false when no device decodes the whole access.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    /// Which device answers at `address`: the start of its range, and its label.
    pub fn device_at(&self, address: u64) -> Option<(u64, String)> {
        let (device, offset) = self.find(address, 1)?;
        Some((address - offset, device.label()))
    }

    fn find(&self, address: u64, length: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let ranges = match self.ranges.read() {
            Ok(ranges) => ranges,
            Err(poisoned) => poisoned.into_inner(),
        };
        let (&start, range) = ranges.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(length as u64)?;
        (end <= range.size).then(|| (Arc::clone(&range.device), offset))
    }

    fn write_lock(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<u64, Range>> {
        // A panic while the lock was held cannot leave the map half-changed.
        match self.ranges.write() {
            Ok(ranges) => ranges,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Echo;
    impl BusDevice for Echo {
        fn label(&self) -> String {
            "echo".into()
        }
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let bus = Bus::new();
        bus.insert(0x10, 8, Arc::new(Echo)).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x13, &mut data));
        assert_eq!(data, [3, 3]);
        assert_eq!(bus.device_at(0x13), Some((0x10, "echo".into())));
        assert_eq!(bus.device_at(0x18), None);
    }

    #[test]
    fn an_access_that_no_device_decodes_reads_ones() {
        let bus = Bus::new();
        bus.insert(0x10, 8, Arc::new(Echo)).unwrap();
        let mut data = [0; 4];
        for address in [0, 0xf, 0x15, 0x18, u64::MAX] {
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4]);
        }
    }

    #[test]
    fn a_cleared_bus_lets_its_devices_go() {
        let (bus, device) = (Bus::new(), Arc::new(Echo));
        bus.insert(0x10, 8, device.clone()).unwrap();
        bus.clear();
        assert_eq!(Arc::strong_count(&device), 1);
        assert!(!bus.read(0x10, &mut [0]));
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let bus = Bus::new();
        bus.insert(0x10, 8, Arc::new(Echo)).unwrap();
        for (start, size) in [(0x10, 1), (0x17, 1), (0, 0x11), (0, 0), (u64::MAX, 2)] {
            assert!(
                bus.insert(start, size, Arc::new(Echo)).is_err(),
                "{start:#x}"
            );
        }
        bus.insert(0x18, 8, Arc::new(Echo)).unwrap();
        bus.insert(0, 0x10, Arc::new(Echo)).unwrap();
        bus.remove(0x10);
        bus.insert(0x10, 8, Arc::new(Echo)).unwrap();
    }
}
