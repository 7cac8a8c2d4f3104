//! Moves without faults: what arrives is what left, and what cannot move stays.

mod support;

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dunlin_migration::transport::{Listener, TcpConnector};
use dunlin_migration::{
    CancelToken, Compression, MigrationError, MigrationOptions, NoConvergence, Outcome, RoundKind,
    Source, Step, Verification, Whereabouts,
};
use support::{Conduct, Load, SourceSide, UnixPlace, options, wait_on};

const BUSY: Load = Load {
    ram: 64 << 20,
    working_set: 4000,
    pages_per_second: 5000.0,
};

#[test]
fn a_busy_guest_moves_whole_over_a_unix_socket() {
    let place = UnixPlace::new(Conduct::default());
    let mut machine = SourceSide::running(BUSY);
    let options = MigrationOptions {
        verification: Verification::AfterHandOver,
        ..options()
    };
    let report = Source::new(options)
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    let left_at = machine.guest.counter();
    let arrival = place.waiting.arrival();
    assert!(!machine.guest.is_running());
    assert!(arrival.machine.guest().counter() >= left_at);
    arrival.machine.assert_runs_whole();
    arrival.witness.wait();
    assert_eq!(report.outcome, Outcome::Moved);
    assert_eq!(report.verified, Some(true));
    assert_eq!(report.rounds.last().unwrap().kind, RoundKind::Final);
    assert!(report.zero_pages > report.ram_bytes / 4096 / 4);
    assert!(report.blackout_ms.unwrap() <= report.total_ms);
    let text = serde_json::to_string(&report).unwrap();
    let back: dunlin_migration::MigrationReport = serde_json::from_str(&text).unwrap();
    assert_eq!(back.rounds.len(), report.rounds.len());
    assert_eq!(back.ram_hash, report.ram_hash);
}

#[test]
fn a_busy_guest_moves_whole_over_tcp_and_hashes_agree_before_the_hand_over() {
    let address = SocketAddr::from(([127, 0, 0, 1], 0));
    let listener = Listener::tcp(address).unwrap();
    let mut connector = TcpConnector::new(listener.tcp_address().unwrap());
    let waiting = wait_on(listener, Conduct::default());
    let mut machine = SourceSide::running(BUSY);
    let options = MigrationOptions {
        verification: Verification::BeforeHandOver,
        ..options()
    };
    let report = Source::new(options)
        .run(&mut machine, &mut connector)
        .unwrap();
    let arrival = waiting.arrival();
    arrival.machine.assert_runs_whole();
    arrival.witness.wait();
    assert_eq!(report.verified, Some(true));
    assert_eq!(report.transport, "tcp");
}

#[test]
fn untouched_memory_stays_untouched_at_both_sides() {
    use std::os::unix::fs::MetadataExt;
    let place = UnixPlace::new(Conduct {
        trusting: true,
        ..Conduct::default()
    });
    let mut machine = SourceSide::running(Load {
        ram: 256 << 20,
        working_set: 16,
        pages_per_second: 1000.0,
    });
    let blocks = |memory: &dunlin_guest::Memory| memory.file().metadata().unwrap().blocks() * 512;
    let before = blocks(machine.guest.memory());
    Source::new(options())
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    let arrival = place.waiting.arrival();
    assert!(blocks(machine.guest.memory()) <= before + (1 << 20));
    assert!(blocks(arrival.machine.guest().memory()) <= before + (1 << 20));
}

#[test]
fn a_guest_that_writes_faster_than_it_can_be_sent_runs_on_at_the_source() {
    let place = UnixPlace::new(Conduct::default());
    let mut machine = SourceSide::running(Load {
        ram: 8 << 20,
        working_set: 2000,
        pages_per_second: 40_000.0,
    });
    let options = MigrationOptions {
        bandwidth_limit: Some(24 << 20),
        downtime_limit: Duration::from_millis(20),
        ..options()
    };
    let failure = Source::new(options.clone())
        .run(&mut machine, place.connector().as_mut())
        .unwrap_err();
    assert!(
        matches!(failure.error, MigrationError::DidNotConverge { .. }),
        "{failure:?}"
    );
    assert_eq!(failure.guest, Whereabouts::RunsHere);
    assert!(!machine.tracking);
    machine.assert_runs_whole();
    assert_eq!(place.waiting.starts(), 0);

    let forced = MigrationOptions {
        on_no_convergence: NoConvergence::Force,
        ..options
    };
    let report = Source::new(forced)
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    assert_eq!(report.outcome, Outcome::Moved);
    place.waiting.arrival().machine.assert_runs_whole();
}

#[test]
fn several_lanes_compression_and_equal_pages_leave_nothing_out() {
    for (streams, compression) in [
        (Some(1), Compression::Lz4),
        (Some(3), Compression::Off),
        (Some(4), Compression::Lz4),
        (None, Compression::Auto),
    ] {
        let place = UnixPlace::new(Conduct::default());
        let mut machine = SourceSide::running(BUSY);
        let options = MigrationOptions {
            streams,
            compression,
            bandwidth_limit: Some(200 << 20),
            verification: Verification::AfterHandOver,
            ..options()
        };
        let report = Source::new(options)
            .run(&mut machine, place.connector().as_mut())
            .unwrap();
        let arrival = place.waiting.arrival();
        arrival.machine.assert_runs_whole();
        assert_eq!(report.verified, Some(true));
        let lanes = streams.unwrap_or(report.streams);
        assert!(report.streams == lanes && lanes >= 1);
    }
}

