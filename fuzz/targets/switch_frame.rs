//! Whatever frames stations send, the switch keeps VLANs apart and makes no loops.

#![no_main]

use std::time::Duration;

use dunlin_vswitch::{
    DropReason, LearningLimits, MAX_FRAME, MacAddress, PortRole, PortRules, Switch, VlanId,
    VlanMode,
};
use libfuzzer_sys::{arbitrary, fuzz_target};

#[derive(Debug, arbitrary::Arbitrary)]
enum Event<'a> {
    Frame { port: u8, frame: &'a [u8] },
    Wait { milliseconds: u32 },
    Lost { port: u8, length: u16 },
    Replace { port: u8 },
}

/// The ports, by number: what they let through, and where they lead.
fn rules(number: usize) -> PortRules {
    let vlan = |id| VlanId::new(id).expect("a VLAN's number");
    let trunk = VlanMode::Trunk(vec![vlan(1), vlan(20), vlan(4094)]);
    let (role, vlan) = match number {
        0 | 1 => (PortRole::Edge, VlanMode::default()),
        2 => (PortRole::Edge, VlanMode::Access(vlan(20))),
        3 => (PortRole::Edge, trunk),
        _ => (PortRole::Tunnel, trunk),
    };
    let allowed_sources = match number {
        1 => vec![MacAddress([2, 0, 0, 0, 0, 1])],
        _ => Vec::new(),
    };
    PortRules {
        role,
        vlan,
        allowed_sources,
    }
}

const PORTS: usize = 6;

fuzz_target!(|events: Vec<Event<'_>>| {
    let mut switch = Switch::new(LearningLimits {
        addresses: 8,
        addresses_per_port: 3,
        ageing_seconds: 60,
    });
    let mut ports: Vec<_> = (0..PORTS).map(|n| switch.add_port(rules(n))).collect();
    switch.pin(MacAddress([2, 0, 0, 0, 0, 0xfe]), ports[0]);
    let mut now = Duration::ZERO;
    for event in events {
        match event {
            Event::Frame { port, frame } => {
                let from = usize::from(port) % PORTS;
                let mut delivered = [false; PORTS];
                switch.forward(now, ports[from], frame, |port, bytes| {
                    let to = ports.iter().position(|p| *p == port);
                    let to = to.expect("frames leave by ports that are there");
                    assert_ne!(to, from, "a frame went back");
                    assert!(
                        !(from >= 4 && to >= 4),
                        "a frame went from tunnel to tunnel"
                    );
                    assert!(
                        (from == 2) <= (to != 0 && to != 1),
                        "a frame changed its VLAN"
                    );
                    assert!(bytes.len() <= MAX_FRAME);
                    assert!(
                        !std::mem::replace(&mut delivered[to], true),
                        "a frame came twice"
                    );
                    match to {
                        5 => Err(DropReason::NoEgress),
                        _ => Ok(()),
                    }
                });
            }
            Event::Wait { milliseconds } => {
                now += Duration::from_millis(milliseconds.into());
                switch.expire(now);
            }
            Event::Lost { port, length } => {
                let port = ports[usize::from(port) % PORTS];
                switch.rejected(port, length.into(), DropReason::TooLong);
            }
            Event::Replace { port } => {
                let number = usize::from(port) % PORTS;
                switch.remove_port(ports[number]);
                ports[number] = switch.add_port(rules(number));
            }
        }
        assert!(
            switch.stations().count() <= 9,
            "the table outgrew its bound"
        );
    }
});
