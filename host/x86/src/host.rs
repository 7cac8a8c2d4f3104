//! The one seam to the host: single accesses to bytes that other threads change at any time.
//!
//! A guest's aligned access must be one access of the host, and the guest's memory order must not
//! be weaker than x86 promises. On x86-64 that is a plain instruction; on any other host an
//! atomic with acquire or release order where the address is aligned.

/// An integer that a guest's memory access moves at once.
#[expect(
    unsafe_code,
    reason = "guest memory is shared with threads outside of Rust"
)]
pub(crate) trait HostValue: Copy + Eq + 'static {
    /// Loads from `at`.
    ///
    /// # Safety
    /// `at` points to `size_of::<Self>()` bytes of one RAM page.
    unsafe fn load(at: *const u8) -> Self;
    /// Stores to `at`.
    ///
    /// # Safety
    /// `at` points to `size_of::<Self>()` bytes of one RAM page.
    unsafe fn store(at: *mut u8, value: Self);
    /// Replaces `old` by `new`, as one access; what was there otherwise.
    ///
    /// # Safety
    /// `at` points to `size_of::<Self>()` bytes of one RAM page.
    unsafe fn compare_exchange(at: *mut u8, old: Self, new: Self) -> Result<(), Self>;
}

#[cfg(target_arch = "x86_64")]
macro_rules! host_value {
    ($type:ty, $class:ident, $modifier:literal, $size:literal, $accumulator:tt, $atomic:ident) => {
        #[expect(unsafe_code, reason = "guest memory is shared with threads outside of Rust")]
        impl HostValue for $type {
            #[inline(always)]
            unsafe fn load(at: *const u8) -> Self {
                let value: Self;
                // SAFETY: the caller vouches for the bytes; the instruction reads nothing else.
                unsafe {
                    std::arch::asm!(
                        concat!("mov {value", $modifier, "}, ", $size, " ptr [{at}]"),
                        value = lateout($class) value, at = in(reg) at,
                        options(nostack, preserves_flags, readonly)
                    );
                }
                value
            }

            #[inline(always)]
            unsafe fn store(at: *mut u8, value: Self) {
                // SAFETY: the caller vouches for the bytes; the instruction writes nothing else.
                unsafe {
                    std::arch::asm!(
                        concat!("mov ", $size, " ptr [{at}], {value", $modifier, "}"),
                        value = in($class) value, at = in(reg) at,
                        options(nostack, preserves_flags)
                    );
                }
            }

            #[inline(always)]
            unsafe fn compare_exchange(at: *mut u8, old: Self, new: Self) -> Result<(), Self> {
                let found: Self;
                // SAFETY: the caller vouches for the bytes; CMPXCHG takes any alignment.
                unsafe {
                    std::arch::asm!(
                        concat!("lock cmpxchg ", $size, " ptr [{at}], {new", $modifier, "}"),
                        new = in($class) new, at = in(reg) at,
                        inlateout($accumulator) old => found,
                        options(nostack)
                    );
                }
                if found == old { Ok(()) } else { Err(found) }
            }
        }
    };
}

#[cfg(not(target_arch = "x86_64"))]
macro_rules! host_value {
    ($type:ty, $class:ident, $modifier:literal, $size:literal, $accumulator:tt, $atomic:ident) => {
        #[expect(
            unsafe_code,
            reason = "guest memory is shared with threads outside of Rust"
        )]
        impl HostValue for $type {
            #[inline(always)]
            unsafe fn load(at: *const u8) -> Self {
                use std::sync::atomic::{Ordering, $atomic};
                // SAFETY: the caller vouches for the bytes; the atomic is used where aligned.
                unsafe {
                    if at.cast::<$atomic>().is_aligned() {
                        Self::from_le((*at.cast::<$atomic>()).load(Ordering::Acquire))
                    } else {
                        Self::from_le(at.cast::<Self>().read_unaligned())
                    }
                }
            }

            #[inline(always)]
            unsafe fn store(at: *mut u8, value: Self) {
                use std::sync::atomic::{Ordering, $atomic};
                // SAFETY: the caller vouches for the bytes; the atomic is used where aligned.
                unsafe {
                    if at.cast::<$atomic>().is_aligned() {
                        (*at.cast::<$atomic>()).store(value.to_le(), Ordering::Release);
                    } else {
                        at.cast::<Self>().write_unaligned(value.to_le());
                    }
                }
            }

            #[inline(always)]
            unsafe fn compare_exchange(at: *mut u8, old: Self, new: Self) -> Result<(), Self> {
                use std::sync::atomic::{Ordering, $atomic};
                // SAFETY: the caller vouches for the bytes; the atomic is used where aligned.
                unsafe {
                    if at.cast::<$atomic>().is_aligned() {
                        return (*at.cast::<$atomic>())
                            .compare_exchange(
                                old.to_le(),
                                new.to_le(),
                                Ordering::SeqCst,
                                Ordering::SeqCst,
                            )
                            .map(|_| ())
                            .map_err(Self::from_le);
                    }
                    let found = Self::load(at);
                    if found != old {
                        return Err(found);
                    }
                    Self::store(at, new);
                    Ok(())
                }
            }
        }
    };
}

