//! The root complex: finds the function that a configuration access means, and keeps the routes
//! of BARs on the MMIO bus where the guest puts them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use dunlin_guest::{Doorbell, RestoreError, SavedState, layout};

use super::config::Bar;
use super::{Address, DoorbellHost, Function, HostBridge, Windows, window};
use crate::bus::{Bus, BusDevice, RangeError};
use crate::component::{Component, Reach};
use crate::power::PowerEvents;
use crate::{lock, read_lock, write_lock};

const KIND: &str = "pci-root";
const VERSION: u32 = 1;

/// Bytes of configuration space per function in ECAM.
const FUNCTION_SIZE: u64 = 0x1000;
/// Bit of the address port that makes the data port work.
const CONFIG_ENABLE: u32 = 1 << 31;
/// The bits of the address port that exist: enable, bus, device, function, register.
const CONFIG_ADDRESS_MASK: u32 = CONFIG_ENABLE | 0x00ff_fffc;
/// The reset control register hides behind byte accesses to the second address port (0xcf9).
const RESET_CONTROL: u64 = 1;
const RESET_CPU: u8 = 1 << 2;

/// Why a function could not be added.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The device number is above 31 or the function number above 7.
    #[error("there is no PCI address {address}")]
    NoSuchAddress {
        /// What was asked for.
        address: Address,
    },
    /// Two functions at one address.
    #[error("PCI address {address} is taken")]
    Taken {
        /// What was asked for.
        address: Address,
    },
    /// No room for a BAR.
    #[error("no address space is left for BAR {index} ({size:#x} bytes) of {address}")]
    WindowFull {
        /// The function.
        address: Address,
        /// The BAR's index.
        index: u8,
        /// The BAR's size.
        size: u64,
    },
}

/// Where a BAR answers now.
#[derive(Debug, Clone)]
struct Route {
    start: u64,
    doorbells: Vec<Doorbell>,
}

/// Bus 0 and its functions.
#[derive(Debug)]
pub struct RootComplex {
    functions: RwLock<BTreeMap<Address, Arc<dyn Function>>>,
    /// Serialises configuration writes with the changes of routes that follow from them.
    routes: Mutex<BTreeMap<(Address, u8), Route>>,
    windows: Mutex<Windows>,
    mmio: Bus,
    doorbells: Arc<dyn DoorbellHost>,
    /// The address port of configuration mechanism 1.
    config_address: AtomicU32,
}

/// Saved state of [`RootComplex`]; the functions save theirs.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RootState {
    /// The address port of configuration mechanism 1.
    #[prost(uint32, tag = "1")]
    pub config_address: u32,
}

impl RootComplex {
    /// Bus 0 with nothing but the host bridge. BARs appear on `mmio`.
    pub fn new(mmio: Bus, doorbells: Arc<dyn DoorbellHost>) -> Arc<Self> {
        let bridge: Arc<dyn Function> = Arc::new(HostBridge::default());
        Arc::new(Self {
            functions: RwLock::new(BTreeMap::from([(Address::device(0), bridge)])),
            routes: Mutex::default(),
            windows: Mutex::default(),
            mmio,
            doorbells,
            config_address: AtomicU32::new(0),
        })
    }

    /// Adds a function and gives addresses to its BARs. The guest sees it from now on.
    ///
    /// # Errors
    /// [`RootError`] when the address cannot be or is taken, or the windows are full.
    pub fn add(&self, address: Address, function: Arc<dyn Function>) -> Result<(), RootError> {
        if address.device > 31 || address.function > 7 {
            return Err(RootError::NoSuchAddress { address });
        }
        let mut functions = write_lock(&self.functions);
        if functions.contains_key(&address) {
            return Err(RootError::Taken { address });
        }
        {
            let mut config = lock(function.config());
            let mut windows = lock(&self.windows);
            let bars: Vec<Bar> = config.bars().collect();
            for bar in bars {
                let start = windows.allocate(&bar).ok_or(RootError::WindowFull {
                    address,
                    index: bar.index,
                    size: bar.size,
                })?;
                config.set_bar_address(bar.index, start);
            }
        }
        functions.insert(address, function);
        let others = (1..8).map(|function| Address {
            function,
            ..address
        });
        if others
            .into_iter()
            .any(|other| functions.contains_key(&other))
            && let Some(first) = functions.get(&Address::device(address.device))
        {
            lock(first.config()).set_multi_function();
        }
        Ok(())
    }

