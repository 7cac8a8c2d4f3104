//! A guest at rest: the frames of a move, written to a file instead of a peer.
//!
//! ```text
//! preamble (purpose 3, length of what follows)
//! FileHeader       created, RAM size, components: all that `inspect` needs
//! Configuration    as in a move
//! RoundBegin, Pages…, ZeroPages…, RoundEnd
//! States
//! End              number of frames, hash of RAM
//! ```
//!
//! The file appears under its name only when it is whole and on disk: it is written to a
//! temporary file beside it, synchronised, and renamed. Its length stands in the preamble, so
//! that a file that was cut is known as such before anything is restored.

mod stream;

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dunlin_guest::PageIndex;
use serde::{Deserialize, Serialize};

use crate::destination::session::check_ram;
use crate::destination::store::Store;
use crate::error::MigrationError;
use crate::machine::{DestinationMachine, MachineError, SourceMachine};
use crate::pages::{self, Extents};
use crate::protocol::message::{
    Component, Configuration, End, FileHeader, RoundBegin, RoundEnd, States,
};
use crate::protocol::{Kind, Message, Preamble, ProtocolError, Purpose, Token, preamble};
use crate::source::attempt::regions_of;
use crate::source::round::Batch;
use crate::transport::TransportError;
use crate::wire::{Patience, Wire};
use stream::FileStream;

/// Files have no deadline; this only satisfies the stream's interface.
const FOREVER: Patience = Patience::Idle(Duration::from_secs(3600));
const BATCH_PAGES: usize = 128;

/// What a saved guest took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SaveReport {
    /// Size of the file.
    pub file_bytes: u64,
    /// Size of the guest's RAM.
    pub ram_bytes: u64,
    /// Pages with content.
    pub pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// From the first byte until the file was on disk, in milliseconds.
    pub total_ms: f64,
}

/// What is known of a saved guest without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSummary {
    /// Version of the format.
    pub version: u16,
    /// Seconds since 1970.
    pub created: u64,
    /// Size of the guest's RAM.
    pub ram_bytes: u64,
    /// Size of the file.
    pub file_bytes: u64,
    /// The components whose states it holds.
    pub components: Vec<ComponentSummary>,
    /// What [`SourceMachine::configuration`] said; opaque here, for those who can read it.
    #[serde(skip)]
    pub configuration: Vec<u8>,
}

/// One component of a saved guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ComponentSummary {
    /// Which instance.
    pub name: String,
    /// Which kind.
    pub kind: String,
    /// Version of its state.
    pub version: u32,
    /// Bytes of its state.
    pub bytes: u64,
}

/// Saves a guest. The machine has to be paused, and stays so.
///
/// # Errors
/// [`MigrationError`] when the machine or the file fails; nothing is left at `path` then, or what
/// was there before.
pub fn save(machine: &mut dyn SourceMachine, path: &Path) -> Result<SaveReport, MigrationError> {
    let begun = Instant::now();
    let failed = |action| move |source| file_error(action, path, source);
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let states = machine.save()?;
    let temporary =
        tempfile::NamedTempFile::new_in(directory).map_err(failed("create a file beside"))?;
    let file = temporary.as_file().try_clone().map_err(failed("write"))?;
    let mut wire = Wire::new(Box::new(FileStream::new(file, path)));
    let mut preamble = Preamble {
        purpose: Purpose::File,
        token: Token::from_bytes([0; 16]),
        body_length: 0,
    };
    wire.send_preamble(&preamble, FOREVER)?;
    let (pages, zero_pages) = write_guest(machine, states, &mut wire)?;
    preamble.body_length = wire.bytes_sent() - preamble::LENGTH as u64;
    let mut file = temporary.as_file();
    file.seek(SeekFrom::Start(0)).map_err(failed("write"))?;
    file.write_all(&preamble.encode())
        .map_err(failed("write"))?;
    file.sync_all().map_err(failed("synchronise"))?;
    temporary
        .persist(path)
        .map_err(|error| file_error("rename a file to", path, error.error))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failed("synchronise the directory of"))?;
    Ok(SaveReport {
        file_bytes: preamble.body_length + preamble::LENGTH as u64,
        ram_bytes: machine.memory().size(),
        pages,
        zero_pages,
        total_ms: begun.elapsed().as_secs_f64() * 1e3,
    })
}

