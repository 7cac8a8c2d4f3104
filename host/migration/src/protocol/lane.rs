//! What is said on a page lane: which pages the writes before it brought, and where a round ends.
//!
//! Page bytes are placed by the lane itself, and nobody tells the receiver so. A message behind
//! them on the same lane does: when it arrives, those bytes are there.
//!
//! | bytes | field |
//! |---|---|
//! | 0 | kind: 1 pages, 2 compressed pages, 3 mark, 4 ahead |
//! | 1..4 | reserved, zero |
//! | 4..8 | round |
//! | *pages:* 8..12 | pages that the destination has already, as they are |
//! | 12..16, 16..20 | runs of pages with content, runs of zero pages |
//! | 20.. | those runs ([`super::runs`]) |
//! | *compressed:* 8..12 | runs of pages with content |
//! | 12.. | those runs, then the pages as one LZ4 block |
//! | *mark:* 8.. | pages with content, zero pages, equal pages of this lane in the round, 8 bytes each |
//! | *ahead:* 8..12 | runs of pages that will come with content |
//! | 12.. | those runs |

use super::runs::{self, RUN_LENGTH, Run};

/// Most pages with content in one message.
pub const MAX_PAGES: usize = 128;

/// Most runs of zero pages in one message.
pub const MAX_ZERO_RUNS: usize = 2048;

/// Most runs that are told ahead at once.
pub const MAX_AHEAD_RUNS: usize = 1024;

/// Longest message: a lane has to take so many bytes at once.
pub const MAX_MESSAGE: usize = HEAD + MAX_RUNS * RUN_LENGTH + MAX_BLOCK;

/// Longest LZ4 block: what does not shrink is written as it is.
pub const MAX_BLOCK: usize = MAX_PAGES * 4096;

const MAX_RUNS: usize = MAX_PAGES + MAX_ZERO_RUNS;
const HEAD: usize = 32;

/// Why a message on a page lane was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaneMessageError {
    /// It ends too early or goes on too long.
    #[error("a message of {length} bytes on a page lane has not the length that it says")]
    Length {
        /// Its length.
        length: usize,
    },
    /// Nobody knows such messages.
    #[error("message of unknown kind {kind} on a page lane")]
    Kind {
        /// Its kind.
        kind: u8,
    },
    /// It names pages that are none, or too many.
    #[error("a message on a page lane names {what}")]
    Pages {
        /// What is wrong with them.
        what: String,
    },
    /// A mark says other numbers than its lane brought.
    #[error("the mark of round {round} says other numbers than its lane brought")]
    Mark {
        /// The round.
        round: u32,
    },
    /// The block does not hold the pages that it should.
    #[error("a block of compressed pages does not unpack: {reason}")]
    Block {
        /// What the unpacker said.
        reason: String,
    },
}

/// How many pages there were of each sort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// With their content, compressed or not.
    pub pages: u64,
    /// Of zeros.
    pub zero_pages: u64,
    /// Equal to what the destination has.
    pub same_pages: u64,
}

impl Counts {
    /// All pages.
    pub fn total(&self) -> u64 {
        self.pages
            .saturating_add(self.zero_pages)
            .saturating_add(self.same_pages)
    }

    /// Adds another's.
    pub fn add(&mut self, other: Counts) {
        self.pages += other.pages;
        self.zero_pages += other.zero_pages;
        self.same_pages += other.same_pages;
    }
}

/// A message on a page lane, decoded and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneMessage<'a> {
    /// Pages whose content was written before, zero pages, and equal ones.
    Pages {
        /// The round.
        round: u32,
        /// Pages with content.
        stored: Vec<Run>,
        /// Pages of zeros.
        zero: Vec<Run>,
        /// Pages that stay as they are.
        same: u32,
    },
    /// Pages with their content.
    Compressed {
        /// The round.
        round: u32,
        /// Which pages.
        stored: Vec<Run>,
        /// Their content as one LZ4 block.
        block: &'a [u8],
    },
    /// Pages that will come on this lane next: where their memory takes time to prepare, it can
    /// be prepared meanwhile.
    Ahead {
        /// The round.
        round: u32,
        /// Which pages.
        runs: Vec<Run>,
    },
    /// This lane has no more pages in this round.
    Mark {
        /// The round.
        round: u32,
        /// What it had.
        counts: Counts,
    },
}

fn head(kind: u8, round: u32, into: &mut Vec<u8>) {
    into.clear();
    into.extend_from_slice(&[kind, 0, 0, 0]);
    into.extend_from_slice(&round.to_le_bytes());
}

fn put(runs: &[Run], into: &mut Vec<u8>) {
    for run in runs {
        into.extend_from_slice(&run.first.0.to_le_bytes());
        into.extend_from_slice(&run.count.to_le_bytes());
    }
}

