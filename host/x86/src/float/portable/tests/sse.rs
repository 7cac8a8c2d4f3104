//! SSE: every operation in every mode.

use super::host;
use super::operands::{self, Random};
use crate::float::lanes::Lane;
use crate::float::portable;

/// What operands a function looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lanes {
    Singles,
    Doubles,
    Integers,
}

/// MXCSR in every rounding mode, with and without DAZ and FTZ.
fn modes() -> impl Iterator<Item = u32> {
    (0..16).map(|mode| 0x1f80 | (mode & 3) << 13 | (mode & 4) << 4 | (mode & 8) << 12)
}

struct Operands {
    random: Random,
    singles: Vec<u32>,
    doubles: Vec<u64>,
}

impl Operands {
    fn new() -> Self {
        Self {
            random: Random::new(),
            singles: operands::singles(),
            doubles: operands::doubles(),
        }
    }

    fn register(&mut self, lanes: Lanes) -> u128 {
        let random = &mut self.random;
        match lanes {
            Lanes::Singles => u32::join(std::array::from_fn(|_| {
                operands::single(random, &self.singles)
            })),
            Lanes::Doubles => u64::join(std::array::from_fn(|_| {
                operands::double(random, &self.doubles)
            })),
            Lanes::Integers => {
                let register = random.wide();
                let shift = random.below(64) as u32;
                let sixty_four = random.below(2) == 0;
                if sixty_four {
                    crate::float::lanes::map::<i64>(register, |lane| lane >> shift)
                } else {
                    crate::float::lanes::map::<i32>(register, |lane| lane >> (shift & 31))
                }
            }
        }
    }

    /// All pairs of special operands, then random ones.
    fn pairs(&mut self, lanes: Lanes) -> Vec<(u128, u128)> {
        let mut pairs = Vec::new();
        match lanes {
            Lanes::Singles => {
                for chunk in self.singles.chunks(4) {
                    let a = u32::join(std::array::from_fn(|lane| chunk[lane % chunk.len()]));
                    for b in &self.singles {
                        pairs.push((a, u32::join([*b; 4])));
                        pairs.push((u32::join([*b; 4]), a));
                        pairs.push((a.rotate_right(32), u32::join([*b; 4])));
                    }
                }
            }
            Lanes::Doubles => {
                for a in &self.doubles {
                    for b in self.doubles.chunks(2) {
                        pairs.push((u64::join([*a; 2]), u64::join([b[0], b[b.len() - 1]])));
                    }
                }
            }
            Lanes::Integers => {}
        }
        for _ in 0..4000 {
            pairs.push((self.register(lanes), self.register(lanes)));
        }
        pairs
    }
}

struct Case {
    name: &'static str,
    host: host::Arithmetic,
    portable: portable::Arithmetic,
    lanes: Lanes,
}

macro_rules! cases {
    ($($lanes:ident: $($name:ident)*;)*) => {
        [$($(Case {
            name: stringify!($name),
            host: host::$name,
            portable: portable::$name,
            lanes: Lanes::$lanes,
        }),*),*]
    };
}

#[test]
fn arithmetic_is_that_of_the_host() {
    let cases = cases! {
        Singles: addps addss subps subss mulps mulss divps divss minps minss maxps maxss sqrtps
            sqrtss addsubps haddps hsubps cmpeqps cmpeqss cmpltps cmpltss cmpleps cmpless
            cmpunordps cmpunordss cvtps2pd cvtss2sd cvtps2dq cvttps2dq roundps roundss;
        Doubles: addpd addsd subpd subsd mulpd mulsd divpd divsd minpd minsd maxpd maxsd sqrtpd
            sqrtsd addsubpd haddpd hsubpd cmpeqpd cmpeqsd cmpltpd cmpltsd cmplepd cmplesd
            cmpunordpd cmpunordsd cvtpd2ps cvtsd2ss cvtpd2dq cvttpd2dq roundpd roundsd;
        Integers: cvtdq2ps cvtdq2pd cvtsi2ss_32 cvtsi2ss_64 cvtsi2sd_32 cvtsi2sd_64;
    };
    let mut operands = Operands::new();
    for case in &cases {
        let pairs = operands.pairs(case.lanes);
        for mxcsr in modes() {
            for (a, b) in &pairs {
                let mut expected = host::Environment::new(mxcsr);
                let mut found = portable::Environment::new(mxcsr);
                assert_eq!(
                    (
                        format!("{:x}", (case.portable)(*a, *b, &mut found)),
                        format!("{:x}", found.flags())
                    ),
                    (
                        format!("{:x}", (case.host)(*a, *b, &mut expected)),
                        format!("{:x}", expected.flags())
                    ),
                    "{} of {a:#034x} and {b:#034x}, MXCSR {mxcsr:#x}",
                    case.name
                );
            }
        }
    }
}

