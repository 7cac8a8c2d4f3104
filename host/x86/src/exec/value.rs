//! The operand sizes.

use crate::host::HostValue;

/// An operand of 1, 2, 4 or 8 bytes.
pub(crate) trait Value: HostValue + std::fmt::Debug {
    const BITS: u32;
    const BYTES: u64;
    fn from_u64(value: u64) -> Self;
    fn zero_extend(self) -> u64;
    fn sign_extend(self) -> u64;
    /// Reads the register with this number (bit 5: the second byte of it).
    fn from_register(register: u64, number: u8) -> Self;
    /// What a register becomes when this is written to it.
    fn into_register(self, register: u64, number: u8) -> u64;
}

macro_rules! value {
    ($type:ty, $signed:ty, |$register:ident, $number:ident| $read:expr, |$this:ident, $old:ident, $at:ident| $write:expr) => {
        impl Value for $type {
            const BITS: u32 = <$type>::BITS;
            const BYTES: u64 = size_of::<$type>() as u64;
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn zero_extend(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sign_extend(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            fn from_register($register: u64, $number: u8) -> Self {
                $read
            }
            #[inline(always)]
            fn into_register(self, $old: u64, $at: u8) -> u64 {
                let $this = self;
                $write
            }
        }
    };
}

value!(
    u8,
    i8,
    |register, number| (register >> ((number & 0x20) >> 2)) as u8,
    |this, old, number| {
        let shift = (number & 0x20) >> 2;
        old & !(0xff << shift) | u64::from(this) << shift
    }
);
value!(
    u16,
    i16,
    |register, _number| register as u16,
    |this, old, _number| old & !0xffff | u64::from(this)
);
value!(
    u32,
    i32,
    |register, _number| register as u32,
    |this, _old, _number| u64::from(this)
);
value!(
    u64,
    i64,
    |register, _number| register,
    |this, _old, _number| this
);
