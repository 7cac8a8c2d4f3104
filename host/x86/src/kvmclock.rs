//! The guest's clocks: its time-stamp counter, and the paravirtual clock that KVM defined
//! (Linux, Documentation/virt/kvm/x86/{msr,cpuid}.rst).
//!
//! One [`GuestClock`] belongs to a VM and is shared by its processors, so that their counters are
//! one: `tsc = host counter × ratio + offset`, and the paravirtual clock is a straight line over
//! that: `nanoseconds = (tsc − origin) × 10⁶ / tsc_khz`. Both go on from their saved values after a
//! move, and neither ever goes back. A [`KvmClock`] belongs to a processor and writes the line
//! into the page that the guest chose.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::memory::PhysicalMemory;

/// MSR that holds the address of a processor's clock page; bit 0 enables it.
pub const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// MSR at whose write the wall clock of the boot is written to the address.
pub const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;

/// `pvclock_vcpu_time_info.flags`: readings of all processors are one line.
const TSC_STABLE: u8 = 1 << 0;

/// Fraction bits of the ratio of guest to host counter.
const RATIO_BITS: u32 = 48;

/// Frequencies that are accepted for a guest's counter.
const TSC_KHZ: std::ops::RangeInclusive<u64> = 1_000..=100_000_000;

/// The frequency of a saved state cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("TSC frequency {0} kHz is not between 1 MHz and 100 GHz")]
pub struct FrequencyError(pub u64);

/// The host's time-stamp counter; hosts that have none count nanoseconds.
#[inline]
pub fn host_tsc() -> u64 {
    crate::host::counter()
}

/// A VM's time-stamp counter and paravirtual clock.
#[derive(Debug)]
pub struct GuestClock {
    host_khz: u64,
    guest_khz: AtomicU64,
    /// Guest ticks a host tick, with [`RATIO_BITS`] of fraction.
    ratio: AtomicU64,
    offset: AtomicU64,
    /// The guest's TSC at which the paravirtual clock read `origin_ns`.
    origin_tsc: AtomicU64,
    origin_ns: AtomicU64,
    /// It was set from a saved moment before.
    resumed: AtomicBool,
}

/// A moment as a VM's clock saw it, to be saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClockReading {
    /// The guest's TSC.
    pub tsc: u64,
    /// Its frequency in kHz.
    pub tsc_khz: u64,
    /// The paravirtual clock, in nanoseconds.
    pub kvmclock_ns: u64,
    /// CLOCK_REALTIME of the host, in nanoseconds.
    pub realtime_ns: u64,
}

impl GuestClock {
    /// A clock that starts at 0 now. The guest's TSC runs at the host's frequency.
    pub fn new(host_khz: u64) -> Self {
        let host_khz = host_khz.clamp(*TSC_KHZ.start(), *TSC_KHZ.end());
        let clock = Self {
            host_khz,
            guest_khz: AtomicU64::new(host_khz),
            ratio: AtomicU64::new(1 << RATIO_BITS),
            offset: AtomicU64::new(0),
            origin_tsc: AtomicU64::new(0),
            origin_ns: AtomicU64::new(0),
            resumed: AtomicBool::new(false),
        };
        clock.set_tsc(host_tsc(), 0);
        clock
    }

    /// The guest's TSC now.
    #[inline]
    pub fn tsc(&self) -> u64 {
        self.tsc_at(host_tsc())
    }

    /// The guest's TSC when the host's was `host`.
    #[inline]
    pub fn tsc_at(&self, host: u64) -> u64 {
        self.scale(host)
            .wrapping_add(self.offset.load(Ordering::Relaxed))
    }

    #[inline]
    fn scale(&self, host: u64) -> u64 {
        let ratio = self.ratio.load(Ordering::Relaxed);
        if ratio == 1 << RATIO_BITS {
            return host;
        }
        ((u128::from(host) * u128::from(ratio)) >> RATIO_BITS) as u64
    }

    /// Frequency of the guest's TSC in kHz.
    pub fn tsc_khz(&self) -> u64 {
        self.guest_khz.load(Ordering::Relaxed)
    }

