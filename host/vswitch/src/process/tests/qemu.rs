//! A QEMU guest as a neighbour, when QEMU and its network boot ROM are installed: the ROM asks
//! for an address by DHCP through a `unix` port.

use std::process::{Command, Stdio};
use std::time::Instant;

use super::gateway::gateway;
use super::*;

const ROM: &str = "/usr/lib/ipxe/qemu/efi-virtio.rom";

#[test]
fn the_network_boot_of_a_qemu_guest_gets_an_address_from_the_gateway() {
    let found = Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if !found.is_ok_and(|status| status.success()) || !Path::new(ROM).exists() {
        eprintln!("SKIP: qemu-system-x86_64 or {ROM} is not installed");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let (path, peer) = (directory.join("q.switch"), directory.join("q.device"));
    let fixed = UnixConfig {
        path: path.clone(),
        peer: Some(peer.clone()),
    };
    let ports = vec![
        gateway(None),
        port("q", PortKind::Unix(fixed)),
        unix(directory, "watch"),
    ];
    let switch = Running::start(directory, "a", ports);
    let netdev = format!(
        "dgram,id=n0,local.type=unix,local.path={},remote.type=unix,remote.path={}",
        peer.display(),
        path.display()
    );
    let card = format!("virtio-net-pci,netdev=n0,bootindex=1,mac={}", mac(15));
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-machine",
            "q35,accel=tcg",
            "-m",
            "256",
            "-display",
            "none",
            "-nodefaults",
            "-boot",
            "n",
        ])
        .args(["-netdev", &netdev, "-device", &card])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    // Offers and answers go to the guest alone; its two broadcasts are seen by everybody.
    let mut watch = device(directory, "watch");
    watch.announce(mac(9)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(90);
    let mut address = Value::Null;
    while address.is_null() && Instant::now() < deadline && qemu.try_wait().unwrap().is_none() {
        wait_frame(&mut watch, Duration::from_secs(1));
        let ports = switch.ask(&ControlRequest::Counters).unwrap();
        address = ports[0]["gateway"]["leases"]["02:00:00:00:00:0f"].clone();
    }
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    let counters = switch.ask(&ControlRequest::Counters).unwrap();
    assert_eq!(address, "10.0.2.15", "{counters:#}");
}
