//! Arguments of what protects a move, and of where it goes.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use dunlin_api::migration::{Endpoint, EndpointError};

/// `--tls`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TlsArgument {
    /// Plain connections, also to other hosts.
    Off,
    /// A folder with certificates.
    Folder(PathBuf),
}

impl FromStr for TlsArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Err("write a folder, or \"off\"".to_owned()),
            "off" => Ok(Self::Off),
            folder => Ok(Self::Folder(folder.into())),
        }
    }
}

/// `--to`: an endpoint, or a port of a host by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetArgument {
    /// An address.
    Endpoint(Endpoint),
    /// `tcp://hostb:7000`.
    Host {
        /// Its name.
        name: String,
        /// The port.
        port: u16,
    },
}

impl FromStr for TargetArgument {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let host = || {
            let (name, port) = text.strip_prefix("tcp://")?.rsplit_once(':')?;
            let port = port.parse().ok()?;
            let name = is_host_name(name).then(|| name.to_owned())?;
            Some(Self::Host { name, port })
        };
        match text.parse() {
            Ok(endpoint) => Ok(Self::Endpoint(endpoint)),
            Err(error) => host().ok_or(error),
        }
    }
}

fn is_host_name(text: &str) -> bool {
    let label = |label: &str| {
        let mut letters = label.bytes();
        letters.all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.is_empty()
            && !label.starts_with('-')
    };
    // A name whose last label is a number would be an address that does not parse.
    text.len() <= 253
        && text.split('.').all(label)
        && text.bytes().any(|byte| byte.is_ascii_alphabetic())
}

/// Arguments of `certificates`.
#[derive(Debug, Args)]
pub struct CertificatesArgs {
    /// The folder to make; in one with an authority, hosts are added
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// A host, by all names and addresses that others reach it by; repeat it for each host
    #[arg(long = "host", value_name = "NAME[,NAME]", required = true)]
    pub hosts: Vec<HostArgument>,
}

/// `--host`: the names of one host. The first one is also that of its folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostArgument(pub Vec<String>);

impl FromStr for HostArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<_> = text.split(',').map(str::to_owned).collect();
        let wrong = |name: &&String| name.parse::<IpAddr>().is_err() && !is_host_name(name);
        match names.iter().find(wrong) {
            Some(name) => Err(format!("\"{name}\" is neither a host name nor an address")),
            None => Ok(Self(names)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_an_address_or_a_name_with_a_port() {
        let parse = |text: &str| text.parse::<TargetArgument>();
        let host = |name: &str, port| TargetArgument::Host {
            name: name.to_owned(),
            port,
        };
        assert_eq!(parse("tcp://hostb:7000"), Ok(host("hostb", 7000)));
        assert_eq!(parse("tcp://b.example.org:1"), Ok(host("b.example.org", 1)));
        for address in ["tcp://10.0.0.7:7000", "tcp://[::1]:7000", "unix:/run/x"] {
            let endpoint = address.parse().map(TargetArgument::Endpoint);
            assert_eq!(parse(address), endpoint);
        }
        for wrong in [
            "hostb:7000",
            "tcp://hostb",
            "tcp://:7000",
            "tcp://hostb:70000",
            "tcp://host b:7000",
            "tcp://10.0.0.300:7000",
            "tcp://::1:7000",
            "tcp://-b:7000",
            "tcp://a..b:7000",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_host_has_names_and_addresses_that_make_a_folder() {
        let parse = |text: &str| text.parse::<HostArgument>();
        let names = vec!["hostb".to_owned(), "10.0.0.7".to_owned()];
        assert_eq!(parse("hostb,10.0.0.7"), Ok(HostArgument(names)));
        for wrong in ["", ",", "..", "a/b", "hostb,", "10.0.0"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
