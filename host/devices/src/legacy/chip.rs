//! One 8259A (Intel data sheet 231468; the register names are its).

/// Where the chip stands in its initialization.
///
/// ```text
///   any ── ICW1 ─► Word2 ─► Word3 ─► Word4 ─► Ready
///                    │        │         ▲       ▲
///                    ├────────┼─ single ┘       │    ICW1 says single: no third word;
///                    └────────┴─────────────────┘    it does not ask for the fourth: none
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub(super) enum Stage {
    /// Operates.
    #[default]
    Ready = 0,
    /// Waits for ICW2.
    Word2 = 1,
    /// Waits for ICW3.
    Word3 = 2,
    /// Waits for ICW4.
    Word4 = 3,
}

/// What the next read of the command port gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub(super) enum Reads {
    /// The interrupt request register.
    #[default]
    Requests = 0,
    /// The in-service register.
    InService = 1,
}

/// The input at which the slave hangs on the master.
pub(super) const CASCADE: u8 = 2;

/// Bits of ICW1.
mod icw1 {
    pub(super) const NEEDS_ICW4: u8 = 1 << 0;
    pub(super) const SINGLE: u8 = 1 << 1;
    pub(super) const LEVEL: u8 = 1 << 3;
    /// Tells ICW1 from OCW2 and OCW3.
    pub(super) const IS_ICW1: u8 = 1 << 4;
}

/// Bits of ICW4.
mod icw4 {
    pub(super) const AUTO_END: u8 = 1 << 1;
    pub(super) const FULLY_NESTED: u8 = 1 << 4;
}

/// Bits of OCW3.
mod ocw3 {
    pub(super) const IS_OCW3: u8 = 1 << 3;
    pub(super) const POLL: u8 = 1 << 2;
    pub(super) const READ: u8 = 1 << 1;
    pub(super) const READ_IN_SERVICE: u8 = 1 << 0;
    pub(super) const SET_SPECIAL_MASK: u8 = 1 << 6;
    pub(super) const SPECIAL_MASK: u8 = 1 << 5;
}

/// The registers of one chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chip {
    /// Which inputs can be switched to levels by the edge/level register.
    pub(super) switchable: u8,
    /// Inputs that are high.
    pub(super) lines: u8,
    /// Edges that were seen and not yet acknowledged.
    pub(super) edges: u8,
    pub(super) mask: u8,
    pub(super) in_service: u8,
    /// The edge/level register: inputs in level mode.
    pub(super) levels: u8,
    /// ICW1 said that all inputs are in level mode.
    pub(super) all_levels: bool,
    /// The high five bits of the vectors.
    pub(super) base: u8,
    /// ICW3: the inputs with slaves, or the slave's own number.
    pub(super) cascade: u8,
    /// The input with the highest priority.
    pub(super) top: u8,
    pub(super) stage: Stage,
    pub(super) single: bool,
    pub(super) needs_icw4: bool,
    /// An interrupt ends with its acknowledgement.
    pub(super) auto_end: bool,
    /// It then gets the lowest priority.
    pub(super) auto_rotate: bool,
    pub(super) special_mask: bool,
    /// Special fully nested mode: a slave in service does not hold its other interrupts back.
    pub(super) fully_nested: bool,
    pub(super) reads: Reads,
    /// The next read acknowledges an interrupt.
    pub(super) poll: bool,
}

impl Chip {
    /// A chip as no program has initialized it: nothing gets through.
    pub(super) const fn new(switchable: u8) -> Self {
        Self {
            switchable,
            lines: 0,
            edges: 0,
            mask: 0xff,
            in_service: 0,
            levels: 0,
            all_levels: false,
            base: 0,
            cascade: 0,
            top: 0,
            stage: Stage::Ready,
            single: false,
            needs_icw4: false,
            auto_end: false,
            auto_rotate: false,
            special_mask: false,
            fully_nested: false,
            reads: Reads::Requests,
            poll: false,
        }
    }

    fn level_inputs(&self) -> u8 {
        if self.all_levels { 0xff } else { self.levels }
    }

    /// The interrupt request register.
    fn requests(&self) -> u8 {
        let levels = self.level_inputs();
        self.lines & levels | self.edges & !levels
    }

    /// Drives an input.
    pub(super) fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << (input & 7);
        if high {
            if self.lines & bit == 0 {
                self.edges |= bit;
            }
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
    }

