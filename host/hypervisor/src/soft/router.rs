//! Carries interrupts between software local APICs (Intel SDM vol. 3, 11.6 and 11.11).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dunlin_guest::{Msi, MsiSink, layout};
use dunlin_x86::lapic::{InterruptRouter, Mailbox, Trigger};

/// Knows the mailboxes of all processors, by local APIC ID.
#[derive(Debug)]
pub(super) struct Router {
    mailboxes: Box<[Arc<Mailbox>]>,
    /// Where the search for the lowest priority begins: equals take turns.
    turn: AtomicUsize,
}

/// Who is meant.
#[derive(Debug, Clone, Copy)]
enum Destination {
    Physical(u32),
    Logical(u32),
    All,
    AllBut(u32),
}

/// What is sent.
#[derive(Debug, Clone, Copy)]
enum Event {
    Vector(u8, Trigger),
    LowestPriority(u8, Trigger),
    Nmi,
    Init,
    StartUp(u8),
}

impl Event {
    /// From the delivery mode of an ICR or MSI; `None` for modes without effect here (SMI, ExtINT,
    /// reserved).
    fn decode(mode: u32, vector: u8, trigger: Trigger) -> Option<Self> {
        match mode & 7 {
            0 => Some(Self::Vector(vector, trigger)),
            1 => Some(Self::LowestPriority(vector, trigger)),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::StartUp(vector)),
            _ => None,
        }
    }
}

fn trigger(level: bool) -> Trigger {
    if level { Trigger::Level } else { Trigger::Edge }
}

impl Router {
    pub(super) fn new(cpus: u32) -> Self {
        Self {
            mailboxes: (0..cpus).map(|id| Arc::new(Mailbox::new(id))).collect(),
            turn: AtomicUsize::new(0),
        }
    }

    pub(super) fn mailbox(&self, id: u32) -> Option<&Arc<Mailbox>> {
        self.mailboxes.get(id as usize)
    }

    fn matching(&self, destination: Destination) -> impl Iterator<Item = &Arc<Mailbox>> {
        self.mailboxes.iter().filter(move |mailbox| {
            let address = mailbox.address();
            match destination {
                Destination::Physical(id) => address.matches_physical(id),
                Destination::Logical(bits) => address.matches_logical(bits),
                Destination::All => address.enabled,
                Destination::AllBut(id) => address.enabled && address.id != id,
            }
        })
    }

    fn deliver(&self, destination: Destination, event: Event) {
        if let Event::LowestPriority(vector, trigger) = event {
            if let Some(mailbox) = self.lowest_priority(destination) {
                mailbox.post_vector(vector, trigger);
            }
            return;
        }
        for mailbox in self.matching(destination) {
            match event {
                Event::Vector(vector, trigger) | Event::LowestPriority(vector, trigger) => {
                    mailbox.post_vector(vector, trigger);
                }
                Event::Nmi => mailbox.post_nmi(),
                Event::Init => mailbox.post_init(),
                Event::StartUp(vector) => mailbox.post_sipi(vector),
            }
        }
    }

    fn lowest_priority(&self, destination: Destination) -> Option<&Arc<Mailbox>> {
        let count = self.mailboxes.len().max(1);
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % count;
        self.matching(destination).min_by_key(|mailbox| {
            let address = mailbox.address();
            let distance = (address.id as usize + count - first) % count;
            (address.priority, distance)
        })
    }
}

impl InterruptRouter for Router {
    fn send_ipi(&self, from: u32, icr: u64) {
        let (command, target) = (icr as u32, (icr >> 32) as u32);
        let level = command & (1 << 15) != 0;
        let assert = command & (1 << 14) != 0;
        let Some(event) = Event::decode(command >> 8, command as u8, Trigger::Edge) else {
            return;
        };
        // INIT with level de-asserted only synchronised the arbitration of very old APICs.
        if matches!(event, Event::Init) && level && !assert {
            return;
        }
        let destination = match command >> 18 & 3 {
            0 if command & (1 << 11) != 0 => Destination::Logical(target),
            0 => Destination::Physical(target),
            1 => Destination::Physical(from),
            2 => Destination::All,
            _ => Destination::AllBut(from),
        };
        self.deliver(destination, event);
    }
}

