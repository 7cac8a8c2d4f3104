//! Samples, sorted.

use std::collections::HashMap;

use super::Doing;

/// Places that are told apart: a guest may run anywhere.
const PLACES: usize = 1 << 16;

/// Where the guest was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// Linear address of the block of instructions.
    pub address: u64,
    /// In user mode.
    pub user: bool,
}

/// Samples of one processor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Profile {
    doing: [u64; Doing::ALL.len()],
    places: HashMap<(Place, Doing), u64>,
    /// Samples for which there was no room.
    pub lost: u64,
}

impl Profile {
    pub(super) fn add(&mut self, doing: Doing, place: Option<Place>) {
        self.doing[doing as usize] += 1;
        let Some(place) = place else { return };
        let room = self.places.len() < PLACES;
        match self.places.get_mut(&(place, doing)) {
            Some(count) => *count += 1,
            None if room => {
                self.places.insert((place, doing), 1);
            }
            None => {}
        }
    }

    /// Samples of a kind.
    pub fn samples(&self, doing: Doing) -> u64 {
        self.doing[doing as usize]
    }

    /// Samples of all kinds.
    pub fn all_samples(&self) -> u64 {
        self.doing.iter().sum()
    }

    /// Samples by place, most first; those whose place is not known are left out.
    pub fn places(&self) -> Vec<(Place, Doing, u64)> {
        let places = self.places.iter();
        let mut places: Vec<_> = places
            .map(|(&(place, doing), &count)| (place, doing, count))
            .collect();
        places.sort_unstable_by_key(|&(place, doing, count)| (u64::MAX - count, place, doing));
        places
    }
}
