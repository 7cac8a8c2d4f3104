//! The virtual switch: ports, forwarding, uplinks, gateway.
//!
//! - A VM's network device holds a [`Port`], in a process [`UnixPort`], and exchanges batches of
//!   frames with it.
//! - [`SwitchProcess`] owns the other ends: `unix` sockets (Dunlin's VMs and QEMU guests), a
//!   VXLAN tunnel to other switches, tap interfaces, the built-in gateway. It runs in one thread
//!   and is told what to do by [`SwitchConfig`] and, while it runs, by [`ControlRequest`]s.
//! - [`Switch`] decides where a frame goes. It does no I/O.
//!
//! A frame: device, [`UnixPort`], `unix` port, [`Switch`], queue of the egress port, its batch
//! out. Must not depend on devices, engines or the machine's assembly.

mod announce;
mod config;
mod datagram;
mod error;
mod forward;
mod gateway;
mod poll;
mod port;
mod process;
mod queue;
mod socket_option;
mod unix_port;
mod vxlan;

pub use announce::announcement;
pub use config::{
    DhcpConfig, ForwardConfig, GatewayConfig, LearningLimits, PortConfig, PortKind, SwitchConfig,
    TapConfig, TunnelConfig, TunnelEndpoint, TunnelEndpointError, UnixConfig, VXLAN_PORT, VlanId,
    VlanIdError, VlanMode,
};
pub use error::SwitchError;
pub use forward::{
    DropCounters, DropReason, Move, PortCounters, PortId, PortRole, PortRules, StationEntry, Switch,
};
pub use port::{Frame, MAX_FRAME, MacAddress, MacAddressError, Port, PortError};
pub use process::{ControlClient, ControlError, ControlRequest, SwitchProcess};
pub use unix_port::{PortSocket, UnixPort, UnixPortCounters};
