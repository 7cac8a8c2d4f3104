//! The virtual switch: ports, forwarding, uplinks, gateway.
//!
//! A VM's network device holds a [`Port`] and exchanges batches of frames with it; the switch
//! process owns the other ends. Must not depend on devices, engines or the machine's assembly.

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
pub use unix_port::{UnixPort, UnixPortCounters};
