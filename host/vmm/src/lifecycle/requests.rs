//! What the lifecycle does for each request.

use std::time::{Duration, Instant};

use dunlin_api::error::chain;
use dunlin_api::migration::{MigrateRequest, MigrationStatus};
use dunlin_api::snapshot::SaveRequest;
use dunlin_api::status::{ExitCounts, ExitReport, VmStatus};
use dunlin_api::{ApiError, ErrorCode};
use dunlin_guest::{PAGE_SIZE, PageSet};
use dunlin_migration::Verdict;
use dunlin_migration::handover::Claimed;

use super::survey::{Survey, Way};
use super::{Ending, LINGER, Lifecycle, MoveCall, Phase, Transition, answer};
use crate::machine::{DiskLocks, assemble};
use crate::moving::{self, FromFile, MoveEnd, MoveOutcome};

/// How long a destination is asked again before a user's word decides.
const ASK_AGAIN: Duration = Duration::from_secs(3);

/// A count that nobody ended for so long was given up by who began it.
const LOOK_LASTS: Duration = Duration::from_secs(5);

/// A count under way.
#[derive(Debug)]
pub(super) struct Look {
    since: Instant,
    exits: Vec<ExitCounts>,
    /// Dirty pages are counted: the guest runs and no move harvests the log.
    dirty: bool,
}

