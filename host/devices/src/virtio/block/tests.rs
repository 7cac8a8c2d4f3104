//! Tests of the block device between a driver and a raw image.

use std::sync::atomic::AtomicUsize;

use dunlin_storage::{DiskMode, RawDisk};
use proptest::prelude::*;

use super::*;
use crate::component::Component;
use crate::virtio::testing::{Driver, Part};

const CAPACITY: u64 = 1 << 20;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const IDENTIFY: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(CAPACITY).unwrap();
    file
}

fn disk(file: &tempfile::NamedTempFile, mode: DiskMode) -> Box<RawDisk> {
    let disk = RawDisk::open(file.path(), mode).unwrap();
    disk.lock().acquire().unwrap();
    Box::new(disk)
}

fn device(file: &tempfile::NamedTempFile) -> Box<Block> {
    Box::new(Block::new(disk(file, DiskMode::ReadWrite), "disk-0"))
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = Vec::from(kind.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// Sends a request and waits for it: its status and the length in the used ring.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
    let mut parts = vec![driver.buffer(&header(kind, sector))];
    parts.extend(data);
    let status = driver.room(1);
    parts.push(status);
    driver.send(0, &parts);
    let used = driver.wait_used(0, 1);
    (driver.bytes(status)[0], used[0].1)
}

fn write(driver: &mut Driver, sector: u64, data: &[u8]) -> u8 {
    let data = driver.buffer(data);
    request(driver, WRITE, sector, &[data]).0
}

fn read(driver: &mut Driver, sector: u64, length: usize) -> (u8, Vec<u8>) {
    let room = driver.room(length);
    let (status, _) = request(driver, READ, sector, &[room]);
    (status, driver.bytes(room))
}

fn ranges(driver: &mut Driver, ranges: &[(u64, u32, u32)]) -> Part {
    let mut bytes = Vec::new();
    for (sector, count, flags) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    driver.buffer(&bytes)
}

#[test]
fn the_configuration_names_the_capacity() {
    let file = image();
    let driver = Driver::start(device(&file));
    assert_eq!(driver.read_bar(0x2000, 8), CAPACITY / 512);
    assert_eq!(driver.read_bar(0x200c, 4), 126);
    assert_eq!(driver.read_bar(0x2014, 4), 512);
}

#[test]
fn what_was_written_is_read_back_and_in_the_file() {
    let file = image();
    let mut driver = Driver::start(device(&file));
    let data: Vec<u8> = (0..300_032u32).map(|i| ((i * 7) >> 3) as u8).collect();
    assert_eq!(write(&mut driver, 3, &data), OK);
    let (first, second) = (driver.room(1000), driver.room(299_032));
    let (status, length) = request(&mut driver, READ, 3, &[first, second]);
    assert_eq!((status, length), (OK, 300_033));
    assert_eq!([driver.bytes(first), driver.bytes(second)].concat(), data);
    let on_disk = std::fs::read(file.path()).unwrap();
    assert_eq!(on_disk[3 * 512..][..data.len()], data);
}

#[test]
fn requests_beyond_the_disk_or_of_half_sectors_fail() {
    let file = image();
    let mut driver = Driver::start(device(&file));
    let last = CAPACITY / 512;
    for (sector, length) in [
        (last, 512),
        (last - 1, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (0, 511),
    ] {
        assert_eq!(write(&mut driver, sector, &vec![1; length]), ERROR);
        assert_eq!(read(&mut driver, sector, length).0, ERROR);
    }
    assert!(std::fs::read(file.path()).unwrap().iter().all(|&b| b == 0));
}

#[test]
fn a_read_only_disk_says_so_and_refuses_writes() {
    let file = image();
    let block = Block::new(disk(&file, DiskMode::ReadOnly), "");
    let mut driver = Driver::start(Box::new(block));
    assert_ne!(driver.offered() & feature::READ_ONLY, 0);
    assert_eq!(driver.offered() & feature::DISCARD, 0);
    assert_eq!(write(&mut driver, 0, &[1; 512]), ERROR);
    assert_eq!(read(&mut driver, 0, 512), (OK, vec![0; 512]));
}

#[test]
fn discards_and_zeroes_read_as_zeros() {
    let file = image();
    let mut driver = Driver::start(device(&file));
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        assert_eq!(write(&mut driver, 0, &[9; 4096]), OK);
        let data = ranges(&mut driver, &[(1, 2, flags), (5, 1, flags)]);
        assert_eq!(request(&mut driver, kind, 0, &[data]).0, OK);
        let (_, bytes) = read(&mut driver, 0, 4096);
        let zeros: Vec<bool> = bytes
            .chunks(512)
            .map(|s| s.iter().all(|&b| b == 0))
            .collect();
        let expected = [false, true, true, false, false, true, false, false];
        assert_eq!(zeros, expected, "{kind} {flags}");
    }
}

#[test]
fn impossible_ranges_are_refused() {
    let file = image();
    let mut driver = Driver::start(device(&file));
    let cases = [
        (vec![(0, 1, 1)], UNSUPPORTED),
        (vec![(0, 1, 0x80)], UNSUPPORTED),
        (vec![(CAPACITY / 512, 1, 0)], ERROR),
        (vec![(u64::MAX, u32::MAX, 0)], ERROR),
        (vec![(0, 1, 0); 17], ERROR),
        (vec![], ERROR),
    ];
    for (list, expected) in cases {
        let data = ranges(&mut driver, &list);
        let (status, _) = request(&mut driver, DISCARD, 0, &[data]);
        assert_eq!(status, expected, "{list:?}");
    }
    let half = driver.buffer(&[0; 15]);
    assert_eq!(request(&mut driver, DISCARD, 0, &[half]).0, ERROR);
}

#[test]
fn a_disk_tells_its_identity() {
    let file = image();
    let mut driver = Driver::start(device(&file));
    let room = driver.room(20);
    assert_eq!(request(&mut driver, IDENTIFY, 0, &[room]), (OK, 21));
    assert_eq!(&driver.bytes(room)[..7], b"disk-0\0");
    let short = driver.room(4);
    assert_eq!(request(&mut driver, IDENTIFY, 0, &[short]), (OK, 5));
}

#[test]
fn unknown_requests_are_unsupported() {
    let file = image();
    let mut driver = Driver::start(device(&file));
    for kind in [2, 3, 5, 10, 12, 14, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, &[]).0, UNSUPPORTED);
    }
}

