//! Moves the tests' guest again and again over TCP loopback, and prints what it took.
//!
//! `cargo run --release -p dunlin-migration --example measure -- [MOVES] [RAM_MIB] [DIRTY_MIB_S]`
//!
//! The guest's pages are all non-zero in half of RAM. Raw loopback is measured in the same run:
//! one thread writes 512 KiB buffers, another reads them into memory that was never touched, as a
//! destination's.

#![expect(clippy::unwrap_used, reason = "a failed step ends the measurement")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use dunlin_guest::{Memory, PageIndex};
use dunlin_migration::transport::{Listener, TcpConnector};
use dunlin_migration::{MigrationOptions, MigrationReport, Source};
use support::{Conduct, Load, SourceSide, wait_on};

fn main() {
    let mut arguments = std::env::args()
        .skip(1)
        .map(|text| text.parse::<u64>().unwrap());
    let moves = arguments.next().unwrap_or(100);
    let ram = arguments.next().unwrap_or(512) << 20;
    let rate = arguments.next().unwrap_or(50) << 20;
    let mut raw = Vec::new();
    let mut reports = Vec::new();
    for number in 0..moves {
        if number % 3 == 0 {
            raw.push(raw_loopback());
        }
        reports.push(one_move(ram, rate));
    }
    print("raw loopback, MB/s", raw);
    let of = |value: fn(&MigrationReport) -> f64| reports.iter().map(value).collect::<Vec<_>>();
    print(
        "first round, MB/s of pages",
        of(|r| (r.rounds[0].pages * 4096) as f64 / r.rounds[0].duration_ms / 1e3),
    );
    print("total, ms", of(|r| r.total_ms));
    print("rounds", of(|r| r.rounds.len() as f64));
    print("blackout at the source, ms", of(|r| r.blackout_ms.unwrap()));
    print(
        "switch-overs taken back",
        of(|r| f64::from(r.switch_overs_aborted)),
    );
    print(
        "longest pause taken back, ms",
        of(|r| r.aborted_pauses_ms.iter().copied().fold(0.0, f64::max)),
    );
    print(
        "bytes sent / RAM",
        of(|r| r.bytes_sent as f64 / r.ram_bytes as f64),
    );
    print(
        "CPU, source, s/GiB sent",
        of(|r| r.cpu_seconds / (r.bytes_sent as f64 / f64::from(1 << 30))),
    );
    print(
        "CPU, destination, s/GiB sent",
        of(|r| r.destination.unwrap().cpu_seconds / (r.bytes_sent as f64 / f64::from(1 << 30))),
    );
    let over = reports
        .iter()
        .filter(|r| r.blackout_ms.unwrap() > r.downtime_limit_ms * 1.1)
        .count();
    println!("over the limit by more than 10 %: {over} of {moves}");
}

fn one_move(ram: u64, rate: u64) -> MigrationReport {
    let listener = Listener::tcp(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let mut connector = TcpConnector::new(listener.tcp_address().unwrap());
    let conduct = Conduct {
        trusting: true,
        ..Conduct::default()
    };
    let waiting = wait_on(listener, conduct);
    let mut machine = SourceSide::running(Load {
        ram,
        working_set: 16_384,
        pages_per_second: rate as f64 / 4096.0,
    });
    let options = MigrationOptions {
        downtime_limit: Duration::from_millis(50),
        ..MigrationOptions::default()
    };
    let report = Source::new(options)
        .run(&mut machine, &mut connector)
        .unwrap();
    let arrival = waiting.arrival();
    arrival.machine.assert_runs_whole();
    arrival.witness.stop();
    report
}

fn raw_loopback() -> f64 {
    const BYTES: usize = 512 << 20;
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let writer = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        let buffer = vec![1; 512 << 10];
        for _ in 0..BYTES / buffer.len() {
            stream.write_all(&buffer).unwrap();
        }
    });
    let (mut stream, _) = listener.accept().unwrap();
    let memory = Memory::new(BYTES as u64).unwrap();
    let start = memory.host_page(PageIndex(0)).unwrap();
    #[expect(unsafe_code, reason = "straight into guest RAM, as lanes do")]
    // SAFETY: the mapping is `BYTES` long, `memory` lives to the end, and nobody else has it.
    let all = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), BYTES) };
    let begun = Instant::now();
    for chunk in all.chunks_mut(512 << 10) {
        stream.read_exact(chunk).unwrap();
    }
    let rate = BYTES as f64 / begun.elapsed().as_secs_f64() / 1e6;
    writer.join().unwrap();
    rate
}

fn print(name: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    println!(
        "{name:34} median {:10.2}  p99 {:10.2}  max {:10.2}  min {:10.2}",
        at(0.5),
        at(0.99),
        at(1.0),
        at(0.0)
    );
}
