//! A driver for tests: finds the structures by their capabilities, negotiates, fills rings in
//! guest memory, rings doorbells and waits for interrupts.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dunlin_guest::{GuestAddress, Memory, Msi, MsiSink, SavedState};
use vm_memory::Bytes;

use super::pci::VirtioPci;
use super::{VirtioDevice, feature};
use crate::component::{Component, Reach};
use crate::lock;
use crate::pci::{Address, Function};

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 64;

/// The vector of configuration changes; queue `n` has vector `n + 1`.
pub(crate) const CONFIG_VECTOR: u16 = 0;

const QUEUE_AREA: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
const DATA: u64 = 0x20_0000;
const MEMORY: u64 = 0x80_0000;
pub(crate) const QUEUE_SIZE: u16 = 16;

#[derive(Debug)]
pub(crate) struct Sink(Mutex<Sender<Msi>>);

impl MsiSink for Sink {
    fn signal(&self, msi: Msi) {
        // The test may be over.
        let _ = lock(&self.0).send(msi);
    }
}

/// A part of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part {
    /// The device reads it.
    Read(u64, u32),
    /// The device writes it.
    Write(u64, u32),
}

#[derive(Debug, Default, Clone)]
struct Ring {
    size: u16,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    available: u16,
    seen: u16,
}

pub(crate) struct Driver {
    pub(crate) device: Arc<VirtioPci>,
    pub(crate) memory: Memory,
    sink: Arc<Sink>,
    interrupts: Receiver<Msi>,
    rings: Vec<Ring>,
    next_data: u64,
}

impl Driver {
    /// A driver before negotiation, on a device that runs.
    pub(crate) fn probe(device: Box<dyn VirtioDevice>) -> Self {
        let memory = Memory::new(MEMORY).unwrap();
        let (sender, interrupts) = channel();
        let sink = Arc::new(Sink(Mutex::new(sender)));
        let device = on_pci(device, &memory, &sink);
        device.resume();
        let driver = Self {
            device,
            memory,
            sink,
            interrupts,
            rings: Vec::new(),
            next_data: DATA,
        };
        driver.enable_interrupts();
        driver
    }

    /// A driver that uses every feature that the device offers, ready for traffic.
    pub(crate) fn start(device: Box<dyn VirtioDevice>) -> Self {
        let mut driver = Self::probe(device);
        let offered = driver.offered();
        driver.initialise(offered);
        driver
    }

    /// As [`Driver::start`], but with the features in `mask` only (and version 1).
    pub(crate) fn start_with(device: Box<dyn VirtioDevice>, mask: u64) -> Self {
        let mut driver = Self::probe(device);
        let features = driver.offered() & mask | feature::VERSION_1;
        driver.initialise(features);
        driver
    }

    pub(crate) fn initialise(&mut self, features: u64) {
        self.negotiate(features);
        assert_ne!(self.status() & FEATURES_OK, 0, "features refused");
        let queues = self.read(0x12, 2);
        self.rings.clear();
        self.write(0x10, 2, u64::from(CONFIG_VECTOR));
        for queue in 0..queues {
            self.set_up_queue(queue as u16);
        }
        self.set_status(DRIVER_OK);
        assert_eq!(self.status() & NEEDS_RESET, 0);
    }

    fn set_up_queue(&mut self, queue: u16) {
        let area = QUEUE_AREA * u64::from(queue + 1);
        let zeros = vec![0; QUEUE_AREA as usize];
        self.memory
            .mapping()
            .write_slice(&zeros, GuestAddress(area))
            .unwrap();
        self.write(0x16, 2, u64::from(queue));
        let size = QUEUE_SIZE.min(self.read(0x18, 2) as u16);
        self.write(0x18, 2, u64::from(size));
        self.write(0x1a, 2, u64::from(queue + 1));
        self.write(0x20, 8, area);
        self.write(0x28, 8, area + AVAILABLE);
        self.write(0x30, 8, area + USED);
        self.write(0x1c, 2, 1);
        self.rings.push(Ring {
            size,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            available: 0,
            seen: 0,
        });
    }

    pub(crate) fn offered(&self) -> u64 {
        self.write(0x00, 4, 0);
        let low = self.read(0x04, 4);
        self.write(0x00, 4, 1);
        low | self.read(0x04, 4) << 32
    }

