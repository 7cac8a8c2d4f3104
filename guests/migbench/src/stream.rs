//! What the guest says on its port, byte by byte.
//!
//! ```text
//! 0nnnnnnn                        tick, and the lower 7 bits of its number, from 0
//! 1kkkkkkk  5 × 0bbbbbbb  5 × …   record k with two numbers of 35 bits, low bits first
//! ```
//!
//! A tick is one byte, since each byte is an exit of the guest. Every 128 ticks a record says how
//! many there were in full, so that nothing that is lost, repeated or out of order stays unnoticed.
//! A guest that moves goes on in the middle of a record: the bytes from its hosts, one after the
//! other, are one stream.

/// Kinds of records.
pub(crate) mod kind {
    pub(crate) const COUNT: u8 = 0x81;
    pub(crate) const WRONG: u8 = 0x82;
    pub(crate) const READY: u8 = 0x83;
    pub(crate) const SCRUBBED: u8 = 0x84;
    pub(crate) const TRAP: u8 = 0x85;
}

/// Groups of 7 bits in a record.
const GROUPS: usize = 10;
const NUMBER_BITS: u32 = 35;
/// Numbers in records are given up to this.
pub const NUMBER_MASK: u64 = (1 << NUMBER_BITS) - 1;

/// What the guest said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A tick.
    Tick,
    /// Memory is filled.
    Ready {
        /// Frequency of the TSC as the guest counts, in kHz.
        tsc_kilohertz: u64,
        /// Pages that were filled.
        pages: u64,
    },
    /// What was done since then.
    Count {
        /// Ticks.
        ticks: u64,
        /// Writes to the working set.
        writes: u64,
    },
    /// All that was filled has been checked since the last such event.
    Scrubbed {
        /// How often so far.
        passes: u64,
    },
}

/// What must not be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// A tick is missing, comes twice, or in the wrong order.
    #[error("tick {expected} was expected, {found} came (both modulo 128)")]
    Tick {
        /// What was expected.
        expected: u8,
        /// What came.
        found: u8,
    },
    /// The counts disagree with the ticks that came.
    #[error("the guest has ticked {found} times, {expected} ticks came")]
    Count {
        /// Ticks that came.
        expected: u64,
        /// Ticks of which the guest tells.
        found: u64,
    },
    /// A page does not hold what was written last.
    #[error("page {page:#x} holds {found:#x}, which is not what was written last")]
    Wrong {
        /// Number of the page.
        page: u64,
        /// The lower 35 bits of what it holds.
        found: u64,
    },
    /// The guest came upon an exception.
    #[error("the guest ran into an exception (on its stack: {first:#x}, {second:#x})")]
    Trap {
        /// Top of the stack: where it happened, or an error code.
        first: u64,
        /// What lies beneath.
        second: u64,
    },
    /// Not a byte that the guest can have said.
    #[error("byte {byte:#04x} is no part of a guest's words")]
    Byte {
        /// The byte.
        byte: u8,
    },
}

/// Understands the stream of one guest, on however many hosts it ran.
#[derive(Debug, Clone, Default)]
pub struct Listener {
    /// Ticks so far; as long as no record told them in full, modulo 128.
    ticks: Option<u64>,
    told: bool,
    record: Option<Record>,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    kind: u8,
    groups: usize,
    numbers: [u64; 2],
}

impl Listener {
    /// A listener that hears the guest from its start, or from any later moment between two records.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ticks so far.
    pub fn ticks(&self) -> u64 {
        self.ticks.unwrap_or(0)
    }

    /// Takes one byte; tells what it completes.
    ///
    /// # Errors
    /// [`StreamError`] when the guest noticed or shows a loss.
    pub fn byte(&mut self, byte: u8) -> Result<Option<Event>, StreamError> {
        if let Some(record) = &mut self.record {
            if byte & 0x80 != 0 {
                return Err(StreamError::Byte { byte });
            }
            let half = GROUPS / 2;
            let (number, group) = (record.groups / half, record.groups % half);
            record.numbers[number] |= u64::from(byte) << (7 * group);
            record.groups += 1;
            if record.groups < GROUPS {
                return Ok(None);
            }
            let record = *record;
            self.record = None;
            return self.record(record).map(Some);
        }
        if byte & 0x80 != 0 {
            if !(kind::COUNT..=kind::TRAP).contains(&byte) {
                return Err(StreamError::Byte { byte });
            }
            self.record = Some(Record {
                kind: byte,
                groups: 0,
                numbers: [0; 2],
            });
            return Ok(None);
        }
        let ticks = self.ticks.unwrap_or(byte.into());
        let expected = (ticks & 0x7f) as u8;
        if byte != expected {
            return Err(StreamError::Tick {
                expected,
                found: byte,
            });
        }
        self.ticks = Some(ticks + 1);
        Ok(Some(Event::Tick))
    }

