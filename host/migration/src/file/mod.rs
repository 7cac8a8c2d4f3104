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

mod error;
mod frames;
mod head;
mod version1;

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use dunlin_guest::{Memory, PageIndex, SavedState};
use serde::{Deserialize, Serialize};

use crate::machine::{DestinationMachine, MachineError, SourceMachine};
use crate::pages::{self, Extents, PAGE};
use crate::protocol::message::{
    Component, Configuration, End, FileHeader, Region, RoundBegin, RoundEnd, States,
};
use crate::protocol::runs::{self, Run};
use crate::protocol::{Kind, Message};
pub use error::SnapshotError;
use frames::{FrameReader, FrameWriter};
use head::Head;

/// The version of the format that this build writes.
pub const VERSION: u16 = 1;

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
/// [`SnapshotError`] when the machine or the file fails; nothing is left at `path` then, or what
/// was there before.
pub fn save(machine: &mut dyn SourceMachine, path: &Path) -> Result<SaveReport, SnapshotError> {
    let begun = Instant::now();
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let states = machine.save()?;
    let temporary =
        tempfile::NamedTempFile::new_in(directory).map_err(SnapshotError::io("create"))?;
    let mut file = temporary.as_file();
    let write = SnapshotError::io("write");
    let mut head = Head {
        version: VERSION,
        body: 0,
    };
    file.write_all(&head.encode()).map_err(&write)?;
    let mut frames = FrameWriter::new(BufWriter::new(file));
    let (pages, zero_pages) = write_guest(machine, states, &mut frames)?;
    head.body = frames.bytes();
    frames.finish()?;
    file.seek(SeekFrom::Start(0)).map_err(&write)?;
    file.write_all(&head.encode()).map_err(&write)?;
    file.sync_all().map_err(SnapshotError::io("synchronise"))?;
    temporary
        .persist(path)
        .map_err(|error| SnapshotError::io("give its name to")(error.error))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(SnapshotError::io("synchronise the folder of"))?;
    Ok(SaveReport {
        file_bytes: head.body + head::LENGTH as u64,
        ram_bytes: machine.memory().size(),
        pages,
        zero_pages,
        total_ms: begun.elapsed().as_secs_f64() * 1e3,
    })
}

fn write_guest<W: Write>(
    machine: &dyn SourceMachine,
    states: Vec<SavedState>,
    frames: &mut FrameWriter<W>,
) -> Result<(u64, u64), SnapshotError> {
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
    frames.message(&Message::FileHeader(header))?;
    let configuration = Configuration {
        machine: machine.configuration(),
        ram_bytes: memory.size(),
        regions: regions_of(memory),
        verification: 1,
    };
    frames.message(&Message::Configuration(configuration))?;
    let (pages, zero_pages) = write_pages(memory, frames)?;
    let states = States {
        attempt: 1,
        states,
        hash_wanted: false,
    };
    frames.message(&Message::States(states))?;
    let end = End {
        frames: frames.frames(),
        hash: pages::hash_ram(memory),
    };
    frames.message(&Message::End(end))?;
    Ok((pages, zero_pages))
}

fn write_pages<W: Write>(
    memory: &Memory,
    frames: &mut FrameWriter<W>,
) -> Result<(u64, u64), SnapshotError> {
    let begin = RoundBegin {
        round: 0,
        pages: memory.pages(),
    };
    frames.message(&Message::RoundBegin(begin))?;
    let mut extents = Extents::new(memory);
    let (mut runs, mut content) = (Vec::new(), Vec::new());
    let mut pages = 0;
    for page in (0..memory.pages()).map(PageIndex) {
        let mut bytes = [0; PAGE];
        if extents.hole_at(page).is_none()
            && memory.read_page(page, &mut bytes)
            && !pages::is_zero(&bytes)
        {
            runs::push(&mut runs, page);
            content.extend_from_slice(&bytes);
            pages += 1;
        }
        if content.len() == BATCH_PAGES * PAGE {
            write_batch(&mut runs, &mut content, frames)?;
        }
    }
    write_batch(&mut runs, &mut content, frames)?;
    let end = RoundEnd {
        round: 0,
        pages,
        zero_pages: 0,
    };
    frames.message(&Message::RoundEnd(end))?;
    Ok((pages, memory.pages() - pages))
}

