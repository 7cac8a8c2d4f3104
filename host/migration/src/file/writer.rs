//! Writes a guest to a file.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use dunlin_guest::{Memory, PageIndex, SavedState};
use tempfile::NamedTempFile;

use super::error::SnapshotError;
use super::frames::FrameWriter;
use super::head::{self, Head};
use super::table::{self, EXTENT_PAGES, Extent};
use super::{VERSION, regions_of};
use crate::pages::{self, PAGE};
use crate::protocol::message::{Component, Configuration, End, FileHeader, States};
use crate::protocol::{Kind, Message};

/// What is written before the pages.
pub(super) struct Front<'a> {
    pub(super) memory: &'a Memory,
    /// The machine's own description.
    pub(super) machine: Vec<u8>,
    pub(super) states: Vec<SavedState>,
}

/// A file that is being written under another name beside its own.
pub(super) struct Writer {
    temporary: NamedTempFile,
    path: PathBuf,
}

/// A file whose pages are being written.
pub(super) struct PageWriter {
    file: Writer,
    frames: u64,
    extents: Vec<Extent>,
    /// Where the next page goes, in pages from the beginning of the file.
    next: u64,
    pages: u64,
    hash: u64,
}

/// What was written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Written {
    pub(super) file_bytes: u64,
    pub(super) pages: u64,
    pub(super) hash: u64,
}

impl Writer {
    /// Begins a file that will appear at `path`.
    pub(super) fn create(path: &Path) -> Result<Self, SnapshotError> {
        let temporary =
            NamedTempFile::new_in(directory(path)).map_err(SnapshotError::io("create"))?;
        Ok(Self {
            temporary,
            path: path.to_owned(),
        })
    }

    /// Writes what comes before the pages.
    pub(super) fn begin(self, front: Front<'_>) -> Result<PageWriter, SnapshotError> {
        let write = SnapshotError::io("write");
        let mut frames = FrameWriter::new(Vec::new());
        front.write(&mut frames)?;
        let count = frames.frames();
        let mut bytes = vec![0; head::LENGTH];
        bytes.extend(frames.into_inner());
        bytes.resize(bytes.len().next_multiple_of(PAGE), 0);
        self.temporary.as_file().write_all(&bytes).map_err(&write)?;
        Ok(PageWriter {
            file: self,
            frames: count,
            extents: Vec::new(),
            next: (bytes.len() / PAGE) as u64,
            pages: 0,
            hash: 0,
        })
    }
}

impl Front<'_> {
    fn write(self, frames: &mut FrameWriter<Vec<u8>>) -> Result<(), SnapshotError> {
        let ram_bytes = self.memory.size();
        let created = SystemTime::now().duration_since(UNIX_EPOCH);
        let component = |state: &SavedState| Component {
            name: state.name.clone(),
            kind: state.kind.clone(),
            version: state.version,
            bytes: state.body.len() as u64,
        };
        frames.message(&Message::FileHeader(FileHeader {
            created: created.map_or(0, |since| since.as_secs()),
            ram_bytes,
            components: self.states.iter().map(component).collect(),
        }))?;
        frames.message(&Message::Configuration(Configuration {
            machine: self.machine,
            ram_bytes,
            regions: regions_of(self.memory),
            verification: 0,
            ..Configuration::default()
        }))?;
        frames.message(&Message::States(States {
            attempt: 1,
            states: self.states,
            hash_wanted: false,
        }))
    }
}

impl PageWriter {
    /// Bytes written.
    pub(super) fn bytes(&self) -> u64 {
        self.next * PAGE as u64
    }

    /// Adds consecutive pages. Each page of RAM is added once, in whatever order; pages of zeros
    /// need not be, and take no room.
    pub(super) fn add(&mut self, first: PageIndex, content: &[u8]) -> Result<(), SnapshotError> {
        let (pages, _none) = content.as_chunks::<PAGE>();
        let mut at = 0;
        for run in pages.chunk_by(|a, b| pages::is_zero(a) == pages::is_zero(b)) {
            if run.first().is_some_and(|page| !pages::is_zero(page)) {
                for (part, chunk) in run.chunks(EXTENT_PAGES).enumerate() {
                    let before = at + part * EXTENT_PAGES;
                    self.write(PageIndex(first.0 + before as u64), chunk)?;
                }
            }
            at += run.len();
        }
        Ok(())
    }

    fn write(&mut self, first: PageIndex, pages: &[[u8; PAGE]]) -> Result<(), SnapshotError> {
        let content = pages.as_flattened();
        let mut file = self.file.temporary.as_file();
        file.write_all(content)
            .map_err(SnapshotError::io("write"))?;
        for (page, bytes) in (first.0..).zip(pages) {
            self.hash = self.hash.wrapping_add(pages::hash(PageIndex(page), bytes));
        }
        let count = pages.len() as u32;
        self.extents.push(Extent {
            first,
            at: self.next,
            count,
            crc: crc32fast::hash(content),
        });
        self.next += u64::from(count);
        self.pages += u64::from(count);
        Ok(())
    }

    /// Writes what comes behind the pages, brings everything to the disk, and gives the file its
    /// name.
    pub(super) fn finish(mut self) -> Result<Written, SnapshotError> {
        self.extents.sort_unstable_by_key(|extent| extent.first);
        let write = SnapshotError::io("write");
        let mut frames = FrameWriter::after(self.frames, Vec::new());
        for payload in table::encode(&self.extents) {
            frames.frame(Kind::PageTable, &payload)?;
        }
        frames.message(&Message::End(End {
            frames: frames.frames(),
            hash: self.hash,
            pages: self.pages,
        }))?;
        let table = self.bytes();
        let file_bytes = table + frames.bytes();
        let head = Head {
            version: VERSION,
            table,
            body: file_bytes - head::LENGTH as u64,
        };
        let mut file = self.file.temporary.as_file();
        file.write_all(&frames.into_inner()).map_err(&write)?;
        file.seek(SeekFrom::Start(0)).map_err(&write)?;
        file.write_all(&head.encode()).map_err(&write)?;
        file.sync_all().map_err(SnapshotError::io("synchronise"))?;
        self.file.publish()?;
        Ok(Written {
            file_bytes,
            pages: self.pages,
            hash: self.hash,
        })
    }
}

impl Writer {
    fn publish(self) -> Result<(), SnapshotError> {
        self.temporary
            .persist(&self.path)
            .map_err(|error| SnapshotError::io("give its name to")(error.error))?;
        File::open(directory(&self.path))
            .and_then(|directory| directory.sync_all())
            .map_err(SnapshotError::io("synchronise the folder of"))
    }
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
