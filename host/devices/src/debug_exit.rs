//! The debug exit port: a guest that writes to it ends its VM with an exit status.
//!
//! It is what QEMU calls `isa-debug-exit`: any write ends the VM, and the process exits with
//! `value << 1 | 1`, which no guest can make 0. Reads give 0.

use std::fmt::Debug;
use std::sync::Arc;

use crate::bus::{Bus, BusDevice, RangeError};

/// Hears that the guest ends its VM. Called from a vCPU thread: must not wait for one.
pub trait DebugExitEvents: Debug + Send + Sync {
    /// The guest wrote `value`, of 1, 2 or 4 bytes.
    fn debug_exit(&self, value: u32);
}

/// The exit status that goes with what the guest wrote: `value << 1 | 1`, of which a process keeps
/// the low eight bits.
pub fn exit_status(value: u32) -> u8 {
    (value << 1) as u8 | 1
}

/// The port. It has no state: what is written to it ends the VM.
#[derive(Debug)]
pub struct DebugExit {
    events: Arc<dyn DebugExitEvents>,
}

impl DebugExit {
    /// A port that reports to `events`.
    pub fn new(events: Arc<dyn DebugExitEvents>) -> Arc<Self> {
        Arc::new(Self { events })
    }

    /// Puts `count` ports from `first` on the port bus.
    ///
    /// # Errors
    /// [`RangeError`] when another device has one of the ports.
    pub fn attach(self: &Arc<Self>, ports: &Bus, first: u16, count: u16) -> Result<(), RangeError> {
        ports.insert(first.into(), count.into(), Arc::clone(self) as _)
    }
}

impl BusDevice for DebugExit {
    fn label(&self) -> String {
        "debug-exit".into()
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (byte, value) in bytes.iter_mut().zip(data) {
            *byte = *value;
        }
        self.events.debug_exit(u32::from_le_bytes(bytes));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::lock;

    #[derive(Debug, Default)]
    struct Recorder(Mutex<Vec<u32>>);

    impl DebugExitEvents for Recorder {
        fn debug_exit(&self, value: u32) {
            lock(&self.0).push(value);
        }
    }

    #[test]
    fn a_write_of_any_size_in_the_range_is_told_and_a_read_is_not() {
        let (ports, recorder) = (Bus::new(), Arc::<Recorder>::default());
        let device = DebugExit::new(recorder.clone());
        device.attach(&ports, 0xf4, 4).unwrap();
        let mut data = [0xff; 2];
        assert!(ports.read(0xf4, &mut data));
        assert_eq!(data, [0, 0]);
        assert!(ports.write(0xf4, &[0x10]));
        assert!(ports.write(0xf6, &[0x34, 0x12]));
        assert!(ports.write(0xf4, &[1, 0, 0, 0x80]));
        assert!(!ports.write(0xf8, &[1]));
        assert_eq!(*lock(&recorder.0), [0x10, 0x1234, 0x8000_0001]);
    }

    #[test]
    fn the_exit_status_is_odd_and_has_eight_bits() {
        let cases = [
            (0, 1),
            (0x10, 33),
            (0x3f, 127),
            (0x7f, 255),
            (0x80, 1),
            (u32::MAX, 255),
        ];
        for (value, status) in cases {
            assert_eq!(exit_status(value), status, "{value:#x}");
        }
    }
}
