//! Why a command failed, and what to do next.

use std::io;
use std::path::PathBuf;

use dunlin_api::error::chain;
use dunlin_api::{ApiError, ConfigError, ErrorCode, VmName};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A VM's process, or the host's side, refused.
    #[error(transparent)]
    Refused(#[from] ApiError),
    /// The configuration cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No VM of that name runs.
    #[error("no VM named \"{name}\" runs here")]
    NoSuchVm {
        /// The name.
        name: VmName,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// The VM's process does not answer.
    #[error("VM \"{name}\" does not answer")]
    NoAnswer {
        /// The VM.
        name: VmName,
        /// What failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A VM process ended before it said anything.
    #[error("the VM's process ended before it was ready ({status})")]
    ProcessEnded {
        /// How.
        status: String,
    },
    /// The host refused.
    #[error("failed to {action}")]
    Host {
        /// What was tried.
        action: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// An argument cannot be.
    #[error("{0}")]
    Argument(String),
    /// The user interrupted.
    #[error("interrupted")]
    Interrupted,
}

impl CliError {
    /// The error and its causes in one line.
    pub fn message(&self) -> String {
        chain(self)
    }

    /// What to do next, when we know.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Refused(error) => error.hint.clone(),
            Self::NoSuchVm { directory, .. } => Some(format!(
                "\"dunlin ps\" lists the VMs in {}; set DUNLIN_RUNTIME_DIR to look elsewhere",
                directory.display()
            )),
            Self::NoAnswer { name, .. } => {
                Some(format!("\"dunlin stop {name} --kill\" ends it by force"))
            }
            _ => None,
        }
    }

    /// The error as it is printed for programs.
    pub fn to_api(&self) -> ApiError {
        let code = match self {
            Self::Refused(error) => error.code,
            Self::NoSuchVm { .. } => ErrorCode::NotFound,
            Self::Config(_) | Self::Argument(_) => ErrorCode::InvalidRequest,
            Self::Interrupted => ErrorCode::Cancelled,
            _ => ErrorCode::Host,
        };
        let mut error = ApiError::new(code, self.message());
        error.hint = self.hint();
        error
    }

    /// The host refused `action`.
    pub fn host(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Host { action, source }
    }
}
