use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::DhcpConfig;
use crate::poll::Poller;

const GATEWAY: [u8; 4] = [10, 0, 2, 1];

fn mac(last: u8) -> MacAddress {
    MacAddress([2, 0, 0, 0, 0, last])
}

fn gateway(forwards: Vec<ForwardConfig>) -> Gateway {
    let config = GatewayConfig {
        mac: mac(1),
        address: GATEWAY.into(),
        prefix: 24,
        dhcp: Some(DhcpConfig {
            first: Ipv4Addr::new(10, 0, 2, 1),
            last: Ipv4Addr::new(10, 0, 2, 4),
            reservations: [(mac(9), Ipv4Addr::new(10, 0, 2, 3))].into(),
            dns: Vec::new(),
            lease_seconds: 100,
        }),
        forwards,
        max_connections: 4,
    };
    let poller = Arc::new(Poller::new().unwrap());
    Gateway::new("gateway", &config, Registrar::new(&poller, 5)).unwrap()
}

/// Sends one frame and returns the answers.
fn tell(gateway: &mut Gateway, seconds: u64, frame: &[u8]) -> Vec<Vec<u8>> {
    gateway.enqueue(frame).unwrap();
    let mut out = Vec::new();
    gateway.poll(Duration::from_secs(seconds), &mut out);
    out
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    (!(folded + (folded >> 16)) as u16).to_be_bytes()
}

/// An IPv4 frame with a right header checksum.
fn ipv4(
    to: MacAddress,
    from: u8,
    addresses: [[u8; 4]; 2],
    protocol: u8,
    payload: &[u8],
) -> Vec<u8> {
    let length = (20 + payload.len() as u16).to_be_bytes();
    let mut head = vec![
        0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, protocol, 0, 0,
    ];
    head.extend(addresses.concat());
    let sum = checksum(&head);
    head[10..12].copy_from_slice(&sum);
    [&to.0[..], &mac(from).0, &[8, 0], &head, payload].concat()
}

/// A DHCP message of station `from`, without UDP checksum.
fn dhcp(from: u8, client: [u8; 4], options: &[u8]) -> Vec<u8> {
    let mut body = vec![0; 240];
    body[..4].copy_from_slice(&[1, 1, 6, 0]);
    body[4..8].copy_from_slice(b"xid!");
    body[12..16].copy_from_slice(&client);
    body[28..34].copy_from_slice(&mac(from).0);
    body[236..].copy_from_slice(&[99, 130, 83, 99]);
    body.extend(options);
    let length = (8 + body.len() as u16).to_be_bytes();
    let udp = [&[0, 68, 0, 67, length[0], length[1], 0, 0][..], &body].concat();
    ipv4(MacAddress::BROADCAST, from, [client, [255; 4]], 17, &udp)
}

const DISCOVER: [u8; 4] = [53, 1, 1, 255];

fn request(address: [u8; 4]) -> Vec<u8> {
    [&[53, 1, 3, 50, 4][..], &address, &[54, 4], &GATEWAY, &[255]].concat()
}

/// Kind and address of the only answer.
fn kind_and_address(answers: &[Vec<u8>]) -> Option<(u8, u8)> {
    let [answer] = answers else { return None };
    assert_eq!(answer[42..46], [2, 1, 6, 0]);
    assert_eq!(answer[46..50], *b"xid!");
    assert_eq!(answer[282..284], [53, 1]);
    Some((answer[284], answer[42 + 19]))
}

