//! Counterparts of devices that remember what they were told, for tests.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use dunlin_guest::{Doorbell, InterruptLine, Msi, MsiSink};

use crate::lock;
use crate::pci::DoorbellHost;
use crate::power::PowerEvents;

/// Remembers messages.
#[derive(Debug, Default)]
pub(crate) struct Messages(Mutex<Vec<Msi>>);

impl Messages {
    /// The messages since the last call.
    pub(crate) fn take(&self) -> Vec<Msi> {
        std::mem::take(&mut *lock(&self.0))
    }
}

impl MsiSink for Messages {
    fn signal(&self, msi: Msi) {
        lock(&self.0).push(msi);
    }
}

/// Remembers the level of a line and how often it rose.
#[derive(Debug, Default)]
pub(crate) struct Line {
    state: Mutex<(bool, usize)>,
}

impl Line {
    pub(crate) fn is_high(&self) -> bool {
        lock(&self.state).0
    }

    /// How often the line rose since the last call.
    pub(crate) fn take_edges(&self) -> usize {
        std::mem::take(&mut lock(&self.state).1)
    }
}

impl InterruptLine for Line {
    fn set_level(&self, high: bool) {
        let (level, edges) = &mut *lock(&self.state);
        *edges += usize::from(high && !*level);
        *level = high;
    }
}

/// Counts power events.
#[derive(Debug, Default)]
pub(crate) struct Power {
    offs: AtomicUsize,
    resets: AtomicUsize,
}

impl Power {
    pub(crate) fn offs(&self) -> usize {
        self.offs.load(Ordering::Relaxed)
    }

    pub(crate) fn resets(&self) -> usize {
        self.resets.load(Ordering::Relaxed)
    }
}

impl PowerEvents for Power {
    fn power_off(&self) {
        self.offs.fetch_add(1, Ordering::Relaxed);
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }
}

/// Remembers the addresses of the doorbells that are registered now.
#[derive(Debug, Default)]
pub(crate) struct Doorbells(Mutex<Vec<u64>>);

impl Doorbells {
    pub(crate) fn addresses(&self) -> Vec<u64> {
        lock(&self.0).clone()
    }
}

impl DoorbellHost for Doorbells {
    fn add(&self, doorbell: &Doorbell) {
        lock(&self.0).push(doorbell.address);
    }

    fn remove(&self, doorbell: &Doorbell) {
        lock(&self.0).retain(|address| *address != doorbell.address);
    }
}
