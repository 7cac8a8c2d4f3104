//! Bad input gets an error that names the object, and never a panic or a hang.
#![expect(
    clippy::unwrap_used,
    reason = "a test may stop at what it cannot do without"
)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use dunlin_testbed::guest;
use dunlin_testbed::hosts::{Host, Testbed};
use dunlin_testbed::process::Guard;

struct Bed {
    folder: tempfile::TempDir,
    host: Host,
}

fn bed() -> Option<Bed> {
    let binary = guest::binary()?;
    let folder = tempfile::tempdir().unwrap();
    let testbed = Testbed::new(&binary, &folder.path().join("bed")).unwrap();
    let host = testbed.host("a", Ipv4Addr::new(127, 0, 0, 2)).unwrap();
    Some(Bed { folder, host })
}

impl Bed {
    /// Runs a command that must fail within ten seconds; returns what it said.
    fn fails(&self, arguments: &[&str]) -> String {
        let mut command = self.host.command(arguments);
        let mut guard = Guard::spawn(command.stdout(Stdio::null()).stderr(Stdio::piped())).unwrap();
        assert!(guard.wait(Duration::from_secs(10)), "{arguments:?} hangs");
        let status = guard.child().wait().unwrap();
        let mut text = String::new();
        let mut errors = guard.child().stderr.take().unwrap();
        errors.read_to_string(&mut text).unwrap();
        assert!(!status.success(), "{arguments:?} succeeded");
        assert_ne!(status.code(), None, "{arguments:?} died:\n{text}");
        assert!(!text.contains("panicked"), "{text}");
        text
    }

    fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_string_lossy().into_owned()
    }
}

#[test]
fn a_missing_kernel_is_named() {
    let Some(bed) = bed() else { return };
    let text = bed.fails(&["run", "--kernel", "/nowhere/vmlinuz", "--engine", "soft"]);
    assert!(text.contains("/nowhere/vmlinuz"), "{text}");
}

#[test]
fn a_truncated_elf_is_named() {
    let (Some(bed), Some(guest)) = (bed(), guest::stock("6.1")) else {
        return;
    };
    let whole = std::fs::read(&guest.elf).unwrap();
    for length in [0, 3, 63, 64, 200, 4096, whole.len() / 2] {
        let path = bed.file("truncated", &whole[..length]);
        let text = bed.fails(&["run", "--kernel", &path, "--engine", "soft"]);
        assert!(text.contains("truncated"), "{length}: {text}");
    }
}

#[test]
fn an_absurd_memory_size_is_refused() {
    let (Some(bed), Some(guest)) = (bed(), guest::stock("6.1")) else {
        return;
    };
    let kernel = guest.kernel.to_string_lossy();
    for memory in ["0", "1", "99999999G", "-1", "lots", "18446744073709551615"] {
        let text = bed.fails(&["run", "--kernel", &kernel, &format!("--memory={memory}")]);
        assert!(text.to_lowercase().contains("memory"), "{memory}: {text}");
    }
}

#[test]
fn an_unknown_vm_is_named() {
    let Some(bed) = bed() else { return };
    for command in ["pause", "resume", "stop", "inspect"] {
        let text = bed.fails(&[command, "ghost"]);
        assert!(text.contains("ghost"), "{command}: {text}");
    }
}

#[test]
fn a_file_that_is_no_saved_vm_is_named() {
    let Some(bed) = bed() else { return };
    for (name, content) in [("empty", &b""[..]), ("noise", &[0xa5; 5000][..])] {
        let path = bed.file(name, content);
        let text = bed.fails(&["restore", &path]);
        assert!(text.contains(name), "{text}");
    }
    let text = bed.fails(&["restore", "/nowhere/saved"]);
    assert!(text.contains("/nowhere/saved"), "{text}");
}

#[test]
fn garbage_on_the_migration_port_does_not_stop_it_from_receiving() {
    let Some(mut bed) = bed() else { return };
    let target = bed.host.receive("incoming").unwrap();
    let address: SocketAddr = target.strip_prefix("tcp://").unwrap().parse().unwrap();
    for round in 0..20u8 {
        let mut stream = TcpStream::connect(address).unwrap();
        let noise: Vec<u8> = (0..4096u32)
            .map(|i| (i as u8).wrapping_mul(round))
            .collect();
        // The other side may close while we still write.
        let _ = stream.write_all(&noise);
    }
    // A peer that says nothing must not keep others out.
    let _silent = TcpStream::connect(address).unwrap();
    for command in bed.host.commands() {
        assert!(!command.exited(), "the place for the VM is gone");
    }
    assert!(TcpStream::connect(address).is_ok());
    assert!(log_has_no_panic(&bed.host.log("incoming-incoming")));
}

fn log_has_no_panic(log: &Path) -> bool {
    !String::from_utf8_lossy(&std::fs::read(log).unwrap()).contains("panicked")
}
