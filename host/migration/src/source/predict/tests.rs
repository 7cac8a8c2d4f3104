//! Guests made by hand, and any.

use super::*;
use crate::options::{Mode, NoConvergence};
use proptest::prelude::*;

const MIB: u64 = (1 << 20) / PAGE as u64;
const SLICE: Duration = Duration::from_millis(25);

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Measured for half a second: a guest that goes through `working_set` pages in turns, `rate`
/// pages a second.
fn turns(working_set: u64, rate: u64) -> DirtyCurve {
    let mut slices = Vec::new();
    let mut seen = 0;
    for _ in 0..20 {
        let dirtied = (rate * 25 / 1000).min(working_set);
        let fresh = dirtied.min(working_set - seen);
        seen += fresh;
        slices.push(Slice {
            duration: SLICE,
            dirtied,
            fresh,
        });
    }
    DirtyCurve::from_slices(&slices)
}

fn guest(pages: u64, dirty: DirtyCurve) -> Guest {
    Guest {
        pages,
        touched_pages: pages,
        content_pages: pages,
        dirty,
    }
}

/// A gigabyte a second, at hand.
const PATH: Path = Path {
    goodput: 1e9,
    round_trip: Duration::from_micros(200),
    post_copy: false,
};

fn after(guest: &Guest, path: &Path) -> Prediction {
    predict(guest, path, &MigrationOptions::default())
}

#[test]
fn an_idle_guest_takes_as_long_as_its_memory_takes_once() {
    let idle = guest(256 * MIB, DirtyCurve::default());
    let expected = after(&idle, &PATH);
    assert!(expected.converges && !expected.post_copy, "{expected:?}");
    assert_eq!(expected.bytes, 256 << 20);
    let seconds = expected.total.as_secs_f64();
    assert!((0.268..0.285).contains(&seconds), "{expected:?}");
    assert!(expected.blackout < ms(10), "{expected:?}");
    assert!(expected.slowdown < 0.05, "{expected:?}");
}

#[test]
fn pages_of_zeros_cost_nothing() {
    let mut empty = guest(1024 * MIB, DirtyCurve::default());
    empty.content_pages = 10 * MIB;
    empty.touched_pages = 10 * MIB;
    let expected = after(&empty, &PATH);
    assert_eq!(expected.bytes, 10 << 20);
    assert!(expected.total < ms(30), "{expected:?}");
    // Unless they were touched, and have to be looked at.
    empty.touched_pages = 1024 * MIB;
    assert!(after(&empty, &PATH).total > ms(400), "{expected:?}");
}

#[test]
fn a_small_working_set_is_sent_again_and_then_fits() {
    // 64 MiB that are all written again in each 64 ms.
    let busy = guest(1024 * MIB, turns(64 * MIB, 1000 * MIB));
    let path = Path {
        goodput: 3e9,
        ..PATH
    };
    let expected = after(&busy, &path);
    assert!(expected.converges, "{expected:?}");
    assert!(expected.rounds >= 1, "{expected:?}");
    let most = (1024 + 64 * u64::from(expected.rounds)) << 20;
    assert!(
        (1025 << 20..=most).contains(&expected.bytes),
        "{expected:?}"
    );
    assert!(expected.blackout <= ms(50), "{expected:?}");
}

#[test]
fn a_guest_that_dirties_more_than_arrives_does_not_converge_unless_its_memory_may_follow() {
    let flood = guest(1024 * MIB, turns(1024 * MIB, 2000 * MIB));
    let stays = predict(
        &flood,
        &PATH,
        &MigrationOptions {
            mode: Mode::Pre,
            max_rounds: 2,
            ..MigrationOptions::default()
        },
    );
    assert!(!stays.converges && !stays.post_copy, "{stays:?}");
    assert!(stays.blackout > ms(50), "{stays:?}");
    let forced = predict(
        &flood,
        &PATH,
        &MigrationOptions {
            mode: Mode::Pre,
            max_rounds: 2,
            on_no_convergence: NoConvergence::Force,
            ..MigrationOptions::default()
        },
    );
    assert!(!forced.converges, "{forced:?}");
    assert!(
        forced.total > forced.blackout && forced.blackout > ms(50),
        "{forced:?}"
    );
}

#[test]
fn a_move_that_runs_out_of_time_is_expected_to_fail() {
    let busy = guest(1024 * MIB, turns(1024 * MIB, 900 * MIB));
    let options = MigrationOptions {
        timeout: Some(ms(500)),
        ..MigrationOptions::default()
    };
    assert!(!predict(&busy, &PATH, &options).converges);
}

#[test]
fn only_slower_guests_converge() {
    // From an idle guest to one that dirties three times of what arrives.
    let options = MigrationOptions {
        mode: Mode::Pre,
        max_rounds: 3,
        ..MigrationOptions::default()
    };
    let converges: Vec<bool> = (0..=30)
        .map(|tenth| {
            let rate = 953 * MIB / 10 * tenth;
            let busy = guest(2048 * MIB, turns(2048 * MIB, rate));
            predict(&busy, &PATH, &options).converges
        })
        .collect();
    assert!(converges[0]);
    assert!(
        converges.is_sorted_by(|first, then| first >= then),
        "{converges:?}"
    );
}