/// The host refused.
pub(super) fn host(error: &(dyn std::error::Error + 'static)) -> ApiError {
    ApiError::from_chain(ErrorCode::Host, error)
}

impl Lifecycle {
    /// Refuses while a move, or a save of the running guest, is under way.
    pub(super) fn not_moving(&self, action: &str) -> Result<(), ApiError> {
        let (what, command) = if self.moving.is_some() {
            ("moved", "migrate")
        } else if self.saving.is_some() {
            ("saved", "save")
        } else {
            return Ok(());
        };
        let name = &self.machine.config().name;
        Err(ApiError::new(
            ErrorCode::Busy,
            format!("cannot {action} VM \"{name}\": it is being {what}"),
        )
        .with_hint(format!(
            "wait for that to end, or interrupt \"dunlin {command}\" to cancel it"
        )))
    }

    /// Refuses while pages are missing, of a guest from a file or from another host: what is not
    /// there cannot be sent.
    pub(super) fn all_pages_are_here(&self, action: &str) -> Result<(), ApiError> {
        self.source_is_there(action)?;
        if let Some(following) = &self.following {
            let name = &self.machine.config().name;
            let missing = following.missing_pages();
            return Err(ApiError::new(
                ErrorCode::Busy,
                format!(
                    "cannot {action} VM \"{name}\": its memory is still arriving from the host that \
                     it came from, {missing} pages are missing"
                ),
            )
            .with_hint("try again in a moment"));
        }
        let missing = self.from_file.as_ref().and_then(FromFile::missing);
        let Some((missing, all)) = missing else {
            return Ok(());
        };
        let name = &self.machine.config().name;
        let there = (all - missing) * 100 / all.max(1);
        Err(ApiError::new(
            ErrorCode::Busy,
            format!(
                "cannot {action} VM \"{name}\": its memory is still being read from a file, \
                 {there} % is there"
            ),
        )
        .with_hint("try again in a moment; \"dunlin restore --eager\" reads all before it runs"))
    }

    /// Refuses while the guest waits for the host that it came from: what has to stop may wait for
    /// a page.
    fn source_is_there(&self, action: &str) -> Result<(), ApiError> {
        if !self.waits_for_its_source() {
            return Ok(());
        }
        let name = &self.machine.config().name;
        Err(ApiError::new(
            ErrorCode::Busy,
            format!(
                "cannot {action} VM \"{name}\": parts of its memory are at the host that it came \
                 from, which cannot be reached now"
            ),
        )
        .with_hint("it goes on when that host is back; \"dunlin stop\" gives it up"))
    }

    pub(super) fn pause(&mut self) -> Result<VmStatus, ApiError> {
        self.not_moving("pause")?;
        self.source_is_there("pause")?;
        let next = self.phase.after(Transition::Pause)?;
        if self.phase == Phase::Running {
            self.drop_look();
            let stopped = self.machine.pause(DiskLocks::Keep);
            stopped.map_err(|error| self.run_on(host(&error)))?;
        }
        self.phase = next;
        Ok(self.status())
    }

    /// A pause failed halfway: what has stopped goes on. Returns why it failed.
    pub(super) fn run_on(&self, error: ApiError) -> ApiError {
        if let Err(error) = self.machine.resume() {
            tracing::error!(error = chain(&error), "the guest did not go on");
        }
        error
    }

    pub(super) fn resume(&mut self) -> Result<VmStatus, ApiError> {
        self.not_moving("resume")?;
        if self.phase == Phase::InDoubt {
            self.ask_again()?;
        }
        let next = self.phase.after(Transition::Resume)?;
        if self.phase != Phase::Running {
            self.machine.resume().map_err(|error| host(&error))?;
        }
        self.phase = next;
        self.reset_if_pending();
        Ok(self.status())
    }

    /// A guest in doubt is claimed for this side, unless the destination says that it runs there,
    /// or is a process of this host that has it.
    fn ask_again(&mut self) -> Result<(), ApiError> {
        let Some(question) = self.question.clone() else {
            return Ok(());
        };
        if matches!(question.ask(ASK_AGAIN), Verdict::RunsThere(_)) {
            self.question = None;
            self.phase = self.phase.after(Transition::HandOver)?;
            self.monitor.resolve_as_moved();
            self.leave();
            if let Some(pid) = question.successor() {
                self.passes_to(pid);
            }
            return Err(ApiError::new(
                ErrorCode::WrongState,
                "the guest runs at the destination, which answers again",
            ));
        }
        // Only of a process of this host is it known that it has the guest.
        let pid = question.successor().unwrap_or_default();
        match question.claim() {
            Claimed::Here => {
                self.question = None;
                Ok(())
            }
            Claimed::There => Err(ApiError::new(
                ErrorCode::Busy,
                format!("process {pid} has the guest and does not answer"),
            )
            .with_hint(format!(
                "try again when it goes on; when it does not, end it by \"kill -KILL {pid}\": \
                 the guest ends with it"
            ))),
            Claimed::Gone => {
                let ending = Ending::DiedIn(pid);
                let error = ApiError::new(ErrorCode::WrongState, ending.describe());
                self.end(ending);
                Err(error)
            }
        }
    }

    /// The guest runs elsewhere; this process stays for a while to tell so.
    fn leave(&mut self) {
        self.linger_until = Some(Instant::now() + LINGER);
        self.blueprint.console.close();
    }

    pub(super) fn stop(&mut self) -> Result<VmStatus, ApiError> {
        self.not_moving("stop")?;
        let ending = match self.phase {
            Phase::Moved => Ending::Moved,
            _ => Ending::Stopped("stopped by request"),
        };
        self.end(ending);
        Ok(self.status())
    }

    /// Saves to a file; the guest stays paused, since a copy that runs on beside the file would
    /// share its disks and its identity.
    pub(super) fn save(&mut self, request: &SaveRequest) -> Result<VmStatus, ApiError> {
        self.not_moving("save")?;
        self.all_pages_are_here("save")?;
        moving::check_target(&request.to)?;
        if request.live {
            return self.save_live(request);
        }
        let ran = self.phase == Phase::Running;
        let status = self.pause()?;
        if let Err(error) = moving::save_to_file(&self.machine, &request.to) {
            if ran {
                self.resume()?;
            }
            return Err(error);
        }
        Ok(status)
    }

    pub(super) fn migrate(&mut self, request: MigrateRequest) -> Result<MigrationStatus, ApiError> {
        self.check_movable("move")?;
        let departure = self.departure();
        let way = Way::of(&request);
        self.moving = Some(moving::start(departure, request)?);
        self.last_way = Some(way);
        Ok(self.monitor.status())
    }

    /// Refuses unless the guest runs here undisturbed.
    pub(super) fn check_movable(&self, action: &str) -> Result<(), ApiError> {
        self.not_moving(action)?;
        self.all_pages_are_here(action)?;
        if self.phase == Phase::Running {
            return Ok(());
        }
        let name = &self.machine.config().name;
        Err(ApiError::new(
            ErrorCode::WrongState,
            format!("cannot {action} VM \"{name}\": it does not run"),
        )
        .with_hint(format!("\"dunlin resume {name}\" lets it run")))
    }

    pub(super) fn departure(&mut self) -> moving::Departure {
        self.drop_look();
        moving::Departure {
            memory: self.machine.memory().clone(),
            vm: self.machine.vm().clone(),
            config: self.machine.config().clone(),
            mailbox: self.mailbox.clone(),
            monitor: self.monitor.clone(),
            throttled: moving::Throttled::none(self.machine.memory()),
        }
    }

    pub(super) fn serve_move(&mut self, call: MoveCall) {
        match call {
            MoveCall::Suspend(reply) => answer(reply, self.suspend()),
            MoveCall::Freeze(reply) => answer(reply, self.freeze()),
            MoveCall::Lend(reply) => answer(reply, self.lend()),
            MoveCall::TakeBack(reply) => answer(reply, self.take_back()),
            MoveCall::Save(reply) => {
                let states = self.machine.save();
                answer(reply, states.map_err(|error| host(&error)));
            }
            MoveCall::Throttle(percent, reply) => {
                let throttled = self.machine.throttle(&percent);
                answer(reply, throttled.map_err(|error| host(&error)));
            }
        }
    }

    fn suspend(&mut self) -> Result<(), ApiError> {
        self.freeze()?;
        self.machine.unlock_disks();
        Ok(())
    }

    fn freeze(&mut self) -> Result<(), ApiError> {
        let next = self.phase.after(Transition::Suspend)?;
        let stopped = self.machine.pause(DiskLocks::Keep);
        stopped.map_err(|error| self.run_on(host(&error)))?;
        self.check_not_ending()?;
        self.phase = next;
        Ok(())
    }

    /// A guest that has just asked for its end must not go on elsewhere behind that request,
    /// nor here: the request lies in the mailbox, and ends the machine or builds it anew.
    pub(super) fn check_not_ending(&self) -> Result<(), ApiError> {
        if self.blueprint.events.machine_must_stop() {
            return Err(ApiError::new(
                ErrorCode::WrongState,
                "the guest is switching itself off",
            ));
        }
        Ok(())
    }

    fn take_back(&mut self) -> Result<(), ApiError> {
        let next = self.phase.after(Transition::TakeBack)?;
        self.machine.resume().map_err(|error| host(&error))?;
        self.phase = next;
        self.open_again();
        Ok(())
    }

    pub(super) fn move_ended(&mut self, end: MoveEnd) {
        if let Some(thread) = self.moving.take() {
            // Its last act was to send this message.
            let _panicked = thread.join();
        }
        // However it ended: nobody else would take it off.
        if let Err(error) = self.machine.throttle(&[]) {
            tracing::error!(error = chain(&error), "a processor stays slowed down");
        }
        let transition = match end.outcome {
            MoveOutcome::Moved => Some(Transition::HandOver),
            MoveOutcome::InDoubt => Some(Transition::Doubt),
            MoveOutcome::Lost => Some(Transition::Lose),
            MoveOutcome::PausedHere => Some(Transition::Strand),
            // Taken back already, or never suspended; or it is over.
            MoveOutcome::Here | MoveOutcome::Gone => None,
        };
        if let Some(transition) = transition {
            match self.phase.after(transition) {
                Ok(next) => self.phase = next,
                Err(error) => tracing::error!(%error, "the move's end does not fit"),
            }
        }
        if self.phase == Phase::Moved {
            self.leave();
        }
        self.question.clone_from(&end.question);
        self.monitor.finish(end);
        self.reset_if_pending();
    }

    /// A guest that does not run asks for nothing: its reset waits until it goes on.
    pub(super) fn reset_if_pending(&mut self) {
        if self.reset_pending && self.phase == Phase::Running {
            self.reset();
        }
    }

    /// Builds the machine anew and boots it; a paused guest boots when it is resumed.
    pub(super) fn rebuild(&mut self) -> Result<(), ApiError> {
        self.drop_look();
        self.profiling = None;
        self.machine
            .pause(DiskLocks::Release)
            .map_err(|error| host(&error))?;
        // The guest's memory is given up, and nobody touches it any more.
        self.from_file = None;
        self.blueprint.events = self.blueprint.events.renew();
        let machine = assemble(&self.blueprint).map_err(|error| host(&error))?;
        machine.load_kernel().map_err(|error| host(&error))?;
        if self.phase == Phase::Running {
            machine.resume().map_err(|error| host(&error))?;
        } else {
            // As after a user's pause.
            machine.lock_disks().map_err(|error| host(&error))?;
        }
        self.machine = machine;
        Ok(())
    }

    pub(super) fn drop_look(&mut self) {
        let look = self.look.take().is_some_and(|look| look.dirty);
        let survey = self.survey.take().is_some();
        if (look || survey)
            && let Err(error) = self.machine.vm().stop_dirty_tracking()
        {
            tracing::warn!(error = chain(&error), "dirty tracking stays on");
        }
    }

    /// Refuses while somebody counts.
    pub(super) fn not_looked_at(&self) -> Result<(), ApiError> {
        let counting = |look: &Look| look.since.elapsed() < LOOK_LASTS;
        if self.look.as_ref().is_some_and(counting)
            || self.survey.as_ref().is_some_and(Survey::is_live)
        {
            let name = &self.machine.config().name;
            return Err(ApiError::new(
                ErrorCode::Busy,
                format!("somebody else counts what VM \"{name}\" does"),
            )
            .with_hint("try again in a second"));
        }
        Ok(())
    }

    pub(super) fn begin_look(&mut self) -> Result<(), ApiError> {
        self.not_looked_at()?;
        self.drop_look();
        // A processor that waits for a page of another host answers when that comes, and so does
        // the kernel when it is asked to track writes: nobody may wait for either.
        let arriving = self.following.is_some();
        let dirty = self.phase == Phase::Running && self.moving.is_none() && !arriving;
        if dirty {
            self.machine
                .vm()
                .start_dirty_tracking()
                .map_err(|error| host(&error))?;
            self.harvest()?;
        }
        self.look = Some(Look {
            since: Instant::now(),
            exits: if arriving { Vec::new() } else { self.exits()? },
            dirty,
        });
        Ok(())
    }

    fn exits(&self) -> Result<Vec<ExitCounts>, ApiError> {
        self.machine.exits().map_err(|error| host(&error))
    }

    pub(super) fn end_look(&mut self) -> Result<ExitReport, ApiError> {
        let look = self.look.take().filter(|look| !look.exits.is_empty());
        let arriving = self.following.is_some();
        let cpus = if arriving { Vec::new() } else { self.exits()? };
        let Some(look) = look else {
            return Ok(ExitReport {
                cpus,
                interval_ms: 0,
                instructions_per_second: 0.0,
                exits_per_second: 0.0,
                dirty_pages_per_second: None,
            });
        };
        let interval = look.since.elapsed();
        let seconds = interval.as_secs_f64().max(1e-6);
        let dirty = if look.dirty {
            let pages = self.harvest()?.len();
            self.machine
                .vm()
                .stop_dirty_tracking()
                .map_err(|error| host(&error))?;
            Some(pages as f64 / seconds)
        } else {
            None
        };
        let rate = |pick: fn(&ExitCounts) -> u64| {
            let sum = |counts: &[ExitCounts]| counts.iter().map(pick).sum::<u64>();
            sum(&cpus).saturating_sub(sum(&look.exits)) as f64 / seconds
        };
        Ok(ExitReport {
            interval_ms: u64::try_from(interval.as_millis()).unwrap_or(u64::MAX),
            instructions_per_second: rate(|counts| counts.instructions),
            exits_per_second: rate(|counts| {
                counts.port_reads
                    + counts.port_writes
                    + counts.mmio_reads
                    + counts.mmio_writes
                    + counts.halts
                    + counts.kicks
                    + counts.end_of_interrupts
            }),
            dirty_pages_per_second: dirty,
            cpus,
        })
    }

    /// Empties the dirty log; returns the pages that it held. Never while a move reads it.
    pub(super) fn harvest(&self) -> Result<PageSet, ApiError> {
        let memory = self.machine.memory();
        self.machine
            .vm()
            .collect_dirty()
            .map_err(|error| host(&error))?;
        let mut pages = PageSet::new(memory.size() / PAGE_SIZE);
        memory.dirty_log().harvest(&mut pages);
        Ok(pages)
    }
}
