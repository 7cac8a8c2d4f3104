//! A guest moves over TLS between hosts of one authority, and stays where it is otherwise.
#![expect(
    clippy::unwrap_used,
    reason = "a test may stop at what it cannot do without"
)]

use std::fs;
use std::path::{Path, PathBuf};

use dunlin_guest_migbench::Parameters;
use dunlin_testbed::hosts::{FIRST, SECOND};
use dunlin_testbed::mover::{Engine, Mover, NAME, Setup};
use dunlin_testbed::{guest, process};

struct Bed {
    folder: tempfile::TempDir,
    mover: Mover,
}

fn bed() -> Option<Bed> {
    let binary = guest::binary()?;
    let folder = tempfile::tempdir().unwrap();
    let setup = Setup {
        binary,
        folder: folder.path().join("bed"),
        engine: Engine::SOFT,
        memory_mebibytes: 32,
        parameters: Parameters {
            fill_mebibytes: Some(4),
            ..Parameters::default()
        },
    };
    let mover = Mover::start(&setup).unwrap();
    Some(Bed { folder, mover })
}

impl Bed {
    /// A folder for both hosts, of a new authority.
    fn certificates(&mut self, authority: &str) -> PathBuf {
        let folder = self.folder.path().join(authority);
        let names = format!("{FIRST},{SECOND}");
        let arguments = ["certificates", "--host", &names, "--to"];
        let mut command = self.mover.host().command(&arguments);
        process::output(command.arg(&folder)).unwrap();
        folder.join(FIRST.to_string())
    }

    /// A move that must fail, with the guest running on where it is; what either side said.
    fn refused(&mut self, migrate: &[&str], receive: &[&str]) -> (String, String) {
        let target = self.mover.await_guest(receive).unwrap();
        let mut arguments = vec!["migrate", NAME, "--to", &target, "--peer-timeout", "3s"];
        arguments.extend(migrate);
        let error = self.mover.host().query(&arguments).unwrap_err();
        let log = self.mover.other().log(&format!("{NAME}-incoming"));
        self.mover.stay().unwrap();
        (format!("{error:#}"), fs::read_to_string(log).unwrap())
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_guest_moves_between_hosts_of_one_authority_and_to_no_others() {
    let Some(mut bed) = bed() else { return };
    let ours = bed.certificates("ours");
    let theirs = bed.certificates("theirs");
    let tls = ["--tls", text(&ours)];
    for _ in 0..2 {
        let hop = bed.mover.hop(&tls, &tls).unwrap();
        assert_eq!(hop.report["transport"], "tls", "{}", hop.report);
    }

    // The destination belongs to somebody else.
    let (source, destination) = bed.refused(&tls, &["--tls", text(&theirs)]);
    let expected = format!(
        "not signed by the authority in {}",
        text(&ours.join("ca.pem"))
    );
    assert!(source.contains(&expected), "{source}");
    let expected = "does not trust the authority of this side's certificate";
    assert!(destination.contains(expected), "{destination}");

    // The source does.
    let stranger = bed.folder.path().join("stranger");
    fs::create_dir(&stranger).unwrap();
    fs::copy(ours.join("ca.pem"), stranger.join("ca.pem")).unwrap();
    for file in ["cert.pem", "key.pem"] {
        fs::copy(theirs.join(file), stranger.join(file)).unwrap();
    }
    let (source, destination) = bed.refused(&["--tls", text(&stranger)], &tls);
    assert!(source.contains(expected), "{source}");
    let expected = format!(
        "not signed by the authority in {}",
        text(&ours.join("ca.pem"))
    );
    assert!(destination.contains(&expected), "{destination}");

    // One of the two speaks no TLS.
    let (source, _) = bed.refused(&tls, &[]);
    assert!(source.contains("does it use TLS?"), "{source}");
    let (_, destination) = bed.refused(&[], &tls);
    assert!(destination.contains("does not speak TLS"), "{destination}");

    bed.mover.hop(&tls, &tls).unwrap();
}

#[test]
fn plain_tcp_between_hosts_has_to_be_asked_for() {
    let Some(mut bed) = bed() else { return };
    let far = "tcp://192.0.2.1:7000";
    let command = ["migrate", NAME, "--to", far, "--peer-timeout", "1s"];
    let error = bed.mover.host().query(&command).unwrap_err();
    let error = format!("{error:#}");
    assert!(
        error.contains(far) && error.contains("--tls off"),
        "{error}"
    );
    let command = ["receive", "--listen", "tcp://0.0.0.0:0", "--once"];
    let error = bed.mover.host().query(&command).unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("--tls off"), "{error}");
    bed.mover.stay().unwrap();
}
