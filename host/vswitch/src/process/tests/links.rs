use super::*;

#[test]
fn frames_pass_between_unix_ports_and_are_counted() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let switch = Running::start(
        directory,
        "a",
        vec![unix(directory, "one"), unix(directory, "two")],
    );
    let (mut one, mut two) = (device(directory, "one"), device(directory, "two"));
    two.send(&[frame(MacAddress::BROADCAST, mac(2), b"here")])
        .unwrap();
    // The switch does not know yet where "one" is: its device has not spoken.
    one.send(&[frame(mac(2), mac(1), b"hello")]).unwrap();
    assert_eq!(next(&mut two), frame(mac(2), mac(1), b"hello"));
    two.send(&[frame(mac(1), mac(2), b"hello yourself")])
        .unwrap();
    assert_eq!(next(&mut one), frame(mac(1), mac(2), b"hello yourself"));
    assert_eq!(switch.counter("one", "/counters/sent_frames"), 1);
    assert_eq!(switch.counter("one", "/counters/received_bytes"), 19);
    assert_eq!(switch.counter("two", "/counters/received_frames"), 2);
    assert_eq!(switch.counter("one", "/counters/drops/peer_gone"), 1);
    let path = directory.join("one.switch");
    drop(switch);
    assert!(!path.exists());
}

#[test]
fn a_device_with_fixed_paths_is_a_neighbour_and_loses_nothing_while_it_is_slow() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let (path, peer) = (directory.join("q.switch"), directory.join("q.device"));
    let fixed = UnixConfig {
        path: path.clone(),
        peer: Some(peer.clone()),
    };
    let ports = vec![port("q", PortKind::Unix(fixed)), unix(directory, "vm")];
    let switch = Running::start(directory, "a", ports);
    let neighbour = plain_socket(&peer).unwrap();
    let mut vm = device(directory, "vm");
    // It is reached before it has said anything, and many more frames wait than its socket holds.
    let frames: Vec<Frame> = (0..400_u16)
        .map(|n| frame(MacAddress::BROADCAST, mac(1), &n.to_be_bytes()))
        .collect();
    let mut sent = 0;
    while sent < frames.len() {
        sent += vm.send(&frames[sent..]).unwrap();
        guest::wait_readable(&vm.readiness(), Duration::from_millis(1));
        vm.receive(&mut Vec::new(), 1).unwrap();
    }
    let mut buffer = [0; 2048];
    for wanted in &frames {
        let length = neighbour.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..length], wanted.bytes);
    }
    neighbour
        .send_to(&frame(mac(1), mac(7), b"answer").bytes, &path)
        .unwrap();
    assert_eq!(next(&mut vm), frame(mac(1), mac(7), b"answer"));
    // It starts again at the same path.
    drop(neighbour);
    std::fs::remove_file(&peer).unwrap();
    vm.send(&[frame(mac(7), mac(1), b"nobody")]).unwrap();
    let neighbour = plain_socket(&peer).unwrap();
    while switch.counter("q", "/counters/drops/peer_gone") == 0
        && switch.counter("q", "/counters/sent_frames") < 401
    {}
    neighbour
        .send_to(&frame(mac(1), mac(7), b"again").bytes, &path)
        .unwrap();
    assert_eq!(next(&mut vm), frame(mac(1), mac(7), b"again"));
}

#[test]
fn another_process_takes_a_port_over_with_its_announcement() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let _switch = Running::start(
        directory,
        "a",
        vec![unix(directory, "vm"), unix(directory, "peer")],
    );
    let (mut before, mut after) = (device(directory, "vm"), device(directory, "vm"));
    let mut peer = device(directory, "peer");
    peer.announce(mac(2)).unwrap();
    before.send(&[frame(mac(2), mac(1), b"before")]).unwrap();
    assert_eq!(next(&mut peer), frame(mac(2), mac(1), b"before"));
    after.announce(mac(1)).unwrap();
    assert_eq!(next(&mut peer), announcement(mac(1)));
    peer.send(&[frame(mac(1), mac(2), b"to the new one")])
        .unwrap();
    assert_eq!(next(&mut after), frame(mac(1), mac(2), b"to the new one"));
    assert_eq!(wait_frame(&mut before, Duration::ZERO), None);
}

