//! Reads a guest from a file.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use dunlin_guest::{Memory, PageIndex, SavedState};

use super::VERSION;
use super::error::SnapshotError;
use super::frames::FrameReader;
use super::head::{self, Head};
use super::table::{EXTENT_PAGES, Extent, Table};
use crate::pages::{self, PAGE};
use crate::protocol::message::{Configuration, FileHeader};
use crate::protocol::{Kind, Message};

/// A file whose head was read, and whose length is what was written.
pub(super) struct Opened {
    pub(super) head: Head,
    pub(super) frames: FrameReader<BufReader<File>>,
}

impl Opened {
    pub(super) fn open(path: &Path) -> Result<Self, SnapshotError> {
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
        let frames = FrameReader::new(BufReader::new(file));
        Ok(Self { head, frames })
    }

    /// Bytes of the whole file.
    pub(super) fn bytes(&self) -> u64 {
        self.head.body + head::LENGTH as u64
    }
}

/// Reads the header of a file, its first frame.
pub(super) fn header<R: Read>(frames: &mut FrameReader<R>) -> Result<FileHeader, SnapshotError> {
    match frames.message()? {
        Message::FileHeader(header) => Ok(header),
        other => Err(SnapshotError::unexpected(
            &other,
            "the header of the file was due",
        )),
    }
}

/// Reads the configuration, its second frame.
pub(super) fn configuration<R: Read>(
    frames: &mut FrameReader<R>,
    ram_bytes: u64,
) -> Result<Configuration, SnapshotError> {
    match frames.message()? {
        Message::Configuration(body) if body.ram_bytes == ram_bytes => Ok(body),
        other => Err(SnapshotError::unexpected(
            &other,
            "the configuration was due",
        )),
    }
}

/// A file of version 2, of which everything is known but the pages.
pub(super) struct Snapshot {
    file: File,
    table: Table,
    hash: u64,
}

/// What a file of version 2 says besides its pages.
pub(super) struct Front {
    pub(super) configuration: Configuration,
    pub(super) states: Vec<SavedState>,
}

impl Snapshot {
    pub(super) fn read(opened: Opened) -> Result<(Front, Self), SnapshotError> {
        let Opened { head, mut frames } = opened;
        let header = header(&mut frames)?;
        let configuration = configuration(&mut frames, header.ram_bytes)?;
        let states = match frames.message()? {
            Message::States(body) => body.states,
            other => return Err(SnapshotError::unexpected(&other, "the states were due")),
        };
        let count = frames.frames();
        let mut file = frames.into_inner();
        let front = file.stream_position().map_err(SnapshotError::io("read"))?;
        let area = page_area(&mut file, front, head.table)?;
        let mut frames = FrameReader::after(count, file);
        let table = Table::new(header.ram_bytes / PAGE as u64, area.clone());
        let (table, hash) = read_table(&mut frames, table)?;
        if table.pages() != area.end - area.start {
            return Err(SnapshotError::not_whole(
                "its page table does not fit its pages",
            ));
        }
        let snapshot = Self {
            file: frames.into_inner().into_inner(),
            table,
            hash,
        };
        let front = Front {
            configuration,
            states,
        };
        Ok((front, snapshot))
    }

    pub(super) fn table(&self) -> &Table {
        &self.table
    }

    /// Reads an extent's content into the beginning of `buffer`, and checks it.
    pub(super) fn content<'a>(
        &self,
        extent: &Extent,
        buffer: &'a mut Buffer,
    ) -> Result<&'a [[u8; PAGE]], SnapshotError> {
        let pages = buffer.0.get_mut(..extent.count as usize);
        let pages = pages.ok_or(SnapshotError::Pages {
            page: extent.first.0,
        })?;
        let read = self
            .file
            .read_exact_at(pages.as_flattened_mut(), extent.offset());
        if let Err(error) = read {
            return Err(match error.kind() {
                std::io::ErrorKind::UnexpectedEof => SnapshotError::not_whole("it was cut"),
                _ => SnapshotError::io("read")(error),
            });
        }
        if crc32fast::hash(pages.as_flattened()) != extent.crc {
            return Err(SnapshotError::Pages {
                page: extent.first.0,
            });
        }
        Ok(pages)
    }

    /// All extents in the order in which they lie in the file.
    pub(super) fn in_order(&self) -> Vec<Extent> {
        let mut extents = self.table.extents().to_vec();
        extents.sort_unstable_by_key(|extent| extent.at);
        extents
    }

    /// Is this the hash of RAM that was written, once all pages have been read?
    pub(super) fn check_hash(&self, hash: u64) -> Result<(), SnapshotError> {
        if hash == self.hash {
            return Ok(());
        }
        Err(SnapshotError::not_whole("its pages are of another guest"))
    }

    /// Brings all pages into `memory`, which is zero.
    pub(super) fn fill(&self, memory: &Memory) -> Result<(), SnapshotError> {
        let mut buffer = Buffer::new();
        let mut hash = 0u64;
        for extent in &self.in_order() {
            let content = self.content(extent, &mut buffer)?;
            hash = hash.wrapping_add(hash_of(extent, content));
            for (page, bytes) in (extent.first.0..).map(PageIndex).zip(content) {
                memory.write_page(page, bytes);
            }
        }
        self.check_hash(hash)
    }
}

/// What an extent adds to the hash of RAM.
pub(super) fn hash_of(extent: &Extent, content: &[[u8; PAGE]]) -> u64 {
    let pages = (extent.first.0..).map(PageIndex).zip(content);
    pages.fold(0, |sum, (page, bytes)| {
        sum.wrapping_add(pages::hash(page, bytes))
    })
}

/// Room for an extent's content.
pub(super) struct Buffer(Box<[[u8; PAGE]]>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![[0; PAGE]; EXTENT_PAGES].into_boxed_slice())
    }
}

/// The pages of the file that hold content: from the end of what comes before, which is padded
/// with zeros, to the page table. Leaves the file at the page table.
fn page_area(
    file: &mut BufReader<File>,
    front: u64,
    table: u64,
) -> Result<std::ops::Range<u64>, SnapshotError> {
    let page = PAGE as u64;
    let start = front.next_multiple_of(page);
    if !table.is_multiple_of(page) || table < start {
        return Err(SnapshotError::not_whole("its page table is misplaced"));
    }
    let read = SnapshotError::io("read");
    let mut padding = Vec::new();
    let count = file.take(start - front).read_to_end(&mut padding);
    if (count.map_err(&read)? as u64) < start - front || padding.iter().any(|&byte| byte != 0) {
        return Err(SnapshotError::not_whole(
            "what comes before its pages ends wrong",
        ));
    }
    file.seek(SeekFrom::Start(table)).map_err(&read)?;
    Ok(start / page..table / page)
}

/// Reads the page table and the end of the file; also the hash of RAM.
fn read_table<R: Read>(
    frames: &mut FrameReader<R>,
    mut table: Table,
) -> Result<(Table, u64), SnapshotError> {
    loop {
        let before = frames.frames();
        match frames.frame()? {
            (Kind::PageTable, payload) => table.add(&payload)?,
            (kind, payload) => {
                return match Message::decode(kind, &payload)? {
                    Message::End(end) if (end.frames, end.pages) == (before, table.pages()) => {
                        frames.at_end()?;
                        Ok((table, end.hash))
                    }
                    other => Err(SnapshotError::unexpected(
                        &other,
                        "the end of the page table was due",
                    )),
                };
            }
        }
    }
}