    /// How long until the guest's TSC reads `deadline`; zero when it has.
    pub fn until(&self, deadline: u64) -> Duration {
        // A counter that wrapped is one whose deadline is behind.
        let ticks = deadline.saturating_sub(self.tsc());
        let ns = u128::from(ticks) * 1_000_000 / u128::from(self.tsc_khz());
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// The paravirtual clock when the guest's TSC is `tsc`.
    pub fn kvmclock_ns(&self, tsc: u64) -> u64 {
        let (mul, shift) = time_scale(self.tsc_khz());
        let since = tsc.wrapping_sub(self.origin_tsc.load(Ordering::Relaxed));
        self.origin_ns
            .load(Ordering::Relaxed)
            .wrapping_add(scale_delta(since, mul, shift))
    }

    /// All clocks at one moment.
    pub fn read(&self) -> ClockReading {
        let (host, realtime_ns) = host_moment();
        let tsc = self.tsc_at(host);
        ClockReading {
            tsc,
            tsc_khz: self.tsc_khz(),
            kvmclock_ns: self.kvmclock_ns(tsc),
            realtime_ns,
        }
    }

    /// Goes on from a saved moment: what passed since by CLOCK_REALTIME has passed for the guest
    /// too, never less than nothing. Call it while the VM's processors are stopped. Processors
    /// were saved one after the other: after the first, a moment that differs by less than a second
    /// from what the clock says is taken as the same, so that their counters stay one. (Readings
    /// of CLOCK_REALTIME on two hosts differ by what their clocks do, so compare no closer.)
    ///
    /// # Errors
    /// [`FrequencyError`] for a frequency that cannot be; nothing has changed then.
    pub fn resume(&self, saved: &ClockReading) -> Result<(), FrequencyError> {
        if !TSC_KHZ.contains(&saved.tsc_khz) {
            return Err(FrequencyError(saved.tsc_khz));
        }
        let (host, now_ns) = host_moment();
        let passed = now_ns.saturating_sub(saved.realtime_ns);
        let ticks = (u128::from(passed) * u128::from(saved.tsc_khz) / 1_000_000) as u64;
        let tsc = saved.tsc.wrapping_add(ticks);
        let second = saved.tsc_khz.saturating_mul(1000);
        let line_tsc = self.tsc_at(host);
        let same_moment = self.resumed.swap(true, Ordering::Relaxed)
            && self.tsc_khz() == saved.tsc_khz
            && self.kvmclock_ns(saved.tsc).abs_diff(saved.kvmclock_ns) < 1_000_000_000
            && line_tsc.abs_diff(tsc) < second;
        if same_moment {
            // The line may still be behind what this processor has shown already.
            if line_tsc < saved.tsc {
                self.set_tsc(host, saved.tsc);
            }
            return Ok(());
        }
        let ratio = (u128::from(saved.tsc_khz) << RATIO_BITS) / u128::from(self.host_khz);
        self.ratio.store(ratio as u64, Ordering::Relaxed);
        self.guest_khz.store(saved.tsc_khz, Ordering::Relaxed);
        self.set_tsc(host, tsc);
        self.origin_tsc.store(saved.tsc, Ordering::Relaxed);
        self.origin_ns.store(saved.kvmclock_ns, Ordering::Relaxed);
        Ok(())
    }

    fn set_tsc(&self, host: u64, tsc: u64) {
        self.offset
            .store(tsc.wrapping_sub(self.scale(host)), Ordering::Relaxed);
    }
}

/// The host's TSC and CLOCK_REALTIME at one moment: the closest pair of three.
fn host_moment() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..3 {
        let before = host_tsc();
        let realtime = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64);
        let width = host_tsc().wrapping_sub(before);
        if width < best.0 {
            best = (width, before + width / 2, realtime);
        }
    }
    (best.1, best.2)
}

/// Multiplier and shift with which a guest turns TSC ticks into nanoseconds:
/// `((ticks << shift) × multiplier) >> 32`, where a negative shift goes right.
pub fn time_scale(tsc_khz: u64) -> (u32, i8) {
    // Shift the frequency into (10^9, 2×10^9], so that the multiplier keeps 31 or 32 bits.
    let mut hz = u128::from(tsc_khz.max(1)) * 1000;
    let mut shift = 0i8;
    while hz > 2_000_000_000 {
        hz >>= 1;
        shift -= 1;
    }
    while hz <= 1_000_000_000 {
        hz <<= 1;
        shift += 1;
    }
    // Divide by the exact frequency, not by the shifted and so truncated one.
    let exact = u128::from(tsc_khz.max(1)) * 1000;
    let numerator = 1_000_000_000u128 << 32;
    let multiplier = if shift < 0 {
        (numerator << -shift) / exact
    } else {
        numerator / (exact << shift)
    };
    (u32::try_from(multiplier).unwrap_or(u32::MAX), shift)
}

