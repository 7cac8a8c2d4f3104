//! The machine as migration sees it: leaving, arriving, into a file and out of one.

mod arrival;
mod departure;
mod file;
mod handover;
mod monitor;
mod save;
mod security;

pub(crate) use arrival::{ArrivingMachine, Build};
pub(crate) use departure::{Departure, OpenQuestion, Throttled, options, start};
pub use file::describe_snapshot;
pub(crate) use file::{FromFile, Wanted, check_target, restore_from_file, save_to_file};
pub(crate) use handover::{AdoptedMachine, HandOverEnd, HandingOver, start_hand_over};
pub(crate) use monitor::{MoveEnd, MoveMonitor, MoveOutcome};
pub(crate) use save::{SaveEnd, SaveMonitor, Saving, start as start_save};
pub(crate) use security::listener;

use std::sync::Arc;

use dunlin_api::error::chain;
use dunlin_api::{ApiError, ErrorCode, VmConfig};
use dunlin_migration::{MachineError, Userfaultfd};
use tokio::sync::oneshot;

use crate::lifecycle::{Mailbox, Message, MoveCall, Reply};

/// Serves faults of guest memory for this process, or why it cannot. One descriptor for all
/// uses: guest memory is watched over for one purpose at a time.
pub(crate) type Faults = Result<Arc<Userfaultfd>, String>;

/// Opens it. What the host refuses now, it refuses for the process's whole life.
pub(crate) fn open_faults() -> Faults {
    let opened = Userfaultfd::open().map(Arc::new);
    opened.map_err(|error| {
        let reason = chain(&error);
        tracing::debug!(reason, "faults of guest memory cannot be served");
        reason
    })
}

/// What migration is told when the machine refuses.
fn machine_error(
    action: &'static str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> MachineError {
    MachineError {
        action,
        source: source.into(),
    }
}

/// Asks the lifecycle and waits for its answer.
fn call<T>(
    mailbox: &Mailbox,
    action: &'static str,
    call: impl FnOnce(Reply<T>) -> MoveCall,
) -> Result<T, MachineError> {
    let (reply, answer) = oneshot::channel();
    mailbox.send(Message::Move(call(reply)));
    match answer.blocking_recv() {
        Ok(result) => result.map_err(|error| machine_error(action, error)),
        Err(gone) => Err(machine_error(action, gone)),
    }
}

/// A configuration as it travels.
pub(crate) fn encode_config(config: &VmConfig) -> Vec<u8> {
    // Plain data with text keys: writing it to memory cannot fail, and an empty configuration is
    // refused by whoever reads it.
    serde_json::to_vec(config).unwrap_or_default()
}

/// Reads a configuration that a peer or a file says; it is untrusted.
pub(crate) fn decode_config(bytes: &[u8]) -> Result<VmConfig, ApiError> {
    let config: VmConfig = serde_json::from_slice(bytes).map_err(|error| {
        ApiError::new(
            ErrorCode::InvalidRequest,
            format!("the guest's configuration is unreadable: {error}"),
        )
    })?;
    config
        .validate()
        .map_err(|error| ApiError::from_chain(ErrorCode::InvalidRequest, &error))?;
    Ok(config)
}

#[cfg(test)]
mod tests;