#[test]
fn a_chain_that_cannot_be_answered_is_returned_empty() {
    let file = image();
    let mut driver = Driver::start(device(&file));
    let short = [driver.buffer(&[0; 15]), driver.room(1)];
    driver.send(0, &short);
    assert_eq!(driver.wait_used(0, 1)[0].1, 0);
    let no_status = driver.buffer(&header(FLUSH, 0));
    driver.send(0, &[no_status]);
    assert_eq!(driver.wait_used(0, 1)[0].1, 0);
    assert_eq!(request(&mut driver, FLUSH, 0, &[]).0, OK);
}

/// Counts flushes.
#[derive(Debug)]
struct Counting(Box<RawDisk>, Arc<AtomicUsize>);

impl Disk for Counting {
    fn capacity(&self) -> u64 {
        self.0.capacity()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.0.read(offset, data)
    }
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.0.write(offset, data)
    }
    fn flush(&mut self) -> Result<(), DiskError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.flush()
    }
    fn discard(&mut self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.0.discard(offset, length)
    }
    fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.0.write_zeroes(offset, length)
    }
}

#[test]
fn writes_are_durable_when_they_must_be() {
    let file = image();
    let flushes = Arc::new(AtomicUsize::new(0));
    let counting = |flushes: &Arc<AtomicUsize>| {
        let disk = Counting(disk(&file, DiskMode::ReadWrite), Arc::clone(flushes));
        Box::new(Block::new(Box::new(disk), ""))
    };
    {
        let mut driver = Driver::start(counting(&flushes));
        write(&mut driver, 0, &[1; 512]);
        assert_eq!(flushes.load(Ordering::Relaxed), 0);
        request(&mut driver, FLUSH, 0, &[]);
        assert_eq!(flushes.load(Ordering::Relaxed), 1);
        driver.device.pause(Reach::AnyHost);
        assert_eq!(flushes.load(Ordering::Relaxed), 1, "nothing was written");
        driver.device.resume();
        write(&mut driver, 0, &[2; 512]);
        driver.device.pause(Reach::AnyHost);
        assert_eq!(flushes.load(Ordering::Relaxed), 2);
    }
    // A driver that does not flush gets writes that are durable.
    let mut driver = Driver::start_with(counting(&flushes), !feature::FLUSH);
    write(&mut driver, 0, &[3; 512]);
    assert_eq!(flushes.load(Ordering::Relaxed), 3);
}

