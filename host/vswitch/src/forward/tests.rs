use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::announcement;

fn vlan(id: u16) -> VlanId {
    VlanId::new(id).unwrap()
}

fn mac(last: u8) -> MacAddress {
    MacAddress([2, 0, 0, 0, 0, last])
}

fn rules(role: PortRole, vlan: VlanMode) -> PortRules {
    PortRules {
        role,
        vlan,
        allowed_sources: Vec::new(),
    }
}

fn access(switch: &mut Switch, id: u16) -> PortId {
    switch.add_port(rules(PortRole::Edge, VlanMode::Access(vlan(id))))
}

fn frame(destination: MacAddress, source: MacAddress, rest: &[u8]) -> Vec<u8> {
    [&destination.0[..], &source.0, rest].concat()
}

const IPV4: [u8; 4] = [0x08, 0x00, 0x45, 0x11];

/// Offers a frame and collects where it left, and as what.
fn offer(switch: &mut Switch, seconds: u64, port: PortId, bytes: &[u8]) -> Vec<(PortId, Vec<u8>)> {
    let mut left = Vec::new();
    switch.forward(Duration::from_secs(seconds), port, bytes, |port, bytes| {
        left.push((port, bytes.to_vec()));
        Ok(())
    });
    left
}

fn ports_of(left: &[(PortId, Vec<u8>)]) -> Vec<PortId> {
    left.iter().map(|(port, _)| *port).collect()
}

#[test]
fn an_unknown_station_is_flooded_and_a_known_one_is_not() {
    let mut switch = Switch::new(LearningLimits::default());
    let [a, b, c] = [1, 1, 1].map(|id| access(&mut switch, id));
    let first = frame(mac(2), mac(1), &IPV4);
    assert_eq!(ports_of(&offer(&mut switch, 0, a, &first)), [b, c]);
    let answer = frame(mac(1), mac(2), &IPV4);
    assert_eq!(offer(&mut switch, 0, b, &answer), [(a, answer.clone())]);
    assert_eq!(ports_of(&offer(&mut switch, 0, a, &first)), [b]);
    // Behind the same port: not sent back.
    assert!(offer(&mut switch, 0, b, &frame(mac(2), mac(3), &IPV4)).is_empty());
    assert_eq!(
        switch.counters(b).unwrap().drops.get(DropReason::SamePort),
        1
    );
}

#[test]
fn a_silent_station_is_forgotten() {
    let mut switch = Switch::new(LearningLimits {
        ageing_seconds: 10,
        ..Default::default()
    });
    let [a, b, _] = [1, 1, 1].map(|id| access(&mut switch, id));
    offer(&mut switch, 0, a, &frame(mac(9), mac(1), &IPV4));
    let to_first = frame(mac(1), mac(2), &IPV4);
    assert_eq!(offer(&mut switch, 9, b, &to_first).len(), 1);
    assert_eq!(offer(&mut switch, 10, b, &to_first).len(), 2);
    switch.expire(Duration::from_secs(10));
    assert_eq!(switch.stations().count(), 1);
}

#[test]
fn a_station_is_at_its_new_place_with_its_first_frame_there() {
    let mut switch = Switch::new(LearningLimits::default());
    let [a, b, c] = [1, 1, 1].map(|id| access(&mut switch, id));
    offer(&mut switch, 0, a, &frame(mac(9), mac(1), &IPV4));
    let to_station = frame(mac(1), mac(2), &IPV4);
    assert_eq!(ports_of(&offer(&mut switch, 0, c, &to_station)), [a]);
    let moved = switch.forward(
        Duration::ZERO,
        b,
        &announcement(mac(1)).bytes,
        |_, _| Ok(()),
    );
    assert_eq!(
        moved,
        Some(Move {
            station: mac(1),
            vlan: vlan(1)
        })
    );
    assert_eq!(ports_of(&offer(&mut switch, 0, c, &to_station)), [b]);
}

#[test]
fn a_mesh_of_tunnels_has_no_loop() {
    let mut switch = Switch::new(LearningLimits::default());
    let host = access(&mut switch, 1);
    let tunnels = [0; 3].map(|_| switch.add_port(rules(PortRole::Tunnel, VlanMode::default())));
    let broadcast = frame(MacAddress::BROADCAST, mac(1), &IPV4);
    assert_eq!(ports_of(&offer(&mut switch, 0, host, &broadcast)), tunnels);
    let from_tunnel = frame(MacAddress::BROADCAST, mac(2), &IPV4);
    assert_eq!(
        ports_of(&offer(&mut switch, 0, tunnels[0], &from_tunnel)),
        [host]
    );
    // Known behind a tunnel, asked for from another one: the asker has a tunnel of its own.
    assert!(offer(&mut switch, 0, tunnels[1], &frame(mac(2), mac(3), &IPV4)).is_empty());
    assert_eq!(
        switch
            .counters(tunnels[1])
            .unwrap()
            .drops
            .get(DropReason::NoEgress),
        1
    );
}

