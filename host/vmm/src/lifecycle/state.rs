//! Which request is allowed when.

use dunlin_api::status::VmState;
use dunlin_api::{ApiError, ErrorCode};

/// Where the machine is in its life.
///
/// ```text
///              start                  pause
///   Created ───────────► Running ◄──────────────► Paused ──── save ────► Paused
///                        │  ▲  ▲      resume        ▲ │
///   Incoming ────────────┘  │  └────────────────────┼─┘ (claim)
///              arrived      │ switch-over taken back, or the move failed
///                           │                       │
///                 suspend   ▼                       │
///   Running ────────────► Suspended ─── in doubt ─► InDoubt
///                           │                       │ the destination answered after all
///                           │ handed over           ▼
///                           ├────────────────────► Moved
///                           │ handed over, and lost there
///                           └────────────────────► Lost ─── claim ──► Running
///
///   every state ── power-off, stop, failure ──► Stopped
/// ```
///
/// `Suspended` is a pause that belongs to a move: only the move ends it. When the guest does not
/// go on after a failed move, the pause becomes the user's: `Paused`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Built, not started.
    Created,
    /// The guest runs.
    Running,
    /// A user stopped it; it can go on.
    Paused,
    /// A move stopped it for the hand-over.
    Suspended,
    /// The guest runs elsewhere.
    Moved,
    /// It may run elsewhere; it stays stopped until somebody decides.
    InDoubt,
    /// It went elsewhere before all of its memory, which did not get there; what is here is the
    /// guest as it was at the hand-over. It stays stopped until somebody decides.
    Lost,
    /// It has ended.
    Stopped,
}

/// What changes the phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transition {
    /// Runs for the first time here.
    Start,
    /// A user's pause.
    Pause,
    /// A user's resume; of a guest in doubt or lost elsewhere it claims it for this side.
    Resume,
    /// A move's pause.
    Suspend,
    /// A move took its pause back.
    TakeBack,
    /// A move could not take its pause back: a user may.
    Strand,
    /// A move has given the guest away.
    HandOver,
    /// A move broke at the hand-over.
    Doubt,
    /// A move broke after the hand-over, with memory still here.
    Lose,
}

impl Phase {
    /// The phase after `transition`, or why it cannot be.
    pub(crate) fn after(self, transition: Transition) -> Result<Self, ApiError> {
        use Transition as T;
        Ok(match (self, transition) {
            (Self::Created, T::Start) => Self::Running,
            (Self::Running | Self::Paused, T::Pause) => Self::Paused,
            (Self::Paused | Self::Running | Self::InDoubt | Self::Lost, T::Resume) => Self::Running,
            (Self::Running, T::Suspend) => Self::Suspended,
            (Self::Suspended, T::TakeBack) => Self::Running,
            (Self::Suspended, T::Strand) => Self::Paused,
            (Self::Suspended, T::HandOver) => Self::Moved,
            (Self::InDoubt, T::HandOver) => Self::Moved,
            (Self::Suspended, T::Doubt) => Self::InDoubt,
            (Self::Suspended, T::Lose) => Self::Lost,
            (from, refused) => return Err(refusal(from, refused)),
        })
    }

    /// The phase as it is told to others.
    pub(crate) fn to_api(self) -> VmState {
        match self {
            Self::Created => VmState::Created,
            Self::Running => VmState::Running,
            // A switch-over lasts milliseconds, and to the user the guest is being moved.
            Self::Suspended => VmState::Paused,
            Self::Paused => VmState::Paused,
            Self::Moved => VmState::Moved,
            Self::InDoubt => VmState::InDoubt,
            Self::Lost => VmState::Lost,
            Self::Stopped => VmState::Stopped,
        }
    }
}

fn refusal(from: Phase, transition: Transition) -> ApiError {
    let action = match transition {
        Transition::Start => "start",
        Transition::Pause => "pause",
        Transition::Resume => "resume",
        Transition::Suspend | Transition::TakeBack | Transition::Strand => "move",
        Transition::HandOver | Transition::Doubt | Transition::Lose => "hand over",
    };
    let state = match from {
        Phase::Created => "has not started",
        Phase::Running => "runs",
        Phase::Paused => "is paused",
        Phase::Suspended => "is being handed over",
        Phase::Moved => "has moved to another host",
        Phase::InDoubt => "may run on another host",
        Phase::Lost => "was lost on another host",
        Phase::Stopped => "has ended",
    };
    ApiError::new(
        ErrorCode::WrongState,
        format!("cannot {action} the VM: it {state}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_was_given_away_never_runs_here_again() {
        for transition in [
            Transition::Start,
            Transition::Resume,
            Transition::TakeBack,
            Transition::Pause,
            Transition::Suspend,
        ] {
            assert!(Phase::Moved.after(transition).is_err(), "{transition:?}");
            assert!(Phase::Stopped.after(transition).is_err(), "{transition:?}");
        }
    }

    #[test]
    fn only_the_move_ends_its_pause() {
        assert!(Phase::Suspended.after(Transition::Resume).is_err());
        assert!(Phase::Suspended.after(Transition::Pause).is_err());
        assert_eq!(
            Phase::Suspended.after(Transition::TakeBack),
            Ok(Phase::Running)
        );
    }

    #[test]
    fn a_guest_that_did_not_go_on_after_a_move_can_be_resumed() {
        let stranded = Phase::Suspended.after(Transition::Strand);
        assert_eq!(stranded, Ok(Phase::Paused));
        assert_eq!(Phase::Paused.after(Transition::Resume), Ok(Phase::Running));
    }

    #[test]
    fn a_doubtful_guest_runs_only_when_claimed() {
        assert_eq!(Phase::InDoubt.after(Transition::Resume), Ok(Phase::Running));
        assert!(Phase::InDoubt.after(Transition::TakeBack).is_err());
        assert!(Phase::Running.after(Transition::Doubt).is_err());
    }

    #[test]
    fn a_guest_that_was_lost_elsewhere_runs_only_when_claimed() {
        let lost = Phase::Suspended.after(Transition::Lose);
        assert_eq!(lost, Ok(Phase::Lost));
        assert!(Phase::Lost.after(Transition::TakeBack).is_err());
        assert!(Phase::Lost.after(Transition::Suspend).is_err());
        assert_eq!(Phase::Lost.after(Transition::Resume), Ok(Phase::Running));
    }
}
