//! The process `dunlin switch`: one thread that waits for frames, connections, requests and
//! timers, and does what they ask for in batches.
//!
//! ```text
//! descriptor ready ─▶ batch received ─▶ forwarding core ─▶ queues of egress ports ─▶ sent in batches
//!                                            ▲                    │
//!                                            └──── gateway ◀──────┘
//! ```

mod control;
mod ports;
mod tap;
mod tunnel;
mod unix;

#[cfg(test)]
mod tests;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use control::ControlServer;
pub use control::{ControlClient, ControlError, ControlRequest};
use ports::Ports;

use crate::forward::Switch;
use crate::poll::{Interest, Poller, Registrar};
use crate::{SwitchConfig, SwitchError};

/// How often silent stations are looked for.
const SWEEP: Duration = Duration::from_secs(10);

/// Owners of tokens; ports come after them.
const STOP: u32 = 0;
const CONTROL: u32 = 1;
const FIRST_PORT: u32 = 2;

/// A switch with its ports.
#[derive(Debug)]
pub struct SwitchProcess {
    config: SwitchConfig,
    poller: Arc<Poller>,
    control: Option<ControlServer>,
    ports: Ports,
    started: Instant,
    is_shutting_down: bool,
}

impl SwitchProcess {
    /// Opens all ports and the control socket. Sockets exist when it returns.
    ///
    /// # Errors
    /// [`SwitchError`] naming the port or path that cannot be used.
    pub fn new(config: SwitchConfig) -> Result<Self, SwitchError> {
        let poller =
            Arc::new(Poller::new().map_err(SwitchError::io("start switch", &config.name))?);
        let mut ports = Ports::new(
            Arc::clone(&poller),
            Switch::new(config.learning),
            FIRST_PORT,
        );
        for port in &config.ports {
            ports.add(port.clone())?;
        }
        let control = match &config.control {
            Some(path) => Some(ControlServer::new(path, Registrar::new(&poller, CONTROL))?),
            None => None,
        };
        let started = Instant::now();
        Ok(SwitchProcess {
            config,
            poller,
            control,
            ports,
            started,
            is_shutting_down: false,
        })
    }

    /// Runs until `stop` (an event descriptor) is readable or a `shutdown` request comes; the
    /// sockets' files are removed when the process value is dropped.
    ///
    /// # Errors
    /// [`SwitchError::Io`] when the host refuses to wait for events at all.
    pub fn run(&mut self, stop: &impl AsRawFd) -> Result<(), SwitchError> {
        let failed = |action| SwitchError::io(action, self.config.name.clone());
        let watched = Registrar::new(&self.poller, STOP).add(stop, 0, Interest::Read);
        watched.map_err(failed("watch the stop event of"))?;
        let result = self.serve();
        Registrar::new(&self.poller, STOP).remove(stop);
        result.map_err(SwitchError::io("wait for events of", &self.config.name))
    }

    fn serve(&mut self) -> std::io::Result<()> {
        let mut ready = Vec::new();
        let mut swept = self.started.elapsed();
        while !self.is_shutting_down {
            let now = self.started.elapsed();
            let timeout = self.ports.timeout(now).unwrap_or(SWEEP).min(SWEEP);
            self.poller.wait(&mut ready, Some(timeout))?;
            let now = self.started.elapsed();
            for event in &ready {
                let (owner, number) = Registrar::split(event.token);
                match owner {
                    STOP => return Ok(()),
                    CONTROL => self.control_ready(number, *event, now),
                    port => self.ports.ready(port, number, *event, now),
                }
                self.ports.flush(now);
            }
            self.ports.tick(now);
            if now.saturating_sub(swept) >= SWEEP {
                swept = now;
                self.ports.switch.expire(now);
            }
        }
        Ok(())
    }

    fn control_ready(&mut self, number: u32, event: crate::poll::Ready, now: Duration) {
        // Taken out while its requests work on the rest.
        let Some(mut control) = self.control.take() else {
            return;
        };
        control.ready(number, event, |request| self.handle(request, now));
        self.control = Some(control);
    }

    fn handle(&mut self, request: ControlRequest, now: Duration) -> Result<Value, SwitchError> {
        tracing::debug!(?request, "control request");
        match request {
            ControlRequest::Counters => Ok(self.ports.counters()),
            ControlRequest::Fdb => Ok(self.ports.stations(now)),
            ControlRequest::Config => Ok(json!(self.current_config())),
            ControlRequest::AddPort { port } => self.ports.add(port).map(|()| Value::Null),
            ControlRequest::RemovePort { name } => self.ports.remove(&name).map(|()| Value::Null),
            ControlRequest::AddForward { gateway, forward } => {
                let listen = self
                    .ports
                    .gateway(gateway.as_deref())?
                    .add_forward(forward)?;
                Ok(json!({ "listen": listen }))
            }
            ControlRequest::RemoveForward { gateway, listen } => {
                self.ports
                    .gateway(gateway.as_deref())?
                    .remove_forward(listen)?;
                Ok(Value::Null)
            }
            ControlRequest::Shutdown => {
                self.is_shutting_down = true;
                Ok(Value::Null)
            }
        }
    }

    /// The configuration with the ports and forwards that were added and without those removed.
    #[must_use]
    pub fn current_config(&self) -> SwitchConfig {
        let ports = self.ports.entries.values().map(|entry| {
            let mut config = entry.config.clone();
            if let (ports::End::Gateway(gateway), crate::PortKind::Gateway(section)) =
                (&entry.end, &mut config.kind)
            {
                section.forwards = gateway.forwards();
            }
            config
        });
        SwitchConfig {
            ports: ports.collect(),
            ..self.config.clone()
        }
    }
}