    /// Puts ECAM on the MMIO bus and configuration mechanism 1 on the port bus.
    ///
    /// # Errors
    /// [`RangeError`] when another device has the addresses.
    pub fn attach(
        self: &Arc<Self>,
        ports: &Bus,
        power: Arc<dyn PowerEvents>,
    ) -> Result<(), RangeError> {
        let ecam = Arc::new(Ecam(Arc::clone(self)));
        self.mmio
            .insert(layout::PCI_ECAM_START, layout::PCI_ECAM_SIZE, ecam)?;
        let config = Arc::new(ConfigPorts {
            root: Arc::clone(self),
            power,
        });
        ports.insert(u64::from(layout::PCI_CONFIG_PORT), 8, config)
    }

    /// The functions in the order of their addresses.
    pub fn functions(&self) -> Vec<(Address, Arc<dyn Function>)> {
        let functions = read_lock(&self.functions);
        functions.iter().map(|(a, f)| (*a, Arc::clone(f))).collect()
    }

    fn find(&self, bus: u8, device_function: u8) -> Option<(Address, Arc<dyn Function>)> {
        let address = Address {
            device: device_function >> 3,
            function: device_function & 7,
        };
        let functions = read_lock(&self.functions);
        let function = functions.get(&address).filter(|_| bus == 0)?;
        Some((address, Arc::clone(function)))
    }

    fn config_read(&self, bus: u8, device_function: u8, offset: u16, data: &mut [u8]) {
        match self.find(bus, device_function) {
            Some((_, function)) => function.config_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, bus: u8, device_function: u8, offset: u16, data: &[u8]) {
        if let Some((address, function)) = self.find(bus, device_function) {
            let mut routes = lock(&self.routes);
            function.config_write(offset, data);
            self.route(&mut routes, address, &function);
        }
    }

    /// Makes the routes of one function what its configuration space says.
    fn route(
        &self,
        routes: &mut BTreeMap<(Address, u8), Route>,
        address: Address,
        function: &Arc<dyn Function>,
    ) {
        let wanted: Vec<(Bar, Option<u64>)> = {
            let config = lock(function.config());
            let place = |bar: Bar| (bar, config.bar_address(bar.index));
            config.bars().map(place).collect()
        };
        let wanted = wanted.into_iter().map(|(bar, start)| {
            let valid = |start: &u64| window::contains(bar.kind, *start, bar.size);
            (bar, start.filter(valid))
        });
        let moved: Vec<(Bar, Option<u64>)> = wanted
            .filter(|(bar, start)| {
                let now = routes.get(&(address, bar.index)).map(|route| route.start);
                now != *start
            })
            .collect();
        for (bar, _) in &moved {
            if let Some(route) = routes.remove(&(address, bar.index)) {
                self.unmap(&route);
            }
        }
        for (bar, start) in moved {
            let Some(start) = start else { continue };
            if let Some(route) = self.map(function, bar, start) {
                routes.insert((address, bar.index), route);
            }
        }
    }

    fn map(&self, function: &Arc<dyn Function>, bar: Bar, start: u64) -> Option<Route> {
        let device = Arc::new(BarDevice {
            function: Arc::clone(function),
            bar: bar.index,
        });
        if let Err(error) = self.mmio.insert(start, bar.size, device) {
            // The guest put one BAR over another; it hears ones from the second.
            tracing::debug!(%error, function = function.name(), bar = bar.index, "BAR not mapped");
            return None;
        }
        let all = function.doorbells().into_iter();
        let doorbells: Vec<Doorbell> = all
            .filter(|doorbell| doorbell.bar == bar.index && doorbell.offset < bar.size)
            .map(|doorbell| Doorbell {
                address: start + doorbell.offset,
                event: doorbell.event,
            })
            .collect();
        doorbells.iter().for_each(|d| self.doorbells.add(d));
        Some(Route { start, doorbells })
    }

    fn unmap(&self, route: &Route) {
        let Route { start, doorbells } = route;
        doorbells.iter().for_each(|d| self.doorbells.remove(d));
        self.mmio.remove(*start);
    }
}

impl Component for RootComplex {
    fn name(&self) -> String {
        "pci".into()
    }

