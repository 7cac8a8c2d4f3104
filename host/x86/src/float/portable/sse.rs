//! SSE arithmetic (SDM vol. 1, 11.5; NaNs: table 4-7).

use super::super::lanes::Lane;
use super::format::{DOUBLE, Format, SINGLE};
use super::number::{Class, Extremes, Integer, Mode, Number, Operand, Value};
use super::number::{add, divide, multiply, round, square_root, subtract};
use super::{DENORMAL, DIVIDE, INVALID, PRECISION};

/// Modes and flags of SSE arithmetic, in MXCSR's layout.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Environment {
    mxcsr: u32,
}

const FLAGS: u32 = 0x3f;
const DENORMALS_ARE_ZEROS: u32 = 1 << 6;
const FLUSH: u32 = 1 << 15;

impl Environment {
    /// Takes the modes from `mxcsr`; no flag is set yet.
    pub(in super::super) fn new(mxcsr: u32) -> Self {
        Self {
            mxcsr: mxcsr & !FLAGS,
        }
    }

    /// The flags of all operations since.
    pub(in super::super) fn flags(self) -> u32 {
        self.mxcsr & FLAGS
    }

    /// Forgets flags that are set in `flags`.
    pub(in super::super) fn drop_flags(&mut self, flags: u32) {
        self.mxcsr &= !(flags & FLAGS);
    }

    fn raise(&mut self, flags: u32) {
        self.mxcsr |= flags;
    }

    fn mode(self) -> Mode {
        Mode::from_field(self.mxcsr >> 13)
    }

    /// Reads an operand; denormals are zeros if MXCSR says so.
    fn unpack<T: Scalar>(self, bits: T) -> Operand {
        let operand = T::FORMAT.unpack(bits.to_bits());
        if operand.denormal && self.mxcsr & DENORMALS_ARE_ZEROS != 0 {
            Operand {
                class: Class::Zero,
                denormal: false,
                ..operand
            }
        } else {
            operand
        }
    }

    /// Rounds a result and takes its flags.
    fn finish<T: Scalar>(&mut self, value: Value) -> T {
        let format = T::FORMAT;
        T::from_bits(match value {
            Value::Zero(negative) => format.zero(negative),
            Value::Infinity(negative) => format.infinity(negative),
            Value::Invalid => {
                self.raise(INVALID);
                format.indefinite()
            }
            Value::DivisionByZero(negative) => {
                self.raise(DIVIDE);
                format.infinity(negative)
            }
            Value::Finite(number) => {
                let extremes = if self.mxcsr & FLUSH != 0 {
                    Extremes::Flush
                } else {
                    Extremes::Gradual
                };
                let rounded = round(number, format.target(), self.mode(), extremes);
                self.raise(rounded.flags);
                format.pack(number.negative, rounded)
            }
        })
    }
}

/// Two registers in, one out: most of SSE. Scalar forms, and those that take integers or MMX-sized
/// operands, look at no more of the source than they should.
pub(in super::super) type Arithmetic = fn(u128, u128, &mut Environment) -> u128;

/// One register in, an integer out.
pub(in super::super) type ToInteger = fn(u128, &mut Environment) -> u64;

/// Two registers in, the flags ZF, PF and CF in RFLAGS' places out.
pub(in super::super) type Compare = fn(u128, u128, &mut Environment) -> u64;

/// A lane as a number.
trait Scalar: Lane {
    const FORMAT: Format;
    /// All bits set: what a comparison that holds gives.
    const TRUE: Self;

    fn to_bits(self) -> u64;
    fn from_bits(bits: u64) -> Self;
}

impl Scalar for u32 {
    const FORMAT: Format = SINGLE;
    const TRUE: Self = Self::MAX;

    fn to_bits(self) -> u64 {
        self.into()
    }

    fn from_bits(bits: u64) -> Self {
        bits as Self
    }
}

impl Scalar for u64 {
    const FORMAT: Format = DOUBLE;
    const TRUE: Self = Self::MAX;

    fn to_bits(self) -> u64 {
        self
    }

    fn from_bits(bits: u64) -> Self {
        bits
    }
}

