//! What a parent tells a new VM process, and the lines that it answers.
//!
//! The parent starts `dunlin vm-process SPEC` with [`LaunchSpec`] as JSON in `SPEC`. The process
//! answers lines of JSON, a [`LaunchReply`] each, on its standard output: one when it is ready, one
//! when the VM has ended, and before both one when it waits for a peer.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{DebugConsoleConfig, EngineChoice, NetConfig, VmConfig};
use crate::error::ApiError;
use crate::migration::Endpoint;
use crate::name::VmName;
use crate::security::Security;
use crate::snapshot::Reading;
use crate::status::VmStatus;

/// What a VM process is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchSpec {
    /// Version of this type, [`crate::VERSION`].
    pub version: u32,
    /// The runtime directory.
    pub runtime: PathBuf,
    /// Where the guest comes from.
    pub guest: GuestOrigin,
    /// What standard input is.
    pub standard_input: StandardInput,
    /// When the guest starts.
    #[serde(default)]
    pub start: Start,
}

/// When the guest starts, after the process has said that it is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// At once.
    #[default]
    AtOnce,
    /// When somebody reads the console, so that not even a short life goes unseen.
    WhenWatched,
}

/// Where the guest comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestOrigin {
    /// It boots.
    Boot(Box<VmConfig>),
    /// It was saved to a file.
    File {
        /// The file.
        path: PathBuf,
        /// What differs from the saved configuration.
        overrides: Overrides,
        /// When the guest's pages are read.
        #[serde(default)]
        reading: Reading,
    },
    /// It arrives from a peer, for which the process waits.
    Peer {
        /// Where it waits.
        listen: Endpoint,
        /// What differs from the source's configuration.
        overrides: Overrides,
        /// Silence after which the source counts as lost, in milliseconds.
        #[serde(default)]
        peer_timeout_ms: Option<u64>,
        /// Time for a new connection after that of a guest whose memory follows it broke, in
        /// milliseconds.
        #[serde(default)]
        reconnect_window_ms: Option<u64>,
        /// What protects the connections.
        #[serde(default)]
        security: Security,
    },
    /// Another process of this host has it, and hands it over.
    HandOver {
        /// The VM's name.
        name: VmName,
    },
}

/// What a destination decides for itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Overrides {
    /// Another name.
    #[serde(default)]
    pub name: Option<VmName>,
    /// Another engine.
    #[serde(default)]
    pub engine: Option<EngineChoice>,
    /// Switch ports of this host, in the order of the guest's devices; the addresses stay.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Another place for the bytes of the guest's debug console, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debug_console: Option<DebugConsoleConfig>,
}

impl Overrides {
    /// Applies them to what came from the other side.
    pub fn apply(&self, config: &mut VmConfig) {
        // The addresses are part of the guest: fix them before the name they derive from changes.
        let macs = config.macs();
        for (net, mac) in config.nets.iter_mut().zip(macs) {
            net.mac = Some(mac);
        }
        for (net, here) in config.nets.iter_mut().zip(&self.nets) {
            net.switch.clone_from(&here.switch);
        }
        if let Some(name) = &self.name {
            config.name = name.clone();
        }
        if let Some(engine) = self.engine {
            config.engine = engine;
        }
        if let (Some(place), Some(here)) = (&mut config.debug_console, &self.debug_console) {
            place.clone_from(here);
        }
    }
}

/// What a VM process finds on standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StandardInput {
    /// Nothing: the process lives by itself.
    Nothing,
    /// A pipe that its parent holds open: at its end the VM stops, unless [`DETACH`] came first.
    Lifeline,
}

/// The byte that lets the VM process outlive its parent.
pub const DETACH: u8 = b'd';

/// The answer of a VM process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LaunchReply {
    /// It waits for a peer at this address.
    Listening(Endpoint),
    /// It runs, or is ready to.
    Ready(VmStatus),
    /// It could not start and has ended.
    Failed(ApiError),
    /// It ran and has ended.
    Ended(VmStatus),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::OnReboot;

    #[test]
    fn a_renamed_guest_keeps_its_addresses() {
        let mut config = VmConfig {
            version: crate::VERSION,
            name: "a".parse().unwrap(),
            kernel: "/k".into(),
            initrd: None,
            modules: Vec::new(),
            command_line: String::new(),
            memory_bytes: 1 << 28,
            cpus: 1,
            disks: Vec::new(),
            nets: vec![NetConfig {
                switch: "/old".into(),
                mac: None,
            }],
            engine: EngineChoice::Auto,
            baseline: None,
            on_reboot: OnReboot::Restart,
            debug_console: None,
            debug_exit: None,
            legacy: false,
            verify: false,
        };
        let before = config.macs();
        Overrides {
            name: Some("b".parse().unwrap()),
            engine: None,
            nets: vec![NetConfig {
                switch: "/new".into(),
                mac: None,
            }],
            debug_console: Some(DebugConsoleConfig::Unix("/new".into())),
        }
        .apply(&mut config);
        // A guest without the port does not get one by moving.
        assert_eq!(config.debug_console, None);
        assert_eq!(config.macs(), before);
        assert_eq!(config.nets[0].switch, PathBuf::from("/new"));
        assert_eq!(config.name.as_str(), "b");
    }
}
