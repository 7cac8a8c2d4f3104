//! Tests of configuration space, MSI-X and routing together.

use std::sync::atomic::{AtomicU64, Ordering};

use dunlin_guest::{Msi, RestoreError, SavedState, layout};
use proptest::prelude::*;

use super::*;
use crate::bus::Bus;
use crate::component::Reach;
use crate::recorder::{Doorbells, Messages, Power};

const BAR_SIZE: u64 = 0x4000;
const LAYOUT: MsixLayout = MsixLayout {
    bar: 0,
    table: 0x1000,
    pending: 0x2000,
};
/// Offset of the MSI-X message control register: the first capability.
const MSIX_CONTROL: u64 = 0x42;

#[derive(Debug)]
struct Device {
    config: Mutex<ConfigSpace>,
    msix: Arc<Msix>,
    register: AtomicU64,
    event: Arc<EventFd>,
}

impl Device {
    fn new(kind: BarKind, sink: Arc<Messages>) -> Arc<Self> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1041,
            class: 0x02_00_00,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        let msix = Msix::new(3, LAYOUT, sink);
        let (index, size) = (0, BAR_SIZE);
        config.add_bar(Bar { index, size, kind }).unwrap();
        config.add_msix(Arc::clone(&msix)).unwrap();
        Arc::new(Self {
            config: Mutex::new(config),
            msix,
            register: AtomicU64::new(0),
            event: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
        })
    }
}

impl Component for Device {
    fn name(&self) -> String {
        "pci/00:01.0".into()
    }
    fn pause(&self, _reach: Reach) {}
    fn resume(&self) {}
    fn save(&self) -> SavedState {
        SavedState::encode(&self.name(), "test", 1, &lock(&self.config).save())
    }
    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        lock(&self.config).restore(&state.decode("test", 1)?, state)
    }
}

impl Function for Device {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if !self.msix.read(bar, offset, data) {
            let bytes = self.register.load(Ordering::Relaxed).to_le_bytes();
            let length = data.len();
            data.copy_from_slice(&bytes[..length]);
        }
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if !self.msix.write(bar, offset, data) {
            self.register.store(u64::from(data[0]), Ordering::Relaxed);
        }
    }
    fn doorbells(&self) -> Vec<BarDoorbell> {
        vec![BarDoorbell {
            bar: 0,
            offset: 0x100,
            event: Arc::clone(&self.event),
        }]
    }
}

/// A machine with the device at 00:01.0.
struct Machine {
    mmio: Bus,
    ports: Bus,
    root: Arc<RootComplex>,
    device: Arc<Device>,
    messages: Arc<Messages>,
    doorbells: Arc<Doorbells>,
    power: Arc<Power>,
}

impl Machine {
    fn new(kind: BarKind) -> Self {
        let (mmio, ports) = (Bus::new(), Bus::new());
        let (messages, doorbells) = (Arc::<Messages>::default(), Arc::<Doorbells>::default());
        let power = Arc::<Power>::default();
        let root = RootComplex::new(mmio.clone(), doorbells.clone());
        let device = Device::new(kind, messages.clone());
        root.add(Address::device(1), device.clone()).unwrap();
        root.attach(&ports, power.clone()).unwrap();
        Self {
            mmio,
            ports,
            root,
            device,
            messages,
            doorbells,
            power,
        }
    }

    fn config_address(register: u64) -> u64 {
        layout::PCI_ECAM_START + (1 << 15) + register
    }

    fn config32(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.mmio.read(Self::config_address(register), &mut data));
        u32::from_le_bytes(data)
    }

    fn set_config(&self, register: u64, data: &[u8]) {
        assert!(self.mmio.write(Self::config_address(register), data));
    }

    fn set_bar(&self, value: u64) {
        self.set_config(0x10, &(value as u32).to_le_bytes());
        self.set_config(0x14, &((value >> 32) as u32).to_le_bytes());
    }

    fn decode(&self, command: u16) {
        self.set_config(0x04, &command.to_le_bytes());
    }

    /// Is the device's register found at that address?
    fn answers_at(&self, address: u64) -> bool {
        self.device.register.store(0x5a, Ordering::Relaxed);
        let mut data = [0];
        self.mmio.read(address, &mut data) && data == [0x5a]
    }

    fn vector(&self, vector: u64, msi: Msi, masked: bool) {
        let entry = layout::PCI_MMIO64_START + 0x1000 + vector * 16;
        self.mmio.write(entry, &msi.address.to_le_bytes());
        self.mmio.write(entry + 8, &msi.data.to_le_bytes());
        self.mmio
            .write(entry + 12, &u32::from(masked).to_le_bytes());
    }
}

const FIRST: u64 = layout::PCI_MMIO64_START;
const MSI: Msi = Msi {
    address: 0xfee0_1000,
    data: 0x31,
};

