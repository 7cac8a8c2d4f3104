//! Tests of the worker with devices that misbehave.

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use super::*;
use crate::component::{Component, Reach};
use crate::virtio::testing::{Driver, NEEDS_RESET, PATIENCE};
use crate::virtio::{DeviceConfig, DeviceType, RingError};
use std::os::fd::AsFd;

/// What happens in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Behaviour {
    Panics,
    /// Leaves what its back end has to say unread.
    Ignores,
}

#[derive(Debug)]
struct Odd {
    behaviour: Behaviour,
    rounds: Sender<()>,
    config: Arc<DeviceConfig>,
    back_end: UnixDatagram,
}

impl VirtioDevice for Odd {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }
    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }
    fn activate(&mut self, _features: u64) {}
    fn reset(&mut self) {}
    fn process(&mut self, _queues: &mut Queues) -> Result<Wait, RingError> {
        let _ = self.rounds.send(());
        assert_ne!(self.behaviour, Behaviour::Panics, "as the test wants it");
        Ok(Wait {
            readable: true,
            retry_after: None,
        })
    }
    fn back_end(&self) -> Option<BorrowedFd<'_>> {
        Some(self.back_end.as_fd())
    }
    fn pause(&mut self, _reach: Reach) {}
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }
    fn restore(&mut self, _features: u64, _state: &[u8]) -> Result<(), String> {
        Ok(())
    }
}

fn odd(behaviour: Behaviour) -> (Box<Odd>, UnixDatagram, Receiver<()>) {
    let (sender, rounds) = channel();
    let (peer, back_end) = UnixDatagram::pair().unwrap();
    let device = Odd {
        behaviour,
        rounds: sender,
        config: DeviceConfig::new(Vec::new()),
        back_end,
    };
    (Box::new(device), peer, rounds)
}

#[test]
fn a_device_that_panics_stops_alone() {
    let (device, _peer, rounds) = odd(Behaviour::Panics);
    let driver = Driver::start(device);
    rounds.recv_timeout(PATIENCE).unwrap();
    driver.wait_needs_reset();
    driver.device.pause(Reach::AnyHost);
    driver.save();
    driver.device.resume();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    // Dropping it here must not wait for ever.
}

#[test]
fn a_back_end_that_is_readable_for_nothing_costs_little() {
    let (device, peer, rounds) = odd(Behaviour::Ignores);
    peer.send(b"never read").unwrap();
    let driver = Driver::start(device);
    let end = Instant::now() + Duration::from_millis(250);
    let mut count = 0;
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        count += usize::from(rounds.recv_timeout(left).is_ok());
    }
    // Spinning would be some hundred thousand.
    assert!(count < 200, "{count} rounds");
    // Doorbells are still heard.
    while rounds.try_recv().is_ok() {}
    driver.ring(0);
    rounds.recv_timeout(PATIENCE).unwrap();
}