    fn record(&mut self, record: Record) -> Result<Event, StreamError> {
        let [first, second] = record.numbers;
        match record.kind {
            kind::COUNT => {
                let heard = self.ticks.unwrap_or(first);
                let agrees = heard & 0x7f == first & 0x7f;
                let expected = if !self.told && agrees { first } else { heard };
                (self.ticks, self.told) = (Some(expected), true);
                if expected & NUMBER_MASK != first {
                    return Err(StreamError::Count {
                        expected,
                        found: first,
                    });
                }
                Ok(Event::Count {
                    ticks: first,
                    writes: second,
                })
            }
            kind::WRONG => Err(StreamError::Wrong {
                page: first,
                found: second,
            }),
            kind::READY => Ok(Event::Ready {
                tsc_kilohertz: first,
                pages: second,
            }),
            kind::SCRUBBED => Ok(Event::Scrubbed { passes: first }),
            _ => Err(StreamError::Trap { first, second }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(kind: u8, first: u64, second: u64) -> Vec<u8> {
        let groups = |number: u64| (0..5).map(move |group| (number >> (7 * group)) as u8 & 0x7f);
        [kind]
            .into_iter()
            .chain(groups(first))
            .chain(groups(second))
            .collect()
    }

    fn hear(listener: &mut Listener, bytes: &[u8]) -> Result<Vec<Event>, StreamError> {
        let events = bytes.iter().map(|&byte| listener.byte(byte));
        Ok(events
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect())
    }

    #[test]
    fn a_stream_without_loss_is_understood() {
        let mut listener = Listener::new();
        let mut bytes = record(kind::READY, 2_000_000, 77);
        bytes.extend(record(kind::COUNT, 0, 0));
        bytes.extend(0..128);
        bytes.extend(record(kind::COUNT, 128, 3_000_000_000));
        bytes.push(0);
        let events = hear(&mut listener, &bytes).unwrap();
        assert_eq!(
            events[0],
            Event::Ready {
                tsc_kilohertz: 2_000_000,
                pages: 77
            }
        );
        assert_eq!(
            events[130],
            Event::Count {
                ticks: 128,
                writes: 3_000_000_000
            }
        );
        assert_eq!((events.len(), listener.ticks()), (132, 129));
    }

    #[test]
    fn a_missing_or_repeated_tick_is_noticed() {
        for (bytes, found) in [([0, 1, 3], 3), ([0, 1, 1], 1)] {
            assert_eq!(
                hear(&mut Listener::new(), &bytes),
                Err(StreamError::Tick { expected: 2, found })
            );
        }
    }

    #[test]
    fn a_guest_that_is_heard_from_its_middle_on_tells_its_ticks() {
        let mut listener = Listener::new();
        hear(&mut listener, &[126, 127]).unwrap();
        hear(&mut listener, &record(kind::COUNT, 1280, 0)).unwrap();
        assert_eq!(listener.ticks(), 1280);
        assert!(hear(&mut listener, &record(kind::COUNT, 1408, 0)).is_err());
    }

    #[test]
    fn a_whole_turn_of_missing_ticks_is_noticed() {
        let mut listener = Listener::new();
        hear(&mut listener, &record(kind::COUNT, 0, 0)).unwrap();
        hear(&mut listener, &[0, 1]).unwrap();
        let lost = hear(&mut listener, &record(kind::COUNT, 130, 0));
        assert_eq!(
            lost,
            Err(StreamError::Count {
                expected: 2,
                found: 130
            })
        );
    }

    #[test]
    fn what_the_guest_finds_wrong_is_an_error() {
        let bytes = record(kind::WRONG, 0x1234, 0x7_ffff_ffff);
        assert_eq!(
            hear(&mut Listener::new(), &bytes),
            Err(StreamError::Wrong {
                page: 0x1234,
                found: 0x7_ffff_ffff
            })
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_heard_without_panic(bytes: Vec<u8>) {
            let mut listener = Listener::new();
            for byte in bytes {
                let _ = listener.byte(byte);
            }
        }
    }
}
