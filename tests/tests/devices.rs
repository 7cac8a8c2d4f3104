//! A stock kernel drives every device; their state survives saving, restoring and a reboot.

#![expect(
    clippy::unwrap_used,
    reason = "a test may stop at what it cannot do without"
)]

use std::os::unix::fs::FileExt;
use std::time::Duration;

use dunlin_testbed::client::Connection;
use dunlin_testbed::guest;
use dunlin_testbed::hosts::{self, Forward, Host, Testbed, VmSpec};
use dunlin_testbed::process;

const VM: &str = "devices";
const LIMIT: Duration = Duration::from_secs(300);

fn connect(host: &Host, forward: Forward) -> Connection {
    let mut connection = None;
    process::wait_until("an answer of the guest", LIMIT, || {
        connection = Connection::probe(hosts::outside(host, forward.outside)).ok();
        Ok(connection.is_some())
    })
    .unwrap_or_else(|error| {
        let text = std::fs::read(host.log(VM)).unwrap_or_default();
        panic!("{error}:\n{}", String::from_utf8_lossy(&text));
    });
    connection.unwrap()
}

fn succeeds(guest: &mut Connection, command: &str) -> String {
    let (status, output) = guest.run(command).unwrap();
    assert_eq!(status, 0, "{command}: {output}");
    output
}

/// The guest reads and writes the disk, the entropy device and the paravirtual console.
fn devices_work(guest: &mut Connection, host: &Host, disk: &std::fs::File, mark: &str) {
    assert_eq!(succeeds(guest, "head -c 11 /dev/vda"), "dunlin-disk");
    succeeds(
        guest,
        &format!("printf {mark} | dd of=/dev/vda bs=512 seek=8 conv=fsync"),
    );
    let mut written = vec![0; mark.len()];
    disk.read_exact_at(&mut written, 4096).unwrap();
    assert_eq!(String::from_utf8_lossy(&written), mark);
    assert_eq!(
        succeeds(guest, "head -c 64 /dev/hwrng | wc -c").trim(),
        "64"
    );
    succeeds(guest, &format!("echo {mark}-on-hvc > /dev/hvc0"));
    process::wait_until("output of the paravirtual console", LIMIT, || {
        let text = std::fs::read(host.log(VM))?;
        Ok(String::from_utf8_lossy(&text).contains(&format!("{mark}-on-hvc")))
    })
    .unwrap();
}

#[test]
fn devices_work_before_and_after_save_restore_and_reboot() {
    let (Some(binary), Some(guest)) = (guest::binary(), guest::stock("6.1")) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.raw");
    let disk = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&image)
        .unwrap();
    disk.set_len(16 << 20).unwrap();
    disk.write_all_at(b"dunlin-disk", 0).unwrap();
    let testbed = Testbed::new(&binary, &folder.path().join("bed")).unwrap();
    let forward = Forward::to_guest(7).unwrap();
    let (mut host, _other) = testbed.two_hosts(&[forward], Vec::new()).unwrap();
    host.run(&VmSpec {
        name: VM.to_owned(),
        kernel: guest.kernel,
        initramfs: Some(guest.initramfs),
        cmdline: "console=ttyS0 quiet dunlin.init=agent dunlin.load=8,20".to_owned(),
        memory: "192M".to_owned(),
        cpus: 1,
        engine: "soft".to_owned(),
        disks: vec![image],
    })
    .unwrap();
    let mut inside = connect(&host, forward);
    devices_work(&mut inside, &host, &disk, "first");

    host.query(&["pause", VM]).unwrap();
    assert!(Connection::probe(hosts::outside(&host, forward.outside)).is_err());
    host.query(&["resume", VM]).unwrap();
    let counted: u64 = inside.ask("next").unwrap().parse().unwrap();

    let saved = folder.path().join("saved");
    host.query(&["save", VM, "--to", &saved.to_string_lossy(), "--stop"])
        .unwrap();
    let summary = host.query(&["inspect", &saved.to_string_lossy()]).unwrap();
    assert!(summary.to_string().contains(VM), "{summary}");
    host.restore(VM, &saved).unwrap();
    let mut inside = connect(&host, forward);
    let next: u64 = inside.ask("next").unwrap().parse().unwrap();
    assert_eq!(next, counted + 1, "the restored guest is another one");
    assert_eq!(inside.stats().unwrap().memory_errors, 0);
    devices_work(&mut inside, &host, &disk, "second");

    // Nothing answers once it reboots; then the counter starts anew.
    let _broken = inside.ask("run reboot -f");
    drop(inside);
    let mut inside = connect(&host, forward);
    assert_eq!(inside.ask("next").unwrap(), "0");
    devices_work(&mut inside, &host, &disk, "third");
    host.query(&["stop", VM]).unwrap();
}
