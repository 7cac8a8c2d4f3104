//! The registers of the UART, without what they are connected to.

use std::collections::VecDeque;

/// Bytes in the receiver's FIFO.
const FIFO_SIZE: usize = 16;
/// Bytes of input that wait for the guest.
pub(super) const BACKLOG_SIZE: usize = 4096;

/// Offsets of the registers; several share one.
mod register {
    /// Receiver buffer, transmitter holding register, low divisor.
    pub(super) const DATA: u64 = 0;
    /// Interrupt enable, high divisor.
    pub(super) const INTERRUPT_ENABLE: u64 = 1;
    /// Interrupt identification; written: FIFO control.
    pub(super) const IDENTIFICATION: u64 = 2;
    pub(super) const LINE_CONTROL: u64 = 3;
    pub(super) const MODEM_CONTROL: u64 = 4;
    pub(super) const LINE_STATUS: u64 = 5;
    pub(super) const MODEM_STATUS: u64 = 6;
    pub(super) const SCRATCH: u64 = 7;
}

mod enable {
    pub(super) const RECEIVED: u8 = 1 << 0;
    pub(super) const TRANSMITTER_EMPTY: u8 = 1 << 1;
    pub(super) const LINE_STATUS: u8 = 1 << 2;
    pub(super) const MODEM_STATUS: u8 = 1 << 3;
    pub(super) const ALL: u8 = 0x0f;
}

mod identification {
    pub(super) const NONE: u8 = 0x01;
    pub(super) const MODEM_STATUS: u8 = 0x00;
    pub(super) const TRANSMITTER_EMPTY: u8 = 0x02;
    pub(super) const RECEIVED: u8 = 0x04;
    pub(super) const LINE_STATUS: u8 = 0x06;
    pub(super) const TIMEOUT: u8 = 0x0c;
    pub(super) const FIFO_ENABLED: u8 = 0xc0;
}

mod fifo {
    pub(super) const ENABLE: u8 = 1 << 0;
    pub(super) const CLEAR_RECEIVER: u8 = 1 << 1;
    /// Bits that stay: enable, DMA mode, trigger level.
    pub(super) const KEPT: u8 = 0xc9;
}

mod line_control {
    pub(super) const DIVISOR_ACCESS: u8 = 1 << 7;
}

mod modem_control {
    pub(super) const REQUEST_TO_SEND: u8 = 1 << 1;
    pub(super) const LOOP: u8 = 1 << 4;
    pub(super) const ALL: u8 = 0x1f;
}

mod line_status {
    pub(super) const DATA_READY: u8 = 1 << 0;
    pub(super) const OVERRUN: u8 = 1 << 1;
    /// Holding register and shift register are empty, always.
    pub(super) const TRANSMITTER_EMPTY: u8 = 1 << 5 | 1 << 6;
}

mod modem_status {
    /// Clear to send, data set ready, carrier: the peer is there and ready.
    pub(super) const PEER: u8 = 1 << 4 | 1 << 5 | 1 << 7;
    pub(super) const RING: u8 = 1 << 6;
    pub(super) const LINES: u8 = 0xf0;
}

/// What an access entails outside of the UART.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// A byte that goes out on the line.
    pub(super) sent: Option<u8>,
    /// Input was refused, and there is room now.
    pub(super) has_room_again: bool,
}

/// The registers.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Uart {
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    /// Lines in the upper half, their changes in the lower.
    modem_status: u8,
    scratch: u8,
    divisor: [u8; 2],
    overrun: bool,
    /// The transmitter has become empty, and the guest has not been told.
    transmitter_interrupt: bool,
    received: VecDeque<u8>,
    backlog: VecDeque<u8>,
    /// Input was refused because the backlog was full.
    refused: bool,
}

/// Saved state of the UART.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UartState {
    /// Interrupt enable register.
    #[prost(uint32, tag = "1")]
    pub interrupt_enable: u32,
    /// FIFO control register.
    #[prost(uint32, tag = "2")]
    pub fifo_control: u32,
    /// Line control register.
    #[prost(uint32, tag = "3")]
    pub line_control: u32,
    /// Modem control register.
    #[prost(uint32, tag = "4")]
    pub modem_control: u32,
    /// Modem status register.
    #[prost(uint32, tag = "5")]
    pub modem_status: u32,
    /// Scratch register.
    #[prost(uint32, tag = "6")]
    pub scratch: u32,
    /// Divisor latch.
    #[prost(uint32, tag = "7")]
    pub divisor: u32,
    /// Overrun bit of the line status register.
    #[prost(bool, tag = "8")]
    pub overrun: bool,
    /// The interrupt "transmitter empty" is pending.
    #[prost(bool, tag = "9")]
    pub transmitter_interrupt: bool,
    /// Content of the receiver's FIFO.
    #[prost(bytes = "vec", tag = "10")]
    pub received: Vec<u8>,
    /// Input that waits for the FIFO.
    #[prost(bytes = "vec", tag = "11")]
    pub backlog: Vec<u8>,
    /// Input was refused because the backlog was full.
    #[prost(bool, tag = "12")]
    pub refused: bool,
}