/// Lane by lane.
fn packed<T: Scalar>(a: u128, b: u128, mut f: impl FnMut(T, T) -> T) -> u128 {
    let (mut lanes, others) = (T::split(a), T::split(b));
    for (lane, other) in lanes.as_mut().iter_mut().zip(others.as_ref()) {
        *lane = f(*lane, *other);
    }
    T::join(lanes)
}

/// The lowest lane; the others are those of `a`.
fn scalar<T: Scalar>(a: u128, b: u128, f: impl FnOnce(T, T) -> T) -> u128 {
    let mut lanes = T::split(a);
    let result = f(lowest(a), lowest(b));
    lanes.as_mut()[0] = result;
    T::join(lanes)
}

fn lowest<T: Scalar>(register: u128) -> T {
    T::split(register).as_ref()[0]
}

/// A NaN that comes through an operation: the first operand's if it is one, made quiet.
fn propagate<T: Scalar>(a: T, b: T, a_is_nan: bool) -> T {
    let bits = if a_is_nan { a } else { b }.to_bits();
    T::from_bits(bits | T::FORMAT.quiet())
}

fn denormal(operands: &[Operand]) -> u32 {
    if operands.iter().any(|operand| operand.denormal) {
        DENORMAL
    } else {
        0
    }
}

type Operation = fn(&Operand, &Operand, Mode) -> Value;

fn arithmetic<T: Scalar>(operation: Operation, a: T, b: T, environment: &mut Environment) -> T {
    let (x, y) = (environment.unpack(a), environment.unpack(b));
    if x.is_nan() || y.is_nan() {
        environment.raise(x.invalid() | y.invalid());
        return propagate(a, b, x.is_nan());
    }
    let value = operation(&x, &y, environment.mode());
    if !matches!(value, Value::Invalid | Value::DivisionByZero(_)) {
        environment.raise(denormal(&[x, y]));
    }
    environment.finish(value)
}

fn root<T: Scalar>(b: T, environment: &mut Environment) -> T {
    let operand = environment.unpack(b);
    if operand.is_nan() {
        environment.raise(operand.invalid());
        return propagate(b, b, true);
    }
    let value = square_root(&operand);
    if value != Value::Invalid {
        environment.raise(denormal(&[operand]));
    }
    environment.finish(value)
}

/// Less, equal or greater; `None` is unordered.
pub(super) fn order(a: &Operand, b: &Operand) -> Option<std::cmp::Ordering> {
    use std::cmp::Ordering;
    let rank = |operand: &Operand| match operand.class {
        Class::Zero => Some((0, 0, 0)),
        Class::Finite(number) => Some((1, number.exponent, number.significand)),
        Class::Infinity => Some((2, 0, 0)),
        _ => None,
    };
    let (x, y) = (rank(a)?, rank(b)?);
    let magnitude = x.cmp(&y);
    Some(match (a.negative, b.negative) {
        _ if x.0 == 0 && y.0 == 0 => Ordering::Equal,
        (false, false) => magnitude,
        (true, true) => magnitude.reverse(),
        (true, false) => Ordering::Less,
        (false, true) => Ordering::Greater,
    })
}

/// Compares and raises: quiet NaNs are invalid to comparisons that `signal`.
fn compared<T: Scalar>(
    a: T,
    b: T,
    signals: bool,
    environment: &mut Environment,
) -> Option<std::cmp::Ordering> {
    let (x, y) = (environment.unpack(a), environment.unpack(b));
    let order = order(&x, &y);
    environment.raise(match order {
        Some(_) => denormal(&[x, y]),
        None if signals => INVALID,
        None => x.invalid() | y.invalid(),
    });
    order
}

fn extreme<T: Scalar>(wanted: std::cmp::Ordering, a: T, b: T, environment: &mut Environment) -> T {
    let chosen = if compared(a, b, true, environment) == Some(wanted) {
        a
    } else {
        b
    };
    let operand = environment.unpack(chosen);
    if operand.class == Class::Zero {
        T::from_bits(T::FORMAT.zero(operand.negative))
    } else {
        chosen
    }
}

/// The predicates of CMPPS that are not the negation of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Predicate {
    Equal,
    Less,
    LessOrEqual,
    Unordered,
}

