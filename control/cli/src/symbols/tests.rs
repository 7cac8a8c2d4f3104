//! Files that hold symbols, and files that do not.

use std::io::Write;

use super::*;

const MAP: &str = "\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _text
ffffffff81000000 t startup_64
ffffffff81000100 t sha256_transform
ffffffff81000400 T entry_SYSCALL_64
ffffffff81800000 D some_data
ffffffffc0000000 t module_code\t[module]
";

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn symbols(bytes: &[u8]) -> Symbols {
    Symbols::read(file(bytes).path()).unwrap()
}

fn refused(bytes: &[u8]) -> String {
    let file = file(bytes);
    let text = Symbols::read(file.path()).unwrap_err().message();
    assert!(text.contains(file.path().to_str().unwrap()), "{text}");
    text
}

/// An ELF file with one section of code and one of data, and symbols: address, kind and binding,
/// section, name.
fn elf(symbols: &[(u64, u8, u16, &str)]) -> Vec<u8> {
    let (mut table, mut names) = (vec![0; SYMBOL], vec![0]);
    for (address, info, section, name) in symbols {
        table.extend((names.len() as u32).to_le_bytes());
        table.extend([*info, 0]);
        table.extend(section.to_le_bytes());
        table.extend(address.to_le_bytes());
        table.extend(0u64.to_le_bytes());
        names.extend(name.bytes().chain([0]));
    }
    let table_at = HEADER as u64;
    let names_at = table_at + table.len() as u64;
    let sections_at = names_at + names.len() as u64;
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(40, 0);
    bytes.extend(sections_at.to_le_bytes());
    bytes.resize(58, 0);
    bytes.extend(64u16.to_le_bytes());
    bytes.extend(5u16.to_le_bytes());
    bytes.resize(HEADER, 0);
    bytes.extend(&table);
    bytes.extend(&names);
    let mut section = |kind: u32, flags: u64, at: u64, size: u64, link: u32| {
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        for word in [flags, 0, at, size] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(link.to_le_bytes());
        bytes.extend([0; 20]);
    };
    section(0, 0, 0, 0, 0);
    section(1, 6, 0, 0, 0);
    section(1, 3, 0, 0, 0);
    section(2, 0, table_at, table.len() as u64, 4);
    section(3, 0, names_at, names.len() as u64, 0);
    bytes
}

const HEADER: usize = 64;
const SYMBOL: usize = 24;

#[test]
fn an_address_belongs_to_the_symbol_before_it() {
    let symbols = symbols(MAP.as_bytes());
    assert_eq!(symbols.find(0xffff_ffff_8100_0000), Some(("_text", 0)));
    assert_eq!(
        symbols.find(0xffff_ffff_8100_03ff),
        Some(("sha256_transform", 0x2ff))
    );
    assert_eq!(
        symbols.find(0xffff_ffff_c000_0010),
        Some(("module_code", 16))
    );
    // Before all, in data, and far behind all.
    for nowhere in [0x1000, 0xffff_ffff_8180_0010, 0xffff_ffff_c100_0000] {
        assert_eq!(symbols.find(nowhere), None, "{nowhere:#x}");
    }
    // Two names of one address are one.
    assert_eq!(symbols.len(), 4);
}

#[test]
fn a_kernel_that_moved_is_found_by_its_entry_of_system_calls() {
    let mut symbols = symbols(MAP.as_bytes());
    let offset = symbols.offset_by_entry(0xffff_ffff_9b00_0400);
    assert_eq!(offset, Some(0x1a00_0000));
    // Not yet set, or another kernel's.
    assert_eq!(symbols.offset_by_entry(0), None);
    assert_eq!(symbols.offset_by_entry(0xffff_ffff_9b00_0410), None);
    symbols.set_offset(0x1a00_0000);
    assert_eq!(
        symbols.find(0xffff_ffff_9b00_0104),
        Some(("sha256_transform", 4))
    );
}

#[test]
fn an_elf_file_names_its_code_and_not_its_data() {
    let bytes = elf(&[
        (0x10_0000, 0x10, 1, "start"),
        (0x10_0000, 0x12, 1, "start_function"),
        (0x10_0010, 0x02, 1, "hot_loop"),
        (0x20_0000, 0x11, 2, "counter"),
        (0x10_0008, 0x03, 1, "section"),
    ]);
    let symbols = symbols(&bytes);
    assert_eq!(symbols.find(0x10_0004), Some(("start_function", 4)));
    assert_eq!(symbols.find(0x10_0012), Some(("hot_loop", 2)));
    assert_eq!(symbols.find(0x20_0001), None);
    assert_eq!(symbols.len(), 2);
}

#[test]
fn files_without_symbols_are_refused_by_name() {
    assert!(refused(b"not a list\n").contains("no list of symbols"));
    assert!(refused(&[0xff; 100]).contains("no list of symbols"));
    assert!(refused(b"").contains("stripped"));
    assert!(refused(&elf(&[])).contains("stripped"));
    assert!(refused(b"\x7fELF\x01\x01 a file of 32 bits").contains("64-bit"));
    let missing = Symbols::read(Path::new("/nonexistent/System.map")).unwrap_err();
    assert!(missing.message().contains("/nonexistent/System.map"));
}

#[test]
fn no_damage_to_an_elf_file_is_more_than_an_error() {
    let whole = elf(&[(0x10_0000, 0x12, 1, "start"), (0x10_0010, 0x02, 1, "loop")]);
    for end in 0..whole.len() {
        let _either = Symbols::read(file(&whole[..end]).path());
    }
    for at in 0..whole.len() {
        for value in [0, 1, 0x7f, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] = value;
            let _either = Symbols::read(file(&damaged).path());
        }
    }
}
