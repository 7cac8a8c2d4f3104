//! The client outside: keeps one TCP connection to the guest busy and notices every pause.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Deserialize;

/// Pause between an answer and the next request.
const INTERVAL: Duration = Duration::from_millis(2);
/// An answer that takes longer counts as a lost connection.
const PATIENCE: Duration = Duration::from_secs(20);

/// A request and answer connection to the agent in the guest.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<TcpStream>,
}

/// What the agent says about itself.
#[derive(Debug, Clone, Deserialize)]
pub struct AgentStats {
    /// Heartbeats since the last reset.
    pub beats: u64,
    /// Median time between two heartbeats, in microseconds.
    pub gap_median_us: u64,
    /// Longest time between two heartbeats since the last reset, in microseconds.
    pub gap_max_us: u64,
    /// Pages that the memory writer has written.
    pub pages_written: u64,
    /// Pages that did not hold what had been written to them.
    pub memory_errors: u64,
}

#[derive(Debug, Deserialize)]
struct CommandOutput {
    status: i64,
    output: String,
}

impl Connection {
    /// Connects.
    ///
    /// # Errors
    /// When nothing listens there.
    pub fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))
            .with_context(|| format!("failed to connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            reader: BufReader::new(stream),
        })
    }

    /// As [`Connection::open`], and the agent must answer within a second.
    ///
    /// # Errors
    /// When it does not.
    pub fn probe(address: SocketAddr) -> anyhow::Result<Self> {
        let mut connection = Self::open(address)?;
        let stream = connection.reader.get_ref();
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        if connection.ask("echo ready")? != "ready" {
            bail!("{address} is not the agent");
        }
        connection
            .reader
            .get_ref()
            .set_read_timeout(Some(PATIENCE))?;
        Ok(connection)
    }

    /// Sends a line and returns the line that is answered.
    ///
    /// # Errors
    /// When the connection breaks or stays silent.
    pub fn ask(&mut self, request: &str) -> anyhow::Result<String> {
        self.reader
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())?;
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("the guest closed the connection");
        }
        Ok(line.trim_end().to_owned())
    }

    /// Runs a shell command in the guest; its exit status and output.
    ///
    /// # Errors
    /// When the connection breaks or the answer is none.
    pub fn run(&mut self, command: &str) -> anyhow::Result<(i64, String)> {
        let line = self.ask(&format!("run {command}"))?;
        let answer: CommandOutput =
            serde_json::from_str(&line).with_context(|| format!("agent answered \"{line}\""))?;
        Ok((answer.status, answer.output))
    }

    /// What the agent saw.
    ///
    /// # Errors
    /// When the connection breaks or the answer is none.
    pub fn stats(&mut self) -> anyhow::Result<AgentStats> {
        let line = self.ask("stats")?;
        serde_json::from_str(&line).with_context(|| format!("agent answered \"{line}\""))
    }
}

/// What the client saw.
#[derive(Debug, Default)]
struct Seen {
    answers: u64,
    gaps_in_counter: u64,
    longest_pause: Duration,
    error: Option<String>,
}

/// A thread that asks for the next number every few milliseconds.
#[derive(Debug)]
pub struct Client {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Starts asking.
    pub fn start(mut connection: Connection) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut expected = None;
                let mut last = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    let answer = connection.ask("next");
                    let now = Instant::now();
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    match answer.and_then(|line| Ok(line.parse::<u64>()?)) {
                        Ok(number) => {
                            if expected.is_some_and(|expected| expected != number) {
                                seen.gaps_in_counter += 1;
                            }
                            expected = Some(number + 1);
                            seen.answers += 1;
                            seen.longest_pause = seen.longest_pause.max(now - last);
                            last = now;
                        }
                        Err(error) => {
                            seen.error = Some(format!("{error:#}"));
                            return;
                        }
                    }
                    drop(seen);
                    std::thread::sleep(INTERVAL);
                }
            })
        };
        Self {
            seen,
            stop,
            thread: Some(thread),
        }
    }

    /// Forgets the longest pause.
    pub fn reset(&self) {
        self.lock().longest_pause = Duration::ZERO;
    }

    /// The longest time between two answers since the last reset.
    pub fn longest_pause(&self) -> Duration {
        self.lock().longest_pause
    }

    /// How many answers came.
    pub fn answers(&self) -> u64 {
        self.lock().answers
    }

    /// How often the counter skipped or repeated.
    pub fn gaps_in_counter(&self) -> u64 {
        self.lock().gaps_in_counter
    }

    /// Why the connection broke, if it did.
    pub fn error(&self) -> Option<String> {
        self.lock().error.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the client thread has no one left to tell.
            let _ = thread.join();
        }
    }
}
