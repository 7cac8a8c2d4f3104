//! How the connections between two hosts are protected.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What protects the connections of a move.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Security {
    /// Nothing, within one host; between hosts it has to be said what.
    #[default]
    Automatic,
    /// Nothing: whoever sees the network sees the guest's memory, and can change it.
    Off,
    /// TLS 1.3 with certificates on both sides.
    Tls {
        /// A folder with `ca.pem`, `cert.pem` and `key.pem`, on the host of the VM's process.
        folder: PathBuf,
        /// What the destination's certificate has to be valid for; its address when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        host: Option<String>,
    },
}

impl Security {
    /// Has nobody said anything?
    pub fn is_automatic(&self) -> bool {
        *self == Self::Automatic
    }
}
