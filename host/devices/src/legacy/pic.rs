//! The pair of 8259A interrupt controllers of the first PCs, in cascade.
//!
//! ```text
//!  lines 8 to 15 ─► slave ─► line 2 ┐
//!  lines 0, 1, 3 to 7 ──────────────┴► master ─► processor's INTR (LINT0 in ExtINT mode)
//! ```
//!
//! Ports: 0x20 and 0x21 master, 0xa0 and 0xa1 slave, 0x4d0 and 0x4d1 edge or level. The processor
//! asks for the vector itself, by [`VectoredController::acknowledge`].

use std::sync::{Arc, Mutex, OnceLock};

use dunlin_guest::{InterruptLine, RestoreError, SavedState, VectoredController};

use super::chip::{CASCADE, Chip, Reads, Stage};
use crate::bus::{Bus, BusDevice, RangeError};
use crate::component::{Component, Reach};
use crate::lock;

const KIND: &str = "pic";
const VERSION: u32 = 1;

/// Number of lines.
pub const LINES: u32 = 16;

const MASTER_PORT: u64 = 0x20;
const SLAVE_PORT: u64 = 0xa0;
const LEVEL_PORT: u64 = 0x4d0;

/// Lines that can be in level mode: not the timer, the keyboard, the cascade, the clock, the
/// coprocessor's.
const SWITCHABLE: [u8; 2] = [0xf8, 0xde];

const MASTER: usize = 0;
const SLAVE: usize = 1;

#[derive(Debug)]
struct Pair([Chip; 2]);

impl Pair {
    const fn new() -> Self {
        Self([Chip::new(SWITCHABLE[MASTER]), Chip::new(SWITCHABLE[SLAVE])])
    }

    /// Leads the slave's output to the master; the level of the pair's output.
    fn settle(&mut self) -> bool {
        let [master, slave] = &mut self.0;
        master.set_line(CASCADE, slave.pending().is_some());
        master.pending().is_some()
    }

    /// The vector that the processor gets. An input that went low before it was acknowledged has
    /// the vector of input 7, and is not in service.
    fn acknowledge(&mut self) -> u8 {
        const SPURIOUS: u8 = 7;
        let [master, slave] = &mut self.0;
        let Some(input) = master.pending() else {
            return master.vector(SPURIOUS);
        };
        master.acknowledge(input);
        if input != CASCADE {
            return master.vector(input);
        }
        // The slave's output falls while it is acknowledged: what waits behind is a new edge.
        master.set_line(CASCADE, false);
        match slave.pending() {
            Some(input) => {
                slave.acknowledge(input);
                slave.vector(input)
            }
            None => slave.vector(SPURIOUS),
        }
    }
}

/// The two controllers.
#[derive(Debug)]
pub struct Pic {
    pair: Mutex<Pair>,
    /// The processor's INTR.
    output: OnceLock<Arc<dyn InterruptLine>>,
}

/// Saved state of one controller.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ChipState {
    /// Inputs that are high, one bit each.
    #[prost(uint32, tag = "1")]
    pub lines: u32,
    /// Edges that wait.
    #[prost(uint32, tag = "2")]
    pub edges: u32,
    /// Interrupt mask register.
    #[prost(uint32, tag = "3")]
    pub mask: u32,
    /// In-service register.
    #[prost(uint32, tag = "4")]
    pub in_service: u32,
    /// Edge/level register.
    #[prost(uint32, tag = "5")]
    pub levels: u32,
    /// ICW1 chose levels for all inputs.
    #[prost(bool, tag = "6")]
    pub all_levels: bool,
    /// Vector of input 0.
    #[prost(uint32, tag = "7")]
    pub base: u32,
    /// ICW3.
    #[prost(uint32, tag = "8")]
    pub cascade: u32,
    /// The input with the highest priority.
    #[prost(uint32, tag = "9")]
    pub top: u32,
    /// Initialization: 0 complete, 1 to 3 waits for ICW2 to ICW4.
    #[prost(uint32, tag = "10")]
    pub stage: u32,
    /// ICW1: no ICW3 comes.
    #[prost(bool, tag = "11")]
    pub single: bool,
    /// ICW1: ICW4 comes.
    #[prost(bool, tag = "12")]
    pub needs_icw4: bool,
    /// Automatic end of interrupt.
    #[prost(bool, tag = "13")]
    pub auto_end: bool,
    /// Rotation in automatic end of interrupt.
    #[prost(bool, tag = "14")]
    pub auto_rotate: bool,
    /// Special mask mode.
    #[prost(bool, tag = "15")]
    pub special_mask: bool,
    /// Special fully nested mode.
    #[prost(bool, tag = "16")]
    pub fully_nested: bool,
    /// The command port reads as the in-service register.
    #[prost(bool, tag = "17")]
    pub reads_in_service: bool,
    /// The next read is a poll.
    #[prost(bool, tag = "18")]
    pub poll: bool,
}

