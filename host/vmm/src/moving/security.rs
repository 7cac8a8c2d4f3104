//! Who may be spoken to, and how: connections that leave the host are encrypted, or plain because
//! somebody asked for that.

use std::path::Path;

use dunlin_api::migration::Endpoint;
use dunlin_api::security::Security;
use dunlin_api::{ApiError, ErrorCode};
use dunlin_migration::transport::{
    Connector, Listener, TcpConnector, TlsConnector, TlsIdentity, TlsName, UnixConnector,
};

/// The way to a destination.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    to: Endpoint,
    tls: Option<(TlsIdentity, TlsName)>,
}

impl Route {
    /// The way to `to`.
    pub(crate) fn new(to: Endpoint, security: &Security) -> Result<Self, ApiError> {
        let identity = identity(&to, security)?;
        let tls = identity
            .map(|identity| name(&to, security).map(|name| (identity, name)))
            .transpose()?;
        Ok(Self { to, tls })
    }

    /// The way to a process of this host and user that waits on a unix socket.
    pub(crate) fn to_process(path: &Path) -> Self {
        Self {
            to: Endpoint::Unix(path.to_owned()),
            tls: None,
        }
    }

    pub(crate) fn connector(&self) -> Box<dyn Connector> {
        match &self.to {
            Endpoint::Tcp(address) => {
                let tcp = TcpConnector::new(*address);
                match self.tls.clone() {
                    Some((identity, name)) => Box::new(TlsConnector::new(tcp, identity, name)),
                    None => Box::new(tcp),
                }
            }
            Endpoint::Unix(path) => Box::new(UnixConnector::new(path)),
        }
    }
}

/// A place where guests arrive.
pub(crate) fn listener(listen: &Endpoint, security: &Security) -> Result<Listener, ApiError> {
    let identity = identity(listen, security)?;
    let listener = match listen {
        Endpoint::Tcp(address) => Listener::tcp(*address),
        Endpoint::Unix(path) => Listener::unix(path),
    };
    let listener = listener.map_err(|error| {
        // The place that was here before may still answer its source: worth another try.
        ApiError::from_chain(ErrorCode::Busy, &error)
            .with_hint("another process may listen there; choose another address")
    })?;
    Ok(match identity {
        Some(identity) => listener.with_tls(identity),
        None => listener,
    })
}

/// Who this host is on connections with `other`, when they are encrypted at all.
fn identity(other: &Endpoint, security: &Security) -> Result<Option<TlsIdentity>, ApiError> {
    match (security, other) {
        (Security::Tls { folder, .. }, Endpoint::Tcp(_)) => TlsIdentity::open(folder)
            .map(Some)
            .map_err(|error| ApiError::from_chain(ErrorCode::InvalidRequest, &error)),
        (Security::Tls { .. }, Endpoint::Unix(_)) => Err(ApiError::new(
            ErrorCode::InvalidRequest,
            format!("TLS needs a tcp:// address, and {other} is none"),
        )),
        (Security::Automatic, Endpoint::Tcp(address)) if !address.ip().is_loopback() => {
            let refused = format!("a guest's memory does not travel in the clear by {other}");
            Err(ApiError::new(ErrorCode::InvalidRequest, refused).with_hint(
                "encrypt by --tls DIR on both sides, with certificates that \
                 \"dunlin certificates\" makes, or ask for plain TCP by --tls off",
            ))
        }
        (Security::Automatic | Security::Off, _) => Ok(None),
    }
}

fn name(to: &Endpoint, security: &Security) -> Result<TlsName, ApiError> {
    match (security, to) {
        (
            Security::Tls {
                host: Some(host), ..
            },
            _,
        ) => TlsName::host(host).ok_or_else(|| {
            let refused = format!("\"{host}\" is no name of a host");
            ApiError::new(ErrorCode::InvalidRequest, refused)
        }),
        (_, Endpoint::Tcp(address)) => Ok(TlsName::address(address.ip())),
        (_, Endpoint::Unix(_)) => Err(ApiError::new(
            ErrorCode::InvalidRequest,
            format!("{to} has no name that a certificate could be valid for"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(to: &str, security: &Security) -> Option<ApiError> {
        Route::new(to.parse().unwrap(), security).err()
    }

    #[test]
    fn what_leaves_the_host_in_the_clear_has_to_be_asked_for() {
        for inside in ["tcp://127.0.0.9:7000", "tcp://[::1]:7000", "unix:/run/x"] {
            assert_eq!(refused(inside, &Security::Automatic), None);
        }
        for outside in ["tcp://192.0.2.7:7000", "tcp://[2001:db8::1]:7000"] {
            let error = refused(outside, &Security::Automatic).unwrap();
            assert!(error.message.contains(outside), "{error}");
            assert!(error.hint.unwrap().contains("--tls off"));
            assert_eq!(refused(outside, &Security::Off), None);
        }
        let everywhere: Endpoint = "tcp://0.0.0.0:0".parse().unwrap();
        assert!(listener(&everywhere, &Security::Automatic).is_err());
        assert!(listener(&everywhere, &Security::Off).is_ok());
    }

    #[test]
    fn a_folder_without_certificates_is_named_before_anything_moves() {
        let security = Security::Tls {
            folder: "/nowhere/at/all".into(),
            host: None,
        };
        let error = refused("tcp://192.0.2.7:7000", &security).unwrap();
        assert!(error.message.contains("/nowhere/at/all/ca.pem"), "{error}");
        let error = refused("unix:/run/x", &security).unwrap();
        assert!(error.message.contains("tcp://"), "{error}");
    }
}