#[test]
fn access_ports_are_untagged_and_trunks_tagged() {
    let mut switch = Switch::new(LearningLimits::default());
    let ten = access(&mut switch, 10);
    let twenty = access(&mut switch, 20);
    let trunk = VlanMode::Trunk(vec![vlan(10), vlan(30)]);
    let trunk = switch.add_port(rules(PortRole::Edge, trunk));
    let untagged = frame(MacAddress::BROADCAST, mac(1), &IPV4);
    let tagged = |tag: [u8; 2]| {
        frame(
            MacAddress::BROADCAST,
            mac(1),
            &[&[0x81, 0][..], &tag, &IPV4].concat(),
        )
    };
    assert_eq!(
        offer(&mut switch, 0, ten, &untagged),
        [(trunk, tagged([0, 10]))]
    );
    // A priority tag stays a priority, within the port's VLAN.
    assert_eq!(
        offer(&mut switch, 0, ten, &tagged([0xa0, 0])),
        [(trunk, tagged([0xa0, 10]))]
    );
    assert_eq!(
        offer(&mut switch, 0, trunk, &tagged([0xa0, 10])),
        [(ten, untagged.clone())]
    );
    assert!(
        offer(&mut switch, 0, trunk, &tagged([0, 20])).is_empty(),
        "not allowed on the trunk"
    );
    assert!(
        offer(&mut switch, 0, trunk, &untagged).is_empty(),
        "untagged on a trunk"
    );
    assert!(
        offer(&mut switch, 0, ten, &tagged([0, 20])).is_empty(),
        "tagged on an access port"
    );
    let nested = frame(
        mac(2),
        mac(1),
        &[&[0x81, 0, 0, 0, 0x81, 0, 0, 20][..], &IPV4].concat(),
    );
    assert!(
        offer(&mut switch, 0, ten, &nested).is_empty(),
        "a second tag below a priority tag"
    );
    assert!(
        offer(&mut switch, 0, twenty, &untagged).is_empty(),
        "alone in its VLAN"
    );
    assert_eq!(
        switch.counters(trunk).unwrap().drops.get(DropReason::Vlan),
        2
    );
    assert_eq!(
        switch
            .counters(twenty)
            .unwrap()
            .drops
            .get(DropReason::NoEgress),
        1
    );
}

#[test]
fn a_frame_that_is_too_long_with_its_tag_is_dropped_at_the_trunk_only() {
    let mut switch = Switch::new(LearningLimits::default());
    let [a, b] = [1, 1].map(|id| access(&mut switch, id));
    let trunk = switch.add_port(rules(PortRole::Edge, VlanMode::Trunk(vec![vlan(1)])));
    let mut long = frame(MacAddress::BROADCAST, mac(1), &IPV4);
    long.resize(MAX_FRAME - 3, 0);
    assert_eq!(ports_of(&offer(&mut switch, 0, a, &long)), [b]);
    assert_eq!(
        switch
            .counters(trunk)
            .unwrap()
            .drops
            .get(DropReason::TooLongTagged),
        1
    );
    long.resize(MAX_FRAME + 1, 0);
    assert!(offer(&mut switch, 0, a, &long).is_empty());
    assert_eq!(
        switch.counters(a).unwrap().drops.get(DropReason::TooLong),
        1
    );
}

