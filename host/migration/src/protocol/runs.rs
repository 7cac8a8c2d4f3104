//! Runs of page indices: how `Pages` and `ZeroPages` frames name the pages that they carry.
//!
//! A count (4 bytes), then that many runs of first page (8 bytes) and number of pages (4 bytes).

use dunlin_guest::PageIndex;

use super::{Kind, ProtocolError};

/// Bytes of one run.
pub const RUN_LENGTH: usize = 12;

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub first: PageIndex,
    /// How many.
    pub count: u32,
}

impl Run {
    /// The pages of the run.
    pub fn pages(&self) -> impl Iterator<Item = PageIndex> + use<> {
        (self.first.0..self.first.0 + u64::from(self.count)).map(PageIndex)
    }
}

/// Adds a page behind the last run, or begins a new one.
pub fn push(runs: &mut Vec<Run>, page: PageIndex) {
    match runs.last_mut() {
        Some(last) if last.first.0 + u64::from(last.count) == page.0 && last.count < u32::MAX => {
            last.count += 1;
        }
        _ => runs.push(Run {
            first: page,
            count: 1,
        }),
    }
}

/// Encodes runs into `into`, which is cleared first.
pub fn encode(runs: &[Run], into: &mut Vec<u8>) {
    into.clear();
    into.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    for run in runs {
        into.extend_from_slice(&run.first.0.to_le_bytes());
        into.extend_from_slice(&run.count.to_le_bytes());
    }
}

/// How many runs follow, from the count in front of them.
///
/// # Errors
/// [`ProtocolError::Invalid`] when there are none or more than `limit`.
pub fn decode_count(kind: Kind, bytes: [u8; 4], limit: usize) -> Result<usize, ProtocolError> {
    let count = u32::from_le_bytes(bytes) as usize;
    if count == 0 || count > limit {
        return Err(ProtocolError::invalid(
            kind,
            format!("{count} runs of pages, 1 to {limit} are allowed"),
        ));
    }
    Ok(count)
}

/// Decodes runs. They ascend, do not overlap, and lie within `ram_pages`.
///
/// # Errors
/// [`ProtocolError::Invalid`] otherwise.
pub fn decode(kind: Kind, bytes: &[u8], ram_pages: u64) -> Result<Vec<Run>, ProtocolError> {
    let mut next = 0;
    let mut runs = Vec::with_capacity(bytes.len() / RUN_LENGTH);
    for chunk in bytes.chunks_exact(RUN_LENGTH) {
        let mut first = [0; 8];
        first.copy_from_slice(&chunk[..8]);
        let first = u64::from_le_bytes(first);
        let count = u32::from_le_bytes([chunk[8], chunk[9], chunk[10], chunk[11]]);
        let end = first.checked_add(u64::from(count));
        if count == 0 || first < next || end.is_none_or(|end| end > ram_pages) {
            return Err(ProtocolError::invalid(
                kind,
                format!("run of {count} pages from page {first} in RAM of {ram_pages} pages"),
            ));
        }
        next = first + u64::from(count);
        runs.push(Run {
            first: PageIndex(first),
            count,
        });
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_run_outside_of_ram_is_refused() {
        for (first, count) in [
            (99, 2),
            (100, 1),
            (u64::MAX, 1),
            (u64::MAX - 1, u32::MAX),
            (0, 0),
        ] {
            let mut bytes = Vec::new();
            encode(
                &[Run {
                    first: PageIndex(first),
                    count,
                }],
                &mut bytes,
            );
            assert!(
                decode(Kind::Pages, &bytes[4..], 100).is_err(),
                "{first} {count}"
            );
        }
    }

    proptest! {
        #[test]
        fn runs_name_exactly_the_pages_pushed(pages in proptest::collection::btree_set(0u64..300, 1..80)) {
            let mut runs = Vec::new();
            for &page in &pages {
                push(&mut runs, PageIndex(page));
            }
            let mut bytes = Vec::new();
            encode(&runs, &mut bytes);
            let back = decode(Kind::Pages, &bytes[4..], 300).unwrap();
            let named: Vec<u64> = back.iter().flat_map(Run::pages).map(|p| p.0).collect();
            prop_assert_eq!(named, pages.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn random_runs_stay_in_ram(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            if let Ok(runs) = decode(Kind::ZeroPages, &bytes, 1 << 40) {
                for run in runs {
                    prop_assert!(run.first.0 + u64::from(run.count) <= 1 << 40);
                }
            }
        }
    }
}
