use std::sync::{Arc, Mutex};

use super::registers::offset;
use super::*;
use crate::state::LocalApicState;

#[derive(Debug, Default)]
struct Sent(Mutex<Vec<(u32, u64)>>);

impl InterruptRouter for Sent {
    fn send_ipi(&self, from: u32, icr: u64) {
        self.0.lock().unwrap().push((from, icr));
    }
}

const KHZ: u64 = 2_000_000;

fn apic(id: u32) -> (LocalApic, Arc<Mailbox>, Arc<Sent>) {
    let (mailbox, sent) = (Arc::new(Mailbox::new(id)), Arc::new(Sent::default()));
    let apic = LocalApic::new(Arc::clone(&mailbox), sent.clone(), KHZ);
    (apic, mailbox, sent)
}

fn enabled(id: u32) -> (LocalApic, Arc<Mailbox>, Arc<Sent>) {
    let mut all = apic(id);
    all.0.write_mmio(offset::SVR, 0x1ff, 0);
    all
}

fn x2apic(id: u32) -> (LocalApic, Arc<Mailbox>, Arc<Sent>) {
    let mut all = enabled(id);
    let base = all.0.base() | BASE_X2APIC;
    all.0.set_base(base).unwrap();
    all
}

#[test]
fn a_higher_class_interrupts_a_lower_and_not_the_reverse() {
    let (mut apic, mailbox, _) = enabled(0);
    mailbox.post_vector(0x51, Trigger::Edge);
    apic.poll_mailbox();
    assert_eq!(apic.acknowledge(), 0x51);
    mailbox.post_vector(0x5f, Trigger::Edge);
    mailbox.post_vector(0x41, Trigger::Edge);
    apic.poll_mailbox();
    assert_eq!(apic.pending_vector(), None);
    mailbox.post_vector(0x60, Trigger::Edge);
    apic.poll_mailbox();
    assert_eq!(apic.acknowledge(), 0x60);
    apic.write_mmio(offset::EOI, 0, 0);
    assert_eq!(apic.pending_vector(), None);
    apic.write_mmio(offset::EOI, 0, 0);
    assert_eq!(apic.pending_vector(), Some(0x5f));
}

#[test]
fn interrupts_from_outside_pass_lint0_in_extint_mode_or_a_disabled_apic() {
    const LINT0: u32 = 0x350;
    let (mut apic, mailbox, _) = enabled(0);
    for (entry, passes) in [
        (0x700, true),
        (0x1_0700, false),
        (0x030, false),
        (0x430, false),
    ] {
        apic.write_mmio(LINT0, entry, 0);
        assert_eq!(apic.passes_external(), passes, "{entry:#x}");
    }
    let base = apic.base();
    apic.set_base(base & !BASE_ENABLE).unwrap();
    assert!(apic.passes_external());
    assert!(!mailbox.has_events());
    mailbox.set_external(true);
    assert!(mailbox.external() && mailbox.has_events());
    apic.poll_mailbox();
    // The level stays, the event does not.
    assert!(mailbox.external() && !mailbox.has_events());
    mailbox.set_external(false);
    assert!(!mailbox.external() && !mailbox.has_events());
}

#[test]
fn the_task_priority_holds_interrupts_back() {
    let (mut apic, mailbox, _) = enabled(0);
    mailbox.post_vector(0x51, Trigger::Edge);
    apic.poll_mailbox();
    apic.set_cr8(5).unwrap();
    assert_eq!(apic.pending_vector(), None);
    assert_eq!(apic.acknowledge(), 0xff, "spurious");
    apic.set_cr8(4).unwrap();
    assert_eq!(apic.pending_vector(), Some(0x51));
    assert_eq!(apic.set_cr8(16), Err(GeneralProtection));
}

#[test]
fn a_vector_that_was_taken_but_not_delivered_comes_again() {
    let (mut apic, mailbox, _) = enabled(0);
    mailbox.post_vector(0x44, Trigger::Level);
    apic.poll_mailbox();
    let vector = apic.acknowledge();
    assert_eq!(apic.pending_vector(), None);
    apic.request_again(vector);
    assert_eq!(apic.acknowledge(), 0x44);
    assert_eq!(apic.write_mmio(offset::EOI, 0, 0), Some(0x44));
    assert_eq!(apic.pending_vector(), None);
}

