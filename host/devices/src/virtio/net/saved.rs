//! The saved state of a network card.

use std::sync::atomic::{AtomicU64, Ordering};

use dunlin_vswitch::{Frame, MAX_FRAME};
use prost::Message;

use super::{BATCH, MIN_FRAME, Net, NetCounters};

/// Saved state of [`Net`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct NetState {
    /// The card's address.
    #[prost(bytes = "vec", tag = "1")]
    pub mac: Vec<u8>,
    /// Frames that wait for buffers of the guest.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub received: Vec<Vec<u8>>,
    /// Counters in the order of [`NetCounters`]; a later version appends.
    #[prost(uint64, repeated, tag = "3")]
    pub counters: Vec<u64>,
}

impl Net {
    pub(super) fn encode_state(&self) -> Vec<u8> {
        let Self {
            port: _,
            mac,
            config: _,
            mergeable: _,
            announce: _,
            received,
            scratch: _,
            counters,
            log_limit: _,
        } = self;
        let state = NetState {
            mac: mac.0.to_vec(),
            received: received.iter().map(|frame| frame.bytes.clone()).collect(),
            counters: all(counters).map(|c| c.load(Ordering::Relaxed)).to_vec(),
        };
        state.encode_to_vec()
    }

    pub(super) fn decode_state(&mut self, state: &[u8]) -> Result<(), String> {
        let NetState {
            mac,
            received,
            counters,
        } = NetState::decode(state).map_err(|error| error.to_string())?;
        if mac != self.mac.0 {
            return Err(format!("the card's address is {} here", self.mac));
        }
        let valid = |frame: &Vec<u8>| (MIN_FRAME..=MAX_FRAME).contains(&frame.len());
        if received.len() > BATCH || !received.iter().all(valid) {
            return Err("frames that no card holds".into());
        }
        self.received = received.into_iter().map(|bytes| Frame { bytes }).collect();
        for (counter, value) in all(&self.counters).into_iter().zip(counters) {
            counter.store(value, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn all(counters: &NetCounters) -> [&AtomicU64; 7] {
    let NetCounters {
        received_frames,
        received_bytes,
        received_dropped,
        sent_frames,
        sent_bytes,
        sent_dropped,
        port_errors,
    } = counters;
    [
        received_frames,
        received_bytes,
        received_dropped,
        sent_frames,
        sent_bytes,
        sent_dropped,
        port_errors,
    ]
}
