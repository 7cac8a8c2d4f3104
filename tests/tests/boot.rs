//! Stock kernels boot to init on the software CPU and power off.
#![expect(
    clippy::unwrap_used,
    reason = "a test may stop at what it cannot do without"
)]

use std::process::{Command, Stdio};
use std::time::Duration;

use dunlin_testbed::guest;
use dunlin_testbed::hosts::Testbed;
use dunlin_testbed::process::Guard;

/// How long a boot may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(240);

fn boots_and_powers_off(series: &str, unpacked: bool) {
    let (Some(binary), Some(guest)) = (guest::binary(), guest::stock(series)) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let testbed = Testbed::new(&binary, &folder.path().join("bed")).unwrap();
    let host = testbed.host("a", [127, 0, 0, 2].into()).unwrap();
    let log = folder.path().join("console");
    let console = std::fs::File::create(&log).unwrap();
    let mut command: Command = host.command(&["run", "--name", "boot", "--engine", "soft"]);
    command
        .args(["--memory", "512M", "--cpus", "1"])
        .args(["--cmdline", "console=ttyS0 dunlin.init=poweroff"])
        .arg("--kernel")
        .arg(if unpacked { &guest.elf } else { &guest.kernel })
        .arg("--initrd")
        .arg(&guest.initramfs)
        .stdout(console.try_clone().unwrap())
        .stderr(Stdio::from(console));
    let mut guard = Guard::spawn(&mut command).unwrap();
    let ended = guard.wait(LIMIT);
    let text = String::from_utf8_lossy(&std::fs::read(&log).unwrap()).into_owned();
    assert!(ended, "the guest did not power off:\n{text}");
    assert!(text.contains(&format!("Linux version {series}.")), "{text}");
    assert!(text.contains("dunlin-init: reached"), "{text}");
    assert!(!text.contains("Kernel panic"), "{text}");
    let status = guard.child().wait().unwrap();
    assert!(status.success(), "{status}\n{text}");
}

#[test]
fn kernel_6_1_boots_from_its_bzimage_and_powers_off() {
    boots_and_powers_off("6.1", false);
}

#[test]
fn kernel_6_12_boots_from_an_elf_and_powers_off() {
    boots_and_powers_off("6.12", true);
}
