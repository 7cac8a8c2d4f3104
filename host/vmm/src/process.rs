//! The walk of one VM's process, from its launch specification to its end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use dunlin_api::launch::{
    DETACH, GuestOrigin, LaunchReply, LaunchSpec, Overrides, StandardInput, Start,
};
use dunlin_api::migration::Endpoint;
use dunlin_api::place::RuntimeDirectory;
use dunlin_api::security::Security;
use dunlin_api::status::VmStatus;
use dunlin_api::{ApiError, ErrorCode, VERSION, VmConfig, VmName};
use dunlin_migration::transport::Listener;
use dunlin_migration::{
    CancelToken, Destination, DestinationOptions, Following, MigrationError, Standing, Witness,
};

use crate::console::ConsoleHub;
use crate::files::{OpenFiles, ProcessFiles};
use crate::interface::{Doors, Interface, Peers};
use crate::isolation;
use crate::lifecycle::{Ending, Lifecycle, Mailbox, Message, Phase, Surroundings};
use crate::machine::events::MachineEvents;
use crate::moving::{
    self, AdoptedMachine, ArrivingMachine, Build, Faults, FromFile, MoveMonitor, Wanted,
    encode_config, restore_from_file,
};

/// Is the process of one VM, until the VM has ended.
pub fn run(spec: LaunchSpec) -> ExitCode {
    let mut parent = Parent(io::stdout());
    match live(spec, &mut parent) {
        Ok((ending, status)) => {
            let orderly = ending.is_orderly();
            if !orderly {
                tracing::error!(reason = status.reason, "the VM ended out of order");
            }
            parent.tell(&LaunchReply::Ended(status));
            match ending.exit_status() {
                Some(status) => ExitCode::from(status),
                None if orderly => ExitCode::SUCCESS,
                None => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            tracing::debug!(%error, "the VM did not start");
            parent.tell(&LaunchReply::Failed(error));
            ExitCode::FAILURE
        }
    }
}

/// Whoever started this process, as long as it listens.
struct Parent(io::Stdout);

impl Parent {
    fn tell(&mut self, reply: &LaunchReply) {
        let mut out = self.0.lock();
        // A parent that went away does not want to know.
        let _gone = serde_json::to_writer(&mut out, reply)
            .map_err(io::Error::from)
            .and_then(|()| out.write_all(b"\n"))
            .and_then(|()| out.flush());
    }
}

fn host(error: &(dyn std::error::Error + 'static)) -> ApiError {
    ApiError::from_chain(ErrorCode::Host, error)
}

fn live(spec: LaunchSpec, parent: &mut Parent) -> Result<(Ending, VmStatus), ApiError> {
    if spec.version > VERSION {
        return Err(ApiError::new(
            ErrorCode::InvalidRequest,
            format!(
                "launch specification has version {}, newer than the supported {VERSION}",
                spec.version
            ),
        ));
    }
    // Out of the parent's session: its terminal's signals are not ours.
    let _already_leader = rustix::process::setsid();
    // Needs rights that are given up next.
    let faults = moving::open_faults();
    isolation::drop_capabilities().map_err(|error| host(&error))?;
    let (mailbox, inbox) = Mailbox::new();
    let peers = Peers {
        mailbox: mailbox.clone(),
        monitor: Arc::new(MoveMonitor::new()),
        saves: Arc::default(),
        console: ConsoleHub::new(),
        waiting: CancelToken::new(),
        doors: Doors::new(),
    };
    let interface = Interface::start(peers.clone()).map_err(|error| host(&error))?;
    if spec.standard_input == StandardInput::Lifeline {
        let bond = match spec.guest {
            GuestOrigin::HandOver { .. } => Bond::UntilArrival,
            _ => Bond::ForLife,
        };
        watch_parent(&peers, bond).map_err(|error| host(&error))?;
    }
    // Before anything foreign is read: a kernel, a peer's words, a saved file.
    isolation::confine().map_err(|error| host(&error))?;
    let runtime = RuntimeDirectory::at(&spec.runtime);
    let arriving = Arriving {
        origin: spec.guest,
        runtime,
        faults: faults.clone(),
    };
    let result = arrive(arriving, &peers, parent).and_then(|arrived| {
        let files = arrived.files.map_or_else(
            || OpenFiles::create(&arrived.guest.place).map_err(|error| host(&error)),
            Ok,
        )?;
        let files = Arc::new(ProcessFiles::new(arrived.guest.place, files));
        files.take_over();
        let surroundings = Surroundings {
            faults,
            from_file: arrived.from_file,
            following: arrived.following,
            blueprint: arrived.guest.blueprint,
            inbox,
            doors: peers.doors.clone(),
            files: Arc::clone(&files),
            mailbox,
            monitor: Arc::clone(&peers.monitor),
            saves: Arc::clone(&peers.saves),
        };
        let lifecycle = Lifecycle::new(arrived.guest.machine, arrived.phase, surroundings);
        let served = Served {
            lifecycle,
            files: &files,
            start: spec.start,
            console: &peers.console,
        };
        let outcome = serve(served, &interface, parent);
        peers.console.close();
        let lost = matches!(&outcome, Ok((Ending::MemoryLost(_), _)));
        if let Some(witness) = arrived.witness.filter(|_| !lost) {
            settle(&witness);
        }
        Ok((outcome?, files))
    });
    interface.finish();
    let (outcome, files) = result?;
    drop(files);
    Ok(outcome)
}

/// How long a parent that wants to watch may take to attach to the console.
const ATTACH: Duration = Duration::from_secs(5);

/// What there is to serve.
struct Served<'a> {
    lifecycle: Lifecycle,
    files: &'a ProcessFiles,
    start: Start,
    console: &'a ConsoleHub,
}

fn serve(
    served: Served<'_>,
    interface: &Interface,
    parent: &mut Parent,
) -> Result<(Ending, VmStatus), ApiError> {
    let Served {
        mut lifecycle,
        files,
        start,
        console,
    } = served;
    interface.serve(files.sockets().map_err(|error| host(&error))?);
    if lifecycle.needs_start() {
        let idle = Instant::now();
        if start == Start::WhenWatched {
            parent.tell(&LaunchReply::Ready(lifecycle.status()));
            console.wait_for_reader(ATTACH);
        }
        lifecycle.start(idle.elapsed())?;
    }
    if start == Start::AtOnce {
        parent.tell(&LaunchReply::Ready(lifecycle.status()));
    }
    log_to(files.log());
    Ok(lifecycle.run())
}

/// A guest that is here.
struct Arrived {
    guest: ArrivingMachine,
    phase: Phase,
    /// How it came, when it came from a file.
    from_file: Option<FromFile>,
    /// The rest of its memory, when it came from another host before that.
    following: Option<Following>,
    /// Answers a source that does not know yet that the guest runs here.
    witness: Option<Witness>,
    /// What another process of this host had open.
    files: Option<OpenFiles>,
}

/// A guest that is to come.
struct Arriving {
    origin: GuestOrigin,
    runtime: RuntimeDirectory,
    faults: Faults,
}

fn arrive(arriving: Arriving, peers: &Peers, parent: &mut Parent) -> Result<Arrived, ApiError> {
    let Arriving {
        origin,
        runtime,
        faults,
    } = arriving;
    let mailbox = peers.mailbox.clone();
    let build = |overrides| Build {
        runtime,
        overrides,
        faults,
        console: Arc::clone(&peers.console),
        events: MachineEvents::new(move |event| mailbox.send(Message::Machine(event))),
    };
    match origin {
        GuestOrigin::Boot(config) => boot(&build(Overrides::default()), &config),
        GuestOrigin::File {
            path,
            overrides,
            reading,
        } => {
            let mailbox = peers.mailbox.clone();
            let wanted = Wanted {
                path: &path,
                reading,
                on_end: Box::new(move |end| pages_ended(&mailbox, end)),
            };
            let (guest, from_file) = restore_from_file(&build(overrides), wanted)?;
            Ok(Arrived {
                guest,
                phase: Phase::Created,
                from_file: Some(from_file),
                following: None,
                witness: None,
                files: None,
            })
        }
        GuestOrigin::Peer {
            listen,
            overrides,
            peer_timeout_ms,
            reconnect_window_ms,
            security,
        } => {
            let build = build(overrides);
            let usual = destination_options(peer_timeout_ms, peers.waiting.clone());
            let options = DestinationOptions {
                faults: build.faults.clone(),
                reconnect_window: reconnect_window_ms
                    .map_or(usual.reconnect_window, Duration::from_millis),
                ..usual
            };
            let arrived = receive(&build, &listen, &security, options, parent)?;
            if let Some(following) = &arrived.following {
                watch_memory(following, &peers.mailbox)?;
            }
            Ok(arrived)
        }
        GuestOrigin::HandOver { name } => {
            let options = destination_options(None, peers.waiting.clone());
            take_over(&build(Overrides::default()), &name, options, parent)
        }
    }
}

/// Takes the guest of VM `name` over from the process of this host that has it.
fn take_over(
    build: &Build,
    name: &VmName,
    options: DestinationOptions,
    parent: &mut Parent,
) -> Result<Arrived, ApiError> {
    let place = build.runtime.vm(name);
    let socket = format!("handover-{}.sock", std::process::id());
    let socket = place.directory().join(socket);
    let listener = Listener::unix_with_descriptors(&socket).map_err(|error| host(&error))?;
    parent.tell(&LaunchReply::Listening(Endpoint::Unix(socket)));
    let arrival = Destination::new(listener, options)
        .accept_hand_over(|configuration, given| build.adopt(name, configuration, given));
    let arrival = arrival.map_err(|error| not_arrived(&error))?;
    if let Some(leftovers) = &arrival.leftovers {
        build.console.inherit(&leftovers.body);
    }
    let AdoptedMachine { guest, files } = arrival.machine;
    Ok(Arrived {
        guest,
        phase: Phase::Running,
        from_file: None,
        following: None,
        witness: Some(arrival.witness),
        files: Some(files),
    })
}

fn not_arrived(error: &MigrationError) -> ApiError {
    match error {
        MigrationError::Cancelled => {
            ApiError::new(ErrorCode::Cancelled, "told to end before a VM arrived")
        }
        error => ApiError::from_chain(ErrorCode::Peer, error),
    }
}

fn boot(build: &Build, config: &VmConfig) -> Result<Arrived, ApiError> {
    let guest = build.build(&encode_config(config))?;
    guest.machine.load_kernel().map_err(|error| host(&error))?;
    Ok(Arrived {
        guest,
        phase: Phase::Created,
        from_file: None,
        following: None,
        witness: None,
        files: None,
    })
}

/// Tells the lifecycle when the rest of the guest's memory is here, or will never be.
fn watch_memory(following: &Following, mailbox: &Mailbox) -> Result<(), ApiError> {
    let (following, mailbox) = (following.clone(), mailbox.clone());
    let watch = move || match following.wait() {
        Standing::Lost { cause } => pages_ended(
            &mailbox,
            Err(ApiError::new(
                ErrorCode::Peer,
                format!("parts of it are at the host that the guest came from: {cause}"),
            )),
        ),
        Standing::Ended => {}
        Standing::Complete | Standing::Arriving | Standing::Waiting { .. } => {
            pages_ended(&mailbox, Ok(()));
        }
    };
    let thread = std::thread::Builder::new().name("memory".into());
    thread.spawn(watch).map_err(|error| host(&error))?;
    Ok(())
}

/// How long the lifecycle may take to hear that the guest's memory is lost.
const HEAR: Duration = Duration::from_secs(3);

/// The pages of a guest that came before them are all there, or never will be.
fn pages_ended(mailbox: &Mailbox, end: Result<(), ApiError>) {
    let Err(error) = end else {
        return mailbox.send(Message::PagesThere);
    };
    tracing::error!(%error, "the guest ends: its memory is lost");
    let mailbox = mailbox.clone();
    let tell = move || {
        let (sender, heard) = mpsc::channel();
        mailbox.send(Message::MemoryLost(error.clone(), sender));
        if heard.recv_timeout(HEAR).is_err() {
            // The lifecycle waits for a processor that waits for a page: nobody can end in order.
            Parent(io::stdout()).tell(&LaunchReply::Failed(error));
            std::process::exit(1);
        }
    };
    // The lifecycle may be about to wait for the caller's end.
    let spawned = std::thread::Builder::new().name("memory lost".into());
    if let Err(error) = spawned.spawn(tell) {
        tracing::error!(%error, "and there is no thread to say so");
        std::process::exit(1);
    }
}

/// How a guest is awaited.
fn destination_options(peer_timeout_ms: Option<u64>, cancel: CancelToken) -> DestinationOptions {
    let defaults = DestinationOptions::default();
    let idle_timeout = peer_timeout_ms.map_or(defaults.idle_timeout, Duration::from_millis);
    DestinationOptions {
        idle_timeout,
        preamble_timeout: defaults.preamble_timeout.min(idle_timeout),
        cancel,
        ..defaults
    }
}

fn receive(
    build: &Build,
    listen: &Endpoint,
    security: &Security,
    options: DestinationOptions,
    parent: &mut Parent,
) -> Result<Arrived, ApiError> {
    let listener = moving::listener(listen, security)?;
    let endpoint = match listener.tcp_address() {
        Some(address) => Endpoint::Tcp(address),
        None => listen.clone(),
    };
    parent.tell(&LaunchReply::Listening(endpoint));
    let arrival = Destination::new(listener, options)
        .accept(|configuration| build.build_for_peer(configuration));
    match arrival {
        Ok(arrival) => Ok(Arrived {
            guest: arrival.machine,
            phase: Phase::Running,
            from_file: None,
            following: arrival.following,
            witness: Some(arrival.witness),
            files: None,
        }),
        Err(error) => Err(not_arrived(&error)),
    }
}

/// Gives the source a moment to learn that the guest came here, if it does not know yet: else it
/// would take this process's end for a failed hand-over.
fn settle(witness: &Witness) {
    for _ in 0..100 {
        if witness.is_settled() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    tracing::warn!("the source has not confirmed the move");
}

/// What the end of the parent means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bond {
    /// The VM's end.
    ForLife,
    /// The end of the wait for a guest; one that is here lives on.
    UntilArrival,
}

/// Ends the VM, or the wait for it, when the parent is gone and has not let go before.
fn watch_parent(peers: &Peers, bond: Bond) -> io::Result<()> {
    let peers = peers.clone();
    let watch = move || {
        let mut byte = [0];
        let detached = loop {
            match io::stdin().read(&mut byte) {
                Ok(0) => break false,
                Ok(_) if byte[0] == DETACH => break true,
                Err(error) if error.kind() != io::ErrorKind::Interrupted => break false,
                Ok(_) | Err(_) => {}
            }
        };
        if !detached {
            peers.waiting.cancel();
            if bond == Bond::ForLife {
                peers.mailbox.send(Message::End("its parent has ended"));
            }
        }
    };
    std::thread::Builder::new()
        .name("parent".into())
        .spawn(watch)?;
    Ok(())
}

/// From now on diagnostics go to the VM's log instead of the parent's terminal.
fn log_to(log: &File) {
    if let Err(error) = rustix::stdio::dup2_stderr(log) {
        tracing::warn!(%error, "diagnostics stay where they were");
    }
}
