use super::*;

use std::path::PathBuf;
use std::time::Instant;

use proptest::prelude::*;
use tempfile::TempDir;

const RSDP: GuestAddress = GuestAddress(0xe0000);
const ENTRY: u64 = 0x10_0010;

/// A kernel of one segment at 1 MiB and a PVH note.
#[derive(Debug, Clone)]
struct Elf {
    start: u64,
    data: Vec<u8>,
    memory_size: u64,
    entry: u64,
    note_owner: [u8; 4],
}

impl Default for Elf {
    fn default() -> Self {
        Self {
            start: 0x10_0000,
            data: (0..200).collect(),
            memory_size: 0x3000,
            entry: ENTRY,
            note_owner: *b"Xen\0",
        }
    }
}

impl Elf {
    fn build(&self) -> Vec<u8> {
        let mut note = Vec::new();
        // Another note first, with an owner that needs padding.
        note.extend([2u32, 3, 7].map(u32::to_le_bytes).as_flattened());
        note.extend(*b"a\0..xyz.");
        note.extend([4u32, 8, 18].map(u32::to_le_bytes).as_flattened());
        note.extend(self.note_owner);
        note.extend(self.entry.to_le_bytes());

        let data_at = 64 + 2 * 56;
        let note_at = data_at + self.data.len();
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend([2u16, 62].map(u16::to_le_bytes).as_flattened());
        file.extend(1u32.to_le_bytes());
        file.extend([0u64, 64, 0].map(u64::to_le_bytes).as_flattened());
        file.extend(0u32.to_le_bytes());
        file.extend([64u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).as_flattened());
        let (size, memory_size) = (self.data.len() as u64, self.memory_size);
        let load = [data_at as u64, 0, self.start, size, memory_size, 0x1000];
        file.extend([1u32, 7].map(u32::to_le_bytes).as_flattened());
        file.extend(load.map(u64::to_le_bytes).as_flattened());
        let size = note.len() as u64;
        let notes = [note_at as u64, 0, 0, size, size, 4];
        file.extend([4u32, 4].map(u32::to_le_bytes).as_flattened());
        file.extend(notes.map(u64::to_le_bytes).as_flattened());
        file.extend(&self.data);
        file.extend(note);
        file
    }
}

/// A bzImage of an ELF file, packed with gzip.
fn bzimage(elf: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(elf).unwrap();
    let packed = encoder.finish().unwrap();
    let mut image = vec![0; 3 * 512 + 0x20];
    image[0x1f1] = 2;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x248..0x24c].copy_from_slice(&0x20u32.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&(packed.len() as u32).to_le_bytes());
    image.extend(packed);
    image
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

    fn load(&self, kernel: &[u8]) -> Result<EntryState, LoadError> {
        let kernel = self.file("kernel", kernel);
        self.load_files(&kernel, None, "")
    }

    fn load_files(
        &self,
        kernel: &Path,
        initrd: Option<&Path>,
        command_line: &str,
    ) -> Result<EntryState, LoadError> {
        load(&LoadContext {
            memory: &self.memory,
            kernel,
            initrd,
            modules: &[],
            command_line,
            rsdp: RSDP,
        })
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let mapping = self.memory.mapping();
        mapping
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    fn number(&self, address: u64) -> u64 {
        let bytes = self.bytes(address, 8);
        u64::from_le_bytes(bytes.try_into().unwrap())
    }
}

/// The message with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

#[test]
fn an_elf_kernel_is_loaded_and_what_it_does_not_fill_is_cleared() {
    let files = Files::new(4);
    let dirty = vec![0xff; 0x4000];
    let mapping = files.memory.mapping();
    mapping
        .write_slice(&dirty, GuestAddress(0x10_0000))
        .unwrap();
    let elf = Elf::default();
    let state = files.load(&elf.build()).unwrap();
    assert_eq!(u64::from(state.entry), ENTRY);
    assert_eq!(files.bytes(0x10_0000, 200), elf.data);
    assert_eq!(files.bytes(0x10_00c8, 0x3000 - 200), vec![0; 0x3000 - 200]);
    assert_eq!(files.bytes(0x10_3000, 1), [0xff]);
}

#[test]
fn a_bzimage_loads_as_the_elf_file_in_it() {
    let files = Files::new(4);
    let elf = Elf::default();
    let state = files.load(&bzimage(&elf.build())).unwrap();
    assert_eq!(u64::from(state.entry), ENTRY);
    assert_eq!(files.bytes(0x10_0000, 200), elf.data);
}

