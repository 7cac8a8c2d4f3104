//! Whatever a guest reads and writes, and whatever a saved state says, devices go on.

#![no_main]

use std::sync::Arc;

use dunlin_devices::bus::Bus;
use dunlin_devices::component::{Component, Reach};
use dunlin_devices::ioapic::{IoApic, PINS};
use dunlin_devices::legacy::Fork;
use dunlin_devices::legacy::pic::Pic;
use dunlin_devices::legacy::pit::Pit;
use dunlin_devices::pci::{Address, RootComplex};
use dunlin_devices::power::PowerDevice;
use dunlin_devices::serial::Serial;
use dunlin_devices::virtio::entropy::Entropy;
use dunlin_devices::virtio::pci::VirtioPci;
use dunlin_fuzz::surroundings::Nobody;
use dunlin_guest::{Memory, VectoredController, layout};
use libfuzzer_sys::{arbitrary, fuzz_target};

#[derive(Debug, arbitrary::Arbitrary)]
enum Event<'a> {
    Port {
        place: u8,
        size: u8,
        value: Option<u32>,
    },
    Memory {
        place: u8,
        offset: u32,
        size: u8,
        value: Option<u64>,
    },
    Input(&'a [u8]),
    Pin {
        pin: u8,
        high: bool,
    },
    /// The processor takes what the legacy controllers have.
    Acknowledge,
    LegacyLine {
        line: u8,
        high: bool,
    },
    EndOfInterrupt(u8),
    PowerButton,
    /// Saves a component, changes fields, and restores it.
    Restore {
        component: u8,
        fields: &'a [u8],
    },
    /// Restores a component from these bytes alone.
    Replace {
        component: u8,
        body: &'a [u8],
    },
}

struct Machine {
    ports: Bus,
    mmio: Bus,
    serial: Arc<Serial>,
    ioapic: Arc<IoApic>,
    power: Arc<PowerDevice>,
    pic: Arc<Pic>,
    components: Vec<Arc<dyn Component>>,
}

impl Machine {
    fn new() -> Self {
        let (ports, mmio) = (Bus::new(), Bus::new());
        let ioapic = IoApic::new(Arc::new(Nobody));
        let pic = Pic::new();
        let timer = Fork([ioapic.pin(layout::TIMER_PIN), pic.line(0)]);
        let pit = Pit::new(Arc::new(timer)).expect("a thread is free");
        let line = Fork([ioapic.pin(layout::SERIAL_IRQ), pic.line(layout::SERIAL_IRQ)]);
        let serial = Serial::new(Arc::new(line), Arc::new(Nobody));
        let power = PowerDevice::new(Arc::new(Nobody), ioapic.pin(layout::SCI_IRQ));
        let root = RootComplex::new(mmio.clone(), Arc::new(Nobody));
        let memory = Memory::new(1 << 20).expect("there is memory for a guest");
        let address = Address::device(1);
        let entropy = VirtioPci::new(address, Box::new(Entropy::new()), memory, Arc::new(Nobody));
        let entropy = entropy.expect("a thread is free");
        root.add(address, entropy).expect("the slot is free");
        let free = "nothing else is there";
        serial.attach(&ports).expect(free);
        pic.attach(&ports).expect(free);
        pit.attach(&ports).expect(free);
        power.attach(&ports).expect(free);
        root.attach(&ports, Arc::new(Nobody)).expect(free);
        mmio.insert(
            layout::IOAPIC_START,
            layout::IOAPIC_SIZE,
            Arc::clone(&ioapic) as _,
        )
        .expect(free);
        let mut components: Vec<Arc<dyn Component>> = vec![
            Arc::clone(&serial) as _,
            Arc::clone(&ioapic) as _,
            Arc::clone(&power) as _,
            Arc::clone(&root) as _,
            Arc::clone(&pit) as _,
            Arc::clone(&pic) as _,
        ];
        components.extend(
            root.functions()
                .into_iter()
                .map(|(_, function)| function as _),
        );
        Self {
            ports,
            mmio,
            serial,
            ioapic,
            power,
            pic,
            components,
        }
    }

    fn take(&self, event: &Event<'_>) {
        match *event {
            Event::Port { place, size, value } => {
                let base = [
                    layout::SERIAL_PORT,
                    layout::POWER_PORT,
                    0x60,
                    layout::PCI_CONFIG_PORT,
                    // The legacy timer and interrupt controllers.
                    0x40,
                    0x20,
                    0xa0,
                    0x4d0,
                ];
                let port = base[usize::from(place >> 5)] + u16::from(place % 8);
                let size = 1 << (size % 3);
                let mut bytes = value.unwrap_or(0).to_le_bytes();
                match value {
                    Some(_) => self.ports.write(port.into(), &bytes[..size]),
                    None => self.ports.read(port.into(), &mut bytes[..size]),
                };
            }
            Event::Memory {
                place,
                offset,
                size,
                value,
            } => {
                let address = match place % 4 {
                    0 => layout::IOAPIC_START + u64::from(offset % 0x40),
                    // The first four devices.
                    1 => layout::PCI_ECAM_START + u64::from(offset % 0x2_0000),
                    2 => layout::PCI_MMIO32_START + u64::from(offset) % layout::PCI_MMIO32_SIZE,
                    _ => layout::PCI_MMIO64_START + u64::from(offset),
                };
                let size = 1 << (size % 4);
                let mut bytes = value.unwrap_or(0).to_le_bytes();
                match value {
                    Some(_) => self.mmio.write(address, &bytes[..size]),
                    None => self.mmio.read(address, &mut bytes[..size]),
                };
            }
            Event::Input(bytes) => {
                assert!(self.serial.push_input(bytes) <= bytes.len());
            }
            Event::Pin { pin, high } => {
                self.ioapic
                    .pin(u32::from(pin) % PINS as u32)
                    .set_level(high);
            }
            Event::Acknowledge => drop(self.pic.acknowledge()),
            Event::LegacyLine { line, high } => {
                self.pic.line(u32::from(line) % 18).set_level(high);
            }
            Event::EndOfInterrupt(vector) => self.ioapic.end_of_interrupt(vector),
            Event::PowerButton => self.power.press_button(),
            Event::Restore { component, fields } => self.restore(component, Some(fields), &[]),
            Event::Replace { component, body } => self.restore(component, None, body),
        }
    }

    fn restore(&self, component: u8, fields: Option<&[u8]>, body: &[u8]) {
        let component = &self.components[usize::from(component) % self.components.len()];
        component.pause(Reach::AnyHost);
        let mut state = component.save();
        match fields {
            Some(fields) => state.body.extend_from_slice(fields),
            None => state.body = body.to_vec(),
        }
        let accepted = component.restore(&state);
        if fields.is_some_and(<[u8]>::is_empty) {
            accepted.expect("a component accepts what it has saved");
        }
        component.resume();
    }
}

fuzz_target!(|events: Vec<Event<'_>>| {
    let machine = Machine::new();
    for component in &machine.components {
        component.resume();
    }
    for event in &events {
        machine.take(event);
    }
    machine.ports.clear();
    machine.mmio.clear();
});