#[test]
fn vlans_do_not_see_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let ids = [1, 2].map(|id| VlanId::new(id).unwrap());
    let trunk = PortConfig {
        vlan: VlanMode::Trunk(ids.to_vec()),
        ..unix(directory, "trunk")
    };
    let ports = vec![
        on_vlan(unix(directory, "one"), 1),
        on_vlan(unix(directory, "two"), 2),
        on_vlan(unix(directory, "other"), 2),
        trunk,
    ];
    let _switch = Running::start(directory, "a", ports);
    let [mut one, mut two, mut other, mut trunk] =
        ["one", "two", "other", "trunk"].map(|name| device(directory, name));
    for (last, port) in [&mut one, &mut two, &mut other].into_iter().enumerate() {
        port.announce(mac(last as u8)).unwrap();
    }
    let tagged = |id: u8, text: &[u8]| Frame {
        bytes: [
            &[0xff; 6][..],
            &mac(9).0,
            &[0x81, 0, 0, id, 0x88, 0xb5],
            text,
        ]
        .concat(),
    };
    // The first datagram tells where the trunk's device is; the tag says for whom it is.
    trunk
        .send(&[tagged(1, b"one"), tagged(2, b"two"), tagged(3, b"none")])
        .unwrap();
    let of = |port: &mut UnixPort, text: &[u8]| {
        let wanted = frame(MacAddress::BROADCAST, mac(9), text);
        while next(port) != wanted {}
    };
    of(&mut one, b"one");
    of(&mut two, b"two");
    of(&mut other, b"two");
    one.send(&[frame(MacAddress::BROADCAST, mac(0), b"from one")])
        .unwrap();
    let mut got = next(&mut trunk);
    while !got.bytes.ends_with(b"from one") {
        got = next(&mut trunk);
    }
    assert_eq!(got.bytes[12..16], [0x81, 0, 0, 1]);
    for port in [&mut two, &mut other] {
        while let Some(frame) = wait_frame(port, Duration::ZERO) {
            assert!(!frame.bytes.ends_with(b"from one"));
        }
    }
}

/// Two switches joined by a tunnel, on 127.0.0.2 and 127.0.0.3.
pub(super) fn pair(
    directory: &Path,
    mut a: Vec<PortConfig>,
    mut b: Vec<PortConfig>,
) -> (Running, Running, [TunnelEndpoint; 2]) {
    let ends = [free_endpoint(2), free_endpoint(3)];
    a.push(tunnel(ends[0], ends[1]));
    b.push(tunnel(ends[1], ends[0]));
    (
        Running::start(directory, "a", a),
        Running::start(directory, "b", b),
        ends,
    )
}

#[test]
fn a_moved_station_is_reached_at_its_new_switch_with_the_next_frame() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let a = vec![unix(directory, "vm-a"), unix(directory, "client")];
    let (a, b, _) = pair(
        directory,
        a,
        vec![unix(directory, "vm-b"), unix(directory, "far")],
    );
    let [mut here, mut client, mut there, mut far] =
        ["vm-a", "client", "vm-b", "far"].map(|name| device(directory, name));
    client.announce(mac(1)).unwrap();
    here.announce(mac(5)).unwrap();
    assert_eq!(next(&mut client), announcement(mac(5)));
    far.announce(mac(6)).unwrap();
    assert_eq!(next(&mut client), announcement(mac(6)));
    assert_eq!(next(&mut here), announcement(mac(6)));
    for round in 0..10 {
        there.announce(mac(5)).unwrap();
        // Seen by both clients, so both switches have it.
        assert_eq!(next(&mut client), announcement(mac(5)));
        assert_eq!(next(&mut far), announcement(mac(5)));
        client.send(&[frame(mac(5), mac(1), &[round])]).unwrap();
        assert_eq!(next(&mut there).bytes[14..], [round]);
        far.send(&[frame(mac(5), mac(6), &[round])]).unwrap();
        assert_eq!(next(&mut there).bytes[14..], [round]);
        // Back again.
        here.announce(mac(5)).unwrap();
        assert_eq!(next(&mut client), announcement(mac(5)));
        assert_eq!(next(&mut far), announcement(mac(5)));
        assert_eq!(next(&mut there), announcement(mac(5)));
        client.send(&[frame(mac(5), mac(1), &[round])]).unwrap();
        let mut got = next(&mut here);
        while got == announcement(mac(5)) {
            got = next(&mut here);
        }
        assert_eq!(got.bytes[14..], [round]);
        far.send(&[frame(mac(5), mac(6), &[round])]).unwrap();
        assert_eq!(next(&mut here).bytes[14..], [round]);
    }
    let stations = b.ask(&ControlRequest::Fdb).unwrap();
    let station = stations
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["station"] == "02:00:00:00:00:05");
    assert_eq!(station.unwrap()["port"], "uplink");
    assert_eq!(a.counter("uplink", "/counters/drops/no_egress"), 0);
}

