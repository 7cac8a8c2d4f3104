//! What a move would take, measured on the running guest: its dirty log in slices of time, and
//! its memory's content.

use std::time::{Duration, Instant};

use dunlin_api::migration::{Endpoint, MigrateRequest, MigrationReport, RoundKind};
use dunlin_api::plan::{GoodputSource, MovePrediction};
use dunlin_api::{ApiError, ErrorCode};
use dunlin_guest::{PAGE_SIZE, PageSet};
use dunlin_migration::predict::{self, DirtyCurve, Guest, Path, Slice};

use super::Lifecycle;
use super::requests::host;
use crate::moving;

/// A measurement that nobody ended for so long was given up by who began it.
const LASTS: Duration = Duration::from_secs(5);

/// Bytes a second between processes of one host, where nothing is known.
const WITHIN_A_HOST: f64 = 1e9;
/// Bytes a second between hosts: what one-gigabit Ethernet carries.
const BETWEEN_HOSTS: f64 = 117e6;
/// Bytes of a round from which its goodput says something.
const TELLING: u64 = 1 << 20;

/// A measurement under way.
#[derive(Debug)]
pub(super) struct Survey {
    since: Instant,
    /// The last harvest.
    last: Instant,
    slices: Vec<Slice>,
    /// Pages of all slices.
    seen: PageSet,
}

/// Where a move went, and how much of the way it might use.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Way {
    to: Endpoint,
    bandwidth: Option<u64>,
}

impl Way {
    pub(super) fn of(request: &MigrateRequest) -> Self {
        Self {
            to: request.to.clone(),
            bandwidth: request.bandwidth,
        }
    }

    /// Will the goodput of the move that `request` asks for be what it was on this way?
    fn tells_of(&self, request: &MigrateRequest) -> bool {
        let held_back = match (self.bandwidth, request.bandwidth) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(before), Some(now)) => before < now,
        };
        self.to == request.to && !held_back
    }
}

impl Survey {
    /// Does anybody still wait for it?
    pub(super) fn is_live(&self) -> bool {
        self.since.elapsed() < LASTS
    }
}

impl Lifecycle {
    /// Begins to count what the guest dirties.
    pub(super) fn begin_survey(&mut self) -> Result<(), ApiError> {
        self.check_movable("predict a move of")?;
        self.not_looked_at()?;
        self.drop_look();
        let vm = self.machine.vm();
        vm.start_dirty_tracking().map_err(|error| host(&error))?;
        self.harvest()?;
        let now = Instant::now();
        self.survey = Some(Survey {
            since: now,
            last: now,
            slices: Vec::new(),
            seen: PageSet::new(self.machine.memory().size() / PAGE_SIZE),
        });
        Ok(())
    }

    /// Ends a slice of the measurement; what it brought.
    pub(super) fn survey(&mut self) -> Result<Slice, ApiError> {
        let mut survey = self.survey.take().ok_or_else(interrupted)?;
        let dirtied = self.harvest()?;
        let before = survey.seen.len();
        survey.seen.union(&dirtied);
        let now = Instant::now();
        let slice = Slice {
            duration: now - survey.last,
            dirtied: dirtied.len(),
            fresh: survey.seen.len() - before,
        };
        survey.slices.push(slice);
        survey.last = now;
        self.survey = Some(survey);
        Ok(slice)
    }

    /// Ends the measurement: what the move that `request` asks for would take.
    pub(super) fn end_survey(
        &mut self,
        request: &MigrateRequest,
    ) -> Result<MovePrediction, ApiError> {
        let survey = self.survey.as_ref().ok_or_else(interrupted)?;
        let dirty = DirtyCurve::from_slices(&survey.slices);
        self.drop_look();
        let memory = self.machine.memory();
        let census = predict::census(memory);
        let guest = Guest {
            pages: memory.pages(),
            touched_pages: census.touched,
            content_pages: census.content,
            dirty,
        };
        let way = self.last_way.as_ref();
        let tells = way.is_some_and(|way| way.tells_of(request));
        let last = self.monitor.status().report.filter(|_| tells);
        let (goodput, goodput_source) = goodput(request, last.as_ref());
        let path = Path {
            goodput,
            round_trip: round_trip(&request.to),
            // As far as this side knows: the destination is asked when the move begins.
            post_copy: self.faults.is_ok(),
        };
        let expected = predict::predict(&guest, &path, &moving::options(request));
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        Ok(MovePrediction {
            ram_bytes: memory.size(),
            dirty_rate: guest.dirty.pages_a_second() * PAGE_SIZE as f64,
            working_set_bytes: guest.dirty.pages().saturating_mul(PAGE_SIZE),
            measured_ms: milliseconds(guest.dirty.measured()),
            goodput,
            goodput_source,
            total_ms: milliseconds(expected.total),
            bytes: expected.bytes,
            blackout_ms: milliseconds(expected.blackout),
            slowdown: expected.slowdown,
            rounds: expected.rounds,
            converges: expected.converges,
            post_copy: expected.post_copy,
        })
    }
}

fn interrupted() -> ApiError {
    ApiError::new(
        ErrorCode::Busy,
        "the measurement was interrupted: the guest was paused, moved or counted meanwhile",
    )
    .with_hint("try again in a second")
}