/// Encodes [`LaneMessage::Pages`] into `into`, which is cleared first.
pub fn encode_pages(round: u32, stored: &[Run], zero: &[Run], same: u32, into: &mut Vec<u8>) {
    head(1, round, into);
    for number in [same, stored.len() as u32, zero.len() as u32] {
        into.extend_from_slice(&number.to_le_bytes());
    }
    put(stored, into);
    put(zero, into);
}

/// Encodes the beginning of [`LaneMessage::Compressed`] into `into`, which is cleared first; the
/// block follows.
pub fn encode_compressed(round: u32, stored: &[Run], into: &mut Vec<u8>) {
    head(2, round, into);
    into.extend_from_slice(&(stored.len() as u32).to_le_bytes());
    put(stored, into);
}

/// Encodes [`LaneMessage::Ahead`] into `into`, which is cleared first.
pub fn encode_ahead(round: u32, runs: &[Run], into: &mut Vec<u8>) {
    head(4, round, into);
    into.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    put(runs, into);
}

/// Encodes [`LaneMessage::Mark`] into `into`, which is cleared first.
pub fn encode_mark(round: u32, counts: Counts, into: &mut Vec<u8>) {
    head(3, round, into);
    for number in [counts.pages, counts.zero_pages, counts.same_pages] {
        into.extend_from_slice(&number.to_le_bytes());
    }
}

/// Pages that runs name.
pub fn pages_in(runs: &[Run]) -> u64 {
    runs.iter().map(|run| u64::from(run.count)).sum()
}

impl<'a> LaneMessage<'a> {
    /// Decodes a message about RAM of `ram_pages` pages.
    ///
    /// # Errors
    /// [`LaneMessageError`] when it is none.
    pub fn decode(bytes: &'a [u8], ram_pages: u64) -> Result<Self, LaneMessageError> {
        let length = bytes.len();
        let wrong = LaneMessageError::Length { length };
        let mut fields = Fields { rest: bytes };
        let [kind, 0, 0, 0] = fields.u32().ok_or(wrong.clone())?.to_le_bytes() else {
            return Err(wrong);
        };
        let round = fields.u32().ok_or(wrong.clone())?;
        let message = match kind {
            1 => {
                let same = fields.u32().ok_or(wrong.clone())?;
                let stored = fields.u32().ok_or(wrong.clone())?;
                let zero = fields.u32().ok_or(wrong.clone())?;
                let stored = fields.runs(stored, MAX_PAGES, ram_pages)?;
                let zero = fields.runs(zero, MAX_ZERO_RUNS, ram_pages)?;
                few_enough(&stored)?;
                Self::Pages {
                    round,
                    stored,
                    zero,
                    same,
                }
            }
            2 => {
                let stored = fields.u32().ok_or(wrong.clone())?;
                let stored = fields.runs(stored, MAX_PAGES, ram_pages)?;
                few_enough(&stored)?;
                let block = std::mem::take(&mut fields.rest);
                Self::Compressed {
                    round,
                    stored,
                    block,
                }
            }
            3 => {
                let mut number = || fields.u64().ok_or(wrong.clone());
                let counts = Counts {
                    pages: number()?,
                    zero_pages: number()?,
                    same_pages: number()?,
                };
                Self::Mark { round, counts }
            }
            4 => {
                let runs = fields.u32().ok_or(wrong.clone())?;
                let runs = fields.runs(runs, MAX_AHEAD_RUNS, ram_pages)?;
                Self::Ahead { round, runs }
            }
            kind => return Err(LaneMessageError::Kind { kind }),
        };
        if fields.rest.is_empty() {
            Ok(message)
        } else {
            Err(wrong)
        }
    }
}

/// Unpacks a block of `pages` pages into `into`, which is made as long.
///
/// # Errors
/// [`LaneMessageError::Block`] when the block holds anything else.
pub fn unpack(block: &[u8], pages: usize, into: &mut Vec<u8>) -> Result<(), LaneMessageError> {
    let bytes = pages.min(MAX_PAGES) * 4096;
    into.resize(bytes, 0);
    match lz4_flex::block::decompress_into(block, into) {
        Ok(length) if length == bytes => Ok(()),
        Ok(length) => Err(LaneMessageError::Block {
            reason: format!("{length} bytes instead of {bytes}"),
        }),
        Err(error) => Err(LaneMessageError::Block {
            reason: error.to_string(),
        }),
    }
}

fn few_enough(stored: &[Run]) -> Result<(), LaneMessageError> {
    let pages = pages_in(stored);
    if pages <= MAX_PAGES as u64 {
        return Ok(());
    }
    Err(LaneMessageError::Pages {
        what: format!("{pages} pages with content, at most {MAX_PAGES} are allowed"),
    })
}