#[test]
fn foreign_malformed_and_oversized_packets_of_a_tunnel_are_counted_and_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let ends = [free_endpoint(2), free_endpoint(3)];
    let ports = vec![unix(directory, "vm"), tunnel(ends[0], ends[1])];
    let remote = UdpSocket::bind(ends[1].0).unwrap();
    let switch = Running::start(directory, "a", ports);
    let mut vm = device(directory, "vm");
    vm.announce(mac(1)).unwrap();
    remote.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 2048];
    let length = remote.recv(&mut buffer).unwrap();
    assert_eq!(
        buffer[..length],
        [&crate::vxlan::header(42)[..], &announcement(mac(1)).bytes].concat()
    );

    let stranger = UdpSocket::bind("127.0.0.4:0").unwrap();
    let packet = |vni, bytes: &[u8]| [&crate::vxlan::header(vni)[..], bytes].concat();
    let good = packet(42, &frame(mac(1), mac(2), b"good").bytes);
    stranger.send_to(&good, ends[0].0).unwrap();
    for bad in [
        &[][..],
        &[8; 7],
        &good[..8],
        &good[..20],
        &packet(43, &good[8..]),
        &[0xff; 3000],
    ] {
        remote.send_to(bad, ends[0].0).unwrap();
    }
    remote
        .send_to(&packet(42, &vec![2; MAX_FRAME + 1]), ends[0].0)
        .unwrap();
    remote.send_to(&good, ends[0].0).unwrap();
    assert_eq!(next(&mut vm), frame(mac(1), mac(2), b"good"));
    assert_eq!(switch.counter("uplink", "/strays"), 1);
    assert_eq!(switch.counter("uplink", "/counters/drops/encapsulation"), 3);
    assert_eq!(switch.counter("uplink", "/counters/drops/too_short"), 2);
    assert_eq!(switch.counter("uplink", "/counters/drops/too_long"), 2);
}

#[test]
fn garbage_on_a_unix_port_is_counted_and_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let switch = Running::start(
        directory,
        "a",
        vec![unix(directory, "one"), unix(directory, "two")],
    );
    let raw = UnixDatagram::unbound().unwrap();
    let path = directory.join("one.switch");
    let mut two = device(directory, "two");
    two.announce(mac(2)).unwrap();
    raw.send_to(&[1; 13], &path).unwrap();
    raw.send_to(&[], &path).unwrap();
    raw.send_to(&[4; MAX_FRAME + 1], &path).unwrap();
    raw.send_to(&[4; 9000], &path).unwrap();
    raw.send_to(&[0xff; 60], &path).unwrap();
    raw.send_to(&frame(mac(2), mac(1), b"good").bytes, &path)
        .unwrap();
    assert_eq!(next(&mut two), frame(mac(2), mac(1), b"good"));
    assert_eq!(switch.counter("one", "/counters/drops/too_short"), 1);
    assert_eq!(switch.counter("one", "/counters/drops/too_long"), 2);
    assert_eq!(switch.counter("one", "/counters/drops/bad_source"), 1);
    assert_eq!(switch.counter("one", "/counters/received_frames"), 5);
}

#[test]
fn frames_pass_to_and_from_a_tap_interface() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let interface = format!("dlt{}", std::process::id());
    let config = SwitchConfig {
        name: "a".to_owned(),
        control: None,
        ports: vec![port(
            "tap",
            PortKind::Tap(TapConfig {
                interface: interface.clone(),
            }),
        )],
        learning: LearningLimits::default(),
    };
    if let Err(error) = SwitchProcess::new(config) {
        eprintln!("SKIP: no tap interface can be made here: {error:?}");
        return;
    }
    let tap = port(
        "tap",
        PortKind::Tap(TapConfig {
            interface: interface.clone(),
        }),
    );
    let switch = Running::start(directory, "a", vec![tap, unix(directory, "vm")]);
    let mut vm = device(directory, "vm");
    vm.announce(mac(1)).unwrap();
    // The kernel takes the frame as received by its interface.
    while switch.counter("tap", "/counters/sent_frames") == 0 {}
    let statistics = format!("/sys/class/net/{interface}/statistics/rx_packets");
    match std::fs::read_to_string(&statistics) {
        Ok(text) => assert_eq!(text.trim(), "1"),
        Err(error) => eprintln!("SKIP: {statistics} cannot be read: {error}"),
    }
}
