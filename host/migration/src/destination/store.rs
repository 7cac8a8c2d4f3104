//! Puts arriving pages into guest memory.

use std::io::IoSliceMut;
use std::sync::Arc;

use dunlin_guest::{Memory, PageIndex, PageSet};

use crate::error::MigrationError;
use crate::pages::{self, PAGE};
use crate::protocol::frame::{MAX_PAGES, MAX_ZERO_RUNS};
use crate::protocol::runs::{self, RUN_LENGTH, Run};
use crate::protocol::{Header, Kind, ProtocolError};
use crate::wire::{Patience, Wire};

/// RAM that is being filled. Nobody else touches it: the guest does not run yet.
pub(crate) struct Store {
    memory: Memory,
    /// Pages that were ever written: the others are zero already.
    written: PageSet,
    /// Hash of each page, and their sum, when verification was asked for.
    hashes: Option<(Vec<u64>, u64)>,
}

impl Store {
    pub(crate) fn new(memory: Memory, hashing: bool) -> Self {
        let pages = memory.pages();
        Self {
            written: PageSet::new(pages),
            hashes: hashing.then(|| (vec![0; pages as usize], 0)),
            memory,
        }
    }

    /// Somebody else wrote these pages: they are no longer zero by themselves.
    pub(crate) fn note_written(&mut self, pages: &PageSet) {
        self.written.union(pages);
    }

    /// Hash of RAM as it was stored.
    pub(crate) fn hash(&self) -> Option<u64> {
        self.hashes.as_ref().map(|(_, sum)| *sum)
    }

    /// Receives the payload of a `Pages` frame straight into guest memory. Returns how many
    /// pages there were. When the checksum does not fit, RAM holds garbage and the session has
    /// to end.
    pub(crate) fn receive_pages(
        &mut self,
        wire: &mut Wire,
        header: &Header,
        patience: Patience,
    ) -> Result<u64, MigrationError> {
        let kind = Kind::Pages;
        wire.take_header();
        let mut crc = crc32fast::Hasher::new();
        let mut count = [0; 4];
        let length = header.length as usize;
        if length < count.len() {
            return Err(ProtocolError::invalid(kind, "it is too short").into());
        }
        wire.read_exact(&mut [IoSliceMut::new(&mut count)], patience)?;
        crc.update(&count);
        let count = runs::decode_count(kind, count, MAX_PAGES)?;
        let table_length = count * RUN_LENGTH;
        if length < 4 + table_length {
            return Err(ProtocolError::invalid(kind, "it ends within its runs").into());
        }
        let mut table = vec![0; table_length];
        wire.read_exact(&mut [IoSliceMut::new(&mut table)], patience)?;
        crc.update(&table);
        let runs = runs::decode(kind, &table, self.memory.pages())?;
        let pages: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
        if length != 4 + table_length + pages as usize * PAGE {
            return Err(ProtocolError::invalid(kind, "its length does not fit its runs").into());
        }
        self.read_runs(wire, &runs, &mut crc, patience)?;
        header.check_payload(crc.finalize())?;
        Ok(pages)
    }

    fn read_runs(
        &mut self,
        wire: &mut Wire,
        runs: &[Run],
        crc: &mut crc32fast::Hasher,
        patience: Patience,
    ) -> Result<(), MigrationError> {
        let log = Arc::clone(self.memory.dirty_log());
        let mut slices = slices_of(&mut self.memory, runs);
        let mut into: Vec<IoSliceMut<'_>> = slices
            .iter_mut()
            .map(|slice| IoSliceMut::new(slice))
            .collect();
        wire.read_exact(&mut into, patience)?;
        for slice in &slices {
            crc.update(slice);
        }
        for page in runs.iter().flat_map(Run::pages) {
            self.written.insert(page);
            log.mark(page);
        }
        if let Some((hashes, sum)) = &mut self.hashes {
            let bytes = slices.iter().flat_map(|slice| slice.chunks_exact(PAGE));
            for (page, bytes) in runs.iter().flat_map(Run::pages).zip(bytes) {
                replace(hashes, sum, page, pages::hash(page, bytes));
            }
        }
        Ok(())
    }

    /// Stores the pages that a `ZeroPages` frame names. Returns how many there were.
    pub(crate) fn receive_zero_pages(&mut self, payload: &[u8]) -> Result<u64, ProtocolError> {
        let kind = Kind::ZeroPages;
        let Some((count, table)) = payload.split_first_chunk::<4>() else {
            return Err(ProtocolError::invalid(kind, "it is too short"));
        };
        let count = runs::decode_count(kind, *count, MAX_ZERO_RUNS)?;
        if table.len() != count * RUN_LENGTH {
            return Err(ProtocolError::invalid(
                kind,
                "its length does not fit its runs",
            ));
        }
        let runs = runs::decode(kind, table, self.memory.pages())?;
        let mut pages = 0;
        for run in runs {
            pages += u64::from(run.count);
            for page in run.pages() {
                if !self.written.contains(page) {
                    continue;
                }
                self.memory.write_page(page, &[0; PAGE]);
                if let Some((hashes, sum)) = &mut self.hashes {
                    replace(hashes, sum, page, 0);
                }
            }
        }
        Ok(pages)
    }
}

fn replace(hashes: &mut [u64], sum: &mut u64, page: PageIndex, new: u64) {
    if let Some(old) = hashes.get_mut(page.0 as usize) {
        *sum = sum.wrapping_sub(*old).wrapping_add(new);
        *old = new;
    }
}

/// The host memory of runs that [`runs::decode`] has checked against this RAM, one slice
/// for each stretch that is contiguous here.
fn slices_of<'a>(memory: &'a mut Memory, runs: &[Run]) -> Vec<&'a mut [u8]> {
    let mut extents: Vec<(*mut u8, usize)> = Vec::with_capacity(runs.len());
    for page in runs.iter().flat_map(Run::pages) {
        let Some(host) = memory.host_page(page) else {
            continue;
        };
        let host = host.as_ptr();
        match extents.last_mut() {
            Some((start, length)) if start.wrapping_add(*length) == host => *length += PAGE,
            _ => extents.push((host, PAGE)),
        }
    }
    extents
        .into_iter()
        .map(|(start, length)| {
            // SAFETY: each extent is one or more whole pages of a mapping that `memory` keeps
            // alive for `'a`; runs ascend without overlap, so no two slices share a byte. The
            // guest does not run and, by the contract of `Destination::accept`, nobody else
            // touches this RAM before `restore`, so the slices are the only access.
            #[expect(unsafe_code, reason = "pages are received in place, without a copy")]
            unsafe {
                std::slice::from_raw_parts_mut(start, length)
            }
        })
        .collect()
}