#[test]
fn the_start_info_leads_to_everything() {
    let files = Files::new(4);
    let kernel = files.file("kernel", &Elf::default().build());
    let content: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
    let initrd = files.file("initrd", &content);
    let state = files
        .load_files(&kernel, Some(&initrd), "console=ttyS0")
        .unwrap();
    let info = u64::from(state.start_info);
    assert_eq!(files.number(info), 1 << 32 | 0x336e_c578);
    assert_eq!(files.number(info + 8), 1 << 32);
    let [modules, command_line, rsdp, map] = [16, 24, 32, 40].map(|at| files.number(info + at));
    assert_eq!(files.bytes(command_line, 14), b"console=ttyS0\0");
    assert_eq!(rsdp, RSDP.0);
    let (start, size) = (files.number(modules), files.number(modules + 8));
    assert_eq!((start, size), ((4 << 20) - 0x2000, 5000));
    assert_eq!(files.bytes(start, 5000), content);
    let count = files.number(info + 48) as usize;
    let expected = memory_map(&files.memory);
    assert_eq!(count, expected.len());
    for (at, range) in expected.iter().enumerate() {
        let entry = map + 24 * at as u64;
        assert_eq!(files.number(entry), range.start);
        assert_eq!(files.number(entry + 8), range.size);
        assert_eq!(files.number(entry + 16), range.kind as u64);
    }
}

#[test]
fn the_memory_map_is_ram_without_the_hole_and_the_tables() {
    let map = |mib: u64| {
        let map = memory_map(&Memory::new(mib << 20).unwrap());
        let ends = map.iter().map(|range| range.start + range.size);
        assert!(
            ends.zip(map.iter().skip(1))
                .all(|(end, next)| end <= next.start)
        );
        let ram = map.iter().filter(|range| range.kind == MemoryKind::Ram);
        ram.map(|range| (range.start, range.size))
            .collect::<Vec<_>>()
    };
    assert_eq!(map(1), [(0, 0xa0000)]);
    assert_eq!(map(512), [(0, 0xa0000), (1 << 20, 511 << 20)]);
    assert_eq!(
        map(5120),
        [(0, 0xa0000), (1 << 20, 3071 << 20), (4 << 30, 2 << 30)]
    );
}

#[test]
fn each_fault_of_a_kernel_file_is_named() {
    let files = Files::new(4);
    let elf = Elf::default();
    let good = elf.build();
    let changed = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let with = |f: &dyn Fn(&mut Elf)| {
        let mut elf = elf.clone();
        f(&mut elf);
        elf.build()
    };
    let packed = bzimage(&good);
    let packed_with = |at: usize, bytes: &[u8]| {
        let mut file = packed.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (Vec::new(), "neither an ELF file nor a bzImage"),
        (b"#!/bin/sh\n".to_vec(), "neither an ELF file nor a bzImage"),
        (good[..40].to_vec(), "truncated: the file header"),
        (good[..100].to_vec(), "truncated: the program header table"),
        (good[..300].to_vec(), "truncated: a segment"),
        (good[..good.len() - 1].to_vec(), "truncated: a note segment"),
        (changed(4, &[1]), "not for x86-64"),
        (changed(5, &[2]), "not for x86-64"),
        (changed(18, &[183]), "not for x86-64"),
        (changed(54, &[32]), "program headers are not 56 bytes"),
        (
            changed(32, &[0xff; 8]),
            "truncated: the program header table",
        ),
        (changed(64 + 8, &[0xff; 8]), "truncated: a segment"),
        (changed(56, &[0]), "no segment to load"),
        (
            with(&|e| e.memory_size = 10),
            "larger in the file than in memory",
        ),
        (with(&|e| e.memory_size = 4 << 20), "outside of the RAM"),
        (with(&|e| e.memory_size = u64::MAX), "outside of the RAM"),
        (with(&|e| e.start = 0x1000), "outside of the RAM"),
        (with(&|e| e.start = 1 << 40), "outside of the RAM"),
        (with(&|e| e.entry = 0x10_3000), "lies in no segment"),
        (with(&|e| e.entry = 1 << 32 | ENTRY), "lies in no segment"),
        (with(&|e| e.note_owner = *b"GNU\0"), "no PVH entry note"),
        (changed(good.len() - 20, &[5]), "neither 4 nor 8 bytes"),
        (
            changed(good.len() - 24, &[0xff; 4]),
            "a note reaches beyond",
        ),
        (packed[..0x220].to_vec(), "truncated: the setup header"),
        (
            packed[..packed.len() - 1].to_vec(),
            "truncated: the packed kernel",
        ),
        (packed_with(0x206, &[7, 2]), "boot protocol 0x207"),
        (packed_with(0x620, b"BZh"), "packed in an unknown format"),
        (
            packed_with(0x630, &[0xff; 8]),
            "failed to unpack the kernel (gzip)",
        ),
        (
            bzimage(&with(&|e| e.note_owner = *b"GNU\0")),
            "no PVH entry note",
        ),
        (bzimage(b"no elf"), "truncated: the file header"),
    ];
    for (index, (file, expected)) in cases.into_iter().enumerate() {
        let message = chain(&files.load(&file).unwrap_err());
        assert!(message.contains(expected), "case {index}: {message}");
        assert!(
            message.contains("kernel\""),
            "case {index} names the file: {message}"
        );
    }
}

