//! The beginning of a session: greeting, configuration, page lanes.

use std::time::Instant;

use dunlin_guest::Memory;
use dunlin_lane::{PageSender, StreamLane, StreamSender};

use super::Phase;
use crate::error::MigrationError;
use crate::machine::SourceMachine;
use crate::options::{CancelToken, MigrationOptions, Mode, Verification};
use crate::ownership::Doubt;
use crate::protocol::message::{Configuration, Lanes, Process, Ready, Region};
use crate::protocol::{Kind, Message, Preamble, ProtocolError, Purpose, Token};
use crate::transport::{Connector, Transport};
use crate::wire::{Patience, Wire};

/// Lanes that are opened when nobody says how many: more are never used.
const MOST_LANES: u16 = 4;

/// A session that can begin to copy.
pub(super) struct Opened {
    pub(super) wire: Wire,
    pub(super) doubt: Doubt,
    pub(super) lanes: Vec<Box<dyn PageSender>>,
    /// Why memory cannot follow the guest there.
    pub(super) no_post_copy: Option<String>,
}

/// Reaches the destination, lets it build the machine, and opens the page lanes.
pub(super) fn open(
    options: &MigrationOptions,
    cancel: &CancelToken,
    machine: &dyn SourceMachine,
    connector: &mut dyn Connector,
) -> Result<Opened, MigrationError> {
    let token = Token::random().map_err(|source| MigrationError::Host {
        what: "random numbers",
        source,
    })?;
    let deadline = Instant::now() + options.connect_timeout;
    let patience = Patience::Until(deadline);
    let preamble = Preamble::connection(Purpose::Move, token);
    let mut wire = greet(connector, &preamble, cancel, deadline)?;
    let wanted = options.streams.unwrap_or_else(lanes_worth_trying).max(1);
    let memory = machine.memory();
    let configuration = Configuration {
        machine: machine.configuration(),
        ram_bytes: memory.size(),
        regions: regions_of(memory),
        verification: match options.verification {
            Verification::Off => 0,
            Verification::AfterHandOver => 1,
            Verification::BeforeHandOver => 2,
        },
        lanes: wanted.into(),
    };
    wire.send(&Message::Configuration(configuration), patience)?;
    let ready = ready(&mut wire, patience)?;
    let incarnation = <[u8; 16]>::try_from(ready.incarnation.as_slice());
    let incarnation = incarnation.map_err(|_wrong_length| {
        ProtocolError::invalid(Kind::Ready, "incarnation is not 16 bytes")
    })?;
    if let Some(process) = ready.process.and_then(Process::find) {
        connector.watch(process);
    }
    let count = u16::try_from(ready.lanes)
        .unwrap_or(u16::MAX)
        .clamp(1, wanted);
    let mut lanes: Vec<Box<dyn PageSender>> = Vec::new();
    for number in 0..count {
        let preamble = Preamble {
            lane: number,
            ..Preamble::connection(Purpose::Lane, token)
        };
        let lane = greet(connector, &preamble, cancel, deadline)?;
        lanes.push(sender(lane.into_transport()));
    }
    let open = Lanes {
        count: count.into(),
    };
    wire.send(&Message::Lanes(open), patience)?;
    let doubt = Doubt {
        token,
        incarnation: Token::from_bytes(incarnation),
    };
    Ok(Opened {
        wire,
        doubt,
        lanes,
        no_post_copy: no_post_copy(options, ready.no_post_copy),
    })
}

/// Why memory cannot follow the guest, and a word about it when it might have.
fn no_post_copy(options: &MigrationOptions, refused: Option<String>) -> Option<String> {
    if options.mode == Mode::Pre {
        return Some("it was not to".to_owned());
    }
    let reason = if options.verification == Verification::BeforeHandOver {
        Some("memory is to be compared before the hand-over".to_owned())
    } else {
        refused.map(|reason| format!("the destination cannot: {reason}"))
    };
    if let Some(reason) = &reason {
        tracing::info!(
            reason,
            "memory cannot follow the guest: all of it goes before"
        );
    }
    reason
}

fn ready(wire: &mut Wire, patience: Patience) -> Result<Ready, MigrationError> {
    match wire.receive(patience)? {
        Message::Ready(ready) => Ok(ready),
        Message::Abort(body) => Err(MigrationError::Peer {
            reason: body.reason,
        }),
        other => Err(ProtocolError::Unexpected {
            kind: other.kind(),
            state: Phase::Connecting.name(),
        }
        .into()),
    }
}

/// A connection on which both sides have said the same preamble.
pub(super) fn greet(
    connector: &mut dyn Connector,
    preamble: &Preamble,
    cancel: &CancelToken,
    deadline: Instant,
) -> Result<Wire, MigrationError> {
    let patience = Patience::Until(deadline);
    let mut wire = Wire::new(connector.connect(deadline)?);
    wire.set_stops(vec![cancel.clone()]);
    wire.send_preamble(preamble, patience)?;
    if wire.receive_preamble(patience)? != *preamble {
        let reason = "it does not belong to this session";
        return Err(ProtocolError::Preamble { reason }.into());
    }
    Ok(wire)
}

/// A page lane over a stream.
pub(super) fn sender(transport: Box<dyn Transport>) -> Box<dyn PageSender> {
    Box::new(StreamSender::new(transport, StreamLane::default()))
}

/// More lanes than processors only take turns.
fn lanes_worth_trying() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(processors)
        .unwrap_or(u16::MAX)
        .min(MOST_LANES)
}

/// Where RAM lies, as it travels.
pub(crate) fn regions_of(memory: &Memory) -> Vec<Region> {
    memory
        .regions()
        .map(|region| Region {
            start: region.start,
            size: region.size,
            offset: region.offset,
        })
        .collect()
}
