//! The form in which a processor's state travels.
//!
//! [`SavedCpu`] is the body of a saved state of kind [`KIND`]. A field's number never changes its
//! meaning; a new field gets a new number and [`VERSION`] goes up when an older reader must not
//! ignore it. What arrives becomes a [`CpuState`] only through `TryFrom`, which refuses what no
//! processor can be in; an engine checks further against what it offers.

use prost::Message;

use crate::state::{
    Activity, CpuState, DescriptorTable, LocalApicState, Msrs, PendingEvents, Segment,
};

/// The kind of saved state that a processor is.
pub const KIND: &str = "x86-cpu";
/// Version of the schema.
pub const VERSION: u32 = 1;

/// Bytes of an XSAVE area that are accepted: the legacy region and header at least, all of
/// AVX-512 and tiles at most.
const XSAVE_BYTES: std::ops::RangeInclusive<usize> = 576..=16384;

const CR0_PE: u64 = 1 << 0;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Why a saved processor was refused.
#[derive(Debug, thiserror::Error)]
pub enum SavedCpuError {
    /// The bytes are no message.
    #[error("saved processor does not decode")]
    Malformed(#[from] prost::DecodeError),
    /// A part is missing or has the wrong length.
    #[error("saved processor lacks {what}: found {found}, expected {expected}")]
    Count {
        /// The part.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there must be (at least).
        expected: usize,
    },
    /// A value does not fit the register.
    #[error("saved processor has {what} = {value:#x}, which cannot be")]
    Value {
        /// The register.
        what: &'static str,
        /// Its value.
        value: u64,
    },
}

/// [`Segment`] on the wire.
#[derive(Clone, PartialEq, Message)]
#[expect(missing_docs, reason = "fields are those of `Segment`")]
pub struct SavedSegment {
    #[prost(uint32, tag = "1")]
    pub selector: u32,
    #[prost(fixed64, tag = "2")]
    pub base: u64,
    #[prost(uint32, tag = "3")]
    pub limit: u32,
    #[prost(uint32, tag = "4")]
    pub access: u32,
    #[prost(bool, tag = "5")]
    pub unusable: bool,
}

/// [`DescriptorTable`] on the wire.
#[derive(Clone, PartialEq, Message)]
#[expect(missing_docs, reason = "fields are those of `DescriptorTable`")]
pub struct SavedTable {
    #[prost(fixed64, tag = "1")]
    pub base: u64,
    #[prost(uint32, tag = "2")]
    pub limit: u32,
}

/// [`Msrs`] on the wire.
#[derive(Clone, PartialEq, Message)]
#[expect(missing_docs, reason = "fields are those of `Msrs`")]
pub struct SavedMsrs {
    #[prost(uint64, tag = "1")]
    pub efer: u64,
    #[prost(fixed64, tag = "2")]
    pub star: u64,
    #[prost(fixed64, tag = "3")]
    pub lstar: u64,
    #[prost(fixed64, tag = "4")]
    pub cstar: u64,
    #[prost(uint64, tag = "5")]
    pub sfmask: u64,
    #[prost(fixed64, tag = "6")]
    pub kernel_gs_base: u64,
    #[prost(uint64, tag = "7")]
    pub sysenter_cs: u64,
    #[prost(fixed64, tag = "8")]
    pub sysenter_esp: u64,
    #[prost(fixed64, tag = "9")]
    pub sysenter_eip: u64,
    #[prost(fixed64, tag = "10")]
    pub pat: u64,
    #[prost(uint64, tag = "11")]
    pub misc_enable: u64,
    #[prost(uint64, tag = "12")]
    pub tsc_aux: u64,
    #[prost(fixed64, tag = "13")]
    pub tsc_adjust: u64,
    #[prost(uint64, tag = "14")]
    pub mtrr_def_type: u64,
    #[prost(uint64, tag = "15")]
    pub kvmclock_system_time: u64,
    #[prost(uint64, tag = "16")]
    pub kvmclock_wall_clock: u64,
}

/// [`LocalApicState`] on the wire.
#[derive(Clone, PartialEq, Message)]
#[expect(missing_docs, reason = "fields are those of `LocalApicState`")]
pub struct SavedApic {
    #[prost(uint64, tag = "1")]
    pub base: u64,
    #[prost(bytes = "vec", tag = "2")]
    pub registers: Vec<u8>,
    #[prost(uint64, tag = "3")]
    pub tsc_deadline: u64,
}

/// [`PendingEvents`] on the wire.
#[derive(Clone, PartialEq, Message)]
#[expect(missing_docs, reason = "fields are those of `PendingEvents`")]
pub struct SavedEvents {
    #[prost(uint32, optional, tag = "1")]
    pub injected_interrupt: Option<u32>,
    #[prost(bool, tag = "2")]
    pub nmi_pending: bool,
    #[prost(bool, tag = "3")]
    pub nmi_masked: bool,
    #[prost(bool, tag = "4")]
    pub interrupt_shadow: bool,
}

/// [`CpuState`] on the wire.
#[derive(Clone, PartialEq, Message)]
#[expect(missing_docs, reason = "fields are those of `CpuState`")]
pub struct SavedCpu {
    #[prost(fixed64, repeated, tag = "1")]
    pub gpr: Vec<u64>,
    #[prost(fixed64, tag = "2")]
    pub rip: u64,
    #[prost(uint64, tag = "3")]
    pub rflags: u64,
    #[prost(message, repeated, tag = "4")]
    pub segments: Vec<SavedSegment>,
    #[prost(message, optional, tag = "5")]
    pub tr: Option<SavedSegment>,
    #[prost(message, optional, tag = "6")]
    pub ldtr: Option<SavedSegment>,
    #[prost(message, optional, tag = "7")]
    pub gdtr: Option<SavedTable>,
    #[prost(message, optional, tag = "8")]
    pub idtr: Option<SavedTable>,
    #[prost(uint64, tag = "9")]
    pub cr0: u64,
    #[prost(fixed64, tag = "10")]
    pub cr2: u64,
    #[prost(uint64, tag = "11")]
    pub cr3: u64,
    #[prost(uint64, tag = "12")]
    pub cr4: u64,
    #[prost(uint64, tag = "13")]
    pub cr8: u64,
    #[prost(fixed64, repeated, tag = "14")]
    pub dr: Vec<u64>,
    #[prost(uint64, tag = "15")]
    pub dr6: u64,
    #[prost(uint64, tag = "16")]
    pub dr7: u64,
    #[prost(uint64, tag = "17")]
    pub xcr0: u64,
    #[prost(bytes = "vec", tag = "18")]
    pub xsave: Vec<u8>,
    #[prost(message, optional, tag = "19")]
    pub msrs: Option<SavedMsrs>,
    #[prost(uint64, tag = "20")]
    pub tsc: u64,
    #[prost(uint64, tag = "21")]
    pub tsc_khz: u64,
    #[prost(uint64, tag = "22")]
    pub realtime_ns: u64,
    #[prost(uint64, tag = "23")]
    pub kvmclock_ns: u64,
    #[prost(message, optional, tag = "24")]
    pub apic: Option<SavedApic>,
    #[prost(message, optional, tag = "25")]
    pub events: Option<SavedEvents>,
    /// 0 running, 1 halted, 2 waiting for a start-up IPI.
    #[prost(uint32, tag = "26")]
    pub activity: u32,
}

/// Encodes a processor's state.
pub fn encode(state: &CpuState) -> Vec<u8> {
    SavedCpu::from(state).encode_to_vec()
}

/// Decodes a processor's state.
///
/// # Errors
/// [`SavedCpuError`] for bytes that are no state, or a state that no processor can be in.
pub fn decode(bytes: &[u8]) -> Result<CpuState, SavedCpuError> {
    SavedCpu::decode(bytes)?.try_into()
}

impl From<&CpuState> for SavedCpu {
    fn from(state: &CpuState) -> Self {
        // Every field is named: one that is added and not saved must not compile.
        let CpuState {
            gpr,
            rip,
            rflags,
            segments,
            tr,
            ldtr,
            gdtr,
            idtr,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            dr,
            dr6,
            dr7,
            xcr0,
            xsave,
            msrs,
            tsc,
            tsc_khz,
            realtime_ns,
            kvmclock_ns,
            apic,
            events,
            activity,
        } = state;
        Self {
            gpr: gpr.to_vec(),
            rip: *rip,
            rflags: *rflags,
            segments: segments.iter().map(SavedSegment::from).collect(),
            tr: Some(tr.into()),
            ldtr: Some(ldtr.into()),
            gdtr: Some(gdtr.into()),
            idtr: Some(idtr.into()),
            cr0: *cr0,
            cr2: *cr2,
            cr3: *cr3,
            cr4: *cr4,
            cr8: *cr8,
            dr: dr.to_vec(),
            dr6: *dr6,
            dr7: *dr7,
            xcr0: *xcr0,
            xsave: xsave.clone(),
            msrs: Some(msrs.into()),
            tsc: *tsc,
            tsc_khz: *tsc_khz,
            realtime_ns: *realtime_ns,
            kvmclock_ns: *kvmclock_ns,
            apic: Some(apic.into()),
            events: Some(events.into()),
            activity: match activity {
                Activity::Running => 0,
                Activity::Halted => 1,
                Activity::WaitForSipi => 2,
            },
        }
    }
}

impl From<&Segment> for SavedSegment {
    fn from(segment: &Segment) -> Self {
        let Segment {
            selector,
            base,
            limit,
            access,
            unusable,
        } = *segment;
        Self {
            selector: selector.into(),
            base,
            limit,
            access: access.into(),
            unusable,
        }
    }
}

impl From<&DescriptorTable> for SavedTable {
    fn from(table: &DescriptorTable) -> Self {
        let DescriptorTable { base, limit } = *table;
        Self {
            base,
            limit: limit.into(),
        }
    }
}

impl From<&Msrs> for SavedMsrs {
    fn from(msrs: &Msrs) -> Self {
        let Msrs {
            efer,
            star,
            lstar,
            cstar,
            sfmask,
            kernel_gs_base,
            sysenter_cs,
            sysenter_esp,
            sysenter_eip,
            pat,
            misc_enable,
            tsc_aux,
            tsc_adjust,
            mtrr_def_type,
            kvmclock_system_time,
            kvmclock_wall_clock,
        } = *msrs;
        Self {
            efer,
            star,
            lstar,
            cstar,
            sfmask,
            kernel_gs_base,
            sysenter_cs,
            sysenter_esp,
            sysenter_eip,
            pat,
            misc_enable,
            tsc_aux,
            tsc_adjust,
            mtrr_def_type,
            kvmclock_system_time,
            kvmclock_wall_clock,
        }
    }
}

impl From<&LocalApicState> for SavedApic {
    fn from(apic: &LocalApicState) -> Self {
        let LocalApicState {
            base,
            registers,
            tsc_deadline,
        } = apic;
        Self {
            base: *base,
            registers: registers.to_vec(),
            tsc_deadline: *tsc_deadline,
        }
    }
}

impl From<&PendingEvents> for SavedEvents {
    fn from(events: &PendingEvents) -> Self {
        let PendingEvents {
            injected_interrupt,
            nmi_pending,
            nmi_masked,
            interrupt_shadow,
        } = *events;
        Self {
            injected_interrupt: injected_interrupt.map(u32::from),
            nmi_pending,
            nmi_masked,
            interrupt_shadow,
        }
    }
}

impl TryFrom<SavedCpu> for CpuState {
    type Error = SavedCpuError;

