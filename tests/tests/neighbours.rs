//! A QEMU guest on the switch's unix port and a Dunlin guest talk to each other.
#![expect(
    clippy::unwrap_used,
    reason = "a test may stop at what it cannot do without"
)]

use std::net::SocketAddrV4;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use dunlin_testbed::client::Connection;
use dunlin_testbed::guest::{self, TestGuest};
use dunlin_testbed::hosts::{self, Forward, Testbed, VmSpec};
use dunlin_testbed::process::{self, Guard};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(300);

fn start_qemu(guest: &TestGuest, local: &Path, remote: &Path, log: &Path) -> Guard {
    let log = std::fs::File::create(log).unwrap();
    let network = format!(
        "dgram,id=n0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        local.display(),
        remote.display()
    );
    let cmdline = "console=ttyS0 quiet dunlin.init=agent dunlin.ip=10.0.2.16/24 \
                   dunlin.gateway=10.0.2.1 dunlin.load=0,0";
    Guard::spawn(
        Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-machine", "q35", "-m", "256"])
            .args(["-nodefaults", "-no-reboot", "-display", "none"])
            .args(["-serial", "stdio", "-append", cmdline])
            .arg("-kernel")
            .arg(&guest.elf)
            .arg("-initrd")
            .arg(&guest.initramfs)
            .args(["-netdev", &network])
            .args(["-device", "virtio-net-pci,netdev=n0,mac=02:00:00:00:00:16"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log),
    )
    .unwrap()
}

#[test]
fn a_qemu_guest_and_a_dunlin_guest_exchange_pings_and_a_stream() {
    if !process::installed("qemu-system-x86_64") {
        eprintln!("SKIP: qemu-system-x86_64 is not installed");
        return;
    }
    let (Some(binary), Some(guest)) = (guest::binary(), guest::stock("6.1")) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let testbed = Testbed::new(&binary, &folder.path().join("bed")).unwrap();
    let (theirs, ours) = (folder.path().join("q.vm"), folder.path().join("q.switch"));
    let to_guest = Forward::to_guest(7).unwrap();
    let to_neighbour = Forward {
        outside: hosts::free_tcp_port(hosts::FIRST).unwrap(),
        to: SocketAddrV4::new([10, 0, 2, 16].into(), 7),
    };
    let port = json!({"name": "qemu", "kind": {"unix": {"path": ours, "peer": theirs}}});
    let (mut first, _second) = testbed
        .two_hosts(&[to_guest, to_neighbour], vec![port])
        .unwrap();
    let _neighbour = start_qemu(&guest, &theirs, &ours, &folder.path().join("qemu.log"));
    first
        .run(&VmSpec {
            name: "neighbour".to_owned(),
            kernel: guest.elf,
            initramfs: Some(guest.initramfs),
            cmdline: "console=ttyS0 quiet dunlin.init=agent dunlin.load=0,0".to_owned(),
            memory: "256M".to_owned(),
            cpus: 1,
            engine: "soft".to_owned(),
            disks: Vec::new(),
        })
        .unwrap();
    let open = |forward: Forward| {
        let mut connection = None;
        process::wait_until("an answer of the guest", LIMIT, || {
            connection = Connection::probe(hosts::outside(&first, forward.outside)).ok();
            Ok(connection.is_some())
        })
        .unwrap();
        connection.unwrap()
    };
    let (mut here, mut there) = (open(to_guest), open(to_neighbour));

    let (status, output) = here.run("ping -c 5 -W 5 10.0.2.16").unwrap();
    assert_eq!(status, 0, "{output}");
    assert!(output.contains("5 packets received"), "{output}");
    let (status, output) = there.run("ping -c 5 -W 5 10.0.2.15").unwrap();
    assert_eq!(status, 0, "{output}");
    assert!(output.contains("5 packets received"), "{output}");

    let (_, expected) = there.run("md5sum < /bin/busybox").unwrap();
    let (status, output) = there.run("httpd -p 5001 -h /bin").unwrap();
    assert_eq!(status, 0, "{output}");
    let (status, received) = here
        .run("wget -q -O /tmp/received http://10.0.2.16:5001/busybox; md5sum < /tmp/received")
        .unwrap();
    assert_eq!(status, 0);
    assert_eq!(received, expected, "the stream was damaged");
}
