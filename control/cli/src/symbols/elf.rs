//! The symbol table of an ELF file (System V ABI, "Object Files"), of which only the section headers,
//! the table and its strings are read: a kernel with debug information is large.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{Entry, SymbolsError};

const HEADER: usize = 64;
const SECTION: usize = 64;
const SYMBOL: usize = 24;
/// `\x7fELF`, 64 bits, little-endian.
const MAGIC: [u8; 6] = *b"\x7fELF\x02\x01";
const SHT_SYMTAB: u32 = 2;
const SHF_EXECINSTR: u64 = 4;
const STT_NOTYPE: u8 = 0;
const STT_OBJECT: u8 = 1;
const STT_FUNC: u8 = 2;
const STB_LOCAL: u8 = 0;
/// A table, or its strings, larger than that is none.
const MOST: u64 = 512 << 20;

/// The symbols; `None` when the file is not ELF.
pub(super) fn read(file: &File) -> Result<Option<Vec<Entry>>, SymbolsError> {
    let mut header = [0; HEADER];
    if file.read_at(&mut header[..MAGIC.len()], 0)? < MAGIC.len() || !header.starts_with(b"\x7fELF")
    {
        return Ok(None);
    }
    if header[..MAGIC.len()] != MAGIC {
        return Err(SymbolsError::Unknown);
    }
    file.read_exact_at(&mut header, 0)
        .map_err(|_short| SymbolsError::Outside("header"))?;
    if u16_at(&header, 58) as usize != SECTION {
        return Err(SymbolsError::Stripped);
    }
    let count = u64::from(u16_at(&header, 60));
    let headers = part(
        file,
        u64_at(&header, 40),
        count * SECTION as u64,
        "section headers",
    )?;
    let sections: Vec<&[u8]> = headers.chunks_exact(SECTION).collect();
    let table = sections
        .iter()
        .find(|section| u32_at(section, 4) == SHT_SYMTAB);
    let table = table.ok_or(SymbolsError::Stripped)?;
    let strings = sections
        .get(u32_at(table, 40) as usize)
        .ok_or(SymbolsError::Outside("table of names"))?;
    let content = |section: &[u8], what| part(file, u64_at(section, 24), u64_at(section, 32), what);
    let symbols = content(table, "symbol table")?;
    let names = content(strings, "table of names")?;
    let is_code = |index: u16| {
        let section = sections.get(usize::from(index));
        section.is_some_and(|section| u64_at(section, 8) & SHF_EXECINSTR != 0)
    };
    let symbols = symbols.chunks_exact(SYMBOL);
    Ok(Some(
        symbols
            .filter_map(|symbol| entry(symbol, &names, is_code))
            .collect(),
    ))
}

/// Bytes of the file.
fn part(file: &File, at: u64, size: u64, what: &'static str) -> Result<Vec<u8>, SymbolsError> {
    let end = at.checked_add(size);
    let within = end.is_some_and(|end| file.metadata().is_ok_and(|data| end <= data.len()));
    if !within || size > MOST {
        return Err(SymbolsError::Outside(what));
    }
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

fn entry(symbol: &[u8], names: &[u8], is_code: impl Fn(u16) -> bool) -> Option<Entry> {
    let (kind, binding) = (symbol[4] & 15, symbol[4] >> 4);
    let section = u16_at(symbol, 6);
    let address = u64_at(symbol, 8);
    if !matches!(kind, STT_NOTYPE | STT_OBJECT | STT_FUNC) || section == 0 || address == 0 {
        return None;
    }
    let name = names.get(u32_at(symbol, 0) as usize..)?;
    let name = name.split(|&byte| byte == 0).next()?;
    let code = kind != STT_OBJECT && is_code(section) && !name.is_empty();
    let rank = u8::from(binding == STB_LOCAL) * 2 + u8::from(kind != STT_FUNC);
    Some(Entry {
        address,
        name: code.then(|| String::from_utf8_lossy(name).into_owned()),
        rank: if code { rank } else { u8::MAX },
    })
}

/// Bytes of a structure whose size was checked.
fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes.get(at + index).copied().unwrap_or(0))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(bytes, at))
}
