//! The entropy device (virtio 1.2, 5.4): random bytes from the host's kernel.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{Chain, DeviceConfig, DeviceType, Queues, RingError, VirtioDevice, Wait};
use crate::component::Reach;

const QUEUE_SIZE: u16 = 64;
/// Most bytes for one request: a driver that gives a larger buffer gets the rest next time.
const MAX_REQUEST: u64 = 4096;
/// Requests in a round.
const BATCH: usize = 16;

/// A source of random bytes. It has no state: what it gave is gone.
#[derive(Debug)]
pub struct Entropy {
    config: Arc<DeviceConfig>,
    chain: Chain,
}

impl Entropy {
    /// A source over getrandom(2).
    pub fn new() -> Self {
        Self {
            config: DeviceConfig::new(Vec::new()),
            chain: Chain::default(),
        }
    }
}

impl Default for Entropy {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn process(&mut self, queues: &mut Queues) -> Result<Wait, RingError> {
        let Self { config: _, chain } = self;
        let mut buffer = [0; MAX_REQUEST as usize];
        let mut served = 0;
        while served < BATCH && !queues.should_yield() {
            let Some(queue) = queues.get(0) else {
                return Ok(Wait::default());
            };
            if !queue.pop(chain)? {
                queues.signal(0)?;
                return Ok(Wait::default());
            }
            let part = &mut buffer[..chain.writable_length().min(MAX_REQUEST) as usize];
            let written = match fill(part) {
                Ok(()) => chain.write(queue.memory().mapping(), 0, part),
                // The kernel's generator fails only where it does not exist; nothing is written.
                Err(_) => 0,
            };
            queue.push_used(chain.head(), written as u32)?;
            served += 1;
        }
        queues.signal(0)?;
        Ok(Wait::MORE)
    }

    fn back_end(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn pause(&mut self, _reach: Reach) {}

    fn save(&self) -> Vec<u8> {
        let Self {
            config: _,
            chain: _,
        } = self;
        Vec::new()
    }

    fn restore(&mut self, _features: u64, state: &[u8]) -> Result<(), String> {
        match state {
            [] => Ok(()),
            _ => Err("an entropy device has no state".into()),
        }
    }
}

fn fill(buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        // SAFETY: the kernel writes at most `rest.len()` bytes to a buffer that is ours.
        #[expect(unsafe_code, reason = "getrandom has no safe wrapper in std")]
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