host_value!(u8, reg_byte, "", "byte", "al", AtomicU8);
host_value!(u16, reg, ":x", "word", "ax", AtomicU16);
host_value!(u32, reg, ":e", "dword", "eax", AtomicU32);
host_value!(u64, reg, ":r", "qword", "rax", AtomicU64);

/// Replaces 16 aligned bytes at once: `(low, high)`.
///
/// # Safety
/// `at` points to 16 bytes of one RAM page and is aligned to 16.
#[expect(
    unsafe_code,
    reason = "guest memory is shared with threads outside of Rust"
)]
pub(crate) unsafe fn compare_exchange_16(
    at: *mut u8,
    old: (u64, u64),
    new: (u64, u64),
) -> Result<(), (u64, u64)> {
    #[cfg(target_arch = "x86_64")]
    {
        let (low, high): (u64, u64);
        // SAFETY: the caller vouches for the bytes and their alignment. RBX belongs to the
        // compiler, so it is exchanged around the instruction.
        unsafe {
            std::arch::asm!(
                "xchg rsi, rbx",
                "lock cmpxchg16b xmmword ptr [rdi]",
                "mov rbx, rsi",
                inout("rsi") new.0 => _, in("rdi") at, in("rcx") new.1,
                inlateout("rax") old.0 => low, inlateout("rdx") old.1 => high,
                options(nostack)
            );
        }
        if (low, high) == old {
            Ok(())
        } else {
            Err((low, high))
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let _guard = LOCK
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: the caller vouches for the bytes.
        unsafe {
            let found = (u64::load(at), u64::load(at.add(8)));
            if found != old {
                return Err(found);
            }
            u64::store(at, new.0);
            u64::store(at.add(8), new.1);
        }
        Ok(())
    }
}

/// A counter that all threads and processes of the host read alike: the time-stamp counter, or
/// on other hosts the nanoseconds of the monotonic clock.
#[inline]
pub(crate) fn counter() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: LFENCE and RDTSC exist on every x86-64 processor; user space may execute the latter
    // unless the process asked the kernel to forbid it.
    #[expect(unsafe_code, reason = "the intrinsics are unsafe by declaration only")]
    unsafe {
        // Not read before what came before, such as a lock that was taken: a guest's RDTSCP waits for
        // that, and other processors would see time go back.
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
    }
}

/// Copies `bytes` from `from` to `to`, ascending.
///
/// # Safety
/// Both point to `bytes` bytes of RAM; where they overlap, `to` is below `from`.
#[expect(
    unsafe_code,
    reason = "guest memory is shared with threads outside of Rust"
)]
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the caller vouches for the bytes; the direction flag is clear by the ABI.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags)
        );
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller vouches for the bytes.
    unsafe {
        let mut at = 0;
        while at + 8 <= bytes {
            u64::store(to.add(at), u64::load(from.add(at)));
            at += 8;
        }
        while at < bytes {
            u8::store(to.add(at), u8::load(from.add(at)));
            at += 1;
        }
    }
}

/// Stores `count` times `value`, ascending.
///
/// # Safety
/// `to` points to as many bytes of RAM.
#[expect(
    unsafe_code,
    reason = "guest memory is shared with threads outside of Rust"
)]
pub(crate) unsafe fn fill<T: HostValue>(to: *mut u8, value: T, count: usize) {
    for index in 0..count {
        // SAFETY: the caller vouches for the bytes.
        unsafe { T::store(to.add(index * size_of::<T>()), value) };
    }
}
