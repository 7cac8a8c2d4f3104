//! Calling a vCPU's thread out of KVM_RUN.
//!
//! `immediate_exit` in the vCPU's run page keeps KVM_RUN from entering the guest, a signal makes a
//! KVM_RUN that has entered return. Both together leave no gap: the signal can only be consumed
//! without effect before KVM_RUN begins, and then `immediate_exit` is set already.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::host_error;
use crate::{EngineError, VcpuHandle};

/// Reaches one vCPU's run page and thread.
#[derive(Debug)]
pub(crate) struct Kick {
    requested: AtomicBool,
    target: Mutex<Target>,
}

#[derive(Debug)]
struct Target {
    /// `immediate_exit` in the run page; `None` once the vCPU is gone.
    immediate_exit: Option<ImmediateExit>,
    /// The thread that is in KVM_RUN or about to be.
    thread: Option<libc::pid_t>,
}

#[derive(Debug, Clone, Copy)]
struct ImmediateExit(*const AtomicU8);

#[expect(
    unsafe_code,
    reason = "a pointer into the run page is reached from other threads"
)]
// SAFETY: the pointer is to a byte of a shared mapping that is accessed atomically only; it is
// used under the lock of `Kick::target`, which forgets it before the mapping ends.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn set(self, on: bool) {
        // SAFETY: the mapping is alive, see above; the kernel reads the byte concurrently, which
        // an atomic store allows.
        #[expect(unsafe_code, reason = "a byte shared with the kernel")]
        unsafe {
            (*self.0).store(u8::from(on), Ordering::SeqCst);
        }
    }
}

impl Kick {
    /// `immediate_exit` must stay valid until [`Kick::forget`].
    pub(crate) fn new(immediate_exit: *mut u8) -> Self {
        Self {
            requested: AtomicBool::new(false),
            target: Mutex::new(Target {
                immediate_exit: Some(ImmediateExit(immediate_exit.cast::<AtomicU8>())),
                thread: None,
            }),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Target> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calling thread is the one that runs the vCPU from now on.
    pub(crate) fn enter(&self) {
        // SAFETY: gettid has no preconditions.
        #[expect(unsafe_code, reason = "a call without preconditions")]
        let thread = unsafe { libc::gettid() };
        self.lock().thread = Some(thread);
    }

    /// Was a kick asked for? Clears it.
    pub(crate) fn take(&self) -> bool {
        let target = self.lock();
        if let Some(immediate_exit) = target.immediate_exit {
            immediate_exit.set(false);
        }
        self.requested.swap(false, Ordering::SeqCst)
    }

    /// Lets the next KVM_RUN finish what is pending and return, whatever `call` is.
    pub(super) fn without_entering<T>(&self, call: impl FnOnce() -> T) -> T {
        let set = |on| {
            if let Some(immediate_exit) = self.lock().immediate_exit {
                immediate_exit.set(on);
            }
        };
        set(true);
        let result = call();
        let target = self.lock();
        if let Some(immediate_exit) = target.immediate_exit {
            immediate_exit.set(self.requested.load(Ordering::SeqCst));
        }
        result
    }

    /// The run page is about to go.
    pub(crate) fn forget(&self) {
        let mut target = self.lock();
        target.immediate_exit = None;
        target.thread = None;
    }
}

impl VcpuHandle for Kick {
    fn kick(&self) {
        let target = self.lock();
        self.requested.store(true, Ordering::SeqCst);
        if let Some(immediate_exit) = target.immediate_exit {
            immediate_exit.set(true);
        }
        if let Some(thread) = target.thread {
            // SAFETY: a signal to a thread of this process, whose handler does nothing. If the
            // thread has ended meanwhile, the call fails or, where its ID was taken by another
            // thread of this process, interrupts that one once.
            #[expect(unsafe_code, reason = "tgkill has no safe wrapper in std")]
            unsafe {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal());
            }
        }
    }
}

/// The signal that interrupts KVM_RUN: the second real-time signal.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

extern "C" fn nothing(_: libc::c_int) {}

/// Installs the handler that does nothing, once a process.
pub(crate) fn install_handler() -> Result<(), EngineError> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: the structure is zeroed, which is valid, and its handler only returns; without
        // SA_RESTART, system calls that it interrupts return EINTR.
        #[expect(unsafe_code, reason = "sigaction has no safe wrapper in std")]
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            libc::sigaction(signal(), &action, std::ptr::null_mut())
        };
        match result {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        }
    });
    installed.map_err(|errno| {
        host_error("install the handler of its signal")(std::io::Error::from_raw_os_error(errno))
    })
}
