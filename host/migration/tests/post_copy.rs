//! Moves whose memory follows the guest.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dunlin_migration::transport::{Connector, Listener, UnixConnector};
use dunlin_migration::{
    CancelToken, Compression, DestinationOptions, MigrationError, MigrationOptions, Mode, Outcome,
    Source, Standing, Step, Userfaultfd, Verification, Whereabouts,
};
use support::{Conduct, Load, SourceSide, Waiting, destination_options, options, wait_with};

const BUSY: Load = Load {
    ram: 64 << 20,
    working_set: 4000,
    pages_per_second: 5000.0,
};

struct Place {
    directory: tempfile::TempDir,
    waiting: Waiting,
}

impl Place {
    /// `None` where faults of guest memory cannot be served.
    fn new(conduct: Conduct) -> Option<Self> {
        let faults = match Userfaultfd::open() {
            Ok(faults) => Arc::new(faults),
            Err(error) => {
                eprintln!("SKIP: {error}");
                return None;
            }
        };
        let options = DestinationOptions {
            faults: Ok(faults),
            reconnect_window: Duration::from_secs(20),
            ..destination_options()
        };
        Some(Self::with(conduct, options))
    }

    fn with(conduct: Conduct, options: DestinationOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = Listener::unix(&directory.path().join("door")).unwrap();
        Self {
            waiting: wait_with(listener, conduct, options),
            directory,
        }
    }

    fn connector(&self) -> Box<dyn Connector> {
        Box::new(UnixConnector::new(self.directory.path().join("door")))
    }
}

fn post() -> MigrationOptions {
    MigrationOptions {
        mode: Mode::Post,
        reconnect_window: Duration::from_secs(20),
        ..options()
    }
}

#[test]
fn a_busy_guest_goes_first_and_its_memory_follows() {
    let Some(place) = Place::new(Conduct {
        trusting: true,
        ..Conduct::default()
    }) else {
        return;
    };
    let mut machine = SourceSide::running(BUSY);
    let options = MigrationOptions {
        verification: Verification::AfterHandOver,
        ..post()
    };
    let mut steps = Vec::new();
    let report = Source::new(options)
        .progress(|progress| steps.push(progress.step))
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    let arrival = place.waiting.arrival();
    let following = arrival.following.unwrap();
    assert_eq!(following.wait(), Standing::Complete);
    arrival.machine.assert_runs_whole();
    arrival.witness.wait();
    assert!(!machine.guest.is_running());
    assert_eq!(report.outcome, Outcome::Moved);
    assert_eq!(report.verified, Some(true));
    let counts = report.post_copy.unwrap();
    assert!(counts.missing_pages > 0);
    let came = counts.urgent_pages + counts.prefetched_pages + counts.bulk_pages;
    assert_eq!(came, counts.missing_pages);
    assert_eq!(following.missing_pages(), 0);
    assert!(steps.contains(&Step::HandingOver));
    eprintln!("{counts:?} blackout {:?}", report.blackout_ms);
}

#[test]
fn a_guest_that_looks_at_all_of_its_memory_while_it_is_restored_is_served() {
    let Some(place) = Place::new(Conduct::default()) else {
        return;
    };
    let mut machine = SourceSide::running(BUSY);
    let options = MigrationOptions {
        downtime_limit: Duration::from_secs(20),
        ..post()
    };
    let report = Source::new(options)
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    let counts = report.post_copy.unwrap();
    assert!(counts.faults > 0);
    place.waiting.arrival().machine.assert_runs_whole();
}

#[test]
fn a_guest_that_outruns_the_wire_moves_by_itself_to_post_copy() {
    let Some(place) = Place::new(Conduct {
        trusting: true,
        ..Conduct::default()
    }) else {
        return;
    };
    let mut machine = SourceSide::running(Load {
        ram: 16 << 20,
        working_set: 3000,
        pages_per_second: 40_000.0,
    });
    let options = MigrationOptions {
        mode: Mode::Auto,
        bandwidth_limit: Some(24 << 20),
        compression: Compression::Off,
        downtime_limit: Duration::from_millis(30),
        ..post()
    };
    let report = Source::new(options)
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    let arrival = place.waiting.arrival();
    assert_eq!(arrival.following.unwrap().wait(), Standing::Complete);
    arrival.machine.assert_runs_whole();
    assert!(report.post_copy.unwrap().missing_pages > 0);
}