fn predicate<T: Scalar>(p: Predicate, a: T, b: T, environment: &mut Environment) -> T {
    let signals = matches!(p, Predicate::Less | Predicate::LessOrEqual);
    let order = compared(a, b, signals, environment);
    let holds = match p {
        Predicate::Equal => order.is_some_and(std::cmp::Ordering::is_eq),
        Predicate::Less => order.is_some_and(std::cmp::Ordering::is_lt),
        Predicate::LessOrEqual => order.is_some_and(std::cmp::Ordering::is_le),
        Predicate::Unordered => order.is_none(),
    };
    if holds { T::TRUE } else { T::default() }
}

fn flags_of<T: Scalar>(a: u128, b: u128, signals: bool, environment: &mut Environment) -> u64 {
    compare_flags(compared::<T>(lowest(a), lowest(b), signals, environment))
}

/// An order as ZF, PF and CF.
pub(super) fn compare_flags(order: Option<std::cmp::Ordering>) -> u64 {
    use std::cmp::Ordering;
    match order {
        None => 0x45,
        Some(Ordering::Less) => 0x01,
        Some(Ordering::Equal) => 0x40,
        Some(Ordering::Greater) => 0,
    }
}

/// RCPPS and RSQRTPS: no flags, no modes, no denormals.
fn estimate(bits: u32, f: impl FnOnce(f32) -> f32) -> u32 {
    const SIGN: u32 = 1 << 31;
    let operand = SINGLE.unpack(bits.into());
    if operand.is_nan() {
        return bits | SINGLE.quiet() as u32;
    }
    let flush = |bits: u32| {
        if SINGLE.unpack(bits.into()).denormal {
            bits & SIGN
        } else {
            bits
        }
    };
    let result = f(f32::from_bits(flush(bits)));
    if result.is_nan() {
        SINGLE.indefinite() as u32
    } else {
        flush(result.to_bits())
    }
}

fn reciprocal(bits: u32) -> u32 {
    estimate(bits, |value| 1.0 / value)
}

fn reciprocal_root(bits: u32) -> u32 {
    estimate(bits, |value| (1.0 / f64::from(value).sqrt()) as f32)
}

/// Sum or difference of neighbours: those of `a`, then those of `b`.
fn horizontal<T: Scalar>(f: Operation, a: u128, b: u128, environment: &mut Environment) -> u128 {
    let (x, y) = (T::split(a), T::split(b));
    let half = x.as_ref().len() / 2;
    let mut result = T::split(0);
    for (index, lane) in result.as_mut().iter_mut().enumerate() {
        let from = if index < half { &x } else { &y }.as_ref();
        let pair = index % half * 2;
        *lane = arithmetic(f, from[pair], from[pair + 1], environment);
    }
    T::join(result)
}

/// Differences in even lanes, sums in odd ones.
fn alternating<T: Scalar>(a: u128, b: u128, environment: &mut Environment) -> u128 {
    let operations: [Operation; 2] = [subtract, add];
    let mut turns = operations.iter().cycle();
    packed::<T>(a, b, |a, b| {
        let operation = turns.next().copied().unwrap_or(add);
        arithmetic(operation, a, b, environment)
    })
}

macro_rules! packed {
    ($($name:ident: $t:ty, $f:expr;)*) => {$(
        pub(in super::super) fn $name(a: u128, b: u128, environment: &mut Environment) -> u128 {
            let f: fn($t, $t, &mut Environment) -> $t = $f;
            packed::<$t>(a, b, |a, b| f(a, b, environment))
        }
    )*};
}

macro_rules! scalar {
    ($($name:ident: $t:ty, $f:expr;)*) => {$(
        pub(in super::super) fn $name(a: u128, b: u128, environment: &mut Environment) -> u128 {
            let f: fn($t, $t, &mut Environment) -> $t = $f;
            scalar::<$t>(a, b, |a, b| f(a, b, environment))
        }
    )*};
}

/// The four forms of an operation.
macro_rules! forms {
    ($($ps:ident, $pd:ident, $ss:ident, $sd:ident: $f:expr;)*) => {$(
        packed! { $ps: u32, $f; $pd: u64, $f; }
        scalar! { $ss: u32, $f; $sd: u64, $f; }
    )*};
}