/// What a guest computes from the multiplier and shift.
pub fn scale_delta(ticks: u64, multiplier: u32, shift: i8) -> u64 {
    let shifted = if shift < 0 {
        ticks >> -shift
    } else {
        ticks << shift
    };
    ((u128::from(shifted) * u128::from(multiplier)) >> 32) as u64
}

/// A processor's view of the clock: the two MSRs and the pages that they name.
#[derive(Debug, Default)]
pub struct KvmClock {
    system_time: u64,
    wall_clock: u64,
    version: u32,
    /// The page lags behind the MSR: a state was restored, and the processor has not run since.
    stale: bool,
}

impl KvmClock {
    /// Both MSRs zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// The value of [`MSR_SYSTEM_TIME`].
    pub fn system_time_msr(&self) -> u64 {
        self.system_time
    }

    /// The value of [`MSR_WALL_CLOCK`].
    pub fn wall_clock_msr(&self) -> u64 {
        self.wall_clock
    }

    /// Writes [`MSR_SYSTEM_TIME`], and the clock page when it enables one. An address that is not
    /// RAM stays without effect, as in KVM.
    pub fn set_system_time(&mut self, value: u64, clock: &GuestClock, memory: &dyn PhysicalMemory) {
        self.system_time = value;
        self.update(clock, memory);
    }

    /// Writes [`MSR_WALL_CLOCK`]: the wall clock at which the paravirtual clock was zero.
    pub fn set_wall_clock(&mut self, value: u64, clock: &GuestClock, memory: &dyn PhysicalMemory) {
        self.wall_clock = value;
        if value == 0 {
            return;
        }
        let now = clock.read();
        let boot = now.realtime_ns.saturating_sub(now.kvmclock_ns);
        let mut body = [0; 8];
        body[..4].copy_from_slice(&((boot / 1_000_000_000) as u32).to_le_bytes());
        body[4..].copy_from_slice(&((boot % 1_000_000_000) as u32).to_le_bytes());
        self.publish(value, &body, memory);
    }

    /// Takes over both MSRs from a saved state. Memory stays as it is until [`KvmClock::refresh`]:
    /// it may still be another process's, which runs on when this one is not given the guest.
    pub fn restore(&mut self, (system_time, wall_clock): (u64, u64)) {
        self.wall_clock = wall_clock;
        self.system_time = system_time;
        self.stale = true;
    }

    /// Writes the page anew if a state was restored since it was written.
    pub fn refresh(&mut self, clock: &GuestClock, memory: &dyn PhysicalMemory) {
        if self.stale {
            self.update(clock, memory);
        }
    }

    /// Writes the page anew, after the clock was changed.
    pub fn update(&mut self, clock: &GuestClock, memory: &dyn PhysicalMemory) {
        self.stale = false;
        if self.system_time & 1 == 0 {
            return;
        }
        let (multiplier, shift) = time_scale(clock.tsc_khz());
        let mut body = [0; 28];
        body[4..12].copy_from_slice(&clock.origin_tsc.load(Ordering::Relaxed).to_le_bytes());
        body[12..20].copy_from_slice(&clock.origin_ns.load(Ordering::Relaxed).to_le_bytes());
        body[20..24].copy_from_slice(&multiplier.to_le_bytes());
        body[24] = shift as u8;
        body[25] = TSC_STABLE;
        self.publish(self.system_time & !1, &body, memory);
    }

    /// Writes a structure that begins with a version: odd while the rest changes.
    fn publish(&mut self, address: u64, body: &[u8], memory: &dyn PhysicalMemory) {
        // The guest may have a version there already, from before a move.
        let found = load(memory, address);
        self.version = self.version.max(found) & !1;
        store(memory, address, &self.version.wrapping_add(1).to_le_bytes());
        fence(Ordering::SeqCst);
        store(memory, address.wrapping_add(4), body);
        fence(Ordering::SeqCst);
        self.version = self.version.wrapping_add(2);
        store(memory, address, &self.version.to_le_bytes());
    }
}

