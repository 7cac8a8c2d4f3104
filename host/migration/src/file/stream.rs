//! A file in the place of a connection.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::time::Instant;

use crate::transport::{Transport, TransportError};

/// Reads or writes a file from its beginning. It has no deadlines.
pub(super) struct FileStream {
    file: File,
    path: String,
}

impl FileStream {
    pub(super) fn new(file: File, path: &Path) -> Self {
        Self {
            file,
            path: path.display().to_string(),
        }
    }

    fn result(&self, result: std::io::Result<usize>) -> Result<usize, TransportError> {
        match result {
            Ok(0) => Err(TransportError::Closed {
                peer: self.path.clone(),
            }),
            Ok(count) => Ok(count),
            Err(source) => Err(TransportError::Io {
                peer: self.path.clone(),
                source,
            }),
        }
    }
}

impl Transport for FileStream {
    fn read(
        &mut self,
        into: &mut [IoSliceMut<'_>],
        _deadline: Instant,
    ) -> Result<usize, TransportError> {
        let result = self.file.read_vectored(into);
        self.result(result)
    }

    fn write(&mut self, from: &[IoSlice<'_>], _deadline: Instant) -> Result<usize, TransportError> {
        let result = self.file.write_vectored(from);
        self.result(result)
    }

    fn shutdown(&mut self, _how: Shutdown) {}

    fn peer(&self) -> &str {
        &self.path
    }
}
