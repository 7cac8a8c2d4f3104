//! Who this side is, and whom it trusts.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, UnbufferedClientConnection};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig, version};

use super::handshake::Handshake;

/// What both sides name as the protocol inside of TLS.
pub(super) const PROTOCOL: &[u8] = b"dunlin";

/// Why a folder with certificates is of no use.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read, or there is nothing in it of what should be.
    #[error("failed to read {what} from {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        what: &'static str,
        /// What the system or the decoder said.
        #[source]
        source: pem::Error,
    },
    /// A file has no certificate in it.
    #[error("{path} has no certificate in it")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A certificate or the key is not valid, or they do not belong together.
    #[error("the certificates and the key in {folder} cannot be used")]
    Unusable {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with them.
        #[source]
        source: rustls::Error,
    },
    /// The authority's certificate is not one.
    #[error("{path} is no certificate of an authority")]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A certificate with its key, and the authority whose certificates are accepted.
///
/// They come from a folder with three files in PEM: `ca.pem`, the certificate of the authority that
/// both sides trust; `cert.pem`, this side's own certificate, signed by it, which has to name the
/// host by all names and addresses that others reach it by; and `key.pem`, the key of that.
#[derive(Debug, Clone)]
pub struct TlsIdentity {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    authority: Arc<Path>,
}

impl TlsIdentity {
    /// Reads a folder.
    ///
    /// # Errors
    /// [`IdentityError`] names the file that is missing or wrong.
    pub fn open(folder: &Path) -> Result<Self, IdentityError> {
        let authority = folder.join("ca.pem");
        let roots = Arc::new(roots(&authority)?);
        let chain = certificates(&folder.join("cert.pem"))?;
        let key = folder.join("key.pem");
        warn_of_readers(&key);
        let key = PrivateKeyDer::from_pem_file(&key).map_err(|source| IdentityError::File {
            path: key,
            what: "a key",
            source,
        })?;
        let unusable = |source| IdentityError::Unusable {
            folder: folder.to_owned(),
            source,
        };
        let provider = Arc::new(provider());
        let versions = [&version::TLS13];
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&versions)
            .map_err(unusable)?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(unusable)?;
        client.resumption = Resumption::disabled();
        client.enable_secret_extraction = true;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| IdentityError::Authority {
                path: authority.clone(),
                source: Box::new(error),
            })?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(unusable)?;
        server.send_tls13_tickets = 0;
        server.enable_secret_extraction = true;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            authority: authority.into(),
        })
    }

    /// The file with the authority's certificate, for messages.
    pub(super) fn authority(&self) -> &Arc<Path> {
        &self.authority
    }

    pub(super) fn client(&self, name: &TlsName) -> Result<Handshake, rustls::Error> {
        let config = Arc::clone(&self.client);
        let connection = UnbufferedClientConnection::new(config, name.0.clone())?;
        Ok(Handshake::Client(Box::new(connection)))
    }

    pub(super) fn server(&self) -> Result<Handshake, rustls::Error> {
        let connection = UnbufferedServerConnection::new(Arc::clone(&self.server))?;
        Ok(Handshake::Server(Box::new(connection)))
    }
}

/// The name that a destination's certificate has to be valid for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsName(ServerName<'static>);

impl TlsName {
    /// A host by its name; `None` when the text cannot be one.
    pub fn host(name: &str) -> Option<Self> {
        ServerName::try_from(name.to_owned()).map(Self).ok()
    }

    /// A host by its address.
    pub fn address(address: IpAddr) -> Self {
        Self(ServerName::IpAddress(address.into()))
    }
}

impl std::fmt::Display for TlsName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.to_str())
    }
}

/// The fastest suite first: with AES instructions 128 bits cost least, and they are enough.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..default_provider()
    }
}

/// A key that everybody on the host can read proves nothing about who uses it.
fn warn_of_readers(key: &Path) {
    let others = fs::metadata(key).is_ok_and(|file| file.permissions().mode() & 0o007 != 0);
    if others {
        tracing::warn!(file = %key.display(), "everybody on this host can read the key");
    }
}

fn roots(path: &Path) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|source| IdentityError::Authority {
                path: path.to_owned(),
                source: Box::new(source),
            })?;
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let failed = |source| IdentityError::File {
        path: path.to_owned(),
        what: "certificates",
        source,
    };
    let read: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(failed)?
        .collect();
    let read = read.map_err(failed)?;
    if read.is_empty() {
        return Err(IdentityError::Empty {
            path: path.to_owned(),
        });
    }
    Ok(read)
}
