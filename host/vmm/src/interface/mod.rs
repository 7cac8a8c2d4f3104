//! The process's face: HTTP on `api.sock`, the console on `console.sock`, signals.
//!
//! One thread with one tokio runtime. It starts with the process, so that signals are heard while
//! a guest is awaited, and serves the sockets once there is a VM. It never touches the machine: it
//! sends messages and awaits answers.

mod doors;
mod routes;

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::serve::Listener as _;
use dunlin_migration::CancelToken;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use self::doors::Door;
pub(crate) use self::doors::Doors;
use crate::console::ConsoleHub;
use crate::lifecycle::{Mailbox, Message};
use crate::moving::{MoveMonitor, SaveMonitor};

/// How long readers of the console may take for the rest of it when the VM has ended.
const DRAIN: Duration = Duration::from_secs(2);

/// What the interface serves.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) api: StdListener,
    pub(crate) console: StdListener,
}

/// What the interface talks to.
#[derive(Debug, Clone)]
pub(crate) struct Peers {
    pub(crate) mailbox: Mailbox,
    pub(crate) monitor: Arc<MoveMonitor>,
    pub(crate) saves: Arc<SaveMonitor>,
    pub(crate) console: Arc<ConsoleHub>,
    /// Ends the wait for a guest.
    pub(crate) waiting: CancelToken,
    /// Whether connections are accepted.
    pub(crate) doors: Doors,
}

/// The interface's thread.
#[derive(Debug)]
pub(crate) struct Interface {
    serve: mpsc::Sender<Sockets>,
    end: watch::Sender<bool>,
    thread: JoinHandle<()>,
}

impl Interface {
    /// Starts the thread; signals are heard from now on.
    pub(crate) fn start(peers: Peers) -> io::Result<Self> {
        let (serve, sockets) = mpsc::channel(1);
        let (end, ended) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()?;
        let signals = {
            let _guard = runtime.enter();
            [
                signal(SignalKind::terminate())?,
                signal(SignalKind::interrupt())?,
                signal(SignalKind::hangup())?,
            ]
        };
        let thread = std::thread::Builder::new()
            .name("interface".into())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::spawn(hear_signals(signals, peers.clone()));
                    run(peers, sockets, ended).await;
                });
            })?;
        Ok(Self { serve, end, thread })
    }

    /// Serves these sockets from now on.
    pub(crate) fn serve(&self, sockets: Sockets) {
        let _thread_has_ended = self.serve.try_send(sockets);
    }

    /// Ends once requests are answered and readers of the console have had everything.
    pub(crate) fn finish(self) {
        let _thread_has_ended = self.end.send(true);
        let _panicked = self.thread.join();
    }
}

async fn hear_signals(signals: [tokio::signal::unix::Signal; 3], peers: Peers) {
    let [mut terminate, mut interrupt, mut hangup] = signals;
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
        peers.waiting.cancel();
        peers.mailbox.send(Message::End("ended by a signal"));
    }
}

async fn run(peers: Peers, mut sockets: mpsc::Receiver<Sockets>, mut ended: watch::Receiver<bool>) {
    let sockets = tokio::select! {
        sockets = sockets.recv() => sockets,
        _ = ended.wait_for(|ended| *ended) => None,
    };
    let Some(Sockets { api, console }) = sockets else {
        return;
    };
    let door = |listener| Ok(Door::new(UnixListener::from_std(listener)?, &peers.doors));
    let opened: io::Result<_> = door(api).and_then(|api| Ok((api, door(console)?)));
    let (api, console) = match opened {
        Ok(listeners) => listeners,
        Err(error) => {
            tracing::error!(%error, "the sockets cannot be served");
            peers
                .mailbox
                .send(Message::End("its sockets cannot be served"));
            return;
        }
    };
    let hub = Arc::clone(&peers.console);
    let accepting = tokio::spawn(accept_readers(console, Arc::clone(&hub)));
    let mut graceful = ended.clone();
    let server = axum::serve(api, routes::router(peers)).with_graceful_shutdown(async move {
        let _sender_gone = graceful.wait_for(|ended| *ended).await;
    });
    let serving = tokio::spawn(server.into_future());
    let _sender_gone = ended.wait_for(|ended| *ended).await;
    let _too_long = tokio::time::timeout(DRAIN, async {
        while !hub.is_drained() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    accepting.abort();
    // Connections that are kept alive would hold it up.
    let _too_long = tokio::time::timeout(Duration::from_millis(200), serving).await;
}

async fn accept_readers(mut door: Door, hub: Arc<ConsoleHub>) {
    loop {
        let (stream, _) = door.accept().await;
        tokio::spawn(Arc::clone(&hub).serve(stream));
    }
}
