//! What the two sides share when the handshake is done.

use std::io::IoSlice;

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

use super::TlsFailure;
use super::records::{ALERT, DATA, HANDSHAKE, Keys, MAX_PLAIN, RECORDS_PER_KEY};
use super::sealed::Sealed;

const CLOSE_NOTIFY: u8 = 0;
const WARNING: u8 = 1;
const KEY_UPDATE: u8 = 24;

/// Makes the next keys of either direction.
trait Schedule: Send {
    fn next_to_send(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
    fn next_to_receive(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
}

macro_rules! schedule {
    ($($data:ty),*) => {$(
        impl Schedule for KernelConnection<$data> {
            fn next_to_send(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
                self.update_tx_secret()
            }

            fn next_to_receive(
                &mut self,
            ) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
                self.update_rx_secret()
            }
        }
    )*};
}

schedule!(ClientConnectionData, ServerConnectionData);

/// What a record was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opened {
    /// So many bytes for the reader, behind the record's header.
    Data(usize),
    /// Something between the two ends of TLS.
    Nothing,
    /// The peer has said that it sends no more.
    End,
}

/// The keys of both directions.
pub(super) struct Session {
    send: Keys,
    receive: Keys,
    schedule: Box<dyn Schedule>,
    /// The peer asked for new keys in our direction.
    asked: bool,
}

impl Session {
    pub(super) fn of_client(
        parts: (ExtractedSecrets, KernelConnection<ClientConnectionData>),
    ) -> Result<Self, TlsFailure> {
        Self::new(parts.0, Box::new(parts.1))
    }

    pub(super) fn of_server(
        parts: (ExtractedSecrets, KernelConnection<ServerConnectionData>),
    ) -> Result<Self, TlsFailure> {
        Self::new(parts.0, Box::new(parts.1))
    }

    fn new(secrets: ExtractedSecrets, schedule: Box<dyn Schedule>) -> Result<Self, TlsFailure> {
        Ok(Self {
            send: Keys::new(secrets.tx)?,
            receive: Keys::new(secrets.rx)?,
            schedule,
            asked: false,
        })
    }

    /// Seals up to `limit` bytes of `plain` into records behind `to`; says how many.
    pub(super) fn seal(
        &mut self,
        mut plain: &mut [IoSlice<'_>],
        limit: usize,
        to: &mut Vec<u8>,
    ) -> Result<usize, TlsFailure> {
        let mut taken = 0;
        while taken < limit && plain.iter().any(|slice| !slice.is_empty()) {
            self.renew(to)?;
            taken += self.send.seal(DATA, &mut plain, to)?;
        }
        Ok(taken)
    }

    /// Seals `head`, and `payload` where it lies.
    pub(super) fn seal_through(
        &mut self,
        head: &[u8],
        payload: &mut [u8],
        sealed: &mut Sealed,
    ) -> Result<(), TlsFailure> {
        self.seal(&mut [IoSlice::new(head)], head.len(), sealed.frames())?;
        let mut at = 0;
        // The last byte of each belongs to the record behind it.
        while let Some(content) = payload[at..].first_chunk_mut() {
            self.renew(sealed.frames())?;
            let (before, behind) = self.send.seal_in_place(DATA, content)?;
            sealed.frames().extend_from_slice(&before);
            sealed.piece(at..at + MAX_PLAIN);
            sealed.frames().extend_from_slice(&behind);
            at += MAX_PLAIN;
        }
        let rest = &payload[at..];
        self.seal(&mut [IoSlice::new(rest)], rest.len(), sealed.frames())?;
        sealed.complete();
        Ok(())
    }

    /// Changes keys when that is due.
    fn renew(&mut self, to: &mut Vec<u8>) -> Result<(), TlsFailure> {
        if self.asked || self.send.sequence() >= RECORDS_PER_KEY {
            self.change_keys(to)?;
        }
        Ok(())
    }

    /// Tells the peer that new keys follow, and takes them.
    fn change_keys(&mut self, to: &mut Vec<u8>) -> Result<(), TlsFailure> {
        self.seal_one(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0], to)?;
        self.send = Keys::new(self.schedule.next_to_send()?)?;
        self.asked = false;
        Ok(())
    }

    /// Says that nothing more is sent.
    pub(super) fn seal_end(&mut self, to: &mut Vec<u8>) -> Result<(), TlsFailure> {
        self.seal_one(ALERT, &[WARNING, CLOSE_NOTIFY], to)
    }

    fn seal_one(&mut self, kind: u8, content: &[u8], to: &mut Vec<u8>) -> Result<(), TlsFailure> {
        let mut plain = &mut [IoSlice::new(content)][..];
        self.send.seal(kind, &mut plain, to)?;
        Ok(())
    }

    /// Opens a whole record where it lies.
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<Opened, TlsFailure> {
        let (kind, length) = self.receive.open(record)?;
        let content = &record[super::records::HEADER..][..length];
        match (kind, content) {
            (DATA, _) => Ok(Opened::Data(length)),
            (ALERT, &[_, CLOSE_NOTIFY]) => Ok(Opened::End),
            (ALERT, &[_, alert]) => Err(TlsFailure::Refused {
                alert: alert.into(),
            }),
            (HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, asks @ (0 | 1)]) => {
                self.receive = Keys::new(self.schedule.next_to_receive()?)?;
                self.asked |= asks == 1;
                Ok(Opened::Nothing)
            }
            _ => Err(TlsFailure::Unexpected { kind }),
        }
    }
}