fn write_guest(
    machine: &dyn SourceMachine,
    states: Vec<dunlin_guest::SavedState>,
    wire: &mut Wire,
) -> Result<(u64, u64), MigrationError> {
    let memory = machine.memory();
    let created = SystemTime::now().duration_since(UNIX_EPOCH);
    let header = FileHeader {
        created: created.map_or(0, |since| since.as_secs()),
        ram_bytes: memory.size(),
        components: states
            .iter()
            .map(|state| Component {
                name: state.name.clone(),
                kind: state.kind.clone(),
                version: state.version,
                bytes: state.body.len() as u64,
            })
            .collect(),
    };
    wire.send(&Message::FileHeader(header), FOREVER)?;
    let configuration = Configuration {
        machine: machine.configuration(),
        ram_bytes: memory.size(),
        regions: regions_of(memory),
        verification: 1,
    };
    wire.send(&Message::Configuration(configuration), FOREVER)?;
    let begin = RoundBegin {
        round: 0,
        pages: memory.pages(),
    };
    wire.send(&Message::RoundBegin(begin), FOREVER)?;
    let mut batch = Batch::new(BATCH_PAGES);
    let mut extents = Extents::new(memory);
    let (mut full, mut zero) = (0, 0);
    for page in (0..memory.pages()).map(PageIndex) {
        if extents.hole_at(page).is_some() {
            batch.add_zero(page);
            zero += 1;
        } else if batch.add(memory, page) {
            full += 1;
        } else {
            zero += 1;
        }
        if batch.is_full() {
            batch.send(wire, FOREVER)?;
        }
    }
    batch.send(wire, FOREVER)?;
    let end = RoundEnd {
        round: 0,
        pages: full,
        zero_pages: zero,
    };
    wire.send(&Message::RoundEnd(end), FOREVER)?;
    let states = States {
        attempt: 1,
        states,
        hash_wanted: false,
    };
    wire.send(&Message::States(states), FOREVER)?;
    let end = End {
        frames: wire.frames_sent(),
        hash: pages::hash_ram(memory),
    };
    wire.send(&Message::End(end), FOREVER)?;
    Ok((full, zero))
}

/// Reads what can be known of a saved guest without its RAM.
///
/// # Errors
/// [`MigrationError`] when it is not a saved guest, of another version, or not whole.
pub fn inspect(path: &Path) -> Result<FileSummary, MigrationError> {
    let (mut wire, file_bytes) = open(path)?;
    let header = read_header(&mut wire, path)?;
    let configuration =
        read_configuration(&mut wire, header.ram_bytes).map_err(|error| cut_short(error, path))?;
    Ok(FileSummary {
        configuration: configuration.machine,
        version: crate::protocol::VERSION,
        created: header.created,
        ram_bytes: header.ram_bytes,
        file_bytes,
        components: header
            .components
            .into_iter()
            .map(|component| ComponentSummary {
                name: component.name,
                kind: component.kind,
                version: component.version,
                bytes: component.bytes,
            })
            .collect(),
    })
}

/// Restores a saved guest into the machine that `build` makes from its configuration. The
/// machine is not started.
///
/// # Errors
/// [`MigrationError`] when the file is not whole, or the machine cannot be built or restored.
pub fn restore<M: DestinationMachine>(
    path: &Path,
    build: impl FnOnce(&[u8]) -> Result<M, MachineError>,
) -> Result<M, MigrationError> {
    let (mut wire, _) = open(path)?;
    read_guest(&mut wire, path, build).map_err(|error| cut_short(error, path))
}

