//! Integer SIMD: MMX, SSE2, SSSE3 and the integer part of SSE4.
//!
//! Each function takes destination and source as they were and returns the new destination. MMX
//! registers are the low half of their argument; a function whose lanes depend on the register's
//! width has `BYTES`, 8 or 16. What MMX leaves in the high half is dropped by the caller.

use super::lanes::{Lane, from_index, map, zip};

macro_rules! lanewise {
    ($($name:ident: $lane:ty, $f:expr;)*) => {$(
        pub(crate) fn $name(a: u128, b: u128) -> u128 {
            zip::<$lane>(a, b, $f)
        }
    )*};
}

lanewise! {
    paddb: u8, u8::wrapping_add;
    paddw: u16, u16::wrapping_add;
    paddd: u32, u32::wrapping_add;
    paddq: u64, u64::wrapping_add;
    psubb: u8, u8::wrapping_sub;
    psubw: u16, u16::wrapping_sub;
    psubd: u32, u32::wrapping_sub;
    psubq: u64, u64::wrapping_sub;
    paddsb: i8, i8::saturating_add;
    paddsw: i16, i16::saturating_add;
    paddusb: u8, u8::saturating_add;
    paddusw: u16, u16::saturating_add;
    psubsb: i8, i8::saturating_sub;
    psubsw: i16, i16::saturating_sub;
    psubusb: u8, u8::saturating_sub;
    psubusw: u16, u16::saturating_sub;
    pminub: u8, Ord::min;
    pminuw: u16, Ord::min;
    pminud: u32, Ord::min;
    pminsb: i8, Ord::min;
    pminsw: i16, Ord::min;
    pminsd: i32, Ord::min;
    pmaxub: u8, Ord::max;
    pmaxuw: u16, Ord::max;
    pmaxud: u32, Ord::max;
    pmaxsb: i8, Ord::max;
    pmaxsw: i16, Ord::max;
    pmaxsd: i32, Ord::max;
    pavgb: u8, |a, b| ((u16::from(a) + u16::from(b) + 1) >> 1) as u8;
    pavgw: u16, |a, b| ((u32::from(a) + u32::from(b) + 1) >> 1) as u16;
    pcmpeqb: i8, |a, b| -i8::from(a == b);
    pcmpeqw: i16, |a, b| -i16::from(a == b);
    pcmpeqd: i32, |a, b| -i32::from(a == b);
    pcmpeqq: i64, |a, b| -i64::from(a == b);
    pcmpgtb: i8, |a, b| -i8::from(a > b);
    pcmpgtw: i16, |a, b| -i16::from(a > b);
    pcmpgtd: i32, |a, b| -i32::from(a > b);
    pcmpgtq: i64, |a, b| -i64::from(a > b);
    pmullw: u16, u16::wrapping_mul;
    pmulld: u32, u32::wrapping_mul;
    pmulhw: i16, |a, b| ((i32::from(a) * i32::from(b)) >> 16) as i16;
    pmulhuw: u16, |a, b| ((u32::from(a) * u32::from(b)) >> 16) as u16;
    pmulhrsw: i16, |a, b| ((((i32::from(a) * i32::from(b)) >> 14) + 1) >> 1) as i16;
    pmuludq: u64, |a, b| u64::from(a as u32) * u64::from(b as u32);
    pmuldq: i64, |a, b| i64::from(a as i32) * i64::from(b as i32);
    psignb: i8, |a, b| a.wrapping_mul(b.signum());
    psignw: i16, |a, b| a.wrapping_mul(b.signum());
    psignd: i32, |a, b| a.wrapping_mul(b.signum());
    pmaddwd: i32, |a, b| {
        let low = i32::from(a as i16) * i32::from(b as i16);
        low.wrapping_add((a >> 16) * (b >> 16))
    };
    pmaddubsw: i16, |a, b| {
        let low = i32::from(a as u8) * i32::from(b as i8);
        let high = i32::from((a >> 8) as u8) * i32::from((b >> 8) as i8);
        (low + high).clamp(-0x8000, 0x7fff) as i16
    };
    psadbw: u64, |a, b| {
        let pairs = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
        pairs.map(|(a, b)| u64::from(a.abs_diff(b))).sum()
    };
}

pub(crate) fn pand(a: u128, b: u128) -> u128 {
    a & b
}

pub(crate) fn pandn(a: u128, b: u128) -> u128 {
    !a & b
}