#[test]
fn forged_sources_are_dropped() {
    let mut switch = Switch::new(LearningLimits::default());
    let a = switch.add_port(PortRules {
        role: PortRole::Edge,
        vlan: VlanMode::default(),
        allowed_sources: vec![mac(1)],
    });
    let [b, gateway] = [1, 1].map(|id| access(&mut switch, id));
    switch.pin(mac(100), gateway);
    assert!(offer(&mut switch, 0, a, &frame(mac(9), mac(2), &IPV4)).is_empty());
    assert_eq!(
        offer(&mut switch, 0, a, &frame(mac(9), mac(1), &IPV4)).len(),
        2
    );
    assert!(offer(&mut switch, 0, b, &frame(mac(9), mac(100), &IPV4)).is_empty());
    assert_eq!(
        ports_of(&offer(&mut switch, 0, b, &frame(mac(100), mac(3), &IPV4))),
        [gateway]
    );
    for source in [
        MacAddress([0; 6]),
        MacAddress::BROADCAST,
        MacAddress([1, 0, 0, 0, 0, 1]),
    ] {
        assert!(offer(&mut switch, 0, b, &frame(mac(9), source, &IPV4)).is_empty());
    }
    assert_eq!(
        switch.counters(b).unwrap().drops.get(DropReason::BadSource),
        3
    );
    assert_eq!(
        switch.counters(b).unwrap().drops.get(DropReason::Spoofed),
        1
    );
    let bpdu = frame(MacAddress([1, 0x80, 0xc2, 0, 0, 0]), mac(3), &IPV4);
    assert!(offer(&mut switch, 0, b, &bpdu).is_empty());
}

#[test]
fn the_table_is_bounded_as_a_whole_and_per_port() {
    let limits = LearningLimits {
        addresses: 5,
        addresses_per_port: 3,
        ageing_seconds: 10,
    };
    let mut switch = Switch::new(limits);
    let [a, b] = [1, 1].map(|id| access(&mut switch, id));
    for last in 0..10 {
        offer(&mut switch, 0, a, &frame(mac(99), mac(last), &IPV4));
    }
    assert_eq!(switch.stations().count(), 3);
    assert_eq!(switch.counters(a).unwrap().not_learned, 7);
    for last in 20..30 {
        offer(&mut switch, 0, b, &frame(mac(99), mac(last), &IPV4));
    }
    assert_eq!(switch.stations().count(), 5);
    // The old ones make room when they have aged.
    offer(&mut switch, 20, b, &frame(mac(99), mac(50), &IPV4));
    assert_eq!(switch.stations().count(), 1);
    switch.remove_port(b);
    assert_eq!(switch.stations().count(), 0);
}

#[test]
fn frames_refused_or_lost_by_a_port_are_counted_there() {
    let mut switch = Switch::new(LearningLimits::default());
    let [a, b, c] = [1, 1, 1].map(|id| access(&mut switch, id));
    let bytes = frame(MacAddress::BROADCAST, mac(1), &IPV4);
    switch.forward(Duration::ZERO, a, &bytes, |port, _| {
        if port == b {
            Err(DropReason::QueueFull)
        } else {
            Ok(())
        }
    });
    assert_eq!(
        switch.counters(b).unwrap().drops.get(DropReason::QueueFull),
        1
    );
    assert_eq!(switch.counters(b).unwrap().sent_frames, 0);
    assert_eq!(switch.counters(c).unwrap().sent_frames, 1);
    switch.lost(c, bytes.len(), DropReason::PeerGone);
    assert_eq!(switch.counters(c).unwrap().sent_frames, 0);
    assert_eq!(switch.counters(c).unwrap().sent_bytes, 0);
    assert_eq!(
        switch.counters(c).unwrap().drops.get(DropReason::PeerGone),
        1
    );
}

/// The ports of the model: two access VLANs, two trunks, two tunnels.
fn model_ports() -> Vec<PortRules> {
    let access = |id| rules(PortRole::Edge, VlanMode::Access(vlan(id)));
    let trunk = |ids: &[u16]| VlanMode::Trunk(ids.iter().map(|id| vlan(*id)).collect());
    vec![
        access(1),
        access(1),
        access(2),
        rules(PortRole::Edge, trunk(&[1, 2])),
        rules(PortRole::Edge, trunk(&[2, 3])),
        rules(PortRole::Tunnel, VlanMode::Access(vlan(1))),
        rules(PortRole::Tunnel, trunk(&[1, 2, 3])),
    ]
}

fn allows(rules: &PortRules, id: u16) -> bool {
    match &rules.vlan {
        VlanMode::Access(own) => own.get() == id,
        VlanMode::Trunk(ids) => ids.contains(&vlan(id)),
    }
}

/// The VLAN that a frame without a second tag belongs to at a port.
fn vlan_at(rules: &PortRules, bytes: &[u8]) -> Option<u16> {
    let tag =
        (bytes[12..14] == [0x81, 0]).then(|| u16::from_be_bytes([bytes[14], bytes[15]]) & 0xfff);
    match (&rules.vlan, tag) {
        (VlanMode::Access(own), None | Some(0)) => Some(own.get()),
        (VlanMode::Access(_), Some(_)) | (VlanMode::Trunk(_), None) => None,
        (VlanMode::Trunk(_), Some(id)) => allows_id(rules, id),
    }
}