fn read_guest<M: DestinationMachine>(
    wire: &mut Wire,
    path: &Path,
    build: impl FnOnce(&[u8]) -> Result<M, MachineError>,
) -> Result<M, MigrationError> {
    let header = read_header(wire, path)?;
    let configuration = read_configuration(wire, header.ram_bytes)?;
    let mut machine = build(&configuration.machine)?;
    check_ram(machine.memory(), &configuration)?;
    let mut store = Store::new(machine.memory().clone(), true);
    read_pages(wire, &mut store)?;
    let states = match wire.receive(FOREVER)? {
        Message::States(body) => body.states,
        other => return Err(unexpected(&other, "the states were due")),
    };
    let frames = wire.frames_received();
    match wire.receive(FOREVER)? {
        Message::End(end) if end.frames == frames && store.hash() == Some(end.hash) => {}
        other => {
            return Err(unexpected(
                &other,
                "the end of the frames that came was due",
            ));
        }
    }
    machine.restore(states)?;
    Ok(machine)
}

fn read_configuration(wire: &mut Wire, ram_bytes: u64) -> Result<Configuration, MigrationError> {
    match wire.receive(FOREVER)? {
        Message::Configuration(body) if body.ram_bytes == ram_bytes => Ok(body),
        other => Err(unexpected(&other, "the configuration was due")),
    }
}

fn read_pages(wire: &mut Wire, store: &mut Store) -> Result<(), MigrationError> {
    match wire.receive(FOREVER)? {
        Message::RoundBegin(_) => {}
        other => return Err(unexpected(&other, "the pages were due")),
    }
    let (mut full, mut zero) = (0, 0);
    loop {
        let header = wire.receive_header(FOREVER)?;
        match header.kind {
            Kind::Pages => full += store.receive_pages(wire, &header, FOREVER)?,
            Kind::ZeroPages => {
                let payload = wire.receive_payload(FOREVER)?;
                zero += store.receive_zero_pages(&payload)?;
            }
            kind => {
                let payload = wire.receive_payload(FOREVER)?;
                return match Message::decode(kind, &payload)? {
                    Message::RoundEnd(end) if (end.pages, end.zero_pages) == (full, zero) => Ok(()),
                    other => Err(unexpected(&other, "the end of the pages was due")),
                };
            }
        }
    }
}

/// Opens a file, checks its preamble and its length.
fn open(path: &Path) -> Result<(Wire, u64), MigrationError> {
    let failed = |source| file_error("open", path, source);
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let mut wire = Wire::new(Box::new(FileStream::new(file, path)));
    let preamble = wire
        .receive_preamble(FOREVER)
        .map_err(|error| cut_short(error, path))?;
    let expected = preamble.body_length.saturating_add(preamble::LENGTH as u64);
    let incomplete = |reason| {
        let path = path.display().to_string();
        Err(MigrationError::Incomplete { path, reason })
    };
    if preamble.purpose != Purpose::File {
        return incomplete("it begins like a connection".to_owned());
    }
    if expected != length {
        return incomplete(format!("it has {length} bytes, {expected} were written"));
    }
    Ok((wire, length))
}

fn read_header(wire: &mut Wire, path: &Path) -> Result<FileHeader, MigrationError> {
    match wire
        .receive(FOREVER)
        .map_err(|error| cut_short(error, path))?
    {
        Message::FileHeader(header) => Ok(header),
        other => Err(unexpected(&other, "the header of the file was due")),
    }
}

fn unexpected(message: &Message, state: &'static str) -> MigrationError {
    ProtocolError::Unexpected {
        kind: message.kind(),
        state,
    }
    .into()
}

/// The end of the stream means something else in a file.
fn cut_short(error: MigrationError, path: &Path) -> MigrationError {
    match error {
        MigrationError::Transport(TransportError::Closed { .. }) => MigrationError::Incomplete {
            path: path.display().to_string(),
            reason: "it ends too early".to_owned(),
        },
        error => error,
    }
}

fn file_error(action: &'static str, path: &Path, source: io::Error) -> MigrationError {
    MigrationError::File {
        action,
        path: path.display().to_string(),
        source,
    }
}
