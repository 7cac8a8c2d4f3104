//! The 8254 timer, and port 0x61 beside it.
//!
//! ```text
//!  1.193 MHz ─┬─► counter 0 ─► line 0            a thread sleeps until the output rises
//!             ├─► counter 1                      (once refreshed memory)
//!             └─► counter 2 ─► port 0x61 bit 5   gate: port 0x61 bit 0; no speaker hears it
//! ```
//!
//! The clock stands while the machine is paused, and goes on where it stood. A rise that the host
//! was too busy for comes late, but it comes; two never come closer than 50 µs.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dunlin_guest::{InterruptLine, RestoreError, SavedState};

use super::counter::{Access, Counter};
use crate::bus::{Bus, BusDevice, RangeError};
use crate::component::{Component, Reach};
use crate::lock;

const KIND: &str = "pit";
const VERSION: u32 = 1;

const COUNTER_PORT: u64 = 0x40;
/// The control word's offset from [`COUNTER_PORT`].
const CONTROL: u64 = 3;
const SYSTEM_PORT: u64 = 0x61;

/// The least time between two interrupts, however small the count.
const CLOSEST: Duration = Duration::from_micros(50);
/// Rises that are later than this, in ticks (a second), are lost.
const LATEST: u64 = 1_193_182;
/// Ticks of a saved clock are fewer (30,000 years), so that sums with them do not overflow.
const MOST_TICKS: u64 = 1 << 60;

/// Bits of port 0x61.
mod system {
    pub(super) const GATE: u8 = 1 << 0;
    pub(super) const SPEAKER: u8 = 1 << 1;
    pub(super) const REFRESH: u8 = 1 << 4;
    pub(super) const OUTPUT: u8 = 1 << 5;
}
/// Ticks between two requests to refresh memory, about 15 µs.
const REFRESH_TICKS: u64 = 18;

/// The input clock, 105/88 MHz.
#[derive(Debug)]
struct Clock {
    /// Ticks when it was last started or stopped.
    ticks: u64,
    running: Option<Instant>,
}

impl Clock {
    fn now(&self) -> u64 {
        let nanoseconds = self.running.map_or(0, |since| since.elapsed().as_nanos());
        self.ticks + (nanoseconds * 105 / 88_000) as u64
    }

    fn until(&self, tick: u64) -> Duration {
        let left = u128::from(tick.saturating_sub(self.now()));
        Duration::from_nanos(u64::try_from(left * 88_000 / 105 + 1).unwrap_or(u64::MAX))
    }
}

#[derive(Debug)]
struct State {
    counters: [Counter; 3],
    speaker: bool,
    clock: Clock,
    /// Rises of counter 0 up to this tick were told.
    told: u64,
    ended: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    line: Arc<dyn InterruptLine>,
}

/// The timer.
#[derive(Debug)]
pub struct Pit {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Saved state of a counter.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CounterState {
    /// 0 to 5.
    #[prost(uint32, tag = "1")]
    pub mode: u32,
    /// It counts in decimal.
    #[prost(bool, tag = "2")]
    pub decimal: bool,
    /// 1 low byte, 2 high byte, 3 both.
    #[prost(uint32, tag = "3")]
    pub access: u32,
    /// The count, 1 to 0x10000.
    #[prost(uint32, tag = "4")]
    pub reload: u32,
    /// Tick at which it was loaded.
    #[prost(uint64, optional, tag = "5")]
    pub start: Option<u64>,
    /// The count that follows.
    #[prost(uint32, optional, tag = "6")]
    pub next: Option<u32>,
    /// Tick from which it does, in modes 2 and 3.
    #[prost(uint64, tag = "7")]
    pub next_at: u64,
    /// The gate is high.
    #[prost(bool, tag = "8")]
    pub gate: bool,
    /// Ticks counted when the gate fell.
    #[prost(uint64, optional, tag = "9")]
    pub held: Option<u64>,
    /// First byte of a count of two.
    #[prost(uint32, optional, tag = "10")]
    pub written_low: Option<u32>,
    /// Latched count.
    #[prost(uint32, optional, tag = "11")]
    pub latched_count: Option<u32>,
    /// Latched status.
    #[prost(uint32, optional, tag = "12")]
    pub latched_status: Option<u32>,
    /// The next read gives the high byte.
    #[prost(bool, tag = "13")]
    pub reads_high: bool,
}

/// Saved state of [`Pit`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct PitState {
    /// The three counters.
    #[prost(message, repeated, tag = "1")]
    pub counters: Vec<CounterState>,
    /// Port 0x61, bit 1.
    #[prost(bool, tag = "2")]
    pub speaker: bool,
    /// Ticks of the clock.
    #[prost(uint64, tag = "3")]
    pub ticks: u64,
    /// Rises of counter 0 up to this tick became interrupts.
    #[prost(uint64, tag = "4")]
    pub told: u64,
}

