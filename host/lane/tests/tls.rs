//! TLS: who gets in, what is said to who does not, and that the records are those of everybody.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod authority;

use std::error::Error;
use std::fs;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use authority::{Authority, identity};
use dunlin_lane::stream::{
    Connector, Listener, SocketTransport, TcpConnector, TlsConnector, TlsIdentity, TlsName,
    TlsTransport, Transport, TransportError,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
};

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

fn read_some(transport: &mut dyn Transport) -> Result<Vec<u8>, TransportError> {
    let mut bytes = [0; 64];
    let count = transport.read(&mut [IoSliceMut::new(&mut bytes)], soon())?;
    Ok(bytes[..count].to_vec())
}

/// Both ends of one connection: what the source meets, and what the destination meets, when the
/// source says "hello", waits for "welcome", and hangs up.
fn meet(
    source: TlsIdentity,
    destination: TlsIdentity,
    name: TlsName,
) -> (Result<(), TransportError>, Result<(), TransportError>) {
    let listener = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.tcp_address().unwrap();
    let listener = listener.with_tls(destination);
    let server = thread::spawn(move || {
        let mut transport = listener.accept(soon()).unwrap().unwrap();
        assert_eq!(transport.traits().name, "tls");
        assert_eq!(read_some(&mut *transport)?, b"hello");
        transport.write(&[IoSlice::new(b"welcome")], soon())?;
        match read_some(&mut *transport) {
            Err(TransportError::Closed { .. }) => Ok(()),
            other => panic!("the source hung up, but {other:?}"),
        }
    });
    let source = || {
        let mut connector = TlsConnector::new(TcpConnector::new(address), source, name);
        let mut transport = connector.connect(soon())?;
        transport.write(&[IoSlice::new(b"hello")], soon())?;
        assert_eq!(read_some(&mut *transport)?, b"welcome");
        transport.shutdown(Shutdown::Both);
        Ok(())
    };
    (source(), server.join().unwrap())
}

#[test]
fn two_hosts_of_one_authority_meet() {
    let authority = Authority::new();
    for (names, name) in [
        (["127.0.0.1", "hostb"], TlsName::address(LOCAL)),
        (["127.0.0.9", "hostb"], TlsName::host("hostb").unwrap()),
    ] {
        let destination = authority.identity(&names);
        let (source, destination) = meet(authority.identity(&["hosta"]), destination, name);
        source.unwrap();
        destination.unwrap();
    }
}

#[test]
fn a_destination_of_another_authority_is_not_trusted() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let impostor = identity(&theirs.folder_trusting(&ours, &["127.0.0.1"]));
    let folder = ours.folder(&["hosta"]);
    let (source, destination) = meet(identity(&folder), impostor, TlsName::address(LOCAL));
    let source = chain(&source.unwrap_err());
    let ca = folder.join("ca.pem");
    let expected = format!("not signed by the authority in {}", ca.display());
    assert!(source.contains(&expected), "{source}");
    let destination = chain(&destination.unwrap_err());
    assert!(
        destination.contains("does not trust the authority of this side's certificate"),
        "{destination}"
    );
}

#[test]
fn a_source_of_another_authority_is_not_let_in_and_learns_why() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let stranger = identity(&theirs.folder_trusting(&ours, &["hosta"]));
    let folder = ours.folder(&["127.0.0.1"]);
    let (source, destination) = meet(stranger, identity(&folder), TlsName::address(LOCAL));
    let source = chain(&source.unwrap_err());
    assert!(
        source.contains("does not trust the authority of this side's certificate"),
        "{source}"
    );
    let destination = chain(&destination.unwrap_err());
    assert!(destination.contains("ca.pem"), "{destination}");
}

#[test]
fn a_destination_with_the_certificate_of_another_host_is_not_trusted() {
    let authority = Authority::new();
    let elsewhere = authority.identity(&["hostc", "10.1.2.3"]);
    let name = TlsName::host("hostb").unwrap();
    let (source, destination) = meet(authority.identity(&["hosta"]), elsewhere, name);
    let source = chain(&source.unwrap_err());
    assert!(source.contains("not valid for the name hostb"), "{source}");
    destination.unwrap_err();
}

