//! Hosts: a switch process and a place for VM processes each, on loopback addresses of their own.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::process::{self, Guard};

/// The guest's address behind every host's switch.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The guest's Ethernet address.
pub const GUEST_MAC: &str = "02:00:00:00:00:15";
/// Address of the first host.
pub const FIRST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Address of the second host.
pub const SECOND: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
const STARTED: Duration = Duration::from_secs(20);

/// A TCP port of the first host that leads to a guest.
#[derive(Debug, Clone, Copy)]
pub struct Forward {
    /// Port on the first host's address.
    pub outside: u16,
    /// Address and port of the guest.
    pub to: SocketAddrV4,
}

/// Where everything of a testbed lies: sockets, logs, reports.
#[derive(Debug)]
pub struct Testbed {
    binary: PathBuf,
    folder: PathBuf,
}

/// What a VM is made of.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Its name on the host.
    pub name: String,
    /// Kernel image, bzImage or ELF.
    pub kernel: PathBuf,
    /// Initramfs.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// RAM, as the command line takes it.
    pub memory: String,
    /// Processors.
    pub cpus: u32,
    /// `auto`, `soft` or `kvm`.
    pub engine: String,
    /// Raw images.
    pub disks: Vec<PathBuf>,
}

/// One host.
#[derive(Debug)]
pub struct Host {
    binary: PathBuf,
    folder: PathBuf,
    address: Ipv4Addr,
    switch: Option<Guard>,
    commands: Vec<Guard>,
}

impl Testbed {
    /// A testbed below `folder`, which is emptied, with the given `dunlin`.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn new(binary: &Path, folder: &Path) -> anyhow::Result<Self> {
        if folder.exists() {
            fs::remove_dir_all(folder)
                .with_context(|| format!("failed to empty {}", folder.display()))?;
        }
        fs::create_dir_all(folder)?;
        Ok(Self {
            binary: binary.to_owned(),
            folder: folder.to_owned(),
        })
    }

    /// A host without a switch.
    ///
    /// # Errors
    /// When its folder cannot be made.
    pub fn host(&self, name: &str, address: Ipv4Addr) -> anyhow::Result<Host> {
        let folder = self.folder.join(name);
        fs::create_dir_all(folder.join("run"))?;
        Ok(Host {
            binary: self.binary.clone(),
            folder,
            address,
            switch: None,
            commands: Vec::new(),
        })
    }

    /// Two hosts whose switches are joined by a tunnel. The first one's gateway answers DHCP and
    /// leads `forwards`; its switch gets `ports` beside the usual ones.
    ///
    /// # Errors
    /// When a switch does not start.
    pub fn two_hosts(
        &self,
        forwards: &[Forward],
        mut ports: Vec<Value>,
    ) -> anyhow::Result<(Host, Host)> {
        let mut first = self.host("a", FIRST)?;
        let mut second = self.host("b", SECOND)?;
        let tunnel_port = free_udp_port(&[first.address, second.address])?;
        let forwards: Vec<_> = forwards
            .iter()
            .map(|forward| {
                json!({
                    "listen": SocketAddrV4::new(first.address, forward.outside),
                    "to": forward.to,
                })
            })
            .collect();
        ports.push(json!({"name": "gateway", "kind": {"gateway": {
            "mac": "02:00:00:00:00:01", "address": GATEWAY, "prefix": 24,
            "dhcp": {"first": GUEST, "last": "10.0.2.99", "reservations": {GUEST_MAC: GUEST}},
            "forwards": forwards,
        }}}));
        first.start_switch(second.address, tunnel_port, ports)?;
        second.start_switch(first.address, tunnel_port, Vec::new())?;
        Ok((first, second))
    }
}

impl Host {
    /// Its loopback address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Where VMs reach the switch.
    pub fn switch_socket(&self) -> PathBuf {
        self.folder.join("run/vm.switch")
    }