#[test]
fn what_is_no_file_is_refused_by_name() {
    let files = Files::new(4);
    let directory = files.directory.path();
    let kernel = files.file("kernel", &Elf::default().build());
    let absent = directory.join("absent");
    let message = |result: Result<EntryState, LoadError>| chain(&result.unwrap_err());
    let said = message(files.load_files(&absent, None, ""));
    assert!(
        said.contains("absent") && said.contains("No such file"),
        "{said}"
    );
    let said = message(files.load_files(directory, None, ""));
    assert!(said.contains("not a regular file"), "{said}");
    let said = message(files.load_files(&kernel, Some(&absent), ""));
    assert!(
        said.contains("initrd") && said.contains("No such file"),
        "{said}"
    );
}

#[test]
fn an_initrd_that_does_not_fit_beside_the_kernel_is_refused() {
    let files = Files::new(4);
    let kernel = files.file("kernel", &Elf::default().build());
    let room = (4 << 20) - 0x10_3000;
    let exact = files.file("exact", &vec![1; room]);
    let larger = files.file("larger", &vec![1; room + 1]);
    files.load_files(&kernel, Some(&exact), "").unwrap();
    let refused = files.load_files(&kernel, Some(&larger), "");
    assert!(matches!(refused, Err(LoadError::InitrdTooLarge { .. })));
}

#[test]
fn a_command_line_that_linux_would_cut_is_refused() {
    let files = Files::new(4);
    let kernel = files.file("kernel", &Elf::default().build());
    let longest = "x".repeat(MAX_COMMAND_LINE);
    files.load_files(&kernel, None, &longest).unwrap();
    for bad in [format!("{longest}x"), "a\0b".to_owned()] {
        let refused = files.load_files(&kernel, None, &bad);
        assert!(matches!(refused, Err(LoadError::CommandLine { .. })));
    }
}

/// Kernels of a distribution: the file or directory in `DUNLIN_TEST_KERNEL`, else below `target/`.
fn stock_kernels() -> Vec<PathBuf> {
    let place = match std::env::var_os("DUNLIN_TEST_KERNEL") {
        Some(place) => PathBuf::from(place),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-kernels"),
    };
    if place.is_file() {
        return vec![place];
    }
    let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
    let mut kernels: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    kernels.retain(|path| path.is_file());
    kernels
}

#[test]
fn stock_kernels_load() {
    let kernels = stock_kernels();
    if kernels.is_empty() {
        eprintln!(
            "SKIP: no stock kernel: put some into target/test-kernels or set DUNLIN_TEST_KERNEL"
        );
    }
    for kernel in kernels {
        let files = Files::new(512);
        let start = Instant::now();
        let state = files.load_files(&kernel, None, "").unwrap();
        eprintln!(
            "{}: {state:x?} after {:?}",
            kernel.display(),
            start.elapsed()
        );
        // The PVH entry of Linux begins with "cld".
        assert_eq!(files.bytes(u64::from(state.entry), 1), [0xfc]);
    }
}

proptest! {
    #[test]
    fn a_damaged_file_never_panics(
        packed in any::<bool>(),
        changes in proptest::collection::vec((0usize..0x700, any::<u8>()), 1..12),
        length in 0usize..0x800,
    ) {
        let files = Files::new(2);
        let elf = Elf::default().build();
        let mut file = if packed { bzimage(&elf) } else { elf };
        for (at, value) in changes {
            let at = at % file.len();
            file[at] = value;
        }
        if length < 0x400 {
            file.truncate(length);
        }
        let loaded = files.load(&file);
        if let Ok(state) = loaded {
            prop_assert!(u64::from(state.entry) >= 0x10_0000);
        }
    }
}
