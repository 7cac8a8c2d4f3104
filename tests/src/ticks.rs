//! Hears the benchmark guest: takes the bytes of its port from every host on which it runs, and
//! notes when
//! each came.
//!
//! ```text
//!  host a ── socket ──► reader ─┐
//!  host b ── socket ──► reader ─┴─► streams ──► Follower ──► what was said, when, on which host
//! ```
//!
//! Each host's process connects to one socket. A stream per connection; one guest speaks on one at
//! a time, and
//! the streams, one after the other, are its words. A guest that speaks on two at once, or says a
//! thing
//! twice, shows as an error.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use dunlin_guest_migbench::{Event, Listener};

use crate::process;

/// How old the first byte of the next host must be before the last host counts as silent, unless
/// its process has
/// ended. A byte that comes from it later is an error.
const SETTLED: Duration = Duration::from_millis(100);

/// Listens for the ports of one guest's hosts.
#[derive(Debug)]
pub struct Recorder {
    path: PathBuf,
    shared: Arc<Shared>,
    follower: Follower,
    heard: Vec<Heard>,
}

#[derive(Debug)]
struct Shared {
    start: Instant,
    streams: Mutex<Vec<Stream>>,
    more: Condvar,
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Stream {
    /// When each byte came, and the byte.
    bytes: Vec<(Duration, u8)>,
    ended: bool,
}

/// Something that the guest said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// When, from the recorder's start.
    pub at: Duration,
    /// On which stream: hosts in the order in which they connected.
    pub stream: usize,
    /// What.
    pub event: Event,
}

/// Reads the streams one after the other.
#[derive(Debug, Default)]
struct Follower {
    listener: Listener,
    stream: usize,
    byte: usize,
    /// What went wrong first: it is not forgotten by those who listen on.
    failed: Option<String>,
}