    fn start_switch(
        &mut self,
        other: Ipv4Addr,
        tunnel_port: u16,
        mut ports: Vec<Value>,
    ) -> anyhow::Result<()> {
        ports.push(json!({"name": "vm", "kind": {"unix": {"path": self.switch_socket()}}}));
        ports.push(json!({"name": "uplink", "kind": {"tunnel": {
            "local": format!("{}:{tunnel_port}", self.address),
            "remotes": [format!("{other}:{tunnel_port}")],
            "vni": 7,
        }}}));
        let config = self.folder.join("switch.json");
        let text = json!({
            "name": self.folder.file_name().map(|name| name.to_string_lossy()),
            "control": self.folder.join("run/switch.control"),
            "ports": ports,
        });
        fs::write(&config, serde_json::to_vec_pretty(&text)?)?;
        let mut command = self.command(&["switch"]);
        command.arg("--config").arg(&config);
        self.switch = Some(self.spawn(&mut command, "switch")?);
        let socket = self.switch_socket();
        let log = self.log("switch");
        let switch = self.switch.as_mut();
        wait_for(switch, "the switch", &log, || Ok(socket.exists()))
    }

    /// `dunlin` with this host's runtime folder.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(arguments)
            .env("DUNLIN_RUNTIME_DIR", self.folder.join("run"))
            .stdin(Stdio::null());
        command
    }

    /// Runs a `dunlin` command with `--json` and returns what it printed.
    ///
    /// # Errors
    /// When it fails; its error text is in the message.
    pub fn query(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = process::output(self.command(arguments).arg("--json"))?;
        let last = text.lines().last().unwrap_or_default();
        serde_json::from_str(last)
            .with_context(|| format!("dunlin {} printed no JSON: {text}", arguments.join(" ")))
    }

    /// Starts a VM in the foreground of a child process; its serial console goes to a log.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn run(&mut self, vm: &VmSpec) -> anyhow::Result<()> {
        let mut command = self.command(&["run", "--name", &vm.name]);
        command
            .args(["--memory", &vm.memory, "--engine", &vm.engine])
            .args(["--cpus", &vm.cpus.to_string()])
            .args(["--cmdline", &vm.cmdline])
            .arg("--kernel")
            .arg(&vm.kernel);
        if let Some(initramfs) = &vm.initramfs {
            command.arg("--initrd").arg(initramfs);
        }
        for disk in &vm.disks {
            command.arg("--disk").arg(disk);
        }
        self.bring_up(command, &vm.name)
    }

    /// Starts a VM from a saved file, as [`Host::run`] does from a kernel.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn restore(&mut self, name: &str, file: &Path) -> anyhow::Result<()> {
        let mut command = self.command(&["restore", "--name", name]);
        command.arg(file);
        self.bring_up(command, name)
    }

    /// Runs a command that starts the VM `name` in the foreground, and waits until the VM answers.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn bring_up(&mut self, mut command: Command, name: &str) -> anyhow::Result<()> {
        if self.switch.is_some() {
            command.arg("--net").arg(self.net());
        }
        let mut guard = self.spawn(&mut command, name)?;
        let log = self.log(name);
        wait_for(Some(&mut guard), "the VM", &log, || {
            Ok(self.query(&["inspect", name]).is_ok())
        })?;
        self.commands.push(guard);
        Ok(())
    }

    /// Makes a place for a VM to arrive in; returns where it listens.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn receive(&mut self, name: &str) -> anyhow::Result<String> {
        self.receive_with(name, &[])
    }

    /// The same with more arguments.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn receive_with(&mut self, name: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let port = free_tcp_port(self.address)?;
        let target = format!("tcp://{}:{port}", self.address);
        let mut command = self.command(&["receive", "--once", "--name", name]);
        command.args(["--listen", &target]).args(arguments);
        if self.switch.is_some() {
            command.arg("--net").arg(self.net());
        }
        let mut guard = self.spawn(&mut command, &format!("{name}-incoming"))?;
        let log = self.log(&format!("{name}-incoming"));
        wait_for(Some(&mut guard), "the place for the VM", &log, || {
            Ok(listens(SocketAddrV4::new(self.address, port)))
        })?;
        self.commands.push(guard);
        Ok(target)
    }

    /// The commands that started VMs here or wait for some, ended ones included.
    pub fn commands(&mut self) -> &mut Vec<Guard> {
        &mut self.commands
    }

    /// Kills every VM process and every waiting command of this host, as a power cut does. The
    /// switch goes on: it stands for the network.
    pub fn kill_machines(&mut self) {
        for command in &mut self.commands {
            // An ended child cannot be killed, and need not be.
            let _ = command.child().kill();
        }
        self.commands.clear();
        for pid in self.machine_pids() {
            // SAFETY: sending a signal touches no memory; the process has this testbed's own
            // runtime folder in its environment.
            #[expect(unsafe_code, reason = "std cannot signal a process that is no child")]
            unsafe {
                libc::kill(pid, libc::SIGKILL);
            }
        }
    }

    /// Process ids of the VMs that run or are about to run here: every `dunlin` with this host's
    /// runtime folder in its environment, the switch excepted.
    pub fn machine_pids(&self) -> Vec<libc::pid_t> {
        let wanted = format!("DUNLIN_RUNTIME_DIR={}", self.folder.join("run").display());
        let switch = self.switch.as_ref().map(Guard::id);
        let Ok(processes) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        processes
            .filter_map(|process| {
                let process = process.ok()?.path();
                let pid: u32 = process.file_name()?.to_str()?.parse().ok()?;
                let environment = fs::read(process.join("environ")).ok()?;
                let ours = environment
                    .split(|&byte| byte == 0)
                    .any(|variable| variable == wanted.as_bytes());
                (ours && Some(pid) != switch).then_some(pid as libc::pid_t)
            })
            .collect()
    }

    /// The log of a child.
    pub fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    fn net(&self) -> String {
        format!("{},mac={GUEST_MAC}", self.switch_socket().display())
    }

    fn spawn(&self, command: &mut Command, name: &str) -> anyhow::Result<Guard> {
        let log = File::create(self.log(name))?;
        Guard::spawn(command.stdout(log.try_clone()?).stderr(log))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill_machines();
    }
}

