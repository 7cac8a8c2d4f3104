//! Whatever a driver puts into its rings and registers, a device serves it or asks for a reset.

#![no_main]

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use dunlin_devices::component::{Component, Reach};
use dunlin_devices::pci::{Address, Function};
use dunlin_devices::virtio::pci::VirtioPci;
use dunlin_devices::virtio::{
    DeviceConfig, DeviceType, Queues, RingError, VirtioDevice, Wait, block::Block,
    entropy::Entropy, feature, net::Net,
};
use dunlin_fuzz::MemoryFile;
use dunlin_fuzz::surroundings::{Loopback, Nobody};
use dunlin_guest::{GuestAddress, Memory};
use dunlin_storage::{DiskMode, RawDisk};
use dunlin_vswitch::MacAddress;
use libfuzzer_sys::{arbitrary, fuzz_target};
use vm_memory::Bytes;

const MEMORY: u64 = 1 << 20;
const QUEUE_AREA: u64 = 0x1_0000;
const DATA: u64 = 0x8_0000;
const SIZE: u16 = 16;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u64 = 64;

#[derive(Debug, arbitrary::Arbitrary)]
struct Input<'a> {
    device: u8,
    features: u32,
    queues: [Ring; 2],
    /// Writes to BAR 0 before the device starts.
    writes: Vec<(u16, u8, u64)>,
    data: &'a [u8],
    /// Appended to the saved state.
    saved: &'a [u8],
}

#[derive(Debug, arbitrary::Arbitrary)]
struct Ring {
    descriptors: Vec<Descriptor>,
    heads: Vec<u8>,
    /// What the index says beyond the heads that are there.
    excess: u8,
}

#[derive(Debug, arbitrary::Arbitrary)]
struct Descriptor {
    address: u16,
    length: u16,
    flags: u8,
    next: u8,
}

/// A device that tells when it has done a round.
#[derive(Debug)]
struct Watched {
    device: Box<dyn VirtioDevice>,
    rounds: SyncSender<()>,
}

impl VirtioDevice for Watched {
    fn device_type(&self) -> DeviceType {
        self.device.device_type()
    }
    fn features(&self) -> u64 {
        self.device.features()
    }
    fn queue_sizes(&self) -> Vec<u16> {
        self.device.queue_sizes()
    }
    fn config(&self) -> Arc<DeviceConfig> {
        self.device.config()
    }
    fn activate(&mut self, features: u64) {
        self.device.activate(features);
    }
    fn reset(&mut self) {
        self.device.reset();
    }
    fn process(&mut self, queues: &mut Queues) -> Result<Wait, RingError> {
        let outcome = self.device.process(queues);
        // Nobody may be waiting.
        let _full = self.rounds.try_send(());
        outcome
    }
    fn back_end(&self) -> Option<BorrowedFd<'_>> {
        self.device.back_end()
    }
    fn pause(&mut self, reach: Reach) {
        self.device.pause(reach);
    }
    fn save(&self) -> Vec<u8> {
        self.device.save()
    }
    fn restore(&mut self, features: u64, state: &[u8]) -> Result<(), String> {
        self.device.restore(features, state)
    }
}

fn device(number: u8, memory: &Memory) -> (Arc<VirtioPci>, Receiver<()>) {
    let device: Box<dyn VirtioDevice> = match number % 3 {
        0 => Box::new(Net::new(
            Box::new(Loopback::default()),
            MacAddress([2, 0, 0, 0, 0, 1]),
        )),
        1 => {
            let image = MemoryFile::new(&[0x5a; 32 << 10]);
            let disk = RawDisk::open(&image.path(), DiskMode::ReadWrite);
            Box::new(Block::new(
                Box::new(disk.expect("the image is good")),
                "fuzz",
            ))
        }
        _ => Box::new(Entropy::new()),
    };
    let (rounds, done) = sync_channel(8);
    let device = Box::new(Watched { device, rounds });
    let pci = VirtioPci::new(Address::device(2), device, memory.clone(), Arc::new(Nobody));
    (pci.expect("a thread and a descriptor are free"), done)
}

fn write(device: &VirtioPci, offset: u64, length: usize, value: u64) {
    device.bar_write(0, offset, &value.to_le_bytes()[..length]);
}

