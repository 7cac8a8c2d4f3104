//! Whole switches in threads of the test, with fake guests that have a real TCP/IP stack.

mod control;
mod gateway;
mod guest;
mod links;
mod qemu;

use std::io;
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use vmm_sys_util::eventfd::EventFd;

use crate::*;

/// No wait in these tests takes so long unless something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// A switch that runs in a thread until it is dropped.
struct Running {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    control: PathBuf,
}

impl Running {
    fn start(directory: &Path, name: &str, ports: Vec<PortConfig>) -> Running {
        let control = directory.join(format!("{name}.control"));
        let config = SwitchConfig {
            name: name.to_owned(),
            control: Some(control.clone()),
            ports,
            learning: LearningLimits::default(),
        };
        let mut process = SwitchProcess::new(config).unwrap();
        let stop = EventFd::new(0).unwrap();
        let seen = stop.try_clone().unwrap();
        let thread = Some(std::thread::spawn(move || process.run(&seen).unwrap()));
        Running {
            stop,
            thread,
            control,
        }
    }

    fn ask(&self, request: &ControlRequest) -> Result<Value, ControlError> {
        ControlClient::connect(&self.control)?.ask(request)
    }

    /// A counter of the first lane of a port; 0 when the port has not dropped for that reason.
    fn counter(&self, port: &str, pointer: &str) -> u64 {
        let ports = self.ask(&ControlRequest::Counters).unwrap();
        let found = ports
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["name"] == port);
        found
            .unwrap()
            .pointer(pointer)
            .and_then(Value::as_u64)
            .unwrap_or(0)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

fn port(name: &str, kind: PortKind) -> PortConfig {
    PortConfig {
        name: name.to_owned(),
        kind,
        vlan: VlanMode::default(),
        allowed_sources: Vec::new(),
    }
}

/// A unix port at `NAME.switch`.
fn unix(directory: &Path, name: &str) -> PortConfig {
    let path = directory.join(format!("{name}.switch"));
    port(name, PortKind::Unix(UnixConfig { path, peer: None }))
}

/// The device's end of a port made by [`unix`].
fn device(directory: &Path, name: &str) -> UnixPort {
    UnixPort::open(name, directory, &directory.join(format!("{name}.switch"))).unwrap()
}

fn on_vlan(port: PortConfig, id: u16) -> PortConfig {
    PortConfig {
        vlan: VlanMode::Access(VlanId::new(id).unwrap()),
        ..port
    }
}

/// A free end of a tunnel on the loopback address 127.0.0.`last`.
fn free_endpoint(last: u8) -> TunnelEndpoint {
    let socket = UdpSocket::bind((std::net::Ipv4Addr::new(127, 0, 0, last), 0)).unwrap();
    TunnelEndpoint(socket.local_addr().unwrap())
}

fn tunnel(local: TunnelEndpoint, remote: TunnelEndpoint) -> PortConfig {
    let remotes = vec![remote];
    port(
        "uplink",
        PortKind::Tunnel(TunnelConfig {
            local,
            remotes,
            vni: 42,
        }),
    )
}

fn mac(last: u8) -> MacAddress {
    MacAddress([2, 0, 0, 0, 0, last])
}

/// A frame of an experimental type (IEEE 802) with some text.
fn frame(to: MacAddress, from: MacAddress, text: &[u8]) -> Frame {
    Frame {
        bytes: [&to.0[..], &from.0, &[0x88, 0xb5], text].concat(),
    }
}

/// Waits for the next frame.
fn wait_frame(port: &mut UnixPort, patience: Duration) -> Option<Frame> {
    let deadline = std::time::Instant::now() + patience;
    let mut frames = Vec::new();
    loop {
        port.receive(&mut frames, 1).unwrap();
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if !frames.is_empty() || left.is_zero() {
            return frames.pop();
        }
        guest::wait_readable(&port.readiness(), left);
    }
}

/// The next frame; fails the test when none comes.
fn next(port: &mut UnixPort) -> Frame {
    wait_frame(port, PATIENCE).expect("a frame")
}

/// A socket as QEMU makes it: bound, not connected.
fn plain_socket(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::bind(path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}
