//! What is between the two ends.

use std::collections::VecDeque;

use super::{Fault, MemoryLane};
use crate::page::{Placement, WindowRange};
use crate::windows::Windows;

/// Bytes of a piece that lands as a whole, at most.
const PIECE: usize = 3000;

/// A part of a write that lands as a whole.
#[derive(Debug)]
struct Piece {
    target: Placement,
    bytes: Vec<u8>,
}

/// An operation on its way.
#[derive(Debug)]
enum Flight {
    /// The pieces that have not landed yet.
    Write(Vec<Piece>),
    Message(Vec<u8>),
    Announcement(WindowRange),
}

/// What a receiver finds next.
#[derive(Debug)]
pub(super) enum Found {
    Message(Vec<u8>),
    Announcement(WindowRange),
    /// Nothing yet.
    Nothing,
    /// Nothing any more.
    End,
    /// The lane is broken.
    Broken(String),
}

#[derive(Debug)]
pub(super) struct Channel {
    pub(super) windows: Windows,
    flying: VecDeque<Flight>,
    in_flight: usize,
    /// Operations that have left `flying`.
    retired: u64,
    /// Operations that may move at all.
    moving: u64,
    fault: Option<Fault>,
    registers: bool,
    random: Random,
    broken: Option<String>,
    pub(super) sender_gone: bool,
    pub(super) receiver_gone: bool,
}

impl Channel {
    pub(super) fn new(options: &MemoryLane) -> Self {
        let moving = match options.fault {
            Some(Fault::Stall(at)) => at,
            _ => u64::MAX,
        };
        Self {
            windows: Windows::default(),
            flying: VecDeque::new(),
            in_flight: options.in_flight.max(1),
            retired: 0,
            moving,
            fault: options.fault,
            registers: options.registers,
            random: Random(options.seed),
            broken: None,
            sender_gone: false,
            receiver_gone: false,
        }
    }

    /// The number of the next operation.
    pub(super) fn posted(&self) -> u64 {
        self.retired + self.flying.len() as u64
    }

    /// Changes with whatever the other end may be waiting for.
    pub(super) fn progress(&self) -> (u64, bool) {
        (self.retired, self.broken.is_some())
    }

    /// Does the sender hear nothing any more?
    pub(super) fn is_over(&self) -> bool {
        self.receiver_gone || self.broken.is_some()
    }

    /// May the buffer of this operation be used again?
    pub(super) fn is_complete(&self, number: u64) -> bool {
        number < self.retired + self.in_flight as u64
    }

    pub(super) fn post_write(&mut self, mut bytes: &[u8], to: &[Placement]) {
        let mut pieces = Vec::new();
        for placement in to {
            let (mut target, mut left) = (placement.target, placement.length as usize);
            // A place of no bytes is a piece, too: it has to lie within a window.
            loop {
                let (front, rest) = bytes.split_at(left.min(PIECE).min(bytes.len()));
                pieces.push(Piece {
                    target: Placement {
                        target,
                        length: front.len() as u32,
                    },
                    bytes: front.to_vec(),
                });
                (bytes, left) = (rest, left - front.len());
                target += front.len() as u64;
                if left == 0 {
                    break;
                }
            }
        }
        self.post(Flight::Write(pieces));
    }

    pub(super) fn post_message(&mut self, message: &[u8]) {
        self.post(Flight::Message(message.to_vec()));
    }

    pub(super) fn post_announcement(&mut self, range: WindowRange) {
        self.post(Flight::Announcement(range));
    }

    fn post(&mut self, flight: Flight) {
        if self.fault == Some(Fault::Cut(self.posted())) {
            // What the wire had not brought over yet is lost.
            let kept = self.random.below(self.flying.len() + 1);
            self.moving = self.retired + kept as u64;
            self.receiver_gone = true;
            self.sender_gone = true;
        }
        self.flying.push_back(flight);
        if self.registers {
            self.land_some();
        }
    }

    /// What the receiver finds, after some of what is on its way has landed.
    pub(super) fn find(&mut self) -> Found {
        self.land_some();
        loop {
            if let Some(reason) = &self.broken {
                return Found::Broken(reason.clone());
            }
            if self.retired >= self.moving || self.flying.is_empty() {
                return self.nothing();
            }
            let event = self
                .flying
                .iter()
                .any(|flight| !matches!(flight, Flight::Write(_)));
            // Without anything to find, writes may wait, as long as they hold nobody up.
            if !event && self.flying.len() < self.in_flight && !self.sender_gone {
                return Found::Nothing;
            }
            match self.flying.pop_front() {
                Some(Flight::Write(pieces)) => {
                    self.flying.push_front(Flight::Write(pieces));
                    self.land(usize::MAX);
                }
                Some(Flight::Message(message)) => return self.found(message),
                Some(Flight::Announcement(range)) => {
                    self.retired += 1;
                    return Found::Announcement(range);
                }
                None => return self.nothing(),
            }
        }
    }

    fn found(&mut self, message: Vec<u8>) -> Found {
        let damaged = self.fault == Some(Fault::Corrupt(self.retired));
        self.retired += 1;
        if damaged {
            let reason = "a message is damaged".to_owned();
            self.broken = Some(reason.clone());
            return Found::Broken(reason);
        }
        Found::Message(message)
    }

    fn nothing(&self) -> Found {
        let stalled = matches!(self.fault, Some(Fault::Stall(_))) && self.retired >= self.moving;
        if self.sender_gone && !stalled {
            Found::End
        } else {
            Found::Nothing
        }
    }

    /// A random part of what may land does.
    fn land_some(&mut self) {
        let count = self.random.below(8);
        self.land(count);
    }

    /// Lands up to `count` pieces in random order. What follows a message waits for all that is
    /// in front of it.
    fn land(&mut self, count: usize) {
        for _ in 0..count {
            let numbers = self.retired..self.moving;
            let mut eligible = Vec::new();
            for (number, (index, flight)) in numbers.zip(self.flying.iter().enumerate()) {
                match flight {
                    Flight::Write(pieces) => {
                        eligible.extend((0..pieces.len()).map(|piece| (number, index, piece)));
                    }
                    _ if eligible.is_empty() => {}
                    _ => break,
                }
            }
            if eligible.is_empty() {
                break;
            }
            let (number, index, piece) = eligible[self.random.below(eligible.len())];
            if let Some(Flight::Write(pieces)) = self.flying.get_mut(index) {
                let piece = pieces.swap_remove(piece);
                self.put(piece, number);
            }
        }
        while let Some(Flight::Write(pieces)) = self.flying.front()
            && pieces.is_empty()
            && self.retired < self.moving
        {
            self.flying.pop_front();
            self.retired += 1;
        }
    }

    fn put(&mut self, mut piece: Piece, number: u64) {
        if self.fault == Some(Fault::Corrupt(number)) {
            piece.bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
            self.broken = Some("a write is damaged".to_owned());
        }
        match self.windows.resolve(piece.target) {
            Some(place) => {
                place.copy_from(&piece.bytes);
            }
            None => {
                self.broken = Some(format!(
                    "{} bytes for {:#x} are outside of what was granted",
                    piece.target.length, piece.target.target
                ));
            }
        }
    }
}

/// Numbers that look random and follow from the seed (SplitMix64).
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % limit.max(1) as u64) as usize
    }
}
