//! The host bridge 00:00.0: an identity without registers, which guests look for on bus 0.

use std::sync::Mutex;

use dunlin_guest::{RestoreError, SavedState};

use super::{BarDoorbell, ConfigSpace, ConfigState, Function, Identity};
use crate::component::{Component, Reach};
use crate::lock;

const KIND: &str = "pci-host-bridge";
const VERSION: u32 = 1;

/// The generic PCI Express host bridge.
#[derive(Debug)]
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self {
            config: Mutex::new(ConfigSpace::new(Identity {
                vendor: 0x1b36,
                device: 0x0008,
                class: 0x06_00_00,
                ..Identity::default()
            })),
        }
    }
}

impl Component for HostBridge {
    fn name(&self) -> String {
        "pci/00:00.0".into()
    }

    fn pause(&self, _reach: Reach) {}

    fn resume(&self) {}

    fn save(&self) -> SavedState {
        let Self { config } = self;
        SavedState::encode(&self.name(), KIND, VERSION, &lock(config).save())
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        let config: ConfigState = state.decode(KIND, VERSION)?;
        lock(&self.config).restore(&config, state)
    }
}

impl Function for HostBridge {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn doorbells(&self) -> Vec<BarDoorbell> {
        Vec::new()
    }
}