#[test]
fn dhcp_gives_each_station_one_address_until_none_is_left() {
    let mut gateway = gateway(Vec::new());
    let mut ask = |seconds, frame: &[u8]| kind_and_address(&tell(&mut gateway, seconds, frame));
    // 1 is the gateway's own, 3 is reserved: 2 and 4 are left.
    assert_eq!(ask(0, &dhcp(20, [0; 4], &DISCOVER)), Some((2, 2)));
    assert_eq!(
        ask(0, &dhcp(20, [0; 4], &request([10, 0, 2, 2]))),
        Some((5, 2))
    );
    assert_eq!(ask(0, &dhcp(21, [0; 4], &DISCOVER)), Some((2, 4)));
    assert_eq!(
        ask(0, &dhcp(21, [0; 4], &request([10, 0, 2, 4]))),
        Some((5, 4))
    );
    assert_eq!(ask(0, &dhcp(22, [0; 4], &DISCOVER)), None, "none left");
    assert_eq!(
        ask(0, &dhcp(20, [0; 4], &DISCOVER)),
        Some((2, 2)),
        "the same again"
    );
    assert_eq!(
        ask(0, &dhcp(9, [0; 4], &DISCOVER)),
        Some((2, 3)),
        "reserved"
    );
    // Others' and foreign addresses are refused.
    for address in [
        [10, 0, 2, 2],
        [10, 0, 2, 3],
        GATEWAY,
        [10, 0, 2, 5],
        [192, 168, 0, 1],
    ] {
        assert_eq!(
            ask(0, &dhcp(22, [0; 4], &request(address))),
            Some((6, 0)),
            "{address:?}"
        );
    }
    // An address given back or out of date is free again.
    assert_eq!(ask(0, &dhcp(20, [10, 0, 2, 2], &[53, 1, 7, 255])), None);
    assert_eq!(
        ask(0, &dhcp(22, [0; 4], &request([10, 0, 2, 2]))),
        Some((5, 2))
    );
    assert_eq!(ask(99, &dhcp(20, [0; 4], &DISCOVER)), None);
    assert_eq!(ask(100, &dhcp(20, [0; 4], &DISCOVER)), Some((2, 2)));
    // One that is found taken is not offered again.
    assert_eq!(
        ask(100, &dhcp(20, [0; 4], &request([10, 0, 2, 2]))),
        Some((5, 2))
    );
    assert_eq!(ask(100, &dhcp(20, [0; 4], &[53, 1, 4, 255])), None);
    assert_eq!(ask(100, &dhcp(20, [0; 4], &DISCOVER)), Some((2, 4)));
}

#[test]
fn dhcp_answers_where_the_client_listens() {
    let mut gateway = gateway(Vec::new());
    let offer = tell(&mut gateway, 0, &dhcp(20, [0; 4], &DISCOVER)).remove(0);
    assert_eq!(offer[..6], mac(20).0);
    assert_eq!(offer[30..34], [10, 0, 2, 2]);
    let refusal = tell(&mut gateway, 0, &dhcp(20, [0; 4], &request([1, 2, 3, 4]))).remove(0);
    assert_eq!(refusal[..6], [0xff; 6]);
    assert_eq!(refusal[30..34], [255; 4]);
    let renewal = tell(&mut gateway, 0, &dhcp(20, [10, 0, 2, 2], &[53, 1, 3, 255])).remove(0);
    assert_eq!(
        (&renewal[..6], &renewal[30..34]),
        (&mac(20).0[..], &[10, 0, 2, 2][..])
    );
    // Another server was chosen: silence.
    let other = [
        &[53, 1, 3, 50, 4, 10, 0, 2, 2, 54, 4, 10, 0, 2, 77][..],
        &[255],
    ]
    .concat();
    assert!(tell(&mut gateway, 0, &dhcp(20, [0; 4], &other)).is_empty());
    // For somebody else, through a relay, with a broken option: silence.
    let mut forged = dhcp(20, [0; 4], &DISCOVER);
    forged[42 + 33] = 77;
    assert!(tell(&mut gateway, 0, &forged).is_empty());
    let mut relayed = dhcp(20, [0; 4], &DISCOVER);
    relayed[42 + 24] = 10;
    assert!(tell(&mut gateway, 0, &relayed).is_empty());
    assert!(tell(&mut gateway, 0, &dhcp(20, [0; 4], &[53, 200, 1])).is_empty());
}

