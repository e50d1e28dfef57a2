use super::*;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

const ALL: Features = Features::CONTROLLED
    .union(Features::MQ)
    .union(Features::GUEST_ANNOUNCE)
    .union(Features::GUEST_OFFLOADS);

fn controls_with(features: Features) -> Controls {
    Controls::new(Features::CTRL_VQ | features, 4, Some(MAC))
}

fn controls() -> Controls {
    controls_with(ALL)
}

/// What the device writes.
fn answer(controls: &mut Controls, request: &[u8]) -> Vec<u8> {
    let counts = |queue: u16| QueueCounts {
        packets: 100 + u64::from(queue),
        bytes: 7,
        ..QueueCounts::default()
    };
    let mut answer = Vec::new();
    controls.serve(request, counts, &mut answer);
    answer
}

/// Has a command carried out; whether it was. What it changed nothing of if it was not.
#[track_caller]
fn ask(controls: &mut Controls, command: &Command) -> bool {
    let before = controls.settings().clone();
    let verdict = *answer(controls, &command.encode()).first().unwrap();
    if verdict == ERR {
        assert_eq!(*controls.settings(), before, "{command:?}");
    }
    verdict == OK
}

fn rss() -> RssConfig {
    RssConfig {
        types: HashTypes::SUPPORTED,
        table: vec![0, 1, 2, 3],
        unclassified: 3,
        transmitqs: 4,
        key: vec![1; 40],
    }
}

#[test]
fn commands_change_the_settings() {
    let mut controls = controls();
    let other = Mac([2, 0, 0, 0, 0, 9]);
    for command in [
        Command::Receive(ReceiveMode::Promiscuous, false),
        Command::SetMac(other),
        Command::SetPairs(3),
        Command::SetOffloads(Features::GUEST_CSUM.bits()),
        Command::AcknowledgeAnnounce,
    ] {
        assert!(ask(&mut controls, &command), "{command:?}");
    }
    let settings = controls.settings();
    assert!(!settings.filter.takes_all());
    assert_eq!(settings.filter.mac(), Some(other));
    assert_eq!(
        (settings.pairs, settings.offloads),
        (3, Features::GUEST_CSUM)
    );
}

#[test]
fn a_command_whose_feature_was_not_negotiated_is_refused() {
    for command in [
        Command::Receive(ReceiveMode::Promiscuous, false),
        Command::Receive(ReceiveMode::NoUnicast, false),
        Command::MacTable {
            unicast: Vec::new(),
            multicast: Vec::new(),
        },
        Command::SetMac(MAC),
        Command::AddVlan(1),
        Command::RemoveVlan(1),
        Command::AcknowledgeAnnounce,
        Command::SetPairs(2),
        Command::Rss(rss()),
        Command::Hash(HashTypes::IPV4, Vec::new()),
        Command::SetOffloads(0),
        Command::CoalesceReceive(Coalescing::default()),
        Command::CoalesceTransmit(Coalescing::default()),
        Command::CoalesceQueue(0, Coalescing::default()),
        Command::AskStats,
        Command::Stats(vec![StatsAsked { queue: 0, types: 1 }]),
    ] {
        assert!(
            !ask(&mut controls_with(ALL - command.needs()), &command),
            "{command:?}"
        );
        assert!(ask(&mut controls_with(ALL), &command), "{command:?}");
    }
}

#[test]
fn values_that_cannot_be_are_refused() {
    let mut controls = controls();
    let broken = |change: fn(&mut RssConfig)| {
        let mut config = rss();
        change(&mut config);
        Command::Rss(config)
    };
    for command in [
        Command::SetMac(Mac::BROADCAST),
        Command::AddVlan(4096),
        Command::SetPairs(0),
        Command::SetPairs(5),
        Command::SetOffloads(1),
        Command::SetOffloads(1 << 46),
        Command::Hash(HashTypes::from_bits_retain(1 << 6), Vec::new()),
        Command::Hash(HashTypes::IPV4, vec![0; 41]),
        broken(|config| config.types = HashTypes::from_bits_retain(1 << 31)),
        broken(|config| config.table = vec![0, 1, 2]),
        broken(|config| config.table = vec![0; 256]),
        broken(|config| config.table[2] = 4),
        broken(|config| config.unclassified = 4),
        broken(|config| config.transmitqs = 0),
        broken(|config| config.transmitqs = 5),
        broken(|config| config.key = vec![0; 41]),
        // Queues that are not in use, the control queue, and others that there are none of.
        Command::CoalesceQueue(2, Coalescing::default()),
        Command::CoalesceQueue(8, Coalescing::default()),
        Command::CoalesceQueue(0xffff, Coalescing::default()),
    ] {
        assert!(!ask(&mut controls, &command), "{command:?}");
    }
}