#[test]
fn a_peer_that_speaks_no_tls_is_named_as_such() {
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    for (answer, expected) in [
        (
            &b"220 mail.example ready to serve\r\n"[..],
            "does not speak TLS",
        ),
        (b"", "hung up during the handshake; does it use TLS?"),
    ] {
        let listener = listener.try_clone().unwrap();
        let peer = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 5]).unwrap();
            stream.write_all(answer).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            stream.read_to_end(&mut Vec::new())
        });
        let identity = authority.identity(&["hosta"]);
        let name = TlsName::address(LOCAL);
        let mut connector = TlsConnector::new(TcpConnector::new(address), identity, name);
        let error = connector.connect(soon()).map(drop).unwrap_err();
        let error = chain(&error);
        assert!(error.contains(expected), "{error}");
        let _ = peer.join().unwrap();
    }
}

#[test]
fn a_silent_peer_costs_no_more_than_the_deadline() {
    let authority = Authority::new();
    let (out, into) = sockets();
    let mut server = TlsTransport::server(out, &authority.identity(&["127.0.0.1"])).unwrap();
    for _ in 0..2 {
        let result = server.read(
            &mut [IoSliceMut::new(&mut [0; 8])],
            Instant::now() + Duration::from_millis(5),
        );
        assert!(matches!(result, Err(TransportError::TimedOut { .. })));
    }
    drop(into);
    assert!(read_some(&mut server).is_err());
}

#[test]
fn a_folder_without_a_file_or_with_a_wrong_one_is_named() {
    let authority = Authority::new();
    let folder = authority.folder(&["hosta"]);
    let broken = |name: &str, content: Option<&str>| {
        let path = folder.join(name);
        let whole = fs::read(&path).unwrap();
        match content {
            Some(content) => fs::write(&path, content).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let error = chain(&TlsIdentity::open(&folder).unwrap_err());
        fs::write(&path, whole).unwrap();
        assert!(error.contains(&*path.to_string_lossy()), "{error}");
    };
    for name in ["ca.pem", "cert.pem", "key.pem"] {
        broken(name, None);
        broken(name, Some("nothing of use"));
    }
    let other = fs::read(authority.folder(&["hostb"]).join("key.pem")).unwrap();
    fs::write(folder.join("key.pem"), other).unwrap();
    let error = chain(&TlsIdentity::open(&folder).unwrap_err());
    assert!(error.contains("cannot be used"), "{error}");
}

fn sockets() -> (Box<dyn Transport>, Box<dyn Transport>) {
    let (out, into) = plain_sockets();
    let transport = |stream| Box::new(SocketTransport::tcp(stream).unwrap());
    (transport(out), transport(into))
}

fn plain_sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (out, listener.accept().unwrap().0)
}

