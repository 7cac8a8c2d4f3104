//! The side that has the guest.

use crate::error::{MigrationError, MigrationFailure, Whereabouts};
use crate::machine::SourceMachine;
use crate::options::{CancelToken, MigrationOptions, Progress};
use crate::report::MigrationReport;
use crate::transport::Connector;

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
        let _ = (machine, connector, self.progress, self.options);
        Err(Box::new(MigrationFailure {
            error: MigrationError::Cancelled,
            guest: Whereabouts::RunsHere,
            report: MigrationReport::default(),
        }))
    }
}
