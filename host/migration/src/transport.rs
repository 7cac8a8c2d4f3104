//! Duplex byte streams with deadlines, and the places where they begin: those of
//! [`dunlin_lane::stream`], under the name that the protocol above knows them by.

pub use dunlin_lane::stream::{
    Connector, DescriptorTransport, Fencing, IdentityError, Listener, PeerProcess, ProcessIdentity,
    RawSlice, SocketTransport, StreamTraits, TcpConnector, TlsConnector, TlsFailure, TlsIdentity,
    TlsName, TlsTransport, Transport, TransportError, UnixConnector,
};
