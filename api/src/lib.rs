//! What programs say to a VM's process, and where they find it.
//!
//! - [`name`], [`size`], [`config`]: a VM as the user asked for it, and what is valid;
//! - [`status`]: what a VM's process tells about itself;
//! - [`migration`], [`plan`], [`security`]: asking for a move, what is expected of it, what protects
//!   it, and following it;
//! - [`error`]: how a request is refused;
//! - [`place`]: the runtime directory with one folder and one API socket per VM;
//! - [`launch`]: what a parent tells a new VM process, and what it answers;
//! - [`probe`], [`snapshot`]: what a host offers, what a saved file holds;
//! - [`profile`]: where the time of a VM's processors goes;
//! - [`route`]: the paths of the HTTP interface.
//!
//! Plain data, serialised as JSON, with validation; no I/O beyond path names. Everything that is
//! sent carries [`VERSION`] where a stranger may read it. Must not depend on any crate of ours.

pub mod config;
pub mod error;
pub mod handover;
pub mod launch;
pub mod migration;
pub mod name;
pub mod place;
pub mod plan;
pub mod probe;
pub mod profile;
pub mod route;
pub mod security;
pub mod size;
pub mod snapshot;
pub mod status;

pub use config::{
    ConfigError, DebugConsoleConfig, DebugExitConfig, DiskConfig, EngineChoice, MacText,
    ModuleConfig, NetConfig, OnReboot, VmConfig,
};
pub use error::{ApiError, ErrorCode};
pub use name::{NameError, VmName};

/// Version of these types. A reader refuses a greater one.
pub const VERSION: u32 = 1;