struct Fields<'a> {
    rest: &'a [u8],
}

impl Fields<'_> {
    fn u32(&mut self) -> Option<u32> {
        let (bytes, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(u32::from_le_bytes(*bytes))
    }

    fn u64(&mut self) -> Option<u64> {
        let (bytes, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(u64::from_le_bytes(*bytes))
    }

    fn runs(
        &mut self,
        count: u32,
        limit: usize,
        ram_pages: u64,
    ) -> Result<Vec<Run>, LaneMessageError> {
        let count = count as usize;
        let length = self.rest.len();
        if count > limit {
            return Err(LaneMessageError::Pages {
                what: format!("{count} runs of pages, at most {limit} are allowed"),
            });
        }
        let table = self.rest.split_at_checked(count * RUN_LENGTH);
        let (table, rest) = table.ok_or(LaneMessageError::Length { length })?;
        self.rest = rest;
        runs::decode(super::Kind::Pages, table, ram_pages).map_err(|error| {
            LaneMessageError::Pages {
                what: error.to_string(),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use dunlin_guest::PageIndex;
    use proptest::prelude::*;

    use super::*;

    fn runs_of(pages: &std::collections::BTreeSet<u64>) -> Vec<Run> {
        let mut runs = Vec::new();
        for &page in pages {
            runs::push(&mut runs, PageIndex(page));
        }
        runs
    }

    #[test]
    fn a_mark_survives_the_round_trip() {
        let counts = Counts {
            pages: 1,
            zero_pages: 2,
            same_pages: u64::MAX,
        };
        let mut bytes = Vec::new();
        encode_mark(7, counts, &mut bytes);
        let mark = LaneMessage::Mark { round: 7, counts };
        assert_eq!(LaneMessage::decode(&bytes, 1).unwrap(), mark);
        bytes.push(0);
        assert!(LaneMessage::decode(&bytes, 1).is_err());
    }

    #[test]
    fn a_block_of_another_size_is_refused() {
        let block = lz4_flex::block::compress(&[1; 3 * 4096]);
        let mut into = Vec::new();
        unpack(&block, 3, &mut into).unwrap();
        assert_eq!(into, [1; 3 * 4096]);
        assert!(unpack(&block, 2, &mut into).is_err());
        assert!(unpack(&block, 4, &mut into).is_err());
        assert!(unpack(&block, 0, &mut into).is_err());
    }

    proptest! {
        #[test]
        fn pages_survive_the_round_trip(
            stored in proptest::collection::btree_set(0u64..900, 0..MAX_PAGES),
            zero in proptest::collection::btree_set(0u64..900, 0..400),
            same in any::<u32>(),
            block in proptest::collection::vec(any::<u8>(), 0..50),
        ) {
            let (stored, zero) = (runs_of(&stored), runs_of(&zero));
            let mut bytes = Vec::new();
            encode_pages(3, &stored, &zero, same, &mut bytes);
            let back = LaneMessage::decode(&bytes, 900).unwrap();
            prop_assert_eq!(back, LaneMessage::Pages { round: 3, stored: stored.clone(), zero, same });
            encode_ahead(5, &stored, &mut bytes);
            let back = LaneMessage::decode(&bytes, 900).unwrap();
            prop_assert_eq!(back, LaneMessage::Ahead { round: 5, runs: stored.clone() });
            encode_compressed(4, &stored, &mut bytes);
            bytes.extend_from_slice(&block);
            let back = LaneMessage::decode(&bytes, 900).unwrap();
            prop_assert_eq!(back, LaneMessage::Compressed { round: 4, stored, block: &block });
        }

        #[test]
        fn whatever_arrives_names_pages_of_ram_only(
            kind in 0u8..6,
            rest in proptest::collection::vec(any::<u8>(), 0..200),
            small in any::<bool>(),
        ) {
            let mut bytes = vec![kind, 0, 0, 0, 1, 0, 0, 0];
            bytes.extend(rest.iter().map(|byte| if small { byte % 4 } else { *byte }));
            let _refused = LaneMessage::decode(&rest, 64);
            match LaneMessage::decode(&bytes, 64) {
                Ok(LaneMessage::Pages { stored, zero, .. }) => {
                    prop_assert!(pages_in(&stored) <= 64 && pages_in(&zero) <= 64);
                }
                Ok(LaneMessage::Compressed { stored, block, .. }) => {
                    let _refused = unpack(block, pages_in(&stored) as usize, &mut Vec::new());
                }
                Ok(LaneMessage::Ahead { runs, .. }) => prop_assert!(pages_in(&runs) <= 64),
                Ok(LaneMessage::Mark { .. }) | Err(_) => {}
            }
        }
    }
}
