//! The local APIC's timer: one-shot, periodic and TSC-deadline (SDM vol. 3, 11.5.4).

use super::BUS_KHZ;

const MODE_SHIFT: u32 = 17;

/// Bits 17-18 of the timer's entry in the local vector table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl Mode {
    pub(super) fn of(entry: u32) -> Self {
        match entry >> MODE_SHIFT & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// Counts in TSC ticks: a count of the bus clock is turned into a TSC value once, when it starts.
#[derive(Debug)]
pub(super) struct Timer {
    tsc_khz: u64,
    initial: u32,
    /// The divide configuration register.
    divide: u32,
    /// When it fires; `None` when it does not run.
    deadline: Option<u64>,
}

impl Timer {
    pub(super) fn new(tsc_khz: u64) -> Self {
        Self {
            tsc_khz: tsc_khz.max(1),
            initial: 0,
            divide: 0,
            deadline: None,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.tsc_khz);
    }

    pub(super) fn set_tsc_khz(&mut self, tsc_khz: u64) {
        self.tsc_khz = tsc_khz.max(1);
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        1 << ((code + 1) & 7)
    }

    /// TSC ticks that `count` counts take; at least one.
    fn ticks(&self, count: u32) -> u64 {
        let bus = u128::from(count) * u128::from(self.divisor());
        let ticks = bus * u128::from(self.tsc_khz) / u128::from(BUS_KHZ);
        u64::try_from(ticks).unwrap_or(u64::MAX).max(1)
    }

    /// The current count register.
    pub(super) fn current(&self, entry: u32, now: u64) -> u32 {
        if matches!(Mode::of(entry), Mode::TscDeadline | Mode::Reserved) || self.initial == 0 {
            return 0;
        }
        let Some(deadline) = self.deadline else {
            return 0;
        };
        let period = self.ticks(self.initial);
        let left = match deadline.checked_sub(now) {
            Some(left) => left,
            None if Mode::of(entry) == Mode::Periodic => period - (now - deadline) % period,
            None => return 0,
        };
        let bus = u128::from(left) * u128::from(BUS_KHZ) / u128::from(self.tsc_khz);
        let count = bus / u128::from(self.divisor());
        u32::try_from(count)
            .unwrap_or(u32::MAX)
            .clamp(1, self.initial)
    }

    /// Writes the initial count, which starts the count; 0 stops it.
    pub(super) fn start(&mut self, entry: u32, count: u32, now: u64) {
        if matches!(Mode::of(entry), Mode::TscDeadline | Mode::Reserved) {
            return;
        }
        self.resume(count, count, now);
    }

    /// Goes on with `left` of `initial` counts to go.
    pub(super) fn resume(&mut self, initial: u32, left: u32, now: u64) {
        self.initial = initial;
        let left = left.min(initial);
        self.deadline = (left != 0).then(|| now.saturating_add(self.ticks(left)));
    }

    /// Writes the divide configuration register; a running count goes on from where it is.
    pub(super) fn set_divide(&mut self, entry: u32, value: u32, now: u64) {
        let left = self.current(entry, now);
        self.divide = value & 0b1011;
        if left != 0 {
            self.resume(self.initial, left, now);
        }
    }

    /// The timer's entry changed: a change to or from TSC-deadline mode stops the timer.
    pub(super) fn change_mode(&mut self, old: u32, new: u32) {
        let deadline_mode = |entry| Mode::of(entry) == Mode::TscDeadline;
        if deadline_mode(old) != deadline_mode(new) {
            self.deadline = None;
            self.initial = 0;
        }
    }

    /// Reads IA32_TSC_DEADLINE.
    pub(super) fn tsc_deadline(&self, entry: u32) -> u64 {
        match Mode::of(entry) {
            Mode::TscDeadline => self.deadline.unwrap_or(0),
            _ => 0,
        }
    }

    /// Writes IA32_TSC_DEADLINE; without effect in another mode.
    pub(super) fn set_tsc_deadline(&mut self, entry: u32, value: u64) {
        if Mode::of(entry) == Mode::TscDeadline {
            self.deadline = (value != 0).then_some(value);
        }
    }

    /// Has the time come? Then stops, or in periodic mode goes on with the next period: those
    /// that passed meanwhile are one.
    pub(super) fn expire(&mut self, entry: u32, now: u64) -> bool {
        let Some(deadline) = self.deadline.filter(|deadline| now >= *deadline) else {
            return false;
        };
        self.deadline = None;
        if Mode::of(entry) == Mode::Periodic && self.initial != 0 {
            let period = self.ticks(self.initial);
            let into = (now - deadline) % period;
            self.deadline = Some(now.saturating_add(period - into));
        }
        true
    }
}