impl Uart {
    pub(super) fn new() -> Self {
        Self {
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            modem_status: modem_status::PEER,
            scratch: 0,
            // 9600 baud; nothing depends on it.
            divisor: [12, 0],
            overrun: false,
            transmitter_interrupt: false,
            received: VecDeque::new(),
            backlog: VecDeque::new(),
            refused: false,
        }
    }

    /// Takes input into the backlog, as much as fits.
    pub(super) fn push_input(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(BACKLOG_SIZE - self.backlog.len());
        self.backlog.extend(&bytes[..taken]);
        self.refused |= taken < bytes.len();
        self.receive();
        taken
    }

    /// Moves input from the backlog to the receiver, if the guest wants it.
    fn receive(&mut self) {
        let wanted = self.modem_control & modem_control::REQUEST_TO_SEND != 0;
        if !wanted || self.is_looped() {
            return;
        }
        while self.received.len() < self.receiver_size()
            && let Some(byte) = self.backlog.pop_front()
        {
            self.received.push_back(byte);
        }
    }

    fn has_fifo(&self) -> bool {
        self.fifo_control & fifo::ENABLE != 0
    }

    fn receiver_size(&self) -> usize {
        if self.has_fifo() { FIFO_SIZE } else { 1 }
    }

    fn is_looped(&self) -> bool {
        self.modem_control & modem_control::LOOP != 0
    }

    fn has_divisor_access(&self) -> bool {
        self.line_control & line_control::DIVISOR_ACCESS != 0
    }

    /// Is the interrupt output active?
    pub(super) fn interrupts(&self) -> bool {
        self.identification() != identification::NONE
    }

    /// The pending interrupt of the highest priority.
    fn identification(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(enable::LINE_STATUS) && self.overrun {
            identification::LINE_STATUS
        } else if enabled(enable::RECEIVED) && !self.received.is_empty() {
            if self.has_fifo() && self.received.len() < self.trigger_level() {
                // No clock runs here: bytes below the trigger level have waited long enough.
                identification::TIMEOUT
            } else {
                identification::RECEIVED
            }
        } else if enabled(enable::TRANSMITTER_EMPTY) && self.transmitter_interrupt {
            identification::TRANSMITTER_EMPTY
        } else if enabled(enable::MODEM_STATUS) && self.modem_status & !modem_status::LINES != 0 {
            identification::MODEM_STATUS
        } else {
            identification::NONE
        }
    }

    fn trigger_level(&self) -> usize {
        [1, 4, 8, 14][usize::from(self.fifo_control >> 6)]
    }

    pub(super) fn read(&mut self, offset: u64) -> (u8, Effect) {
        let value = match offset {
            register::DATA if self.has_divisor_access() => self.divisor[0],
            register::INTERRUPT_ENABLE if self.has_divisor_access() => self.divisor[1],
            register::DATA => self.received.pop_front().unwrap_or(0),
            register::INTERRUPT_ENABLE => self.interrupt_enable,
            register::IDENTIFICATION => self.read_identification(),
            register::LINE_CONTROL => self.line_control,
            register::MODEM_CONTROL => self.modem_control,
            register::LINE_STATUS => self.read_line_status(),
            register::MODEM_STATUS => {
                let status = self.modem_status;
                self.modem_status &= modem_status::LINES;
                status
            }
            register::SCRATCH => self.scratch,
            _ => 0xff,
        };
        (value, self.effect(None))
    }

    fn read_identification(&mut self) -> u8 {
        let source = self.identification();
        if source == identification::TRANSMITTER_EMPTY {
            self.transmitter_interrupt = false;
        }
        if self.has_fifo() {
            source | identification::FIFO_ENABLED
        } else {
            source
        }
    }

    fn read_line_status(&mut self) -> u8 {
        let mut status = line_status::TRANSMITTER_EMPTY;
        if !self.received.is_empty() {
            status |= line_status::DATA_READY;
        }
        if std::mem::take(&mut self.overrun) {
            status |= line_status::OVERRUN;
        }
        status
    }

    pub(super) fn write(&mut self, offset: u64, value: u8) -> Effect {
        let mut sent = None;
        match offset {
            register::DATA if self.has_divisor_access() => self.divisor[0] = value,
            register::INTERRUPT_ENABLE if self.has_divisor_access() => self.divisor[1] = value,
            register::DATA => sent = self.transmit(value),
            register::INTERRUPT_ENABLE => {
                let added = value & !self.interrupt_enable;
                self.interrupt_enable = value & enable::ALL;
                // The transmitter is empty: whoever asks to be told is told at once.
                self.transmitter_interrupt |= added & enable::TRANSMITTER_EMPTY != 0;
            }
            register::IDENTIFICATION => self.write_fifo_control(value),
            register::LINE_CONTROL => self.line_control = value,
            register::MODEM_CONTROL => {
                self.modem_control = value & modem_control::ALL;
                self.update_modem_status();
            }
            register::SCRATCH => self.scratch = value,
            // The status registers are read-only.
            _ => {}
        }
        self.effect(sent)
    }

