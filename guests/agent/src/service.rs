//! The line protocol over TCP.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::heartbeat::Heartbeat;
use crate::writer::Writer;

/// Longest request line; a longer one ends the connection.
const LINE_LIMIT: u64 = 4096;

pub(crate) fn run(port: u16, heartbeat: &Arc<Heartbeat>, load: &Arc<Writer>) -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("agent: listening on port {port}");
    let counter = Arc::new(AtomicU64::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let session = Session {
            counter: Arc::clone(&counter),
            heartbeat: Arc::clone(heartbeat),
            load: Arc::clone(load),
        };
        std::thread::spawn(move || {
            // A client that goes away is no event for the guest.
            let _ = session.serve(&stream);
        });
    }
    Ok(())
}

struct Session {
    counter: Arc<AtomicU64>,
    heartbeat: Arc<Heartbeat>,
    load: Arc<Writer>,
}

impl Session {
    fn serve(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        loop {
            line.clear();
            if reader.by_ref().take(LINE_LIMIT).read_line(&mut line)? == 0 || !line.ends_with('\n')
            {
                return Ok(());
            }
            let mut answer = self.answer(line.trim_end());
            answer.push('\n');
            (&mut &*stream).write_all(answer.as_bytes())?;
        }
    }

    fn answer(&self, line: &str) -> String {
        let mut words = line.splitn(2, ' ');
        match (words.next().unwrap_or_default(), words.next()) {
            ("next", None) => self.counter.fetch_add(1, Ordering::Relaxed).to_string(),
            ("echo", text) => text.unwrap_or_default().to_owned(),
            ("reset", None) => {
                self.heartbeat.reset();
                "ok".to_owned()
            }
            ("load", Some(rest)) => {
                let mut numbers = rest.split(' ').map(str::parse);
                match (numbers.next(), numbers.next()) {
                    (Some(Ok(working_set)), Some(Ok(rate))) => {
                        self.load.set(working_set, rate);
                        "ok".to_owned()
                    }
                    _ => "error: load needs two numbers".to_owned(),
                }
            }
            ("stats", None) => self.stats(),
            ("run", Some(command)) => run_command(command),
            _ => "error: unknown request".to_owned(),
        }
    }

    fn stats(&self) -> String {
        let gaps = self.heartbeat.gaps();
        format!(
            "{{\"counter\":{},\"beats\":{},\"gap_median_us\":{},\"gap_p99_us\":{},\"gap_max_us\":{},\
             \"pages_written\":{},\"memory_errors\":{}}}",
            self.counter.load(Ordering::Relaxed),
            gaps.beats,
            gaps.median_us,
            gaps.p99_us,
            gaps.max_us,
            self.load.pages_written(),
            self.load.errors(),
        )
    }
}

/// Runs a shell command; its exit status and output as one JSON object on one line.
fn run_command(command: &str) -> String {
    let output = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) => format!(
            "{{\"status\":{},\"output\":{}}}",
            output.status.code().unwrap_or(-1),
            json_string(&String::from_utf8_lossy(
                &[output.stdout, output.stderr].concat()
            ))
        ),
        Err(error) => format!("error: {error}"),
    }
}

fn json_string(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            ' '..='~' => quoted.push(character),
            // Writing to a string cannot fail.
            _ => drop(write!(quoted, "\\u{:04x}", character as u32 & 0xffff)),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_one_line_of_json() {
        assert_eq!(json_string("a\"b\\\n"), r#""a\"b\\\u000a""#);
    }

    #[test]
    fn a_command_reports_status_and_output() {
        assert_eq!(
            run_command("echo hi; exit 3"),
            r#"{"status":3,"output":"hi\u000a"}"#
        );
    }
}
