//! A guest at rest.
//!
//! Format version 2 is made for reading in any order: a guest may run before most of its file has
//! been read, and pages may be written in the order in which a running guest is about to change
//! them.
//!
//! ```text
//! head             version, length, where the page table is: readable alone ([`head`])
//! FileHeader       created, RAM size, components        ┐ frames of the wire protocol,
//! Configuration    as in a move                         │ numbered from 0
//! States           as in a move                         ┘
//! zeros            up to a multiple of 4096
//! pages            each at a multiple of 4096; zero pages are left out
//! PageTable…       which pages lie where, with a checksum of each 16 at most ([`table`])
//! End              number of frames, hash of RAM, number of pages
//! ```
//!
//! Every byte is under a checksum: of the head, of a frame, or of an extent of pages, which is
//! checked before the guest sees one of them. `inspect` reads the head and two frames.
//!
//! The file appears under its name only when it is whole and on disk: it is written to a
//! temporary file beside it, synchronised, and renamed. Its length stands in the head, so that a
//! file that was cut is known as such before anything is restored.
//!
//! Version 1 (`version1`), which had no page table, is read as a whole.

mod error;
mod frames;
mod head;
mod lazy;
mod live;
mod reader;
mod table;
mod version1;
mod writer;

use std::path::Path;
use std::time::Instant;

use dunlin_guest::{Memory, PageIndex};
use serde::{Deserialize, Serialize};

use crate::machine::{DestinationMachine, MachineError, SourceMachine};
use crate::pages::{Extents, PAGE};
use crate::protocol::message::{Configuration, Region};
pub use error::SnapshotError;
pub use lazy::{LazyRestore, OnEnd, Rest, Restored, restore_lazily};
pub use live::{AfterFailure, LiveFailure, LiveProgress, LiveSave, save_live};
use reader::{Opened, Snapshot};
use table::EXTENT_PAGES;
use writer::{Front, PageWriter, Writer};

/// The version of the format that this build writes. It reads the older ones, too.
pub const VERSION: u16 = 2;

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
    /// Hash of RAM, in hexadecimal.
    pub ram_hash: String,
    /// How long a guest that ran on was stopped, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_ms: Option<f64>,
    /// How often something of a guest that ran on had to wait for a copy before it could write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writers_held: Option<u64>,
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
    let file = Writer::create(path)?;
    let states = machine.save()?;
    let memory = machine.memory();
    let mut file = file.begin(Front {
        memory,
        machine: machine.configuration(),
        states,
    })?;
    write_pages(memory, &mut file)?;
    let written = file.finish()?;
    Ok(SaveReport {
        file_bytes: written.file_bytes,
        ram_bytes: memory.size(),
        pages: written.pages,
        zero_pages: memory.pages() - written.pages,
        total_ms: begun.elapsed().as_secs_f64() * 1e3,
        ram_hash: format!("{:016x}", written.hash),
        pause_ms: None,
        writers_held: None,
    })
}

fn write_pages(memory: &Memory, file: &mut PageWriter) -> Result<(), SnapshotError> {
    let mut extents = Extents::new(memory);
    let mut content = Vec::with_capacity(EXTENT_PAGES * PAGE);
    let mut next = 0;
    while next < memory.pages() {
        if let Some(behind) = extents.hole_at(PageIndex(next)) {
            next = behind;
            continue;
        }
        let first = PageIndex(next);
        next = copy_group(memory, first, &mut content);
        file.add(first, &content)?;
    }
    Ok(())
}

/// Copies the pages from `first` to the end of its group; the first page behind them.
fn copy_group(memory: &Memory, first: PageIndex, into: &mut Vec<u8>) -> u64 {
    let group = EXTENT_PAGES as u64;
    let end = (first.0 / group * group + group).min(memory.pages());
    into.clear();
    into.resize((end - first.0) as usize * PAGE, 0);
    let (pages, _none) = into.as_chunks_mut::<PAGE>();
    for (page, bytes) in (first.0..end).zip(pages) {
        memory.read_page(PageIndex(page), bytes);
    }
    end
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
    let mut opened = Opened::open(path)?;
    let header = reader::header(&mut opened.frames)?;
    let configuration = reader::configuration(&mut opened.frames, header.ram_bytes)?;
    Ok(FileSummary {
        configuration: configuration.machine,
        version: opened.head.version,
        created: header.created,
        ram_bytes: header.ram_bytes,
        file_bytes: opened.bytes(),
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

/// Restores a saved guest into the machine that `build` makes from its configuration, whose RAM
/// is zero. The machine is not started.
///
/// # Errors
/// [`SnapshotError`] when the file is not whole, or the machine cannot be built or restored.
pub fn restore<M: DestinationMachine>(
    path: &Path,
    build: impl FnOnce(&[u8]) -> Result<M, MachineError>,
) -> Result<M, SnapshotError> {
    restore_opened(Opened::open(path)?, build)
}

fn restore_opened<M: DestinationMachine>(
    mut opened: Opened,
    build: impl FnOnce(&[u8]) -> Result<M, MachineError>,
) -> Result<M, SnapshotError> {
    if opened.head.version == 1 {
        return version1::restore(&mut opened.frames, build);
    }
    let (front, snapshot) = Snapshot::read(opened)?;
    let mut machine = build(&front.configuration.machine)?;
    check_ram(machine.memory(), &front.configuration)?;
    snapshot.fill(machine.memory())?;
    machine.restore(front.states)?;
    Ok(machine)
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
