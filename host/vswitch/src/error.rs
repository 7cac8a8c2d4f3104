//! Why a switch process cannot start or do what it is asked.

use std::io;

/// Failures of a switch process and of its control.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// The host refused something.
    #[error("failed to {action} \"{object}\"")]
    Io {
        /// What was tried.
        action: &'static str,
        /// A port, path, address or interface.
        object: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A configuration that cannot work.
    #[error("failed to use port \"{port}\": {reason}")]
    Invalid {
        /// The port.
        port: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The name is taken.
    #[error("failed to add port \"{0}\": there is one of this name")]
    DuplicatePort(String),
    /// No port of this name, or not of the kind that is needed.
    #[error("failed to find {what} \"{name}\"")]
    Unknown {
        /// A port, a gateway or a forward.
        what: &'static str,
        /// Its name as it was given.
        name: String,
    },
}

impl SwitchError {
    /// For `map_err`.
    pub(crate) fn io(
        action: &'static str,
        object: impl ToString,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| SwitchError::Io {
            action,
            object: object.to_string(),
            source,
        }
    }
}
