//! The byte and word operations that boot and C libraries run most, by the host's vector unit.
//!
//! The same functions as in [`super::integer`], which compilers do not turn into single
//! instructions. Everything here is in x86-64's baseline.

#![expect(unsafe_code, reason = "a register as a host vector")]

use std::arch::x86_64::{
    __m128i, _mm_add_epi8, _mm_add_epi16, _mm_add_epi32, _mm_add_epi64, _mm_cmpeq_epi8,
    _mm_cmpeq_epi16, _mm_cmpeq_epi32, _mm_cmpgt_epi8, _mm_cmpgt_epi16, _mm_cmpgt_epi32,
    _mm_max_epu8, _mm_min_epu8, _mm_packus_epi16, _mm_sub_epi8, _mm_sub_epi16, _mm_sub_epi32,
    _mm_sub_epi64, _mm_subs_epu8, _mm_unpackhi_epi8, _mm_unpackhi_epi16, _mm_unpackhi_epi32,
    _mm_unpacklo_epi8, _mm_unpacklo_epi16, _mm_unpacklo_epi32,
};

#[inline(always)]
fn vector(register: u128) -> __m128i {
    // SAFETY: both are 128 bits of any value.
    unsafe { std::mem::transmute(register) }
}

#[inline(always)]
fn register(vector: __m128i) -> u128 {
    // SAFETY: both are 128 bits of any value.
    unsafe { std::mem::transmute(vector) }
}

macro_rules! vectors {
    ($($name:ident: $intrinsic:ident;)*) => {
        $(
            #[inline(always)]
            pub(super) fn $name(a: u128, b: u128) -> u128 {
                // SAFETY: SSE2 is in the baseline of x86-64.
                register(unsafe { $intrinsic(vector(a), vector(b)) })
            }
        )*

        #[cfg(test)]
        pub(super) const ALL: &[(&str, fn(u128, u128) -> u128)] = &[$((stringify!($name), $name)),*];
    };
}

vectors! {
    paddb: _mm_add_epi8;
    paddw: _mm_add_epi16;
    paddd: _mm_add_epi32;
    paddq: _mm_add_epi64;
    psubb: _mm_sub_epi8;
    psubw: _mm_sub_epi16;
    psubd: _mm_sub_epi32;
    psubq: _mm_sub_epi64;
    psubusb: _mm_subs_epu8;
    pminub: _mm_min_epu8;
    pmaxub: _mm_max_epu8;
    pcmpeqb: _mm_cmpeq_epi8;
    pcmpeqw: _mm_cmpeq_epi16;
    pcmpeqd: _mm_cmpeq_epi32;
    pcmpgtb: _mm_cmpgt_epi8;
    pcmpgtw: _mm_cmpgt_epi16;
    pcmpgtd: _mm_cmpgt_epi32;
    packuswb: _mm_packus_epi16;
    punpcklbw: _mm_unpacklo_epi8;
    punpcklwd: _mm_unpacklo_epi16;
    punpckldq: _mm_unpacklo_epi32;
    punpckhbw: _mm_unpackhi_epi8;
    punpckhwd: _mm_unpackhi_epi16;
    punpckhdq: _mm_unpackhi_epi32;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::integer as portable;

    const PORTABLE: &[fn(u128, u128) -> u128] = &[
        portable::paddb,
        portable::paddw,
        portable::paddd,
        portable::paddq,
        portable::psubb,
        portable::psubw,
        portable::psubd,
        portable::psubq,
        portable::psubusb,
        portable::pminub,
        portable::pmaxub,
        portable::pcmpeqb,
        portable::pcmpeqw,
        portable::pcmpeqd,
        portable::pcmpgtb,
        portable::pcmpgtw,
        portable::pcmpgtd,
        portable::packuswb::<16>,
        portable::punpcklbw,
        portable::punpcklwd,
        portable::punpckldq,
        portable::punpckhbw::<16>,
        portable::punpckhwd::<16>,
        portable::punpckhdq::<16>,
    ];

    proptest! {
        #[test]
        fn vectors_do_what_portable_code_does(a: u128, b: u128) {
            prop_assert_eq!(super::ALL.len(), PORTABLE.len());
            for ((name, fast), portable) in super::ALL.iter().zip(PORTABLE) {
                for b in [a, b] {
                    prop_assert_eq!(fast(a, b), portable(a, b), "{}", name);
                }
            }
        }
    }
}
