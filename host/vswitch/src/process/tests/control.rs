use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use super::*;

#[test]
fn ports_come_and_go_while_the_switch_runs() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let switch = Running::start(directory, "a", vec![unix(directory, "one")]);
    let mut one = device(directory, "one");
    one.announce(mac(1)).unwrap();
    let add = ControlRequest::AddPort {
        port: unix(directory, "two"),
    };
    switch.ask(&add).unwrap();
    let refused = switch.ask(&add).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "failed to add port \"two\": there is one of this name"
    );
    let mut two = device(directory, "two");
    two.send(&[frame(mac(1), mac(2), b"new")]).unwrap();
    assert_eq!(next(&mut one), frame(mac(1), mac(2), b"new"));
    let config: SwitchConfig =
        serde_json::from_value(switch.ask(&ControlRequest::Config).unwrap()).unwrap();
    assert_eq!(config.ports.len(), 2);
    let remove = ControlRequest::RemovePort {
        name: "two".to_owned(),
    };
    switch.ask(&remove).unwrap();
    assert!(!directory.join("two.switch").exists());
    assert!(switch.ask(&remove).is_err());
    assert!(
        switch
            .ask(&ControlRequest::Fdb)
            .unwrap()
            .as_array()
            .unwrap()
            .len()
            == 1
    );
    // What cannot be opened leaves no trace.
    let mut bad = unix(directory, "three");
    bad.kind = PortKind::Unix(UnixConfig {
        path: directory.join("none/three"),
        peer: None,
    });
    let refused = switch
        .ask(&ControlRequest::AddPort { port: bad })
        .unwrap_err()
        .to_string();
    assert!(refused.contains("none/three\": No such file"), "{refused}");
    switch
        .ask(&ControlRequest::AddPort {
            port: unix(directory, "three"),
        })
        .unwrap();
}

#[test]
fn garbage_on_the_control_socket_is_answered_or_cut_and_the_switch_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let switch = Running::start(directory, "a", vec![unix(directory, "one")]);
    let open = || {
        let stream = UnixStream::connect(&switch.control).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        BufReader::new(stream)
    };
    let mut client = open();
    let mut line = String::new();
    let bad: [&[u8]; 6] = [
        b"\n",
        b"{}\n",
        b"\xff\xfe\n",
        b"{\"op\":\"none\"}\n",
        b"[[[[\n",
        b"null\n",
    ];
    for bad in bad {
        client.get_mut().write_all(bad).unwrap();
        line.clear();
        client.read_line(&mut line).unwrap();
        assert!(
            line.starts_with("{\"error\":\"failed to read the request"),
            "{line}"
        );
    }
    // Requests in pieces and several at a time.
    client
        .get_mut()
        .write_all(b"{\"op\":\"fdb\"}\n{\"op\":\"cou")
        .unwrap();
    client.get_mut().write_all(b"nters\"}\n").unwrap();
    for _ in 0..2 {
        line.clear();
        client.read_line(&mut line).unwrap();
        assert!(line.contains("\"ok\":true"), "{line}");
    }
    // A line without an end: the client is cut.
    let mut endless = open();
    let _cut_early = endless.get_mut().write_all(&vec![b'x'; 200 << 10]);
    line.clear();
    assert_eq!(endless.read_line(&mut line).unwrap_or(0), 0);
    // More clients than it serves: the others are cut, and served when there is room.
    let crowd: Vec<_> = (0..40).map(|_| open()).collect();
    drop(crowd);
    drop(client);
    let patience = std::time::Instant::now() + PATIENCE;
    while switch.ask(&ControlRequest::Fdb).is_err() {
        assert!(std::time::Instant::now() < patience);
    }
}

#[test]
fn shutdown_ends_the_process_and_removes_its_sockets() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut switch = Running::start(directory, "a", vec![unix(directory, "one")]);
    assert!(switch.ask(&ControlRequest::Shutdown).unwrap().is_null());
    let thread = switch.thread.take().unwrap();
    thread.join().unwrap();
    assert!(!switch.control.exists());
    assert!(!directory.join("one.switch").exists());
    switch.thread = Some(std::thread::spawn(|| ()));
}

#[test]
fn a_path_that_a_living_switch_uses_is_refused_and_one_left_over_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let config = SwitchConfig {
        name: "b".to_owned(),
        control: None,
        ports: vec![unix(directory, "one")],
        learning: LearningLimits::default(),
    };
    let left_over = UnixDatagram::bind(directory.join("one.switch")).unwrap();
    assert!(matches!(
        SwitchProcess::new(config.clone()),
        Err(SwitchError::Io { .. })
    ));
    drop(left_over);
    assert!(SwitchProcess::new(config).is_ok());
}

#[test]
fn configurations_that_cannot_work_are_refused_with_the_reason() {
    let kinds = [
        r#"{"tunnel":{"local":"127.0.0.2:1","remotes":["127.0.0.3"],"vni":16777216}}"#,
        r#"{"tunnel":{"local":"127.0.0.2:1","remotes":[],"vni":1}}"#,
        r#"{"tunnel":{"local":"127.0.0.2:1","remotes":["::1"],"vni":1}}"#,
        r#"{"tunnel":{"local":"127.0.0.2:1","remotes":["127.0.0.3","127.0.0.3"],"vni":1}}"#,
        r#"{"tap":{"interface":"a/b"}}"#,
        r#"{"tap":{"interface":"abcdefghijklmnop"}}"#,
        r#"{"gateway":{"mac":"ff:ff:ff:ff:ff:ff","address":"10.0.2.1","prefix":24}}"#,
        r#"{"gateway":{"mac":"02:00:00:00:00:01","address":"10.0.2.0","prefix":24}}"#,
        r#"{"gateway":{"mac":"02:00:00:00:00:01","address":"10.0.2.1","prefix":0}}"#,
        r#"{"gateway":{"mac":"02:00:00:00:00:01","address":"10.0.2.1","prefix":24,
            "forwards":[{"listen":"127.0.0.2:0","to":"10.0.3.1:7"}]}}"#,
        r#"{"gateway":{"mac":"02:00:00:00:00:01","address":"10.0.2.1","prefix":24,
            "dhcp":{"first":"10.0.2.9","last":"10.0.2.8"}}}"#,
        r#"{"gateway":{"mac":"02:00:00:00:00:01","address":"10.0.2.1","prefix":24,
            "dhcp":{"first":"10.0.2.2","last":"10.0.2.8",
                    "reservations":{"02:00:00:00:00:05":"10.0.2.1"}}}}"#,
    ];
    for kind in kinds {
        let text = format!(r#"{{"name":"a","ports":[{{"name":"p","kind":{kind}}}]}}"#);
        let config: SwitchConfig = serde_json::from_str(&text).unwrap();
        let error = SwitchProcess::new(config).unwrap_err();
        assert!(
            error.to_string().starts_with("failed to use port \"p\": "),
            "{kind}: {error}"
        );
    }
}
