use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr};

use super::guest::{Guest, echo};
use super::links::pair;
use super::*;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

pub(super) fn gateway(forward_to: Option<u16>) -> PortConfig {
    let forwards = forward_to.into_iter().map(|port| ForwardConfig {
        listen: "127.0.0.2:0".parse().unwrap(),
        to: SocketAddrV4::new(GUEST, port),
    });
    port(
        "gateway",
        PortKind::Gateway(GatewayConfig {
            mac: mac(1),
            address: Ipv4Addr::new(10, 0, 2, 1),
            prefix: 24,
            dhcp: Some(DhcpConfig {
                first: Ipv4Addr::new(10, 0, 2, 50),
                last: Ipv4Addr::new(10, 0, 2, 60),
                reservations: [(mac(15), GUEST)].into(),
                dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
                lease_seconds: 600,
            }),
            forwards: forwards.collect(),
            max_connections: 8,
        }),
    )
}

/// Where the switch's only forward listens.
fn listening(switch: &Running) -> SocketAddr {
    let config: SwitchConfig =
        serde_json::from_value(switch.ask(&ControlRequest::Config).unwrap()).unwrap();
    let mut forwards = config.ports.iter().filter_map(|port| match &port.kind {
        PortKind::Gateway(gateway) => gateway.forwards.first().copied(),
        _ => None,
    });
    forwards.next().unwrap().listen
}

fn connect(switch: &Running) -> TcpStream {
    let stream = TcpStream::connect(listening(switch)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A switch with a gateway that leads to port 7 of a guest, which `serve` serves while `test` runs.
fn with_guest(
    serve: impl FnMut(&mut tcp::Socket<'static>) + Send,
    sockets: usize,
    test: impl FnOnce(&Running),
) {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let switch = Running::start(
        directory,
        "a",
        vec![unix(directory, "vm"), gateway(Some(7))],
    );
    let mut guest = Guest::new(device(directory, "vm"), mac(15), Some(GUEST));
    for _ in 0..sockets {
        guest.listen(7);
    }
    guest.port.announce(mac(15)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| guest.serve(&stop, serve));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&switch)));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Pings the gateway until it answers.
fn ping(guest: &mut Guest) -> bool {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(77)).unwrap();
    let request = Icmpv4Repr::EchoRequest {
        ident: 77,
        seq_no: 1,
        data: b"are you there?",
    };
    let room = socket
        .send(request.buffer_len(), Ipv4Addr::new(10, 0, 2, 1).into())
        .unwrap();
    request.emit(
        &mut Icmpv4Packet::new_unchecked(room),
        &ChecksumCapabilities::default(),
    );
    let handle = guest.sockets.add(socket);
    guest.run(PATIENCE, |guest| {
        let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(handle);
        let Ok((bytes, from)) = socket.recv() else {
            return false;
        };
        let packet = Icmpv4Packet::new_checked(bytes).unwrap();
        let reply = Icmpv4Repr::parse(&packet, &ChecksumCapabilities::default()).unwrap();
        let wanted = Icmpv4Repr::EchoReply {
            ident: 77,
            seq_no: 1,
            data: b"are you there?",
        };
        assert_eq!((reply, from), (wanted, Ipv4Addr::new(10, 0, 2, 1).into()));
        true
    })
}

#[test]
fn guests_of_both_switches_reach_the_gateway() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let a = vec![unix(directory, "near"), gateway(None)];
    let (_a, _b, _) = pair(directory, a, vec![unix(directory, "far")]);
    for (name, last) in [("near", 15), ("far", 16)] {
        let address = Ipv4Addr::new(10, 0, 2, last);
        let mut guest = Guest::new(device(directory, name), mac(last), Some(address));
        assert!(ping(&mut guest), "{name}");
    }
}