fn wait_for(
    mut guard: Option<&mut Guard>,
    what: &str,
    log: &Path,
    mut ready: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    process::wait_until(&format!("start of {what}"), STARTED, || {
        if guard.as_mut().is_some_and(|guard| guard.exited()) {
            let text = fs::read_to_string(log).unwrap_or_default();
            bail!("{what} ended at once:\n{text}");
        }
        ready()
    })
}

/// Does a TCP socket listen there? Asks the kernel's table: a connection would count as a peer.
fn listens(address: SocketAddrV4) -> bool {
    let [a, b, c, d] = address.ip().octets();
    let wanted = format!("{d:02X}{c:02X}{b:02X}{a:02X}:{:04X}", address.port());
    fs::read_to_string("/proc/net/tcp").is_ok_and(|table| {
        table.lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            words.next() == Some(&wanted) && words.nth(1) == Some("0A")
        })
    })
}

impl Forward {
    /// A free port of the first host that leads to the guest's `port`.
    ///
    /// # Errors
    /// When no port is free.
    pub fn to_guest(port: u16) -> anyhow::Result<Self> {
        Ok(Self {
            outside: free_tcp_port(FIRST)?,
            to: SocketAddrV4::new(GUEST, port),
        })
    }
}

/// A TCP port that was free a moment ago.
///
/// # Errors
/// When the address is not ours.
pub fn free_tcp_port(address: Ipv4Addr) -> anyhow::Result<u16> {
    let listener = std::net::TcpListener::bind((address, 0))
        .with_context(|| format!("address {address} is not usable on this machine"))?;
    Ok(listener.local_addr()?.port())
}

/// A UDP port that was free on every one of the addresses a moment ago.
fn free_udp_port(addresses: &[Ipv4Addr]) -> anyhow::Result<u16> {
    for _ in 0..100 {
        let first = std::net::UdpSocket::bind((addresses[0], 0))?;
        let port = first.local_addr()?.port();
        let rest = addresses[1..]
            .iter()
            .map(|address| std::net::UdpSocket::bind((*address, port)))
            .collect::<Result<Vec<_>, _>>();
        if rest.is_ok() {
            return Ok(port);
        }
    }
    bail!("no UDP port is free on all of {addresses:?}")
}

/// Where a forwarded port of a host is reached.
pub fn outside(host: &Host, port: u16) -> SocketAddr {
    SocketAddr::from((host.address(), port))
}
