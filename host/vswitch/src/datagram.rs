//! Batches of datagrams over unix and UDP sockets: `sendmmsg` and `recvmmsg`.
#![expect(unsafe_code, reason = "sendmmsg and recvmmsg take raw message headers")]

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Datagrams in one system call.
pub(crate) const BATCH: usize = 64;

/// The name of a socket as the kernel wants it.
#[derive(Clone, Copy)]
pub(crate) struct SocketName {
    storage: libc::sockaddr_storage,
    length: libc::socklen_t,
}

const PATH_OFFSET: usize = mem::offset_of!(libc::sockaddr_un, sun_path);

impl SocketName {
    fn empty() -> Self {
        // SAFETY: all zeroes is a valid sockaddr_storage, of family AF_UNSPEC.
        let storage = unsafe { mem::zeroed() };
        SocketName { storage, length: 0 }
    }

    fn bytes(&self) -> &[u8] {
        let length = (self.length as usize).min(mem::size_of::<libc::sockaddr_storage>());
        // SAFETY: the storage is initialised and at least `length` bytes long.
        unsafe { std::slice::from_raw_parts((&raw const self.storage).cast(), length) }
    }

    /// The name of a unix socket bound to `path`.
    pub(crate) fn unix(path: &Path) -> io::Result<Self> {
        let bytes = path.as_os_str().as_bytes();
        let limit = mem::size_of::<libc::sockaddr_un>() - PATH_OFFSET;
        if bytes.is_empty() || bytes.len() >= limit || bytes.contains(&0) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("socket path must have 1 to {} bytes and no NUL", limit - 1),
            ));
        }
        let mut name = SocketName::empty();
        name.storage.ss_family = libc::AF_UNIX as libc::sa_family_t;
        // SAFETY: sockaddr_storage is larger than sockaddr_un, and `bytes` fits its path.
        unsafe {
            let start = (&raw mut name.storage).cast::<u8>().add(PATH_OFFSET);
            start.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        }
        name.length = (PATH_OFFSET + bytes.len() + 1) as libc::socklen_t;
        Ok(name)
    }

    /// The path of a bound unix socket; `None` for unnamed, abstract and other sockets.
    pub(crate) fn unix_path(&self) -> Option<PathBuf> {
        if i32::from(self.storage.ss_family) != libc::AF_UNIX {
            return None;
        }
        let path = self.bytes().get(PATH_OFFSET..)?;
        let path = path.split(|byte| *byte == 0).next()?;
        (!path.is_empty()).then(|| PathBuf::from(std::ffi::OsStr::from_bytes(path)))
    }

    /// The name of a UDP socket.
    pub(crate) fn internet(address: SocketAddr) -> Self {
        let mut name = SocketName::empty();
        let storage = &raw mut name.storage;
        match address {
            SocketAddr::V4(address) => {
                let value = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: u32::from_ne_bytes(address.ip().octets()),
                    },
                    sin_zero: [0; 8],
                };
                // SAFETY: sockaddr_storage is made to hold and align every kind of sockaddr.
                unsafe { storage.cast::<libc::sockaddr_in>().write(value) };
                name.length = mem::size_of::<libc::sockaddr_in>() as libc::socklen_t;
            }
            SocketAddr::V6(address) => {
                let value = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr {
                        s6_addr: address.ip().octets(),
                    },
                    sin6_scope_id: address.scope_id(),
                };
                // SAFETY: as above.
                unsafe { storage.cast::<libc::sockaddr_in6>().write(value) };
                name.length = mem::size_of::<libc::sockaddr_in6>() as libc::socklen_t;
            }
        }
        name
    }

    /// The address of a UDP socket; `None` for other sockets.
    pub(crate) fn internet_address(&self) -> Option<SocketAddr> {
        let storage = &raw const self.storage;
        match i32::from(self.storage.ss_family) {
            libc::AF_INET => {
                // SAFETY: the family says what the storage holds; it is aligned for it.
                let value = unsafe { storage.cast::<libc::sockaddr_in>().read() };
                let ip = Ipv4Addr::from(value.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddr::new(
                    IpAddr::V4(ip),
                    u16::from_be(value.sin_port),
                ))
            }
            libc::AF_INET6 => {
                // SAFETY: as above.
                let value = unsafe { storage.cast::<libc::sockaddr_in6>().read() };
                let ip = Ipv6Addr::from(value.sin6_addr.s6_addr);
                Some(SocketAddr::new(
                    IpAddr::V6(ip),
                    u16::from_be(value.sin6_port),
                ))
            }
            _ => None,
        }
    }
}

impl PartialEq for SocketName {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl std::fmt::Debug for SocketName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.unix_path(), self.internet_address()) {
            (Some(path), _) => write!(f, "{}", path.display()),
            (None, Some(address)) => write!(f, "{address}"),
            (None, None) => write!(f, "unnamed"),
        }
    }
}

/// A datagram to send: two parts, sent one after the other as one datagram.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub(crate) parts: [&'a [u8]; 2],
    /// `None` on a connected socket.
    pub(crate) to: Option<&'a SocketName>,
}

impl Outgoing<'_> {
    /// Fills arrays.
    pub(crate) const EMPTY: Self = Outgoing {
        parts: [&[], &[]],
        to: None,
    };
}