#[test]
fn conversions_to_integer_registers_are_those_of_the_host() {
    macro_rules! conversions {
        ($($lanes:ident: $($name:ident)*;)*) => {[$($((
            stringify!($name),
            host::$name as host::ToInteger,
            portable::$name as portable::ToInteger,
            Lanes::$lanes,
        )),*),*]};
    }
    let conversions = conversions! {
        Singles: cvtss2si_32 cvtss2si_64 cvttss2si_32 cvttss2si_64;
        Doubles: cvtsd2si_32 cvtsd2si_64 cvttsd2si_32 cvttsd2si_64;
    };
    let mut operands = Operands::new();
    for (name, host, portable, lanes) in conversions {
        let pairs = operands.pairs(lanes);
        for mxcsr in modes() {
            for (a, _) in &pairs {
                let mut expected = host::Environment::new(mxcsr);
                let mut found = portable::Environment::new(mxcsr);
                assert_eq!(
                    (portable(*a, &mut found), found.flags()),
                    (host(*a, &mut expected), expected.flags()),
                    "{name} of {a:#034x}, MXCSR {mxcsr:#x}"
                );
            }
        }
    }
}

#[test]
fn comparisons_are_those_of_the_host() {
    macro_rules! comparisons {
        ($($lanes:ident: $($name:ident)*;)*) => {[$($((
            stringify!($name),
            host::$name as host::Compare,
            portable::$name as portable::Compare,
            Lanes::$lanes,
        )),*),*]};
    }
    let comparisons = comparisons! {
        Singles: comiss ucomiss;
        Doubles: comisd ucomisd;
    };
    let mut operands = Operands::new();
    for (name, host, portable, lanes) in comparisons {
        let pairs = operands.pairs(lanes);
        for mxcsr in modes() {
            for (a, b) in &pairs {
                let mut expected = host::Environment::new(mxcsr);
                let mut found = portable::Environment::new(mxcsr);
                assert_eq!(
                    (portable(*a, *b, &mut found), found.flags()),
                    (host(*a, *b, &mut expected), expected.flags()),
                    "{name} of {a:#034x} and {b:#034x}, MXCSR {mxcsr:#x}"
                );
            }
        }
    }
}

/// The same number, or two that are each within the relative error that the manual allows of
/// the true one.
fn is_estimate(host: u32, portable: u32) -> bool {
    let (expected, found) = (f32::from_bits(host), f32::from_bits(portable));
    if !found.is_normal() || !expected.is_normal() {
        // At the edge of the range one may be zero already and the other not yet.
        let edge = f32::MIN_POSITIVE * 1.01;
        return host == portable || expected.abs() <= edge && found.abs() <= edge;
    }
    let error = (f64::from(expected) - f64::from(found)).abs() / f64::from(found).abs();
    error <= 1.51 / 4096.0
}

#[test]
fn estimates_are_within_their_error() {
    let cases = cases! { Singles: rcpps rcpss rsqrtps rsqrtss; };
    let mut operands = Operands::new();
    for case in &cases {
        for (a, b) in operands.pairs(case.lanes) {
            for mxcsr in modes() {
                let mut expected = host::Environment::new(mxcsr);
                let mut found = portable::Environment::new(mxcsr);
                let host = u32::split((case.host)(a, b, &mut expected));
                let portable = u32::split((case.portable)(a, b, &mut found));
                let same = host
                    .iter()
                    .zip(&portable)
                    .all(|(host, portable)| is_estimate(*host, *portable));
                assert!(
                    same && found.flags() == expected.flags(),
                    "{} of {a:#034x} and {b:#034x}: {portable:x?} rather than {host:x?}",
                    case.name
                );
            }
        }
    }
}

#[test]
fn flags_that_are_dropped_are_gone() {
    const PRECISION: u32 = 1 << 5;
    let third = |environment: &mut portable::Environment| {
        portable::divss(
            1.0_f32.to_bits().into(),
            3.0_f32.to_bits().into(),
            environment,
        )
    };
    let mut environment = portable::Environment::new(0x1fbf);
    assert_eq!(environment.flags(), 0);
    third(&mut environment);
    assert_eq!(environment.flags(), PRECISION);
    environment.drop_flags(PRECISION);
    assert_eq!(environment.flags(), 0);
}
