//! One counter of the 8254 (Intel data sheet 231164), as a function of time.
//!
//! Nothing counts: the counter knows at which tick it was loaded, and everything follows from how
//! many have passed. Ticks are those of its input clock.

/// Which bytes of a count are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Access {
    /// The low byte; the high one is 0.
    Low = 1,
    /// The high byte; the low one is 0.
    High = 2,
    /// The low byte, then the high one.
    Both = 3,
}

impl Access {
    /// From bits 4 and 5 of a control word; `None` for the counter-latch command.
    pub(super) fn of(bits: u8) -> Option<Self> {
        match bits & 3 {
            1 => Some(Self::Low),
            2 => Some(Self::High),
            3 => Some(Self::Both),
            _ => None,
        }
    }
}

/// A counter. Modes: 0 interrupt at the end, 1 one-shot, 2 rate, 3 square wave, 4 strobe started
/// by software, 5 strobe started by the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counter {
    pub(super) mode: u8,
    pub(super) decimal: bool,
    pub(super) access: Access,
    /// The count, 1 to 0x10000.
    pub(super) reload: u32,
    /// When it was loaded; `None` while it waits for a count or for its gate.
    pub(super) start: Option<u64>,
    /// A count for later: in modes 1 and 5 from the next trigger on, in 2 and 3 from `next_at` on.
    pub(super) next: Option<u32>,
    pub(super) next_at: u64,
    pub(super) gate: bool,
    /// Ticks that had passed when the gate went low in a mode that stops then.
    pub(super) held: Option<u64>,
    /// The low byte of a count of which the high one is still to come.
    pub(super) written_low: Option<u8>,
    pub(super) latched_count: Option<u16>,
    pub(super) latched_status: Option<u8>,
    /// The next read gives the high byte.
    pub(super) reads_high: bool,
}