fn read(device: &VirtioPci, offset: u64, length: usize) -> u64 {
    let mut bytes = [0; 8];
    device.bar_read(0, offset, &mut bytes[..length]);
    u64::from_le_bytes(bytes)
}

fn fill(memory: &Memory, at: u64, bytes: &[u8]) {
    let room = (MEMORY - at) as usize;
    let bytes = &bytes[..bytes.len().min(room)];
    let written = memory.mapping().write_slice(bytes, GuestAddress(at));
    written.expect("it is in RAM");
}

fn fill_ring(memory: &Memory, queue: u64, ring: &Ring) {
    let area = QUEUE_AREA * (queue + 1);
    for (index, descriptor) in (0..u64::from(SIZE)).zip(&ring.descriptors) {
        let address = match descriptor.address {
            u16::MAX => u64::MAX - 7,
            address => u64::from(address) << 4,
        };
        let length = match descriptor.length {
            u16::MAX => u32::MAX,
            length => u32::from(length),
        };
        let mut bytes = Vec::from(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(u16::from(descriptor.flags).to_le_bytes());
        bytes.extend(u16::from(descriptor.next).to_le_bytes());
        fill(memory, area + 16 * index, &bytes);
    }
    for (index, head) in (0..u64::from(SIZE)).zip(&ring.heads) {
        fill(
            memory,
            area + 0x4004 + 2 * index,
            &u16::from(*head).to_le_bytes(),
        );
    }
    let count = ring.heads.len().min(usize::from(SIZE)) as u16 + u16::from(ring.excess);
    fill(memory, area + 0x4002, &count.to_le_bytes());
}

fuzz_target!(|input: Input<'_>| {
    let memory = Memory::new(MEMORY).expect("there is memory for a guest");
    fill(&memory, DATA, input.data);
    for (queue, ring) in (0..).zip(&input.queues) {
        fill_ring(&memory, queue, ring);
    }
    let (device_under_test, done) = device(input.device, &memory);
    let pci = &*device_under_test;
    pci.resume();
    pci.config_write(0x04, &6u16.to_le_bytes());
    for status in [1, 3] {
        write(pci, 0x14, 1, status);
    }
    let features = (u64::from(input.features) | feature::VERSION_1) & offered(pci);
    for (half, bits) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
        write(pci, 0x08, 4, half);
        write(pci, 0x0c, 4, bits);
    }
    write(pci, 0x14, 1, u64::from(3 | FEATURES_OK));
    let queues = read(pci, 0x12, 2);
    for queue in 0..queues {
        let area = QUEUE_AREA * (queue + 1);
        write(pci, 0x16, 2, queue);
        write(pci, 0x18, 2, SIZE.into());
        write(pci, 0x20, 8, area);
        write(pci, 0x28, 8, area + 0x4000);
        write(pci, 0x30, 8, area + 0x8000);
        write(pci, 0x1c, 2, 1);
    }
    for (offset, length, value) in input.writes.iter().take(8) {
        let length = 1 << (length % 4);
        let _value = read(pci, (*offset).into(), length);
        write(pci, (*offset).into(), length, *value);
    }
    let status = read(pci, 0x14, 1) | 0x0f;
    write(pci, 0x14, 1, status);
    for queue in 0..queues {
        write(pci, 0x3000 + 4 * queue, 2, queue);
    }
    if read(pci, 0x14, 1) & (NEEDS_RESET | 4) == 4 {
        let _idle = done.recv_timeout(Duration::from_millis(5));
    }
    pci.pause(Reach::AnyHost);
    let mut state = pci.save();
    let (other, done) = device(input.device, &memory);
    state.body.extend_from_slice(input.saved);
    let accepted = other.restore(&state);
    if input.saved.is_empty() {
        accepted.expect("a device accepts what its like has saved");
    }
    other.resume();
    let _idle = done.recv_timeout(Duration::from_millis(1));
    write(&other, 0x14, 1, 0);
});

fn offered(pci: &VirtioPci) -> u64 {
    write(pci, 0x00, 4, 0);
    let low = read(pci, 0x04, 4);
    write(pci, 0x00, 4, 1);
    low | read(pci, 0x04, 4) << 32
}
