//! What is said on the lanes of a post-copy: pages with their content, all in one message, since
//! nothing may be placed in a guest's memory behind its back while it runs.
//!
//! | bytes | field |
//! |---|---|
//! | 0 | kind: 1 pages, 2 packed pages, 3 zero pages, 4 sign of life |
//! | 1 | why they come: 0 in their turn, 1 asked for, 2 next to one that was asked for |
//! | 2..4 | reserved, zero |
//! | 4..8 | how many runs follow |
//! | 8.. | the runs ([`super::super::protocol::runs`]) |
//! | then | for kind 1 the pages; for kind 2 the pages as one LZ4 block |

use std::borrow::Cow;

use crate::pages::PAGE;
use crate::protocol::runs::{self, RUN_LENGTH, Run};
use crate::protocol::{Kind, ProtocolError};

/// Most pages with content in one message.
pub const MAX_PAGES: usize = 128;

/// Most runs of zero pages in one message.
pub const MAX_ZERO_RUNS: usize = 2048;

/// Longest message; a lane has to take so many bytes at once.
pub const MAX_MESSAGE: usize = HEAD + MAX_ZERO_RUNS * RUN_LENGTH + MAX_PAGES * PAGE;

const HEAD: usize = 8;
const PAGES: u8 = 1;
const PACKED: u8 = 2;
const ZEROS: u8 = 3;
const ALIVE: u8 = 4;

/// Why a page comes now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It was its turn.
    Turn,
    /// Something waits for it.
    Asked,
    /// Something waited for its neighbour.
    Neighbour,
}

impl Reason {
    fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Turn),
            1 => Some(Self::Asked),
            2 => Some(Self::Neighbour),
            _ => None,
        }
    }
}

/// A message on a lane of a post-copy, decoded and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parcel<'a> {
    /// Pages, in the order of their runs.
    Pages {
        /// Why now.
        reason: Reason,
        /// Which; at most [`MAX_PAGES`] unless they are zero.
        runs: Vec<Run>,
        /// Their content; absent when all are zero.
        content: Option<Cow<'a, [u8]>>,
    },
    /// The other side lives.
    Alive,
}

fn invalid(reason: impl Into<String>) -> ProtocolError {
    ProtocolError::invalid(Kind::Pages, reason)
}

impl<'a> Parcel<'a> {
    /// Decodes a message about RAM of `ram_pages` pages.
    ///
    /// # Errors
    /// [`ProtocolError`] when it is none.
    pub fn decode(bytes: &'a [u8], ram_pages: u64) -> Result<Self, ProtocolError> {
        let (head, rest) = bytes
            .split_first_chunk::<HEAD>()
            .ok_or_else(|| invalid("it is too short"))?;
        let &[kind, reason, 0, 0, a, b, c, d] = head else {
            return Err(invalid("reserved bytes are not zero"));
        };
        let reason = Reason::from_number(reason).ok_or_else(|| invalid("unknown reason"))?;
        let count = [a, b, c, d];
        if kind == ALIVE {
            return match (rest, count) {
                ([], [0, 0, 0, 0]) => Ok(Self::Alive),
                _ => Err(invalid("a sign of life with a body")),
            };
        }
        let limit = if kind == ZEROS {
            MAX_ZERO_RUNS
        } else {
            MAX_PAGES
        };
        let count = runs::decode_count(Kind::Pages, count, limit)?;
        let (table, body) = rest
            .split_at_checked(count * RUN_LENGTH)
            .ok_or_else(|| invalid("it ends within its runs"))?;
        let runs = runs::decode(Kind::Pages, table, ram_pages)?;
        let content = match kind {
            ZEROS if body.is_empty() => None,
            PAGES | PACKED => Some(content(kind, &runs, body)?),
            _ => return Err(invalid("unknown kind, or a body where there is none")),
        };
        Ok(Self::Pages {
            reason,
            runs,
            content,
        })
    }
}

fn content<'a>(kind: u8, runs: &[Run], body: &'a [u8]) -> Result<Cow<'a, [u8]>, ProtocolError> {
    let pages: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
    if pages > MAX_PAGES as u64 {
        return Err(invalid(format!("{pages} pages in one message")));
    }
    let bytes = pages as usize * PAGE;
    if kind == PAGES {
        let fits = body.len() == bytes;
        return fits
            .then_some(Cow::Borrowed(body))
            .ok_or_else(|| invalid("its length does not fit its runs"));
    }
    let mut pages = vec![0; bytes];
    match lz4_flex::block::decompress_into(body, &mut pages) {
        Ok(length) if length == bytes => Ok(Cow::Owned(pages)),
        Ok(length) => Err(invalid(format!("{length} bytes in it instead of {bytes}"))),
        Err(error) => Err(invalid(format!("it does not unpack: {error}"))),
    }
}