forms! {
    addps, addpd, addss, addsd: |a, b, environment| arithmetic(add, a, b, environment);
    subps, subpd, subss, subsd: |a, b, environment| arithmetic(subtract, a, b, environment);
    mulps, mulpd, mulss, mulsd: |a, b, environment| arithmetic(multiply, a, b, environment);
    divps, divpd, divss, divsd: |a, b, environment| arithmetic(divide, a, b, environment);
    minps, minpd, minss, minsd: |a, b, environment| {
        extreme(std::cmp::Ordering::Less, a, b, environment)
    };
    maxps, maxpd, maxss, maxsd: |a, b, environment| {
        extreme(std::cmp::Ordering::Greater, a, b, environment)
    };
    sqrtps, sqrtpd, sqrtss, sqrtsd: |_, b, environment| root(b, environment);
    cmpeqps, cmpeqpd, cmpeqss, cmpeqsd: |a, b, environment| {
        predicate(Predicate::Equal, a, b, environment)
    };
    cmpltps, cmpltpd, cmpltss, cmpltsd: |a, b, environment| {
        predicate(Predicate::Less, a, b, environment)
    };
    cmpleps, cmplepd, cmpless, cmplesd: |a, b, environment| {
        predicate(Predicate::LessOrEqual, a, b, environment)
    };
    cmpunordps, cmpunordpd, cmpunordss, cmpunordsd: |a, b, environment| {
        predicate(Predicate::Unordered, a, b, environment)
    };
    roundps, roundpd, roundss, roundsd: |_, b, environment| to_integral(b, environment);
}

packed! {
    rcpps: u32, |_, b, _| reciprocal(b);
    rsqrtps: u32, |_, b, _| reciprocal_root(b);
    cvtdq2ps: u32, |_, b, environment| from_integer(i64::from(b as i32), environment);
    cvtps2dq: u32, |_, b, environment| {
        to_integer(b, environment.mode(), Width::Dword, environment) as u32
    };
    cvttps2dq: u32, |_, b, environment| {
        to_integer(b, Mode::Truncate, Width::Dword, environment) as u32
    };
}

scalar! {
    rcpss: u32, |_, b, _| reciprocal(b);
    rsqrtss: u32, |_, b, _| reciprocal_root(b);
}

macro_rules! whole {
    ($($name:ident: $f:expr;)*) => {$(
        pub(in super::super) fn $name(a: u128, b: u128, environment: &mut Environment) -> u128 {
            let f: Arithmetic = $f;
            f(a, b, environment)
        }
    )*};
}

whole! {
    addsubps: alternating::<u32>;
    addsubpd: alternating::<u64>;
    haddps: |a, b, environment| horizontal::<u32>(add, a, b, environment);
    haddpd: |a, b, environment| horizontal::<u64>(add, a, b, environment);
    hsubps: |a, b, environment| horizontal::<u32>(subtract, a, b, environment);
    hsubpd: |a, b, environment| horizontal::<u64>(subtract, a, b, environment);
    cvtps2pd: |_, b, environment| {
        let lanes = u32::split(b);
        u64::join([convert(lanes[0], environment), convert(lanes[1], environment)])
    };
    cvtpd2ps: |_, b, environment| {
        let lanes = u64::split(b);
        u32::join([convert(lanes[0], environment), convert(lanes[1], environment), 0, 0])
    };
    cvtss2sd: |a, b, environment| replace(a, convert::<u32, u64>(lowest(b), environment));
    cvtsd2ss: |a, b, environment| replace(a, convert::<u64, u32>(lowest(b), environment));
    cvtdq2pd: |_, b, environment| {
        let lanes = i32::split(b);
        let mut lane = |index: usize| from_integer(i64::from(lanes[index]), environment);
        u64::join([lane(0), lane(1)])
    };
    cvtpd2dq: |_, b, environment| doubles_to_integers(b, environment.mode(), environment);
    cvttpd2dq: |_, b, environment| doubles_to_integers(b, Mode::Truncate, environment);
    cvtsi2ss_32: |a, b, environment| {
        replace::<u32>(a, from_integer(i64::from(b as i32), environment))
    };
    cvtsi2ss_64: |a, b, environment| replace::<u32>(a, from_integer(b as i64, environment));
    cvtsi2sd_32: |a, b, environment| {
        replace::<u64>(a, from_integer(i64::from(b as i32), environment))
    };
    cvtsi2sd_64: |a, b, environment| replace::<u64>(a, from_integer(b as i64, environment));
}

