//! What a port has carried and dropped.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

/// Why a frame went no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// In: shorter than an Ethernet header.
    TooShort,
    /// In: longer than [`crate::MAX_FRAME`].
    TooLong,
    /// In: the source is a group address or zero.
    BadSource,
    /// In: the source is not allowed here, or belongs to the switch itself.
    Spoofed,
    /// In: the port does not take this VLAN, or no tag, or a tag.
    Vlan,
    /// In: sent to a link-local group address that bridges keep to themselves.
    LinkLocal,
    /// In: the destination is behind the port it came from.
    SamePort,
    /// In: no other port may take it.
    NoEgress,
    /// In: a tunnel's packet that is no VXLAN packet of this network.
    Encapsulation,
    /// Out: with its tag it is longer than [`crate::MAX_FRAME`].
    TooLongTagged,
    /// Out: the port's queue is full.
    QueueFull,
    /// Out: nobody is there.
    PeerGone,
}

impl DropReason {
    const ALL: [DropReason; 12] = [
        DropReason::TooShort,
        DropReason::TooLong,
        DropReason::BadSource,
        DropReason::Spoofed,
        DropReason::Vlan,
        DropReason::LinkLocal,
        DropReason::SamePort,
        DropReason::NoEgress,
        DropReason::Encapsulation,
        DropReason::TooLongTagged,
        DropReason::QueueFull,
        DropReason::PeerGone,
    ];
}

/// What a port has carried; "received" is towards the switch, "sent" is away from it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct PortCounters {
    /// Frames that came in, dropped ones included.
    pub received_frames: u64,
    /// Their bytes, without frame check sequences.
    pub received_bytes: u64,
    /// Frames that left.
    pub sent_frames: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames whose source was not learned because the table or the port's share of it is full.
    pub not_learned: u64,
    /// Dropped frames by reason.
    pub drops: DropCounters,
}

/// Dropped frames by reason; serialised as a map of those that are not zero.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DropCounters([u64; DropReason::ALL.len()]);

impl DropCounters {
    /// Frames dropped for `reason`.
    #[must_use]
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize]
    }

    /// Reasons with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.into_iter().zip(self.0)
    }
}

impl Serialize for DropCounters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (reason, count) in self.iter().filter(|(_, count)| *count > 0) {
            map.serialize_entry(&reason, &count)?;
        }
        map.end()
    }
}

impl PortCounters {
    pub(super) fn receive(&mut self, length: usize) {
        self.received_frames += 1;
        self.received_bytes += length as u64;
    }

    pub(super) fn send(&mut self, length: usize) {
        self.sent_frames += 1;
        self.sent_bytes += length as u64;
    }

    pub(super) fn drop(&mut self, reason: DropReason) {
        self.drops.0[reason as usize] += 1;
    }

    /// A frame counted as sent was lost after all.
    pub(super) fn take_back(&mut self, length: usize, reason: DropReason) {
        self.sent_frames = self.sent_frames.saturating_sub(1);
        self.sent_bytes = self.sent_bytes.saturating_sub(length as u64);
        self.drop(reason);
    }
}
