//! A `tap` port: an interface of the host.
#![expect(unsafe_code, reason = "tap interfaces are made and set up by ioctl")]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::forward::DropReason;
use crate::poll::{Interest, Registrar};
use crate::queue::FrameQueue;
use crate::unix_port::is_full;
use crate::{SwitchError, TapConfig};

pub(super) const DEVICE: u32 = 0;

#[derive(Debug)]
pub(super) struct TapEnd {
    device: File,
    queue: FrameQueue,
    is_blocked: bool,
    registrar: Registrar,
}

/// A request about an interface, with its name filled in.
fn request(name: &str) -> Option<libc::ifreq> {
    // SAFETY: all zeroes is a valid ifreq: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let fits = (1..request.ifr_name.len()).contains(&name.len()) && !name.contains(['/', '\0']);
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    fits.then_some(request)
}

fn ioctl(fd: RawFd, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the codes used here read and write one ifreq, which lives for the call.
    let result = unsafe { libc::ioctl(fd, code, &raw mut *request) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sets the interface up; any socket serves to ask.
fn set_up(mut request: libc::ifreq) -> io::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    ioctl(
        socket.as_raw_fd(),
        libc::SIOCGIFFLAGS as libc::Ioctl,
        &mut request,
    )?;
    // SAFETY: the kernel has just filled in the flags.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
    ioctl(
        socket.as_raw_fd(),
        libc::SIOCSIFFLAGS as libc::Ioctl,
        &mut request,
    )
}

impl TapEnd {
    pub(super) fn new(
        name: &str,
        config: &TapConfig,
        registrar: Registrar,
    ) -> Result<Self, SwitchError> {
        let interface = &config.interface;
        let mut request = request(interface).ok_or_else(|| SwitchError::Invalid {
            port: name.to_owned(),
            reason: format!("\"{interface}\" is no name of an interface"),
        })?;
        let mut options = OpenOptions::new();
        let device = options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun");
        let device = device.map_err(SwitchError::io("open", "/dev/net/tun"))?;
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
        ioctl(
            device.as_raw_fd(),
            libc::TUNSETIFF as libc::Ioctl,
            &mut request,
        )
        .map_err(SwitchError::io("make interface", interface))?;
        if let Err(error) = set_up(request) {
            tracing::warn!(interface, %error, "failed to set the interface up: do it by hand");
        }
        registrar
            .add(&device, DEVICE, Interest::Read)
            .map_err(SwitchError::io("watch", interface))?;
        Ok(TapEnd {
            device,
            queue: FrameQueue::default(),
            is_blocked: false,
            registrar,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    pub(super) fn enqueue(&mut self, frame: &[u8]) -> Result<(), DropReason> {
        if self.queue.push(0, frame) {
            Ok(())
        } else {
            Err(DropReason::QueueFull)
        }
    }

    /// There is room again.
    pub(super) fn unblock(&mut self) {
        if std::mem::take(&mut self.is_blocked) {
            self.registrar.modify(&self.device, DEVICE, Interest::Read);
        }
    }

    /// Sends what it can. `lost` is told of each frame that cannot be sent at all.
    pub(super) fn flush(&mut self, mut lost: impl FnMut(usize, DropReason)) {
        while !self.is_blocked {
            let Some((_, frame)) = self.queue.iter().next() else {
                return;
            };
            match (&self.device).write(frame) {
                Ok(_) => {
                    self.queue.pop();
                }
                Err(error) if is_full(&error) => {
                    self.is_blocked = true;
                    self.registrar.modify(&self.device, DEVICE, Interest::Both);
                }
                // The interface is down, or does not like this frame.
                Err(_) => {
                    if let Some((_, length)) = self.queue.pop() {
                        lost(length, DropReason::PeerGone);
                    }
                }
            }
        }
    }
}