impl Counter {
    /// A counter as no program has set it.
    pub(super) const fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            decimal: false,
            access: Access::Both,
            reload: 0x1_0000,
            start: None,
            next: None,
            next_at: 0,
            gate,
            held: None,
            written_low: None,
            latched_count: None,
            latched_status: None,
            reads_high: false,
        }
    }

    /// One more than the largest count.
    fn modulus(&self) -> u32 {
        if self.decimal { 10_000 } else { 0x1_0000 }
    }

    fn elapsed(&self, start: u64, now: u64) -> u64 {
        self.held.unwrap_or_else(|| now.saturating_sub(start))
    }

    /// Lets a count take effect whose time has come.
    fn advance(&mut self, now: u64) {
        if matches!(self.mode, 2 | 3)
            && now >= self.next_at
            && let Some(next) = self.next.take()
        {
            self.reload = next;
            self.start = Some(self.next_at);
        }
    }

    /// The output at `now`.
    pub(super) fn output(&mut self, now: u64) -> bool {
        self.advance(now);
        let Some(start) = self.start else {
            return self.mode != 0;
        };
        let (elapsed, reload) = (self.elapsed(start, now), u64::from(self.reload));
        match self.mode {
            0 | 1 => elapsed >= reload,
            2 => !self.gate || elapsed % reload != reload - 1,
            3 => !self.gate || elapsed % reload < reload.div_ceil(2),
            _ => elapsed != reload,
        }
    }

    /// When the output rises next, after `now`, if nothing is changed.
    pub(super) fn rise_after(&mut self, now: u64) -> Option<u64> {
        self.advance(now);
        if self.held.is_some() {
            return None;
        }
        let (start, reload) = (self.start?, u64::from(self.reload));
        let rise = match self.mode {
            0 | 1 => start + reload,
            2 | 3 => start + (now.saturating_sub(start) / reload + 1) * reload,
            _ => start + reload + 1,
        };
        (rise > now).then_some(rise)
    }

    /// What the counter holds, as it is read.
    fn count(&mut self, now: u64) -> u16 {
        self.advance(now);
        let (reload, modulus) = (u64::from(self.reload), u64::from(self.modulus()));
        let elapsed = self.start.map_or(0, |start| self.elapsed(start, now));
        let left = match self.mode {
            2 => reload - elapsed % reload,
            3 => {
                // It counts by two, from the count made even, once for each half.
                let (within, half) = (elapsed % reload, reload.div_ceil(2));
                (reload & !1) - 2 * (within % half).min(reload / 2)
            }
            _ => reload + modulus - elapsed % modulus,
        };
        let left = (left % modulus) as u16;
        if self.decimal { to_decimal(left) } else { left }
    }

    fn status(&mut self, now: u64) -> u8 {
        let output = self.output(now);
        let not_loaded = self.start.is_none() || self.next.is_some();
        u8::from(output) << 7
            | u8::from(not_loaded) << 6
            | (self.access as u8) << 4
            | self.mode << 1
            | u8::from(self.decimal)
    }

    /// A control word for this counter that is no command.
    pub(super) fn configure(&mut self, access: Access, word: u8) {
        *self = Self {
            // Modes 6 and 7 are 2 and 3.
            mode: match word >> 1 & 7 {
                mode @ 6.. => mode - 4,
                mode => mode,
            },
            decimal: word & 1 != 0,
            access,
            ..Self::new(self.gate)
        };
    }

    /// Keeps the count until it is read.
    pub(super) fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(now));
        }
    }

    /// Keeps the status until it is read.
    pub(super) fn latch_status(&mut self, now: u64) {
        if self.latched_status.is_none() {
            self.latched_status = Some(self.status(now));
        }
    }

    /// A read of the counter's port.
    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let count = match self.latched_count {
            Some(count) => count,
            None => self.count(now),
        };
        let [low, high] = count.to_le_bytes();
        let (byte, complete) = match (self.access, self.reads_high) {
            (Access::Low, _) => (low, true),
            (Access::High, _) => (high, true),
            (Access::Both, false) => (low, false),
            (Access::Both, true) => (high, true),
        };
        self.reads_high = !complete;
        if complete {
            self.latched_count = None;
        }
        byte
    }

    /// A write to the counter's port.
    pub(super) fn write(&mut self, byte: u8, now: u64) {
        self.advance(now);
        let count = match (self.access, self.written_low.take()) {
            (Access::Low, _) => u16::from(byte),
            (Access::High, _) => u16::from(byte) << 8,
            (Access::Both, Some(low)) => u16::from_le_bytes([low, byte]),
            (Access::Both, None) => {
                self.written_low = Some(byte);
                if self.mode == 0 {
                    // The first byte stops the count, and the output falls.
                    self.start = None;
                }
                return;
            }
        };
        self.load(count, now);
    }

    fn load(&mut self, count: u16, now: u64) {
        let count = if self.decimal {
            from_decimal(count)
        } else {
            u32::from(count)
        };
        let count = if count == 0 { self.modulus() } else { count };
        match (self.mode, self.start) {
            // These begin when their gate rises.
            (1 | 5, _) => self.next = Some(count),
            (2 | 3, Some(start)) => {
                let reload = u64::from(self.reload);
                self.next = Some(count);
                self.next_at = start + (now.saturating_sub(start) / reload + 1) * reload;
            }
            _ => {
                self.reload = count;
                self.start = Some(now);
                self.held = (!self.gate).then_some(0);
            }
        }
    }

    /// Drives the gate.
    pub(super) fn set_gate(&mut self, high: bool, now: u64) {
        self.advance(now);
        let rises = high && !self.gate;
        let falls = !high && self.gate;
        self.gate = high;
        match self.mode {
            1 | 5 if rises => {
                if let Some(next) = self.next.take() {
                    self.reload = next;
                    self.start = Some(now);
                } else if self.start.is_some() {
                    self.start = Some(now);
                }
            }
            2 | 3 if rises && self.start.is_some() => {
                self.reload = self.next.take().unwrap_or(self.reload);
                self.start = Some(now);
                self.held = None;
            }
            0 | 4 if rises => {
                if let Some(held) = self.held.take() {
                    self.start = Some(now.saturating_sub(held));
                }
            }
            0 | 2..=4 if falls => {
                self.held = self.start.map(|start| self.elapsed(start, now));
            }
            _ => {}
        }
    }
}

/// Four decimal digits, each in four bits.
fn to_decimal(value: u16) -> u16 {
    [1000, 100, 10, 1]
        .into_iter()
        .fold(0, |digits, place| (digits << 4) | (value / place % 10))
}

