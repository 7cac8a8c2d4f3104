//! TLS 1.3 with certificates on both sides, as a [`Transport`](super::Transport).
//!
//! rustls walks the handshake: it checks certificates, agrees on keys, and derives new ones. The
//! records that follow are sealed and opened here: from the memory that the bytes are in into the
//! buffer that the kernel reads, and from the one that the kernel has written into the memory where
//! the bytes belong. That saves copies and allocations for each record, which count as much as
//! the cipher itself.
//!
//! The handshake takes place in the first call that reads or writes, within that call's deadline, so
//! that whoever accepts connections is not held up by it.

mod cipher;
mod connect;
mod handshake;
mod identity;
mod records;
mod session;
mod targets;
mod transport;

use std::path::PathBuf;

use rustls::unbuffered::EncodeError;
use rustls::{AlertDescription, CertificateError, InvalidMessage};

pub use connect::TlsConnector;
pub use identity::{IdentityError, TlsIdentity, TlsName};
pub use transport::TlsTransport;

/// Why there is no secure connection, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum TlsFailure {
    /// The peer's certificate comes from somebody else.
    #[error("its certificate is not signed by the authority in {}", authority.display())]
    Untrusted {
        /// The file with the authority's certificate.
        authority: PathBuf,
    },
    /// The peer's certificate is that of another host.
    #[error("its certificate is not valid for the name {name}")]
    WrongName {
        /// What it should be valid for.
        name: String,
    },
    /// The peer showed no certificate.
    #[error("it showed no certificate")]
    NoCertificate,
    /// The peer ended it, and said why.
    #[error("it refused: {}", reason(*alert))]
    Refused {
        /// What it said.
        alert: AlertDescription,
    },
    /// The peer closed the connection in the middle of the handshake.
    #[error("it hung up during the handshake; does it use TLS?")]
    HungUp,
    /// What came is no TLS.
    #[error("it does not speak TLS")]
    NotTls,
    /// It is a place of the same name for something else.
    #[error("it does not mean Dunlin's protocol inside of TLS")]
    OtherProtocol,
    /// A record is not what was sent.
    #[error("a record is damaged or forged")]
    Damaged,
    /// A record that has no place in an open connection.
    #[error("a record of type {kind} came")]
    Unexpected {
        /// The type.
        kind: u8,
    },
    /// The two sides agreed on a cipher that this side does not have.
    #[error("an unknown cipher was agreed on")]
    Suite,
    /// The cipher refused to work.
    #[error("the cipher failed")]
    Cipher,
    /// A message of the handshake is larger than is bearable.
    #[error("a message of the handshake is too large")]
    Encode(#[source] EncodeError),
    /// Anything else that goes wrong in a handshake.
    #[error("the handshake failed")]
    Handshake(#[source] rustls::Error),
}

impl From<rustls::Error> for TlsFailure {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::AlertReceived(alert) => Self::Refused { alert },
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => Self::NotTls,
            error => Self::Handshake(error),
        }
    }
}

impl TlsFailure {
    /// Names the authority and the host that a certificate was measured by.
    fn explained(self, authority: &std::path::Path, name: Option<&TlsName>) -> Self {
        match self {
            Self::Handshake(rustls::Error::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadSignature,
            )) => Self::Untrusted {
                authority: authority.to_owned(),
            },
            Self::Handshake(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Self::WrongName {
                name: name.map_or_else(|| "of this side".to_owned(), ToString::to_string),
            },
            other => other,
        }
    }
}

fn reason(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it does not trust the authority of this side's certificate".to_owned()
        }
        AlertDescription::CertificateRequired => "it wants a certificate".to_owned(),
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateUnknown => {
            "this side's certificate does not suit it".to_owned()
        }
        AlertDescription::CertificateExpired => "this side's certificate has expired".to_owned(),
        other => format!("alert {other:?}"),
    }
}