#[test]
fn a_switch_over_that_takes_too_long_is_taken_back_and_every_missing_page_goes_again() {
    let gate = CancelToken::new();
    let Some(place) = Place::new(Conduct {
        restore_gate: Some(gate.clone()),
        scribbling: true,
        trusting: true,
        ..Conduct::default()
    }) else {
        return;
    };
    let mut machine = SourceSide::running(BUSY);
    let mut pauses = 0;
    let mut opened = Some(gate);
    let options = MigrationOptions {
        downtime_limit: Duration::from_millis(200),
        max_rounds: 200,
        max_switch_overs: 200,
        verification: Verification::AfterHandOver,
        ..post()
    };
    let report = Source::new(options)
        .progress(|progress| {
            if progress.step == Step::SwitchingOver && progress.pages_done == 0 {
                pauses += 1;
            }
            if progress.step == Step::Copying
                && pauses > 0
                && let Some(gate) = opened.take()
            {
                gate.cancel();
            }
        })
        .run(&mut machine, place.connector().as_mut());
    // The gate opens with the next round, which begins when the restoring has ended.
    drop(opened);
    let report = report.unwrap();
    assert!(report.switch_overs_aborted >= 1);
    assert!(place.waiting.conduct.restores.load(Ordering::SeqCst) >= 2);
    let arrival = place.waiting.arrival();
    assert_eq!(arrival.following.unwrap().wait(), Standing::Complete);
    arrival.machine.assert_runs_whole();
    assert_eq!(report.verified, Some(true));
}

#[test]
fn a_destination_that_cannot_start_gives_the_guest_back() {
    let Some(place) = Place::new(Conduct {
        trusting: true,
        ..Conduct::default()
    }) else {
        return;
    };
    let refuse = &place.waiting.conduct.refuse_start;
    refuse.store(true, Ordering::SeqCst);
    let mut machine = SourceSide::running(BUSY);
    let failure = Source::new(post())
        .run(&mut machine, place.connector().as_mut())
        .unwrap_err();
    assert_eq!(failure.guest, Whereabouts::RunsHere, "{failure:?}");
    machine.assert_runs_whole();
    refuse.store(false, Ordering::SeqCst);
    Source::new(post())
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    let arrival = place.waiting.arrival();
    assert_eq!(arrival.failed_sessions, 1);
    assert_eq!(arrival.following.unwrap().wait(), Standing::Complete);
    arrival.machine.assert_runs_whole();
}

#[test]
fn a_destination_that_cannot_serve_faults_gets_all_memory_before_and_says_why() {
    let options = DestinationOptions {
        faults: Err("the test says so".to_owned()),
        ..destination_options()
    };
    let place = Place::with(Conduct::default(), options);
    let mut machine = SourceSide::running(Load::SMALL);
    let report = Source::new(post())
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    assert_eq!(report.post_copy, None);
    let reason = report.no_post_copy.unwrap();
    assert!(reason.contains("the test says so"), "{reason}");
    let arrival = place.waiting.arrival();
    assert!(arrival.following.is_none());
    arrival.machine.assert_runs_whole();
}

#[test]
fn cancelling_at_any_moment_leaves_one_whole_guest() {
    for moment in 0..16 {
        let Some(place) = Place::new(Conduct {
            trusting: true,
            ..Conduct::default()
        }) else {
            return;
        };
        let mut machine = SourceSide::running(Load::SMALL);
        let cancel = CancelToken::new();
        let at = cancel.clone();
        let mut calls = 0;
        let result = Source::new(post())
            .cancel(cancel)
            .progress(move |_| {
                if calls == moment {
                    at.cancel();
                }
                calls += 1;
            })
            .run(&mut machine, place.connector().as_mut());
        match result {
            Ok(_) => {
                assert!(!machine.guest.is_running());
                let arrival = place.waiting.arrival();
                assert_eq!(arrival.following.unwrap().wait(), Standing::Complete);
                arrival.machine.assert_runs_whole();
            }
            Err(failure) => {
                assert!(
                    matches!(failure.error, MigrationError::Cancelled),
                    "{failure:?}"
                );
                assert_eq!(failure.guest, Whereabouts::RunsHere);
                machine.assert_runs_whole();
                place.waiting.give_up();
            }
        }
    }
}