#[test]
fn the_guest_finds_the_function_and_the_host_bridge() {
    let machine = Machine::new(BarKind::Memory64);
    assert_eq!(machine.config32(0), 0x1041_1af4);
    assert_eq!(machine.config32(8), 0x0200_0001);
    assert_eq!(machine.config32(0x2c), 0x0040_1af4);
    let mut data = [0; 4];
    machine.mmio.read(layout::PCI_ECAM_START + 8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x0600_0000);
    // No such device, no such bus.
    for absent in [2 << 15, 1 << 20 | 1 << 15] {
        machine
            .mmio
            .read(layout::PCI_ECAM_START + absent, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}

#[test]
fn mechanism_1_reaches_the_same_registers() {
    let machine = Machine::new(BarKind::Memory64);
    let mut data = [0; 4];
    let select = |address: u32| machine.ports.write(0xcf8, &address.to_le_bytes());
    machine.ports.read(0xcfc, &mut data);
    assert_eq!(data, [0xff; 4]);
    select(0x8000_0000);
    machine.ports.read(0xcf8, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
    select(0x8000_0800);
    let mut device = [0; 2];
    machine.ports.read(0xcfe, &mut device);
    assert_eq!(device, [0x41, 0x10]);
    select(0x8000_0804);
    machine.ports.write(0xcfc, &[0x02, 0]);
    assert!(machine.answers_at(FIRST));
    select(0x0000_0804);
    machine.ports.write(0xcfc, &[0, 0]);
    assert!(machine.answers_at(FIRST));
}

#[test]
fn the_reset_control_port_resets() {
    let machine = Machine::new(BarKind::Memory64);
    machine.ports.write(0xcf9, &[0x02]);
    assert_eq!(machine.power.resets(), 0);
    machine.ports.write(0xcf9, &[0x06]);
    assert_eq!(machine.power.resets(), 1);
    let mut data = [0xff];
    assert!(machine.ports.read(0xcf9, &mut data));
    assert_eq!(data, [0]);
}

#[test]
fn a_device_with_more_functions_says_so_in_the_first() {
    let machine = Machine::new(BarKind::Memory64);
    assert_eq!(machine.config32(0x0c) >> 16 & 0xff, 0);
    let other = Device::new(BarKind::Memory64, machine.messages.clone());
    let address = Address {
        device: 1,
        function: 3,
    };
    assert_eq!(address.to_string(), "00:01.3");
    machine.root.add(address, other).unwrap();
    assert_eq!(machine.config32(0x0c) >> 16 & 0xff, 0x80);
    let mut data = [0; 4];
    let third = Machine::config_address(0) + (3 << 12);
    machine.mmio.read(third, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x1041_1af4);
}

#[test]
fn a_bar_answers_while_memory_decoding_is_on() {
    let machine = Machine::new(BarKind::Memory64);
    assert!(!machine.answers_at(FIRST));
    assert!(machine.doorbells.addresses().is_empty());
    machine.decode(command::MEMORY);
    assert!(machine.answers_at(FIRST));
    assert_eq!(machine.doorbells.addresses(), [FIRST + 0x100]);
    machine.decode(0);
    assert!(!machine.answers_at(FIRST));
    assert!(machine.doorbells.addresses().is_empty());
}

#[test]
fn sizing_a_bar_moves_nothing() {
    let machine = Machine::new(BarKind::Memory64);
    machine.decode(command::MEMORY);
    for register in [0x10, 0x14] {
        let original = machine.config32(register);
        machine.set_config(register, &[0xff; 4]);
        let probe = machine.config32(register);
        assert!(machine.answers_at(FIRST));
        match register {
            0x10 => assert_eq!(probe, !(BAR_SIZE as u32 - 1) | 0b100),
            _ => assert_eq!(probe, u32::MAX),
        }
        machine.set_config(register, &original.to_le_bytes());
    }
    assert!(machine.answers_at(FIRST));
    assert_eq!(machine.doorbells.addresses(), [FIRST + 0x100]);
}

#[test]
fn a_bar_that_the_guest_moves_takes_its_doorbells_along() {
    let machine = Machine::new(BarKind::Memory64);
    machine.decode(command::MEMORY);
    let other = FIRST + 0x10_0000;
    machine.set_bar(other);
    assert!(machine.answers_at(other));
    assert!(!machine.answers_at(FIRST));
    assert_eq!(machine.doorbells.addresses(), [other + 0x100]);
}

#[test]
fn a_bar_outside_of_the_windows_or_over_another_does_not_answer() {
    let machine = Machine::new(BarKind::Memory64);
    let second = Device::new(BarKind::Memory32, machine.messages.clone());
    machine.root.add(Address::device(2), second).unwrap();
    machine.decode(command::MEMORY);
    for address in [0, layout::IOAPIC_START, layout::PCI_ECAM_START, 1 << 60] {
        machine.set_bar(address);
        assert!(!machine.answers_at(address), "{address:#x}");
        assert!(machine.doorbells.addresses().is_empty());
    }
    // Over the second device, which answers there.
    let ecam = layout::PCI_ECAM_START + (2 << 15);
    machine.mmio.write(ecam + 4, &[2]);
    machine.set_bar(layout::PCI_MMIO32_START);
    assert!(!machine.answers_at(layout::PCI_MMIO32_START));
    // It answers as soon as there is room and a configuration write gives the occasion.
    machine.mmio.write(ecam + 4, &[0]);
    machine.decode(command::MEMORY);
    assert!(machine.answers_at(layout::PCI_MMIO32_START));
}

#[test]
fn bars_get_aligned_addresses_of_their_own() {
    let machine = Machine::new(BarKind::Memory64);
    let mut seen = vec![(FIRST, BAR_SIZE)];
    for device in 2..32 {
        let function = Device::new(BarKind::Memory64, machine.messages.clone());
        let place = Address::device(device);
        machine.root.add(place, function.clone()).unwrap();
        lock(&function.config).write(4, &[2]);
        let start = lock(&function.config).bar_address(0).unwrap();
        assert_eq!(start % BAR_SIZE, 0);
        assert!(seen.iter().all(|(s, size)| start >= s + size));
        seen.push((start, BAR_SIZE));
    }
    let again = Device::new(BarKind::Memory64, machine.messages.clone());
    let taken = machine.root.add(Address::device(1), again.clone());
    assert!(matches!(taken, Err(RootError::Taken { .. })));
    let absent = machine.root.add(Address::device(32), again);
    assert!(matches!(absent, Err(RootError::NoSuchAddress { .. })));
}

#[test]
fn a_window_that_is_full_is_an_error() {
    let mut windows = Windows::default();
    let bar = Bar {
        index: 0,
        size: 0x1000_0000,
        kind: BarKind::Memory32,
    };
    assert!(windows.allocate(&bar).is_some());
    assert!(windows.allocate(&bar).is_some());
    assert_eq!(windows.allocate(&bar), None);
}

#[test]
fn a_vector_sends_its_message_once_the_guest_lets_it() {
    let machine = Machine::new(BarKind::Memory64);
    machine.decode(command::MEMORY | command::BUS_MASTER);
    machine.vector(1, MSI, true);
    // MSI-X is off: dropped.
    machine.device.msix.trigger(1);
    machine.set_config(MSIX_CONTROL, &0xc000u16.to_le_bytes());
    // Function masked, vector masked: pending.
    machine.device.msix.trigger(1);
    machine.device.msix.trigger(1);
    machine.set_config(MSIX_CONTROL, &0x8000u16.to_le_bytes());
    let mut pending = [0; 8];
    machine.mmio.read(FIRST + 0x2000, &mut pending);
    assert_eq!(pending, [0b10, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(machine.messages.take(), []);
    // Unmasked: sent once.
    machine.vector(1, MSI, false);
    assert_eq!(machine.messages.take(), [MSI]);
    machine.mmio.read(FIRST + 0x2000, &mut pending);
    assert_eq!(pending, [0; 8]);
    machine.device.msix.trigger(1);
    machine.device.msix.trigger(0xffff);
    assert_eq!(machine.messages.take(), [MSI]);
}

#[test]
fn a_function_that_is_no_bus_master_keeps_its_messages() {
    let machine = Machine::new(BarKind::Memory64);
    machine.decode(command::MEMORY);
    machine.vector(0, MSI, false);
    machine.set_config(MSIX_CONTROL, &0x8000u16.to_le_bytes());
    machine.device.msix.trigger(0);
    assert_eq!(machine.messages.take(), []);
    machine.decode(command::MEMORY | command::BUS_MASTER);
    assert_eq!(machine.messages.take(), [MSI]);
}

#[test]
fn the_capability_list_says_where_the_table_is() {
    let machine = Machine::new(BarKind::Memory64);
    assert_eq!(machine.config32(0x04) >> 16 & 0x10, 0x10);
    assert_eq!(machine.config32(0x34) & 0xff, 0x40);
    assert_eq!(machine.config32(0x40), 0x0002_0011);
    assert_eq!(machine.config32(0x44), 0x1000);
    assert_eq!(machine.config32(0x48), 0x2000);
    let mut config = lock(&machine.device.config);
    assert_eq!(
        config.add_capability(capability::VENDOR, &[1, 2]).unwrap(),
        0x4c
    );
    let full = config.add_capability(capability::VENDOR, &[0; 200]);
    assert!(matches!(full, Err(ConfigError::NoRoom { .. })));
    drop(config);
    assert_eq!(machine.config32(0x40), 0x0002_4c11);
    assert_eq!(machine.config32(0x4c), 0x0201_0009);
}

#[test]
fn impossible_bars_are_refused() {
    let mut config = ConfigSpace::new(Identity::default());
    let mut add = |index, size, kind| config.add_bar(Bar { index, size, kind });
    assert!(add(6, 0x1000, BarKind::Memory32).is_err());
    assert!(add(5, 0x1000, BarKind::Memory64).is_err());
    assert!(add(0, 0x1001, BarKind::Memory32).is_err());
    assert!(add(0, 8, BarKind::Memory32).is_err());
    assert!(add(0, 1 << 32, BarKind::Memory64).is_err());
    assert!(add(0, 0x1000, BarKind::Memory64).is_ok());
    assert!(add(1, 0x1000, BarKind::Memory32).is_err());
    assert!(add(2, 0x1000, BarKind::Memory32).is_ok());
}

#[test]
fn the_state_survives_the_move_to_another_machine() {
    let source = Machine::new(BarKind::Memory64);
    source.decode(command::MEMORY | command::BUS_MASTER);
    source.vector(2, MSI, false);
    source.set_config(MSIX_CONTROL, &0xc000u16.to_le_bytes());
    source.device.msix.trigger(2);
    let moved = FIRST + 0x20_0000;
    source.set_bar(moved);
    source.ports.write(0xcf8, &0x8000_0804u32.to_le_bytes());

    let target = Machine::new(BarKind::Memory64);
    target.root.restore(&source.root.save()).unwrap();
    target.device.restore(&source.device.save()).unwrap();
    target.root.resume();
    assert_eq!(target.device.save(), source.device.save());
    assert_eq!(target.root.save(), source.root.save());
    assert!(target.answers_at(moved));
    assert_eq!(target.doorbells.addresses(), [moved + 0x100]);
    // What was pending is sent when the guest unmasks the function there.
    assert_eq!(target.messages.take(), []);
    target.set_config(MSIX_CONTROL, &0x8000u16.to_le_bytes());
    assert_eq!(target.messages.take(), [MSI]);
}

#[test]
fn the_state_of_another_device_is_refused() {
    let machine = Machine::new(BarKind::Memory64);
    let good = lock(&machine.device.config).save();
    let other = Device::new(BarKind::Memory32, machine.messages.clone());
    let mut states = vec![lock(&other.config).save()];
    let change = |f: &dyn Fn(&mut ConfigState)| {
        let mut state = good.clone();
        f(&mut state);
        state
    };
    states.push(change(&|s| s.registers.truncate(255)));
    states.push(change(&|s| s.registers[0] ^= 1));
    states.push(change(&|s| s.bar_addresses[0] = 0x123));
    states.push(change(&|s| s.bar_addresses.clear()));
    states.push(change(&|s| s.msix = None));
    states.push(change(&|s| s.msix.as_mut().unwrap().vectors.clear()));
    states.push(change(&|s| s.msix.as_mut().unwrap().vectors[0].control = 2));
    states.push(change(&|s| s.msix.as_mut().unwrap().vectors[0].address = 1));
    for (index, state) in states.into_iter().enumerate() {
        let state = SavedState::encode("pci/00:01.0", "test", 1, &state);
        let refused = machine.device.restore(&state);
        assert!(
            matches!(refused, Err(RestoreError::Invalid { .. })),
            "{index}"
        );
        assert_eq!(lock(&machine.device.config).save(), good, "{index}");
    }
}

proptest! {
    #[test]
    fn no_access_panics_or_changes_who_the_device_is(
        accesses in proptest::collection::vec(
            (any::<bool>(), 0u8..3, any::<u32>(), any::<u64>(), 0usize..4), 0..200),
    ) {
        let machine = Machine::new(BarKind::Memory64);
        for (write, place, offset, value, length) in accesses {
            let bytes = &mut value.to_le_bytes()[..1 << length];
            let (bus, address) = match place {
                0 => (&machine.mmio, Machine::config_address(u64::from(offset % 0x1010))),
                1 => (&machine.ports, 0xcf8 + u64::from(offset % 8)),
                _ => (&machine.mmio, FIRST + u64::from(offset) % BAR_SIZE),
            };
            if write {
                bus.write(address, bytes);
            } else {
                bus.read(address, bytes);
            }
            machine.device.msix.trigger(offset as u16 % 4);
        }
        prop_assert_eq!(machine.config32(0), 0x1041_1af4);
        prop_assert_eq!(machine.config32(0x44), 0x1000);
        let state = machine.device.save();
        prop_assert!(machine.device.restore(&state).is_ok());
    }
}
