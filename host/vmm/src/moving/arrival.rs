//! A guest that arrives: a machine under construction that migration fills.

use dunlin_api::launch::Overrides;
use dunlin_api::place::RuntimeDirectory;
use dunlin_api::{ApiError, ErrorCode};
use dunlin_guest::{Memory, SavedState};
use dunlin_migration::{DestinationMachine, MachineError};
use std::sync::Arc;

use super::{Faults, decode_config, machine_error};
use crate::console::ConsoleHub;
use crate::machine::events::MachineEvents;
use crate::machine::{Blueprint, Machine, assemble};
use crate::place::ClaimedPlace;

/// Builds machines for guests that arrive.
pub(crate) struct Build {
    pub(crate) runtime: RuntimeDirectory,
    pub(crate) overrides: Overrides,
    /// Serves faults of the guest's memory while its pages arrive behind it.
    pub(crate) faults: Faults,
    pub(crate) console: Arc<ConsoleHub>,
    pub(crate) events: MachineEvents,
}

/// A machine that waits for its guest. Dropping it gives its name back.
#[derive(Debug)]
pub(crate) struct ArrivingMachine {
    // The machine's ports lie in the place.
    pub(crate) machine: Machine,
    pub(crate) blueprint: Blueprint,
    pub(crate) place: ClaimedPlace,
}

impl Build {
    /// An empty machine for the configuration that the other side says.
    pub(crate) fn build(&self, configuration: &[u8]) -> Result<ArrivingMachine, ApiError> {
        let mut config = decode_config(configuration)?;
        self.overrides.apply(&mut config);
        let place = ClaimedPlace::claim(&self.runtime, &config.name)
            .map_err(|error| ApiError::from_chain(ErrorCode::Host, &error))?;
        let blueprint = Blueprint {
            config,
            directory: place.place().directory().to_owned(),
            console: Arc::clone(&self.console),
            events: self.events.renew(),
        };
        let machine =
            assemble(&blueprint).map_err(|error| ApiError::from_chain(ErrorCode::Host, &error))?;
        Ok(ArrivingMachine {
            machine,
            blueprint,
            place,
        })
    }

    /// As [`Build::build`], for migration.
    pub(crate) fn build_for_peer(
        &self,
        configuration: &[u8],
    ) -> Result<ArrivingMachine, MachineError> {
        let built = self.build(configuration);
        built.map_err(|error| machine_error("be built", error))
    }
}

impl DestinationMachine for ArrivingMachine {
    fn memory(&self) -> &Memory {
        self.machine.memory()
    }

    fn restore(&mut self, states: Vec<SavedState>) -> Result<(), MachineError> {
        // Without the locks of disks: the source may take the switch-over back at any moment and
        // run on, before this side has heard so.
        let restored = self.machine.restore(states);
        restored.map_err(|error| machine_error("restore the guest's state", error))
    }

    fn start(&mut self) -> Result<(), MachineError> {
        // Takes the locks of disks. On a refusal no processor has run, and the guest goes back.
        let resumed = self.machine.resume();
        resumed.map_err(|error| machine_error("start the guest", error))
    }
}
