//! Memory that is filled by address.

use std::ptr::NonNull;

/// A piece of memory to be filled that is no Rust slice: guest memory, which other threads may
/// read and write at the same time.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct RawSlice(libc::iovec);

// SAFETY: a raw slice is an address and a length; `RawSlice::new` demands that the memory may be
// written from any thread.
#[expect(unsafe_code, reason = "it names memory that any thread writes")]
unsafe impl Send for RawSlice {}
// SAFETY: as above; a shared raw slice is only read for its address.
#[expect(unsafe_code, reason = "it names memory that any thread writes")]
unsafe impl Sync for RawSlice {}

impl RawSlice {
    /// `length` bytes at `address`.
    ///
    /// # Safety
    /// The memory must be valid for reads and writes of `length` bytes, from any thread, until the slice is
    /// used for the last time, and nothing may hold a Rust reference into it meanwhile.
    #[expect(unsafe_code, reason = "the caller vouches for the memory")]
    pub unsafe fn new(address: NonNull<u8>, length: usize) -> Self {
        Self(libc::iovec {
            iov_base: address.as_ptr().cast(),
            iov_len: length,
        })
    }

    /// The first byte.
    pub fn address(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Is there nothing to fill?
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// Cuts off the first `count` bytes (all, when there are not so many) and gives them back.
    #[must_use]
    pub fn split_front(&mut self, count: usize) -> Self {
        let count = count.min(self.len());
        let front = Self(libc::iovec {
            iov_base: self.0.iov_base,
            iov_len: count,
        });
        self.0.iov_base = self.address().wrapping_add(count).cast();
        self.0.iov_len -= count;
        front
    }

    /// Takes `next` in at the end, when it begins where this ends; says whether it did.
    #[must_use]
    pub fn join(&mut self, next: Self) -> bool {
        let adjacent = self.address().wrapping_add(self.len()) == next.address();
        if adjacent {
            self.0.iov_len += next.len();
        }
        adjacent
    }

    /// Fills the first bytes with those of `from`, as many as fit; says how many.
    pub fn copy_from(&self, from: &[u8]) -> usize {
        let count = from.len().min(self.len());
        // SAFETY: `new` demanded that the memory is valid for writes of our length, which is at
        // least `count`, and that no reference goes into it, so `from` is elsewhere.
        #[expect(unsafe_code, reason = "guest memory is written by raw copies")]
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), self.address(), count);
        }
        count
    }

    /// Copies the first bytes to `to`, as many as fit; says how many. What others write meanwhile
    /// may come in part.
    pub fn copy_to(&self, to: &mut [u8]) -> usize {
        let count = to.len().min(self.len());
        // SAFETY: as in `copy_from`; what is valid for writes of any thread is mapped, and all
        // bytes are valid as `u8`.
        #[expect(unsafe_code, reason = "guest memory is read by raw copies")]
        unsafe {
            std::ptr::copy_nonoverlapping(self.address(), to.as_mut_ptr(), count);
        }
        count
    }

    pub(super) fn as_iovecs(slices: &[Self]) -> *const libc::iovec {
        slices.as_ptr().cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_front_is_cut_off_and_filled_without_touching_the_rest() {
        let mut memory = [0_u8; 8];
        let address = NonNull::new(memory.as_mut_ptr()).unwrap();
        // SAFETY: the array is used only through the slice until the assertion.
        #[expect(unsafe_code, reason = "the test vouches for its array")]
        let mut slice = unsafe { RawSlice::new(address, 8) };
        let front = slice.split_front(3);
        assert_eq!((front.len(), slice.len()), (3, 5));
        assert_eq!(front.copy_from(&[1; 9]), 3);
        assert_eq!(slice.split_front(99).copy_from(&[2; 2]), 2);
        assert!(slice.is_empty());
        assert_eq!(memory, [1, 1, 1, 2, 2, 0, 0, 0]);
    }
}
