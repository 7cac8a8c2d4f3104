//! This process's folder in the runtime directory: claimed by a lock, tidied at the end.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use dunlin_api::VmName;
use dunlin_api::place::{RuntimeDirectory, VmPlace};
use rustix::fs::FlockOperation;

/// Why the VM's folder could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Another process of that name lives.
    #[error("a VM named \"{name}\" runs already")]
    Taken {
        /// The name.
        name: VmName,
    },
    /// The runtime directory belongs to someone else, or others may write it.
    #[error("runtime directory \"{path}\" is not ours alone")]
    Unsafe {
        /// The directory.
        path: PathBuf,
    },
    /// The host refused.
    #[error("failed to {action} \"{path}\"")]
    Host {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A VM's folder, ours until dropped. Dropping it removes what is in it.
#[derive(Debug)]
pub(crate) struct ClaimedPlace {
    place: VmPlace,
    /// Holds the lock.
    _pid: File,
}

impl ClaimedPlace {
    /// Claims the folder of VM `name`. What a dead process left there is removed.
    ///
    /// # Errors
    /// [`PlaceError::Taken`] while another process lives there.
    pub(crate) fn claim(runtime: &RuntimeDirectory, name: &VmName) -> Result<Self, PlaceError> {
        make_private(runtime.path())?;
        let place = runtime.vm(name);
        make_private(place.directory())?;
        let pid_file = place.pid_file();
        let failed = |action| {
            let path = pid_file.clone();
            move |source| PlaceError::Host {
                action,
                path,
                source,
            }
        };
        let mut pid = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&pid_file)
            .map_err(failed("open"))?;
        match rustix::fs::flock(&pid, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(PlaceError::Taken { name: name.clone() });
            }
            Err(errno) => return Err(failed("lock")(errno.into())),
        }
        // Whoever had the lock before may have removed the file between our two calls.
        let ours = pid.metadata().map_err(failed("look at"))?.ino();
        if fs::metadata(&pid_file).map_or(0, |file| file.ino()) != ours {
            return Err(PlaceError::Taken { name: name.clone() });
        }
        remove_sockets(place.directory());
        pid.set_len(0).map_err(failed("write"))?;
        writeln!(pid, "{}", std::process::id()).map_err(failed("write"))?;
        Ok(Self { place, _pid: pid })
    }

    /// The folder.
    pub(crate) fn place(&self) -> &VmPlace {
        &self.place
    }

    /// Listens on a socket of the folder.
    pub(crate) fn listen(path: &Path) -> Result<UnixListener, PlaceError> {
        let failed = |source| PlaceError::Host {
            action: "listen on",
            path: path.to_owned(),
            source,
        };
        let listener = UnixListener::bind(path).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(listener)
    }

    /// Opens an empty log; what a killed VM of the name left is gone.
    pub(crate) fn open_log(&self) -> Result<File, PlaceError> {
        let path = self.place.log_file();
        let failed = |source| PlaceError::Host {
            action: "open",
            path: path.clone(),
            source,
        };
        OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed)
    }
}

impl Drop for ClaimedPlace {
    fn drop(&mut self) {
        let place = &self.place;
        remove_sockets(place.directory());
        // The locked file last, so that nobody claims the folder in between.
        for path in [place.log_file(), place.pid_file()] {
            let _absent = fs::remove_file(path);
        }
        // Not empty when something else lies there, which is not ours to remove.
        let _not_empty = fs::remove_dir(place.directory());
    }
}

/// Removes the sockets in a folder: ours at the end, a dead process's at the beginning. One that
/// cannot be removed shows when it is made anew.
fn remove_sockets(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
            let _stays = fs::remove_file(entry.path());
        }
    }
}

/// Makes a directory that only this user reads, or checks that it is one.
fn make_private(path: &Path) -> Result<(), PlaceError> {
    let failed = |action| {
        move |source| PlaceError::Host {
            action,
            path: path.to_owned(),
            source,
        }
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed("make"))?;
    let meta = fs::symlink_metadata(path).map_err(failed("look at"))?;
    let ours = meta.uid() == rustix::process::geteuid().as_raw();
    if !meta.is_dir() || !ours {
        return Err(PlaceError::Unsafe {
            path: path.to_owned(),
        });
    }
    if meta.mode() & 0o077 != 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed("protect"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> VmName {
        "a".parse().unwrap()
    }

    #[test]
    fn a_name_is_given_once_and_again_after_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = RuntimeDirectory::at(folder.path().join("run"));
        let first = ClaimedPlace::claim(&runtime, &name()).unwrap();
        assert!(matches!(
            ClaimedPlace::claim(&runtime, &name()),
            Err(PlaceError::Taken { .. })
        ));
        drop(first);
        assert!(!runtime.vm(&name()).directory().exists());
        ClaimedPlace::claim(&runtime, &name()).unwrap();
    }

    #[test]
    fn what_a_dead_process_left_is_reused() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = RuntimeDirectory::at(folder.path());
        let place = runtime.vm(&name());
        fs::create_dir(place.directory()).unwrap();
        drop(UnixListener::bind(place.api_socket()).unwrap());
        fs::write(place.pid_file(), "1\n").unwrap();
        let claimed = ClaimedPlace::claim(&runtime, &name()).unwrap();
        ClaimedPlace::listen(&claimed.place().api_socket()).unwrap();
    }

    #[test]
    fn the_folder_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = RuntimeDirectory::at(folder.path().join("run"));
        let claimed = ClaimedPlace::claim(&runtime, &name()).unwrap();
        for path in [runtime.path(), claimed.place().directory()] {
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o700);
        }
    }
}
