//! Lists of symbols as `nm` writes them: an address, a letter, a name.

use std::fs::File;
use std::io::{BufRead, BufReader, Seek};

use super::{Entry, SymbolsError};

/// Longest line that is read.
const LINE: u64 = 4096;

/// Reads a list from its beginning.
pub(super) fn read(mut file: &File) -> Result<Vec<Entry>, SymbolsError> {
    file.rewind()?;
    entries(BufReader::new(file))
}

fn entries(mut reader: impl BufRead) -> Result<Vec<Entry>, SymbolsError> {
    use std::io::Read;
    let mut entries = Vec::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.by_ref().take(LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(entries);
        }
        let text = std::str::from_utf8(&line).map_err(|_binary| SymbolsError::Unknown)?;
        if text.trim().is_empty() {
            continue;
        }
        entries.push(entry(text).ok_or(SymbolsError::Unknown)?);
    }
}

/// `ffffffff81000000 T _text`, with a module's name behind it in /proc/kallsyms.
fn entry(line: &str) -> Option<Entry> {
    let mut words = line.split_whitespace();
    let address = u64::from_str_radix(words.next()?, 16).ok()?;
    let letter = words.next().filter(|letter| letter.len() == 1)?;
    let name = words.next()?;
    let rank = match letter {
        "T" => 0,
        "W" => 1,
        "t" => 2,
        "w" => 3,
        _ => u8::MAX,
    };
    // Absolute symbols are offsets in the area of a processor.
    let is_code = rank != u8::MAX && address != 0;
    Some(Entry {
        address,
        name: is_code.then(|| name.to_owned()),
        rank,
    })
}
