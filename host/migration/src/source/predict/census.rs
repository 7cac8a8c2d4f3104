//! How much of a running guest's memory has content.

use dunlin_guest::{Memory, PageIndex};

use crate::pages::{self, Extents, PAGE};

/// Pages that are looked at, at most.
const SAMPLES: u64 = 1024;

/// What is in a guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Census {
    /// Pages that were ever touched.
    pub touched: u64,
    /// Those of them that are not zero.
    pub content: u64,
}

/// Counts the pages that were ever touched, and takes off the share of zeros among some of them at
/// even distances.
pub fn census(memory: &Memory) -> Census {
    let touched = touched(memory);
    let total: u64 = touched.iter().map(|run| run.end - run.start).sum();
    let step = total.div_ceil(SAMPLES).max(1);
    let mut page = [0; PAGE];
    let (mut looked_at, mut with_content) = (0, 0);
    let mut skip = 0;
    for run in &touched {
        let mut next = run.start + skip;
        while next < run.end {
            if memory.read_page(PageIndex(next), &mut page) {
                looked_at += 1;
                with_content += u64::from(!pages::is_zero(&page));
            }
            next += step;
        }
        skip = next - run.end;
    }
    let share = with_content as f64 / f64::max(looked_at as f64, 1.0);
    Census {
        touched: total,
        content: (total as f64 * share).round() as u64,
    }
}

/// Runs of pages that the memory file has.
fn touched(memory: &Memory) -> Vec<std::ops::Range<u64>> {
    let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
    let mut extents = Extents::new(memory);
    let mut next = 0;
    while next < memory.pages() {
        if let Some(end) = extents.hole_at(PageIndex(next)) {
            next = end;
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == next => run.end += 1,
            _ => runs.push(next..next + 1),
        }
        next += 1;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 8192;

    fn memory() -> Memory {
        Memory::new(PAGES * PAGE as u64).unwrap()
    }

    #[test]
    fn untouched_memory_has_no_content() {
        assert_eq!(
            (census(&memory()).touched, census(&memory()).content),
            (0, 0)
        );
    }

    #[test]
    fn content_is_counted_where_it_is() {
        let memory = memory();
        for page in 3000..3500 {
            assert!(memory.write_page(PageIndex(page), &[1; PAGE]));
        }
        assert_eq!(census(&memory).content, 500);
    }

    #[test]
    fn zeros_among_touched_pages_do_not_count() {
        let memory = memory();
        // About one in eight has content, at places that follow no step.
        let content = |page: u64| u8::from(page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61 == 0);
        for page in 0..PAGES {
            assert!(memory.write_page(PageIndex(page), &[content(page); PAGE]));
        }
        let real = (0..PAGES).filter(|&page| content(page) == 1).count() as f64;
        assert_eq!(census(&memory).touched, PAGES);
        let found = census(&memory).content as f64;
        assert!((found / real - 1.0).abs() < 0.25, "{found} of {real}");
    }
}
