//! Operands that are worth trying: all special ones, and random bits near them.

use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};

/// The same numbers in every run.
pub(super) struct Random(TestRng);

impl Random {
    pub(super) fn new() -> Self {
        Self(TestRng::deterministic_rng(RngAlgorithm::ChaCha))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub(super) fn wide(&mut self) -> u128 {
        u128::from(self.next()) << 64 | u128::from(self.next())
    }
}

/// Numbers of a format with `fraction` bits, where special things happen; both signs.
fn specials(fraction: u32, exponent_bits: u32) -> Vec<u64> {
    let special = (1_u64 << exponent_bits) - 1;
    let ones = (1_u64 << fraction) - 1;
    let half = 1_u64 << (fraction - 1);
    let bias = special / 2;
    let mut numbers = Vec::new();
    for (exponent, fractions) in [
        (
            0,
            vec![0, 1, 2, 3, half - 1, half, half + 1, ones - 1, ones],
        ),
        (1, vec![0, 1, half, ones]),
        (2, vec![0, ones]),
        (bias / 2, vec![0, 1, half, ones]),
        (bias - u64::from(fraction) - 1, vec![0, 1, ones]),
        (bias - 2, vec![0, ones]),
        (bias - 1, vec![0, 1, half, ones]),
        (bias, vec![0, 1, half, ones]),
        (bias + 1, vec![0, 1, half, ones]),
        (bias + u64::from(fraction), vec![0, 1, ones]),
        (bias + 15, vec![0, ones]),
        (bias + 30, vec![0, 1, ones - 1, ones]),
        (bias + 31, vec![0, 1, ones]),
        (bias + 62, vec![0, ones]),
        (bias + 63, vec![0, 1, ones]),
        (special - 2, vec![0, ones]),
        (special - 1, vec![0, 1, half, ones]),
        (
            special,
            vec![0, 1, half - 1, half, half + 1, half | 5, ones],
        ),
    ] {
        for fraction_bits in fractions {
            let number = exponent << fraction | fraction_bits;
            numbers.push(number);
            numbers.push(number | (special + 1) << fraction);
        }
    }
    numbers
}

pub(super) fn singles() -> Vec<u32> {
    specials(23, 8)
        .into_iter()
        .map(|bits| bits as u32)
        .collect()
}

pub(super) fn doubles() -> Vec<u64> {
    let mut numbers = specials(52, 11);
    // Where single precision ends.
    for exponent in [
        1023 - 150,
        1023 - 149,
        1023 - 127,
        1023 - 126,
        1023 + 127,
        1023 + 128,
    ] {
        for fraction in [
            0,
            1,
            1 << 28,
            (1 << 29) - 1,
            (1 << 52) - (1 << 28),
            (1 << 52) - 1,
        ] {
            numbers.push(exponent << 52 | fraction);
            numbers.push(1 << 63 | exponent << 52 | fraction);
        }
    }
    numbers
}

pub(super) fn extendeds() -> Vec<u128> {
    const LEADING: u64 = 1 << 63;
    let bias = 0x3fff_u64;
    let mut numbers = Vec::new();
    for (exponent, significands) in [
        (
            0,
            vec![
                0,
                1,
                2,
                LEADING - 1,
                LEADING,
                LEADING | 1,
                1 << 40,
                u64::MAX,
            ],
        ),
        (1, vec![0, 1, LEADING, LEADING | 1, u64::MAX]),
        (bias / 2, vec![LEADING, u64::MAX, 7]),
        (bias - 1075, vec![LEADING, LEADING | 1, u64::MAX]),
        (
            bias - 1023,
            vec![LEADING, LEADING | 1 << 11, u64::MAX, u64::MAX << 11],
        ),
        (bias - 1022, vec![LEADING, LEADING | 1, u64::MAX]),
        (bias - 150, vec![LEADING, LEADING | 1, u64::MAX]),
        (
            bias - 127,
            vec![LEADING, LEADING | 1, u64::MAX, u64::MAX << 39],
        ),
        (bias - 65, vec![LEADING, u64::MAX]),
        (bias - 2, vec![LEADING, 0xc90f_daa2_2168_c235]),
        (
            bias - 1,
            vec![LEADING, LEADING | 1, u64::MAX, 0xb504_f333_f9de_6484],
        ),
        (
            bias,
            vec![
                LEADING,
                LEADING | 1,
                3 << 62,
                u64::MAX,
                0xc90f_daa2_2168_c235,
            ],
        ),
        (
            bias + 1,
            vec![LEADING, 3 << 62, 0xa000_0000_0000_0000, u64::MAX],
        ),
        (
            bias + 2,
            vec![LEADING, 0xe000_0000_0000_0000, 0xf333_3333_3333_3333],
        ),
        (bias + 14, vec![LEADING, u64::MAX]),
        (bias + 15, vec![LEADING, LEADING | 1, u64::MAX]),
        (bias + 30, vec![LEADING, u64::MAX, 0xffff_fffe_ffff_ffff]),
        (bias + 31, vec![LEADING, LEADING | 1]),
        (
            bias + 59,
            vec![
                0xde0b_6b3a_763f_ffff,
                0xde0b_6b3a_763f_fff0,
                0xde0b_6b3a_7640_0000,
            ],
        ),
        (bias + 62, vec![LEADING, u64::MAX]),
        (bias + 63, vec![LEADING, LEADING | 1, u64::MAX]),
        (bias + 64, vec![LEADING]),
        (
            bias + 127,
            vec![LEADING, u64::MAX, u64::MAX << 40, u64::MAX << 39],
        ),
        (bias + 128, vec![LEADING]),
        (
            bias + 1023,
            vec![LEADING, u64::MAX, u64::MAX << 11, u64::MAX << 10],
        ),
        (bias + 1024, vec![LEADING]),
        (0x7ffe, vec![LEADING, LEADING | 1, u64::MAX, 0]),
        (
            0x7fff,
            vec![
                LEADING,
                0,
                1,
                LEADING | 1,
                3 << 62,
                3 << 62 | 1,
                LEADING | 1 << 61,
                3 << 62 | 1 << 61,
                u64::MAX,
                LEADING - 1,
            ],
        ),
    ] {
        for significand in significands {
            for sign in [0, 0x8000] {
                numbers.push(u128::from(exponent | sign) << 64 | u128::from(significand));
            }
        }
    }
    numbers
}

/// One of `specials`, or random bits with an exponent near those of another.
pub(super) fn single(random: &mut Random, specials: &[u32]) -> u32 {
    let special = specials[random.below(specials.len())];
    match random.below(4) {
        0 => special,
        1 => special
            .wrapping_add(random.below(16) as u32)
            .wrapping_sub(8),
        2 => random.next() as u32,
        _ => special & 0xff80_0000 | random.next() as u32 & 0x7f_ffff,
    }
}

/// The same for doubles.
pub(super) fn double(random: &mut Random, specials: &[u64]) -> u64 {
    let special = specials[random.below(specials.len())];
    match random.below(4) {
        0 => special,
        1 => special.wrapping_add(random.next() % 16).wrapping_sub(8),
        2 => random.next(),
        _ => special & 0xfff << 52 | random.next() & ((1 << 52) - 1),
    }
}

/// The same for registers of the x87.
pub(super) fn extended(random: &mut Random, specials: &[u128]) -> u128 {
    let special = specials[random.below(specials.len())];
    let significand = u128::from(random.next() | 1 << 63);
    match random.below(5) {
        0 => special,
        1 => special & !15 | u128::from(random.next() & 15),
        2 => u128::from(random.next() & 0xffff) << 64 | significand,
        // Exponents that meet those of another operand.
        3 => u128::from(0x3fe0 + (random.next() & 0x803f)) << 64 | significand,
        _ => special & 0xffff << 64 | significand,
    }
}
