//! SSE floating point: the host's result, and whether #XM comes instead (SDM vol. 1, 11.5).
//!
//! Everything here takes MXCSR to be updated and returns `None` when an unmasked exception was
//! found: MXCSR then has the flags, and the destination must stay as it was.
//!
//! One deviation is known: beside an *unmasked* overflow or underflow, PE tells whether the masked
//! result is inexact, and not whether the result with an unbounded exponent would be.

use super::host::{self, Arithmetic, Compare, Environment, ToInteger};
use super::lanes::{Lane, from_index};

const INVALID: u32 = 1 << 0;
const DENORMAL: u32 = 1 << 1;
const DIVIDE: u32 = 1 << 2;
pub(super) const UNDERFLOW: u32 = 1 << 4;
const PRECISION: u32 = 1 << 5;
/// Exceptions that are found before the result is computed.
const BEFORE: u32 = INVALID | DENORMAL | DIVIDE;
const FLUSH: u32 = 1 << 15;
const ROUNDING: u32 = 3 << 13;

/// Which lanes of a result can be too small for their format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tiny {
    /// None: comparisons, minimum, conversions to integers.
    Never,
    /// The lowest lanes, of single precision.
    Single(u8),
    /// The lowest lanes, of double precision.
    Double(u8),
    /// The lowest lanes, of half precision.
    #[cfg(target_arch = "x86_64")]
    Half(u8),
}

impl Tiny {
    /// Some lane of `result` is denormal.
    pub(super) fn in_result(self, result: u128) -> bool {
        match self {
            Self::Never => false,
            Self::Single(count) => u32::split(result)[..usize::from(count)]
                .iter()
                .any(|lane| lane & 0x7f80_0000 == 0 && lane << 1 != 0),
            Self::Double(count) => u64::split(result)[..usize::from(count)]
                .iter()
                .any(|lane| lane & (0x7ff << 52) == 0 && lane << 1 != 0),
            #[cfg(target_arch = "x86_64")]
            Self::Half(count) => u16::split(result)[..usize::from(count)]
                .iter()
                .any(|lane| lane & 0x7c00 == 0 && lane << 1 != 0),
        }
    }
}

pub(super) fn unmasked(mxcsr: u32) -> u32 {
    !(mxcsr >> 7) & 0x3f
}

/// Enters `flags` in MXCSR; `None` when one of them is unmasked.
pub(super) fn settle(mxcsr: &mut u32, flags: u32) -> Option<()> {
    let unmasked = unmasked(*mxcsr);
    if flags & unmasked & BEFORE != 0 {
        *mxcsr |= flags & BEFORE;
        return None;
    }
    *mxcsr |= flags;
    (flags & unmasked == 0).then_some(())
}

/// The modes in which an operation that can raise underflow runs: flushing, and underflow without loss
/// of precision being none, hold for masked underflow only. The second tells whether tiny results are to
/// be caught.
pub(super) fn modes(mxcsr: u32) -> (u32, bool) {
    let catches_tiny = unmasked(mxcsr) & UNDERFLOW != 0;
    let modes = if catches_tiny { mxcsr & !FLUSH } else { mxcsr };
    (modes, catches_tiny)
}

/// Runs `f` in the modes of `mxcsr`; the result and the flags that it raises.
fn observe<T>(
    mxcsr: u32,
    tiny: impl Fn(&T) -> bool,
    f: impl FnOnce(&mut Environment) -> T,
) -> (T, u32) {
    let (modes, catches_tiny) = modes(mxcsr);
    let mut environment = Environment::new(modes);
    let result = f(&mut environment);
    let mut flags = environment.flags();
    if catches_tiny && tiny(&result) {
        flags |= UNDERFLOW;
    }
    (result, flags)
}

/// Runs `f` in the modes of `mxcsr`.
fn attempt<T>(
    mxcsr: &mut u32,
    tiny: impl Fn(&T) -> bool,
    f: impl FnOnce(&mut Environment) -> T,
) -> Option<T> {
    let (result, flags) = observe(*mxcsr, tiny, f);
    settle(mxcsr, flags).map(|()| result)
}

/// Arithmetic, conversions within the XMM registers.
pub(super) fn compute(
    f: Arithmetic,
    tiny: Tiny,
    (a, b): (u128, u128),
    mxcsr: &mut u32,
) -> Option<u128> {
    attempt(
        mxcsr,
        |result| tiny.in_result(*result),
        |environment| f(a, b, environment),
    )
}

