//! In which order the source sends what is missing. Pure.

use std::collections::VecDeque;
use std::ops::Range;

use dunlin_guest::{PageIndex, PageSet};

use super::parcel::Reason;
use crate::protocol::runs::{self, Run};

/// Pages around one that was asked for, aligned, that go before all others: 128 KiB.
const NEIGHBOURHOOD: u64 = 32;
/// Neighbourhoods that wait; the oldest is given up when there are more, and its pages come in
/// their turn.
const MAX_NEIGHBOURHOODS: usize = 64;

/// What the destination still has to get.
///
/// A page leaves the plan when it is taken for sending. Whether it arrived, only the destination
/// knows: after a break it says what it lacks, and a new plan is made of that.
#[derive(Debug)]
pub(super) struct Plan {
    owed: PageSet,
    near: VecDeque<Range<u64>>,
    /// Where the walk through the rest goes on.
    cursor: u64,
}

impl Plan {
    pub(super) fn new(owed: PageSet) -> Self {
        Self {
            owed,
            near: VecDeque::new(),
            cursor: 0,
        }
    }

    /// Pages that were not taken yet.
    pub(super) fn left(&self) -> u64 {
        self.owed.len()
    }

    /// Something waits for `page`: it is sent at once, so the plan has it no more, and its
    /// neighbours come next. False when it was taken before, and is on its way.
    pub(super) fn asked(&mut self, page: PageIndex) -> bool {
        let start = page.0 - page.0 % NEIGHBOURHOOD;
        let near = start..start + NEIGHBOURHOOD;
        self.cursor = near.end;
        if !self.near.contains(&near) {
            self.near.truncate(MAX_NEIGHBOURHOODS - 1);
            self.near.push_front(near);
        }
        self.owed.remove(page)
    }

    /// Takes the next pages, at most `most`. `None`: nothing is left.
    pub(super) fn take(&mut self, most: usize) -> Option<(Reason, Vec<Run>)> {
        let mut taken = Vec::new();
        while let Some(near) = self.near.pop_front() {
            let rest = self.take_within(near.clone(), most, &mut taken);
            if !taken.is_empty() {
                if rest {
                    self.near.push_front(near);
                }
                return Some((Reason::Neighbour, taken));
            }
        }
        let all = self.cursor..u64::MAX;
        self.take_within(all, most, &mut taken);
        if taken.is_empty() {
            self.take_within(0..self.cursor, most, &mut taken);
        }
        if let Some(last) = taken.last() {
            self.cursor = last.first.0 + u64::from(last.count);
        }
        (!taken.is_empty()).then_some((Reason::Turn, taken))
    }

    /// True when the range has more.
    fn take_within(&mut self, range: Range<u64>, most: usize, taken: &mut Vec<Run>) -> bool {
        let mut from = range.start;
        for _ in 0..most {
            let next = self.owed.first_from(PageIndex(from));
            let Some(page) = next.filter(|page| page.0 < range.end) else {
                return false;
            };
            self.owed.remove(page);
            runs::push(taken, page);
            from = page.0 + 1;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pages(runs: &[Run]) -> Vec<u64> {
        runs.iter()
            .flat_map(Run::pages)
            .map(|page| page.0)
            .collect()
    }

    #[test]
    fn neighbours_of_what_was_asked_for_go_first_and_the_walk_goes_on_behind_them() {
        let mut plan = Plan::new(PageSet::full(1000));
        assert_eq!(pages(&plan.take(2).unwrap().1), [0, 1]);
        assert!(plan.asked(PageIndex(520)));
        let (reason, first) = plan.take(10).unwrap();
        assert_eq!(reason, Reason::Neighbour);
        assert_eq!(
            pages(&first),
            [512, 513, 514, 515, 516, 517, 518, 519, 521, 522]
        );
        let (_, rest) = plan.take(100).unwrap();
        assert_eq!(pages(&rest).len(), 21);
        let (reason, turn) = plan.take(2).unwrap();
        assert_eq!((reason, pages(&turn)), (Reason::Turn, vec![544, 545]));
    }

    #[test]
    fn what_was_taken_is_not_asked_for_twice() {
        let mut plan = Plan::new(PageSet::full(4));
        assert!(plan.asked(PageIndex(3)));
        assert!(!plan.asked(PageIndex(3)));
        assert_eq!(pages(&plan.take(9).unwrap().1), [0, 1, 2]);
        assert_eq!(plan.take(9), None);
        assert_eq!(plan.left(), 0);
    }

    proptest! {
        #[test]
        fn every_page_leaves_once(
            asked in proptest::collection::vec(0u64..500, 0..100),
            owed in proptest::collection::btree_set(0u64..500, 0..400),
            most in 1usize..40,
        ) {
            let mut set = PageSet::new(500);
            for &page in &owed {
                set.insert(PageIndex(page));
            }
            let mut plan = Plan::new(set);
            let mut seen = Vec::new();
            for page in asked {
                if plan.asked(PageIndex(page)) {
                    seen.push(page);
                }
                if let Some((_, runs)) = plan.take(most) {
                    seen.extend(pages(&runs));
                }
            }
            while let Some((_, runs)) = plan.take(most) {
                prop_assert!(pages(&runs).len() <= most);
                seen.extend(pages(&runs));
            }
            seen.sort_unstable();
            prop_assert_eq!(seen, owed.into_iter().collect::<Vec<_>>());
        }
    }
}
