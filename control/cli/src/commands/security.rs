//! What the options about protection come to.

use dunlin_api::migration::Endpoint;
use dunlin_api::security::Security;

use super::{absolute, absolute_endpoint};
use crate::args::{TargetArgument, TlsArgument};
use crate::error::CliError;

/// What protects a move to, or from, `host`.
pub(super) fn security(
    argument: Option<TlsArgument>,
    host: Option<String>,
) -> Result<Security, CliError> {
    Ok(match argument {
        None => Security::Automatic,
        Some(TlsArgument::Off) => Security::Off,
        Some(TlsArgument::Folder(folder)) => Security::Tls {
            folder: absolute(&folder)?,
            host,
        },
    })
}

/// Where a move goes, and the name of the host when it was given by name. Of several addresses it
/// is the first of version 4, if there is one.
pub(super) async fn resolve(
    target: TargetArgument,
) -> Result<(Endpoint, Option<String>), CliError> {
    let (name, port) = match target {
        TargetArgument::Endpoint(endpoint) => return Ok((absolute_endpoint(endpoint)?, None)),
        TargetArgument::Host { name, port } => (name, port),
    };
    let found = tokio::net::lookup_host((name.as_str(), port)).await;
    let action = format!("find the address of the host \"{name}\"");
    let mut addresses: Vec<_> = found.map_err(CliError::host(action))?.collect();
    addresses.sort_by_key(|address| !address.is_ipv4());
    match addresses.first() {
        Some(address) => Ok((Endpoint::Tcp(*address), Some(name))),
        None => Err(CliError::Argument(format!(
            "the host \"{name}\" has no address"
        ))),
    }
}