#[test]
fn dhcp_gives_reservations_and_addresses_of_the_pool_to_a_real_client() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let names = ["one", "two", "three"];
    let mut ports = vec![gateway(None)];
    ports.extend(names.map(|name| unix(directory, name)));
    let switch = Running::start(directory, "a", ports);
    for (name, last, wanted) in [("one", 15, 15), ("two", 16, 50), ("three", 17, 51)] {
        let mut guest = Guest::new(device(directory, name), mac(last), None);
        let handle = guest.sockets.add(dhcpv4::Socket::new());
        let mut got = None;
        assert!(guest.run(PATIENCE, |guest| {
            if let Some(dhcpv4::Event::Configured(config)) =
                guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll()
            {
                assert_eq!(config.router, Some(Ipv4Addr::new(10, 0, 2, 1)));
                assert_eq!(config.dns_servers[..], [Ipv4Addr::new(9, 9, 9, 9)]);
                got = Some(config.address);
            }
            got.is_some()
        }));
        let got = got.unwrap();
        assert_eq!(
            (got.address(), got.prefix_len()),
            (Ipv4Addr::new(10, 0, 2, wanted), 24)
        );
    }
    let ports = switch.ask(&ControlRequest::Counters).unwrap();
    assert_eq!(
        ports[0]["gateway"]["leases"]["02:00:00:00:00:11"],
        "10.0.2.51"
    );
}

#[test]
fn megabytes_come_back_whole_through_a_forward() {
    with_guest(echo(7), 1, |switch| {
        let mut stream = connect(switch);
        let total = 8 << 20;
        let pattern = |position: usize| (position.wrapping_mul(2_654_435_761) >> 13) as u8;
        let mut sender = stream.try_clone().unwrap();
        let started = Instant::now();
        let writer = std::thread::spawn(move || {
            let bytes: Vec<u8> = (0..total).map(pattern).collect();
            sender.write_all(&bytes).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        writer.join().unwrap();
        assert_eq!(back.len(), total);
        assert!(
            back.iter()
                .enumerate()
                .all(|(position, byte)| *byte == pattern(position))
        );
        println!("{} MiB each way in {:?}", total >> 20, started.elapsed());
    });
}

#[test]
fn small_requests_are_not_held_back() {
    with_guest(echo(7), 1, |switch| {
        let mut stream = connect(switch);
        let mut buffer = [0; 16];
        stream.write_all(b"first").unwrap();
        stream.read_exact(&mut buffer[..5]).unwrap();
        let mut times = Vec::new();
        for round in 0..200_u8 {
            let started = Instant::now();
            // Two writes: with Nagle's algorithm the second would wait for an acknowledgement.
            stream.write_all(&[round]).unwrap();
            stream.write_all(&[round, round]).unwrap();
            stream.read_exact(&mut buffer[..3]).unwrap();
            assert_eq!(buffer[..3], [round; 3]);
            times.push(started.elapsed());
        }
        times.sort_unstable();
        println!(
            "request and answer: median {:?}, worst {:?}",
            times[100], times[199]
        );
        // Delayed acknowledgements would make it 40 ms or more each.
        assert!(times[100] < Duration::from_millis(20), "{:?}", times[100]);
    });
}

#[test]
fn an_end_of_one_direction_leaves_the_other_open() {
    // The guest answers only when it has seen the end.
    let mut count = 0;
    let serve = move |socket: &mut tcp::Socket<'static>| {
        while socket.can_recv() {
            count += socket.recv(|bytes| (bytes.len(), bytes.len())).unwrap();
        }
        if socket.state() == tcp::State::CloseWait {
            socket.send_slice(count.to_string().as_bytes()).unwrap();
            socket.close();
        }
    };
    with_guest(serve, 1, |switch| {
        let mut stream = connect(switch);
        stream.write_all(&[1; 100_000]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "100000");
    });
}

#[test]
fn resets_pass_in_both_directions() {
    let (told, heard) = std::sync::mpsc::channel();
    // The guest resets who says "r", answers others, and tells when a connection is over.
    let mut was_open = false;
    let serve = move |socket: &mut tcp::Socket<'static>| {
        let open = socket.may_send();
        let is_over = was_open && !open && socket.state() == tcp::State::Closed;
        was_open = open;
        if socket.can_recv() {
            match socket.recv(|bytes| (bytes.len(), bytes[0])).unwrap() {
                b'r' => socket.abort(),
                other => drop(socket.send_slice(&[other])),
            }
        } else if !socket.is_open() {
            socket.listen(7).unwrap();
        }
        if is_over {
            told.send(()).unwrap();
        }
    };
    with_guest(serve, 1, |switch| {
        let mut stream = connect(switch);
        stream.write_all(b"r").unwrap();
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        heard.recv_timeout(PATIENCE).unwrap();

        let mut stream = connect(switch);
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        crate::socket_option::reset_on_close(std::os::fd::AsFd::as_fd(&stream)).unwrap();
        drop(stream);
        heard.recv_timeout(PATIENCE).unwrap();
        while switch.counter("gateway", "/gateway/connections") > 0 {}
    });
}