#[test]
fn of_pairs_and_scaling_the_last_command_counts() {
    let mut controls = controls();
    assert!(ask(&mut controls, &Command::Rss(rss())));
    assert_eq!(controls.settings().pairs, 4);
    let scaling = controls.settings().rss.clone().unwrap();
    assert_eq!(
        controls.settings().hasher.as_deref(),
        Some(scaling.hasher())
    );
    assert_eq!(scaling.pair(&[0; 60]), 3);
    assert!(ask(&mut controls, &Command::SetPairs(2)));
    assert_eq!(controls.settings().rss, None);
    assert_eq!(controls.settings().pairs, 2);
}

#[test]
fn hashes_are_reported_only_when_that_was_negotiated() {
    let mut controls = controls_with(Features::RSS | Features::MQ);
    assert!(ask(&mut controls, &Command::Rss(rss())));
    assert_eq!(controls.settings().hasher, None);
}

#[test]
fn notifications_are_held_back_as_was_said_last() {
    let mut controls = controls();
    let held = |n| Coalescing {
        max_packets: n,
        max_usecs: n,
    };
    let now = |controls: &Controls| {
        let queues = controls.settings().coalescing.iter();
        queues.map(|queue| queue.max_packets).collect::<Vec<_>>()
    };
    assert!(ask(&mut controls, &Command::SetPairs(2)));
    assert!(ask(&mut controls, &Command::CoalesceReceive(held(1))));
    assert!(ask(&mut controls, &Command::CoalesceTransmit(held(2))));
    assert_eq!(now(&controls), [1, 2, 1, 2, 1, 2, 1, 2]);
    assert!(ask(&mut controls, &Command::CoalesceQueue(2, held(9))));
    assert_eq!(now(&controls)[..4], [1, 2, 9, 2]);
    // Data that the device writes stands before the verdict.
    let asked = answer(&mut controls, &Command::AskCoalescing(2).encode());
    assert_eq!(asked, [9, 0, 0, 0, 9, 0, 0, 0, OK]);
    let refused = answer(&mut controls, &Command::AskCoalescing(7).encode());
    assert_eq!(refused, [0, 0, 0, 0, 0, 0, 0, 0, ERR]);
    // A pair that is used again begins anew.
    assert!(ask(&mut controls, &Command::SetPairs(1)));
    assert!(ask(&mut controls, &Command::SetPairs(2)));
    assert_eq!(now(&controls)[..4], [1, 2, 1, 2]);
    assert!(ask(&mut controls, &Command::CoalesceQueue(0, held(9))));
    assert!(ask(&mut controls, &Command::CoalesceReceive(held(3))));
    assert_eq!(now(&controls)[..3], [3, 2, 3]);
}

#[test]
fn statistics_are_answered_all_or_none() {
    let mut controls = controls();
    let types = answer(&mut controls, &Command::AskStats.encode());
    assert_eq!(
        types,
        [&[OK][..], &(1_u64 | 1 << 16 | 1 << 32).to_le_bytes()].concat()
    );
    let entry = |queue, types| StatsAsked { queue, types };
    let good = [entry(2, 1), entry(3, 1 << 16), entry(8, 1 << 32)];
    let stats = answer(&mut controls, &Command::Stats(good.to_vec()).encode());
    assert_eq!(stats.len(), 1 + 56 + 56 + 24);
    assert_eq!(stats[..9], [OK, 0, 0, 2, 0, 0, 0, 56, 0]);
    assert_eq!(stats[17], 102, "packets of queue 2");
    assert_eq!(stats[57..65], [16, 0, 3, 0, 0, 0, 56, 0]);
    // The command that asks is counted when its answer is there.
    assert_eq!(
        stats[113..],
        [
            32, 0, 8, 0, 0, 0, 24, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0
        ]
    );
    for bad in [
        entry(1, 1),
        entry(2, 1 << 16),
        entry(2, 3),
        entry(2, 2),
        entry(8, 1),
        entry(9, 1 << 32),
        entry(0xffff, 1 << 16),
    ] {
        let request = Command::Stats(vec![good[0], bad]).encode();
        assert_eq!(answer(&mut controls, &request), [ERR], "{bad:?}");
    }
    let many = Command::Stats(vec![good[0]; 10]).encode();
    assert_eq!(answer(&mut controls, &many), [ERR]);
}