    fn try_from(saved: SavedCpu) -> Result<Self, SavedCpuError> {
        let segments = saved
            .segments
            .into_iter()
            .map(Segment::try_from)
            .collect::<Result<Vec<_>, _>>()?;
        let state = Self {
            gpr: exactly(saved.gpr, "general registers")?,
            rip: canonical("RIP", saved.rip)?,
            rflags: within("RFLAGS", saved.rflags, 0x003f_7fd7)?,
            segments: exactly(segments, "segment registers")?,
            tr: required(saved.tr, "the task register")?.try_into()?,
            ldtr: required(saved.ldtr, "LDTR")?.try_into()?,
            gdtr: required(saved.gdtr, "GDTR")?.try_into()?,
            idtr: required(saved.idtr, "IDTR")?.try_into()?,
            cr0: saved.cr0,
            cr2: saved.cr2,
            cr3: saved.cr3,
            cr4: saved.cr4,
            cr8: within("CR8", saved.cr8, 0xf)?,
            dr: exactly(saved.dr, "debug registers")?,
            dr6: within("DR6", saved.dr6, 0xffff_ffff)?,
            dr7: within("DR7", saved.dr7, 0xffff_ffff)?,
            xcr0: saved.xcr0,
            xsave: saved.xsave,
            msrs: required(saved.msrs, "the model-specific registers")?.into(),
            tsc: saved.tsc,
            tsc_khz: saved.tsc_khz,
            realtime_ns: saved.realtime_ns,
            kvmclock_ns: saved.kvmclock_ns,
            apic: required(saved.apic, "the local APIC")?.try_into()?,
            events: required(saved.events, "the pending events")?.try_into()?,
            activity: match saved.activity {
                0 => Activity::Running,
                1 => Activity::Halted,
                2 => Activity::WaitForSipi,
                other => return Err(value("the activity", other.into())),
            },
        };
        check_modes(&state)?;
        Ok(state)
    }
}

/// Combinations of control bits that no instruction sequence can reach.
fn check_modes(state: &CpuState) -> Result<(), SavedCpuError> {
    let (cr0, efer) = (state.cr0, state.msrs.efer);
    let set = |bits| cr0 & bits == bits;
    let paging_without_protection = set(CR0_PG) && !set(CR0_PE);
    let not_write_through_but_cached = set(CR0_NW) && !set(CR0_CD);
    if cr0 >> 32 != 0 || paging_without_protection || not_write_through_but_cached {
        return Err(value("CR0", cr0));
    }
    let long = efer & EFER_LME != 0 && set(CR0_PG);
    if long != (efer & EFER_LMA != 0) {
        return Err(value("EFER", efer));
    }
    if long && state.cr4 & CR4_PAE == 0 {
        return Err(value("CR4", state.cr4));
    }
    if state.xcr0 & 1 == 0 {
        return Err(value("XCR0", state.xcr0));
    }
    if !XSAVE_BYTES.contains(&state.xsave.len()) {
        return Err(SavedCpuError::Count {
            what: "the XSAVE area",
            found: state.xsave.len(),
            expected: *XSAVE_BYTES.start(),
        });
    }
    Ok(())
}

impl TryFrom<SavedSegment> for Segment {
    type Error = SavedCpuError;