/// Saved state of [`Pic`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct PicState {
    /// Lines 0 to 7.
    #[prost(message, optional, tag = "1")]
    pub master: Option<ChipState>,
    /// Lines 8 to 15.
    #[prost(message, optional, tag = "2")]
    pub slave: Option<ChipState>,
}

fn save_chip(chip: &Chip) -> ChipState {
    let Chip {
        switchable: _,
        lines,
        edges,
        mask,
        in_service,
        levels,
        all_levels,
        base,
        cascade,
        top,
        stage,
        single,
        needs_icw4,
        auto_end,
        auto_rotate,
        special_mask,
        fully_nested,
        reads,
        poll,
    } = *chip;
    ChipState {
        lines: lines.into(),
        edges: edges.into(),
        mask: mask.into(),
        in_service: in_service.into(),
        levels: levels.into(),
        all_levels,
        base: base.into(),
        cascade: cascade.into(),
        top: top.into(),
        stage: stage as u32,
        single,
        needs_icw4,
        auto_end,
        auto_rotate,
        special_mask,
        fully_nested,
        reads_in_service: reads == Reads::InService,
        poll,
    }
}

fn restore_chip(state: &ChipState, switchable: u8) -> Result<Chip, &'static str> {
    let byte = |value: u32| u8::try_from(value).or(Err("a register has more than eight bits"));
    let (levels, base, top) = (byte(state.levels)?, byte(state.base)?, byte(state.top)?);
    if levels & !switchable != 0 {
        return Err("an input is in level mode that cannot be");
    }
    if base & 7 != 0 || top > 7 {
        return Err("vectors or priorities are out of range");
    }
    Ok(Chip {
        switchable,
        lines: byte(state.lines)?,
        edges: byte(state.edges)?,
        mask: byte(state.mask)?,
        in_service: byte(state.in_service)?,
        levels,
        all_levels: state.all_levels,
        base,
        cascade: byte(state.cascade)?,
        top,
        stage: match state.stage {
            0 => Stage::Ready,
            1 => Stage::Word2,
            2 => Stage::Word3,
            3 => Stage::Word4,
            _ => return Err("there is no such stage of initialization"),
        },
        single: state.single,
        needs_icw4: state.needs_icw4,
        auto_end: state.auto_end,
        auto_rotate: state.auto_rotate,
        special_mask: state.special_mask,
        fully_nested: state.fully_nested,
        reads: match state.reads_in_service {
            true => Reads::InService,
            false => Reads::Requests,
        },
        poll: state.poll,
    })
}