fn save_counter(counter: &Counter) -> CounterState {
    let Counter {
        mode,
        decimal,
        access,
        reload,
        start,
        next,
        next_at,
        gate,
        held,
        written_low,
        latched_count,
        latched_status,
        reads_high,
    } = *counter;
    CounterState {
        mode: mode.into(),
        decimal,
        access: access as u32,
        reload,
        start,
        next,
        next_at,
        gate,
        held,
        written_low: written_low.map(u32::from),
        latched_count: latched_count.map(u32::from),
        latched_status: latched_status.map(u32::from),
        reads_high,
    }
}

fn restore_counter(state: &CounterState, ticks: u64) -> Result<Counter, &'static str> {
    let wide = "a counter's register is too wide";
    let narrow = |value: Option<u32>| value.map(u8::try_from).transpose().or(Err(wide));
    let mode = u8::try_from(state.mode).or(Err(wide))?;
    let access = u8::try_from(state.access).or(Err(wide))?;
    let counts = [Some(state.reload), state.next];
    let count_is_possible = |count: u32| (1..=0x1_0000).contains(&count);
    if mode > 5 || !counts.into_iter().flatten().all(count_is_possible) {
        return Err("a counter has no such mode or count");
    }
    let pasts = [state.start, state.held];
    if pasts.into_iter().flatten().any(|past| past > ticks) || state.next_at > ticks + 0x1_0000 {
        return Err("a counter was loaded in the future");
    }
    Ok(Counter {
        mode,
        decimal: state.decimal,
        access: Access::of(access)
            .filter(|known| *known as u8 == access)
            .ok_or("a counter has no such access")?,
        reload: state.reload,
        start: state.start,
        next: state.next,
        next_at: state.next_at,
        gate: state.gate,
        held: state.held,
        written_low: narrow(state.written_low)?,
        latched_count: state
            .latched_count
            .map(u16::try_from)
            .transpose()
            .or(Err(wide))?,
        latched_status: narrow(state.latched_status)?,
        reads_high: state.reads_high,
    })
}

impl Pit {
    /// A timer whose counter 0 drives `line`. Its clock stands until [`Component::resume`].
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn new(line: Arc<dyn InterruptLine>) -> std::io::Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                counters: [Counter::new(true), Counter::new(true), Counter::new(false)],
                speaker: false,
                clock: Clock {
                    ticks: 0,
                    running: None,
                },
                told: 0,
                ended: false,
            }),
            changed: Condvar::new(),
            line,
        });
        let driven = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("pit".into())
            .spawn(move || driven.drive())?;
        Ok(Arc::new(Self {
            shared,
            thread: Some(thread),
        }))
    }

    /// Puts the ports on the port bus.
    ///
    /// # Errors
    /// [`RangeError`] when another device has one of them.
    pub fn attach(self: &Arc<Self>, ports: &Bus) -> Result<(), RangeError> {
        let shared = || Arc::clone(&self.shared);
        ports.insert(COUNTER_PORT, CONTROL + 1, Arc::new(Counters(shared())))?;
        ports.insert(SYSTEM_PORT, 1, Arc::new(SystemPort(shared())))
    }
}

impl Drop for Pit {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the timer's thread panicked");
        }
    }
}