/// The certificates of a folder, as any program would load them.
fn load(
    folder: &Path,
) -> (
    Arc<RootCertStore>,
    Vec<CertificateDer<'static>>,
    PrivateKeyDer<'static>,
) {
    let read = |name| CertificateDer::from_pem_file(folder.join(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(read("ca.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_file(folder.join("key.pem")).unwrap();
    (Arc::new(roots), vec![read("cert.pem")], key)
}

/// Sends `content` both ways between our end and an end that is all of rustls, and lets the
/// latter change its keys, and ask for ours, between any two parts.
fn exchange<C, S>(
    mut ours: TlsTransport,
    mut theirs: StreamOwned<C, TcpStream>,
    mut change_keys: impl FnMut(&mut C) + Send + 'static,
) where
    C: std::ops::DerefMut<Target = rustls::ConnectionCommon<S>> + Send + 'static,
    S: rustls::SideData,
{
    let content: Vec<u8> = (0..300_000_u32)
        .map(|i| (i.wrapping_mul(i) >> 7) as u8)
        .collect();
    let expected = content.clone();
    let peer = thread::spawn(move || {
        let mut received = vec![0; expected.len()];
        for (number, part) in expected.chunks(40_000).enumerate() {
            theirs.write_all(part).unwrap();
            theirs.flush().unwrap();
            change_keys(&mut theirs.conn);
            let start = number * 40_000;
            let into = &mut received[start..start + part.len()];
            theirs.read_exact(into).unwrap();
        }
        assert!(received == expected);
        theirs.conn.send_close_notify();
        theirs.flush().unwrap();
        assert_eq!(
            theirs.read(&mut [0]).unwrap(),
            0,
            "our end says that it is one"
        );
    });
    for part in content.chunks(40_000) {
        let mut got = vec![0; part.len()];
        let mut done = 0;
        while done < got.len() {
            // By two slices of odd sizes.
            let (left, right) = got[done..].split_at_mut((part.len() - done) / 3);
            let into = &mut [IoSliceMut::new(left), IoSliceMut::new(right)];
            done += ours.read(into, soon()).unwrap();
        }
        assert!(got == part);
        let mut rest = part;
        while !rest.is_empty() {
            let (left, right) = rest.split_at(rest.len() / 5);
            let from = [IoSlice::new(left), IoSlice::new(&[]), IoSlice::new(right)];
            rest = &rest[ours.write(&from, soon()).unwrap()..];
        }
    }
    let end = read_some(&mut ours);
    assert!(matches!(end, Err(TransportError::Closed { .. })), "{end:?}");
    ours.shutdown(Shutdown::Both);
    peer.join().unwrap();
}

/// What our client does, for a server of rustls' own.
fn server(authority: &Authority, protocols: &[&[u8]]) -> ServerConnection {
    let (roots, chain, key) = load(&authority.folder(&["127.0.0.1"]));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(chain, key)
        .unwrap();
    config.send_tls13_tickets = 0;
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    ServerConnection::new(Arc::new(config)).unwrap()
}

#[test]
fn a_server_that_names_no_protocol_is_left_alone() {
    let authority = Authority::new();
    let (out, into) = plain_sockets();
    let server = server(&authority, &[]);
    let theirs = std::thread::spawn(move || {
        let mut stream = StreamOwned::new(server, into);
        let _ended = stream.read(&mut [0; 16]);
    });
    let below = Box::new(SocketTransport::tcp(out).unwrap());
    let identity = authority.identity(&["hosta"]);
    let mut ours = TlsTransport::client(below, &identity, TlsName::address(LOCAL)).unwrap();
    let error = ours.handshake(Instant::now() + Duration::from_secs(5));
    let text = format!("{:?}", error.unwrap_err());
    assert!(text.contains("OtherProtocol"), "{text}");
    theirs.join().unwrap();
}

#[test]
fn our_client_understands_another_server_and_changes_of_keys() {
    let authority = Authority::new();
    let (out, into) = plain_sockets();
    let server = server(&authority, &[b"dunlin"]);
    let below = Box::new(SocketTransport::tcp(out).unwrap());
    let identity = authority.identity(&["hosta"]);
    let ours = TlsTransport::client(below, &identity, TlsName::address(LOCAL)).unwrap();
    exchange(ours, StreamOwned::new(server, into), |connection| {
        connection.refresh_traffic_keys().unwrap();
    });
}

#[test]
fn our_server_understands_another_client_and_changes_of_keys() {
    let authority = Authority::new();
    let (roots, chain, key) = load(&authority.folder(&["hosta"]));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"dunlin".to_vec()];
    let (out, into) = plain_sockets();
    let client = ClientConnection::new(Arc::new(config), LOCAL.into()).unwrap();
    let below = Box::new(SocketTransport::tcp(into).unwrap());
    let identity = authority.identity(&["127.0.0.1"]);
    let ours = TlsTransport::server(below, &identity).unwrap();
    exchange(ours, StreamOwned::new(client, out), |connection| {
        connection.refresh_traffic_keys().unwrap();
    });
}
