//! What devices talk to, with nobody there.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use dunlin_devices::pci::DoorbellHost;
use dunlin_devices::power::PowerEvents;
use dunlin_devices::serial::Console;
use dunlin_guest::{Doorbell, InterruptLine, Msi, MsiSink};
use dunlin_vswitch::{Frame, MAX_FRAME, MacAddress, Port, PortError};

/// Takes interrupts, output and events, and does nothing.
#[derive(Debug)]
pub struct Nobody;

impl MsiSink for Nobody {
    fn signal(&self, _msi: Msi) {}
}

impl InterruptLine for Nobody {
    fn set_level(&self, _high: bool) {}
}

impl Console for Nobody {
    fn write(&self, _bytes: &[u8]) {}
    fn input_ready(&self) {}
}

impl PowerEvents for Nobody {
    fn power_off(&self) {}
    fn reset(&self) {}
}

impl DoorbellHost for Nobody {
    fn add(&self, _doorbell: &Doorbell) {}
    fn remove(&self, _doorbell: &Doorbell) {}
}

/// Gives back the frames that it was given.
#[derive(Debug)]
pub struct Loopback {
    frames: VecDeque<Frame>,
    silence: OwnedFd,
}

impl Default for Loopback {
    fn default() -> Self {
        let silence = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
        Self {
            frames: VecDeque::new(),
            silence: silence.expect("a descriptor is free"),
        }
    }
}

impl Port for Loopback {
    fn send(&mut self, frames: &[Frame]) -> Result<usize, PortError> {
        for frame in frames {
            assert!(
                frame.bytes.len() <= MAX_FRAME,
                "a frame that no port carries"
            );
        }
        self.frames.extend(frames.iter().take(64).cloned());
        self.frames.truncate(64);
        Ok(frames.len())
    }

    fn receive(&mut self, into: &mut Vec<Frame>, limit: usize) -> Result<usize, PortError> {
        let count = limit.min(self.frames.len());
        into.extend(self.frames.drain(..count));
        Ok(count)
    }

    fn readiness(&self) -> BorrowedFd<'_> {
        self.silence.as_fd()
    }

    fn announce(&mut self, _mac: MacAddress) -> Result<(), PortError> {
        Ok(())
    }
}