pub(crate) fn por(a: u128, b: u128) -> u128 {
    a | b
}

pub(crate) fn pxor(a: u128, b: u128) -> u128 {
    a ^ b
}

pub(crate) fn pabsb(_: u128, b: u128) -> u128 {
    map::<i8>(b, i8::wrapping_abs)
}

pub(crate) fn pabsw(_: u128, b: u128) -> u128 {
    map::<i16>(b, i16::wrapping_abs)
}

pub(crate) fn pabsd(_: u128, b: u128) -> u128 {
    map::<i32>(b, i32::wrapping_abs)
}

macro_rules! shifts {
    ($($name:ident: $lane:ty, |$value:ident, $count:ident| $shift:expr, beyond $beyond:expr;)*) => {$(
        /// Shifts each lane by the low 64 bits of `b`.
        pub(crate) fn $name(a: u128, b: u128) -> u128 {
            let count = b as u64;
            if count < u64::from(<$lane>::BITS) {
                let $count = count as u32;
                map::<$lane>(a, |$value| $shift)
            } else {
                map::<$lane>(a, $beyond)
            }
        }
    )*};
}

shifts! {
    psllw: u16, |value, count| value << count, beyond |_| 0;
    pslld: u32, |value, count| value << count, beyond |_| 0;
    psllq: u64, |value, count| value << count, beyond |_| 0;
    psrlw: u16, |value, count| value >> count, beyond |_| 0;
    psrld: u32, |value, count| value >> count, beyond |_| 0;
    psrlq: u64, |value, count| value >> count, beyond |_| 0;
    psraw: i16, |value, count| value >> count, beyond |value| value >> 15;
    psrad: i32, |value, count| value >> count, beyond |value| value >> 31;
}

/// Shifts the register by `b` bytes.
pub(crate) fn pslldq(a: u128, b: u128) -> u128 {
    if b < 16 { a << (b as u32 * 8) } else { 0 }
}

/// Shifts the register by `b` bytes.
pub(crate) fn psrldq(a: u128, b: u128) -> u128 {
    if b < 16 { a >> (b as u32 * 8) } else { 0 }
}

/// Narrows the lanes of `a`, then those of `b`.
#[inline(always)]
fn pack<const BYTES: usize, W: Lane, N: Lane>(a: u128, b: u128, narrow: impl Fn(W) -> N) -> u128 {
    let (a, b) = (W::split(a), W::split(b));
    let half = BYTES / size_of::<W>();
    from_index::<N>(|index| {
        let wide = if index < half {
            a.as_ref()[index]
        } else {
            b.as_ref()[(index - half) % half]
        };
        narrow(wide)
    })
}

pub(crate) fn packsswb<const BYTES: usize>(a: u128, b: u128) -> u128 {
    pack::<BYTES, i16, i8>(a, b, |wide| wide.clamp(-0x80, 0x7f) as i8)
}

pub(crate) fn packuswb<const BYTES: usize>(a: u128, b: u128) -> u128 {
    pack::<BYTES, i16, u8>(a, b, |wide| wide.clamp(0, 0xff) as u8)
}

pub(crate) fn packssdw<const BYTES: usize>(a: u128, b: u128) -> u128 {
    pack::<BYTES, i32, i16>(a, b, |wide| wide.clamp(-0x8000, 0x7fff) as i16)
}

pub(crate) fn packusdw<const BYTES: usize>(a: u128, b: u128) -> u128 {
    pack::<BYTES, i32, u16>(a, b, |wide| wide.clamp(0, 0xffff) as u16)
}

/// Interleaves lanes of `a` and `b`, beginning with lane `from`.
#[inline(always)]
fn interleave<T: Lane>(a: u128, b: u128, from: usize) -> u128 {
    let (a, b) = (T::split(a), T::split(b));
    from_index::<T>(|index| {
        let lane = from + index / 2;
        if index % 2 == 0 {
            a.as_ref()[lane]
        } else {
            b.as_ref()[lane]
        }
    })
}

macro_rules! unpack {
    ($($low:ident, $high:ident: $lane:ty;)*) => {$(
        pub(crate) fn $low(a: u128, b: u128) -> u128 {
            interleave::<$lane>(a, b, 0)
        }

        pub(crate) fn $high<const BYTES: usize>(a: u128, b: u128) -> u128 {
            let (shift, from) = if BYTES == 8 { (32, 0) } else { (0, 8 / size_of::<$lane>()) };
            interleave::<$lane>(a >> shift, b >> shift, from)
        }
    )*};
}