/// The value of four digits; of what is no decimal digit, its value all the same.
fn from_decimal(digits: u16) -> u32 {
    let value = [12, 8, 4, 0].into_iter().fold(0, |value, shift| {
        value * 10 + u32::from(digits >> shift & 0xf)
    });
    value % 10_000
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn counter(word: u8, count: u16) -> Counter {
        let mut counter = Counter::new(true);
        counter.configure(Access::of(word >> 4).unwrap(), word);
        for byte in count.to_le_bytes() {
            counter.write(byte, 0);
        }
        counter
    }

    fn read(counter: &mut Counter, now: u64) -> u16 {
        u16::from_le_bytes([counter.read(now), counter.read(now)])
    }

    fn output(counter: &mut Counter, ticks: std::ops::Range<u64>) -> String {
        let levels = ticks.map(|now| if counter.output(now) { '1' } else { '0' });
        levels.collect()
    }

    /// The wave forms of the data sheet, from the tick of the load on.
    #[test]
    fn each_mode_has_its_wave_form() {
        assert_eq!(output(&mut counter(0x30, 4), 0..8), "00001111");
        assert_eq!(output(&mut counter(0x34, 3), 0..9), "110110110");
        assert_eq!(output(&mut counter(0x36, 4), 0..8), "11001100");
        assert_eq!(output(&mut counter(0x36, 5), 0..10), "1110011100");
        assert_eq!(output(&mut counter(0x38, 4), 0..8), "11110111");
        for (word, expected) in [(0x32, "1110001111"), (0x3a, "1111110111")] {
            let mut counter = counter(word, 3);
            counter.set_gate(false, 0);
            assert_eq!(output(&mut counter, 0..3), "111");
            counter.set_gate(true, 3);
            assert_eq!("111".to_owned() + &output(&mut counter, 3..10), expected);
        }
    }

    #[test]
    fn each_mode_counts_its_way() {
        let counts = |word, count, ticks: std::ops::Range<u64>| {
            let mut counter = counter(word, count);
            ticks.map(|now| read(&mut counter, now)).collect::<Vec<_>>()
        };
        assert_eq!(counts(0x30, 2, 0..4), [2, 1, 0, 0xffff]);
        assert_eq!(counts(0x31, 0x10, 9..12), [1, 0, 0x9999]);
        assert_eq!(counts(0x34, 3, 0..5), [3, 2, 1, 3, 2]);
        assert_eq!(counts(0x36, 4, 0..5), [4, 2, 4, 2, 4]);
        assert_eq!(counts(0x36, 5, 0..6), [4, 2, 0, 4, 2, 4]);
        assert_eq!(counts(0x34, 0, 0..2), [0, 0xffff]);
        assert_eq!(counts(0x35, 0, 0..2), [0, 0x9999]);
    }

    #[test]
    fn rises_are_where_the_output_rises() {
        for word in [0x30, 0x34, 0x36, 0x38] {
            for count in 2..6 {
                let mut counter = counter(word, count);
                let levels = output(&mut counter, 0..40);
                for now in 0..20 {
                    let rise = levels[now..].find("01").map(|at| (now + at + 1) as u64);
                    assert_eq!(
                        counter.rise_after(now as u64),
                        rise,
                        "{word:#x} {count} {now}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_new_count_waits_for_the_end_of_the_period() {
        let mut counter = counter(0x34, 4);
        assert!(counter.output(1));
        counter.write(2, 1);
        counter.write(0, 1);
        assert_eq!(output(&mut counter, 1..9), "11010101");
        // In mode 0 it begins at once.
        let mut counter = self::counter(0x30, 4);
        counter.write(2, 9);
        assert!(!counter.output(9));
        counter.write(0, 10);
        assert_eq!(output(&mut counter, 10..13), "001");
    }

    #[test]
    fn a_low_gate_holds_the_count_or_the_output() {
        let mut one = counter(0x30, 4);
        one.set_gate(false, 1);
        assert_eq!(read(&mut one, 100), 3);
        assert_eq!(one.rise_after(100), None);
        one.set_gate(true, 100);
        assert_eq!(output(&mut one, 100..104), "0001");
        let mut rate = counter(0x34, 3);
        rate.set_gate(false, 2);
        assert_eq!(output(&mut rate, 2..9), "1111111");
        rate.set_gate(true, 9);
        assert_eq!(output(&mut rate, 9..13), "1101");
    }

    #[test]
    fn latches_hold_until_they_are_read() {
        let mut counter = counter(0x34, 100);
        counter.latch_count(10);
        counter.latch_count(20);
        counter.latch_status(10);
        assert_eq!(counter.read(50), 0b1011_0100);
        assert_eq!(read(&mut counter, 50), 90);
        assert_eq!(read(&mut counter, 50), 50);
        // A count that is not in effect yet is told.
        counter.write(1, 50);
        counter.write(1, 50);
        counter.latch_status(50);
        assert_eq!(counter.read(50), 0b1111_0100);
        for (word, written, expected) in [(0x14, 0x34, 0x34), (0x24, 0x12, 0x12)] {
            let mut single = Counter::new(true);
            single.configure(Access::of(word >> 4).unwrap(), word);
            single.write(written, 0);
            assert_eq!(single.read(0), expected);
        }
    }

    #[test]
    fn decimal_digits_go_both_ways() {
        for value in [0, 9, 10, 1234, 9999] {
            assert_eq!(from_decimal(to_decimal(value)), u32::from(value));
        }
        assert_eq!(to_decimal(1234), 0x1234);
        assert!(from_decimal(0xffff) < 10_000);
    }

    proptest! {
        #[test]
        fn no_sequence_panics(
            steps in proptest::collection::vec((0u8..6, any::<u8>(), 0u64..0x3_0000), 0..60),
        ) {
            let (mut counter, mut now) = (Counter::new(true), 0);
            for (what, value, later) in steps {
                now += later;
                match what {
                    0 => if let Some(access) = Access::of(value >> 4) {
                        counter.configure(access, value);
                    },
                    1 => counter.write(value, now),
                    2 => drop(counter.read(now)),
                    3 => counter.set_gate(value & 1 != 0, now),
                    4 => counter.latch_status(now),
                    _ => counter.latch_count(now),
                }
                counter.output(now);
                if let Some(rise) = counter.rise_after(now) {
                    prop_assert!(rise > now);
                }
            }
        }
    }
}