impl MsiSink for Router {
    fn signal(&self, msi: Msi) {
        let window = layout::LOCAL_APIC_START..layout::LOCAL_APIC_START + layout::LOCAL_APIC_SIZE;
        if !window.contains(&msi.address) {
            return;
        }
        let target = (msi.address >> 12 & 0xff) as u32;
        let destination = match (msi.address & (1 << 2) != 0, target) {
            (true, bits) => Destination::Logical(bits),
            (false, 0xff) => Destination::All,
            (false, id) => Destination::Physical(id),
        };
        let trigger = trigger(msi.data & (1 << 15) != 0);
        // A level message with the level de-asserted takes nothing back: there is nothing to do.
        if trigger == Trigger::Level && msi.data & (1 << 14) == 0 {
            return;
        }
        let redirect = msi.address & (1 << 3) != 0;
        match Event::decode(msi.data >> 8, msi.data as u8, trigger) {
            Some(Event::Vector(vector, trigger)) if redirect => {
                self.deliver(destination, Event::LowestPriority(vector, trigger));
            }
            // A device cannot start processors.
            Some(Event::StartUp(_)) | None => {}
            Some(event) => self.deliver(destination, event),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_x86::lapic::{BASE_X2APIC, LocalApic};

    struct Machine {
        router: Arc<Router>,
        apics: Vec<LocalApic>,
    }

    impl Machine {
        fn new(cpus: u32) -> Self {
            let router = Arc::new(Router::new(cpus));
            let apics = (0..cpus)
                .map(|id| {
                    let mailbox = Arc::clone(router.mailbox(id).unwrap());
                    let mut apic = LocalApic::new(mailbox, router.clone(), 1_000_000);
                    apic.write_mmio(0xf0, 0x1ff, 0);
                    apic.write_mmio(0xd0, 1 << (24 + id % 8), 0);
                    apic
                })
                .collect();
            Self { router, apics }
        }

        /// Which processors have `vector` pending; takes it.
        fn who(&mut self, vector: u8) -> Vec<u32> {
            let mut who = Vec::new();
            for apic in &mut self.apics {
                apic.poll_mailbox();
                if apic.pending_vector() == Some(vector) {
                    apic.acknowledge();
                    apic.write_mmio(0xb0, 0, 0);
                    if apic.is_x2apic() {
                        apic.write_msr(0x80b, 0, 0).unwrap();
                    }
                    who.push(apic.id());
                }
            }
            who
        }

        fn msi(&self, address: u64, data: u32) {
            self.router.signal(Msi { address, data });
        }
    }

    #[test]
    fn messages_reach_physical_logical_and_all_destinations() {
        let mut machine = Machine::new(3);
        machine.msi(0xfee0_1000, 0x4041);
        assert_eq!(machine.who(0x41), [1]);
        machine.msi(0xfee0_5004, 0x4042);
        assert_eq!(machine.who(0x42), [0, 2]);
        machine.msi(0xfeef_f000, 0x4043);
        assert_eq!(machine.who(0x43), [0, 1, 2]);
        machine.msi(0xfee0_9000, 0x4044);
        machine.msi(0xfed0_0000, 0x4044);
        machine.msi(u64::MAX, u32::MAX);
        assert!(machine.who(0x44).is_empty());
    }

    #[test]
    fn lowest_priority_goes_to_one_and_takes_turns() {
        let mut machine = Machine::new(3);
        let mut seen = Vec::new();
        for _ in 0..3 {
            machine.msi(0xfeef_f00c, 0x4141);
            seen.extend(machine.who(0x41));
        }
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2]);
        for busy in [0, 1] {
            machine.apics[busy].set_cr8(3).unwrap();
        }
        machine.msi(0xfeef_f004, 0x4141);
        assert_eq!(machine.who(0x41), [2]);
    }

    #[test]
    fn commands_follow_their_shorthands() {
        let mut machine = Machine::new(3);
        machine.apics[1].write_mmio(0x300, 0x000c_4051, 0);
        assert_eq!(machine.who(0x51), [0, 2]);
        machine.apics[1].write_mmio(0x300, 0x0008_4051, 0);
        assert_eq!(machine.who(0x51), [0, 1, 2]);
        machine.apics[1].write_mmio(0x300, 0x0004_4051, 0);
        assert_eq!(machine.who(0x51), [1]);
        machine.apics[0].write_mmio(0x310, 2 << 24, 0);
        machine.apics[0].write_mmio(0x300, 0x4051, 0);
        assert_eq!(machine.who(0x51), [2]);
    }

    #[test]
    fn x2apic_clusters_are_addressed_by_their_derived_ids() {
        let mut machine = Machine::new(18);
        for apic in &mut machine.apics {
            apic.set_base(apic.base() | BASE_X2APIC).unwrap();
        }
        let (logical, cluster_1) = (1 << 11, 0x0001_0003u64);
        machine.apics[0]
            .write_msr(0x830, cluster_1 << 32 | logical | 0x4051, 0)
            .unwrap();
        assert_eq!(machine.who(0x51), [16, 17]);
        machine.apics[0]
            .write_msr(0x830, 17 << 32 | 0x4052, 0)
            .unwrap();
        assert_eq!(machine.who(0x52), [17]);
    }

    #[test]
    fn init_start_up_and_nmi_arrive_as_such() {
        let mut machine = Machine::new(2);
        machine.apics[0].write_mmio(0x310, 1 << 24, 0);
        machine.apics[0].write_mmio(0x300, 0xc500, 0);
        machine.apics[0].write_mmio(0x300, 0x8500, 0);
        machine.apics[0].write_mmio(0x300, 0x469a, 0);
        let posted = machine.apics[1].poll_mailbox();
        assert_eq!(
            (posted.init, posted.sipi, posted.nmi),
            (true, Some(0x9a), false)
        );
        machine.apics[0].write_mmio(0x300, 0x4400, 0);
        assert!(machine.apics[1].poll_mailbox().nmi);
        machine.apics[0].write_mmio(0x300, 0x8500, 0);
        assert!(!machine.apics[1].poll_mailbox().init, "de-assert");
    }

    #[test]
    fn a_level_message_reports_its_end() {
        let mut machine = Machine::new(1);
        machine.msi(0xfee0_0000, 0xc061);
        machine.msi(0xfee0_0000, 0x8062);
        machine.apics[0].poll_mailbox();
        assert_eq!(machine.apics[0].acknowledge(), 0x61);
        assert_eq!(machine.apics[0].write_mmio(0xb0, 0, 0), Some(0x61));
        assert_eq!(machine.apics[0].pending_vector(), None);
    }
}