    fn try_from(saved: SavedSegment) -> Result<Self, SavedCpuError> {
        let access = narrow("a segment's access rights", saved.access)?;
        Ok(Self {
            selector: narrow("a selector", saved.selector)?,
            base: canonical("a segment's base", saved.base)?,
            limit: saved.limit,
            access: within("a segment's access rights", access.into(), 0xf0ff)? as u16,
            unusable: saved.unusable,
        })
    }
}

impl TryFrom<SavedTable> for DescriptorTable {
    type Error = SavedCpuError;

    fn try_from(saved: SavedTable) -> Result<Self, SavedCpuError> {
        Ok(Self {
            base: canonical("a descriptor table's base", saved.base)?,
            limit: narrow("a descriptor table's limit", saved.limit)?,
        })
    }
}

impl From<SavedMsrs> for Msrs {
    fn from(saved: SavedMsrs) -> Self {
        let SavedMsrs {
            efer,
            star,
            lstar,
            cstar,
            sfmask,
            kernel_gs_base,
            sysenter_cs,
            sysenter_esp,
            sysenter_eip,
            pat,
            misc_enable,
            tsc_aux,
            tsc_adjust,
            mtrr_def_type,
            kvmclock_system_time,
            kvmclock_wall_clock,
        } = saved;
        Self {
            efer,
            star,
            lstar,
            cstar,
            sfmask,
            kernel_gs_base,
            sysenter_cs,
            sysenter_esp,
            sysenter_eip,
            pat,
            misc_enable,
            tsc_aux,
            tsc_adjust,
            mtrr_def_type,
            kvmclock_system_time,
            kvmclock_wall_clock,
        }
    }
}

impl TryFrom<SavedApic> for LocalApicState {
    type Error = SavedCpuError;

