//! Names of a kernel's addresses: from the symbol table of its ELF file, or from a list like
//! System.map and /proc/kallsyms.

mod elf;
mod list;

use std::fs::File;
use std::path::Path;

use crate::error::CliError;

/// Where Linux takes system calls: IA32_LSTAR holds its address, and so tells where a kernel lies that
/// has moved itself.
const SYSTEM_CALL_ENTRY: &str = "entry_SYSCALL_64";
/// A kernel moves by whole pages.
const PAGE: u64 = 4096;
/// So far behind the last symbol an address may belong to it.
const LAST: u64 = 64 << 10;

/// Symbols of code by address, and places at which something else begins.
#[derive(Debug, Default)]
pub struct Symbols {
    /// Sorted by address; nameless where no code is.
    entries: Vec<Entry>,
    /// Added to addresses of the file, they are those of the guest.
    offset: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    address: u64,
    name: Option<String>,
    /// Which of several names of one address is told: the lowest.
    rank: u8,
}

/// Why a file of symbols could not be used.
#[derive(Debug, thiserror::Error)]
enum SymbolsError {
    #[error("it is no 64-bit little-endian ELF file, and no list of symbols")]
    Unknown,
    #[error("it names no code: its table was stripped, or it stands in for another file")]
    Stripped,
    #[error("its {0} lies outside of the file")]
    Outside(&'static str),
    #[error(transparent)]
    Read(#[from] std::io::Error),
}

impl Symbols {
    /// Reads the symbols of a file.
    ///
    /// # Errors
    /// [`CliError::Argument`] naming the file when it cannot be read or holds none.
    pub fn read(path: &Path) -> Result<Self, CliError> {
        let entries = File::open(path)
            .map_err(SymbolsError::Read)
            .and_then(|file| read(&file));
        let entries = entries.map_err(|error| {
            CliError::Argument(format!(
                "cannot take symbols from \"{}\": {error}",
                path.display()
            ))
        })?;
        Ok(Self::of(entries))
    }

    fn of(mut entries: Vec<Entry>) -> Self {
        entries.sort_by(|a, b| (a.address, a.rank, &a.name).cmp(&(b.address, b.rank, &b.name)));
        entries.dedup_by_key(|entry| entry.address);
        Self { entries, offset: 0 }
    }

    /// Says how far the guest's addresses are from the file's.
    pub fn set_offset(&mut self, offset: u64) {
        self.offset = offset;
    }

    /// How far the guest's addresses are from the file's, going by where its system calls enter; `None`
    /// where that tells nothing.
    pub fn offset_by_entry(&self, system_call_entry: u64) -> Option<u64> {
        let mut entries = self.entries.iter();
        let entry = entries.find(|entry| entry.name.as_deref() == Some(SYSTEM_CALL_ENTRY))?;
        let offset = system_call_entry.wrapping_sub(entry.address);
        (system_call_entry != 0 && offset.is_multiple_of(PAGE)).then_some(offset)
    }

    /// The symbol that an address belongs to, and its distance from that.
    pub fn find(&self, address: u64) -> Option<(&str, u64)> {
        let address = address.wrapping_sub(self.offset);
        let after = self
            .entries
            .partition_point(|entry| entry.address <= address);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        let distance = address - entry.address;
        if after == self.entries.len() && distance > LAST {
            return None;
        }
        Some((entry.name.as_deref()?, distance))
    }

    /// How many symbols of code there are.
    pub fn len(&self) -> usize {
        let entries = self.entries.iter();
        entries.filter(|entry| entry.name.is_some()).count()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn read(file: &File) -> Result<Vec<Entry>, SymbolsError> {
    let entries = match elf::read(file)? {
        Some(entries) => entries,
        None => list::read(file)?,
    };
    if entries.iter().all(|entry| entry.name.is_none()) {
        return Err(SymbolsError::Stripped);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests;
