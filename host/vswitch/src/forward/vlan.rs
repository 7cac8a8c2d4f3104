//! 802.1Q: which VLAN a frame belongs to, and the form in which it leaves.

use super::{DropReason, HEADER};
use crate::{MacAddress, VlanId, VlanMode};

/// Ethernet type of an 802.1Q tag.
const TAG_TYPE: [u8; 2] = [0x81, 0x00];

/// Bytes of both addresses: where a tag goes.
const ADDRESSES: usize = 12;

/// Bytes of a tag: type, then priority and VLAN identifier.
const TAG: usize = 4;

/// The VLANs of a port, made quick to ask.
#[derive(Debug)]
pub(super) enum Membership {
    Access(VlanId),
    /// One bit for each identifier.
    Trunk(Box<[u64; 64]>),
}

/// A frame that its ingress port admits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Classified<'f> {
    pub(super) destination: MacAddress,
    pub(super) source: MacAddress,
    pub(super) vlan: VlanId,
    bytes: &'f [u8],
    /// Priority and VLAN identifier of the tag it carries.
    tag: Option<u16>,
}

fn address(bytes: &[u8]) -> MacAddress {
    let mut address = [0; 6];
    address.copy_from_slice(&bytes[..6]);
    MacAddress(address)
}

impl Membership {
    pub(super) fn new(mode: &VlanMode) -> Self {
        match mode {
            VlanMode::Access(vlan) => Membership::Access(*vlan),
            VlanMode::Trunk(vlans) => {
                let mut bits = Box::new([0; 64]);
                for vlan in vlans {
                    bits[usize::from(vlan.get() / 64)] |= 1 << (vlan.get() % 64);
                }
                Membership::Trunk(bits)
            }
        }
    }

    pub(super) fn contains(&self, vlan: VlanId) -> bool {
        match self {
            Membership::Access(own) => *own == vlan,
            Membership::Trunk(bits) => {
                bits[usize::from(vlan.get() / 64)] >> (vlan.get() % 64) & 1 != 0
            }
        }
    }

    pub(super) fn vlans(&self) -> Vec<VlanId> {
        (1..4095)
            .filter_map(VlanId::new)
            .filter(|vlan| self.contains(*vlan))
            .collect()
    }

    /// Finds the VLAN of a frame that comes in here.
    pub(super) fn classify<'f>(&self, bytes: &'f [u8]) -> Result<Classified<'f>, DropReason> {
        if bytes.len() < HEADER {
            return Err(DropReason::TooShort);
        }
        let tag = if bytes[ADDRESSES..HEADER] == TAG_TYPE {
            let tagged = bytes
                .get(HEADER..HEADER + TAG)
                .ok_or(DropReason::TooShort)?;
            if tagged[2..] == TAG_TYPE {
                // Without its outer tag it could enter another VLAN further on.
                return Err(DropReason::Vlan);
            }
            Some(u16::from_be_bytes([tagged[0], tagged[1]]))
        } else {
            None
        };
        let number = tag.map_or(0, |tag| tag & 0x0fff);
        let vlan = match (self, number) {
            // A tag with identifier 0 carries a priority only.
            (Membership::Access(vlan), 0) => *vlan,
            (Membership::Access(_), _) => return Err(DropReason::Vlan),
            (Membership::Trunk(_), _) => {
                let vlan = VlanId::new(number).ok_or(DropReason::Vlan)?;
                self.contains(vlan)
                    .then_some(vlan)
                    .ok_or(DropReason::Vlan)?
            }
        };
        Ok(Classified {
            destination: address(bytes),
            source: address(&bytes[6..]),
            vlan,
            bytes,
            tag,
        })
    }
}

/// Makes the forms in which one frame leaves, each at most once.
#[derive(Debug, Default)]
pub(super) struct Rewriter {
    untagged: Vec<u8>,
    tagged: Vec<u8>,
}

impl Rewriter {
    /// Forgets the frame before.
    pub(super) fn start(&mut self) {
        self.untagged.clear();
        self.tagged.clear();
    }

    /// The frame as it leaves by a port of this membership.
    pub(super) fn rewrite<'r>(&'r mut self, frame: &Classified<'r>, port: &Membership) -> &'r [u8] {
        match (port, frame.tag) {
            (Membership::Access(_), None) => frame.bytes,
            (Membership::Access(_), Some(_)) => {
                if self.untagged.is_empty() {
                    self.untagged.extend_from_slice(&frame.bytes[..ADDRESSES]);
                    self.untagged
                        .extend_from_slice(&frame.bytes[ADDRESSES + TAG..]);
                }
                &self.untagged
            }
            (Membership::Trunk(_), Some(tag)) if tag & 0x0fff == frame.vlan.get() => frame.bytes,
            (Membership::Trunk(_), tag) => {
                if self.tagged.is_empty() {
                    let priority = tag.unwrap_or(0) & 0xf000;
                    let rest = ADDRESSES + if tag.is_some() { TAG } else { 0 };
                    self.tagged.extend_from_slice(&frame.bytes[..ADDRESSES]);
                    self.tagged.extend_from_slice(&TAG_TYPE);
                    self.tagged
                        .extend_from_slice(&(priority | frame.vlan.get()).to_be_bytes());
                    self.tagged.extend_from_slice(&frame.bytes[rest..]);
                }
                &self.tagged
            }
        }
    }
}
