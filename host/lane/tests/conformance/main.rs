//! One suite over every kind of page lane.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

#[path = "../authority/mod.rs"]
mod authority;
mod cases;
mod faults;
mod random;
mod support;

macro_rules! suite {
    ($($kind:ident),* : $cases:tt) => { $(suite!(@ $kind $cases);)* };
    (@ $kind:ident { $($module:ident :: $case:ident,)* }) => {
        mod $kind {
            use crate::support::$kind as factory;

            $(
                #[test]
                fn $case() {
                    crate::$module::$case(factory);
                }
            )*
        }
    };
}

suite! {
    registering_memory, plain_memory, unix, tcp, tls: {
        cases::writes_are_visible_behind_a_message,
        cases::a_later_write_over_an_earlier_one_wins,
        cases::only_lent_memory_is_read,
        cases::nothing_is_written_outside_of_windows,
        cases::buffers_are_owned_by_the_lane_until_they_come_back,
        cases::timeouts_leave_the_lane_whole,
        cases::what_is_revoked_is_not_written,
        cases::what_is_too_large_is_refused_and_the_lane_goes_on,
        cases::the_end_comes_after_what_is_complete,
        cases::a_sender_learns_that_its_peer_is_gone,
        cases::messages_come_in_order_and_whole,
        cases::grants_are_waited_for_where_memory_is_registered,
        random::any_interleaving_keeps_the_contract,
    }
}
