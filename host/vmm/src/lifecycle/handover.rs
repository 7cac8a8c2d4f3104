//! Handing the guest to another process of this host.

use dunlin_api::handover::{HandOverReport, HandOverRequest};
use dunlin_api::{ApiError, ErrorCode};
use dunlin_guest::SavedState;

use super::requests::host;
use super::{Ending, Lifecycle, Phase, Reply, Transition, answer};
use crate::moving::{self, HandOverEnd, HandingOver, MoveOutcome};

impl Lifecycle {
    /// Begins; the answer follows at the end.
    pub(super) fn hand_over(&mut self, request: HandOverRequest, reply: Reply<HandOverReport>) {
        match self.begin_hand_over(request) {
            Ok(()) => self.hand_over_asked = Some(reply),
            Err(error) => answer(reply, Err(error)),
        }
    }

    fn begin_hand_over(&mut self, request: HandOverRequest) -> Result<(), ApiError> {
        self.check_movable("hand over")?;
        let mut descriptors = self.machine.descriptors().map_err(|error| host(&error))?;
        let copied = self.files.copy_to(&mut descriptors);
        copied.map_err(|error| host(&error))?;
        let leaving = HandingOver {
            departure: self.departure(),
            descriptors,
            console: self.blueprint.console.clone(),
            states: Vec::new(),
        };
        self.moving = Some(moving::start_hand_over(leaving, request)?);
        Ok(())
    }

    /// Stops the guest for another process of this host: who connects or types waits from now on,
    /// for this process or for that one.
    pub(super) fn lend(&mut self) -> Result<Vec<SavedState>, ApiError> {
        let next = self.phase.after(Transition::Suspend)?;
        self.doors.hold();
        self.blueprint.console.hold();
        let states = self.stop_and_save();
        if states.is_err() {
            self.open_again();
        } else {
            self.phase = next;
        }
        states
    }

    /// Leaves a guest that cannot be saved running.
    fn stop_and_save(&self) -> Result<Vec<SavedState>, ApiError> {
        let stopped = self.machine.pause_for_hand_over();
        stopped.map_err(|error| self.run_on(host(&error)))?;
        self.check_not_ending()?;
        let states = self.machine.save();
        states.map_err(|error| self.run_on(host(&error)))
    }

    /// The guest stays here: whoever waits is served.
    pub(super) fn open_again(&self) {
        self.doors.open();
        self.blueprint.console.release();
    }

    /// What the machine and this process have in the file system belongs to another process.
    pub(super) fn give_away(&self) {
        self.machine.give_away();
        self.files.give_away();
    }

    /// Another process of this host has the guest: this one ends.
    pub(super) fn passes_to(&mut self, pid: u32) {
        self.give_away();
        self.ending.get_or_insert(Ending::HandedOver(pid));
    }

    pub(super) fn hand_over_ended(&mut self, ended: HandOverEnd) {
        let HandOverEnd { end, report, pid } = ended;
        let error = end.error.clone();
        let gone = end.outcome == MoveOutcome::Gone;
        self.move_ended(end);
        let moved = self.phase == Phase::Moved;
        if moved {
            self.passes_to(pid);
        } else {
            self.open_again();
        }
        if gone {
            self.end(Ending::DiedIn(pid));
        }
        let Some(reply) = self.hand_over_asked.take() else {
            return;
        };
        let result = match error {
            _ if moved => Ok(report),
            Some(error) => Err(error),
            None => Err(ApiError::new(
                ErrorCode::Unknown,
                "the hand-over failed without a reason",
            )),
        };
        answer(reply, result);
    }
}
