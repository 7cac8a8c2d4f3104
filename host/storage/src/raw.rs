//! A disk whose bytes are those of a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::{Disk, DiskError, ImageLock, SECTOR_SIZE};

/// Zeros that are written where the file system cannot zero a range by itself.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// After so many written bytes the host starts to write them out, so that a later flush, and with
/// it the pause of a VM that moves, has little left to wait for.
const WRITE_OUT: u64 = 4 << 20;

/// What a VM may do with an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskMode {
    /// Reading only; several VMs may share the image.
    ReadOnly,
    /// Reading and writing by one VM at a time.
    ReadWrite,
}

/// A raw image file. Accesses are refused while its [`ImageLock`] is not held.
#[derive(Debug)]
pub struct RawDisk {
    file: Arc<File>,
    lock: ImageLock,
    mode: DiskMode,
    capacity: u64,
    /// Bytes written since the host was last told to write out.
    unwritten: u64,
}

impl RawDisk {
    /// Opens an image without locking it: [`ImageLock::acquire`] before the VM runs.
    ///
    /// # Errors
    /// [`DiskError::Open`] when the host refuses or it is no regular file, [`DiskError::Size`]
    /// when its size is that of no disk.
    pub fn open(path: &Path, mode: DiskMode) -> Result<Self, DiskError> {
        let open_error = |source| DiskError::Open {
            path: path.display().to_string(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(mode == DiskMode::ReadWrite)
            .open(path)
            .map_err(open_error)?;
        Self::with_file(file, path, mode)
    }

    /// As [`RawDisk::open`], for an image that another process has opened and handed over, together
    /// with its lock; `path` names it in messages.
    ///
    /// # Errors
    /// As [`RawDisk::open`]; [`DiskError::Open`] too when it was opened for something else.
    pub fn adopt(file: File, path: &Path, mode: DiskMode) -> Result<Self, DiskError> {
        let refused = |source| DiskError::Open {
            path: path.display().to_string(),
            source,
        };
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|errno| refused(errno.into()))?;
        let access = match mode {
            DiskMode::ReadOnly => rustix::fs::OFlags::RDONLY,
            DiskMode::ReadWrite => rustix::fs::OFlags::RDWR,
        };
        if flags & rustix::fs::OFlags::RWMODE != access {
            let reason = "the descriptor that came was opened for another kind of access";
            return Err(refused(io::Error::new(io::ErrorKind::InvalidInput, reason)));
        }
        Self::with_file(file, path, mode)
    }

    fn with_file(file: File, path: &Path, mode: DiskMode) -> Result<Self, DiskError> {
        let open_error = |source| DiskError::Open {
            path: path.display().to_string(),
            source,
        };
        let metadata = file.metadata().map_err(open_error)?;
        if !metadata.is_file() {
            return Err(open_error(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            )));
        }
        let capacity = metadata.len();
        if capacity == 0 || !capacity.is_multiple_of(SECTOR_SIZE) {
            return Err(DiskError::Size {
                path: path.display().to_string(),
                size: capacity,
            });
        }
        let file = Arc::new(file);
        Ok(Self {
            lock: ImageLock::new(Arc::clone(&file), path, mode),
            file,
            mode,
            capacity,
            unwritten: 0,
        })
    }

    /// The image's lock, to take when the VM starts and to give back when it leaves.
    pub fn lock(&self) -> &ImageLock {
        &self.lock
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.capacity => Ok(()),
            _ => Err(DiskError::OutOfRange {
                offset,
                length,
                capacity: self.capacity,
            }),
        }
    }

    fn check_owned(&self) -> Result<(), DiskError> {
        if self.lock.is_held() {
            return Ok(());
        }
        Err(DiskError::NotOwned {
            path: self.lock.path().display().to_string(),
        })
    }

    fn check_write(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if self.mode == DiskMode::ReadOnly {
            return Err(DiskError::ReadOnly);
        }
        self.check_owned()?;
        self.check_range(offset, length)
    }

    /// A hint: errors come back from the flush that follows.
    fn start_write_out(&self) {
        // SAFETY: the call takes an open descriptor and integers only; zeros mean the whole file.
        #[expect(unsafe_code, reason = "sync_file_range has no safe wrapper in std")]
        let _ = unsafe {
            libc::sync_file_range(self.file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE)
        };
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
        loop {
            // SAFETY: the call takes an open descriptor and integers only. Offset and length lie
            // within the file, so they fit `off_t`.
            #[expect(unsafe_code, reason = "fallocate has no safe wrapper in std")]
            let result = unsafe {
                libc::fallocate(
                    self.file.as_raw_fd(),
                    mode,
                    offset as libc::off_t,
                    length as libc::off_t,
                )
            };
            if result == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Zeroes a range in the way `mode` says, or by writing where the file system cannot.
    fn zero(&self, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        match self.fallocate(mode | libc::FALLOC_FL_KEEP_SIZE, offset, length) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                let end = offset + length;
                let mut at = offset;
                while at < end {
                    let count = (end - at).min(ZEROS.len() as u64);
                    self.file.write_all_at(&ZEROS[..count as usize], at)?;
                    at += count;
                }
                Ok(())
            }
            result => result,
        }
    }
}

impl Disk for RawDisk {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn is_read_only(&self) -> bool {
        self.mode == DiskMode::ReadOnly
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        let length = data.len() as u64;
        self.check_owned()?;
        self.check_range(offset, length)?;
        self.file
            .read_exact_at(data, offset)
            .map_err(|source| io_error("read", offset, length, source))
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let length = data.len() as u64;
        self.check_write(offset, length)?;
        self.file
            .write_all_at(data, offset)
            .map_err(|source| io_error("write", offset, length, source))?;
        self.unwritten += length;
        if self.unwritten >= WRITE_OUT {
            self.unwritten = 0;
            self.start_write_out();
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        if self.mode == DiskMode::ReadOnly {
            return Ok(());
        }
        self.file
            .sync_data()
            .map_err(|source| io_error("flush", 0, self.capacity, source))
    }