#[test]
fn only_level_interrupts_report_their_end() {
    let (mut apic, mailbox, _) = enabled(0);
    for (trigger, expected) in [(Trigger::Level, Some(0x44)), (Trigger::Edge, None)] {
        mailbox.post_vector(0x44, trigger);
        apic.poll_mailbox();
        assert_eq!(apic.acknowledge(), 0x44);
        assert_eq!(apic.write_mmio(offset::EOI, 0, 0), expected);
    }
}

#[test]
fn a_software_disabled_apic_takes_no_interrupt_but_init_and_sipi() {
    let (mut apic, mailbox, _) = apic(1);
    mailbox.post_vector(0x44, Trigger::Edge);
    mailbox.post_init();
    mailbox.post_sipi(0x9a);
    let posted = apic.poll_mailbox();
    assert_eq!((posted.init, posted.sipi), (true, Some(0x9a)));
    assert_eq!(apic.pending_vector(), None);
}

#[test]
fn the_base_register_makes_legal_transitions_only() {
    let (mut apic, _, _) = apic(1);
    let base = apic.base();
    assert_eq!(base, 0xfee0_0800);
    assert_eq!(apic.mmio_page(), Some(0xfee0_0000));
    let x2 = base | BASE_X2APIC;
    assert!(apic.set_base(x2 & !BASE_ENABLE).is_err());
    assert!(apic.set_base(base | 1).is_err());
    apic.set_base(x2).unwrap();
    assert_eq!(apic.mmio_page(), None);
    assert!(apic.set_base(base).is_err(), "x2APIC to xAPIC");
    apic.set_base(base & !BASE_ENABLE).unwrap();
    assert!(apic.set_base(x2).is_err(), "disabled to x2APIC");
    apic.set_base(base).unwrap();
}

#[test]
fn x2apic_registers_are_closed_in_xapic_mode_and_strict_in_x2apic_mode() {
    let (mut apic, _, _) = enabled(0x25);
    assert!(apic.read_msr(0x802, 0).is_err());
    let base = apic.base() | BASE_X2APIC;
    apic.set_base(base).unwrap();
    assert_eq!(apic.read_msr(0x802, 0), Ok(0x25));
    assert_eq!(apic.read_msr(0x80d, 0), Ok(0x0002_0020));
    for (msr, value) in [
        (0x802, 0),
        (0x80b, 1),
        (0x80d, 1),
        (0x80e, 0),
        (0x808, 0x100),
        (0x80f, 1 << 13),
        (0x828, 1),
        (0x831, 0),
        (0x839, 0),
        (0x83e, 4),
        (0x83f, 0x100),
        (0x832, 1 << 20),
        (0x830, 1 << 20),
        (0x808, 1 << 40),
    ] {
        assert_eq!(
            apic.write_msr(msr, value, 0),
            Err(GeneralProtection),
            "{msr:#x}"
        );
    }
    assert!(apic.read_msr(0x80b, 0).is_err(), "EOI is write-only");
    assert!(apic.read_msr(0x83f, 0).is_err(), "self IPI is write-only");
}

#[test]
fn commands_reach_the_router_with_their_destination_as_a_number() {
    let (mut apic, _, sent) = enabled(3);
    apic.write_mmio(offset::ICR_HIGH, 0x0200_0000, 0);
    apic.write_mmio(offset::ICR_LOW, 0x4041, 0);
    apic.write_mmio(offset::ICR_HIGH, 0xff00_0000, 0);
    apic.write_mmio(offset::ICR_LOW, 0x4500, 0);
    apic.write_mmio(offset::ICR_LOW, 0x0841, 0);
    assert_eq!(
        *sent.0.lock().unwrap(),
        [
            (3, 0x2_0000_4041),
            (3, 0xffff_ffff_0000_4500),
            (3, 0xff_0000_0841)
        ]
    );
    let (mut apic, _, sent) = x2apic(3);
    apic.write_msr(0x830, 0x1_0002_0000_4041, 0).unwrap();
    assert_eq!(*sent.0.lock().unwrap(), [(3, 0x1_0002_0000_4041)]);
}

#[test]
fn a_self_ipi_is_pending_at_once() {
    let (mut apic, _, sent) = x2apic(0);
    apic.write_msr(0x83f, 0x71, 0).unwrap();
    assert_eq!(apic.acknowledge(), 0x71);
    apic.write_msr(0x80b, 0, 0).unwrap();
    apic.write_msr(0x830, 0x4_4072, 0).unwrap();
    assert_eq!(apic.pending_vector(), Some(0x72));
    assert!(sent.0.lock().unwrap().is_empty());
}

