//! Disks: the [`Disk`] trait that devices use, and its back ends.
//!
//! - [`Disk`]: the contract between a block device and a back end;
//! - [`RawDisk`]: a file whose bytes are the disk's;
//! - [`ImageLock`]: which process may write an image, handed over when a VM moves.
//!
//! Data flows from a device's worker thread through [`Disk`] to the host's file system. Must not
//! depend on devices or engines.

mod lock;
mod raw;

use std::fmt::Debug;

pub use lock::{ImageLock, LockError};
pub use raw::{DiskMode, RawDisk};

/// Bytes in a sector, the unit of a disk's capacity and of virtio-blk's addresses.
pub const SECTOR_SIZE: u64 = 512;

/// Why a disk operation failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image cannot be opened.
    #[error("failed to open disk \"{path}\"")]
    Open {
        /// The image file.
        path: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The image has a size that no disk has.
    #[error("disk \"{path}\" has {size} bytes, which is not a positive multiple of 512")]
    Size {
        /// The image file.
        path: String,
        /// Its size in bytes.
        size: u64,
    },
    /// The access leaves the disk.
    #[error("access to {length} bytes at {offset} leaves the disk of {capacity} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Bytes on the disk.
        capacity: u64,
    },
    /// The disk is read-only.
    #[error("disk is read-only")]
    ReadOnly,
    /// The image's lock is not held: the VM does not run here, or no longer.
    #[error("disk \"{path}\" is not locked by this process")]
    NotOwned {
        /// The image file.
        path: String,
    },
    /// The host failed the access.
    #[error("failed to {action} {length} bytes at {offset}")]
    Io {
        /// Read, write, flush or discard.
        action: &'static str,
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u64,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

/// A disk: byte-addressed, of fixed capacity. Called from one worker thread at a time.
pub trait Disk: Debug + Send {
    /// Bytes on the disk, a multiple of [`SECTOR_SIZE`].
    fn capacity(&self) -> u64;

    /// Is writing refused?
    fn is_read_only(&self) -> bool;

    /// Fills `data` from byte `offset`.
    ///
    /// # Errors
    /// [`DiskError`] when the range or the host refuses; `data` may be partly filled.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<(), DiskError>;

    /// Writes `data` at byte `offset`.
    ///
    /// # Errors
    /// [`DiskError`] when the range, the mode or the host refuses.
    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError>;

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// [`DiskError`] when the host refuses.
    fn flush(&mut self) -> Result<(), DiskError>;

    /// Gives `length` bytes from `offset` back to the host; they read as zeros afterwards.
    ///
    /// # Errors
    /// [`DiskError`] when the range, the mode or the host refuses.
    fn discard(&mut self, offset: u64, length: u64) -> Result<(), DiskError>;

    /// Makes `length` bytes from `offset` read as zeros while their space stays reserved.
    ///
    /// # Errors
    /// [`DiskError`] when the range, the mode or the host refuses.
    fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), DiskError>;
}
