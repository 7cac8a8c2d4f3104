//! The machine's state, component by component.

use std::collections::BTreeMap;

use dunlin_guest::{RestoreError, SavedState};
use dunlin_x86::saved as cpu;

use super::{Machine, VcpuError};

/// Why a state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A component refused.
    #[error(transparent)]
    Component(#[from] RestoreError),
    /// A processor's state is none.
    #[error("saved state \"{name}\" is invalid")]
    Cpu {
        /// The processor.
        name: String,
        /// What is wrong with it.
        #[source]
        source: cpu::SavedCpuError,
    },
    /// A processor refused.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A component of this machine got no state.
    #[error("no saved state arrived for \"{name}\"")]
    Missing {
        /// The component.
        name: String,
    },
    /// Two states for one component.
    #[error("two saved states arrived for \"{name}\"")]
    Twice {
        /// The component.
        name: String,
    },
}

fn cpu_name(index: usize) -> String {
    format!("cpu{index}")
}

impl Machine {
    /// The state of everything but memory, while paused. Processors come last: a message that a
    /// component has sent until it was saved waits at its processor, and is saved there.
    pub(crate) fn save(&self) -> Result<Vec<SavedState>, StateError> {
        let mut states: Vec<_> = (self.components.iter())
            .map(|component| component.save())
            .collect();
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            states.push(SavedState {
                name: cpu_name(index),
                kind: cpu::KIND.to_owned(),
                version: cpu::VERSION,
                body: cpu::encode(&vcpu.save()?),
            });
        }
        Ok(states)
    }

    /// Gives every component its state. Processors come first: an interrupt that a device raises
    /// while it is restored must find the processor's new state, not be replaced with the old.
    pub(crate) fn restore(&self, states: Vec<SavedState>) -> Result<(), StateError> {
        let mut by_name = BTreeMap::new();
        for state in states {
            let name = state.name.clone();
            if by_name.insert(name.clone(), state).is_some() {
                return Err(StateError::Twice { name });
            }
        }
        let mut take = |name: String| match by_name.remove(&name) {
            Some(state) => Ok(state),
            None => Err(StateError::Missing { name }),
        };
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let state = take(cpu_name(index))?;
            vcpu.restore(decode_cpu(&state)?)?;
        }
        for component in &self.components {
            component.restore(&take(component.name())?)?;
        }
        match by_name.into_keys().next() {
            Some(name) => Err(RestoreError::Unmatched { name }.into()),
            None => Ok(()),
        }
    }
}

fn decode_cpu(state: &SavedState) -> Result<dunlin_x86::state::CpuState, StateError> {
    let SavedState {
        name,
        kind,
        version,
        body,
    } = state;
    if kind != cpu::KIND {
        return Err(RestoreError::WrongKind {
            name: name.clone(),
            found: kind.clone(),
            expected: cpu::KIND,
        }
        .into());
    }
    if *version > cpu::VERSION {
        return Err(RestoreError::TooNew {
            name: name.clone(),
            found: *version,
            supported: cpu::VERSION,
        }
        .into());
    }
    cpu::decode(body).map_err(|source| StateError::Cpu {
        name: name.clone(),
        source,
    })
}
