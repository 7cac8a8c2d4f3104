//! The network card (virtio 1.2, 5.1) over a switch [`Port`].
//!
//! One pair of queues, whole frames, no offloads: checksums are complete in both directions. A
//! batch of frames goes from the ring to the port and back in one round; a frame that the port
//! does not take stays in the ring. More pairs would be more devices of this kind side by side,
//! each with a port and a worker of its own: nothing here is shared between directions but the port.

mod receive;
mod saved;
#[cfg(test)]
mod tests;
mod transmit;

use std::collections::VecDeque;
use std::fmt::Display;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dunlin_vswitch::{Frame, MacAddress, Port};

use super::log_limit::LogLimit;
use super::{Chain, DeviceConfig, DeviceType, Queues, RingError, VirtioDevice, Wait};
use crate::component::Reach;

pub use saved::NetState;

const RECEIVE_QUEUE: usize = 0;
const TRANSMIT_QUEUE: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// Frames of one direction in a round.
const BATCH: usize = 64;
/// Bytes before each frame (5.1.6): flags, segmentation, checksum, number of buffers.
const HEADER_SIZE: usize = 12;
/// Shortest frame: addresses and type.
const MIN_FRAME: usize = 14;
/// Payload of a frame.
const MTU: u16 = 1500;
/// How soon a port is tried again that was full.
const RETRY_FULL: Duration = Duration::from_millis(1);
/// How soon a port is tried again that failed.
const RETRY_FAILED: Duration = Duration::from_millis(100);

/// Feature bits of the device (5.1.3).
mod feature {
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const MERGEABLE_BUFFERS: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
}

/// Where the link status lies in the configuration.
const CONFIG_STATUS: usize = 6;
const LINK_UP: u16 = 1;

/// What a network card did since the VM was made. They move with the VM.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Frames given to the guest.
    pub received_frames: AtomicU64,
    /// Their bytes.
    pub received_bytes: AtomicU64,
    /// Frames for the guest that were dropped: too long, too short, or no buffer large enough.
    pub received_dropped: AtomicU64,
    /// Frames given to the port.
    pub sent_frames: AtomicU64,
    /// Their bytes.
    pub sent_bytes: AtomicU64,
    /// Frames of the guest that were dropped: too long, too short, or the port failed.
    pub sent_dropped: AtomicU64,
    /// Times that the port failed.
    pub port_errors: AtomicU64,
}

fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// A network card.
#[derive(Debug)]
pub struct Net {
    port: Box<dyn Port>,
    mac: MacAddress,
    config: Arc<DeviceConfig>,
    /// The driver takes a frame in several buffers.
    mergeable: bool,
    /// Tell the switch where the guest is, in the next round.
    announce: bool,
    /// Frames from the port that wait for buffers.
    received: VecDeque<Frame>,
    /// Reused between rounds.
    scratch: Scratch,
    counters: Arc<NetCounters>,
    log_limit: LogLimit,
}

/// Buffers that live for one round; kept, so that a round allocates nothing.
#[derive(Debug, Default)]
struct Scratch {
    chains: Vec<Chain>,
    heads: Vec<u16>,
    outgoing: Vec<Frame>,
    incoming: Vec<Frame>,
}

impl Net {
    /// A card with that address on that port.
    pub fn new(port: Box<dyn Port>, mac: MacAddress) -> Self {
        let mut config = Vec::from(mac.0);
        config.extend(LINK_UP.to_le_bytes());
        config.extend(1u16.to_le_bytes());
        config.extend(MTU.to_le_bytes());
        Self {
            port,
            mac,
            config: DeviceConfig::new(config),
            mergeable: false,
            announce: false,
            received: VecDeque::new(),
            scratch: Scratch::default(),
            counters: Arc::default(),
            log_limit: LogLimit::default(),
        }
    }

    /// What the card did so far; stays readable while it runs.
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.counters)
    }

    /// Offset and bytes for `VirtioPci::change_config` that pull the cable or plug it in.
    pub fn link_change(link: Link) -> (usize, [u8; 2]) {
        let status = match link {
            Link::Up => LINK_UP,
            Link::Down => 0,
        };
        (CONFIG_STATUS, status.to_le_bytes())
    }

    fn port_failed(&self, error: &dyn Display) {
        count(&self.counters.port_errors, 1);
        if self.log_limit.allows() {
            tracing::warn!(mac = %self.mac, %error, "switch port failed, frames are dropped");
        }
    }
}

/// Is the cable plugged in?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Frames may flow.
    Up,
    /// The guest sees no carrier.
    Down,
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        feature::MTU | feature::MAC | feature::MERGEABLE_BUFFERS | feature::STATUS
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, features: u64) {
        self.mergeable = features & feature::MERGEABLE_BUFFERS != 0;
    }

    fn reset(&mut self) {
        self.mergeable = false;
        self.received.clear();
    }

    fn process(&mut self, queues: &mut Queues) -> Result<Wait, RingError> {
        if std::mem::take(&mut self.announce)
            && let Err(error) = self.port.announce(self.mac)
        {
            self.port_failed(&error);
        }
        let transmit = self.transmit(queues)?;
        queues.signal(TRANSMIT_QUEUE)?;
        let receive = self.receive(queues)?;
        queues.signal(RECEIVE_QUEUE)?;
        Ok(transmit.or(receive))
    }

    fn back_end(&self) -> Option<BorrowedFd<'_>> {
        Some(self.port.readiness())
    }

    fn pause(&mut self, _reach: Reach) {}

    fn save(&self) -> Vec<u8> {
        self.encode_state()
    }

    fn restore(&mut self, _features: u64, state: &[u8]) -> Result<(), String> {
        self.decode_state(state)?;
        self.announce = true;
        Ok(())
    }
}
