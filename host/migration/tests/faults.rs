//! Harm at every message of the protocol in turn: afterwards exactly one side runs the guest, it
//! is whole, and a guest that stayed can be moved by another try.

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use dunlin_migration::protocol::Kind;
use dunlin_migration::transport::UnixConnector;
use dunlin_migration::{
    MigrationFailure, MigrationOptions, MigrationReport, Outcome, Source, Verification, Whereabouts,
};
use support::proxy::{Fault, Harm, Place, Proxy, Way};
use support::{Conduct, Load, SourceSide, UnixPlace, options};

/// A move through few frames, by a guest that writes all the time.
const LOAD: Load = Load {
    ram: 1 << 20,
    working_set: 48,
    pages_per_second: 2000.0,
};

fn impatient() -> MigrationOptions {
    MigrationOptions {
        downtime_limit: Duration::from_millis(400),
        idle_timeout: Duration::from_millis(250),
        verification: Verification::AfterHandOver,
        ..options()
    }
}

/// Moves through a proxy that does `fault`; checks that one side has the guest. `None` when the
/// conversation ended before the fault, else whether the guest moved.
fn survives(fault: Fault) -> Option<bool> {
    let place = UnixPlace::new(Conduct::default());
    let proxy = Proxy::new(place.directory.path(), place.door(), Some(fault));
    let mut machine = SourceSide::running(LOAD);
    let mut connector = UnixConnector::new(&proxy.door);
    let result = Source::new(impatient()).run(&mut machine, &mut connector);
    let moved = check_owner(&fault, result, &machine, &place);
    if !moved {
        let report = Source::new(impatient())
            .run(&mut machine, place.connector().as_mut())
            .unwrap_or_else(|failure| panic!("{fault:?}: the retry failed: {failure:?}"));
        assert_eq!(report.verified, Some(true), "{fault:?}");
    }
    let starts = place.waiting.starts();
    assert_eq!(starts, 1, "{fault:?}");
    let arrival = place.waiting.arrival();
    assert!(!machine.guest.is_running());
    arrival.machine.assert_runs_whole();
    arrival.witness.stop();
    // The last word may still be on its way.
    let begun = Instant::now();
    while fault.place == Place::Frame(Kind::Settled) && fault.skip == 0 && !proxy.hit() {
        assert!(begun.elapsed() < Duration::from_secs(5), "no last word");
        std::thread::yield_now();
    }
    proxy.hit().then_some(moved)
}

/// True when the guest has moved.
fn check_owner(
    fault: &Fault,
    result: Result<MigrationReport, Box<MigrationFailure>>,
    machine: &SourceSide,
    place: &UnixPlace,
) -> bool {
    match result {
        Ok(report) => {
            assert_eq!(report.outcome, Outcome::Moved);
            assert_eq!(report.verified, Some(true), "{fault:?}");
            assert_eq!(place.waiting.starts(), 1, "{fault:?}");
            true
        }
        Err(failure) => {
            assert_eq!(
                failure.guest,
                Whereabouts::RunsHere,
                "{fault:?}: {failure:?}"
            );
            assert_eq!(place.waiting.starts(), 0, "{fault:?}");
            machine.assert_runs_whole();
            false
        }
    }
}

const TO_DESTINATION: &[Kind] = &[
    Kind::Configuration,
    Kind::KeepAlive,
    Kind::Lanes,
    Kind::RoundBegin,
    Kind::RoundEnd,
    Kind::SwitchOver,
    Kind::States,
    Kind::Commit,
    Kind::Settled,
];

const TO_SOURCE: &[Kind] = &[
    Kind::Ready,
    Kind::KeepAlive,
    Kind::Stored,
    Kind::Prepared,
    Kind::Running,
];

/// Each message of each kind in turn.
fn every_message(way: Way, harm: Harm) {
    let kinds = match way {
        Way::ToDestination => TO_DESTINATION,
        Way::ToSource => TO_SOURCE,
    };
    let mut places: Vec<Place> = kinds.iter().copied().map(Place::Frame).collect();
    if way == Way::ToDestination {
        places.push(Place::Lane(0));
    }
    for place in places {
        let mut moved = Vec::new();
        for skip in 0..20 {
            let fault = Fault {
                way,
                place,
                skip,
                harm,
            };
            let Some(outcome) = survives(fault) else {
                break;
            };
            moved.push(outcome);
        }
        eprintln!("{way:?} {harm:?} {place:?}: moved {moved:?}");
        assert!(!moved.is_empty(), "{place:?} was never harmed");
    }
}

macro_rules! harms {
    ($($name:ident: $harm:ident),* $(,)?) => { $(
        mod $name {
            use super::*;

            #[test]
            fn at_every_message_to_the_destination_leaves_one_whole_guest() {
                every_message(Way::ToDestination, Harm::$harm);
            }

            #[test]
            fn at_every_message_to_the_source_leaves_one_whole_guest() {
                every_message(Way::ToSource, Harm::$harm);
            }
        }
    )* };
}

harms! {
    a_cut: Cut,
    a_cut_within: CutWithin,
    a_cut_behind: CutBehind,
    a_stall: Stall,
    a_flipped_header_bit: Header,
    a_flipped_payload_bit: Payload,
    a_repetition: Twice,
    a_loss: Lost,
}

#[test]
fn without_an_answer_the_guest_stays_paused_and_the_question_can_be_asked_again() {
    // Everything between the two ends is gone once the commit was sent; the destination lives.
    let place = UnixPlace::new(Conduct::default());
    let hidden = place.directory.path().join("hidden");
    let door = place.door();
    let moved_door = hidden.clone();
    let fault = Fault {
        way: Way::ToSource,
        place: Place::Frame(Kind::Running),
        skip: 0,
        harm: Harm::Cut,
    };
    let action = Box::new(move || std::fs::rename(&door, &moved_door).unwrap());
    let proxy = Proxy::with_action(
        place.directory.path(),
        place.door(),
        Some(fault),
        Some(action),
    );
    let mut machine = SourceSide::running(LOAD);
    let mut connector = UnixConnector::new(&proxy.door);
    let options = MigrationOptions {
        inquiry_timeout: Duration::from_millis(100),
        ..impatient()
    };
    let failure = Source::new(options)
        .run(&mut machine, &mut connector)
        .unwrap_err();
    assert!(proxy.hit());
    let Whereabouts::InDoubt(doubt) = failure.guest else {
        panic!("{failure:?}");
    };
    assert_eq!(failure.report.outcome, Outcome::InDoubt);
    assert!(!machine.guest.is_running());
    let mut connector = UnixConnector::new(hidden);
    let until = std::time::Instant::now() + Duration::from_secs(5);
    let verdict = dunlin_migration::resolve(&mut connector, &doubt, until);
    assert!(
        matches!(verdict, dunlin_migration::Verdict::RunsThere(_)),
        "{verdict:?}"
    );
    assert_eq!(place.waiting.conduct.starts.load(Ordering::SeqCst), 1);
    let arrival = place.waiting.arrival();
    arrival.witness.stop();
    arrival.machine.assert_runs_whole();
}