    fn pause(&self, _reach: Reach) {}

    /// Routes follow the functions, whose states may have been restored after this one's.
    fn resume(&self) {
        let functions = self.functions();
        let mut routes = lock(&self.routes);
        for (address, function) in functions {
            self.route(&mut routes, address, &function);
        }
    }

    fn save(&self) -> SavedState {
        let Self {
            functions: _,
            routes: _,
            windows: _,
            mmio: _,
            doorbells: _,
            config_address,
        } = self;
        let state = RootState {
            config_address: config_address.load(Ordering::Relaxed),
        };
        SavedState::encode(&self.name(), KIND, VERSION, &state)
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        let RootState { config_address } = state.decode(KIND, VERSION)?;
        if config_address & !CONFIG_ADDRESS_MASK != 0 {
            return Err(state.invalid("configuration address with reserved bits set"));
        }
        self.config_address.store(config_address, Ordering::Relaxed);
        Ok(())
    }
}

/// A BAR on the MMIO bus.
#[derive(Debug)]
struct BarDevice {
    function: Arc<dyn Function>,
    bar: u8,
}

impl BusDevice for BarDevice {
    fn label(&self) -> String {
        self.function.name()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.bar, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(self.bar, offset, data);
    }
}

/// Memory-mapped configuration space (PCI Express Base 4.0, 7.2.2): bits 27:20 of the offset
/// are the bus, 19:12 device and function, 11:0 the register.
#[derive(Debug)]
pub struct Ecam(Arc<RootComplex>);

fn ecam_target(offset: u64) -> (u8, u8, u16) {
    let register = offset % FUNCTION_SIZE;
    ((offset >> 20) as u8, (offset >> 12) as u8, register as u16)
}

impl BusDevice for Ecam {
    fn label(&self) -> String {
        "pci configuration".into()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let (bus, device_function, register) = ecam_target(offset);
        self.0.config_read(bus, device_function, register, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (bus, device_function, register) = ecam_target(offset);
        self.0.config_write(bus, device_function, register, data);
    }
}

/// Configuration mechanism 1 (PCI 3.0, 3.2.2.3.2): an address port and a data port.
#[derive(Debug)]
pub struct ConfigPorts {
    root: Arc<RootComplex>,
    power: Arc<dyn PowerEvents>,
}

impl ConfigPorts {
    fn target(&self, offset: u64) -> Option<(u8, u8, u16)> {
        let address = self.root.config_address.load(Ordering::Relaxed);
        let within = offset.checked_sub(4)?;
        let register = (address & 0xfc) as u16 + within as u16;
        let target = ((address >> 16) as u8, (address >> 8) as u8, register);
        (address & CONFIG_ENABLE != 0).then_some(target)
    }
}

impl BusDevice for ConfigPorts {
    fn label(&self) -> String {
        "pci configuration".into()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, 4) = (offset, data.len()) {
            let address = self.root.config_address.load(Ordering::Relaxed);
            data.copy_from_slice(&address.to_le_bytes());
        } else if let (RESET_CONTROL, 1) = (offset, data.len()) {
            data.fill(0);
        } else if let Some((bus, device_function, register)) = self.target(offset) {
            self.root.config_read(bus, device_function, register, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            let address = u32::from_le_bytes(address) & CONFIG_ADDRESS_MASK;
            self.root.config_address.store(address, Ordering::Relaxed);
        } else if let (RESET_CONTROL, [value]) = (offset, data) {
            if value & RESET_CPU != 0 {
                self.power.reset();
            }
        } else if let Some((bus, device_function, register)) = self.target(offset) {
            self.root.config_write(bus, device_function, register, data);
        }
    }
}