#[test]
fn a_move_in_the_middle_of_requests_loses_and_repeats_nothing() {
    let file = image();
    let source = disk(&file, DiskMode::ReadWrite);
    let mut lock = source.lock().clone();
    let mut driver = Driver::start(Box::new(Block::new(source, "")));
    let mut outstanding = 0;
    for turn in 0..30u64 {
        let parts = [
            driver.buffer(&header(WRITE, turn)),
            driver.buffer(&[turn as u8 + 1; 512]),
            driver.room(1),
        ];
        while driver.add(0, &parts).is_none() {
            outstanding -= driver.wait_used(0, 1).len();
        }
        outstanding += 1;
        driver.ring(0);
        if turn % 5 == 4 {
            let target = RawDisk::open(file.path(), DiskMode::ReadWrite).unwrap();
            let next = target.lock().clone();
            assert!(next.acquire().is_err(), "the source runs");
            driver.device.pause(Reach::AnyHost);
            lock.release().unwrap();
            next.acquire().unwrap();
            driver.move_to(Box::new(Block::new(Box::new(target), "")));
            lock = next;
        }
    }
    driver.wait_used(0, outstanding);
    for turn in 0..30 {
        assert_eq!(
            read(&mut driver, turn, 512),
            (OK, vec![turn as u8 + 1; 512])
        );
    }
}

#[test]
fn a_disk_of_another_size_or_mode_is_refused() {
    let file = image();
    let driver = Driver::start(device(&file));
    driver.device.pause(Reach::AnyHost);
    let state = driver.save();
    let larger = tempfile::NamedTempFile::new().unwrap();
    larger.as_file().set_len(CAPACITY * 2).unwrap();
    let read_only = tempfile::NamedTempFile::new().unwrap();
    read_only.as_file().set_len(CAPACITY).unwrap();
    let read_only = Box::new(Block::new(disk(&read_only, DiskMode::ReadOnly), ""));
    for other in [device(&larger), read_only] {
        assert!(driver.another(other).restore(&state).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn garbage_requests_end_in_an_answer_or_a_reset(
        requests in proptest::collection::vec(
            (0u32..16, any::<u64>(), 0u64..4096, 0usize..3000, 0usize..3000, 0usize..20), 1..20)
    ) {
        let file = image();
        let mut driver = Driver::start(device(&file));
        for (kind, far, near, readable, writable, cut) in requests {
            let sector = if cut % 2 == 0 { near } else { far };
            let mut bytes = header(kind, sector);
            bytes.resize(16 + readable, far as u8);
            let cut = cut.min(bytes.len());
            let mut parts = vec![driver.buffer(&bytes[..cut]), driver.buffer(&bytes[cut..])];
            parts.push(driver.room(writable));
            driver.send(0, &parts);
            prop_assert_eq!(driver.wait_used(0, 1).len(), 1);
        }
        prop_assert_eq!(request(&mut driver, FLUSH, 0, &[]).0, OK);
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), CAPACITY);
    }
}
