//! Reaching a destination over TLS.

use std::time::Instant;

use super::{TlsIdentity, TlsName, TlsTransport};
use crate::stream::{Connector, Fencing, PeerProcess, TcpConnector, Transport, TransportError};

/// Reaches a destination over TLS on TCP.
#[derive(Debug)]
pub struct TlsConnector {
    tcp: TcpConnector,
    identity: TlsIdentity,
    name: TlsName,
}

impl TlsConnector {
    /// The destination that `tcp` reaches, whose certificate has to be valid for `name`.
    pub fn new(tcp: TcpConnector, identity: TlsIdentity, name: TlsName) -> Self {
        Self {
            tcp,
            identity,
            name,
        }
    }
}

impl Fencing for TlsConnector {
    fn peer_is_dead(&self) -> Option<bool> {
        self.tcp.peer_is_dead()
    }
}

impl Connector for TlsConnector {
    fn connect(&mut self, deadline: Instant) -> Result<Box<dyn Transport>, TransportError> {
        let below = self.tcp.connect(deadline)?;
        let mut transport = TlsTransport::client(below, &self.identity, self.name.clone())?;
        transport.handshake(deadline)?;
        Ok(Box::new(transport))
    }

    fn watch(&mut self, process: PeerProcess) {
        self.tcp.watch(process);
    }

    fn transport(&self) -> &'static str {
        "tls"
    }
}