#[test]
fn a_page_that_was_written_with_what_it_held_does_not_travel_again() {
    let place = UnixPlace::new(Conduct::default());
    let mut machine = SourceSide::running(Load {
        ram: 8 << 20,
        ..Load::SMALL
    });
    let memory = machine.guest.memory().clone();
    let mut content = [0; 4096];
    let idle: Vec<_> = (1024..1536).map(dunlin_guest::PageIndex).collect();
    let report = Source::new(MigrationOptions {
        // Rounds take a while, so that there is more than one.
        bandwidth_limit: Some(40 << 20),
        downtime_limit: Duration::from_millis(200),
        ..options()
    })
    .progress(|progress| {
        if progress.round < 4 && progress.step == Step::Copying {
            for &page in &idle {
                memory.read_page(page, &mut content);
                memory.write_page(page, &content);
            }
        }
    })
    .run(&mut machine, place.connector().as_mut())
    .unwrap();
    assert!(report.same_pages > 0, "{report:?}");
    place.waiting.arrival().machine.assert_runs_whole();
}

#[test]
fn a_bandwidth_limit_is_kept() {
    let place = UnixPlace::new(Conduct::default());
    let mut machine = SourceSide::running(Load {
        ram: 8 << 20,
        ..Load::SMALL
    });
    let limit = 10 << 20;
    let options = MigrationOptions {
        bandwidth_limit: Some(limit),
        ..options()
    };
    let report = Source::new(options)
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    let rate = report.bytes_sent as f64 / (report.total_ms / 1e3);
    assert!(rate < limit as f64 * 1.2, "{rate}");
    place.waiting.arrival().machine.assert_runs_whole();
}

#[test]
fn cancelling_at_any_moment_leaves_one_whole_guest() {
    for moment in 0..24 {
        let place = UnixPlace::new(Conduct::default());
        let mut machine = SourceSide::running(Load::SMALL);
        let cancel = CancelToken::new();
        let mut calls = 0;
        let at = cancel.clone();
        let result = Source::new(options())
            .cancel(cancel)
            .progress(move |_| {
                if calls == moment {
                    at.cancel();
                }
                calls += 1;
            })
            .run(&mut machine, place.connector().as_mut());
        match result {
            Ok(report) => {
                assert_eq!(report.outcome, Outcome::Moved);
                assert!(!machine.guest.is_running());
                place.waiting.arrival().machine.assert_runs_whole();
            }
            Err(failure) => {
                assert!(
                    matches!(failure.error, MigrationError::Cancelled),
                    "{failure:?}"
                );
                assert_eq!(failure.guest, Whereabouts::RunsHere);
                machine.assert_runs_whole();
                assert_eq!(place.waiting.starts(), 0);
                // What was cancelled can be tried again.
                Source::new(options())
                    .run(&mut machine, place.connector().as_mut())
                    .unwrap();
                place.waiting.arrival().machine.assert_runs_whole();
            }
        }
    }
}

#[test]
fn a_pause_that_would_be_too_long_is_taken_back_and_the_limit_is_kept() {
    // The destination does not finish restoring until the guest has been resumed once.
    let gate = CancelToken::new();
    let place = UnixPlace::new(Conduct {
        restore_gate: Some(gate.clone()),
        // What a restore in vain wrote has to be sent again: the next one looks at all of RAM.
        scribbling: true,
        ..Conduct::default()
    });
    let mut machine = SourceSide::running(Load::SMALL);
    let mut pauses = 0;
    let mut opened = Some(gate);
    let limit = Duration::from_millis(200);
    let options = MigrationOptions {
        downtime_limit: limit,
        max_rounds: 200,
        max_switch_overs: 200,
        verification: Verification::AfterHandOver,
        ..options()
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
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    assert!(report.switch_overs_aborted >= 1);
    assert_eq!(report.verified, Some(true));
    assert!(place.waiting.conduct.restores.load(Ordering::SeqCst) >= 2);
    let arrival = place.waiting.arrival();
    arrival.machine.assert_runs_whole();
}

#[test]
fn a_destination_that_cannot_start_gives_the_guest_back() {
    let place = UnixPlace::new(Conduct::default());
    place
        .waiting
        .conduct
        .refuse_start
        .store(true, Ordering::SeqCst);
    let mut machine = SourceSide::running(Load::SMALL);
    let failure = Source::new(options())
        .run(&mut machine, place.connector().as_mut())
        .unwrap_err();
    assert_eq!(failure.guest, Whereabouts::RunsHere);
    machine.assert_runs_whole();
    place
        .waiting
        .conduct
        .refuse_start
        .store(false, Ordering::SeqCst);
    Source::new(options())
        .run(&mut machine, place.connector().as_mut())
        .unwrap();
    let arrival = place.waiting.arrival();
    assert_eq!(arrival.failed_sessions, 1);
    arrival.machine.assert_runs_whole();
}