#[test]
fn illegal_vectors_are_reported_in_the_error_register() {
    let (mut apic, mailbox, sent) = enabled(0);
    apic.write_mmio(0x370, 0x55, 0);
    apic.write_mmio(offset::ICR_LOW, 0x0005, 0);
    mailbox.post_vector(3, Trigger::Edge);
    apic.poll_mailbox();
    assert!(sent.0.lock().unwrap().is_empty());
    assert_eq!(apic.pending_vector(), Some(0x55));
    assert_eq!(apic.read_mmio(offset::ESR, 0), 0);
    apic.write_mmio(offset::ESR, 0, 0);
    assert_eq!(apic.read_mmio(offset::ESR, 0), 0x60);
    // An error entry with an illegal vector must not report itself for ever.
    apic.write_mmio(0x370, 0x05, 0);
    apic.write_mmio(offset::ICR_LOW, 0x0005, 0);
}

#[test]
fn a_one_shot_timer_fires_once_at_its_count() {
    let (mut apic, _, _) = enabled(0);
    apic.write_mmio(offset::DIVIDE, 0b1011, 0);
    apic.write_mmio(offset::LVT, 0x60, 0);
    apic.write_mmio(offset::INITIAL_COUNT, 1000, 10);
    // 1000 ns at 2 GHz.
    assert_eq!(apic.next_deadline_tsc(), Some(2010));
    assert_eq!(apic.read_mmio(offset::CURRENT_COUNT, 1010), 500);
    apic.tick(2009);
    assert_eq!(apic.pending_vector(), None);
    apic.tick(2010);
    assert_eq!(apic.acknowledge(), 0x60);
    assert_eq!(apic.next_deadline_tsc(), None);
    assert_eq!(apic.read_mmio(offset::CURRENT_COUNT, 3000), 0);
}

#[test]
fn the_divider_follows_its_table() {
    for (code, divisor) in [
        (0, 2),
        (1, 4),
        (2, 8),
        (3, 16),
        (8, 32),
        (9, 64),
        (10, 128),
        (11, 1),
    ] {
        let (mut apic, _, _) = enabled(0);
        apic.write_mmio(offset::DIVIDE, code, 0);
        apic.write_mmio(offset::LVT, 0x60, 0);
        apic.write_mmio(offset::INITIAL_COUNT, 1000, 0);
        assert_eq!(apic.next_deadline_tsc(), Some(2000 * divisor), "{code}");
    }
}

#[test]
fn a_periodic_timer_keeps_its_phase_and_lets_missed_periods_be_one() {
    let (mut apic, _, _) = enabled(0);
    apic.write_mmio(offset::DIVIDE, 0b1011, 0);
    apic.write_mmio(offset::LVT, 0x2_0060, 0);
    apic.write_mmio(offset::INITIAL_COUNT, 1000, 0);
    apic.tick(2000);
    assert_eq!(apic.acknowledge(), 0x60);
    apic.write_mmio(offset::EOI, 0, 2000);
    assert_eq!(apic.next_deadline_tsc(), Some(4000));
    apic.tick(9100);
    assert_eq!(apic.acknowledge(), 0x60);
    assert_eq!(apic.next_deadline_tsc(), Some(10_000));
}

#[test]
fn the_tsc_deadline_fires_at_its_value_and_disarms() {
    let (mut apic, _, _) = x2apic(0);
    apic.write_msr(MSR_TSC_DEADLINE, 500, 0).unwrap();
    assert_eq!(apic.read_msr(MSR_TSC_DEADLINE, 0), Ok(0), "wrong mode");
    apic.write_msr(0x832, 0x4_0060, 0).unwrap();
    apic.write_msr(MSR_TSC_DEADLINE, 500, 0).unwrap();
    assert_eq!(apic.next_deadline_tsc(), Some(500));
    apic.tick(500);
    assert_eq!(apic.pending_vector(), Some(0x60));
    assert_eq!(apic.read_msr(MSR_TSC_DEADLINE, 501), Ok(0));
    apic.write_msr(MSR_TSC_DEADLINE, 900, 501).unwrap();
    apic.write_msr(0x832, 0x60, 501).unwrap();
    assert_eq!(apic.next_deadline_tsc(), None, "a change of mode disarms");
}

#[test]
fn a_masked_timer_asks_for_no_wake_up() {
    let (mut apic, _, _) = enabled(0);
    apic.write_mmio(offset::INITIAL_COUNT, 1000, 0);
    assert_eq!(apic.next_deadline_tsc(), None);
}

