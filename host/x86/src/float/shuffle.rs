//! Moves of lanes, most of them by an immediate: shuffles, blends, inserts, extracts.
//!
//! Arguments and results as in [`super::integer`].

use super::lanes::{Lane, from_index};

/// Lane of `lanes` that the 2-bit field `index` of `select` names.
fn pick<T: Lane>(lanes: &[T], select: u8, index: usize) -> T {
    lanes[usize::from(select >> (index * 2) & 3)]
}

pub(crate) fn pshufd(_: u128, b: u128, select: u8) -> u128 {
    let b = u32::split(b);
    from_index::<u32>(|index| pick(&b, select, index))
}

pub(crate) fn pshuflw(_: u128, b: u128, select: u8) -> u128 {
    let b = u16::split(b);
    from_index::<u16>(|index| {
        if index < 4 {
            pick(&b[..4], select, index)
        } else {
            b[index]
        }
    })
}

pub(crate) fn pshufhw(_: u128, b: u128, select: u8) -> u128 {
    let b = u16::split(b);
    from_index::<u16>(|index| {
        if index < 4 {
            b[index]
        } else {
            pick(&b[4..], select, index - 4)
        }
    })
}

pub(crate) fn shufps(a: u128, b: u128, select: u8) -> u128 {
    let (a, b) = (u32::split(a), u32::split(b));
    from_index::<u32>(|index| pick(if index < 2 { &a } else { &b }, select, index))
}

pub(crate) fn shufpd(a: u128, b: u128, select: u8) -> u128 {
    let (a, b) = (u64::split(a), u64::split(b));
    u64::join([a[usize::from(select & 1)], b[usize::from(select >> 1 & 1)]])
}

/// Takes lanes of `b` where the mask has ones.
fn blend<T: Lane>(a: u128, b: u128, mask: u8) -> u128 {
    let (a, b) = (T::split(a), T::split(b));
    from_index::<T>(|index| {
        if mask >> index & 1 != 0 {
            b.as_ref()[index]
        } else {
            a.as_ref()[index]
        }
    })
}

pub(crate) fn pblendw(a: u128, b: u128, mask: u8) -> u128 {
    blend::<u16>(a, b, mask)
}

pub(crate) fn blendps(a: u128, b: u128, mask: u8) -> u128 {
    blend::<u32>(a, b, mask)
}

pub(crate) fn blendpd(a: u128, b: u128, mask: u8) -> u128 {
    blend::<u64>(a, b, mask)
}

/// Takes lanes of `b` where the lane of `mask` is negative.
fn blend_by_sign<T: Lane + Into<i64>>(a: u128, b: u128, mask: u128) -> u128 {
    let (a, b, mask) = (T::split(a), T::split(b), T::split(mask));
    from_index::<T>(|index| {
        if mask.as_ref()[index].into() < 0 {
            b.as_ref()[index]
        } else {
            a.as_ref()[index]
        }
    })
}

pub(crate) fn pblendvb(a: u128, b: u128, mask: u128) -> u128 {
    blend_by_sign::<i8>(a, b, mask)
}

pub(crate) fn blendvps(a: u128, b: u128, mask: u128) -> u128 {
    blend_by_sign::<i32>(a, b, mask)
}

pub(crate) fn blendvpd(a: u128, b: u128, mask: u128) -> u128 {
    blend_by_sign::<i64>(a, b, mask)
}

/// PALIGNR: bytes of `a` above `b`, shifted right by `count` bytes.
pub(crate) fn palignr<const BYTES: usize>(a: u128, b: u128, count: u8) -> u128 {
    let count = usize::from(count);
    if BYTES == 8 {
        let both = a << 64 | b & u128::from(u64::MAX);
        return if count < 16 { both >> (count * 8) } else { 0 };
    }
    match count {
        0 => b,
        1..16 => b >> (count * 8) | a << (128 - count * 8),
        16..32 => a >> ((count - 16) * 8),
        _ => 0,
    }
}

/// INSERTPS with the source lane already in the low lane of `b`.
pub(crate) fn insertps(a: u128, b: u128, control: u8) -> u128 {
    let mut lanes = u32::split(a);
    lanes[usize::from(control >> 4 & 3)] = b as u32;
    for (index, lane) in lanes.iter_mut().enumerate() {
        if control >> index & 1 != 0 {
            *lane = 0;
        }
    }
    u32::join(lanes)
}

/// Sums of absolute differences of a block of `b` and eight places of `a`.
pub(crate) fn mpsadbw(a: u128, b: u128, control: u8) -> u128 {
    let (a, b) = (u8::split(a), u8::split(b));
    let a_from = usize::from(control >> 2 & 1) * 4;
    let b_from = usize::from(control & 3) * 4;
    from_index::<u16>(|index| {
        (0..4)
            .map(|byte| u16::from(a[a_from + index + byte].abs_diff(b[b_from + byte])))
            .sum()
    })
}

/// Replaces one lane, as PINSRB, PINSRW, PINSRD and PINSRQ do.
pub(crate) fn insert<T: Lane>(a: u128, value: T, index: u8) -> u128 {
    let mut lanes = T::split(a);
    let count = lanes.as_ref().len();
    lanes.as_mut()[usize::from(index) % count] = value;
    T::join(lanes)
}

/// Reads one lane, as PEXTRB, PEXTRW, PEXTRD and PEXTRQ do.
pub(crate) fn extract<T: Lane>(a: u128, index: u8) -> T {
    let lanes = T::split(a);
    lanes.as_ref()[usize::from(index) % lanes.as_ref().len()]
}

pub(crate) fn movsldup(_: u128, b: u128) -> u128 {
    let b = u32::split(b);
    u32::join([b[0], b[0], b[2], b[2]])
}

pub(crate) fn movshdup(_: u128, b: u128) -> u128 {
    let b = u32::split(b);
    u32::join([b[1], b[1], b[3], b[3]])
}

pub(crate) fn movddup(_: u128, b: u128) -> u128 {
    u64::join([b as u64, b as u64])
}

const LOW: u128 = u64::MAX as u128;

/// MOVSS between registers: the low 32 bits of `b` in `a`.
pub(crate) fn merge_low_32(a: u128, b: u128) -> u128 {
    a & !0xffff_ffff | b & 0xffff_ffff
}

/// MOVSD between registers and MOVLPS: the low half of `b` in `a`.
pub(crate) fn merge_low_64(a: u128, b: u128) -> u128 {
    a & !LOW | b & LOW
}

/// MOVHPS from memory and MOVLHPS: the low half of `b` above that of `a`.
pub(crate) fn merge_high(a: u128, b: u128) -> u128 {
    a & LOW | b << 64
}

/// MOVHLPS: the high half of `b` in the low half of `a`.
pub(crate) fn movhlps(a: u128, b: u128) -> u128 {
    a & !LOW | b >> 64
}
