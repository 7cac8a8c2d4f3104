//! What other threads post to a processor, and how a halted one waits for it.

use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Instant;

const VECTORS: u32 = 1 << 0;
const NMI: u32 = 1 << 1;
const INIT: u32 = 1 << 2;
const SIPI: u32 = 1 << 3;
const KICK: u32 = 1 << 4;
const EXTERNAL: u32 = 1 << 5;

/// How an interrupt was signalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// The message is the event.
    Edge,
    /// A line is held until the interrupt is served: its end must reach the I/O APIC.
    Level,
}

/// An interrupt controller outside of the local APIC, whose output is the processor's INTR: it
/// gives the vector itself (ExtINT; SDM vol. 3, 11.5.1).
pub trait ExternalController: Debug + Send + Sync {
    /// The processor takes the interrupt: its vector.
    fn acknowledge(&self) -> u8;
}

/// A processor's inbox: interrupts, NMI, INIT, SIPI and kicks, posted by any thread.
///
/// Posting is lock-free unless the processor sleeps in [`Mailbox::wait_until`]. The flags of
/// `events` are set after the details they announce, and cleared before the details are read, so
/// that nothing posted is ever lost; at worst a processor looks once in vain.
#[derive(Debug)]
pub struct Mailbox {
    id: u32,
    events: AtomicU32,
    vectors: [AtomicU64; 4],
    level: [AtomicU64; 4],
    sipi: AtomicU8,
    /// Level of INTR.
    external: AtomicBool,
    controller: OnceLock<Arc<dyn ExternalController>>,
    /// How interrupts address the processor; see [`Address::pack`].
    address: AtomicU64,
    sleeping: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
}

/// What was posted and does not go into the local APIC's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Posted {
    /// A non-maskable interrupt.
    pub nmi: bool,
    /// INIT: the processor is reset and waits for a start-up IPI (processor 0: starts again).
    /// Comes before `sipi` when both are set.
    pub init: bool,
    /// Start-up IPI with its vector: begins at physical address `vector << 12` in real mode, if
    /// the processor waits for it.
    pub sipi: Option<u8>,
    /// Somebody wants the processor's thread.
    pub kick: bool,
}

/// How interrupts address a local APIC: what a router must know of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The 32-bit ID.
    pub id: u32,
    /// Enabled in IA32_APIC_BASE.
    pub enabled: bool,
    /// In x2APIC mode.
    pub x2apic: bool,
    /// The logical destination register: bits 24-31 in xAPIC mode, all 32 in x2APIC mode.
    pub logical: u32,
    /// xAPIC mode: the destination format register selects the flat model, not the cluster model.
    pub flat: bool,
    /// Processor priority, bits 4-7 of the PPR, for lowest-priority delivery.
    pub priority: u8,
}

impl Address {
    fn pack(self) -> u64 {
        u64::from(self.logical)
            | u64::from(self.priority) << 32
            | u64::from(self.enabled) << 40
            | u64::from(self.x2apic) << 41
            | u64::from(self.flat) << 42
    }

    fn unpack(id: u32, packed: u64) -> Self {
        Self {
            id,
            logical: packed as u32,
            priority: (packed >> 32) as u8,
            enabled: packed & (1 << 40) != 0,
            x2apic: packed & (1 << 41) != 0,
            flat: packed & (1 << 42) != 0,
        }
    }

    /// Is this APIC meant by physical destination `destination`? All ones means everybody.
    pub fn matches_physical(&self, destination: u32) -> bool {
        self.enabled && (destination == u32::MAX || destination == self.id)
    }

    /// Is this APIC meant by logical destination `destination` (SDM vol. 3, 11.6.2.2 and
    /// 11.12.10.2)? An xAPIC looks at the low 8 bits only.
    pub fn matches_logical(&self, destination: u32) -> bool {
        if !self.enabled {
            return false;
        }
        if self.x2apic {
            let same_cluster = destination >> 16 == self.logical >> 16;
            return destination == u32::MAX
                || same_cluster && destination & self.logical & 0xffff != 0;
        }
        let (destination, own) = (destination as u8, (self.logical >> 24) as u8);
        if destination == 0xff {
            return true;
        }
        if self.flat {
            return destination & own != 0;
        }
        let all_clusters = destination >> 4 == 0xf;
        (all_clusters || destination >> 4 == own >> 4) && destination & own & 0xf != 0
    }
}