/// Conversion to an integer register.
pub(super) fn to_integer(f: ToInteger, source: u128, mxcsr: &mut u32) -> Option<u64> {
    attempt(mxcsr, |_| false, |environment| f(source, environment))
}

/// COMISS and its family: the flags of RFLAGS.
pub(super) fn compare(f: Compare, (a, b): (u128, u128), mxcsr: &mut u32) -> Option<u64> {
    attempt(mxcsr, |_| false, |environment| f(a, b, environment))
}

/// CMPPS and its family: `predicates` are equal, less, less or equal, unordered.
pub(super) fn predicate(
    predicates: [Arithmetic; 4],
    lane_mask: u128,
    (a, b): (u128, u128),
    control: u8,
    mxcsr: &mut u32,
) -> Option<u128> {
    let f = predicates[usize::from(control & 3)];
    let result = compute(f, Tiny::Never, (a, b), mxcsr)?;
    Some(if control & 4 != 0 {
        result ^ lane_mask
    } else {
        result
    })
}

/// ROUNDPS and its family.
pub(super) fn round(
    f: Arithmetic,
    (a, b): (u128, u128),
    control: u8,
    mxcsr: &mut u32,
) -> Option<u128> {
    const USE_MXCSR: u8 = 1 << 2;
    const SUPPRESS_PRECISION: u8 = 1 << 3;
    let mut modes = *mxcsr;
    if control & USE_MXCSR == 0 {
        modes = modes & !ROUNDING | u32::from(control & 3) << 13;
    }
    let mut environment = Environment::new(modes);
    let result = f(a, b, &mut environment);
    if control & SUPPRESS_PRECISION != 0 {
        environment.drop_flags(PRECISION);
    }
    settle(mxcsr, environment.flags()).map(|()| result)
}

/// The steps of a dot product.
struct Dot {
    multiply: Arithmetic,
    add_pairs: Arithmetic,
    tiny: Tiny,
}

impl Dot {
    /// One step on all halves of a register, whose exceptions come together.
    fn step<const N: usize>(
        &self,
        f: Arithmetic,
        operands: [(u128, u128); N],
        mxcsr: &mut u32,
    ) -> Option<[u128; N]> {
        let mut raised = 0;
        let results = operands.map(|(a, b)| {
            let tiny = |result: &u128| self.tiny.in_result(*result);
            let (result, flags) = observe(*mxcsr, tiny, |environment| f(a, b, environment));
            raised |= flags;
            result
        });
        settle(mxcsr, raised).map(|()| results)
    }
}

fn dot<T: Lane, const N: usize>(
    steps: &Dot,
    halves: [(u128, u128); N],
    control: u8,
    mxcsr: &mut u32,
) -> Option<[u128; N]> {
    let count = T::split(0).as_ref().len();
    let select = |register: u128, mask: u8| {
        let lanes = T::split(register);
        from_index::<T>(|index| {
            if mask >> index & 1 != 0 {
                lanes.as_ref()[index]
            } else {
                T::default()
            }
        })
    };
    let factors = halves.map(|(a, b)| (select(a, control >> 4), select(b, control >> 4)));
    let mut sums = steps.step(steps.multiply, factors, mxcsr)?;
    let mut width = count;
    while width > 1 {
        let pairs = sums.map(|sum| (sum, sum));
        sums = steps.step(steps.add_pairs, pairs, mxcsr)?;
        width /= 2;
    }
    Some(sums.map(|sum| select(sum, control)))
}

/// DPPS, on one half of a register or on both.
pub(super) fn dpps<const N: usize>(
    halves: [(u128, u128); N],
    control: u8,
    mxcsr: &mut u32,
) -> Option<[u128; N]> {
    let steps = Dot {
        multiply: host::mulps,
        add_pairs: host::haddps,
        tiny: Tiny::Single(4),
    };
    dot::<u32, N>(&steps, halves, control, mxcsr)
}

/// DPPD.
pub(super) fn dppd(ab: (u128, u128), control: u8, mxcsr: &mut u32) -> Option<u128> {
    let steps = Dot {
        multiply: host::mulpd,
        add_pairs: host::haddpd,
        tiny: Tiny::Double(2),
    };
    dot::<u64, 1>(&steps, [ab], control, mxcsr).map(|[sum]| sum)
}