    fn discard(&mut self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check_write(offset, length)?;
        self.zero(libc::FALLOC_FL_PUNCH_HOLE, offset, length)
            .map_err(|source| io_error("discard", offset, length, source))
    }

    fn write_zeroes(&mut self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check_write(offset, length)?;
        self.zero(libc::FALLOC_FL_ZERO_RANGE, offset, length)
            .map_err(|source| io_error("zero", offset, length, source))
    }
}

fn io_error(action: &'static str, offset: u64, length: u64, source: io::Error) -> DiskError {
    DiskError::Io {
        action,
        offset,
        length,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    fn image(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    fn locked(file: &tempfile::NamedTempFile, mode: DiskMode) -> RawDisk {
        let disk = RawDisk::open(file.path(), mode).unwrap();
        disk.lock().acquire().unwrap();
        disk
    }

    #[test]
    fn sizes_that_no_disk_has_are_refused() {
        for size in [0, 1, 511, 513] {
            let file = image(size);
            let error = RawDisk::open(file.path(), DiskMode::ReadOnly).unwrap_err();
            assert!(matches!(error, DiskError::Size { .. }), "{size}: {error}");
        }
    }

    #[test]
    fn a_missing_image_or_a_directory_is_refused_by_name() {
        let error = RawDisk::open(Path::new("/nonexistent/x.img"), DiskMode::ReadOnly).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/x.img"));
        let directory = tempfile::tempdir().unwrap();
        let error = RawDisk::open(directory.path(), DiskMode::ReadOnly).unwrap_err();
        assert!(matches!(error, DiskError::Open { .. }), "{error}");
    }

    #[test]
    fn an_access_outside_of_the_disk_is_refused() {
        let file = image(4096);
        let mut disk = locked(&file, DiskMode::ReadWrite);
        let mut data = [0; 512];
        for offset in [3585, 4096, u64::MAX - 10] {
            assert!(matches!(
                disk.read(offset, &mut data),
                Err(DiskError::OutOfRange { .. })
            ));
            assert!(matches!(
                disk.write(offset, &data),
                Err(DiskError::OutOfRange { .. })
            ));
            assert!(disk.discard(offset, 512).is_err());
            assert!(disk.write_zeroes(offset, 512).is_err());
        }
        assert!(disk.discard(0, u64::MAX).is_err());
    }

    #[test]
    fn a_read_only_disk_refuses_changes() {
        let file = image(4096);
        let mut disk = locked(&file, DiskMode::ReadOnly);
        assert!(matches!(disk.write(0, &[1]), Err(DiskError::ReadOnly)));
        assert!(matches!(disk.discard(0, 512), Err(DiskError::ReadOnly)));
        assert!(matches!(
            disk.write_zeroes(0, 512),
            Err(DiskError::ReadOnly)
        ));
        disk.flush().unwrap();
    }

    #[test]
    fn a_disk_without_its_lock_refuses_every_access() {
        let file = image(4096);
        let mut disk = locked(&file, DiskMode::ReadWrite);
        disk.write(0, &[7; 512]).unwrap();
        disk.lock().release().unwrap();
        let mut data = [0; 512];
        assert!(matches!(
            disk.read(0, &mut data),
            Err(DiskError::NotOwned { .. })
        ));
        assert!(matches!(
            disk.write(0, &data),
            Err(DiskError::NotOwned { .. })
        ));
        disk.lock().acquire().unwrap();
        disk.read(0, &mut data).unwrap();
        assert_eq!(data, [7; 512]);
    }

    #[test]
    fn a_discard_gives_space_back_and_reads_as_zeros() {
        let file = image(1 << 20);
        let mut disk = locked(&file, DiskMode::ReadWrite);
        disk.write(0, &vec![9; 1 << 20]).unwrap();
        disk.flush().unwrap();
        let before = file.as_file().metadata().unwrap().blocks();
        disk.discard(0, 1 << 20).unwrap();
        let mut data = vec![1; 1 << 20];
        disk.read(0, &mut data).unwrap();
        assert!(data.iter().all(|&byte| byte == 0));
        assert!(file.as_file().metadata().unwrap().blocks() < before);
        assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_disk_behaves_like_an_array(
            operations in proptest::collection::vec((0u8..4, 0usize..9000, 0usize..2000, any::<u8>()), 1..40)
        ) {
            let file = image(8192);
            let mut disk = locked(&file, DiskMode::ReadWrite);
            let mut model = vec![0u8; 8192];
            for (operation, offset, length, value) in operations {
                let fits = offset + length <= 8192;
                let result = match operation {
                    0 => disk.write(offset as u64, &vec![value; length]),
                    1 => disk.discard(offset as u64, length as u64),
                    2 => disk.write_zeroes(offset as u64, length as u64),
                    _ => {
                        let mut data = vec![0; length];
                        let result = disk.read(offset as u64, &mut data);
                        if fits {
                            prop_assert_eq!(&data, &model[offset..offset + length]);
                        }
                        result
                    }
                };
                prop_assert_eq!(result.is_ok(), fits);
                if fits && operation < 3 {
                    let byte = if operation == 0 { value } else { 0 };
                    model[offset..offset + length].fill(byte);
                }
            }
            let mut all = vec![0; 8192];
            disk.read(0, &mut all).unwrap();
            prop_assert_eq!(all, model);
        }
    }
}
