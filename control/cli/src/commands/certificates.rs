//! `certificates`: an authority, and a folder for each host, as `--tls` wants them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use serde::Serialize;

use crate::args::{CertificatesArgs, HostArgument};
use crate::error::CliError;
use crate::printer::Printer;

const AUTHORITY: &str = "ca.pem";
const AUTHORITY_KEY: &str = "ca-key.pem";
/// How long certificates are valid, in years.
const YEARS: i32 = 10;
/// Seconds of a year, on average.
const YEAR: u64 = 31_556_952;

/// What is printed for programs.
#[derive(Debug, Serialize)]
struct Made {
    authority: PathBuf,
    hosts: Vec<PathBuf>,
}

/// Makes certificates.
pub(super) fn certificates(args: &CertificatesArgs, printer: &Printer) -> Result<(), CliError> {
    let authority = Authority::open(&args.to)?;
    let hosts: Result<Vec<_>, _> = args
        .hosts
        .iter()
        .map(|host| authority.make_host(&args.to, host))
        .collect();
    let made = Made {
        authority: args.to.join(AUTHORITY),
        hosts: hosts?,
    };
    printer.result(&made, || {
        let lines = made.hosts.iter().map(|host| host.display().to_string());
        lines.collect::<Vec<_>>().join("\n")
    });
    printer.note(&format!(
        "copy each host its folder, and keep {} to yourself: it makes more of them",
        args.to.join(AUTHORITY_KEY).display()
    ));
    Ok(())
}

/// Who signs.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// That of the folder; a new one if it has none.
    fn open(folder: &Path) -> Result<Self, CliError> {
        let certificate = folder.join(AUTHORITY);
        let key = folder.join(AUTHORITY_KEY);
        let params = authority_params()?;
        if certificate.exists() || key.exists() {
            let pair = KeyPair::from_pem(&read(&key)?).map_err(failed("read", &key))?;
            return Ok(Self {
                certificate: read(&certificate)?,
                issuer: Issuer::new(params, pair),
            });
        }
        fs::create_dir_all(folder).map_err(host("create", folder))?;
        let pair = KeyPair::generate().map_err(failed("make", &key))?;
        let signed = params
            .self_signed(&pair)
            .map_err(failed("make", &certificate))?;
        write(&key, &pair.serialize_pem(), 0o600)?;
        write(&certificate, &signed.pem(), 0o644)?;
        Ok(Self {
            certificate: signed.pem(),
            issuer: Issuer::new(params, pair),
        })
    }

    /// Makes the folder of one host.
    fn make_host(&self, folder: &Path, names: &HostArgument) -> Result<PathBuf, CliError> {
        let HostArgument(names) = names;
        let name = names.first().map_or("host", String::as_str);
        let folder = folder.join(name);
        fs::create_dir_all(&folder).map_err(host("create", &folder))?;
        let certificate = folder.join("cert.pem");
        let pair = KeyPair::generate().map_err(failed("make", &folder))?;
        let params = host_params(names).map_err(failed("make", &certificate))?;
        let signed = params
            .signed_by(&pair, &self.issuer)
            .map_err(failed("make", &certificate))?;
        write(&folder.join("key.pem"), &pair.serialize_pem(), 0o600)?;
        write(&certificate, &signed.pem(), 0o644)?;
        write(&folder.join(AUTHORITY), &self.certificate, 0o644)?;
        Ok(folder)
    }
}

/// The same whenever the authority signs: a certificate names its issuer by it.
fn authority_params() -> Result<CertificateParams, CliError> {
    let folder = Path::new(AUTHORITY);
    let mut params = CertificateParams::new(Vec::new()).map_err(failed("make", folder))?;
    let name = &mut params.distinguished_name;
    name.push(DnType::CommonName, "Dunlin hosts");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params);
    Ok(params)
}

fn host_params(names: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    if let Some(name) = names.first() {
        params.distinguished_name.push(DnType::CommonName, name);
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    set_validity(&mut params);
    Ok(params)
}

/// From the beginning of last year, whatever the hosts' clocks say, for about ten years.
fn set_validity(params: &mut CertificateParams) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let year = 1970 + (now.map_or(0, |time| time.as_secs()) / YEAR) as i32;
    params.not_before = date_time_ymd(year - 1, 1, 1);
    params.not_after = date_time_ymd(year + YEARS, 1, 1);
}

fn read(path: &Path) -> Result<String, CliError> {
    fs::read_to_string(path).map_err(host("read", path))
}

/// Writes a new file, which only its owner can read if that is what `mode` says.
fn write(path: &Path, content: &str, mode: u32) -> Result<(), CliError> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true).mode(mode);
    options
        .open(path)
        .and_then(|mut file| file.write_all(content.as_bytes()))
        .map_err(host("write", path))
}

fn host(action: &str, path: &Path) -> impl FnOnce(std::io::Error) -> CliError {
    CliError::host(format!("{action} \"{}\"", path.display()))
}

fn failed(action: &str, path: &Path) -> impl FnOnce(rcgen::Error) -> CliError {
    let host = host(action, path);
    move |error| host(std::io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn hosts_are_added_to_an_authority_and_no_key_is_overwritten_or_open_to_others() {
        let folder = tempfile::tempdir().unwrap();
        let args = |host: &str| CertificatesArgs {
            to: folder.path().join("certificates"),
            hosts: vec![host.parse().unwrap()],
        };
        let printer = Printer::new(false);
        certificates(&args("hosta,127.0.0.2"), &printer).unwrap();
        let authority = read(&args("hosta").to.join(AUTHORITY)).unwrap();
        certificates(&args("hostb"), &printer).unwrap();
        for host in ["hosta", "hostb"] {
            let folder = args(host).to.join(host);
            assert_eq!(read(&folder.join(AUTHORITY)).unwrap(), authority);
            let key = fs::metadata(folder.join("key.pem")).unwrap();
            assert_eq!(key.permissions().mode() & 0o777, 0o600);
        }
        let key = fs::metadata(args("hosta").to.join(AUTHORITY_KEY)).unwrap();
        assert_eq!(key.permissions().mode() & 0o777, 0o600);
        let again = certificates(&args("hosta"), &printer).unwrap_err();
        assert!(
            again.message().contains("hosta/key.pem"),
            "{}",
            again.message()
        );
    }
}
