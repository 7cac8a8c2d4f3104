//! Builds a machine from a configuration. It is paused, and its memory is untouched.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dunlin_api::{DebugConsoleConfig, DiskConfig, EngineChoice, MacText, NetConfig, VmConfig};
use dunlin_devices::bus::{Bus, RangeError};
use dunlin_devices::component::Component;
use dunlin_devices::debug_console::{DebugConsole, DebugConsoleError, DebugOutput};
use dunlin_devices::debug_exit::DebugExit;
use dunlin_devices::ioapic::IoApic;
use dunlin_devices::legacy::Fork;
use dunlin_devices::legacy::pic::Pic;
use dunlin_devices::legacy::pit::Pit;
use dunlin_devices::pci::{Address, DoorbellHost, Function, RootComplex, RootError};
use dunlin_devices::power::PowerDevice;
use dunlin_devices::serial::Serial;
use dunlin_devices::virtio::VirtioDevice;
use dunlin_devices::virtio::block::Block;
use dunlin_devices::virtio::console::Console;
use dunlin_devices::virtio::entropy::Entropy;
use dunlin_devices::virtio::net::Net;
use dunlin_devices::virtio::pci::{VirtioPci, VirtioPciError};
use dunlin_guest::{Doorbell, InterruptLine, Memory, MemoryError, MsiSink, layout};
use dunlin_hypervisor::{EngineError, VcpuId, Vm};
use dunlin_storage::{DiskError, DiskMode, ImageLock, RawDisk};
use dunlin_vswitch::{MacAddress, PortError, UnixPort};
use dunlin_x86::cpuid::Baseline;

use super::events::MachineEvents;
use super::inheritance::{Belongings, Inheritance};
use super::vcpu::{Buses, Pacer, VcpuError, VcpuThread};
use super::{Machine, engine};
use crate::console::{ActivePort, ConsoleHub, ParavirtualOutput, Ports};