    pub(crate) fn negotiate(&self, features: u64) {
        self.reset();
        self.set_status(ACKNOWLEDGE);
        self.set_status(DRIVER);
        self.write(0x08, 4, 0);
        self.write(0x0c, 4, features & 0xffff_ffff);
        self.write(0x08, 4, 1);
        self.write(0x0c, 4, features >> 32);
        self.set_status(FEATURES_OK);
    }

    pub(crate) fn reset(&self) {
        self.write(0x14, 1, 0);
        assert_eq!(self.status(), 0);
    }

    pub(crate) fn set_status(&self, bits: u8) {
        let status = self.status() & !NEEDS_RESET | bits;
        self.write(0x14, 1, u64::from(status));
    }

    pub(crate) fn status(&self) -> u8 {
        self.read(0x14, 1) as u8
    }

    /// A register of the common structure.
    pub(crate) fn read(&self, offset: u64, length: usize) -> u64 {
        self.read_bar(offset, length)
    }

    pub(crate) fn write(&self, offset: u64, length: usize, value: u64) {
        self.write_bar(offset, length, value);
    }

    pub(crate) fn read_bar(&self, offset: u64, length: usize) -> u64 {
        let mut bytes = [0; 8];
        self.device.bar_read(0, offset, &mut bytes[..length]);
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn write_bar(&self, offset: u64, length: usize, value: u64) {
        self.device
            .bar_write(0, offset, &value.to_le_bytes()[..length]);
    }

    /// Offsets and contents of the capabilities with that ID.
    pub(crate) fn capabilities(&self, id: u8) -> Vec<u16> {
        let byte = |offset: u16| {
            let mut byte = [0];
            self.device.config_read(offset, &mut byte);
            byte[0]
        };
        let mut found = Vec::new();
        let mut at = u16::from(byte(0x34));
        while at != 0 {
            if byte(at) == id {
                found.push(at);
            }
            at = u16::from(byte(at + 1));
        }
        found
    }

    /// Interrupts as after start, whatever was written to their registers.
    pub(crate) fn recover(&self) {
        self.enable_interrupts();
    }

    fn enable_interrupts(&self) {
        self.device.config_write(0x04, &6u16.to_le_bytes());
        for vector in 0..8u64 {
            let entry = 0x4000 + 16 * vector;
            self.write_bar(entry, 8, 0xfee0_0000);
            self.write_bar(entry + 8, 4, vector);
            self.write_bar(entry + 12, 4, 0);
        }
        let control = self.capabilities(0x11)[0] + 2;
        self.device.config_write(control, &0x8000u16.to_le_bytes());
    }

    /// Guest memory for a buffer.
    pub(crate) fn allocate(&mut self, length: usize) -> u64 {
        let at = self.next_data;
        self.next_data = (at + length as u64).next_multiple_of(16);
        if self.next_data > MEMORY {
            self.next_data = (DATA + length as u64).next_multiple_of(16);
            return DATA;
        }
        at
    }

    /// A readable buffer with these bytes.
    pub(crate) fn buffer(&mut self, bytes: &[u8]) -> Part {
        let at = self.allocate(bytes.len());
        self.put(at, bytes);
        Part::Read(at, bytes.len() as u32)
    }

    /// A writable buffer.
    pub(crate) fn room(&mut self, length: usize) -> Part {
        let at = self.allocate(length);
        self.put(at, &vec![0xee; length]);
        Part::Write(at, length as u32)
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .mapping()
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub(crate) fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory
            .mapping()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// The bytes of a part.
    pub(crate) fn bytes(&self, part: Part) -> Vec<u8> {
        let (Part::Read(address, length) | Part::Write(address, length)) = part;
        self.get(address, length as usize)
    }

    /// Where queue `queue` has its rings: descriptors, available, used.
    pub(crate) fn rings_of(queue: usize) -> (u64, u64, u64) {
        let area = QUEUE_AREA * (queue as u64 + 1);
        (area, area + AVAILABLE, area + USED)
    }

    /// Makes a chain available without ringing; `None` when the table is full.
    pub(crate) fn add(&mut self, queue: usize, parts: &[Part]) -> Option<u16> {
        let (table, available, _) = Self::rings_of(queue);
        let ring = &mut self.rings[queue];
        if ring.free.len() < parts.len() {
            return None;
        }
        let indices = ring.free.split_off(ring.free.len() - parts.len());
        for (position, part) in parts.iter().enumerate() {
            let (address, length, mut flags) = match *part {
                Part::Read(address, length) => (address, length, 0u16),
                Part::Write(address, length) => (address, length, 2),
            };
            let next = indices.get(position + 1).copied();
            flags |= u16::from(next.is_some());
            let mut bytes = Vec::new();
            bytes.extend(address.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.unwrap_or(0).to_le_bytes());
            let at = table + 16 * u64::from(indices[position]);
            self.memory
                .mapping()
                .write_slice(&bytes, GuestAddress(at))
                .unwrap();
        }
        let head = indices[0];
        let slot = available + 4 + 2 * u64::from(ring.available % ring.size);
        let memory = self.memory.mapping();
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        ring.available = ring.available.wrapping_add(1);
        memory
            .store(
                ring.available,
                GuestAddress(available + 2),
                std::sync::atomic::Ordering::SeqCst,
            )
            .unwrap();
        ring.chains[usize::from(head)] = indices;
        Some(head)
    }

    /// Rings a doorbell as an MMIO write does.
    pub(crate) fn ring(&self, queue: usize) {
        self.write_bar(0x3000 + 4 * queue as u64, 2, queue as u64);
    }

    /// Makes a chain available and rings; returns its head.
    pub(crate) fn send(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let head = self.add(queue, parts).expect("the queue has room");
        self.ring(queue);
        head
    }

    /// Chains that were used since the last call: head and length.
    pub(crate) fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let (_, available, used) = Self::rings_of(queue);
        let ring = &mut self.rings[queue];
        let memory = self.memory.mapping();
        let mut found = Vec::new();
        loop {
            // Ask to hear of the next one, then look.
            let wish = GuestAddress(available + 4 + 2 * u64::from(ring.size));
            let order = std::sync::atomic::Ordering::SeqCst;
            memory.store(ring.seen, wish, order).unwrap();
            std::sync::atomic::fence(order);
            let index: u16 = memory.load(GuestAddress(used + 2), order).unwrap();
            if index == ring.seen {
                return found;
            }
            let slot = used + 4 + 8 * u64::from(ring.seen % ring.size);
            let head: u32 = memory.read_obj(GuestAddress(slot)).unwrap();
            let length: u32 = memory.read_obj(GuestAddress(slot + 4)).unwrap();
            ring.seen = ring.seen.wrapping_add(1);
            let chain = std::mem::take(&mut ring.chains[head as usize]);
            assert!(!chain.is_empty(), "chain {head} was used twice");
            ring.free.extend(chain);
            found.push((head as u16, length));
        }
    }

    /// Waits until `count` chains were used.
    pub(crate) fn wait_used(&mut self, queue: usize, count: usize) -> Vec<(u16, u32)> {
        let mut found = self.used(queue);
        while found.len() < count {
            let interrupt = self.interrupts.recv_timeout(PATIENCE);
            interrupt.unwrap_or_else(|_| panic!("{} of {count} chains used", found.len()));
            found.extend(self.used(queue));
        }
        found
    }

    /// Waits for the interrupt of a configuration change.
    pub(crate) fn wait_config_interrupt(&self) {
        loop {
            let interrupt = self.interrupts.recv_timeout(PATIENCE);
            let msi = interrupt.expect("an interrupt for the configuration change");
            if msi.data == u32::from(CONFIG_VECTOR) {
                return;
            }
        }
    }

    /// Waits until the device says that it needs a reset.
    pub(crate) fn wait_needs_reset(&self) {
        while self.status() & NEEDS_RESET == 0 {
            self.wait_config_interrupt();
        }
    }

    /// Pauses and saves the device, and goes on with `device` in its place.
    pub(crate) fn move_to(&mut self, device: Box<dyn VirtioDevice>) {
        self.device.pause(Reach::AnyHost);
        let state = self.device.save();
        let target = on_pci(device, &self.memory, &self.sink);
        target.restore(&state).unwrap();
        assert_eq!(target.save(), state, "what was restored is what was saved");
        self.device = target;
        self.device.resume();
    }

    /// A fresh device of the same machine, paused.
    pub(crate) fn another(&self, device: Box<dyn VirtioDevice>) -> Arc<VirtioPci> {
        on_pci(device, &self.memory, &self.sink)
    }

    pub(crate) fn save(&self) -> SavedState {
        self.device.save()
    }
}

fn on_pci(device: Box<dyn VirtioDevice>, memory: &Memory, sink: &Arc<Sink>) -> Arc<VirtioPci> {
    let sink: Arc<dyn MsiSink> = Arc::clone(sink) as _;
    VirtioPci::new(Address::device(2), device, memory.clone(), sink).unwrap()
}