    /// The first of `inputs` by priority, with its distance from the highest.
    fn first(&self, inputs: u8) -> Option<(u32, u8)> {
        if inputs == 0 {
            return None;
        }
        let distance = inputs.rotate_right(self.top.into()).trailing_zeros();
        Some((distance, (self.top + distance as u8) & 7))
    }

    /// The input that the chip's output announces.
    pub(super) fn pending(&self) -> Option<u8> {
        let (distance, input) = self.first(self.requests() & !self.mask)?;
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        if self.fully_nested {
            blocking &= !(self.cascade & 1 << input);
        }
        match self.first(blocking) {
            Some((serving, _)) if serving <= distance => None,
            _ => Some(input),
        }
    }

    /// Takes an interrupt: from request to service.
    pub(super) fn acknowledge(&mut self, input: u8) {
        let bit = 1 << (input & 7);
        self.edges &= !bit;
        if !self.auto_end {
            self.in_service |= bit;
        } else if self.auto_rotate {
            self.top = (input + 1) & 7;
        }
    }

    /// The vector of an input.
    pub(super) fn vector(&self, input: u8) -> u8 {
        self.base | input
    }

    /// A write to the command port: ICW1, OCW2 or OCW3.
    pub(super) fn write_command(&mut self, value: u8) {
        if value & icw1::IS_ICW1 != 0 {
            self.begin(value);
        } else if value & ocw3::IS_OCW3 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn begin(&mut self, value: u8) {
        *self = Self {
            lines: self.lines,
            levels: self.levels,
            mask: 0,
            base: self.base,
            cascade: self.cascade,
            stage: Stage::Word2,
            single: value & icw1::SINGLE != 0,
            needs_icw4: value & icw1::NEEDS_ICW4 != 0,
            all_levels: value & icw1::LEVEL != 0,
            ..Self::new(self.switchable)
        };
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & ocw3::SET_SPECIAL_MASK != 0 {
            self.special_mask = value & ocw3::SPECIAL_MASK != 0;
        }
        if value & ocw3::POLL != 0 {
            self.poll = true;
        } else if value & ocw3::READ != 0 {
            self.reads = match value & ocw3::READ_IN_SERVICE {
                0 => Reads::Requests,
                _ => Reads::InService,
            };
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        let (rotate, specific, end) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        if !end {
            match (rotate, specific) {
                (true, true) => self.top = (named + 1) & 7,
                (rotate, false) => self.auto_rotate = rotate,
                (false, true) => {}
            }
            return;
        }
        let ended = if specific {
            Some(named)
        } else {
            // In special mask mode, what is masked is not ended by a command that names nothing.
            let hidden = if self.special_mask { self.mask } else { 0 };
            self.first(self.in_service & !hidden)
                .map(|(_, input)| input)
        };
        if let Some(input) = ended {
            self.in_service &= !(1 << input);
            if rotate {
                self.top = (input + 1) & 7;
            }
        }
    }

    /// A write to the data port: ICW2 to ICW4 in their turn, else OCW1.
    pub(super) fn write_data(&mut self, value: u8) {
        let behind_word3 = match self.needs_icw4 {
            true => Stage::Word4,
            false => Stage::Ready,
        };
        match self.stage {
            Stage::Ready => self.mask = value,
            Stage::Word2 => {
                self.base = value & 0xf8;
                self.stage = match self.single {
                    true => behind_word3,
                    false => Stage::Word3,
                };
            }
            Stage::Word3 => {
                self.cascade = value;
                self.stage = behind_word3;
            }
            Stage::Word4 => {
                self.auto_end = value & icw4::AUTO_END != 0;
                self.fully_nested = value & icw4::FULLY_NESTED != 0;
                self.stage = Stage::Ready;
            }
        }
    }

    /// What a poll gives: the interrupt that it acknowledges.
    pub(super) fn take_poll(&mut self) -> Option<u8> {
        if !std::mem::take(&mut self.poll) {
            return None;
        }
        Some(match self.pending() {
            Some(input) => {
                self.acknowledge(input);
                0x80 | input
            }
            None => 0,
        })
    }

    /// A read of the command port, when no poll was asked for.
    pub(super) fn read_command(&self) -> u8 {
        match self.reads {
            Reads::Requests => self.requests(),
            Reads::InService => self.in_service,
        }
    }

    /// Writes the edge/level register.
    pub(super) fn write_levels(&mut self, value: u8) {
        self.levels = value & self.switchable;
    }
}