#[test]
fn a_port_that_nobody_serves_is_a_reset() {
    with_guest(
        |_| (),
        0,
        |switch| {
            let mut stream = connect(switch);
            let error = stream.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        },
    );
}

#[test]
fn connections_beyond_the_limit_wait_for_their_turn() {
    with_guest(echo(7), 12, |switch| {
        let mut first: Vec<_> = (0..8).map(|_| connect(switch)).collect();
        for stream in &mut first {
            stream.write_all(b"a").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
        let mut late = connect(switch);
        late.write_all(b"b").unwrap();
        assert_eq!(switch.counter("gateway", "/gateway/connections"), 8);
        drop(first.pop());
        let mut byte = [0];
        late.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"b");
    });
}

#[test]
fn a_reader_that_stops_stops_the_writer_and_nothing_is_lost() {
    with_guest(echo(7), 1, |switch| {
        let mut stream = connect(switch);
        stream.set_nonblocking(true).unwrap();
        let chunk: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        let mut sent = 0;
        let mut last = Instant::now();
        // Full when nothing moves for a while: bounded buffers, so that it must come to that.
        while last.elapsed() < Duration::from_millis(300) {
            match stream.write(&chunk[sent % 256..][..4096]) {
                Ok(length) => {
                    sent += length;
                    last = Instant::now();
                }
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            assert!(sent < 64 << 20, "somebody takes it all");
        }
        stream.set_nonblocking(false).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert_eq!(back.len(), sent);
        assert!(
            back.iter()
                .enumerate()
                .all(|(position, byte)| *byte == position as u8)
        );
    });
}

#[test]
fn a_connection_follows_its_guest_to_the_other_switch() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let a = vec![unix(directory, "vm-a"), gateway(Some(7))];
    let (a, _b, _) = pair(directory, a, vec![unix(directory, "vm-b")]);
    let mut guest = Guest::new(device(directory, "vm-a"), mac(15), Some(GUEST));
    guest.listen(7);
    guest.port.announce(mac(15)).unwrap();
    let mut stream = connect(&a);
    let mut serve = echo(7);
    let mut turn = |guest: &mut Guest, stream: &mut TcpStream, byte: u8| {
        let mut answer = [0];
        stream.set_nonblocking(true).unwrap();
        assert!(guest.run(PATIENCE, |guest| {
            let (handle, _) = guest.sockets.iter().next().unwrap();
            serve(guest.tcp(handle));
            stream.read(&mut answer).is_ok_and(|length| length == 1)
        }));
        stream.set_nonblocking(false).unwrap();
        assert_eq!(answer, [byte]);
    };
    let mut worst = Duration::ZERO;
    for round in 0..6_u8 {
        stream.write_all(&[round]).unwrap();
        turn(&mut guest, &mut stream, round);
        // The guest stops; a request is sent to where it was, and again and again.
        stream.write_all(&[round + 100]).unwrap();
        let sent = a.counter("vm-a", "/counters/sent_frames")
            + a.counter("uplink", "/counters/sent_frames");
        let blackout = Instant::now();
        while a.counter("vm-a", "/counters/sent_frames")
            + a.counter("uplink", "/counters/sent_frames")
            < sent + 3
        {
            assert!(blackout.elapsed() < PATIENCE);
        }
        // It goes on at the other switch.
        let name = if round % 2 == 0 { "vm-b" } else { "vm-a" };
        guest.port = device(directory, name);
        guest.port.announce(mac(15)).unwrap();
        let resumed = Instant::now();
        turn(&mut guest, &mut stream, round + 100);
        worst = worst.max(resumed.elapsed());
        println!(
            "blackout {:?}, then {:?}",
            resumed - blackout,
            resumed.elapsed()
        );
    }
    // Without the jump it would be the next retransmission: as long again as the blackout was.
    assert!(worst < Duration::from_millis(300), "{worst:?}");
}

