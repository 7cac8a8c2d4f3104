//! Tests of the registers, driven as a driver drives them.

use std::sync::Arc;

use proptest::prelude::*;

use crate::bus::Bus;
use crate::component::{Component, Reach};
use crate::pci::{Address, Function, RootComplex};
use crate::recorder::{Doorbells, Power};
use crate::virtio::entropy::Entropy;
use crate::virtio::feature;
use crate::virtio::testing::{ACKNOWLEDGE, DRIVER, DRIVER_OK, Driver, FEATURES_OK, NEEDS_RESET};
use dunlin_guest::{SavedState, layout};

use super::VirtioPciState;

fn entropy() -> Box<Entropy> {
    Box::new(Entropy::new())
}

/// Offset, in the configuration space, of the virtio capability of a type.
fn capability(driver: &Driver, kind: u8) -> u16 {
    let found = driver.capabilities(0x09);
    let of_kind = |at: &u16| {
        let mut byte = [0];
        driver.device.config_read(at + 3, &mut byte);
        byte[0] == kind
    };
    found.into_iter().find(of_kind).unwrap()
}

fn config(driver: &Driver, offset: u16, length: usize) -> u64 {
    let mut bytes = [0; 8];
    driver.device.config_read(offset, &mut bytes[..length]);
    u64::from_le_bytes(bytes)
}

#[test]
fn the_function_is_found_as_a_modern_virtio_device() {
    let driver = Driver::probe(entropy());
    assert_eq!(config(&driver, 0, 4), 0x1044_1af4);
    assert_eq!(driver.device.name(), "pci/00:02.0");
    let offsets: Vec<u64> = [1, 2, 3]
        .map(|kind| config(&driver, capability(&driver, kind) + 8, 4))
        .into();
    assert_eq!(offsets, [0, 0x3000, 0x1000]);
    let multiplier = config(&driver, capability(&driver, 2) + 16, 4);
    let doorbells: Vec<u64> = driver.device.doorbells().iter().map(|d| d.offset).collect();
    assert_eq!((multiplier, doorbells), (4, vec![0x3000]));
}

#[test]
fn registers_are_reached_through_configuration_space() {
    let driver = Driver::probe(entropy());
    let access = capability(&driver, 5);
    let device = &driver.device;
    device.config_write(access + 8, &0x14u32.to_le_bytes());
    device.config_write(access + 12, &1u32.to_le_bytes());
    device.config_write(access + 16, &[ACKNOWLEDGE]);
    assert_eq!(driver.status(), ACKNOWLEDGE);
    assert_eq!(config(&driver, access + 16, 1), u64::from(ACKNOWLEDGE));
    for (offset, length) in [(0x13, 4), (0x8000, 1), (u32::MAX, 4), (0, 3), (0, 0)] {
        device.config_write(access + 8, &u32::to_le_bytes(offset));
        device.config_write(access + 12, &u32::to_le_bytes(length));
        device.config_write(access + 16, &[0; 4]);
        config(&driver, access + 16, 4);
    }
    assert_eq!(driver.status(), ACKNOWLEDGE);
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let driver = Driver::probe(entropy());
    let offered = driver.offered();
    assert_eq!(offered, feature::ALL);
    for features in [
        offered | 1,
        offered & !feature::VERSION_1,
        0,
        1 << 63 | offered,
    ] {
        driver.negotiate(features);
        assert_eq!(driver.status() & FEATURES_OK, 0, "{features:#x}");
        driver.set_status(DRIVER_OK);
        assert_eq!(driver.status() & DRIVER_OK, 0);
    }
    driver.negotiate(offered);
    assert_ne!(driver.status() & FEATURES_OK, 0);
}

#[test]
fn status_bits_are_taken_back_by_a_reset_only() {
    let driver = Driver::start(entropy());
    driver.write(0x14, 1, u64::from(ACKNOWLEDGE));
    let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    assert_eq!(driver.status(), all);
    driver.reset();
    assert_eq!(driver.read(0x1c, 2), 0);
    assert_eq!(driver.read(0x1a, 2), 0xffff);
}