fn byte(memory: &dyn PhysicalMemory, address: u64) -> Option<(&AtomicU8, &AtomicU8)> {
    let page = memory.ram_page(address >> 12)?;
    // SAFETY: `ram_page` returns pointers to 4096 bytes and to a mark that are valid while
    // `memory` lives; bytes that others write are accessed atomically.
    #[expect(unsafe_code, reason = "guest memory is reached by pointer")]
    unsafe {
        let byte = page.host.as_ptr().add((address & 0xfff) as usize);
        Some((AtomicU8::from_ptr(byte), page.mark.as_ref()))
    }
}

fn load(memory: &dyn PhysicalMemory, address: u64) -> u32 {
    let bytes = std::array::from_fn(|index| {
        byte(memory, address.wrapping_add(index as u64))
            .map_or(0, |(byte, _)| byte.load(Ordering::Relaxed))
    });
    u32::from_le_bytes(bytes)
}

fn store(memory: &dyn PhysicalMemory, address: u64, bytes: &[u8]) {
    for (index, value) in bytes.iter().enumerate() {
        if let Some((byte, mark)) = byte(memory, address.wrapping_add(index as u64)) {
            byte.store(*value, Ordering::Release);
            mark.store(1, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::RamPage;
    use proptest::prelude::*;
    use std::ptr::NonNull;

    /// Two pages of RAM from address 0 on.
    #[derive(Debug)]
    struct Ram {
        bytes: Box<[AtomicU8; 8192]>,
        marks: [AtomicU8; 2],
    }

    impl Ram {
        fn new() -> Self {
            Self {
                bytes: Box::new(std::array::from_fn(|_| AtomicU8::new(0))),
                marks: Default::default(),
            }
        }

        fn read(&self, at: usize, len: usize) -> Vec<u8> {
            let bytes = &self.bytes[at..at + len];
            bytes.iter().map(|b| b.load(Ordering::Relaxed)).collect()
        }

        fn u32(&self, at: usize) -> u32 {
            u32::from_le_bytes(self.read(at, 4).try_into().unwrap())
        }

        fn u64(&self, at: usize) -> u64 {
            u64::from_le_bytes(self.read(at, 8).try_into().unwrap())
        }

        /// What a guest reads from the page at `at`.
        fn time(&self, at: usize, tsc: u64) -> u64 {
            let scale = scale_delta(
                tsc.wrapping_sub(self.u64(at + 8)),
                self.u32(at + 24),
                self.read(at + 28, 1)[0] as i8,
            );
            self.u64(at + 16).wrapping_add(scale)
        }
    }

    impl PhysicalMemory for Ram {
        fn ram_page(&self, frame: u64) -> Option<RamPage> {
            let mark = self.marks.get(frame as usize)?;
            Some(RamPage {
                host: NonNull::from(&self.bytes[frame as usize * 4096]).cast(),
                mark: NonNull::from(mark),
            })
        }
    }

    #[test]
    fn the_guest_reads_the_line_that_the_clock_means() {
        let (ram, clock, mut page) = (Ram::new(), GuestClock::new(2_600_000), KvmClock::new());
        page.set_system_time(0x40 | 1, &clock, &ram);
        assert_eq!(ram.u32(0x40), 2, "even version");
        assert_eq!(ram.read(0x40 + 29, 1), [TSC_STABLE]);
        let tsc = 2_600_000_000 * 3600;
        assert_eq!(ram.time(0x40, tsc), clock.kvmclock_ns(tsc));
        assert!(clock.kvmclock_ns(tsc).abs_diff(3600 * 1_000_000_000) < 2000);
        assert_eq!(ram.marks[0].load(Ordering::Relaxed), 1);
        assert_eq!(ram.marks[1].load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_page_outside_of_ram_or_across_pages_is_harmless() {
        let (ram, clock, mut page) = (Ram::new(), GuestClock::new(2_600_000), KvmClock::new());
        for address in [0xff0, 0x1ff0, 0x1fff, 0x10_0000, u64::MAX] {
            page.set_system_time(address | 1, &clock, &ram);
            page.set_wall_clock(address, &clock, &ram);
        }
        page.set_system_time(0xff0 | 1, &clock, &ram);
        assert_eq!(ram.time(0xff0, 1000), clock.kvmclock_ns(1000));
    }

    #[test]
    fn the_wall_clock_is_that_of_time_zero() {
        let (ram, clock, mut page) = (Ram::new(), GuestClock::new(2_000_000), KvmClock::new());
        page.set_wall_clock(0x10, &clock, &ram);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(now.as_secs().abs_diff(u64::from(ram.u32(0x14))) < 3);
        assert!(ram.u32(0x18) < 1_000_000_000);
    }

    #[test]
    fn clocks_go_on_after_a_move_to_a_host_of_another_frequency() {
        let saved = ClockReading {
            tsc: 5_000_000_000,
            tsc_khz: 2_000_000,
            kvmclock_ns: 2_500_000_123,
            realtime_ns: host_moment().1,
        };
        let clock = GuestClock::new(3_100_000);
        clock.resume(&saved).unwrap();
        assert_eq!(clock.tsc_khz(), 2_000_000);
        let now = clock.read();
        assert!(now.tsc >= saved.tsc);
        assert!(now.kvmclock_ns >= saved.kvmclock_ns);
        assert_eq!(clock.kvmclock_ns(saved.tsc), saved.kvmclock_ns);
        assert_eq!(
            clock.kvmclock_ns(saved.tsc + 2_000_000),
            saved.kvmclock_ns + 1_000_000
        );
    }

    #[test]
    fn a_second_processor_does_not_move_the_clock() {
        let moment = host_moment().1 - 100_000_000;
        let saved = ClockReading {
            tsc: 1 << 50,
            tsc_khz: 2_000_000,
            kvmclock_ns: 1 << 49,
            realtime_ns: moment,
        };
        let clock = GuestClock::new(2_000_000);
        clock.resume(&saved).unwrap();
        let offset = clock.offset.load(Ordering::Relaxed);
        // Saved 1 ms later, and its reading jittered by 1 µs.
        clock
            .resume(&ClockReading {
                tsc: saved.tsc + 2_000_000 + 2000,
                tsc_khz: 2_000_000,
                kvmclock_ns: saved.kvmclock_ns + 1_001_000,
                realtime_ns: moment + 1_000_000,
            })
            .unwrap();
        assert_eq!(clock.offset.load(Ordering::Relaxed), offset);
    }

    #[test]
    fn a_processor_saved_later_never_sees_its_counter_go_back() {
        // The destination's CLOCK_REALTIME is behind: no time seems to have passed.
        let realtime_ns = host_moment().1 + 3_600_000_000_000;
        let clock = GuestClock::new(2_000_000);
        for tsc in [1_000, 500_000_000] {
            let saved = ClockReading {
                tsc,
                tsc_khz: 2_000_000,
                kvmclock_ns: tsc / 2,
                realtime_ns,
            };
            clock.resume(&saved).unwrap();
            assert!(clock.tsc() >= tsc);
        }
    }

    #[test]
    fn an_impossible_frequency_is_refused() {
        let clock = GuestClock::new(2_000_000);
        for tsc_khz in [0, 999, u64::MAX] {
            let saved = ClockReading {
                tsc_khz,
                ..clock.read()
            };
            assert_eq!(clock.resume(&saved), Err(FrequencyError(tsc_khz)));
        }
    }

    proptest! {
        #[test]
        fn the_scale_is_exact_to_its_31_bits(khz in 1_000u64..100_000_000, seconds in 1u64..1_000_000) {
            let (mul, shift) = time_scale(khz);
            let ticks = khz * 1000 * seconds;
            prop_assume!(ticks < 1 << 54);
            let ns = scale_delta(ticks, mul, shift);
            let exact = seconds * 1_000_000_000;
            prop_assert!(ns <= exact);
            prop_assert!(exact - ns <= exact / (1 << 30) + 2, "{} {}", ns, exact);
        }

        #[test]
        fn any_saved_moment_is_taken_or_refused(
            tsc in any::<u64>(), tsc_khz in any::<u64>(), kvmclock_ns in any::<u64>(), realtime_ns in any::<u64>()
        ) {
            let clock = GuestClock::new(2_000_000);
            let _ = clock.resume(&ClockReading { tsc, tsc_khz: tsc_khz % 200_000_000, kvmclock_ns, realtime_ns });
            clock.read();
            clock.until(tsc);
        }
    }
}