#[test]
fn a_curve_says_what_was_measured_and_falls_off_behind_it() {
    // The working set is seen after 250 ms.
    let small = turns(1000, 4000);
    assert_eq!(small.pages(), 1000);
    assert_eq!(small.pages_in(ms(25)), 100.0);
    assert_eq!(small.pages_in(ms(12_500)), 1000.0);
    // Nothing falls off: a guest that writes ever more pages.
    let stream = turns(u64::MAX, 4000);
    assert!((stream.pages_in(ms(5000)) - 20_000.0).abs() < 1.0);
    assert!((stream.pages_a_second() - 4000.0).abs() < 1e-6);
    // Pages at random: the measurement ends before all were seen.
    let slices: Vec<Slice> = (0..20u32)
        .map(|n| {
            let until = |n: u32| 1000.0 * (1.0 - (-f64::from(n) / 20.0).exp());
            Slice {
                duration: SLICE,
                dirtied: 49,
                fresh: (until(n + 1) - until(n)).round() as u64,
            }
        })
        .collect();
    let random = DirtyCurve::from_slices(&slices);
    let (end, later) = (random.pages_in(ms(500)), random.pages_in(ms(10_000)));
    assert!((600.0..660.0).contains(&end), "{end}");
    assert!((900.0..1100.0).contains(&later), "{later}");
}

#[test]
fn nothing_measured_is_nothing_dirtied() {
    let nothing = DirtyCurve::from_slices(&[]);
    assert_eq!(nothing.pages_in(ms(1000)), 0.0);
    assert_eq!((nothing.pages(), nothing.measured()), (0, Duration::ZERO));
    let instant = Slice {
        duration: Duration::ZERO,
        dirtied: 7,
        fresh: 7,
    };
    assert_eq!(DirtyCurve::from_slices(&[instant]), nothing);
}

fn slices() -> impl Strategy<Value = Vec<Slice>> {
    let slice = (0u64..200_000, 0u64..100_000, 0u64..=100);
    let slice = slice.prop_map(|(micros, dirtied, percent)| Slice {
        duration: Duration::from_micros(micros),
        dirtied,
        fresh: dirtied * percent / 100,
    });
    proptest::collection::vec(slice, 0..30)
}

proptest! {
    #[test]
    fn a_curve_grows_with_time(slices in slices(), times in proptest::collection::vec(0u64..100_000, 2..20)) {
        let curve = DirtyCurve::from_slices(&slices);
        let mut times = times;
        times.sort_unstable();
        let pages: Vec<f64> = times.iter().map(|&time| curve.pages_in(ms(time))).collect();
        prop_assert!(pages.iter().all(|pages| pages.is_finite() && *pages >= 0.0));
        prop_assert!(pages.windows(2).all(|two| two[0] <= two[1] + 1e-6), "{:?}", pages);
    }

    #[test]
    fn a_guest_that_dirties_more_is_dirtied_more(slices in slices(), time in 0u64..10_000) {
        let twice: Vec<Slice> = slices
            .iter()
            .map(|slice| Slice { dirtied: slice.dirtied * 2, fresh: slice.fresh * 2, ..*slice })
            .collect();
        let once = DirtyCurve::from_slices(&slices).pages_in(ms(time));
        let twice = DirtyCurve::from_slices(&twice).pages_in(ms(time));
        prop_assert!(twice + 1e-6 >= once);
    }

    #[test]
    fn every_prediction_can_be(
        slices in slices(),
        pages in 1u64..4_000_000,
        content in 0u64..5_000_000,
        goodput in 0.0f64..1e11,
        round_trip in 0u64..2_000_000,
        post_copy in any::<bool>(),
        limit in 1u64..1000,
        mode in 0u8..3,
    ) {
        let guest = Guest { pages, touched_pages: pages, content_pages: content, dirty: DirtyCurve::from_slices(&slices) };
        let path = Path { goodput, round_trip: Duration::from_micros(round_trip), post_copy };
        let options = MigrationOptions {
            downtime_limit: ms(limit),
            mode: [Mode::Auto, Mode::Pre, Mode::Post][usize::from(mode)],
            ..MigrationOptions::default()
        };
        let expected = predict(&guest, &path, &options);
        prop_assert!((0.0..=1.0).contains(&expected.slowdown), "{:?}", expected);
        prop_assert!(!(expected.converges && expected.post_copy));
        prop_assert!(!expected.converges || expected.blackout <= ms(limit));
        let moves = expected.converges || expected.post_copy;
        if moves {
            prop_assert!(expected.bytes >= bytes(content.min(pages)));
            prop_assert!(expected.total >= expected.blackout);
        }
        prop_assert!(expected.rounds <= options.max_rounds);
        prop_assert_eq!(expected, predict(&guest, &path, &options), "the same again");
    }

    #[test]
    fn a_wider_path_takes_no_longer_for_an_idle_guest(
        pages in 1u64..4_000_000,
        goodput in 1e6f64..1e10,
        factor in 1.0f64..10.0,
    ) {
        let idle = guest(pages, DirtyCurve::default());
        let wide = Path { goodput: goodput * factor, ..PATH };
        let narrow = Path { goodput, ..PATH };
        prop_assert!(after(&idle, &wide).total <= after(&idle, &narrow).total + ms(1));
    }
}
