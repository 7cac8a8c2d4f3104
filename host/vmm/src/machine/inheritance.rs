//! What machines in two processes of one host pass from one to the other: descriptors, by name.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use dunlin_devices::debug_console::DebugConsole;
use dunlin_migration::handover::{Descriptors, RAM};
use dunlin_storage::ImageLock;
use dunlin_vswitch::PortSocket;

use super::{AssemblyError, Machine};

/// Name of the debug console's output.
const DEBUG_CONSOLE: &str = "debug-console";

fn port_name(index: usize) -> String {
    format!("net{index}")
}

fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// Where a machine's descriptors come from while it is built.
pub(crate) enum Inheritance<'a> {
    /// It opens its own.
    Nothing,
    /// From another process's machine of the same configuration.
    From(&'a mut Descriptors),
}

impl Inheritance<'_> {
    pub(super) fn ram(&mut self) -> Result<Option<OwnedFd>, AssemblyError> {
        self.take(RAM.to_owned())
    }

    pub(super) fn port(&mut self, index: usize) -> Result<Option<OwnedFd>, AssemblyError> {
        self.take(port_name(index))
    }

    pub(super) fn disk(&mut self, index: usize) -> Result<Option<OwnedFd>, AssemblyError> {
        self.take(disk_name(index))
    }

    pub(super) fn debug_console(&mut self) -> Result<Option<OwnedFd>, AssemblyError> {
        self.take(DEBUG_CONSOLE.to_owned())
    }

    /// `None`: open your own.
    fn take(&mut self, name: String) -> Result<Option<OwnedFd>, AssemblyError> {
        match self {
            Self::Nothing => Ok(None),
            Self::From(descriptors) => match descriptors.take(&name) {
                Some(descriptor) => Ok(Some(descriptor)),
                None => Err(AssemblyError::NotInherited { name }),
            },
        }
    }
}

/// What of a machine can be passed on, RAM and the images of disks excepted.
#[derive(Debug, Default)]
pub(super) struct Belongings {
    pub(super) ports: Vec<PortSocket>,
    pub(super) debug_console: Option<Arc<DebugConsole>>,
}

impl Machine {
    /// Copies of the descriptors that a machine in another process is built around, RAM excepted.
    pub(crate) fn descriptors(&self) -> io::Result<Descriptors> {
        let mut all = Descriptors::new();
        for (index, port) in self.belongings.ports.iter().enumerate() {
            all.add(port_name(index), port.descriptor().try_clone_to_owned()?);
        }
        for (index, lock) in self.locks.iter().enumerate() {
            all.add(disk_name(index), lock.descriptor().try_clone_to_owned()?);
        }
        if let Some(console) = &self.belongings.debug_console {
            all.add(DEBUG_CONSOLE, console.descriptor().try_clone_to_owned()?);
        }
        Ok(all)
    }

    /// Another process goes on with all of it: nothing of it is removed with this machine.
    pub(crate) fn give_away(&self) {
        self.belongings.ports.iter().for_each(PortSocket::give_away);
        self.locks.iter().for_each(ImageLock::lend);
    }

    /// The guest runs in this process: what was another's is this machine's.
    pub(crate) fn keep(&self) {
        self.belongings.ports.iter().for_each(PortSocket::take_back);
    }
}
