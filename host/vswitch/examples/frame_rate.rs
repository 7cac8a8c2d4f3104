//! Measures frames per second from one device through a switch to another: unix port,
//! forwarding core, unix port, all in one process with a thread for each of the three.
//!
//! `cargo run --release -p dunlin-vswitch --example frame_rate -- [BYTES] [SECONDS]`

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use dunlin_vswitch::{
    Frame, LearningLimits, MacAddress, Port, PortConfig, PortKind, SwitchConfig, SwitchProcess,
    UnixConfig, UnixPort, VlanMode,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

type Failure = Box<dyn std::error::Error>;

/// Waits until a port is ready, 100 ms at most.
fn wait(epoll: &Epoll) -> Result<(), Failure> {
    epoll.wait(100, &mut [EpollEvent::default(); 1])?;
    Ok(())
}

fn watch(port: &UnixPort) -> Result<Epoll, Failure> {
    let epoll = Epoll::new()?;
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, port.readiness().as_raw_fd(), event)?;
    Ok(epoll)
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let length: usize = arguments.next().map_or(Ok(60), |text| text.parse())?;
    let seconds: u64 = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(format!("{name}.switch"));
    let port = |name: &str| PortConfig {
        name: name.to_owned(),
        kind: PortKind::Unix(UnixConfig {
            path: path(name),
            peer: None,
        }),
        vlan: VlanMode::default(),
        allowed_sources: Vec::new(),
    };
    let mut switch = SwitchProcess::new(SwitchConfig {
        name: "measured".to_owned(),
        control: None,
        ports: vec![port("from"), port("to")],
        learning: LearningLimits::default(),
    })?;
    let stop = EventFd::new(0)?;
    let seen = stop.try_clone()?;
    let thread = std::thread::spawn(move || switch.run(&seen));

    let (a, b) = (
        MacAddress([2, 0, 0, 0, 0, 1]),
        MacAddress([2, 0, 0, 0, 0, 2]),
    );
    let mut from = UnixPort::open("from", directory.path(), &path("from"))?;
    let mut to = UnixPort::open("to", directory.path(), &path("to"))?;
    to.announce(b)?;
    let mut bytes = [&b.0[..], &a.0, &[0x88, 0xb5]].concat();
    bytes.resize(length.max(14), 0);
    let frames = vec![Frame { bytes }; 64];

    let started = Instant::now();
    let duration = Duration::from_secs(seconds);
    let receiver = std::thread::spawn(move || {
        let epoll = watch(&to).ok()?;
        let mut into = Vec::new();
        let mut total = 0;
        while started.elapsed() < duration + Duration::from_millis(300) {
            wait(&epoll).ok()?;
            into.clear();
            total += to.receive(&mut into, 256).ok()?;
        }
        Some(total)
    });
    let epoll = watch(&from)?;
    let mut sent = 0;
    let mut unused = Vec::new();
    while started.elapsed() < duration {
        let taken = from.send(&frames)?;
        sent += taken;
        if taken < frames.len() {
            wait(&epoll)?;
            from.receive(&mut unused, 1)?;
        }
    }
    let received = receiver
        .join()
        .ok()
        .flatten()
        .ok_or("the receiver failed")?;
    stop.write(1)?;
    thread.join().map_err(|_panic| "the switch panicked")??;
    println!(
        "{length} bytes: {:.3} Mframes/s sent, {:.3} received ({:.2} Gb/s)",
        sent as f64 / duration.as_secs_f64() / 1e6,
        received as f64 / duration.as_secs_f64() / 1e6,
        received as f64 * length as f64 * 8.0 / duration.as_secs_f64() / 1e9,
    );
    Ok(())
}