    /// Sends a byte, which takes no time: the transmitter is empty again at once.
    fn transmit(&mut self, value: u8) -> Option<u8> {
        self.transmitter_interrupt = true;
        if !self.is_looped() {
            return Some(value);
        }
        if self.received.len() < self.receiver_size() {
            self.received.push_back(value);
        } else {
            self.overrun = true;
            if !self.has_fifo() {
                // Without FIFO the new byte replaces the old; with it, the new one is lost.
                self.received = VecDeque::from([value]);
            }
        }
        None
    }

    fn write_fifo_control(&mut self, value: u8) {
        let switched = (value ^ self.fifo_control) & fifo::ENABLE != 0;
        if switched || value & (fifo::ENABLE | fifo::CLEAR_RECEIVER) == 3 {
            self.received.clear();
        }
        // The other bits count only together with "enable".
        self.fifo_control = match value & fifo::ENABLE {
            0 => 0,
            _ => value & fifo::KEPT,
        };
    }

    /// In the loop, the four outputs drive the four inputs; else the peer does.
    fn update_modem_status(&mut self) {
        let lines = if self.is_looped() {
            let [dtr, rts, out1, out2] = [0, 1, 2, 3].map(|bit| self.modem_control >> bit & 1);
            rts << 4 | dtr << 5 | out1 << 6 | out2 << 7
        } else {
            modem_status::PEER
        };
        let changed = (lines ^ self.modem_status) & modem_status::LINES;
        // Of the ring indicator only the end counts.
        let counted = changed & !(lines & modem_status::RING);
        self.modem_status = lines | self.modem_status & !modem_status::LINES | counted >> 4;
    }

    fn effect(&mut self, sent: Option<u8>) -> Effect {
        self.receive();
        let has_room_again = self.refused && self.backlog.len() <= BACKLOG_SIZE / 2;
        if has_room_again {
            self.refused = false;
        }
        Effect {
            sent,
            has_room_again,
        }
    }

    pub(super) fn save(&self) -> UartState {
        let Self {
            interrupt_enable,
            fifo_control,
            line_control,
            modem_control,
            modem_status,
            scratch,
            divisor,
            overrun,
            transmitter_interrupt,
            received,
            backlog,
            refused,
        } = self;
        UartState {
            interrupt_enable: u32::from(*interrupt_enable),
            fifo_control: u32::from(*fifo_control),
            line_control: u32::from(*line_control),
            modem_control: u32::from(*modem_control),
            modem_status: u32::from(*modem_status),
            scratch: u32::from(*scratch),
            divisor: u32::from(u16::from_le_bytes(*divisor)),
            overrun: *overrun,
            transmitter_interrupt: *transmitter_interrupt,
            received: received.iter().copied().collect(),
            backlog: backlog.iter().copied().collect(),
            refused: *refused,
        }
    }
}

impl TryFrom<UartState> for Uart {
    type Error = String;

    fn try_from(state: UartState) -> Result<Self, Self::Error> {
        let UartState {
            interrupt_enable,
            fifo_control,
            line_control,
            modem_control,
            modem_status,
            scratch,
            divisor,
            overrun,
            transmitter_interrupt,
            received,
            backlog,
            refused,
        } = state;
        let register = |name: &str, value: u32, mask: u8| match u8::try_from(value) {
            Ok(value) if value & !mask == 0 => Ok(value),
            _ => Err(format!("{name} register {value:#x} has reserved bits set")),
        };
        let divisor = u16::try_from(divisor)
            .or(Err("the divisor has more than 16 bits"))?
            .to_le_bytes();
        let uart = Self {
            interrupt_enable: register("interrupt enable", interrupt_enable, enable::ALL)?,
            fifo_control: register("FIFO control", fifo_control, fifo::KEPT)?,
            line_control: register("line control", line_control, 0xff)?,
            modem_control: register("modem control", modem_control, modem_control::ALL)?,
            modem_status: register("modem status", modem_status, 0xff)?,
            scratch: register("scratch", scratch, 0xff)?,
            divisor,
            overrun,
            transmitter_interrupt,
            received: received.into(),
            backlog: backlog.into(),
            refused,
        };
        if uart.received.len() > uart.receiver_size() || uart.backlog.len() > BACKLOG_SIZE {
            return Err("more input waits than the port can hold".into());
        }
        Ok(uart)
    }
}