fn is_local(to: &Endpoint) -> bool {
    match to {
        Endpoint::Unix(_) => true,
        Endpoint::Tcp(address) => address.ip().is_loopback(),
    }
}

/// Bytes a second that will arrive, and how that is known: an earlier attempt of this VM has
/// measured it, or it is a guess; never more than the limit.
fn goodput(request: &MigrateRequest, last: Option<&MigrationReport>) -> (f64, GoodputSource) {
    let measured = last.and_then(|report| {
        let live = report.rounds.iter().filter(|round| {
            round.kind == RoundKind::Live && round.bytes >= TELLING && round.duration_ms > 0.0
        });
        // Of content, not of what that was compressed to: it is pages that are to be moved.
        let (bytes, time) = live.fold((0.0, 0.0), |(bytes, time), round| {
            let content = round.pages.saturating_mul(PAGE_SIZE).max(round.bytes);
            (bytes + content as f64, time + round.duration_ms / 1e3)
        });
        (time > 0.0).then_some(bytes / time)
    });
    let (known, source) = match measured {
        Some(rate) => (rate, GoodputSource::Measured),
        None if is_local(&request.to) => (WITHIN_A_HOST, GoodputSource::Assumed),
        None => (BETWEEN_HOSTS, GoodputSource::Assumed),
    };
    match request.bandwidth {
        Some(limit) if (limit as f64) < known => (limit as f64, GoodputSource::Limit),
        _ => (known, source),
    }
}

fn round_trip(to: &Endpoint) -> Duration {
    if is_local(to) {
        Duration::from_micros(200)
    } else {
        Duration::from_millis(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_api::migration::RoundReport;

    fn request(to: &str, bandwidth: Option<u64>) -> MigrateRequest {
        let text = format!(r#"{{"to":"{to}"}}"#);
        MigrateRequest {
            bandwidth,
            ..serde_json::from_str(&text).unwrap()
        }
    }

    fn report(rounds: &[(RoundKind, u64, f64)]) -> MigrationReport {
        let rounds = rounds
            .iter()
            .map(|&(kind, bytes, duration_ms)| RoundReport {
                kind,
                bytes,
                duration_ms,
                ..RoundReport::default()
            });
        MigrationReport {
            rounds: rounds.collect(),
            ..MigrationReport::default()
        }
    }

    #[test]
    fn what_an_earlier_attempt_measured_counts_more_than_a_guess() {
        let far = request("tcp://192.0.2.1:7000", None);
        assert_eq!(goodput(&far, None), (BETWEEN_HOSTS, GoodputSource::Assumed));
        let here = request("unix:/run/x.sock", None);
        assert_eq!(
            goodput(&here, None),
            (WITHIN_A_HOST, GoodputSource::Assumed)
        );
        let live = (RoundKind::Live, 50_000_000, 250.0);
        let last = report(&[
            live,
            (RoundKind::Live, 1000, 90.0),
            (RoundKind::Final, 1 << 30, 1.0),
        ]);
        assert_eq!(goodput(&far, Some(&last)), (200e6, GoodputSource::Measured));
    }

    #[test]
    fn what_was_compressed_counts_as_it_was_before() {
        let far = request("tcp://192.0.2.1:7000", None);
        let mut last = report(&[(RoundKind::Live, 50_000_000, 250.0)]);
        last.rounds[0].pages = 25_000;
        let (rate, _) = goodput(&far, Some(&last));
        assert_eq!(rate, 409.6e6);
    }

    #[test]
    fn a_move_tells_nothing_of_another_way_or_of_a_wider_one() {
        let way = Way::of(&request("tcp://192.0.2.1:7000", Some(1000)));
        assert!(way.tells_of(&request("tcp://192.0.2.1:7000", Some(1000))));
        assert!(way.tells_of(&request("tcp://192.0.2.1:7000", Some(10))));
        assert!(!way.tells_of(&request("tcp://192.0.2.1:7000", None)));
        assert!(!way.tells_of(&request("tcp://192.0.2.2:7000", Some(1000))));
        let free = Way::of(&request("unix:/run/x.sock", None));
        assert!(free.tells_of(&request("unix:/run/x.sock", Some(1))));
    }

    #[test]
    fn a_limit_counts_where_it_is_the_lowest() {
        let limited = request("tcp://192.0.2.1:7000", Some(1_000_000));
        assert_eq!(goodput(&limited, None), (1e6, GoodputSource::Limit));
        let generous = request("tcp://192.0.2.1:7000", Some(1 << 40));
        assert_eq!(
            goodput(&generous, None),
            (BETWEEN_HOSTS, GoodputSource::Assumed)
        );
    }

    #[test]
    fn a_report_without_a_telling_round_tells_nothing() {
        let far = request("tcp://192.0.2.1:7000", None);
        for rounds in [
            &[][..],
            &[(RoundKind::Live, 10, 1.0)],
            &[(RoundKind::Live, 1 << 30, 0.0)],
        ] {
            let (_, source) = goodput(&far, Some(&report(rounds)));
            assert_eq!(source, GoodputSource::Assumed);
        }
    }
}