/// `a` with another lowest lane.
fn replace<T: Scalar>(a: u128, lane: T) -> u128 {
    scalar::<T>(a, 0, |_, _| lane)
}

/// From one format to another.
fn convert<From: Scalar, To: Scalar>(source: From, environment: &mut Environment) -> To {
    let operand = environment.unpack(source);
    environment.raise(operand.invalid() | denormal(&[operand]));
    match operand.class {
        Class::QuietNan(significand) | Class::SignallingNan(significand) => {
            let bits = To::FORMAT.nan(operand.negative, significand);
            To::from_bits(bits | To::FORMAT.quiet())
        }
        _ => environment.finish(operand.value()),
    }
}

fn from_integer<T: Scalar>(value: i64, environment: &mut Environment) -> T {
    let number = Number::integer(value < 0, value.unsigned_abs().into());
    environment.finish(number.map_or(Value::Zero(false), Value::Finite))
}

/// The size of an integer result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Dword,
    Qword,
}

/// To a signed integer; what does not fit becomes the least one.
fn to_integer<T: Scalar>(
    source: T,
    mode: Mode,
    width: Width,
    environment: &mut Environment,
) -> u64 {
    let least = match width {
        Width::Dword => 1_u64 << 31,
        Width::Qword => 1 << 63,
    };
    let operand = environment.unpack(source);
    let integer = match operand.class {
        Class::Zero => return 0,
        Class::Finite(number) => number.to_integer(mode),
        _ => None,
    };
    let limit = u128::from(least) - u128::from(!operand.negative);
    match integer {
        Some(Integer {
            magnitude, inexact, ..
        }) if magnitude <= limit => {
            environment.raise(if inexact { PRECISION } else { 0 });
            let magnitude = magnitude as u64;
            let value = if operand.negative {
                magnitude.wrapping_neg()
            } else {
                magnitude
            };
            value & (least | (least - 1))
        }
        _ => {
            environment.raise(INVALID);
            least
        }
    }
}

fn doubles_to_integers(source: u128, mode: Mode, environment: &mut Environment) -> u128 {
    let lanes = u64::split(source);
    let low = to_integer(lanes[0], mode, Width::Dword, environment);
    let high = to_integer(lanes[1], mode, Width::Dword, environment);
    u128::from(high << 32 | low)
}

/// To an integer in the same format.
fn to_integral<T: Scalar>(source: T, environment: &mut Environment) -> T {
    let operand = environment.unpack(source);
    let number = match operand.class {
        Class::Finite(number) => number,
        Class::Zero => return T::from_bits(T::FORMAT.zero(operand.negative)),
        Class::Infinity => return source,
        _ => {
            environment.raise(operand.invalid());
            return propagate(source, source, true);
        }
    };
    match number.to_integer(environment.mode()) {
        Some(integer) if integer.inexact => {
            environment.raise(PRECISION);
            let number = Number::integer(operand.negative, integer.magnitude);
            environment.finish(number.map_or(Value::Zero(operand.negative), Value::Finite))
        }
        _ => source,
    }
}

macro_rules! to_integer {
    ($($name:ident: $t:ty, $width:ident, $truncates:literal;)*) => {$(
        pub(in super::super) fn $name(source: u128, environment: &mut Environment) -> u64 {
            let mode = if $truncates { Mode::Truncate } else { environment.mode() };
            to_integer(lowest::<$t>(source), mode, Width::$width, environment)
        }
    )*};
}

to_integer! {
    cvtss2si_32: u32, Dword, false;
    cvtss2si_64: u32, Qword, false;
    cvttss2si_32: u32, Dword, true;
    cvttss2si_64: u32, Qword, true;
    cvtsd2si_32: u64, Dword, false;
    cvtsd2si_64: u64, Qword, false;
    cvttsd2si_32: u64, Dword, true;
    cvttsd2si_64: u64, Qword, true;
}

macro_rules! compare {
    ($($name:ident: $t:ty, $signals:literal;)*) => {$(
        pub(in super::super) fn $name(a: u128, b: u128, environment: &mut Environment) -> u64 {
            flags_of::<$t>(a, b, $signals, environment)
        }
    )*};
}

compare! {
    comiss: u32, true;
    comisd: u64, true;
    ucomiss: u32, false;
    ucomisd: u64, false;
}
