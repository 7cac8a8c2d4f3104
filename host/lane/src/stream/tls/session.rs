//! What the two sides share when the handshake is done.

use std::io::IoSlice;

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};

use super::TlsFailure;
use super::records::{ALERT, DATA, HANDSHAKE, HEADER, Keys, MAX_PLAIN, RECORDS_PER_KEY, Where};
use crate::stream::RawSlice;

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

/// Where data went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Landed {
    /// Where it was to go, so many bytes.
    There(usize),
    /// It is in the record, or there is none.
    Here(Opened),
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

    /// Seals up to `limit` bytes of memory that others may write meanwhile; says how many.
    pub(super) fn seal_raw(
        &mut self,
        plain: &[RawSlice],
        limit: usize,
        to: &mut Vec<u8>,
    ) -> Result<usize, TlsFailure> {
        let mut taken = 0;
        for mut slice in plain.iter().copied() {
            while taken < limit && !slice.is_empty() {
                self.renew(to)?;
                let content = slice.split_front(MAX_PLAIN);
                self.send.seal_raw(DATA, content, to)?;
                taken += content.len();
            }
        }
        Ok(taken)
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
        self.heed(kind, &record[HEADER..][..length])
    }

    /// Opens a whole record; data goes to `to`, and whatever lies there behind the data may have been
    /// overwritten.
    pub(super) fn open_to(
        &mut self,
        record: &mut [u8],
        to: RawSlice,
    ) -> Result<Landed, TlsFailure> {
        match self.receive.open_to(record, to)? {
            Where::There(count) => Ok(Landed::There(count)),
            Where::Here(kind, length) => {
                let opened = self.heed(kind, &record[HEADER..][..length])?;
                Ok(Landed::Here(opened))
            }
        }
    }

    /// What a record of this type and content means.
    fn heed(&mut self, kind: u8, content: &[u8]) -> Result<Opened, TlsFailure> {
        match (kind, content) {
            (DATA, _) => Ok(Opened::Data(content.len())),
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