fn allows_id(rules: &PortRules, id: u16) -> Option<u16> {
    (VlanId::new(id).is_some() && allows(rules, id)).then_some(id)
}

fn some_frame() -> impl Strategy<Value = Vec<u8>> {
    let station = prop_oneof![
        8 => (0_u8..6).prop_map(mac),
        1 => Just(MacAddress::BROADCAST),
        1 => any::<[u8; 6]>().prop_map(MacAddress),
    ];
    let tag = prop_oneof![
        Just(Vec::new()),
        (0_u16..5, 0_u16..8).prop_map(|(id, priority)| {
            let [high, low] = (id | priority << 13).to_be_bytes();
            vec![0x81, 0, high, low]
        }),
    ];
    let well_formed =
        (station.clone(), station, tag, 0_usize..40).prop_map(|(to, from, tag, length)| {
            frame(to, from, &[tag, vec![0x08, 0], vec![7; length]].concat())
        });
    prop_oneof![9 => well_formed, 1 => proptest::collection::vec(any::<u8>(), 0..80)]
}

proptest! {
    /// Against the rules said plainly: never back, never across VLANs or the mesh, everywhere
    /// when flooded, and every frame is counted once.
    #[test]
    fn random_frames_stay_within_the_rules(
        frames in proptest::collection::vec((0_usize..7, some_frame(), any::<bool>()), 1..200)
    ) {
        let mut switch = Switch::new(LearningLimits::default());
        let model = model_ports();
        let ids: Vec<PortId> = model.iter().map(|rules| switch.add_port(rules.clone())).collect();
        let mut place = std::collections::HashMap::new();
        let mut forwarded = vec![0_u64; ids.len()];
        for (ingress, bytes, refuse) in frames {
            let before: u64 = ids.iter().map(|id| switch.counters(*id).unwrap().sent_frames).sum();
            let mut left = Vec::new();
            switch.forward(Duration::ZERO, ids[ingress], &bytes, |port, bytes| {
                left.push((port.0 as usize, bytes.to_vec()));
                if refuse { Err(DropReason::QueueFull) } else { Ok(()) }
            });
            forwarded[ingress] += u64::from(!left.is_empty());
            let after: u64 = ids.iter().map(|id| switch.counters(*id).unwrap().sent_frames).sum();
            prop_assert_eq!(after - before, if refuse { 0 } else { left.len() as u64 });

            let whole = bytes.len() >= 14 && (bytes[12..14] != [0x81, 0] || bytes.len() >= 18);
            let admitted = whole.then(|| vlan_at(&model[ingress], &bytes)).flatten();
            let Some(id) = admitted else {
                prop_assert!(left.is_empty());
                continue;
            };
            let (to, from) = (MacAddress(bytes[..6].try_into().unwrap()),
                MacAddress(bytes[6..12].try_into().unwrap()));
            if from.is_multicast() || from.0 == [0; 6] {
                prop_assert!(left.is_empty());
                continue;
            }
            place.insert((id, from), ingress);
            let may = |port: usize| port != ingress && allows(&model[port], id)
                && !(model[port].role == PortRole::Tunnel && model[ingress].role == PortRole::Tunnel);
            let expected: BTreeSet<usize> = match place.get(&(id, to)) {
                Some(port) if !to.is_multicast() => [*port].into_iter().filter(|port| may(*port)).collect(),
                _ => (0..model.len()).filter(|port| may(*port)).collect(),
            };
            let got: BTreeSet<usize> = left.iter().map(|(port, _)| *port).collect();
            prop_assert_eq!(got.len(), left.len(), "once for each port");
            prop_assert_eq!(&got, &expected);
            for (port, bytes) in &left {
                prop_assert_eq!(vlan_at(&model[*port], bytes), Some(id));
                prop_assert_eq!(&bytes[..12], &[to.0, from.0].concat()[..]);
            }
        }
        for (id, forwarded) in ids.iter().zip(forwarded) {
            let counters = switch.counters(*id).unwrap();
            let dropped_in: u64 = counters.drops.iter()
                .filter(|(reason, _)| *reason < DropReason::TooLongTagged)
                .map(|(_, count)| count)
                .sum();
            prop_assert_eq!(dropped_in + forwarded, counters.received_frames);
        }
    }
}
