//! The handshake, step by step.

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};

use super::TlsFailure;
use super::identity::PROTOCOL;
use super::session::Session;

/// Bytes of handshake messages that are kept for sending, at most.
const MAX_OUTGOING: usize = 128 << 10;

/// What a handshake needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Another step.
    Step,
    /// More bytes from the peer.
    Bytes,
    /// Nothing: both sides have the keys.
    Nothing,
}

/// One side of a handshake.
pub(super) enum Handshake {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

impl Handshake {
    /// Takes a step with what has come from the peer. Says how many of those bytes are used up, and
    /// appends to `outgoing` what has to be sent, and to `early` what the peer has sent already
    /// under the new keys.
    pub(super) fn step(
        &mut self,
        incoming: &mut [u8],
        outgoing: &mut Vec<u8>,
        early: &mut Vec<u8>,
    ) -> (usize, Result<Need, TlsFailure>) {
        match self {
            Self::Client(connection) => {
                handle(connection.process_tls_records(incoming), outgoing, early)
            }
            Self::Server(connection) => {
                handle(connection.process_tls_records(incoming), outgoing, early)
            }
        }
    }

    /// The handshake is done: the keys, if the peer means the same protocol. rustls leaves it to us
    /// when a peer names none at all.
    pub(super) fn into_session(self) -> Result<Session, TlsFailure> {
        let named = match &self {
            Self::Client(connection) => connection.alpn_protocol(),
            Self::Server(connection) => connection.alpn_protocol(),
        };
        if named != Some(PROTOCOL) {
            return Err(TlsFailure::OtherProtocol);
        }
        match self {
            Self::Client(connection) => {
                Session::of_client(connection.dangerous_into_kernel_connection()?)
            }
            Self::Server(connection) => {
                Session::of_server(connection.dangerous_into_kernel_connection()?)
            }
        }
    }
}

fn handle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Vec<u8>,
    early: &mut Vec<u8>,
) -> (usize, Result<Need, TlsFailure>) {
    let UnbufferedStatus { mut discard, state } = status;
    let need = match state {
        Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
            match traffic.next_record() {
                Some(Ok(record)) => {
                    discard += record.discard;
                    early.extend_from_slice(record.payload);
                }
                Some(Err(error)) => break Err(error.into()),
                None => break Ok(Need::Step),
            }
        },
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            append(outgoing, |room| data.encode(room)).map(|()| Need::Step)
        }
        // What is in `outgoing` is sent before anything is awaited.
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Need::Step)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Need::Bytes),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Need::Nothing),
        Ok(_) => Err(TlsFailure::HungUp),
        Err(error) => Err(error.into()),
    };
    (discard, need)
}

/// Lets `encode` write behind what is in `outgoing`, in as much room as it asks for.
fn append(
    outgoing: &mut Vec<u8>,
    mut encode: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Result<(), TlsFailure> {
    let start = outgoing.len();
    let mut room = 0;
    loop {
        outgoing.resize(start + room, 0);
        match encode(&mut outgoing[start..]) {
            Ok(count) => {
                outgoing.truncate(start + count);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(more))
                if more.required_size > room && start + more.required_size <= MAX_OUTGOING =>
            {
                room = more.required_size;
            }
            Err(error) => {
                outgoing.truncate(start);
                return Err(TlsFailure::Encode(error));
            }
        }
    }
}
