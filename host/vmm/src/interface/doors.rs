//! Listening sockets that can be held shut: who connects then waits, for this process or for
//! another one that goes on with the same sockets.

use std::time::Duration;

use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

/// Holds the doors of a process shut, and opens them.
#[derive(Debug, Clone)]
pub(crate) struct Doors(watch::Sender<bool>);

impl Doors {
    /// Open doors.
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    /// Nobody is accepted any more, soon.
    pub(crate) fn hold(&self) {
        self.0.send_replace(true);
    }

    /// Who waits is accepted again.
    pub(crate) fn open(&self) {
        self.0.send_replace(false);
    }
}

/// One listening socket.
#[derive(Debug)]
pub(super) struct Door {
    listener: UnixListener,
    held: watch::Receiver<bool>,
}

impl Door {
    pub(super) fn new(listener: UnixListener, doors: &Doors) -> Self {
        let held = doors.0.subscribe();
        Self { listener, held }
    }
}

impl axum::serve::Listener for Door {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            // The sender lives as long as the process's peers do; without one it stays as it is.
            let _sender_gone = self.held.wait_for(|held| !held).await.is_err();
            let accepted = tokio::select! {
                biased;
                Ok(_) = self.held.wait_for(|held| *held) => continue,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok(connection) => return connection,
                Err(error) => {
                    // Too many open files, most likely: it passes when somebody leaves.
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::serve::Listener as _;

    #[test]
    fn who_comes_to_a_door_that_is_held_waits_until_it_opens() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("door");
            let doors = Doors::new();
            let listener = UnixListener::bind(&path).unwrap();
            let mut door = Door::new(listener, &doors);
            let _first = UnixStream::connect(&path).await.unwrap();
            door.accept().await;
            doors.hold();
            let _second = UnixStream::connect(&path).await.unwrap();
            tokio::select! {
                biased;
                _ = door.accept() => panic!("accepted at a held door"),
                () = tokio::task::yield_now() => {}
            }
            doors.open();
            door.accept().await;
        });
    }
}