/// What a machine is built from.
#[derive(Debug, Clone)]
pub(crate) struct Blueprint {
    /// The VM.
    pub(crate) config: VmConfig,
    /// Where its network ports make their sockets.
    pub(crate) directory: PathBuf,
    /// Its console.
    pub(crate) console: Arc<ConsoleHub>,
    /// Who hears of it.
    pub(crate) events: MachineEvents,
}

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// No such CPU baseline.
    #[error("baseline \"{name}\" is not known here; known are {known}")]
    Baseline {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// No engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// No processor.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Two devices at one address.
    #[error("failed to place a device")]
    Range(#[from] RangeError),
    /// No room on PCI.
    #[error("failed to place a PCI device")]
    Pci(#[from] RootError),
    /// A virtio device could not be made.
    #[error(transparent)]
    Virtio(#[from] VirtioPciError),
    /// The host gave no descriptor for the console.
    #[error("failed to make the virtio console")]
    Console(#[source] std::io::Error),
    /// The debug console's bytes cannot go where they should.
    #[error(transparent)]
    DebugConsole(#[from] DebugConsoleError),
    /// The host gave no thread for the legacy timer.
    #[error("failed to start the legacy timer")]
    Timer(#[source] std::io::Error),
    /// A disk cannot be opened.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A network port cannot be opened.
    #[error("failed to connect network device {index} of VM \"{vm}\"")]
    Net {
        /// Its index.
        index: usize,
        /// The VM.
        vm: dunlin_api::VmName,
        /// Why.
        #[source]
        source: PortError,
    },
    /// The process that hands the guest over did not send something.
    #[error("the other process handed no \"{name}\" over")]
    NotInherited {
        /// What is missing.
        name: String,
    },
}

/// Builds a machine that opens what it needs.
pub(crate) fn assemble(blueprint: &Blueprint) -> Result<Machine, AssemblyError> {
    assemble_around(blueprint, Inheritance::Nothing)
}

/// Builds a machine around what another process's machine has.
pub(crate) fn assemble_around(
    blueprint: &Blueprint,
    mut inheritance: Inheritance<'_>,
) -> Result<Machine, AssemblyError> {
    let baseline = baseline(blueprint.config.baseline.as_deref())?;
    let config = &VmConfig {
        // By name from now on, wherever the guest goes and whatever is the default there.
        baseline: Some(baseline.name().to_owned()),
        ..blueprint.config.clone()
    };
    let memory = match inheritance.ram()? {
        Some(ram) => Memory::from_file(ram.into(), config.memory_bytes)?,
        None => Memory::new(config.memory_bytes)?,
    };
    let choice = match (config.engine, config.legacy) {
        // The only one that has legacy controllers.
        (EngineChoice::Auto, true) => EngineChoice::Soft,
        (choice, _) => choice,
    };
    let chosen = engine::choose(choice, &memory, baseline, config.cpus, config.verify)?;
    let vm = chosen.vm;
    let chipset = Chipset::build(&vm, blueprint)?;
    let mut builder = PciBuilder {
        root: &chipset.root,
        memory: &memory,
        sink: vm.msi_sink(),
        next_device: 1,
        functions: Vec::new(),
    };
    let mut locks = Vec::new();
    let mut belongings = Belongings::default();
    builder.add(Box::new(Entropy::new()))?;
    for (index, (net, mac)) in config.nets.iter().zip(config.macs()).enumerate() {
        let port = open_port(blueprint, (index, net), inheritance.port(index)?)?;
        belongings.ports.push(port.socket());
        builder.add(Box::new(Net::new(Box::new(port), mac_address(mac))))?;
    }
    for (index, disk) in config.disks.iter().enumerate() {
        let (disk, lock) = open_disk(disk, inheritance.disk(index)?)?;
        locks.push(lock);
        builder.add(Box::new(Block::new(
            Box::new(disk),
            &format!("disk{index}"),
        )))?;
    }
    let output = Arc::new(ParavirtualOutput(Arc::clone(&blueprint.console)));
    let console = Console::new(output).map_err(AssemblyError::Console)?;
    let paravirtual = console.input();
    builder.add(Box::new(console))?;
    let functions = builder.functions;
    let vcpus = start_vcpus(&vm, &chipset.buses, blueprint)?;
    let ports = Ports {
        serial: Arc::clone(&chipset.serial),
        paravirtual,
    };
    let active = ActivePort::of_command_line(&config.command_line);
    blueprint.console.connect(ports, active);
    let mut components = functions;
    components.extend(chipset.components());
    if let Some(exit) = config.debug_exit {
        let device = DebugExit::new(Arc::new(blueprint.events.clone()));
        device.attach(&chipset.buses.ports, exit.port, exit.count)?;
    }
    if let Some(place) = &config.debug_console {
        let output = debug_output(place);
        let device = match inheritance.debug_console()? {
            Some(descriptor) => DebugConsole::adopt(&output, descriptor)?,
            None => DebugConsole::open(&output)?,
        };
        device.attach(&chipset.buses.ports)?;
        belongings.debug_console = Some(Arc::clone(&device));
        components.push(device);
    }
    Ok(Machine {
        config: config.clone(),
        engine_reason: chosen.reason,
        vcpus,
        memory,
        vm,
        components,
        locks,
        belongings,
        buses: chipset.buses,
    })
}

fn baseline(name: Option<&str>) -> Result<&'static Baseline, AssemblyError> {
    let Some(name) = name else {
        return Ok(Baseline::unnamed());
    };
    Baseline::named(name).ok_or_else(|| AssemblyError::Baseline {
        name: name.to_owned(),
        known: Baseline::all().map(Baseline::name).join(", "),
    })
}

/// The devices that every machine has.
struct Chipset {
    buses: Buses,
    serial: Arc<Serial>,
    power: Arc<PowerDevice>,
    root: Arc<RootComplex>,
    legacy: Option<Legacy>,
}

/// What the first PCs had.
struct Legacy {
    pic: Arc<Pic>,
    pit: Arc<Pit>,
}

impl Legacy {
    fn build(vm: &Arc<dyn Vm>, ioapic: &Arc<IoApic>, ports: &Bus) -> Result<Self, AssemblyError> {
        let pic = Pic::new();
        pic.connect(vm.connect_controller(pic.clone())?);
        pic.attach(ports)?;
        let timer = Fork([ioapic.pin(layout::TIMER_PIN), pic.line(0)]);
        let pit = Pit::new(Arc::new(timer)).map_err(AssemblyError::Timer)?;
        pit.attach(ports)?;
        Ok(Self { pic, pit })
    }
}

impl Chipset {
    fn build(vm: &Arc<dyn Vm>, blueprint: &Blueprint) -> Result<Self, AssemblyError> {
        let (ports, mmio) = (Bus::new(), Bus::new());
        let ioapic = IoApic::new(vm.msi_sink());
        mmio.insert(layout::IOAPIC_START, layout::IOAPIC_SIZE, ioapic.clone())?;
        let legacy = match blueprint.config.legacy {
            true => Some(Legacy::build(vm, &ioapic, &ports)?),
            false => None,
        };
        let line = |number| -> Arc<dyn InterruptLine> {
            match &legacy {
                Some(legacy) => Arc::new(Fork([ioapic.pin(number), legacy.pic.line(number)])),
                None => ioapic.pin(number),
            }
        };
        let serial = Serial::new(line(layout::SERIAL_IRQ), blueprint.console.clone());
        serial.attach(&ports)?;
        let events = Arc::new(blueprint.events.clone());
        let power = PowerDevice::new(events.clone(), line(layout::SCI_IRQ));
        power.attach(&ports)?;
        let root = RootComplex::new(mmio.clone(), Arc::new(EngineDoorbells(Arc::clone(vm))));
        root.attach(&ports, events)?;
        let buses = Buses {
            ports,
            mmio,
            ioapic,
        };
        Ok(Self {
            buses,
            serial,
            power,
            root,
            legacy,
        })
    }

    /// In the order in which they go on: the root complex maps what the others answer at. The legacy
    /// controllers are restored behind what drives their lines.
    fn components(&self) -> Vec<Arc<dyn Component>> {
        let mut all: Vec<Arc<dyn Component>> = vec![
            self.root.clone(),
            self.buses.ioapic.clone(),
            self.serial.clone(),
            self.power.clone(),
        ];
        if let Some(Legacy { pic, pit }) = &self.legacy {
            all.push(pit.clone());
            all.push(pic.clone());
        }
        all
    }
}

/// Puts virtio devices on bus 0, in the order of their addition.
struct PciBuilder<'a> {
    root: &'a RootComplex,
    memory: &'a Memory,
    sink: Arc<dyn MsiSink>,
    next_device: u8,
    functions: Vec<Arc<dyn Component>>,
}

impl PciBuilder<'_> {
    fn add(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), AssemblyError> {
        let address = Address::device(self.next_device);
        let sink = Arc::clone(&self.sink);
        let function = VirtioPci::new(address, device, self.memory.clone(), sink)?;
        self.root
            .add(address, function.clone() as Arc<dyn Function>)?;
        self.next_device += 1;
        self.functions.push(function);
        Ok(())
    }
}

fn mac_address(mac: MacText) -> MacAddress {
    MacAddress(mac.0)
}

fn open_port(
    blueprint: &Blueprint,
    (index, net): (usize, &NetConfig),
    inherited: Option<OwnedFd>,
) -> Result<UnixPort, AssemblyError> {
    let (directory, switch) = (&blueprint.directory, Path::new(&net.switch));
    let port = match inherited {
        Some(descriptor) => UnixPort::adopt(descriptor.into(), directory, switch),
        None => UnixPort::open(&format!("net{index}"), directory, switch),
    };
    port.map_err(|source| AssemblyError::Net {
        index,
        vm: blueprint.config.name.clone(),
        source,
    })
}

fn debug_output(place: &DebugConsoleConfig) -> DebugOutput {
    match place {
        DebugConsoleConfig::Unix(path) => DebugOutput::Socket(path.clone()),
        DebugConsoleConfig::File(path) => DebugOutput::File(path.clone()),
    }
}

fn open_disk(
    disk: &DiskConfig,
    inherited: Option<OwnedFd>,
) -> Result<(RawDisk, ImageLock), AssemblyError> {
    let mode = if disk.read_only {
        DiskMode::ReadOnly
    } else {
        DiskMode::ReadWrite
    };
    let disk = match inherited {
        Some(image) => RawDisk::adopt(image.into(), &disk.path, mode)?,
        None => RawDisk::open(&disk.path, mode)?,
    };
    let lock = disk.lock().clone();
    Ok((disk, lock))
}

fn start_vcpus(
    vm: &Arc<dyn Vm>,
    buses: &Buses,
    blueprint: &Blueprint,
) -> Result<Vec<VcpuThread>, AssemblyError> {
    let pacer = Arc::<Pacer>::default();
    (0..blueprint.config.cpus)
        .map(|index| {
            let id = VcpuId(index);
            let vcpu = vm.create_vcpu(id)?;
            let thread = VcpuThread::start(
                id,
                vcpu,
                buses.clone(),
                blueprint.events.clone(),
                pacer.clone(),
            )?;
            Ok(thread)
        })
        .collect()
}

/// Tells the engine where doorbells lie. An engine that refuses costs speed only: the write then
/// reaches the device as any other.
#[derive(Debug)]
struct EngineDoorbells(Arc<dyn Vm>);

impl DoorbellHost for EngineDoorbells {
    fn add(&self, doorbell: &Doorbell) {
        if let Err(error) = self.0.add_doorbell(doorbell) {
            tracing::warn!(address = doorbell.address, %error, "doorbell goes the long way");
        }
    }

    fn remove(&self, doorbell: &Doorbell) {
        if let Err(error) = self.0.remove_doorbell(doorbell) {
            tracing::warn!(address = doorbell.address, %error, "doorbell stays");
        }
    }
}