impl Pic {
    /// Two controllers that no program has initialized: all lines are masked.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            pair: Mutex::new(Pair::new()),
            output: OnceLock::new(),
        })
    }

    /// Leads the output to a processor. Only the first call has an effect.
    pub fn connect(&self, output: Arc<dyn InterruptLine>) {
        let pair = &mut *lock(&self.pair);
        self.output.get_or_init(|| output).set_level(pair.settle());
    }

    /// Puts the ports on the port bus.
    ///
    /// # Errors
    /// [`RangeError`] when another device has one of them.
    pub fn attach(self: &Arc<Self>, ports: &Bus) -> Result<(), RangeError> {
        for (first, part) in [
            (MASTER_PORT, Part::Chip(MASTER)),
            (SLAVE_PORT, Part::Chip(SLAVE)),
            (LEVEL_PORT, Part::Levels),
        ] {
            let pic = Arc::clone(self);
            ports.insert(first, 2, Arc::new(Ports { pic, part }))?;
        }
        Ok(())
    }

    /// The line that leads to input `number` of 16; another number leads nowhere, and so does 2,
    /// where the slave is.
    pub fn line(self: &Arc<Self>, number: u32) -> Arc<dyn InterruptLine> {
        Arc::new(Line {
            pic: Arc::clone(self),
            number,
        })
    }

    /// Changes registers, then drives the output. Under the lock, so that no older level comes
    /// behind a newer one.
    fn change<T>(&self, change: impl FnOnce(&mut Pair) -> T) -> T {
        let mut pair = lock(&self.pair);
        let result = change(&mut pair);
        let high = pair.settle();
        if let Some(output) = self.output.get() {
            output.set_level(high);
        }
        result
    }
}

impl VectoredController for Pic {
    fn acknowledge(&self) -> u8 {
        self.change(Pair::acknowledge)
    }
}

#[derive(Debug)]
struct Line {
    pic: Arc<Pic>,
    number: u32,
}

impl InterruptLine for Line {
    fn set_level(&self, high: bool) {
        if self.number >= LINES || self.number == u32::from(CASCADE) {
            return;
        }
        let (chip, input) = ((self.number / 8) as usize, (self.number % 8) as u8);
        self.pic.change(|pair| pair.0[chip].set_line(input, high));
    }
}

#[derive(Debug, Clone, Copy)]
enum Part {
    Chip(usize),
    Levels,
}

#[derive(Debug)]
struct Ports {
    pic: Arc<Pic>,
    part: Part,
}

impl BusDevice for Ports {
    fn label(&self) -> String {
        "pic".into()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = match self.part {
                Part::Chip(chip) => self.pic.change(|pair| {
                    let chip = &mut pair.0[chip];
                    match (chip.take_poll(), offset) {
                        (Some(polled), _) => polled,
                        (None, 0) => chip.read_command(),
                        (None, _) => chip.mask,
                    }
                }),
                Part::Levels => lock(&self.pic.pair).0[offset as usize & 1].levels,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (offset, byte) in (offset..).zip(data) {
            self.pic.change(|pair| match (self.part, offset) {
                (Part::Chip(chip), 0) => pair.0[chip].write_command(*byte),
                (Part::Chip(chip), _) => pair.0[chip].write_data(*byte),
                (Part::Levels, offset) => pair.0[offset as usize & 1].write_levels(*byte),
            });
        }
    }
}

impl Component for Pic {
    fn name(&self) -> String {
        "pic".into()
    }

    fn pause(&self, _reach: Reach) {}

    fn resume(&self) {}

    fn save(&self) -> SavedState {
        let Self { pair, output: _ } = self;
        let Pair([master, slave]) = &*lock(pair);
        let state = PicState {
            master: Some(save_chip(master)),
            slave: Some(save_chip(slave)),
        };
        SavedState::encode(&self.name(), KIND, VERSION, &state)
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        let PicState { master, slave } = state.decode(KIND, VERSION)?;
        let chip = |part: Option<ChipState>, index: usize| {
            let part = part.ok_or("one of the two controllers is missing")?;
            restore_chip(&part, SWITCHABLE[index])
        };
        let chips = chip(master, MASTER).and_then(|m| Ok([m, chip(slave, SLAVE)?]));
        let chips = chips.map_err(|reason| state.invalid(reason))?;
        self.change(|pair| pair.0 = chips);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
