//! Which process may use an image: an open-file-description lock that a VM takes and gives back.
//!
//! ```text
//!            acquire()                        release()
//!   Idle ──────────────► Held (VM runs here) ──────────► Idle (paused, or handed over)
//! ```
//!
//! An image is opened without a lock, so that the destination of a move can open it while the
//! source still runs. The source gives the lock back after it was paused and flushed; the
//! destination takes it before the guest runs. The kernel drops it when the process ends.
//!
//! Between two processes of one host the descriptor itself is handed over. The lock is the open
//! file's, so it is never free meanwhile: the old process *lends* it, the new one acquires what is
//! held already.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::DiskMode;

/// Why an image was not locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another VM holds a lock that excludes this one.
    #[error("disk \"{path}\" is in use by another VM")]
    InUse {
        /// The image file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("failed to {action} disk \"{path}\"")]
    Host {
        /// Lock or unlock.
        action: &'static str,
        /// The image file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// The lock of one opened image: exclusive for a writer, shared between readers.
///
/// Clones are the same lock; the disk refuses accesses while it is not held.
#[derive(Debug, Clone)]
pub struct ImageLock {
    file: Arc<File>,
    path: Arc<Path>,
    mode: DiskMode,
    held: Arc<AtomicBool>,
}

impl ImageLock {
    pub(crate) fn new(file: Arc<File>, path: &Path, mode: DiskMode) -> Self {
        Self {
            file,
            path: path.into(),
            mode,
            held: Arc::new(AtomicBool::new(false)),
        }
    }

    /// The image file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Is it held by this process?
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Takes the lock, without waiting. Holding it already is no error.
    ///
    /// # Errors
    /// [`LockError::InUse`] when another VM, in this process or another, excludes it.
    pub fn acquire(&self) -> Result<(), LockError> {
        let kind = match self.mode {
            DiskMode::ReadWrite => libc::F_WRLCK,
            DiskMode::ReadOnly => libc::F_RDLCK,
        };
        match self.set(kind) {
            Ok(()) => {
                self.held.store(true, Ordering::Release);
                Ok(())
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Err(LockError::InUse {
                    path: self.path.to_path_buf(),
                })
            }
            Err(source) => Err(self.host_error("lock", source)),
        }
    }

    /// Gives the lock back. Call it when the device is paused, and so has flushed.
    ///
    /// # Errors
    /// [`LockError::Host`] when the host refuses.
    pub fn release(&self) -> Result<(), LockError> {
        self.held.store(false, Ordering::Release);
        self.set(libc::F_UNLCK)
            .map_err(|source| self.host_error("unlock", source))
    }

    /// Lets another process go on with the lock: this one accesses the image no more, and the
    /// lock stays with the descriptor that both share. [`ImageLock::acquire`] takes it back.
    pub fn lend(&self) {
        self.held.store(false, Ordering::Release);
    }

    /// The image's descriptor, whose lock it is: whoever gets a copy shares the lock.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn host_error(&self, action: &'static str, source: io::Error) -> LockError {
        LockError::Host {
            action,
            path: self.path.to_path_buf(),
            source,
        }
    }

    fn set(&self, kind: libc::c_int) -> io::Result<()> {
        // SAFETY: `flock` consists of integers, for which all zeros is valid: whole file from
        // its start, and the process id that open-file-description locks require to be zero.
        #[expect(unsafe_code, reason = "a zeroed plain C structure")]
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        // SAFETY: the descriptor is open and `lock` is a valid structure for the call's time.
        #[expect(unsafe_code, reason = "std has no open-file-description locks")]
        let result = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RawDisk;

    fn image() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        file
    }

    #[test]
    fn a_second_writer_is_refused_by_name() {
        let file = image();
        let first = RawDisk::open(file.path(), DiskMode::ReadWrite).unwrap();
        let second = RawDisk::open(file.path(), DiskMode::ReadWrite).unwrap();
        first.lock().acquire().unwrap();
        let error = second.lock().acquire().unwrap_err();
        assert!(matches!(error, LockError::InUse { .. }), "{error}");
        assert!(error.to_string().contains(file.path().to_str().unwrap()));
        assert!(!second.lock().is_held());
    }

    #[test]
    fn readers_share_and_exclude_a_writer() {
        let file = image();
        let first = RawDisk::open(file.path(), DiskMode::ReadOnly).unwrap();
        let second = RawDisk::open(file.path(), DiskMode::ReadOnly).unwrap();
        let writer = RawDisk::open(file.path(), DiskMode::ReadWrite).unwrap();
        first.lock().acquire().unwrap();
        second.lock().acquire().unwrap();
        assert!(writer.lock().acquire().is_err());
    }

    #[test]
    fn a_released_image_can_be_taken_over_and_back() {
        let file = image();
        let source = RawDisk::open(file.path(), DiskMode::ReadWrite).unwrap();
        let destination = RawDisk::open(file.path(), DiskMode::ReadWrite).unwrap();
        source.lock().acquire().unwrap();
        source.lock().acquire().unwrap();
        source.lock().release().unwrap();
        destination.lock().acquire().unwrap();
        assert!(source.lock().acquire().is_err());
        destination.lock().release().unwrap();
        source.lock().acquire().unwrap();
    }

    #[test]
    fn a_closed_image_is_free() {
        let file = image();
        let first = RawDisk::open(file.path(), DiskMode::ReadWrite).unwrap();
        first.lock().acquire().unwrap();
        drop(first);
        let second = RawDisk::open(file.path(), DiskMode::ReadWrite).unwrap();
        second.lock().acquire().unwrap();
    }

    #[test]
    fn a_lent_lock_is_never_free() {
        let file = image();
        let old = RawDisk::open(file.path(), DiskMode::ReadWrite).unwrap();
        old.lock().acquire().unwrap();
        let copy = old.lock().descriptor().try_clone_to_owned().unwrap();
        let new = RawDisk::adopt(copy.into(), file.path(), DiskMode::ReadWrite).unwrap();
        let stranger = RawDisk::open(file.path(), DiskMode::ReadWrite).unwrap();
        old.lock().lend();
        assert!(!old.lock().is_held());
        assert!(stranger.lock().acquire().is_err());
        new.lock().acquire().unwrap();
        drop(old);
        assert!(stranger.lock().acquire().is_err());
        drop(new);
        stranger.lock().acquire().unwrap();
    }
}