    fn try_from(saved: SavedApic) -> Result<Self, SavedCpuError> {
        Ok(Self {
            base: saved.base,
            registers: Box::new(exactly(saved.registers, "bytes of the local APIC's page")?),
            tsc_deadline: saved.tsc_deadline,
        })
    }
}

impl TryFrom<SavedEvents> for PendingEvents {
    type Error = SavedCpuError;

    fn try_from(saved: SavedEvents) -> Result<Self, SavedCpuError> {
        let injected = saved
            .injected_interrupt
            .map(|vector| {
                u8::try_from(vector).map_err(|_too_large| value("a vector", vector.into()))
            })
            .transpose()?;
        Ok(Self {
            injected_interrupt: injected,
            nmi_pending: saved.nmi_pending,
            nmi_masked: saved.nmi_masked,
            interrupt_shadow: saved.interrupt_shadow,
        })
    }
}

fn value(what: &'static str, value: u64) -> SavedCpuError {
    SavedCpuError::Value { what, value }
}

fn within(what: &'static str, bits: u64, allowed: u64) -> Result<u64, SavedCpuError> {
    if bits & !allowed != 0 {
        return Err(value(what, bits));
    }
    Ok(bits)
}

fn narrow(what: &'static str, number: u32) -> Result<u16, SavedCpuError> {
    u16::try_from(number).map_err(|_too_large| value(what, number.into()))
}

/// An address whose upper bits repeat bit 47.
fn canonical(what: &'static str, address: u64) -> Result<u64, SavedCpuError> {
    if ((address << 16) as i64 >> 16) as u64 != address {
        return Err(value(what, address));
    }
    Ok(address)
}

fn required<T>(part: Option<T>, what: &'static str) -> Result<T, SavedCpuError> {
    part.ok_or(SavedCpuError::Count {
        what,
        found: 0,
        expected: 1,
    })
}

fn exactly<T, const N: usize>(parts: Vec<T>, what: &'static str) -> Result<[T; N], SavedCpuError> {
    parts
        .try_into()
        .map_err(|parts: Vec<T>| SavedCpuError::Count {
            what,
            found: parts.len(),
            expected: N,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment() -> impl Strategy<Value = Segment> {
        (
            any::<u16>(),
            0u64..1 << 47,
            any::<u32>(),
            any::<u16>(),
            any::<bool>(),
        )
            .prop_map(|(selector, base, limit, access, unusable)| Segment {
                selector,
                base,
                limit,
                access: access & 0xf0ff,
                unusable,
            })
    }

    prop_compose! {
        fn msrs()(raw in any::<[u64; 15]>(), long in any::<bool>()) -> Msrs {
            let [star, lstar, cstar, sfmask, kernel_gs_base, sysenter_cs, sysenter_esp,
                sysenter_eip, pat, misc_enable, tsc_aux, tsc_adjust, mtrr_def_type,
                kvmclock_system_time, kvmclock_wall_clock] = raw;
            Msrs {
                efer: if long { EFER_LME | EFER_LMA } else { 0 },
                star, lstar, cstar, sfmask, kernel_gs_base, sysenter_cs, sysenter_esp,
                sysenter_eip, pat, misc_enable, tsc_aux, tsc_adjust, mtrr_def_type,
                kvmclock_system_time, kvmclock_wall_clock,
            }
        }
    }

    prop_compose! {
        fn cpu()(
            gpr in any::<[u64; 16]>(),
            plain in any::<[u64; 8]>(),
            segments in prop::collection::vec(segment(), 8),
            msrs in msrs(),
            xsave in prop::collection::vec(any::<u8>(), 576..900),
            page in prop::collection::vec(any::<u8>(), 1024),
            clocks in any::<[u64; 4]>(),
            events in any::<(Option<u8>, bool, bool, bool)>(),
            activity in prop_oneof![
                Just(Activity::Running), Just(Activity::Halted), Just(Activity::WaitForSipi)
            ],
        ) -> CpuState {
            CpuState {
                gpr,
                rip: plain[0] >> 17,
                rflags: plain[1] & 0x003f_7fd7,
                segments: std::array::from_fn(|i| segments[i]),
                tr: segments[6],
                ldtr: segments[7],
                gdtr: DescriptorTable { base: plain[2] >> 17, limit: plain[2] as u16 },
                idtr: DescriptorTable { base: plain[3] >> 17, limit: plain[3] as u16 },
                cr0: if msrs.efer == 0 { 0x11 } else { 0x8000_0011 },
                cr2: plain[4],
                cr3: plain[5],
                cr4: plain[6] | CR4_PAE,
                cr8: plain[7] & 15,
                dr: [plain[0], plain[1], plain[2], plain[3]],
                dr6: plain[4] >> 32,
                dr7: plain[5] >> 32,
                xcr0: plain[6] | 1,
                xsave,
                msrs,
                tsc: clocks[0],
                tsc_khz: clocks[1],
                realtime_ns: clocks[2],
                kvmclock_ns: clocks[3],
                apic: LocalApicState {
                    base: plain[7],
                    registers: Box::new(page.try_into().unwrap()),
                    tsc_deadline: clocks[0],
                },
                events: PendingEvents {
                    injected_interrupt: events.0,
                    nmi_pending: events.1,
                    nmi_masked: events.2,
                    interrupt_shadow: events.3,
                },
                activity,
            }
        }
    }

    proptest! {
        #[test]
        fn a_state_survives_the_round_trip(state in cpu()) {
            prop_assert_eq!(decode(&encode(&state)).unwrap(), state);
        }

        #[test]
        fn damaged_bytes_are_refused_or_read_but_never_panic(
            state in cpu(), at in any::<prop::sample::Index>(), with in any::<u8>(), cut in any::<bool>()
        ) {
            let mut bytes = encode(&state);
            let at = at.index(bytes.len());
            bytes[at] ^= with;
            if cut {
                bytes.truncate(at);
            }
            let _ = decode(&bytes);
        }

        #[test]
        fn impossible_values_are_refused(state in cpu(), which in 0usize..12) {
            let mut saved = SavedCpu::from(&state);
            match which {
                0 => saved.gpr.push(0),
                1 => saved.segments.truncate(5),
                2 => saved.rip = 1 << 47,
                3 => saved.rflags |= 1 << 40,
                4 => saved.cr0 = 1 << 31,
                5 => saved.msrs.as_mut().unwrap().efer ^= EFER_LMA,
                6 => saved.xsave.truncate(575),
                7 => saved.xcr0 = 0,
                8 => saved.activity = 3,
                9 => saved.apic = None,
                10 => saved.events.as_mut().unwrap().injected_interrupt = Some(256),
                _ => saved.tr.as_mut().unwrap().selector = 0x1_0000,
            }
            prop_assert!(CpuState::try_from(saved).is_err());
        }
    }
}