#[test]
fn a_queue_is_final_once_it_is_enabled() {
    let driver = Driver::start(entropy());
    let before = (driver.read(0x20, 8), driver.read(0x18, 2));
    driver.write(0x20, 8, 0x1234_5670);
    driver.write(0x18, 2, 2);
    driver.write(0x1c, 2, 0);
    assert_eq!((driver.read(0x20, 8), driver.read(0x18, 2)), before);
    assert_eq!(driver.read(0x1c, 2), 1);
}

#[test]
fn queue_sizes_beyond_the_device_are_refused() {
    let driver = Driver::probe(entropy());
    driver.negotiate(feature::ALL);
    let limit = driver.read(0x18, 2);
    for size in [0, 3, limit * 2, 0xffff] {
        driver.write(0x18, 2, size);
        assert_eq!(driver.read(0x18, 2), limit);
    }
    driver.write(0x16, 2, 9);
    driver.write(0x18, 2, 4);
    assert_eq!(driver.read(0x18, 2), 0);
}

#[test]
fn a_queue_outside_of_ram_makes_the_device_need_a_reset() {
    let mut driver = Driver::probe(entropy());
    driver.negotiate(feature::ALL);
    driver.write(0x10, 2, 0);
    driver.write(0x20, 8, 1 << 40);
    driver.write(0x28, 8, 1 << 40);
    driver.write(0x30, 8, 1 << 40);
    driver.write(0x1c, 2, 1);
    driver.set_status(DRIVER_OK);
    driver.wait_needs_reset();
    driver.initialise(feature::ALL);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn random_bytes_are_served_over_doorbells_and_moves() {
    let mut driver = Driver::start(entropy());
    let mut seen = std::collections::BTreeSet::new();
    for turn in 0..6 {
        let room = driver.room(32);
        driver.add(0, &[room]).unwrap();
        if turn % 2 == 0 {
            driver.ring(0);
        } else {
            // The notification is lost over the move; the device looks by itself.
            driver.move_to(entropy());
        }
        assert_eq!(driver.wait_used(0, 1)[0].1, 32);
        assert!(seen.insert(driver.bytes(room)), "the same bytes again");
    }
}

#[test]
fn an_engine_may_ring_the_doorbell_itself() {
    let mut driver = Driver::start(entropy());
    let room = driver.room(16);
    driver.add(0, &[room]).unwrap();
    driver.device.doorbells()[0].event.write(1).unwrap();
    assert_eq!(driver.wait_used(0, 1)[0].1, 16);
}

#[test]
fn the_doorbell_follows_a_bar_that_the_guest_moves() {
    let mut driver = Driver::start(entropy());
    let (mmio, ports) = (Bus::new(), Bus::new());
    let doorbells = Arc::new(Doorbells::default());
    let root = RootComplex::new(mmio.clone(), Arc::clone(&doorbells) as _);
    root.attach(&ports, Arc::new(Power::default())).unwrap();
    let address = Address::device(2);
    root.add(address, Arc::clone(&driver.device) as _).unwrap();
    let ecam = layout::PCI_ECAM_START + (2 << 15);
    for start in [
        layout::PCI_MMIO32_START,
        layout::PCI_MMIO32_START + 0x10_0000,
    ] {
        mmio.write(ecam + 0x10, &(start as u32).to_le_bytes());
        mmio.write(ecam + 0x04, &6u16.to_le_bytes());
        let doorbell = start + 0x3000;
        assert_eq!(doorbells.addresses(), [doorbell]);
        let room = driver.room(16);
        driver.add(0, &[room]).unwrap();
        assert!(mmio.write(doorbell, &[0, 0]));
        driver.wait_used(0, 1);
    }
}

#[test]
fn a_paused_device_leaves_guest_memory_alone() {
    let mut driver = Driver::start(entropy());
    driver.device.pause(Reach::AnyHost);
    let room = driver.room(16);
    driver.send(0, &[room]);
    let state = driver.save();
    assert_eq!(driver.save(), state);
    assert!(driver.used(0).is_empty());
    assert_eq!(driver.bytes(room), vec![0xee; 16]);
    driver.device.resume();
    driver.wait_used(0, 1);
}

#[test]
fn a_device_that_needs_a_reset_still_does_after_a_move() {
    let mut driver = Driver::start(entropy());
    let (_, available, _) = Driver::rings_of(0);
    driver.put(available + 2, &0x7fffu16.to_le_bytes());
    driver.ring(0);
    driver.wait_needs_reset();
    driver.move_to(entropy());
    assert_ne!(driver.status() & NEEDS_RESET, 0);
    driver.initialise(feature::ALL);
    let room = driver.room(16);
    driver.send(0, &[room]);
    driver.wait_used(0, 1);
}

#[test]
fn hostile_states_are_refused() {
    let mut driver = Driver::start(entropy());
    let room = driver.room(8);
    driver.send(0, &[room]);
    driver.wait_used(0, 1);
    driver.device.pause(Reach::AnyHost);
    let state = driver.save();
    let valid: VirtioPciState = state.decode("virtio-rng", 1).unwrap();
    let hostile: [fn(&mut VirtioPciState); 15] = [
        |s| s.config = None,
        |s| s.status = 0x10f,
        |s| s.status |= u32::from(NEEDS_RESET),
        |s| s.driver_features |= 1,
        |s| s.driver_features = 0,
        |s| s.queues.clear(),
        |s| s.queues.push(s.queues[0]),
        |s| s.queues[0].size = 3,
        |s| s.queues[0].size = 1 << 20,
        |s| s.queues[0].descriptors = 1 << 50,
        |s| s.queues[0].used += 1,
        |s| s.queues[0].next_available = 1 << 16,
        |s| s.queues[0].next_used = s.queues[0].next_used.wrapping_sub(100) & 0xffff,
        |s| s.device_config.push(1),
        |s| s.device.push(1),
    ];
    for (index, change) in hostile.into_iter().enumerate() {
        let mut changed = valid.clone();
        change(&mut changed);
        let target = driver.another(entropy());
        let changed = SavedState::encode(&state.name, "virtio-rng", 1, &changed);
        assert!(target.restore(&changed).is_err(), "change {index}");
        target.restore(&state).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn garbage_in_registers_never_stops_the_device_for_good(
        accesses in proptest::collection::vec(
            (0u8..4, 0u16..0x40, 0usize..4, any::<u64>(), 0u64..0x6000), 1..200)
    ) {
        let mut driver = Driver::start(entropy());
        for (kind, register, width, value, offset) in accesses {
            let length = 1 << width;
            match kind {
                0 => driver.write(u64::from(register), length, value),
                1 => driver.write_bar(offset, length, value),
                2 => { driver.read_bar(offset, length); }
                _ => {
                    let bytes = value.to_le_bytes();
                    driver.device.config_write(register * 4, &bytes[..length.min(4)]);
                    config(&driver, register * 4, 4);
                }
            }
        }
        // Whatever happened: its state can be moved, and after a reset it works.
        driver.move_to(entropy());
        driver.recover();
        let features = driver.offered();
        driver.initialise(features);
        let room = driver.room(16);
        driver.send(0, &[room]);
        driver.wait_used(0, 1);
    }

    #[test]
    fn garbage_as_a_state_is_refused_or_runs(body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let driver = Driver::start(entropy());
        let state = SavedState {
            name: "pci/00:02.0".into(),
            kind: "virtio-rng".into(),
            version: 1,
            body,
        };
        let target = driver.another(entropy());
        let _ = target.restore(&state);
        target.resume();
        target.pause(Reach::AnyHost);
    }
}