unpack! {
    punpcklbw, punpckhbw: u8;
    punpcklwd, punpckhwd: u16;
    punpckldq, punpckhdq: u32;
    punpcklqdq, punpckhqdq: u64;
}

/// Combines neighbouring lanes of `a`, then of `b`.
#[inline(always)]
fn horizontal<const BYTES: usize, T: Lane>(a: u128, b: u128, f: impl Fn(T, T) -> T) -> u128 {
    let (a, b) = (T::split(a), T::split(b));
    let pairs = BYTES / size_of::<T>() / 2;
    from_index::<T>(|index| {
        let lanes = if index < pairs {
            a.as_ref()
        } else {
            b.as_ref()
        };
        let pair = index % pairs * 2;
        f(lanes[pair], lanes[pair + 1])
    })
}

pub(crate) fn phaddw<const BYTES: usize>(a: u128, b: u128) -> u128 {
    horizontal::<BYTES, i16>(a, b, i16::wrapping_add)
}

pub(crate) fn phaddd<const BYTES: usize>(a: u128, b: u128) -> u128 {
    horizontal::<BYTES, i32>(a, b, i32::wrapping_add)
}

pub(crate) fn phaddsw<const BYTES: usize>(a: u128, b: u128) -> u128 {
    horizontal::<BYTES, i16>(a, b, i16::saturating_add)
}

pub(crate) fn phsubw<const BYTES: usize>(a: u128, b: u128) -> u128 {
    horizontal::<BYTES, i16>(a, b, i16::wrapping_sub)
}

pub(crate) fn phsubd<const BYTES: usize>(a: u128, b: u128) -> u128 {
    horizontal::<BYTES, i32>(a, b, i32::wrapping_sub)
}

pub(crate) fn phsubsw<const BYTES: usize>(a: u128, b: u128) -> u128 {
    horizontal::<BYTES, i16>(a, b, i16::saturating_sub)
}

pub(crate) fn pshufb<const BYTES: usize>(a: u128, b: u128) -> u128 {
    let a = u8::split(a);
    map::<u8>(b, |select| {
        if select & 0x80 != 0 {
            0
        } else {
            a[usize::from(select) % BYTES]
        }
    })
}

pub(crate) fn phminposuw(_: u128, b: u128) -> u128 {
    let least = u16::split(b).into_iter().enumerate();
    let (index, value) = least.min_by_key(|(_, value)| *value).unwrap_or_default();
    u128::from(value) | (index as u128) << 16
}

/// Widens the low lanes of `b`.
#[inline(always)]
fn widen<N: Lane, W: Lane>(b: u128, f: impl Fn(N) -> W) -> u128 {
    let lanes = N::split(b);
    from_index::<W>(|index| f(lanes.as_ref()[index]))
}

macro_rules! widening {
    ($($name:ident: $narrow:ty, $wide:ty;)*) => {$(
        pub(crate) fn $name(_: u128, b: u128) -> u128 {
            widen::<$narrow, $wide>(b, <$wide>::from)
        }
    )*};
}

widening! {
    pmovsxbw: i8, i16;
    pmovsxbd: i8, i32;
    pmovsxbq: i8, i64;
    pmovsxwd: i16, i32;
    pmovsxwq: i16, i64;
    pmovsxdq: i32, i64;
    pmovzxbw: u8, u16;
    pmovzxbd: u8, u32;
    pmovzxbq: u8, u64;
    pmovzxwd: u16, u32;
    pmovzxwq: u16, u64;
    pmovzxdq: u32, u64;
}

/// Bits 7 of the bytes, one bit a byte.
pub(crate) fn sign_mask_bytes(register: u128) -> u32 {
    let gather = |half: u64| -> u32 {
        ((half & 0x8080_8080_8080_8080).wrapping_mul(0x0002_0408_1020_4081) >> 56) as u32
    };
    gather(register as u64) | gather((register >> 64) as u64) << 8
}

/// The sign bits of the lanes, one bit a lane.
pub(crate) fn sign_mask<T: Lane + Into<i64>>(register: u128) -> u32 {
    let mut mask = 0;
    for (index, lane) in T::split(register).as_ref().iter().enumerate() {
        let lane: i64 = (*lane).into();
        mask |= u32::from(lane < 0) << index;
    }
    mask
}
