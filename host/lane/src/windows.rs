//! The memory that a receiver has granted.

use crate::page::{Placement, Window, WindowRange};
use crate::stream::RawSlice;

/// Granted windows, sorted by where they start.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    windows: Vec<Window>,
}

impl Windows {
    pub(crate) fn grant(&mut self, window: Window) {
        let start = window.range().start;
        let at = self
            .windows
            .partition_point(|other| other.range().start <= start);
        self.windows.insert(at, window);
    }

    /// Takes back all windows within `range`.
    pub(crate) fn revoke(&mut self, range: &WindowRange) {
        self.windows.retain(|window| {
            let window = window.range();
            window.start < range.start || window.end > range.end
        });
    }

    /// Is all of `range` granted, be it by several windows?
    pub(crate) fn cover(&self, range: &WindowRange) -> bool {
        let mut reached = range.start;
        for window in &self.windows {
            if window.range().start <= reached {
                reached = reached.max(window.range().end);
            }
        }
        reached >= range.end
    }

    /// Where the bytes of `placement` lie; `None` when no single window has all of them.
    pub(crate) fn resolve(&self, placement: Placement) -> Option<RawSlice> {
        let end = placement.target.checked_add(u64::from(placement.length))?;
        let range = placement.target..end;
        let behind = self
            .windows
            .partition_point(|window| window.range().start <= range.start);
        let candidates = self.windows[..behind].iter().rev();
        let address = candidates
            .filter_map(|window| window.address_of(&range))
            .next()?;
        // SAFETY: the bytes lie within a granted window, and `Window::new` demanded of its maker
        // that they may be written from any thread for as long as the window is kept. Who gets the
        // slice uses it no longer than the window stays granted here.
        #[expect(unsafe_code, reason = "a window names raw memory")]
        Some(unsafe { RawSlice::new(address, placement.length as usize) })
    }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;
    use std::sync::Arc;

    use super::*;

    fn window(memory: &Arc<Vec<u8>>, range: WindowRange) -> Window {
        let start = NonNull::new(memory.as_ptr().cast_mut()).unwrap();
        // SAFETY: nothing is written in these tests; only addresses are looked at.
        #[expect(unsafe_code, reason = "the test vouches for its memory")]
        unsafe {
            Window::new(range, start, Arc::<Vec<u8>>::clone(memory))
        }
    }

    fn found(windows: &Windows, target: u64, length: u32) -> bool {
        windows.resolve(Placement { target, length }).is_some()
    }

    #[test]
    fn only_what_lies_within_one_window_is_found() {
        let memory = Arc::new(vec![0; 4096]);
        let mut windows = Windows::default();
        windows.grant(window(&memory, 8192..12288));
        windows.grant(window(&memory, 0..4096));
        assert!(found(&windows, 0, 4096));
        assert!(found(&windows, 4095, 1));
        assert!(found(&windows, 8192, 4096));
        assert!(!found(&windows, 4095, 2));
        assert!(!found(&windows, 8191, 2));
        assert!(!found(&windows, 5000, 1));
        assert!(!found(&windows, u64::MAX, 2));
        assert!(!found(&windows, u64::MAX - 1, 1));
    }

    #[test]
    fn a_window_behind_a_smaller_one_with_a_later_start_is_found() {
        let memory = Arc::new(vec![0; 4096]);
        let mut windows = Windows::default();
        windows.grant(window(&memory, 0..4096));
        windows.grant(window(&memory, 100..200));
        assert!(found(&windows, 150, 1000));
    }

    #[test]
    fn a_range_is_covered_by_windows_without_a_gap() {
        let memory = Arc::new(vec![0; 4096]);
        let mut windows = Windows::default();
        windows.grant(window(&memory, 4096..8192));
        windows.grant(window(&memory, 0..4096));
        windows.grant(window(&memory, 9000..12288));
        assert!(windows.cover(&(100..8192)));
        assert!(windows.cover(&(7..7)));
        assert!(!windows.cover(&(100..8193)));
        assert!(!windows.cover(&(8192..9001)));
    }

    #[test]
    fn what_is_revoked_is_found_no_more() {
        let memory = Arc::new(vec![0; 4096]);
        let mut windows = Windows::default();
        windows.grant(window(&memory, 0..4096));
        windows.grant(window(&memory, 4096..8192));
        windows.revoke(&(0..5000));
        assert!(!found(&windows, 0, 1));
        assert!(found(&windows, 4096, 1));
    }
}