#[test]
fn a_stream_stays_whole_while_its_guest_moves_to_and_fro() {
    const MOVES: usize = 20;
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let a = vec![unix(directory, "vm-a"), gateway(Some(7))];
    let (a, _b, _) = pair(directory, a, vec![unix(directory, "vm-b")]);
    let mut guest = Guest::new(device(directory, "vm-a"), mac(15), Some(GUEST));
    guest.listen(7);
    guest.port.announce(mac(15)).unwrap();
    let total = 8 << 20;
    let pattern = |position: usize| (position.wrapping_mul(2_654_435_761) >> 13) as u8;
    let mut stream = connect(&a);
    let mut sender = stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        let bytes: Vec<u8> = (0..total).map(pattern).collect();
        sender.write_all(&bytes).unwrap();
        sender.shutdown(Shutdown::Write).unwrap();
    });
    let reader = std::thread::spawn(move || {
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        back
    });
    let (mut moves, mut echoed, mut serve) = (0, 0, echo(7));
    assert!(guest.run(PATIENCE, |guest| {
        let (handle, _) = guest.sockets.iter().next().unwrap();
        let waiting = guest.tcp(handle).recv_queue();
        serve(guest.tcp(handle));
        echoed += waiting - guest.tcp(handle).recv_queue();
        // What is on its way to the old place is lost.
        if moves < MOVES && echoed >= (moves + 1) * total / (MOVES + 2) {
            moves += 1;
            let name = if moves % 2 == 1 { "vm-b" } else { "vm-a" };
            guest.port = device(directory, name);
            guest.port.announce(mac(15)).unwrap();
        }
        reader.is_finished()
    }));
    writer.join().unwrap();
    let back = reader.join().unwrap();
    assert_eq!((back.len(), moves), (total, MOVES));
    assert!(
        back.iter()
            .enumerate()
            .all(|(position, byte)| *byte == pattern(position))
    );
}

#[test]
fn forwards_are_added_and_taken_back_while_the_switch_runs() {
    with_guest(echo(7), 2, |switch| {
        let forward = ForwardConfig {
            listen: "127.0.0.3:0".parse().unwrap(),
            to: SocketAddrV4::new(GUEST, 7),
        };
        let result = switch
            .ask(&ControlRequest::AddForward {
                gateway: None,
                forward,
            })
            .unwrap();
        let listen: SocketAddr = serde_json::from_value(result["listen"].clone()).unwrap();
        let mut stream = TcpStream::connect(listen).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        let remove = ControlRequest::RemoveForward {
            gateway: None,
            listen,
        };
        switch.ask(&remove).unwrap();
        assert!(stream.read(&mut [0]).is_err(), "reset");
        assert!(TcpStream::connect(listen).is_err());
        assert!(switch.ask(&remove).is_err());
        let mut other = connect(switch);
        other.write_all(b"x").unwrap();
        other.read_exact(&mut [0]).unwrap();
    });
}