#[test]
fn disabling_masks_the_local_vector_table() {
    let (mut apic, _, _) = enabled(0);
    apic.write_mmio(0x350, 0x700, 0);
    apic.write_mmio(offset::SVR, 0xff, 0);
    assert_eq!(apic.read_mmio(0x350, 0), 0x1_0700);
    apic.write_mmio(0x350, 0x700, 0);
    assert_eq!(apic.read_mmio(0x350, 0), 0x1_0700);
}

#[test]
fn a_state_goes_on_where_it_was_saved() {
    for mode in [0x60u32, 0x2_0060, 0x4_0060] {
        let (mut old, mailbox, _) = x2apic(2);
        old.write_msr(0x832, mode.into(), 0).unwrap();
        old.write_msr(0x83e, 0b1011, 0).unwrap();
        old.write_msr(0x838, 1000, 0).unwrap();
        old.write_msr(MSR_TSC_DEADLINE, 2000, 0).unwrap();
        mailbox.post_vector(0x91, Trigger::Level);
        mailbox.post_vector(0x33, Trigger::Edge);
        old.poll_mailbox();
        old.acknowledge();
        old.write_msr(0x808, 0x20, 0).unwrap();
        let state = old.state(1000);
        let (mut new, mailbox, _) = apic(2);
        new.set_state(&state, 1000).unwrap();
        assert_eq!(new.state(1000), state, "{mode:#x}");
        assert_eq!(new.next_deadline_tsc(), Some(2000), "{mode:#x}");
        assert_eq!(new.write_msr(0x80b, 0, 1000), Ok(Some(0x91)));
        assert_eq!(new.pending_vector(), Some(0x33));
        assert!(mailbox.address().x2apic);
    }
}

#[test]
fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
    let (mut apic, _, _) = x2apic(0);
    let good = apic.state(0);
    let with = |at: usize, value: u32| {
        let mut state = good.clone();
        state.registers[at..at + 4].copy_from_slice(&value.to_le_bytes());
        state
    };
    let base = |base| LocalApicState {
        base,
        ..good.clone()
    };
    for state in [
        with(0x20, 1),
        with(0x80, 0x100),
        with(0xf0, 1 << 20),
        with(0x100, 1),
        with(0x200, 0x8000),
        with(0x320, 0x6_0000),
        with(0x350, 1 << 18),
        with(0x3e0, 4),
        base(BASE_X2APIC),
        base(good.base | 1),
        base(u64::MAX),
    ] {
        assert!(apic.set_state(&state, 0).is_err(), "{state:?}");
        assert_eq!(apic.state(0), good);
    }
}

proptest::proptest! {
    #[test]
    fn no_access_and_no_state_panics(
        accesses in proptest::collection::vec((0u32..0x400, proptest::num::u64::ANY, 0u8..5), 0..60),
        page in proptest::collection::vec(proptest::num::u8::ANY, 1024),
        base in proptest::num::u64::ANY,
    ) {
        let (mut apic, mailbox, _) = enabled(1);
        let mut now = 0u64;
        for (place, value, kind) in accesses {
            now = now.saturating_add(value >> 40);
            match kind {
                0 => drop(apic.write_mmio(place << 2, value as u32, now)),
                1 => drop(apic.read_mmio(place << 2, now)),
                2 => drop(apic.write_msr(0x800 + (place & 0xff), value, now)),
                3 => drop(apic.read_msr(0x800 + (place & 0xff), now)),
                _ => {
                    let base = apic.base() | BASE_X2APIC;
                    let _ = apic.set_base(base);
                    mailbox.post_vector(value as u8, Trigger::Level);
                    apic.poll_mailbox();
                    if apic.pending_vector().is_some() {
                        apic.acknowledge();
                    }
                    apic.tick(u64::MAX);
                }
            }
        }
        let mut state = LocalApicState { base, tsc_deadline: base, ..Default::default() };
        state.registers.copy_from_slice(&page);
        let _ = apic.set_state(&state, now);
        let mut plain = LocalApicState { base: BASE_RESET, ..state };
        plain.registers[0x20..0x24].copy_from_slice(&0x0100_0000u32.to_le_bytes());
        for at in [0x80, 0xf0, 0x100, 0x200, 0x280, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370, 0x3e0] {
            plain.registers[at..at + 4].fill(0);
        }
        apic.set_state(&plain, now).unwrap();
        let saved = apic.state(now);
        apic.set_state(&saved, now).unwrap();
    }
}
