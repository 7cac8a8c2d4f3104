//! Folders with certificates, as users have them.

#![expect(unreachable_pub, reason = "each test file includes this as a module")]
#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::path::{Path, PathBuf};

use dunlin_lane::stream::TlsIdentity;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

/// An authority that signs for hosts.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self {
            issuer: CertifiedIssuer::self_signed(params, key).unwrap(),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// A folder for a host that is reached by `names`, and trusts this authority.
    pub fn folder(&self, names: &[&str]) -> PathBuf {
        self.folder_trusting(self, names)
    }

    /// A folder for a host with a certificate of this authority that trusts another one.
    pub fn folder_trusting(&self, other: &Self, names: &[&str]) -> PathBuf {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let folder = self.folder.path().join(names.join(","));
        fs::create_dir_all(&folder).unwrap();
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(names).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let write = |name, text: String| fs::write(folder.join(name), text).unwrap();
        write("ca.pem", other.issuer.pem());
        write("cert.pem", certificate.pem());
        write("key.pem", key.serialize_pem());
        folder
    }

    pub fn identity(&self, names: &[&str]) -> TlsIdentity {
        identity(&self.folder(names))
    }
}

pub fn identity(folder: &Path) -> TlsIdentity {
    TlsIdentity::open(folder).unwrap()
}
