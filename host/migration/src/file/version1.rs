//! Format version 1, which the release before this one wrote: a move's first round as it would
//! have gone over a connection.
//!
//! ```text
//! head             length of what follows
//! FileHeader       created, RAM size, components
//! Configuration    as in a move
//! RoundBegin, Pages…, ZeroPages…, RoundEnd
//! States
//! End              number of frames, hash of RAM
//! ```

use std::io::Read;

use dunlin_guest::{Memory, PageIndex};

use super::check_ram;
use super::error::SnapshotError;
use super::frames::FrameReader;
use super::reader::{configuration, header};
use crate::machine::{DestinationMachine, MachineError};
use crate::pages::{self, PAGE};
use crate::protocol::frame::{MAX_PAGES, MAX_ZERO_RUNS};
use crate::protocol::runs::{self, RUN_LENGTH, Run};
use crate::protocol::{Kind, Message, ProtocolError};

/// Restores the guest of a file whose head was read.
pub(super) fn restore<R: Read, M: DestinationMachine>(
    reader: &mut FrameReader<R>,
    build: impl FnOnce(&[u8]) -> Result<M, MachineError>,
) -> Result<M, SnapshotError> {
    let header = header(reader)?;
    let configuration = configuration(reader, header.ram_bytes)?;
    let mut machine = build(&configuration.machine)?;
    check_ram(machine.memory(), &configuration)?;
    read_pages(reader, machine.memory())?;
    let states = match reader.message()? {
        Message::States(body) => body.states,
        other => return Err(SnapshotError::unexpected(&other, "the states were due")),
    };
    let frames = reader.frames();
    match reader.message()? {
        Message::End(end)
            if end.frames == frames && end.hash == pages::hash_ram(machine.memory()) =>
        {
            reader.at_end()?;
        }
        other => {
            let due = "the end of the frames that came was due";
            return Err(SnapshotError::unexpected(&other, due));
        }
    }
    machine.restore(states)?;
    Ok(machine)
}

fn read_pages<R: Read>(reader: &mut FrameReader<R>, memory: &Memory) -> Result<(), SnapshotError> {
    match reader.message()? {
        Message::RoundBegin(_) => {}
        other => return Err(SnapshotError::unexpected(&other, "the pages were due")),
    }
    let (mut full, mut zero) = (0, 0);
    loop {
        match reader.frame()? {
            (Kind::Pages, payload) => full += store_pages(&payload, memory)?,
            (Kind::ZeroPages, payload) => zero += zero_pages(&payload, memory)?,
            (kind, payload) => {
                return match Message::decode(kind, &payload)? {
                    Message::RoundEnd(end) if (end.pages, end.zero_pages) == (full, zero) => Ok(()),
                    other => Err(SnapshotError::unexpected(
                        &other,
                        "the end of the pages was due",
                    )),
                };
            }
        }
    }
}

/// Stores the pages of a frame; how many there were.
fn store_pages(payload: &[u8], memory: &Memory) -> Result<u64, SnapshotError> {
    let (runs, content) = split(Kind::Pages, payload, MAX_PAGES, memory)?;
    let pages = count(&runs);
    if content.len() as u64 != pages * PAGE as u64 {
        let reason = "its length does not fit its runs";
        return Err(ProtocolError::invalid(Kind::Pages, reason).into());
    }
    let (content, _none) = content.as_chunks::<PAGE>();
    for (page, bytes) in runs.iter().flat_map(Run::pages).zip(content) {
        memory.write_page(page, bytes);
    }
    Ok(pages)
}

/// RAM is zero where nothing was stored; a page that was stored before is named only by a file
/// that says everything twice.
fn zero_pages(payload: &[u8], memory: &Memory) -> Result<u64, SnapshotError> {
    let (runs, rest) = split(Kind::ZeroPages, payload, MAX_ZERO_RUNS, memory)?;
    if !rest.is_empty() {
        let reason = "its length does not fit its runs";
        return Err(ProtocolError::invalid(Kind::ZeroPages, reason).into());
    }
    for run in &runs {
        clear(run, memory);
    }
    Ok(count(&runs))
}

fn clear(run: &Run, memory: &Memory) {
    let mut extents = pages::Extents::new(memory);
    let mut next = run.first.0;
    let end = next + u64::from(run.count);
    while next < end {
        match extents.hole_at(PageIndex(next)) {
            Some(behind) => next = behind,
            None => {
                memory.write_page(PageIndex(next), &[0; PAGE]);
                next += 1;
            }
        }
    }
}

fn count(runs: &[Run]) -> u64 {
    runs.iter().map(|run| u64::from(run.count)).sum()
}

/// The runs that a frame of pages begins with, and what follows them.
fn split<'a>(
    kind: Kind,
    payload: &'a [u8],
    limit: usize,
    memory: &Memory,
) -> Result<(Vec<Run>, &'a [u8]), ProtocolError> {
    let Some((count, rest)) = payload.split_first_chunk::<4>() else {
        return Err(ProtocolError::invalid(kind, "it is too short"));
    };
    let count = runs::decode_count(kind, *count, limit)?;
    let Some((table, rest)) = rest.split_at_checked(count * RUN_LENGTH) else {
        return Err(ProtocolError::invalid(kind, "it ends within its runs"));
    };
    Ok((runs::decode(kind, table, memory.pages())?, rest))
}