impl Mailbox {
    /// The empty mailbox of the processor with local APIC ID `id`.
    pub fn new(id: u32) -> Self {
        Self {
            id,
            events: AtomicU32::new(0),
            vectors: Default::default(),
            level: Default::default(),
            sipi: AtomicU8::new(0),
            external: AtomicBool::new(false),
            controller: OnceLock::new(),
            address: AtomicU64::new(0),
            sleeping: AtomicU32::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    /// The ID of the processor's local APIC.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Was something posted since the last poll? One relaxed load, for the inner loop.
    #[inline]
    pub fn has_events(&self) -> bool {
        self.events.load(Ordering::Relaxed) != 0
    }

    /// Posts interrupt `vector`.
    pub fn post_vector(&self, vector: u8, trigger: Trigger) {
        let (word, bit) = (usize::from(vector / 64), 1u64 << (vector % 64));
        match trigger {
            Trigger::Level => self.level[word].fetch_or(bit, Ordering::Relaxed),
            Trigger::Edge => self.level[word].fetch_and(!bit, Ordering::Relaxed),
        };
        self.vectors[word].fetch_or(bit, Ordering::Release);
        self.announce(VECTORS);
    }

    /// Posts a non-maskable interrupt.
    pub fn post_nmi(&self) {
        self.announce(NMI);
    }

    /// Posts INIT. A start-up IPI posted before is overtaken by it.
    pub fn post_init(&self) {
        self.events.fetch_and(!SIPI, Ordering::SeqCst);
        self.announce(INIT);
    }

    /// Posts a start-up IPI.
    pub fn post_sipi(&self, vector: u8) {
        self.sipi.store(vector, Ordering::Release);
        self.announce(SIPI);
    }

    /// Leads the output of `controller` to the processor's INTR. Only the first has an effect.
    pub fn connect(&self, controller: Arc<dyn ExternalController>) {
        self.controller.get_or_init(|| controller);
    }

    /// Drives INTR. The processor looks each time that it is driven high, so that nothing need be
    /// remembered of what was behind an interrupt that it has taken.
    pub fn set_external(&self, high: bool) {
        self.external.store(high, Ordering::Release);
        if high {
            self.announce(EXTERNAL);
        }
    }

    /// Is INTR high?
    pub fn external(&self) -> bool {
        self.external.load(Ordering::Acquire)
    }

    /// Takes an interrupt from the controller; `None` when there is no controller.
    pub(crate) fn acknowledge_external(&self) -> Option<u8> {
        self.controller
            .get()
            .map(|controller| controller.acknowledge())
    }

    /// Asks the processor's thread to return to the machine's loop.
    pub fn kick(&self) {
        self.announce(KICK);
    }

    fn announce(&self, event: u32) {
        // Sequentially consistent against `wait_until`: either this sees the sleeper, or the
        // sleeper sees the event.
        self.events.fetch_or(event, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) != 0 {
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }

    /// Sleeps until something is posted or `deadline` has passed. Returns at once when something
    /// is there already; may return without a reason.
    pub fn wait_until(&self, deadline: Option<Instant>) {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleeping.store(1, Ordering::SeqCst);
        while self.events.load(Ordering::SeqCst) == 0 {
            guard = match deadline {
                None => self
                    .wake
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    let (guard, _) = self
                        .wake
                        .wait_timeout(guard, left)
                        .unwrap_or_else(PoisonError::into_inner);
                    guard
                }
            };
        }
        self.sleeping.store(0, Ordering::SeqCst);
        drop(guard);
    }

    /// How interrupts address the processor now.
    pub fn address(&self) -> Address {
        Address::unpack(self.id, self.address.load(Ordering::Acquire))
    }

    pub(super) fn publish(&self, address: Address) {
        let packed = address.pack();
        if self.address.load(Ordering::Relaxed) != packed {
            self.address.store(packed, Ordering::Release);
        }
    }

    /// Takes everything out. Vectors go to `deliver` with their trigger mode.
    pub(super) fn take(&self, mut deliver: impl FnMut(u8, Trigger)) -> Posted {
        let events = self.events.swap(0, Ordering::SeqCst);
        if events & VECTORS != 0 {
            for (index, (vectors, level)) in self.vectors.iter().zip(&self.level).enumerate() {
                let mut rest = vectors.swap(0, Ordering::Acquire);
                let level = level.load(Ordering::Relaxed);
                while rest != 0 {
                    let bit = rest.trailing_zeros();
                    rest &= rest - 1;
                    let trigger = match level >> bit & 1 {
                        1 => Trigger::Level,
                        _ => Trigger::Edge,
                    };
                    deliver((index as u32 * 64 + bit) as u8, trigger);
                }
            }
        }
        Posted {
            nmi: events & NMI != 0,
            init: events & INIT != 0,
            sipi: (events & SIPI != 0).then(|| self.sipi.load(Ordering::Acquire)),
            kick: events & KICK != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    fn xapic(logical: u8, flat: bool) -> Address {
        Address {
            id: 1,
            enabled: true,
            x2apic: false,
            logical: u32::from(logical) << 24,
            flat,
            priority: 0x30,
        }
    }

    #[test]
    fn an_address_survives_publishing() {
        let mailbox = Mailbox::new(1);
        assert!(!mailbox.address().enabled);
        mailbox.publish(xapic(0x12, false));
        assert_eq!(mailbox.address(), xapic(0x12, false));
    }

    #[test]
    fn logical_destinations_follow_their_models() {
        assert!(xapic(0b10, true).matches_logical(0b11));
        assert!(!xapic(0b10, true).matches_logical(0b01));
        assert!(xapic(0x21, false).matches_logical(0x23));
        assert!(!xapic(0x21, false).matches_logical(0x31));
        assert!(xapic(0x21, false).matches_logical(0xf1));
        assert!(xapic(0, true).matches_logical(0xff));
        let x2apic = Address {
            x2apic: true,
            logical: 0x0002_0004,
            ..xapic(0, false)
        };
        assert!(x2apic.matches_logical(0x0002_0006));
        assert!(!x2apic.matches_logical(0x0003_0004));
        assert!(x2apic.matches_logical(u32::MAX));
    }

    #[test]
    fn a_posted_vector_is_taken_once_with_its_trigger() {
        let mailbox = Mailbox::new(0);
        mailbox.post_vector(0x41, Trigger::Level);
        mailbox.post_vector(0xff, Trigger::Edge);
        let mut got = Vec::new();
        mailbox.take(|vector, trigger| got.push((vector, trigger)));
        mailbox.take(|vector, trigger| got.push((vector, trigger)));
        assert_eq!(got, [(0x41, Trigger::Level), (0xff, Trigger::Edge)]);
        assert!(!mailbox.has_events());
    }

    #[test]
    fn init_overtakes_an_earlier_start_up() {
        let mailbox = Mailbox::new(0);
        mailbox.post_sipi(7);
        mailbox.post_init();
        let posted = mailbox.take(|_, _| {});
        assert_eq!((posted.init, posted.sipi), (true, None));
        mailbox.post_init();
        mailbox.post_sipi(9);
        let posted = mailbox.take(|_, _| {});
        assert_eq!((posted.init, posted.sipi), (true, Some(9)));
    }

    #[test]
    fn a_wait_ends_at_its_deadline() {
        let start = Instant::now();
        let deadline = start + Duration::from_millis(5);
        Mailbox::new(0).wait_until(Some(deadline));
        assert!(Instant::now() >= deadline);
    }

    #[test]
    fn no_wake_up_is_lost() {
        let (ping, pong) = (Arc::new(Mailbox::new(0)), Arc::new(Mailbox::new(1)));
        let other = {
            let (ping, pong) = (Arc::clone(&ping), Arc::clone(&pong));
            std::thread::spawn(move || {
                for _ in 0..2_000 {
                    while !ping.take(|_, _| {}).kick {
                        ping.wait_until(None);
                    }
                    pong.post_vector(0x40, Trigger::Edge);
                }
            })
        };
        for _ in 0..2_000 {
            ping.kick();
            let mut got = false;
            while !got {
                pong.wait_until(None);
                pong.take(|_, _| got = true);
            }
        }
        other.join().unwrap();
    }
}
