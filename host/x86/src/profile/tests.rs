//! Samples of processors that run, taken where a signal's handler would.

use super::*;

fn samples(probe: &Probe) -> Vec<Sample> {
    std::iter::from_fn(|| probe.take()).collect()
}

fn sample(probe: &Probe, program_counter: usize) {
    // SAFETY: the processor does not run, or this thread runs it.
    #[expect(unsafe_code, reason = "as a signal's handler does")]
    unsafe {
        probe.sample(program_counter);
    }
}

#[test]
fn a_processor_that_does_not_run_is_found_where_it_stands() {
    let probe = Probe::new(0..0);
    probe.stand_at(0xffff_8000_0000_1234, 3);
    for doing in Doing::ALL {
        probe.set_outside(doing);
        sample(&probe, 0);
    }
    let taken = samples(&probe);
    assert_eq!(taken.len(), Doing::ALL.len());
    for (sample, doing) in taken.into_iter().zip(Doing::ALL) {
        let expected = Sample {
            doing,
            user: true,
            address: 0xffff_8000_0000_1234,
            code: 0,
        };
        assert_eq!(sample, expected);
    }
}

#[test]
fn what_no_place_is_left_for_is_counted() {
    let probe = Probe::new(0..0);
    for _ in 0..8200 {
        sample(&probe, 0);
    }
    assert_eq!((probe.lost(), probe.seen()), (8, 8200));
    assert_eq!(samples(&probe).len(), 8192);
    sample(&probe, 0);
    assert_eq!((samples(&probe).len(), probe.lost()), (1, 8));
}

#[test]
fn places_are_sorted_by_their_samples_and_bounded() {
    let mut profile = Profile::default();
    let place = |address| Place {
        address,
        user: false,
    };
    for address in 0..70_000 {
        profile.add(Doing::Translated, Some(place(address)));
    }
    for _ in 0..3 {
        profile.add(Doing::FillingTlb, Some(place(7)));
        profile.add(Doing::Translated, Some(place(9)));
    }
    profile.add(Doing::Translated, None);
    let places = profile.places();
    assert_eq!(places.len(), 1 << 16);
    assert_eq!(places[0], (place(9), Doing::Translated, 4));
    assert_eq!(places[1], (place(0), Doing::Translated, 1));
    assert_eq!(profile.samples(Doing::FillingTlb), 3);
    assert_eq!(profile.all_samples(), 70_007);
}

#[test]
fn numbers_name_what_they_were_made_of() {
    for (number, doing) in Doing::ALL.into_iter().enumerate() {
        assert_eq!(doing as usize, number);
        assert_eq!(Doing::from_number(number as u8), doing);
    }
    assert_eq!(Doing::from_number(200), Doing::Interpreted);
}