fn write_batch<W: Write>(
    batch: &mut Vec<Run>,
    content: &mut Vec<u8>,
    frames: &mut FrameWriter<W>,
) -> Result<(), SnapshotError> {
    if batch.is_empty() {
        return Ok(());
    }
    let mut payload = Vec::new();
    runs::encode(batch, &mut payload);
    payload.append(content);
    batch.clear();
    frames.frame(Kind::Pages, &payload)
}

fn regions_of(memory: &Memory) -> Vec<Region> {
    let regions = memory.regions();
    regions
        .map(|region| Region {
            start: region.start,
            size: region.size,
            offset: region.offset,
        })
        .collect()
}

/// Reads what can be known of a saved guest without its RAM.
///
/// # Errors
/// [`SnapshotError`] when it is not a saved guest, of a newer version, or not whole.
pub fn inspect(path: &Path) -> Result<FileSummary, SnapshotError> {
    let (head, mut reader) = open(path)?;
    let header = header(&mut reader)?;
    let configuration = configuration(&mut reader, header.ram_bytes)?;
    Ok(FileSummary {
        configuration: configuration.machine,
        version: head.version,
        created: header.created,
        ram_bytes: header.ram_bytes,
        file_bytes: head.body + head::LENGTH as u64,
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
/// [`SnapshotError`] when the file is not whole, or the machine cannot be built or restored.
pub fn restore<M: DestinationMachine>(
    path: &Path,
    build: impl FnOnce(&[u8]) -> Result<M, MachineError>,
) -> Result<M, SnapshotError> {
    let (_head, mut reader) = open(path)?;
    version1::restore(&mut reader, build)
}

/// Opens a file, checks its head and its length.
fn open(path: &Path) -> Result<(Head, FrameReader<BufReader<File>>), SnapshotError> {
    let mut file = File::open(path).map_err(SnapshotError::io("open"))?;
    let read = SnapshotError::io("read");
    let length = file.metadata().map_err(&read)?.len();
    let mut bytes = [0; head::LENGTH];
    if length < bytes.len() as u64 {
        return Err(SnapshotError::not_whole("it ends too early"));
    }
    file.read_exact(&mut bytes).map_err(&read)?;
    let head = Head::decode(&bytes, VERSION)?;
    let expected = head.body.saturating_add(head::LENGTH as u64);
    if expected != length {
        return Err(SnapshotError::not_whole(format!(
            "it has {length} bytes, {expected} were written"
        )));
    }
    Ok((head, FrameReader::new(BufReader::new(file))))
}

fn header<R: Read>(reader: &mut FrameReader<R>) -> Result<FileHeader, SnapshotError> {
    match reader.message()? {
        Message::FileHeader(header) => Ok(header),
        other => Err(SnapshotError::unexpected(
            &other,
            "the header of the file was due",
        )),
    }
}

fn configuration<R: Read>(
    reader: &mut FrameReader<R>,
    ram_bytes: u64,
) -> Result<Configuration, SnapshotError> {
    match reader.message()? {
        Message::Configuration(body) if body.ram_bytes == ram_bytes => Ok(body),
        other => Err(SnapshotError::unexpected(
            &other,
            "the configuration was due",
        )),
    }
}

fn check_ram(memory: &Memory, configuration: &Configuration) -> Result<(), SnapshotError> {
    if memory.size() == configuration.ram_bytes && regions_of(memory) == configuration.regions {
        return Ok(());
    }
    Err(SnapshotError::Ram {
        saved: configuration.ram_bytes,
        built: memory.size(),
    })
}
