//! The console (virtio 1.2, 5.3): one port, `hvc0` in a Linux guest.
//!
//! ```text
//!  transmit queue ──► worker ──► serial::Console::write
//!  receive queue  ◄── worker ◄── backlog (bounded) ◄── ConsoleInput::push
//! ```
//!
//! What is at the other end is the same as behind a serial port: [`crate::serial::Console`].

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use prost::Message;
use vmm_sys_util::eventfd::EventFd;

use super::{Chain, DeviceConfig, DeviceType, Queues, RingError, VirtioDevice, Wait};
use crate::component::Reach;
use crate::{lock, serial};

const RECEIVE_QUEUE: usize = 0;
const TRANSMIT_QUEUE: usize = 1;
const QUEUE_SIZE: u16 = 64;
/// Chains of one direction in a round.
const BATCH: usize = 16;
/// Bytes of input that wait for the guest.
const BACKLOG: usize = 64 << 10;
/// Bytes that are copied at once.
const PIECE: usize = 4096;
/// Most output in one chain; a driver that gives more at once loses the rest.
const MAX_OUTPUT: u64 = 1 << 20;
/// Bytes of the device's configuration: size, ports, emergency output; none of them offered.
const CONFIG_SIZE: usize = 12;

#[derive(Debug)]
struct Input {
    backlog: Mutex<VecDeque<u8>>,
    /// Signalled when input came.
    arrived: EventFd,
    /// Somebody has input that did not fit.
    refused: AtomicBool,
}

/// Where the guest's input comes in. Clones lead to the same console.
#[derive(Debug, Clone)]
pub struct ConsoleInput(Arc<Input>);

impl ConsoleInput {
    /// Offers input to the guest. Returns how many bytes were taken; keep the rest until
    /// [`serial::Console::input_ready`].
    pub fn push(&self, bytes: &[u8]) -> usize {
        let taken = {
            let mut backlog = lock(&self.0.backlog);
            let taken = bytes.len().min(BACKLOG - backlog.len());
            backlog.extend(&bytes[..taken]);
            if taken < bytes.len() {
                self.0.refused.store(true, Ordering::Release);
            }
            taken
        };
        if taken > 0 {
            // A full counter means that the worker has not looked yet, and will.
            let _ = self.0.arrived.write(1);
        }
        taken
    }
}

/// A console.
#[derive(Debug)]
pub struct Console {
    output: Arc<dyn serial::Console>,
    input: Arc<Input>,
    config: Arc<DeviceConfig>,
    chain: Chain,
}

/// Saved state of [`Console`].
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ConsoleState {
    /// Input that waits for the guest.
    #[prost(bytes = "vec", tag = "1")]
    pub backlog: Vec<u8>,
}

impl Console {
    /// A console that writes to `output`.
    ///
    /// # Errors
    /// What the host says when it gives no descriptor.
    pub fn new(output: Arc<dyn serial::Console>) -> std::io::Result<Self> {
        Ok(Self {
            output,
            input: Arc::new(Input {
                backlog: Mutex::default(),
                arrived: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
                refused: AtomicBool::new(false),
            }),
            config: DeviceConfig::new(vec![0; CONFIG_SIZE]),
            chain: Chain::default(),
        })
    }

    /// Where input comes in.
    pub fn input(&self) -> ConsoleInput {
        ConsoleInput(Arc::clone(&self.input))
    }

    fn transmit(&mut self, queues: &mut Queues) -> Result<Wait, RingError> {
        let mut piece = [0; PIECE];
        for _ in 0..BATCH {
            if queues.should_yield() {
                break;
            }
            let Some(queue) = queues.get(TRANSMIT_QUEUE) else {
                return Ok(Wait::default());
            };
            if !queue.pop(&mut self.chain)? {
                return Ok(Wait::default());
            }
            let mut done = 0;
            while done < self.chain.readable_length().min(MAX_OUTPUT) {
                let count = self.chain.read(queue.memory().mapping(), done, &mut piece);
                if count == 0 {
                    break;
                }
                self.output.write(&piece[..count]);
                done += count as u64;
            }
            queue.push_used(self.chain.head(), 0)?;
        }
        Ok(Wait::MORE)
    }

    fn receive(&mut self, queues: &mut Queues) -> Result<Wait, RingError> {
        // Before the backlog is looked at: what comes later rings again.
        let _ = self.input.arrived.read();
        for _ in 0..BATCH {
            if queues.should_yield() {
                break;
            }
            let Some(queue) = queues.get(RECEIVE_QUEUE) else {
                return Ok(Wait::default());
            };
            if lock(&self.input.backlog).is_empty() {
                return Ok(Wait {
                    readable: true,
                    retry_after: None,
                });
            }
            if !queue.pop(&mut self.chain)? {
                return Ok(Wait::default());
            }
            let room = self.chain.writable_length().min(PIECE as u64) as usize;
            let bytes: Vec<u8> = {
                let mut backlog = lock(&self.input.backlog);
                let count = room.min(backlog.len());
                backlog.drain(..count).collect()
            };
            let written = self.chain.write(queue.memory().mapping(), 0, &bytes);
            queue.push_used(self.chain.head(), written as u32)?;
            if self.input.refused.swap(false, Ordering::AcqRel) {
                self.output.input_ready();
            }
        }
        Ok(Wait::MORE)
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn process(&mut self, queues: &mut Queues) -> Result<Wait, RingError> {
        let transmit = self.transmit(queues)?;
        queues.signal(TRANSMIT_QUEUE)?;
        let receive = self.receive(queues)?;
        queues.signal(RECEIVE_QUEUE)?;
        Ok(transmit.or(receive))
    }

    fn back_end(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the descriptor stays open for as long as `self.input`, which the result borrows.
        #[expect(unsafe_code, reason = "the event type lends no descriptor")]
        let descriptor = unsafe { BorrowedFd::borrow_raw(self.input.arrived.as_raw_fd()) };
        Some(descriptor)
    }

    fn pause(&mut self, _reach: Reach) {}

    fn save(&self) -> Vec<u8> {
        let Self {
            output: _,
            input,
            config: _,
            chain: _,
        } = self;
        let backlog = lock(&input.backlog).iter().copied().collect();
        ConsoleState { backlog }.encode_to_vec()
    }

    fn restore(&mut self, _features: u64, state: &[u8]) -> Result<(), String> {
        let ConsoleState { backlog } =
            ConsoleState::decode(state).map_err(|error| error.to_string())?;
        if backlog.len() > BACKLOG {
            return Err(format!("{} bytes of input wait", backlog.len()));
        }
        *lock(&self.input.backlog) = backlog.into();
        Ok(())
    }
}
