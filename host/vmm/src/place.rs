//! This process's folder in the runtime directory: claimed by a lock, tidied at the end.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{
    DirBuilderExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt,
};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

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

/// A VM's folder, ours until dropped or given away. Dropping it removes what is in it.
#[derive(Debug)]
pub(crate) struct ClaimedPlace {
    place: VmPlace,
    /// Holds the lock.
    pid: File,
    /// Another process of this host has the folder, and shares the lock.
    elsewhere: AtomicBool,
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
        let pid = OpenOptions::new()
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
        write_pid(&pid).map_err(failed("write"))?;
        Ok(Self {
            place,
            pid,
            elsewhere: AtomicBool::new(false),
        })
    }

    /// The folder of VM `name` that another process of this host has claimed, by its locked file.
    /// It is that process's until [`ClaimedPlace::take_over`].
    ///
    /// # Errors
    /// [`PlaceError`] when the file is not that folder's.
    pub(crate) fn adopt(
        runtime: &RuntimeDirectory,
        name: &VmName,
        pid: OwnedFd,
    ) -> Result<Self, PlaceError> {
        let place = runtime.vm(name);
        let path = place.pid_file();
        let failed = |source| PlaceError::Host {
            action: "take over",
            path: path.clone(),
            source,
        };
        let pid = File::from(pid);
        let [came, here] = [pid.metadata(), fs::metadata(&path)].map(|file| file.map_err(failed));
        let (came, here) = (came?, here?);
        if (came.dev(), came.ino()) != (here.dev(), here.ino()) {
            let reason = "it is not the file that came from the other process";
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, reason)));
        }
        // Locked already, as the open file that both processes share.
        rustix::fs::flock(&pid, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            place,
            pid,
            elsewhere: AtomicBool::new(true),
        })
    }

    /// The locked file, for another process of this host.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(self.pid.try_clone()?.into())
    }

    /// Another process goes on with the folder.
    pub(crate) fn give_away(&self) {
        self.elsewhere.store(true, Ordering::Release);
    }

    /// The folder is this process's from now on.
    pub(crate) fn take_over(&self) {
        self.elsewhere.store(false, Ordering::Release);
        if let Err(error) = write_pid(&self.pid) {
            tracing::warn!(%error, "the folder names another process");
        }
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
        if self.elsewhere.load(Ordering::Acquire) {
            return;
        }
        let place = &self.place;
        let named = fs::read_to_string(place.pid_file()).ok();
        let named = named.and_then(|pid| pid.trim().parse::<u32>().ok());
        if named.is_some_and(|pid| pid != std::process::id()) {
            tracing::warn!("the folder names another process, which goes on with it");
            return;
        }
        remove_sockets(place.directory());
        // The locked file last, so that nobody claims the folder in between.
        for path in [place.log_file(), place.pid_file()] {
            let _absent = fs::remove_file(path);
        }
        // Not empty when something else lies there, which is not ours to remove.
        let _not_empty = fs::remove_dir(place.directory());
    }
}

/// Writes this process's id; the file's position may be shared with another process.
fn write_pid(file: &File) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all_at(format!("{}\n", std::process::id()).as_bytes(), 0)
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

    #[test]
    fn a_folder_passes_to_another_process_and_its_lock_is_never_free() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = RuntimeDirectory::at(folder.path().join("run"));
        let old = ClaimedPlace::claim(&runtime, &name()).unwrap();
        let copy = old.descriptor().unwrap();
        let new = ClaimedPlace::adopt(&runtime, &name(), copy).unwrap();
        // Not given the guest: the folder stays.
        drop(new);
        let new = ClaimedPlace::adopt(&runtime, &name(), old.descriptor().unwrap()).unwrap();
        old.give_away();
        new.take_over();
        drop(old);
        assert!(new.place().pid_file().exists());
        assert!(matches!(
            ClaimedPlace::claim(&runtime, &name()),
            Err(PlaceError::Taken { .. })
        ));
        drop(new);
        ClaimedPlace::claim(&runtime, &name()).unwrap();
    }

    #[test]
    fn a_file_of_another_folder_is_not_taken_for_the_claim() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = RuntimeDirectory::at(folder.path());
        let _own = ClaimedPlace::claim(&runtime, &name()).unwrap();
        let other = ClaimedPlace::claim(&runtime, &"b".parse().unwrap()).unwrap();
        let file = other.descriptor().unwrap();
        ClaimedPlace::adopt(&runtime, &name(), file).unwrap_err();
    }
}
