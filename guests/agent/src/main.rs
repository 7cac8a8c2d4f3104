//! The program inside the test guest: a counter over TCP, a memory writer, a heartbeat.
//!
//! Whoever moves the guest asks it afterwards what it saw: whether the counter skipped, whether
//! a written page lost its content, and how long the longest moment was in which nothing ran.
//! Linked statically and without dependencies, so that an initramfs needs nothing else.
//!
//! The service speaks lines: `next` answers the counter and advances it; `echo TEXT` answers
//! `TEXT`; `stats` answers one JSON object; `reset` forgets the gaps seen so far;
//! `load MIB RATE` sets working set (MiB) and dirty rate (MiB/s) of the writer;
//! `run COMMAND` answers what a shell command printed, as one JSON object.

mod heartbeat;
mod service;
mod writer;

use std::sync::Arc;

/// What the command line asks for.
struct Arguments {
    port: u16,
    working_set_mib: u64,
    rate_mib: u64,
}

fn arguments() -> Result<Arguments, String> {
    let mut parsed = Arguments {
        port: 7,
        working_set_mib: 0,
        rate_mib: 0,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words
            .next()
            .ok_or_else(|| format!("option \"{word}\" lacks its value"))?;
        let number: u64 = value
            .parse()
            .map_err(|error| format!("value \"{value}\" of \"{word}\": {error}"))?;
        match word.as_str() {
            "--port" => {
                parsed.port = number
                    .try_into()
                    .map_err(|error| format!("port {number}: {error}"))?;
            }
            "--working-set" => parsed.working_set_mib = number,
            "--rate" => parsed.rate_mib = number,
            _ => return Err(format!("unknown option \"{word}\"")),
        }
    }
    Ok(parsed)
}

fn main() {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("agent: {error}");
            std::process::exit(2);
        }
    };
    let heartbeat = Arc::new(heartbeat::Heartbeat::start());
    let load = writer::Writer::start(arguments.working_set_mib, arguments.rate_mib);
    if let Err(error) = service::run(arguments.port, &heartbeat, &load) {
        eprintln!("agent: port {}: {error}", arguments.port);
        std::process::exit(1);
    }
}
