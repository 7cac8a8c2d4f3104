//! The frequency of the host's time-stamp counter.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use dunlin_x86::kvmclock::host_tsc;

use crate::kvm;

/// How long a calibration takes.
const CALIBRATION: Duration = Duration::from_millis(25);

/// The frequency in kHz, found out once a process.
///
/// The kernel tells it where `/dev/kvm` can be opened. Elsewhere the counter is compared to
/// CLOCK_MONOTONIC over 25 ms: each end is the closest of eight pairs of readings, good to about
/// 100 ns, so the result is good to about 10 parts in a million, besides what NTP slews meanwhile.
pub fn host_tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| kvm::tsc_khz().unwrap_or_else(calibrate))
}

fn calibrate() -> u64 {
    let (start, start_tsc) = moment();
    std::thread::sleep(CALIBRATION);
    let (end, end_tsc) = moment();
    let ns = end.duration_since(start).as_nanos().max(1);
    let ticks = u128::from(end_tsc.wrapping_sub(start_tsc));
    u64::try_from(ticks * 1_000_000 / ns).unwrap_or(u64::MAX)
}

/// Both clocks at one moment, as closely as they can be read.
fn moment() -> (Instant, u64) {
    let read = || {
        let before = host_tsc();
        let now = Instant::now();
        let width = host_tsc().wrapping_sub(before);
        (width, now, before.wrapping_add(width / 2))
    };
    let mut best = read();
    for _ in 1..8 {
        let next = read();
        if next.0 < best.0 {
            best = next;
        }
    }
    (best.1, best.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calibration_agrees_with_the_kernel() {
        let Some(told) = kvm::tsc_khz() else {
            eprintln!("SKIP: /dev/kvm does not tell the frequency");
            return;
        };
        let measured = calibrate();
        assert!(
            measured.abs_diff(told) < told / 1000,
            "{measured} kHz measured, {told} kHz told"
        );
    }
}