#[test]
fn only_requests_for_the_gateway_are_answered_by_arp() {
    let mut gateway = gateway(Vec::new());
    let arp = |sender: [u8; 4], target: [u8; 4]| {
        let head = [&[0xff; 6][..], &mac(7).0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
        [&head[..], &mac(7).0, &sender, &[0; 6], &target].concat()
    };
    let answer = tell(&mut gateway, 0, &arp([10, 0, 2, 7], GATEWAY)).remove(0);
    assert_eq!(answer[..6], mac(7).0);
    assert_eq!(answer[20..22], [0, 2]);
    assert_eq!(answer[22..32], [&mac(1).0[..], &GATEWAY].concat());
    assert_eq!(
        tell(&mut gateway, 0, &arp([0; 4], GATEWAY)).len(),
        1,
        "a probe"
    );
    assert!(tell(&mut gateway, 0, &arp([10, 0, 2, 7], [10, 0, 2, 8])).is_empty());
    assert!(tell(&mut gateway, 0, &arp([10, 0, 3, 7], GATEWAY)).is_empty());
    assert!(tell(&mut gateway, 0, &arp(GATEWAY, GATEWAY)).is_empty());
}

/// A TCP segment from the guest with right checksums. `head` is what follows the ports:
/// sequence number, acknowledgement, flags, window.
fn segment(gateway_port: u16, head: (u32, u32, u8, u16), payload: &[u8]) -> Vec<u8> {
    let (sequence, acknowledged, flags, window) = head;
    let mut bytes = vec![0, 7];
    bytes.extend(gateway_port.to_be_bytes());
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(acknowledged.to_be_bytes());
    bytes.extend([0x50, flags]);
    bytes.extend(window.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(payload);
    if bytes.len() % 2 != 0 {
        bytes.push(0);
    }
    let length = (bytes.len() as u16).to_be_bytes();
    let pseudo = [&[10, 0, 2, 15][..], &GATEWAY, &[0, 6], &length, &bytes].concat();
    let sum = checksum(&pseudo);
    bytes[16..18].copy_from_slice(&sum);
    ipv4(mac(1), 15, [[10, 0, 2, 15], GATEWAY], 6, &bytes)
}

/// An ARP request of the guest 10.0.2.15 for the gateway.
fn guest_arp() -> Vec<u8> {
    let head = [&mac(1).0[..], &mac(15).0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
    [&head[..], &mac(15).0, &[10, 0, 2, 15], &[0; 6], &GATEWAY].concat()
}

/// A gateway with a connection from the host on its way to the guest.
fn calling() -> (Gateway, std::net::TcpStream) {
    let listen = "127.0.0.2:0".parse().unwrap();
    let to = std::net::SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 15), 7);
    let mut gateway = gateway(vec![ForwardConfig { listen, to }]);
    let client = std::net::TcpStream::connect(gateway.forwards()[0].listen).unwrap();
    let ready = Ready {
        token: 0,
        readable: true,
        writable: false,
        broken: false,
    };
    gateway.ready(0, ready, Duration::ZERO);
    assert_eq!(gateway.connections(), 1);
    (gateway, client)
}

/// Port, sequence number and acknowledgement of the last TCP segment among `frames`.
fn last_segment(frames: &[Vec<u8>]) -> Option<(u16, u32, u32)> {
    let frame = frames
        .iter()
        .rev()
        .find(|frame| frame[12..14] == [8, 0] && frame[23] == 6)?;
    let number = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
    Some((
        u16::from_be_bytes([frame[34], frame[35]]),
        number(38),
        number(42),
    ))
}

#[test]
fn a_stack_that_fails_takes_only_its_own_connections_with_it() {
    use std::io::Read;
    let (mut gateway, mut client) = calling();
    let guest = Ipv4Addr::new(10, 0, 2, 15);
    assert_eq!(
        gateway.guarded(guest, |_, _| -> () { panic!("on purpose") }),
        None
    );
    assert_eq!(
        client.read(&mut [0]).unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
    assert_eq!((gateway.connections(), gateway.broken), (0, 1));
    let again = std::net::TcpStream::connect(gateway.forwards()[0].listen).unwrap();
    gateway.ready(
        0,
        Ready {
            token: 0,
            readable: true,
            writable: false,
            broken: false,
        },
        Duration::ZERO,
    );
    let frames = tell(&mut gateway, 0, &guest_arp());
    assert!(last_segment(&frames).is_some(), "it calls the guest");
    drop(again);
}

#[test]
fn a_guest_that_is_gone_is_asked_for_once_a_second() {
    let (mut gateway, _client) = calling();
    let mut questions = Vec::new();
    // 15 seconds: less than the gateway waits for a guest to accept.
    for step in 0..1500_u64 {
        let mut out = Vec::new();
        gateway.poll(Duration::from_millis(step * 10), &mut out);
        assert!(
            out.iter()
                .all(|frame| frame[12..14] == [8, 6] && frame[..6] == [0xff; 6])
        );
        questions.push(out.len());
    }
    // At first as often as a guest that has just started needs.
    assert!(questions[..100].iter().sum::<usize>() >= 10);
    let later: usize = questions[500..].iter().sum();
    assert!((9..=11).contains(&later), "{later}");
}

#[test]
fn a_guest_that_was_heard_is_not_asked_for_again_soon() {
    let (mut gateway, client) = calling();
    let (port, own, _) = last_segment(&tell(&mut gateway, 0, &guest_arp())).unwrap();
    tell(
        &mut gateway,
        0,
        &segment(port, (9, own.wrapping_add(1), 0x12, 1000), &[]),
    );
    std::io::Write::write_all(&mut &client, b"bytes that nobody acknowledges").unwrap();
    let number = *gateway.guests.keys().next().unwrap();
    gateway.ready(
        number,
        Ready {
            token: 0,
            readable: true,
            writable: false,
            broken: false,
        },
        Duration::ZERO,
    );
    let mut sent = 0;
    for step in 0..5000_u64 {
        let mut out = Vec::new();
        gateway.poll(Duration::from_millis(step * 10), &mut out);
        sent += out.len();
        assert!(
            out.iter().all(|frame| frame[12..14] == [8, 0]),
            "no question within 50 seconds"
        );
    }
    // Less and less often: 50 ms, 100 ms, … up to 3 s.
    assert!((10..40).contains(&sent), "{sent}");
}

/// Frames near enough to right ones that they get past the first checks.
fn nearly_right() -> impl Strategy<Value = Vec<u8>> {
    let numbers = (any::<u32>(), any::<u32>(), any::<u8>(), any::<u16>());
    let tcp = (numbers, proptest::collection::vec(any::<u8>(), 0..60))
        .prop_map(|(numbers, payload)| segment(0xc000, numbers, &payload));
    let icmp = proptest::collection::vec(any::<u8>(), 0..60)
        .prop_map(|bytes| ipv4(mac(1), 15, [[10, 0, 2, 15], GATEWAY], 1, &bytes));
    let options = proptest::collection::vec(any::<u8>(), 0..60)
        .prop_map(|options| dhcp(15, [0; 4], &[&[53, 1, 3][..], &options].concat()));
    let raw = proptest::collection::vec(any::<u8>(), 0..100);
    let typed = (prop_oneof![Just([8_u8, 0]), Just([8, 6])], raw.clone())
        .prop_map(|(kind, rest)| [&mac(1).0[..], &mac(15).0, &kind, &rest].concat());
    let whole = prop_oneof![4 => tcp, 1 => icmp, 2 => options, 1 => raw, 2 => typed];
    (whole, any::<bool>(), any::<u16>(), any::<u8>()).prop_map(|(mut bytes, spoil, at, value)| {
        if spoil && !bytes.is_empty() {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        bytes
    })
}

proptest! {
    /// Whatever arrives, while a connection is open: no panic, and only whole frames from the
    /// gateway's own address come out.
    #[test]
    fn hostile_frames_do_no_harm(frames in proptest::collection::vec(nearly_right(), 1..60)) {
        let (mut gateway, _client) = calling();
        for (step, frame) in frames.iter().enumerate() {
            gateway.enqueue(frame).unwrap();
            gateway.station_moved(mac(15));
            let mut out = Vec::new();
            let now = Duration::from_millis(step as u64 * 20);
            gateway.poll(now, &mut out);
            gateway.timeout(now);
            prop_assert_eq!(gateway.broken, 0);
            for frame in out {
                prop_assert!(frame.len() >= 14 && frame.len() <= 1514);
                prop_assert_eq!(&frame[6..12], &mac(1).0);
            }
        }
    }

    /// After a right handshake: segments whose numbers are about right, with any flags.
    #[test]
    fn hostile_segments_do_no_harm(
        segments in proptest::collection::vec(
            (-3_i32..70, -3_i32..8, any::<u8>(), any::<u16>(), 0_usize..80, any::<bool>()), 1..60)
    ) {
        use std::io::{Read, Write};
        const START: u32 = 0xffff_fff0;
        let (mut gateway, client) = calling();
        let (port, own, _) = last_segment(&tell(&mut gateway, 0, &guest_arp())).unwrap();
        let accept = segment(port, (START, own.wrapping_add(1), 0x12, 1000), &[]);
        let (_, _, acknowledged) = last_segment(&tell(&mut gateway, 0, &accept)).unwrap();
        prop_assert_eq!(acknowledged, START.wrapping_add(1));
        client.set_nonblocking(true).unwrap();
        let (mut sent, mut expected) = (own.wrapping_add(1), acknowledged);
        for (step, (sequence, answer, flags, window, length, talk)) in segments.into_iter().enumerate() {
            if talk {
                let _broken = (&client).write(b"some bytes");
            }
            let _broken = (&client).read(&mut [0; 64]);
            let numbers =
                (expected.wrapping_add_signed(sequence), sent.wrapping_add_signed(answer), flags, window);
            gateway.enqueue(&segment(port, numbers, &vec![7; length])).unwrap();
            if step % 7 == 0 {
                gateway.station_moved(mac(15));
            }
            for number in gateway.guests.keys().copied().collect::<Vec<_>>() {
                let ready = Ready { token: 0, readable: true, writable: true, broken: false };
                gateway.ready(number, ready, Duration::ZERO);
            }
            let mut out = Vec::new();
            let now = Duration::from_millis(step as u64 * 20);
            gateway.poll(now, &mut out);
            gateway.timeout(now);
            if let Some((_, sequence, acknowledged)) = last_segment(&out) {
                (sent, expected) = (sequence, acknowledged);
            }
        }
        prop_assert_eq!(gateway.broken, 0);
    }
}
