//! The side that has the guest.

pub(crate) mod attempt;
mod copying;
mod hand_over;
mod inquiry;
mod lanes;
pub(crate) mod opening;
mod packing;
mod policy;
mod post_copy;
pub mod predict;
mod sent;
mod squeeze;
mod throttle;
mod tuning;

use std::time::Instant;

use attempt::{Attempt, Start, ms};
pub(crate) use inquiry::{Closing, ask};
pub use inquiry::{Verdict, resolve};
pub(crate) use throttle::Throttle;

use crate::error::{MigrationError, MigrationFailure, Whereabouts};
use crate::machine::SourceMachine;
use crate::options::{CancelToken, MigrationOptions, Progress};
use crate::ownership::Doubt;
use crate::pages;
use crate::report::{MigrationReport, Outcome};
use crate::transport::{Connector, TransportError};

/// What the source is doing.
///
/// ```text
///                      ┌──────── limit missed ─────────┐
///              Ready   ▼      what remains fits        │  Prepared in time      Running
///  Connecting ──────▶ Copying ─────────────────▶ Switching ─────────▶ Committed ───────▶ (moved)
///      │               │  ▲ │                          │                │    │
///      │               │  └─┘ a round                  │     no Running │    │ nobody knows
///      ▼               ▼                               ▼                ▼    ▼
///   (the guest runs here: an error, a cancel, no convergence)      WhoOwns  (in doubt)
///                                                             ├─ runs there ──▶ (moved)
///                                                             └─ never there ─▶ (runs here)
/// ```
///
/// In a post-copy `Committed` lasts until the destination has all of the guest's memory: see
/// [`crate::postcopy`].
///
/// The guest is paused in `Switching` and `Committed`. Until `Committed` the source owns it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Reaching the destination, which builds the machine.
    Connecting,
    /// The guest runs, its memory is copied.
    Copying,
    /// The guest is paused, the rest follows.
    Switching,
    /// `Commit` is being written, or was.
    Committed,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Copying => "copying",
            Self::Switching => "switching over",
            Self::Committed => "handing over",
        }
    }
}

/// How an attempt ended, unless by an error.
enum End {
    Moved,
    InDoubt(Doubt),
    Lost(String),
}

/// Moves a guest away.
pub struct Source<'a> {
    options: MigrationOptions,
    cancel: CancelToken,
    progress: Option<Box<dyn FnMut(Progress) + 'a>>,
}

impl<'a> Source<'a> {
    /// A source with these options.
    pub fn new(options: MigrationOptions) -> Self {
        Self {
            options,
            cancel: CancelToken::new(),
            progress: None,
        }
    }

    /// Stops when this token is cancelled, as long as the guest was not given away.
    #[must_use]
    pub fn cancel(mut self, token: CancelToken) -> Self {
        self.cancel = token;
        self
    }

    /// Calls `callback` a few times a second at most, and at each step.
    #[must_use]
    pub fn progress(mut self, callback: impl FnMut(Progress) + 'a) -> Self {
        self.progress = Some(Box::new(callback));
        self
    }

    /// Moves the guest of `machine` to the destination that `connector` reaches.
    ///
    /// On success the guest runs there, and `machine` is paused and must be dropped.
    ///
    /// # Errors
    /// [`MigrationFailure`], which says where the guest is.
    pub fn run(
        self,
        machine: &mut dyn SourceMachine,
        connector: &mut dyn Connector,
    ) -> Result<MigrationReport, Box<MigrationFailure>> {
        let started = Instant::now();
        let cpu_at_start = pages::thread_cpu_seconds();
        let start = Start {
            options: &self.options,
            cancel: self.cancel,
            progress: self.progress,
            started,
            report: MigrationReport {
                transport: connector.transport().to_owned(),
                ram_bytes: machine.memory().size(),
                downtime_limit_ms: ms(self.options.downtime_limit),
                ..MigrationReport::default()
            },
        };
        let finish = |report: &mut MigrationReport| {
            report.total_ms = ms(started.elapsed());
            report.cpu_seconds = pages::thread_cpu_seconds() - cpu_at_start;
        };
        let mut attempt = match Attempt::connect(start, machine, connector) {
            Ok(attempt) => attempt,
            Err((error, mut report)) => {
                finish(&mut report);
                return Err(failure(
                    stopped_is_cancelled(error),
                    Whereabouts::RunsHere,
                    *report,
                ));
            }
        };
        let result = attempt.run(machine, connector);
        let result = result.map_err(|error| {
            let error = stopped_is_cancelled(error);
            let guest = stay(&mut attempt, machine, &error);
            (error, guest)
        });
        let bytes_sent = attempt.bytes_sent();
        let lanes_cpu = attempt.lanes.cpu_seconds();
        let mut report = attempt.report;
        report.bytes_sent = bytes_sent;
        finish(&mut report);
        report.cpu_seconds += lanes_cpu;
        match result {
            Ok(End::Moved) => {
                report.outcome = Outcome::Moved;
                Ok(report)
            }
            Ok(End::InDoubt(doubt)) => {
                let guest = Whereabouts::InDoubt(doubt);
                Err(failure(MigrationError::InDoubt, guest, report))
            }
            Ok(End::Lost(cause)) => {
                let error = MigrationError::Lost { cause };
                Err(failure(error, Whereabouts::Lost, report))
            }
            Err((error, guest)) => Err(failure(error, guest, report)),
        }
    }
}

/// The guest stays here: it runs on, and nothing that it wrote is forgotten.
fn stay(
    attempt: &mut Attempt<'_, '_>,
    machine: &mut dyn SourceMachine,
    error: &MigrationError,
) -> Whereabouts {
    // First the guest, then the rest: it is waiting.
    let mut guest = Whereabouts::RunsHere;
    if attempt.paused
        && let Err(error) = machine.resume()
    {
        let error = MigrationError::from(error);
        tracing::error!(error = %error.chain(), "the guest did not resume");
        guest = Whereabouts::PausedHere;
    }
    attempt.unthrottle(machine);
    attempt.put_back();
    if let Err(error) = machine.stop_dirty_tracking() {
        let error = MigrationError::from(error);
        tracing::warn!(error = %error.chain(), "dirty tracking did not stop");
    }
    let flushed = !matches!(
        error,
        MigrationError::Transport(TransportError::TimedOut { .. })
    );
    if flushed {
        attempt.wire.abort(error.chain());
    } else {
        attempt.wire.shutdown();
    }
    guest
}

fn failure(
    error: MigrationError,
    guest: Whereabouts,
    mut report: MigrationReport,
) -> Box<MigrationFailure> {
    report.outcome = match (&error, &guest) {
        (_, Whereabouts::InDoubt(_)) => Outcome::InDoubt,
        (_, Whereabouts::Lost) => Outcome::Lost,
        (MigrationError::Cancelled, _) => Outcome::Cancelled,
        (MigrationError::DidNotConverge { .. }, _) => Outcome::DidNotConverge,
        _ => Outcome::Failed,
    };
    Box::new(MigrationFailure {
        error,
        guest,
        report,
    })
}

/// The only token that stops the source's waits is the cancel token.
fn stopped_is_cancelled(error: MigrationError) -> MigrationError {
    match error {
        MigrationError::Transport(TransportError::Stopped { .. }) => MigrationError::Cancelled,
        error => error,
    }
}
