//! What a VM's process has open for itself: its folder, log and listening sockets. Another process
//! of this host can go on with all of it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use dunlin_api::{ApiError, ErrorCode};
use dunlin_migration::handover::Descriptors;

use crate::interface::Sockets;
use crate::place::{ClaimedPlace, PlaceError};

/// Connections that wait at a socket.
const BACKLOG: i32 = 128;

/// Names of the descriptors.
const PLACE: &str = "place";
const LOG: &str = "log";
const API: &str = "api";
const CONSOLE: &str = "console";

/// The claimed file of the folder, as it came from another process.
pub(crate) fn claimed_file(descriptors: &mut Descriptors) -> Result<OwnedFd, ApiError> {
    take(descriptors, PLACE)
}

fn take(descriptors: &mut Descriptors, name: &str) -> Result<OwnedFd, ApiError> {
    descriptors.take(name).ok_or_else(|| {
        ApiError::new(
            ErrorCode::Peer,
            format!("the other process handed no \"{name}\" over"),
        )
    })
}

/// The log and the sockets.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    log: File,
    api: UnixListener,
    console: UnixListener,
}

impl OpenFiles {
    /// Makes them in the folder.
    pub(crate) fn create(place: &ClaimedPlace) -> Result<Self, PlaceError> {
        Ok(Self {
            log: place.open_log()?,
            api: ClaimedPlace::listen(&place.place().api_socket())?,
            console: ClaimedPlace::listen(&place.place().console_socket())?,
        })
    }

    /// Goes on with those of another process.
    pub(crate) fn adopt(descriptors: &mut Descriptors) -> Result<Self, ApiError> {
        Ok(Self {
            log: take(descriptors, LOG)?.into(),
            api: take(descriptors, API)?.into(),
            console: take(descriptors, CONSOLE)?.into(),
        })
    }
}

/// All of it. Dropping it tidies up, unless another process goes on with it.
#[derive(Debug)]
pub(crate) struct ProcessFiles {
    place: ClaimedPlace,
    open: OpenFiles,
}

impl ProcessFiles {
    pub(crate) fn new(place: ClaimedPlace, open: OpenFiles) -> Self {
        Self { place, open }
    }

    /// The log.
    pub(crate) fn log(&self) -> &File {
        &self.open.log
    }

    /// The sockets, to serve.
    pub(crate) fn sockets(&self) -> io::Result<Sockets> {
        Ok(Sockets {
            api: self.open.api.try_clone()?,
            console: self.open.console.try_clone()?,
        })
    }

    /// Adds copies of all of it, for another process.
    pub(crate) fn copy_to(&self, descriptors: &mut Descriptors) -> io::Result<()> {
        let Self { place, open } = self;
        let OpenFiles { log, api, console } = open;
        descriptors.add(PLACE, place.descriptor()?);
        descriptors.add(LOG, log.try_clone()?.into());
        descriptors.add(API, api.try_clone()?.into());
        descriptors.add(CONSOLE, console.try_clone()?.into());
        Ok(())
    }

    /// Another process goes on with it: nothing is removed at the end of this one.
    pub(crate) fn give_away(&self) {
        self.place.give_away();
    }

    /// It is this process's from now on.
    pub(crate) fn take_over(&self) {
        self.place.take_over();
        // Who connects learns from the kernel which process called this last.
        for socket in [&self.open.api, &self.open.console] {
            if let Err(error) = rustix::net::listen(socket, BACKLOG) {
                tracing::warn!(%error, "a socket names another process");
            }
        }
    }
}
