use std::path::PathBuf;

use tempfile::TempDir;

use super::*;
use crate::memory_map;

const MAGIC: u32 = 0x1bad_b002;
const BASE: u32 = 0x10_0000;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn header(flags: u32) -> Vec<u8> {
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(flags);
    words(&[MAGIC, flags, checksum])
}

/// A file that is loaded as one piece: 16 bytes that are not, the header, then `0..=255`.
fn piece(addresses: [u32; 5]) -> Vec<u8> {
    let mut file = vec![0xee; 16];
    file.extend(header(1 << 16 | 3));
    file.extend(words(&addresses));
    file.extend(0..=255u8);
    file
}

/// The addresses of a good one: all behind the first 16 bytes, and a bss.
const GOOD: [u32; 5] = [BASE, BASE, BASE + 0x120, BASE + 0x3000, BASE + 0x20];

/// An ELF file of one segment, which starts with the header and is linked at `virtual_address`.
fn elf(class: u8, virtual_address: u32) -> Vec<u8> {
    let wide = class == 2;
    let mut file = vec![0x7f, b'E', b'L', b'F', class, 1, 1];
    file.resize(16, 0);
    file.extend(
        [2u16, if wide { 62 } else { 3 }]
            .map(u16::to_le_bytes)
            .as_flattened(),
    );
    file.extend(1u32.to_le_bytes());
    let word = |value: u32| match wide {
        true => u64::from(value).to_le_bytes().to_vec(),
        false => value.to_le_bytes().to_vec(),
    };
    let (headers, each) = if wide { (64, 56) } else { (52, 32) };
    for value in [virtual_address + 0x20, headers, 0] {
        file.extend(word(value));
    }
    file.extend(0u32.to_le_bytes());
    for half in [headers as u16, each, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let at = headers + u32::from(each);
    file.extend(1u32.to_le_bytes());
    if wide {
        file.extend(7u32.to_le_bytes());
    }
    for value in [at, virtual_address, BASE, 0x40, 0x2000] {
        file.extend(word(value));
    }
    if !wide {
        file.extend(7u32.to_le_bytes());
    }
    file.extend(word(4));
    assert_eq!(file.len(), at as usize);
    file.extend(header(3));
    file.resize(at as usize + 0x40, 0x5a);
    file
}

struct Files {
    directory: TempDir,
    memory: Memory,
}

impl Files {
    fn new(memory_mib: u64) -> Self {
        Self {
            directory: TempDir::new().unwrap(),
            memory: Memory::new(memory_mib << 20).unwrap(),
        }
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn load(&self, kernel: &[u8], modules: &[Module]) -> Result<EntryState, LoadError> {
        let kernel = self.file("kernel", kernel);
        crate::load(&LoadContext {
            memory: &self.memory,
            kernel: &kernel,
            initrd: None,
            modules,
            command_line: "a b",
            rsdp: GuestAddress(0xe0000),
        })
    }

    fn bytes(&self, address: u32, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let mapping = self.memory.mapping();
        mapping
            .read_slice(&mut bytes, GuestAddress(address.into()))
            .unwrap();
        bytes
    }

    fn word(&self, address: u32) -> u32 {
        u32::from_le_bytes(self.bytes(address, 4).try_into().unwrap())
    }

    fn text(&self, address: u32) -> String {
        let bytes = self.bytes(address, 400);
        let end = bytes.iter().position(|byte| *byte == 0).unwrap();
        String::from_utf8(bytes[..end].to_vec()).unwrap()
    }
}

fn said(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[test]
fn a_piece_is_loaded_where_its_header_says() {
    let files = Files::new(4);
    // What the file does not fill is cleared.
    let mapping = files.memory.mapping();
    let dirt = [0xff; 0x4000];
    mapping
        .write_slice(&dirt, GuestAddress(BASE.into()))
        .unwrap();
    let file = piece(GOOD);
    let state = files.load(&file, &[]).unwrap();
    assert_eq!((state.entry, state.magic), (BASE + 0x20, 0x2bad_b002));
    assert_eq!(files.bytes(BASE, 0x120), file[16..16 + 0x120]);
    assert_eq!(files.bytes(BASE + 0x120, 0x2ee0), [0; 0x2ee0]);
    assert_eq!(files.bytes(BASE + 0x3000, 4), [0xff; 4]);
}

#[test]
fn without_an_end_the_whole_rest_of_the_file_is_loaded() {
    let files = Files::new(4);
    // The header lies 16 bytes above the load address: the file is loaded from its first byte.
    let file = piece([BASE + 16, BASE, 0, 0, BASE]);
    files.load(&file, &[]).unwrap();
    assert_eq!(files.bytes(BASE, file.len()), file);
}

#[test]
fn elf_files_of_both_classes_start_at_the_physical_address_of_their_entry() {
    for class in [1, 2] {
        for virtual_address in [BASE, 0xc010_0000] {
            let files = Files::new(4);
            let file = elf(class, virtual_address);
            let state = files.load(&file, &[]).unwrap();
            assert_eq!(state.entry, BASE + 0x20, "{class} {virtual_address:#x}");
            assert_eq!(files.bytes(BASE + 12, 0x34), [0x5a; 0x34]);
            assert_eq!(files.bytes(BASE + 0x40, 0x1fc0), [0; 0x1fc0]);
        }
    }
}

#[test]
fn a_header_is_found_at_each_border_of_four_in_the_first_8_kib() {
    for (offset, found) in [
        (0, true),
        (8180, true),
        (8182, false),
        (8184, false),
        (2, false),
    ] {
        let mut file = vec![0; offset];
        file.extend(header(0));
        file.resize(9000, 0);
        let header = Header::find(&file).unwrap();
        assert_eq!(header.is_some(), found, "{offset}");
        assert!(header.is_none_or(|header| header.offset == offset));
    }
    let mut wrong_sum = header(0);
    wrong_sum[8] ^= 1;
    assert_eq!(Header::find(&wrong_sum).unwrap(), None);
}

#[test]
fn the_information_tells_memory_command_line_and_modules() {
    let files = Files::new(8);
    let (one, two) = (files.file("one", &[7; 5000]), files.file("two", b"second"));
    let module = |path: &Path, arguments: &str| Module {
        path: path.to_owned(),
        arguments: arguments.into(),
    };
    let modules = [module(&one, ""), module(&two, "x=1 y")];
    let state = files.load(&elf(1, BASE), &modules).unwrap();
    let field = |at: u32| files.word(state.start_info + at);
    assert_eq!(field(0), 0b10_0100_1101);
    assert_eq!([field(4), field(8)], [640, 7 << 10]);
    let kernel = files.directory.path().join("kernel");
    assert_eq!(files.text(field(16)), format!("{} a b", kernel.display()));
    assert_eq!(files.text(field(64)), "Dunlin");

    assert_eq!(field(20), 2);
    let entry = |at: u32| [0, 4, 8, 12].map(|word| files.word(field(24) + at + word));
    let [start, end, text, reserved] = entry(0);
    assert_eq!(
        (start, end, reserved),
        (BASE + 0x2000, BASE + 0x2000 + 5000, 0)
    );
    assert_eq!(files.bytes(start, 5000), [7; 5000]);
    assert_eq!(files.text(text), one.display().to_string());
    let [start, end, text, _] = entry(16);
    assert_eq!((start % 0x1000, end - start), (0, 6));
    assert_eq!(files.bytes(start, 6), b"second");
    assert_eq!(files.text(text), format!("{} x=1 y", two.display()));

    let map = memory_map(&files.memory);
    assert_eq!(field(44) as usize, 24 * map.len());
    for (index, range) in map.iter().enumerate() {
        let at = field(48) + 24 * index as u32;
        let [start, size] = [4, 12].map(|word| {
            u64::from(files.word(at + word)) | u64::from(files.word(at + word + 4)) << 32
        });
        assert_eq!((start, size), (range.start, range.size));
        assert_eq!(
            [files.word(at), files.word(at + 20)],
            [20, range.kind as u32]
        );
    }
}

#[test]
fn ram_above_4_gib_is_in_the_map_only() {
    let files = Files::new(5 << 10);
    let state = files.load(&elf(1, BASE), &[]).unwrap();
    assert_eq!(files.word(state.start_info + 8), (3 << 20) - 1024);
    let (map, length) = (
        files.word(state.start_info + 48),
        files.word(state.start_info + 44),
    );
    let last = map + length - 24;
    let expected = words(&[20, 0, 1, 1 << 31, 0, 1]);
    assert_eq!(files.bytes(last, 24), expected);
}

#[test]
fn each_fault_of_a_multiboot_kernel_is_named() {
    let files = Files::new(4);
    let changed = |field: usize, value: u32| {
        let mut addresses = GOOD;
        addresses[field] = value;
        piece(addresses)
    };
    let mut cut = vec![0; 8192 - 20];
    cut.extend(header(1 << 16));
    cut.resize(9000, 0);
    let elf_with = |at: usize, bytes: &[u8]| {
        let mut file = elf(1, BASE);
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (header(1 << 5), "requires unknown features (flags 0x20)"),
        (header(0), "has no addresses, and the file is no ELF file"),
        (cut, "no room for its addresses"),
        (changed(0, BASE - 4), "header lies below the load address"),
        (changed(1, BASE - 17), "begin before the file"),
        (changed(2, BASE - 1), "load end lies below the load address"),
        (
            changed(2, BASE + 0x121),
            "announces bytes up to 305 of the file, which has 304",
        ),
        (changed(2, u32::MAX), "announces bytes up to"),
        (changed(3, BASE + 0x11f), "the end of the bss lies below"),
        (changed(3, u32::MAX), "outside of the RAM"),
        (changed(4, BASE + 0x120), "the entry lies outside"),
        (changed(4, BASE - 1), "the entry lies outside"),
        (
            piece([0x9_0000, 0x9_0000, 0, 0, 0x9_0000]),
            "outside of the RAM",
        ),
        (
            piece([u32::MAX, u32::MAX, 0, 0, u32::MAX]),
            "outside of the RAM",
        ),
        (elf_with(18, &[40]), "not for 32-bit or 64-bit x86"),
        (elf_with(5, &[2]), "not for 32-bit or 64-bit x86"),
        (elf_with(42, &[56]), "program headers are not 32 bytes"),
        (
            elf_with(28, &[0xff; 4]),
            "truncated: the program header table",
        ),
        (elf_with(44, &[0]), "no segment to load"),
        (elf_with(52 + 4, &[0xff; 4]), "truncated: a segment"),
        (elf_with(52 + 16, &[0xff, 0xff]), "truncated: a segment"),
        (
            elf_with(52 + 20, &[0x3f, 0]),
            "larger in the file than in memory",
        ),
        (elf_with(52 + 20, &[0xff; 4]), "outside of the RAM"),
        (elf_with(52 + 12, &[0; 4]), "outside of the RAM"),
        (elf_with(24, &[0; 4]), "lies in no segment"),
    ];
    for (index, (file, expected)) in cases.into_iter().enumerate() {
        let message = said(&files.load(&file, &[]).unwrap_err());
        assert!(message.contains(expected), "case {index}: {message}");
        assert!(message.contains("kernel\""), "case {index}: {message}");
    }
}

#[test]
fn modules_that_cannot_be_loaded_are_refused_by_name() {
    let files = Files::new(4);
    let module = |path: PathBuf| Module {
        path,
        arguments: String::new(),
    };
    let load = |modules: &[Module]| said(&files.load(&elf(1, BASE), modules).unwrap_err());
    let absent = load(&[module(files.directory.path().join("absent"))]);
    assert!(
        absent.contains("module") && absent.contains("absent\""),
        "{absent}"
    );
    let room = (4 << 20) - 0x10_2000;
    let exact = module(files.file("exact", &vec![1; room]));
    files
        .load(&elf(1, BASE), std::slice::from_ref(&exact))
        .unwrap();
    let empty = module(files.file("empty", &[]));
    files.load(&elf(1, BASE), &[exact.clone(), empty]).unwrap();
    let one = module(files.file("one", &[1]));
    let larger = load(&[exact, one.clone()]);
    assert!(larger.contains("one\" has 1 bytes, 0 are free"), "{larger}");
    let many = load(&vec![one.clone(); MAX_MODULES + 1]);
    assert!(many.contains("65 modules"), "{many}");
    let talkative = Module {
        arguments: "x".repeat(600_000),
        ..one.clone()
    };
    assert!(load(&[talkative]).contains("more than the guest can be told"));
    // A kernel of Linux takes one initrd.
    let linux = files.load(b"\x7fELF\x02\x01\x01", &[one]);
    assert!(matches!(linux, Err(LoadError::Modules { .. })));
}

proptest::proptest! {
    #[test]
    fn a_damaged_multiboot_file_never_panics(
        which in 0usize..3,
        changes in proptest::collection::vec((0usize..0x200, proptest::prelude::any::<u8>()), 1..12),
    ) {
        let files = Files::new(2);
        let mut file = [piece(GOOD), elf(1, BASE), elf(2, BASE)][which].clone();
        for (at, value) in changes {
            let at = at % file.len();
            file[at] = value;
        }
        if let Ok(state) = files.load(&file, &[]) {
            proptest::prop_assert!(state.entry >= BASE);
        }
    }
}