/// A message under construction.
#[derive(Debug, Default)]
pub(super) struct Packer {
    bytes: Vec<u8>,
    table: Vec<u8>,
    packed: Vec<u8>,
}

impl Packer {
    fn head(&mut self, kind: u8, reason: Reason, runs: &[Run]) {
        self.bytes.clear();
        self.bytes.extend_from_slice(&[kind, reason as u8, 0, 0]);
        runs::encode(runs, &mut self.table);
        self.bytes.extend_from_slice(&self.table);
    }

    /// Pages with content, smaller if `pack` and that gains an eighth.
    pub(super) fn pages(
        &mut self,
        reason: Reason,
        runs: &[Run],
        content: &[u8],
        pack: bool,
    ) -> &[u8] {
        if pack {
            let bound = lz4_flex::block::get_maximum_output_size(content.len());
            self.packed.resize(bound, 0);
            let length = lz4_flex::block::compress_into(content, &mut self.packed);
            if let Ok(length) = length
                && length < content.len() - content.len() / 8
            {
                self.head(PACKED, reason, runs);
                self.bytes.extend_from_slice(&self.packed[..length]);
                return &self.bytes;
            }
        }
        self.head(PAGES, reason, runs);
        self.bytes.extend_from_slice(content);
        &self.bytes
    }

    /// Pages of zeros.
    pub(super) fn zeros(&mut self, reason: Reason, runs: &[Run]) -> &[u8] {
        self.head(ZEROS, reason, runs);
        &self.bytes
    }

    /// A sign of life.
    pub(super) fn alive(&mut self) -> &[u8] {
        self.head(ALIVE, Reason::Turn, &[]);
        &self.bytes
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
    fn a_sign_of_life_survives_and_has_no_body() {
        let mut packer = Packer::default();
        let mut bytes = packer.alive().to_vec();
        assert_eq!(Parcel::decode(&bytes, 1).unwrap(), Parcel::Alive);
        bytes.push(0);
        assert!(Parcel::decode(&bytes, 1).is_err());
    }

    proptest! {
        #[test]
        fn pages_survive_the_round_trip(
            pages in proptest::collection::btree_set(0u64..900, 1..20),
            fill in any::<u8>(),
            pack in any::<bool>(),
        ) {
            let runs = runs_of(&pages);
            let sent: Vec<u8> = (0..pages.len() * PAGE).map(|n| fill ^ (n % 7) as u8).collect();
            let mut packer = Packer::default();
            let bytes = packer.pages(Reason::Neighbour, &runs, &sent, pack);
            prop_assert!(bytes.len() <= MAX_MESSAGE);
            let Parcel::Pages { reason, runs: back, content } = Parcel::decode(bytes, 900).unwrap()
            else { panic!("no pages") };
            prop_assert_eq!(reason, Reason::Neighbour);
            prop_assert_eq!(&back, &runs);
            prop_assert_eq!(content.unwrap().into_owned(), sent);
            let bytes = packer.zeros(Reason::Asked, &runs);
            let back = Parcel::Pages { reason: Reason::Asked, runs, content: None };
            prop_assert_eq!(Parcel::decode(bytes, 900).unwrap(), back);
        }

        #[test]
        fn whatever_arrives_names_pages_of_ram_only(
            kind in 0u8..6,
            reason in 0u8..4,
            rest in proptest::collection::vec(any::<u8>(), 0..300),
            small in any::<bool>(),
        ) {
            let mut bytes = vec![kind, reason, 0, 0];
            bytes.extend(rest.iter().map(|byte| if small { byte % 3 } else { *byte }));
            let _refused = Parcel::decode(&rest, 64);
            if let Ok(Parcel::Pages { runs, content, .. }) = Parcel::decode(&bytes, 64) {
                let pages: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
                prop_assert!(pages <= 64);
                if let Some(content) = content {
                    prop_assert_eq!(content.len(), pages as usize * PAGE);
                }
            }
        }
    }
}