impl Shared {
    /// Turns the rises of counter 0 into edges on the line, until the end.
    fn drive(&self) {
        let mut state = lock(&self.state);
        while !state.ended {
            let told = state.told;
            let rise = state.counters[0].rise_after(told);
            let rise = rise.filter(|_| state.clock.running.is_some());
            let Some(rise) = rise else {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let now = state.clock.now();
            let wait = if rise <= now {
                state.told = rise.max(now.saturating_sub(LATEST));
                // Under the lock: no edge comes behind a pause or a new count.
                self.line.set_level(false);
                self.line.set_level(true);
                CLOSEST
            } else {
                state.clock.until(rise)
            };
            state = if rise <= now {
                // Whoever changes the counter meanwhile must not shorten this.
                drop(state);
                std::thread::sleep(wait);
                lock(&self.state)
            } else {
                let woken = self.changed.wait_timeout(state, wait);
                woken.unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    /// Changes a counter; what counter 0 did before that is over.
    fn change(&self, change: impl FnOnce(&mut State, u64)) {
        let mut state = lock(&self.state);
        let now = state.clock.now();
        change(&mut state, now);
        state.told = now;
        let output = state.counters[0].output(now);
        self.line.set_level(output);
        self.changed.notify_all();
    }
}

#[derive(Debug)]
struct Counters(Arc<Shared>);

fn write_control(state: &mut State, word: u8, now: u64) {
    let index = usize::from(word >> 6);
    match (state.counters.get_mut(index), Access::of(word >> 4)) {
        (Some(counter), Some(access)) => counter.configure(access, word),
        (Some(counter), None) => counter.latch_count(now),
        (None, _) => {
            // The read-back command: a clear bit asks for the count, and one for the status.
            for (index, counter) in state.counters.iter_mut().enumerate() {
                if word & 2 << index == 0 {
                    continue;
                }
                if word & 1 << 5 == 0 {
                    counter.latch_count(now);
                }
                if word & 1 << 4 == 0 {
                    counter.latch_status(now);
                }
            }
        }
    }
}

impl BusDevice for Counters {
    fn label(&self) -> String {
        "pit".into()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = lock(&self.0.state);
        let now = state.clock.now();
        for (offset, byte) in (offset..).zip(data) {
            let counter = state.counters.get_mut(offset as usize);
            // The control word cannot be read.
            *byte = counter.map_or(0xff, |counter| counter.read(now));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..).zip(data) {
            let latches = offset == CONTROL && (byte >> 6 == 3 || byte >> 4 & 3 == 0);
            if latches {
                // Nothing that counts is changed.
                let mut state = lock(&self.0.state);
                let now = state.clock.now();
                write_control(&mut state, *byte, now);
            } else if offset == CONTROL && byte >> 6 != 0 || matches!(offset, 1 | 2) {
                let mut state = lock(&self.0.state);
                let now = state.clock.now();
                match state.counters.get_mut(offset as usize) {
                    Some(counter) => counter.write(*byte, now),
                    None => write_control(&mut state, *byte, now),
                }
            } else {
                self.0.change(|state, now| match offset {
                    CONTROL => write_control(state, *byte, now),
                    _ => state.counters[0].write(*byte, now),
                });
            }
        }
    }
}

#[derive(Debug)]
struct SystemPort(Arc<Shared>);

impl BusDevice for SystemPort {
    fn label(&self) -> String {
        "system-port".into()
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        let mut state = lock(&self.0.state);
        let now = state.clock.now();
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        let value = bit(state.counters[2].gate, system::GATE)
            | bit(state.speaker, system::SPEAKER)
            | bit(now / REFRESH_TICKS % 2 == 1, system::REFRESH)
            | bit(state.counters[2].output(now), system::OUTPUT);
        data.fill(value);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(value) = data.first() else { return };
        let mut state = lock(&self.0.state);
        let now = state.clock.now();
        state.speaker = value & system::SPEAKER != 0;
        state.counters[2].set_gate(value & system::GATE != 0, now);
    }
}

impl Component for Pit {
    fn name(&self) -> String {
        "pit".into()
    }

    fn pause(&self, _reach: Reach) {
        let mut state = lock(&self.shared.state);
        state.clock.ticks = state.clock.now();
        state.clock.running = None;
    }

    fn resume(&self) {
        let mut state = lock(&self.shared.state);
        state.clock.running.get_or_insert_with(Instant::now);
        self.shared.changed.notify_all();
    }

    fn save(&self) -> SavedState {
        let Self { shared, thread: _ } = self;
        let Shared {
            state,
            changed: _,
            line: _,
        } = &**shared;
        let State {
            counters,
            speaker,
            clock,
            told,
            ended: _,
        } = &*lock(state);
        let state = PitState {
            counters: counters.iter().map(save_counter).collect(),
            speaker: *speaker,
            ticks: clock.now(),
            told: *told,
        };
        SavedState::encode(&self.name(), KIND, VERSION, &state)
    }

    /// The line's level comes with the state of the controller that it leads to.
    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        let PitState {
            counters,
            speaker,
            ticks,
            told,
        } = state.decode(KIND, VERSION)?;
        if ticks > MOST_TICKS || told > ticks {
            return Err(state.invalid("the clock is out of range"));
        }
        let counters: Result<Vec<_>, _> = (counters.iter())
            .map(|counter| restore_counter(counter, ticks))
            .collect();
        let counters = counters.map_err(|reason| state.invalid(reason))?;
        let counters = <[Counter; 3]>::try_from(counters)
            .or(Err(state.invalid("there are not three counters")))?;
        let mut live = lock(&self.shared.state);
        live.counters = counters;
        live.speaker = speaker;
        live.told = told;
        live.clock = Clock {
            ticks,
            running: live.clock.running.map(|_| Instant::now()),
        };
        self.shared.changed.notify_all();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
