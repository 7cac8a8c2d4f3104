//! What the guest is to do, as its command line says it.

use std::fmt;

/// What memory is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fill {
    /// Zeros.
    Zero,
    /// Random numbers; no two pages are alike.
    Random,
    /// 8 random bytes in 32; no two pages are alike.
    Compressible,
}

impl Fill {
    /// The word of the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Random => "random",
            Self::Compressible => "compressible",
        }
    }
}

/// How the guest waits for its next tick.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Wait {
    /// By HLT and the timer, as an operating system does.
    Halt,
    /// By looking at the clock all the time.
    Spin,
}

/// The parameters. Every one may be left out of a command line written by hand; what is absent
/// has the value that [`Parameters::default`] has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// Content of memory.
    pub fill: Fill,
    /// MiB that are filled, from 2 MiB on; all when absent.
    pub fill_mebibytes: Option<u64>,
    /// MiB in which the guest writes, at the start of what is filled.
    pub working_set_mebibytes: u64,
    /// MiB a second that it writes, counted in whole pages: 8 bytes of each are written.
    pub rate_mebibytes: u64,
    /// Microseconds from one tick to the next; 0: neither ticks nor writes, sleeps for ever.
    pub interval_microseconds: u64,
    /// Pages whose content is checked at each tick.
    pub scrub_pages: u64,
    /// How the guest waits.
    pub wait: Wait,
    /// Frequency of the TSC; measured when absent.
    pub tsc_kilohertz: Option<u64>,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            fill: Fill::Random,
            fill_mebibytes: None,
            working_set_mebibytes: 0,
            rate_mebibytes: 0,
            interval_microseconds: 500,
            scrub_pages: 0,
            wait: Wait::Halt,
            tsc_kilohertz: None,
        }
    }
}

impl fmt::Display for Parameters {
    /// The command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wait = match self.wait {
            Wait::Halt => "halt",
            Wait::Spin => "spin",
        };
        write!(
            f,
            "fill={} ws_mib={} rate_mib={} interval_us={} scrub_pages={} wait={wait}",
            self.fill.name(),
            self.working_set_mebibytes,
            self.rate_mebibytes,
            self.interval_microseconds,
            self.scrub_pages,
        )?;
        if let Some(size) = self.fill_mebibytes {
            write!(f, " fill_mib={size}")?;
        }
        if let Some(frequency) = self.tsc_kilohertz {
            write!(f, " tsc_khz={frequency}")?;
        }
        Ok(())
    }
}

/// A parameter, as the guest numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    Fill,
    FillMebibytes,
    WorkingSetMebibytes,
    RateMebibytes,
    IntervalMicroseconds,
    ScrubPages,
    Wait,
    TscKilohertz,
}

/// What stands before each value, in the order of [`Key`].
pub(crate) const KEYS: [&str; 8] = [
    "fill=",
    "fill_mib=",
    "ws_mib=",
    "rate_mib=",
    "interval_us=",
    "scrub_pages=",
    "wait=",
    "tsc_khz=",
];

impl Key {
    pub(crate) const ALL: [Self; 8] = [
        Self::Fill,
        Self::FillMebibytes,
        Self::WorkingSetMebibytes,
        Self::RateMebibytes,
        Self::IntervalMicroseconds,
        Self::ScrubPages,
        Self::Wait,
        Self::TscKilohertz,
    ];

    /// Is the value a word, of which the guest keeps the first letter?
    pub(crate) fn is_word(self) -> bool {
        matches!(self, Self::Fill | Self::Wait)
    }

    /// What an absent parameter is.
    pub(crate) fn default_value(self) -> u64 {
        match self {
            Self::Fill => b'r'.into(),
            // More than there is.
            Self::FillMebibytes => 1 << 40,
            Self::IntervalMicroseconds => 500,
            Self::Wait => b'h'.into(),
            Self::WorkingSetMebibytes
            | Self::RateMebibytes
            | Self::ScrubPages
            | Self::TscKilohertz => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_the_order_of_their_numbers_and_none_is_within_another() {
        for (index, key) in Key::ALL.into_iter().enumerate() {
            assert_eq!(key as usize, index);
        }
        let line = Parameters {
            fill_mebibytes: Some(1),
            tsc_kilohertz: Some(1),
            ..Parameters::default()
        }
        .to_string();
        for key in KEYS {
            assert_eq!(line.matches(key).count(), 1, "{key} in {line}");
        }
    }
}
