//! Random operations, against a model of the receiver's memory.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use dunlin_lane::{LaneError, PageSender, Ticket};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::support::{Factory, Pair, Region, SMALL, at, soon};

/// Memory is written by slots, each at most once between two moments of agreement.
const SLOT: u64 = 5_000;
const SLOTS: usize = 60;

/// An operation of the sender.
#[derive(Debug, Clone)]
enum Step {
    /// A write of this many bytes to each of some free slots.
    Write(Vec<u16>),
    /// A message of this many bytes.
    Message(usize),
    /// The next operations are tried with this patience, in microseconds.
    Hurry(u64),
    /// Waits until the receiver has seen all: slots are free again.
    Agree,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop::collection::vec(0..=SLOT as u16, 0..10).prop_map(Step::Write),
        3 => (0..SMALL.message_bytes).prop_map(Step::Message),
        1 => (0..2_000_u64).prop_map(Step::Hurry),
        1 => Just(Step::Agree),
    ]
}

/// What the receiver has to do next.
enum Expected {
    /// To find this message, and at each place so many bytes of this content.
    Message(Vec<u8>, Vec<(u64, u16, u8)>),
    /// To say that it has come so far.
    Agreement,
}

struct Model {
    sender: Box<dyn PageSender>,
    /// What the sender may read, if the lane does so.
    lent: Option<Region>,
    to_receiver: mpsc::Sender<Expected>,
    agreed: mpsc::Receiver<()>,
    written: Vec<(u64, u16, u8)>,
    next_slot: usize,
    byte: u8,
    patience: Duration,
}

impl Model {
    fn deadline(&self) -> Instant {
        Instant::now() + self.patience
    }

    fn walk(&mut self, step: Step) -> Result<(), LaneError> {
        match step {
            Step::Write(lengths) => self.write(&lengths),
            Step::Message(length) => self.message(length),
            Step::Hurry(patience) => {
                self.patience = Duration::from_micros(patience);
                Ok(())
            }
            Step::Agree => self.agree(),
        }
    }

    fn write(&mut self, lengths: &[u16]) -> Result<(), LaneError> {
        if self.next_slot + lengths.len() > SLOTS {
            self.agree()?;
        }
        // Every other write comes from memory of the sender itself, where the lane reads it.
        let lent = self.lent.take_if(|_| self.byte.is_multiple_of(2));
        let mut buffer = self.sender.buffer(soon())?;
        let mut places = Vec::new();
        for &length in lengths {
            self.byte = self.byte.wrapping_add(1);
            // Slots are used from both ends, so that places are not in order.
            let number = match self.next_slot % 2 {
                0 => self.next_slot / 2,
                _ => SLOTS - 1 - self.next_slot / 2,
            };
            self.next_slot += 1;
            let target = number as u64 * SLOT;
            match &lent {
                Some(region) => region.fill(target..target + u64::from(length), self.byte),
                None => buffer.extend(length.into()).unwrap().fill(self.byte),
            }
            places.push(at(target, length.into()));
            self.written.push((target, length, self.byte));
        }
        let deadline = self.deadline();
        let Some(region) = lent else {
            return posted(self.sender.write(buffer, &places, deadline));
        };
        self.lent = Some(region);
        self.sender.recycle(buffer);
        posted(self.sender.write_lent(&places, deadline))
    }

    fn message(&mut self, length: usize) -> Result<(), LaneError> {
        self.byte = self.byte.wrapping_add(1);
        let message = vec![self.byte; length];
        let written = std::mem::take(&mut self.written);
        let expected = Expected::Message(message.clone(), written);
        self.to_receiver.send(expected).unwrap();
        let deadline = self.deadline();
        posted(self.sender.send(&message, deadline))
    }

    fn agree(&mut self) -> Result<(), LaneError> {
        self.message(3)?;
        self.to_receiver.send(Expected::Agreement).unwrap();
        self.sender.complete(Ticket::ALL, soon())?;
        self.agreed.recv().unwrap();
        self.next_slot = 0;
        Ok(())
    }
}

/// After a time-out the operation is posted all the same.
fn posted(result: Result<Ticket, LaneError>) -> Result<(), LaneError> {
    match result {
        Ok(_) | Err(LaneError::TimedOut { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn run(pair: Pair, steps: Vec<Step>, patience: Duration) {
    let Pair {
        mut sender,
        mut receiver,
    } = pair;
    let region = Region::new(SLOTS * SLOT as usize);
    let all = 0..SLOTS as u64 * SLOT;
    receiver.grant(region.window(all.clone()), soon()).unwrap();
    let source = Region::new(SLOTS * SLOT as usize);
    let lends = sender.lend(source.window(all), soon()).unwrap();
    let (to_receiver, expected) = mpsc::channel::<Expected>();
    let (agree, agreed) = mpsc::channel();
    let mut model = Model {
        sender,
        lent: lends.then_some(source),
        to_receiver,
        agreed,
        written: Vec::new(),
        next_slot: 0,
        byte: 0,
        patience: Duration::from_secs(10),
    };
    let writer = thread::spawn(move || {
        for step in steps {
            model.walk(step).unwrap();
        }
        model.agree().unwrap();
        drop(model.to_receiver);
        model.sender
    });
    let mut message = Vec::new();
    for expected in expected {
        let Expected::Message(content, written) = expected else {
            agree.send(()).unwrap();
            continue;
        };
        let give_up = soon();
        loop {
            match receiver.receive(&mut message, Instant::now() + patience) {
                Err(LaneError::TimedOut { .. }) if Instant::now() < give_up => {}
                result => break result.map(drop).unwrap(),
            }
        }
        assert!(message == content, "{} bytes came", message.len());
        for (target, length, byte) in written {
            assert!(region.is(target..target + u64::from(length), byte));
        }
    }
    writer.join().unwrap();
}

pub(crate) fn any_interleaving_keeps_the_contract(factory: Factory) {
    let mut config = Config::with_cases(40);
    config.failure_persistence = None;
    let strategy = (
        prop::collection::vec(step(), 0..60),
        any::<u64>(),
        0..3_000_u64,
    );
    TestRunner::new(config)
        .run(&strategy, |(steps, seed, patience)| {
            run(factory(SMALL, seed), steps, Duration::from_micros(patience));
            Ok(())
        })
        .unwrap();
}
