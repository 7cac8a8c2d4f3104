//! The virtual switch: ports, forwarding, uplinks, gateway.
//!
//! A VM's network device holds a [`Port`] and exchanges batches of frames with it; the switch
//! process owns the other ends. Must not depend on devices, engines or the machine's assembly.

mod port;

pub use port::{Frame, MAX_FRAME, MacAddress, Port, PortError};