/// Sends up to [`BATCH`] datagrams without blocking; returns how many left.
///
/// # Errors
/// What the host says of the first one; none has left then.
pub(crate) fn send_batch(fd: BorrowedFd<'_>, messages: &[Outgoing<'_>]) -> io::Result<usize> {
    let count = messages.len().min(BATCH);
    // SAFETY: all zeroes is a valid empty header, and an iovec of length 0.
    let (mut headers, mut vectors): ([libc::mmsghdr; BATCH], [[libc::iovec; 2]; BATCH]) =
        unsafe { (mem::zeroed(), mem::zeroed()) };
    for ((message, header), vector) in messages.iter().zip(&mut headers).zip(&mut vectors) {
        for (part, entry) in message.parts.iter().zip(vector.iter_mut()) {
            entry.iov_base = part.as_ptr().cast_mut().cast();
            entry.iov_len = part.len();
        }
        header.msg_hdr.msg_iov = vector.as_mut_ptr();
        header.msg_hdr.msg_iovlen = 2;
        if let Some(name) = message.to {
            header.msg_hdr.msg_name = (&raw const name.storage).cast_mut().cast();
            header.msg_hdr.msg_namelen = name.length;
        }
    }
    // SAFETY: the first `count` headers point to names, vectors and parts that outlive the call;
    // the kernel only reads through them and writes `msg_len`.
    let sent = unsafe {
        libc::sendmmsg(
            fd.as_raw_fd(),
            headers.as_mut_ptr(),
            count as libc::c_uint,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(sent).map_err(|_negative| io::Error::last_os_error())
}

/// Buffers for received datagrams of up to a given size.
pub(crate) struct ReceiveBatch {
    slots: Vec<u8>,
    slot_size: usize,
    received: Vec<Received>,
}

#[derive(Debug, Clone, Copy)]
struct Received {
    length: usize,
    truncated: bool,
    sender: SocketName,
}

/// One received datagram.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Incoming<'a> {
    pub(crate) bytes: &'a [u8],
    /// It was longer than the buffers: `bytes` is its beginning.
    pub(crate) truncated: bool,
    pub(crate) sender: &'a SocketName,
}

impl ReceiveBatch {
    /// Buffers for datagrams of up to `slot_size` bytes.
    pub(crate) fn new(slot_size: usize) -> Self {
        ReceiveBatch {
            slots: vec![0; slot_size * BATCH],
            slot_size,
            received: Vec::with_capacity(BATCH),
        }
    }

    /// No buffers: stands in while the real ones are read.
    pub(crate) fn empty() -> Self {
        ReceiveBatch {
            slots: Vec::new(),
            slot_size: 1,
            received: Vec::new(),
        }
    }

    /// Receives up to `limit` (at most [`BATCH`]) datagrams, which replace those of the last
    /// call; 0 when none waits.
    ///
    /// # Errors
    /// What the host says; never `WouldBlock`.
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        self.received.clear();
        let limit = limit.min(BATCH);
        // SAFETY: all zeroes is a valid header, vector and name.
        let (mut headers, mut vectors, mut names): (
            [libc::mmsghdr; BATCH],
            [libc::iovec; BATCH],
            [libc::sockaddr_storage; BATCH],
        ) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        let slots = self.slots.chunks_exact_mut(self.slot_size);
        for (((header, vector), name), slot) in headers
            .iter_mut()
            .zip(&mut vectors)
            .zip(&mut names)
            .zip(slots)
            .take(limit)
        {
            vector.iov_base = slot.as_mut_ptr().cast();
            vector.iov_len = slot.len();
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_name = (&raw mut *name).cast();
            header.msg_hdr.msg_namelen = mem::size_of_val(name) as libc::socklen_t;
        }
        // SAFETY: the first `limit` headers point to vectors, names and slots that outlive the
        // call and that nothing else borrows; the lengths are theirs.
        let count = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                headers.as_mut_ptr(),
                limit as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock {
                Ok(0)
            } else {
                Err(error)
            };
        };
        for (header, name) in headers.iter().zip(&names).take(count) {
            self.received.push(Received {
                length: (header.msg_len as usize).min(self.slot_size),
                truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
                sender: SocketName {
                    storage: *name,
                    length: header.msg_hdr.msg_namelen,
                },
            });
        }
        Ok(count)
    }

    /// As [`ReceiveBatch::receive`], with one `read` for each packet, for descriptors that are no
    /// sockets.
    ///
    /// # Errors
    /// What the host says of the first one; never `WouldBlock`.
    pub(crate) fn read(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.received.clear();
        for slot in self.slots.chunks_exact_mut(self.slot_size) {
            // SAFETY: the kernel writes at most `slot.len()` bytes into `slot`.
            let length =
                unsafe { libc::read(fd.as_raw_fd(), slot.as_mut_ptr().cast(), slot.len()) };
            let Ok(length) = usize::try_from(length) else {
                let error = io::Error::last_os_error();
                if self.received.is_empty() && error.kind() != io::ErrorKind::WouldBlock {
                    return Err(error);
                }
                break;
            };
            self.received.push(Received {
                length,
                // A read does not tell; a frame that fills its slot is too long anyway.
                truncated: length == self.slot_size,
                sender: SocketName::empty(),
            });
        }
        Ok(self.received.len())
    }

    /// What the last call received.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = Incoming<'_>> {
        self.received
            .iter()
            .zip(self.slots.chunks_exact(self.slot_size))
            .map(|(received, slot)| Incoming {
                bytes: &slot[..received.length],
                truncated: received.truncated,
                sender: &received.sender,
            })
    }
}

impl std::fmt::Debug for ReceiveBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReceiveBatch")
            .field("received", &self.received.len())
            .finish_non_exhaustive()
    }
}
