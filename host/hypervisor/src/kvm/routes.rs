//! Messages to the kernel's local APICs.

use std::sync::{Arc, Mutex};

use dunlin_guest::{Msi, MsiSink, layout};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_msi,
};

use super::{IOAPIC_PINS, Shared, lock};

const LEVEL: u32 = 1 << 15;
const ASSERT: u32 = 1 << 14;

/// Sends messages, and tells the kernel which of them come from level-triggered pins: it reports
/// the end of an interrupt only for those that its routing table shows as such. A message is
/// entered before it is sent for the first time, in place of the oldest.
#[derive(Debug)]
pub(super) struct Interrupts {
    shared: Arc<Shared>,
    level: Mutex<Level>,
}

#[derive(Debug, Default)]
struct Level {
    routes: Vec<Msi>,
    next: usize,
}

impl Level {
    /// Takes in a message; false when it is there already.
    fn insert(&mut self, msi: Msi) -> bool {
        if self.routes.contains(&msi) {
            return false;
        }
        match self.routes.get_mut(self.next) {
            Some(oldest) => *oldest = msi,
            None => self.routes.push(msi),
        }
        self.next = (self.next + 1) % IOAPIC_PINS as usize;
        true
    }
}

impl Interrupts {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            level: Mutex::default(),
        }
    }

    /// A restored local APIC `id` has a level-triggered interrupt `vector` in request or service:
    /// its end must be reported although nothing was sent here.
    pub(super) fn expect_end(&self, id: u32, vector: u8) {
        self.learn(Msi {
            address: layout::LOCAL_APIC_START | u64::from(id & 0xff) << 12,
            data: LEVEL | ASSERT | u32::from(vector),
        });
    }

    fn learn(&self, msi: Msi) {
        let mut level = lock(&self.level);
        if !level.insert(msi) {
            return;
        }
        let entries: Vec<_> = level
            .routes
            .iter()
            .enumerate()
            .map(|(pin, msi)| kvm_irq_routing_entry {
                gsi: pin as u32,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: msi.address as u32,
                        address_hi: (msi.address >> 32) as u32,
                        data: msi.data,
                        ..Default::default()
                    },
                },
                ..Default::default()
            })
            .collect();
        let result = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| format!("{error:?}"))
            .and_then(|table| {
                let set = self.shared.vm.set_gsi_routing(&table);
                set.map_err(|errno| errno.to_string())
            });
        if let Err(reason) = result {
            tracing::warn!(reason, "failed to route a level-triggered interrupt");
        }
    }
}

impl MsiSink for Interrupts {
    fn signal(&self, msi: Msi) {
        let window = layout::LOCAL_APIC_START..layout::LOCAL_APIC_START + layout::LOCAL_APIC_SIZE;
        if !window.contains(&msi.address) {
            return;
        }
        if msi.data & LEVEL != 0 {
            self.learn(msi);
        }
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // 0 and some errors mean that no vCPU is addressed, or that a guest programmed nonsense:
        // the bus drops such a message.
        if let Err(errno) = self.shared.vm.signal_msi(message) {
            tracing::debug!(%errno, "message-signalled interrupt dropped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_route_makes_place() {
        let mut level = Level::default();
        let msi = |data| Msi {
            address: 0xfee0_0000,
            data,
        };
        for data in 0..25 {
            assert!(level.insert(msi(data)));
        }
        assert_eq!(level.routes.len(), 24);
        assert!(!level.insert(msi(24)));
        assert!(level.insert(msi(0)));
    }
}