impl Recorder {
    /// Listens at `path`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn new(path: &Path) -> anyhow::Result<Self> {
        let door = UnixListener::bind(path)
            .with_context(|| format!("failed to listen at {}", path.display()))?;
        let shared = Arc::new(Shared {
            start: Instant::now(),
            streams: Mutex::default(),
            more: Condvar::new(),
            closed: AtomicBool::new(false),
        });
        let theirs = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("ticks-door".into())
            .spawn(move || {
                for connection in door.incoming().flatten() {
                    if theirs.closed.load(Ordering::SeqCst) {
                        return;
                    }
                    let shared = Arc::clone(&theirs);
                    let number = shared.open();
                    std::thread::spawn(move || read(&shared, number, connection));
                }
            })?;
        Ok(Self {
            path: path.to_owned(),
            shared,
            follower: Follower::default(),
            heard: Vec::new(),
        })
    }

    /// Where hosts connect.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Time since the recorder's start.
    pub fn now(&self) -> Duration {
        self.shared.start.elapsed()
    }

    /// How many hosts have connected.
    pub fn streams(&self) -> usize {
        self.shared.lock().len()
    }

    /// All that was said so far.
    ///
    /// # Errors
    /// When the guest lost something, or speaks on two hosts.
    pub fn heard(&mut self) -> anyhow::Result<&[Heard]> {
        let now = self.now();
        let streams = self.shared.lock();
        self.follower.follow(&streams, now, &mut self.heard)?;
        Ok(&self.heard)
    }

    /// When the guest last said something on a stream.
    pub fn last_word(&self, stream: usize) -> Option<Duration> {
        let streams = self.shared.lock();
        Some(streams.get(stream)?.bytes.last()?.0)
    }

    /// Waits until the guest, whose words came on these streams one after the other, has checked
    /// all of its memory in a
    /// pass that begins from now on.
    ///
    /// # Errors
    /// When it has lost something, or does not come to that in time.
    pub fn whole(&self, order: &[usize], limit: Duration) -> anyhow::Result<()> {
        let from = self.now();
        let end = Instant::now() + limit;
        loop {
            process::check_interrupt()?;
            let mut listener = Listener::new();
            let mut passes = 0;
            for &number in order {
                let streams = self.shared.lock();
                let bytes = streams.get(number).map(|stream| stream.bytes.clone());
                drop(streams);
                for (at, byte) in bytes.context("the stream has begun")? {
                    let event = listener
                        .byte(byte)
                        .with_context(|| format!("on host {number}"))?;
                    let scrubbed = matches!(event, Some(Event::Scrubbed { .. }));
                    passes += u32::from(scrubbed && at > from);
                }
            }
            if passes >= 2 {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("no check of all memory within {} s", limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until `enough` is true of what was said.
    ///
    /// # Errors
    /// When it does not come to that in time, or the guest lost something.
    pub fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        mut enough: impl FnMut(&[Heard]) -> bool,
    ) -> anyhow::Result<()> {
        let end = Instant::now() + limit;
        loop {
            process::check_interrupt()?;
            if enough(self.heard()?) {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("{what} did not happen within {} s", limit.as_secs());
            }
            self.shared.wait_for_more();
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::SeqCst);
        // Wakes the thread at the door; if that fails, it waits there until this process ends.
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Stream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> usize {
        let mut streams = self.lock();
        streams.push(Stream::default());
        streams.len() - 1
    }

    /// Waits until something has come since the last look, or a moment.
    fn wait_for_more(&self) {
        let patience = Duration::from_millis(20);
        let waited = self.more.wait_timeout(self.lock(), patience);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

fn read(shared: &Shared, number: usize, mut connection: UnixStream) {
    run_first();
    let mut buffer = [0; 4096];
    loop {
        let count = match connection.read(&mut buffer) {
            Ok(count @ 1..) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => break,
        };
        let at = shared.start.elapsed();
        let mut streams = shared.lock();
        let Some(stream) = streams.get_mut(number) else {
            return;
        };
        stream
            .bytes
            .extend(buffer[..count].iter().map(|&byte| (at, byte)));
        drop(streams);
        shared.more.notify_all();
    }
    if let Some(stream) = shared.lock().get_mut(number) {
        stream.ended = true;
    }
    shared.more.notify_all();
}

/// Lets this thread run before all others, where that is permitted: it tells the time.
fn run_first() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the parameters live for the call, which concerns the calling thread alone.
    #[expect(unsafe_code, reason = "std sets no scheduling class")]
    unsafe {
        // Where it is not permitted, times are less exact.
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters);
    }
}

impl Follower {
    fn follow(
        &mut self,
        streams: &[Stream],
        now: Duration,
        heard: &mut Vec<Heard>,
    ) -> anyhow::Result<()> {
        if let Some(failed) = &self.failed {
            bail!("{failed}");
        }
        let read = self.read(streams, now, heard);
        if let Err(error) = &read {
            self.failed = Some(format!("{error:#}"));
        }
        read
    }

    fn read(
        &mut self,
        streams: &[Stream],
        now: Duration,
        heard: &mut Vec<Heard>,
    ) -> anyhow::Result<()> {
        loop {
            let Some(stream) = streams.get(self.stream) else {
                return Ok(());
            };
            for &(at, byte) in &stream.bytes[self.byte..] {
                self.byte += 1;
                let event = self
                    .listener
                    .byte(byte)
                    .with_context(|| format!("on host {}", self.stream))?;
                heard.extend(event.map(|event| Heard {
                    at,
                    stream: self.stream,
                    event,
                }));
            }
            let later = streams.iter().enumerate().skip(self.stream + 1);
            let mut speaking = later.filter(|(_, stream)| !stream.bytes.is_empty());
            let Some((next, first)) = speaking
                .next()
                .map(|(next, stream)| (next, stream.bytes[0].0))
            else {
                return Ok(());
            };
            if !stream.ended && first + SETTLED > now {
                return Ok(());
            }
            if let Some(&(last, _)) = stream.bytes.last()
                && last > first + SETTLED
            {
                bail!("the guest speaks on two hosts at once");
            }
            (self.stream, self.byte) = (next, 0);
        }
    }
}

/// Times of the ticks on which a guest's pauses are seen.
#[derive(Debug, Default, Clone)]
pub struct Ticks(Vec<(Duration, usize)>);

impl Ticks {
    /// The ticks among what was said.
    pub fn of(heard: &[Heard]) -> Self {
        let ticks = heard.iter().filter(|heard| heard.event == Event::Tick);
        Self(ticks.map(|heard| (heard.at, heard.stream)).collect())
    }

    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// When the first one on a stream was.
    pub fn first_on(&self, stream: usize) -> Option<Duration> {
        self.0
            .iter()
            .find(|tick| tick.1 == stream)
            .map(|tick| tick.0)
    }

    /// From the last tick before the stream `stream` to the first one on it.
    pub fn blackout(&self, stream: usize) -> Option<Duration> {
        let first = self.0.iter().position(|tick| tick.1 == stream)?;
        let last = self.0[..first].last()?;
        Some(self.0[first].0.saturating_sub(last.0))
    }

    /// The longest time without a tick within a span of time, where there are two ticks.
    pub fn worst_gap(&self, from: Duration, to: Duration) -> Option<Duration> {
        let start = self.0.partition_point(|tick| tick.0 < from);
        let end = self.0.partition_point(|tick| tick.0 <= to);
        let within = self.0.get(start..end)?;
        within.windows(2).map(|pair| pair[1].0 - pair[0].0).max()
    }
}

/// Writes a second that the guest made within a span of time, where its counts tell.
pub fn write_rate(heard: &[Heard], from: Duration, to: Duration) -> Option<f64> {
    let mut counts = heard.iter().filter_map(|heard| match heard.event {
        Event::Count { writes, .. } if heard.at >= from && heard.at <= to => {
            Some((heard.at, writes))
        }
        _ => None,
    });
    let first = counts.next()?;
    let last = counts.next_back()?;
    Some((last.1 - first.1) as f64 / (last.0 - first.0).as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(start: u64, bytes: std::ops::Range<u8>, ended: bool) -> Stream {
        let at = |byte: u8| Duration::from_millis(start + u64::from(byte));
        Stream {
            bytes: bytes.map(|byte| (at(byte), byte)).collect(),
            ended,
        }
    }

    fn follow(streams: &[Stream], now: u64) -> anyhow::Result<Vec<Heard>> {
        let mut heard = Vec::new();
        Follower::default().read(streams, Duration::from_millis(now), &mut heard)?;
        Ok(heard)
    }

    #[test]
    fn a_guest_is_heard_across_hosts_and_its_blackout_is_the_gap() {
        let streams = [
            stream(0, 0..10, true),
            Stream::default(),
            stream(50, 10..20, false),
        ];
        let heard = follow(&streams, 100).unwrap();
        assert_eq!(heard.len(), 20);
        let ticks = Ticks::of(&heard);
        assert_eq!(ticks.blackout(2), Some(Duration::from_millis(51)));
        let ms = Duration::from_millis;
        assert_eq!(ticks.worst_gap(ms(0), ms(9)), Some(ms(1)));
        assert_eq!(ticks.worst_gap(ms(0), ms(100)), Some(ms(51)));
    }

    #[test]
    fn a_host_that_may_still_speak_is_waited_for() {
        let streams = [stream(0, 0..10, false), stream(50, 10..20, false)];
        assert_eq!(follow(&streams, 70).unwrap().len(), 10);
        assert_eq!(follow(&streams, 500).unwrap().len(), 20);
    }

    #[test]
    fn what_was_wrong_once_stays_wrong() {
        let streams = [stream(0, 0..120, true), stream(0, 5..20, false)];
        let mut follower = Follower::default();
        let late = Duration::from_secs(1);
        for _ in 0..3 {
            let heard = follower.follow(&streams, late, &mut Vec::new());
            assert!(heard.unwrap_err().to_string().contains("host"));
        }
    }

    #[test]
    fn a_guest_that_lives_twice_is_noticed() {
        let streams = [stream(0, 0..120, true), stream(0, 5..20, false)];
        assert!(follow(&streams, 1000).is_err());
    }
}