#[test]
fn whatever_is_said_is_answered_and_kept_small() {
    // Every class and number, with data of every length up to some, all zeros and all ones.
    let mut controls = controls();
    for (class, number) in (0..=11).flat_map(|class| (0..=7).map(move |number| (class, number))) {
        for (len, fill) in (0..60).flat_map(|len| [(len, 0), (len, 0xff), (len, 1)]) {
            let mut request = vec![class, number];
            request.resize(2 + len, fill);
            let answer = answer(&mut controls, &request);
            let verdict = answer[command::data_len([class, number])];
            assert!(verdict == OK || verdict == ERR);
        }
    }
    let macs = (0..10_000_u32).map(|k| {
        let [a, b, c, d] = k.to_le_bytes();
        Mac([2, 0, a, b, c, d])
    });
    let table = Command::MacTable {
        unicast: macs.clone().collect(),
        multicast: Vec::new(),
    };
    assert!(ask(&mut controls, &table));
    assert!(format!("{:?}", controls.settings().filter).len() < 2000);
}

#[test]
fn a_device_goes_on_with_what_another_was_asked_for() {
    let hold = |max_packets| Coalescing {
        max_packets,
        max_usecs: 9,
    };
    let many = (0..70).map(|n| Mac([2, 7, 7, 7, 7, n])).collect();
    let stories = [
        vec![],
        vec![
            Command::Receive(ReceiveMode::Promiscuous, false),
            Command::Receive(ReceiveMode::NoBroadcast, true),
            Command::MacTable {
                unicast: vec![Mac([2, 0, 0, 0, 0, 8])],
                multicast: many,
            },
            Command::SetMac(Mac([2, 0, 0, 0, 0, 9])),
            Command::AddVlan(1),
            Command::AddVlan(4095),
            Command::SetOffloads(Features::GUEST_CSUM.bits()),
        ],
        vec![
            Command::Rss(rss()),
            Command::Hash(HashTypes::IPV4, vec![3; 8]),
            Command::CoalesceReceive(hold(4)),
            Command::CoalesceQueue(6, hold(5)),
        ],
        vec![
            Command::Rss(rss()),
            Command::SetPairs(2),
            Command::CoalesceTransmit(hold(7)),
            Command::CoalesceQueue(3, hold(0)),
        ],
    ];
    for story in stories {
        let mut from = controls();
        for command in &story {
            assert!(ask(&mut from, command), "{command:?}");
        }
        let saved = from.save();
        let mut to = controls();
        to.restore(&saved.0, saved.1.as_deref()).unwrap();
        assert_eq!(to.save(), saved);
        assert_eq!(to.settings().filter, from.settings().filter);
        let others = |controls: &Controls| {
            let settings = controls.settings();
            let in_use = 2 * usize::from(settings.pairs);
            let held = settings.coalescing[..in_use].to_vec();
            let (rss, hasher) = (settings.rss.clone(), settings.hasher.clone());
            (settings.pairs, rss, hasher, settings.offloads, held)
        };
        assert_eq!(others(&to), others(&from));
    }
}

#[test]
fn what_was_not_negotiated_is_not_restored_and_nothing_changes() {
    let mut to = controls_with(Features::CTRL_RX);
    let mode = Command::Receive(ReceiveMode::Promiscuous, false).encode();
    let other = Command::SetPairs(2).encode();
    assert_eq!(to.restore(&[mode.clone(), other], None), None);
    assert_eq!(
        to.restore(std::slice::from_ref(&mode), Some(&[0; 512])),
        None,
        "no VLANs"
    );
    assert_eq!(to.restore(&[mode[..1].to_vec()], None), None);
    assert_eq!(to.restore(&[Command::AskStats.encode()], None), None);
    assert!(to.settings().filter.takes_all());
    assert_eq!(to.restore(&[mode], None), Some(()));
    assert!(!to.settings().filter.takes_all());
    let mut to = controls();
    assert_eq!(to.restore(&[], Some(&[0; 511])), None);
}

#[test]
fn a_driver_announces_itself_once_if_it_agreed_to() {
    let mut silent = controls_with(Features::CTRL_RX);
    assert!(!silent.ask_announce() && !silent.announces());
    let mut controls = controls();
    assert!(!controls.announces());
    assert!(controls.ask_announce() && controls.announces());
    assert!(ask(&mut controls, &Command::AcknowledgeAnnounce));
    assert!(!controls.announces());
}
