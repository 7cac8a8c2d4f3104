//! A guest that arrives: a machine under construction that migration fills.

use dunlin_api::launch::Overrides;
use dunlin_api::place::RuntimeDirectory;
use dunlin_api::{ApiError, ErrorCode};
use dunlin_guest::{Memory, SavedState};
use dunlin_hypervisor::EngineError;
use dunlin_migration::{DestinationMachine, MachineError};
use std::sync::Arc;

use super::{Faults, decode_config, machine_error};
use crate::console::ConsoleHub;
use crate::machine::events::MachineEvents;
use crate::machine::{AssemblyError, Blueprint, Machine, assemble};
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
        let machine = assemble(&blueprint).map_err(|error| refusal(&error))?;
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

pub(super) fn refusal(error: &AssemblyError) -> ApiError {
    let refused = ApiError::from_chain(ErrorCode::Host, error);
    match error {
        AssemblyError::Baseline { .. } | AssemblyError::Engine(EngineError::Baseline { .. }) => {
            refused.with_hint("\"dunlin probe\" lists the baselines that each engine gives here")
        }
        _ => refused,
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

#[cfg(test)]
mod tests {
    use super::*;
    use dunlin_api::VmConfig;

    fn build(folder: &std::path::Path) -> Build {
        Build {
            runtime: RuntimeDirectory::at(folder),
            overrides: Overrides::default(),
            faults: crate::moving::open_faults(),
            console: ConsoleHub::new(),
            events: MachineEvents::new(|_| {}),
        }
    }

    fn configuration(baseline: Option<&str>) -> Vec<u8> {
        let baseline = baseline.map_or("null".to_owned(), |name| format!("\"{name}\""));
        let text = format!(
            r#"{{"version":1,"name":"a","kernel":"/k","command_line":"","memory_bytes":8388608,
                "cpus":1,"engine":"soft","baseline":{baseline}}}"#
        );
        text.into_bytes()
    }

    #[test]
    fn a_guest_of_a_newer_build_is_refused_with_what_is_known_here() {
        let folder = tempfile::tempdir().unwrap();
        let build = build(folder.path());
        let error = build.build_for_peer(&configuration(Some("x86-64-v9")));
        let text = dunlin_api::error::chain(&error.err().unwrap());
        assert!(
            text.contains("baseline \"x86-64-v9\" is not known here"),
            "{text}"
        );
        assert!(text.contains("x86-64-v1, x86-64-v2"), "{text}");
        // Its name is free again.
        build.build(&configuration(Some("x86-64-v1"))).unwrap();
    }

    #[test]
    fn a_guest_without_a_baseline_has_the_name_of_one_from_its_arrival_on() {
        let folder = tempfile::tempdir().unwrap();
        let arrived = build(folder.path()).build(&configuration(None)).unwrap();
        let config: &VmConfig = arrived.machine.config();
        assert_eq!(config.baseline.as_deref(), Some("x86-64-v2"));
    }
}
