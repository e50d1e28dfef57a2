//! Which packets a driver wants to receive, by its own word. Spec: virtio 1.4, 5.1.9.5.1 to 5.1.9.5.3.

use virtnet_packet::header::{self, Mac};

use super::command::{Command, ReceiveMode};

/// Addresses of each kind that are kept one by one; a driver that names more gets all of the kind, which filters may do.
const MACS_MAX: usize = 64;

/// Numbers of VLANs.
const VLANS: u16 = 4096;

/// Some addresses, or all.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Macs {
    These(Vec<Mac>),
    All,
}

impl Default for Macs {
    fn default() -> Self {
        Self::These(Vec::new())
    }
}

impl Macs {
    fn new(mut macs: Vec<Mac>) -> Self {
        macs.sort_unstable();
        macs.dedup();
        if macs.len() > MACS_MAX {
            return Self::All;
        }
        // What was read is as large as the driver pleased.
        macs.shrink_to_fit();
        Self::These(macs)
    }

    /// Addresses that make the same of a new one.
    fn to_list(&self) -> Vec<Mac> {
        match self {
            Self::These(macs) => macs.clone(),
            // Which they were does not matter any more: there are too many.
            Self::All => (0..=MACS_MAX)
                .map(|n| Mac([2, 0, 0, 0, 0, u8::try_from(n).unwrap_or_default()]))
                .collect(),
        }
    }

    fn contains(&self, mac: Mac) -> bool {
        match self {
            Self::These(macs) => macs.binary_search(&mac).is_ok(),
            Self::All => true,
        }
    }
}

/// What a driver takes. In the beginning that is everything, until it says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The device's own address; where there is none, every station's may be meant.
    mac: Option<Mac>,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Macs,
    multicast: Macs,
    /// A bit for each VLAN, where they are filtered.
    vlans: Option<Box<[u64; VLANS as usize / 64]>>,
}

impl Filter {
    /// The filter of a driver that has not said anything; whether VLANs are filtered was negotiated.
    pub(super) fn new(mac: Option<Mac>, with_vlans: bool) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Macs::default(),
            multicast: Macs::default(),
            vlans: with_vlans.then(|| Box::new([0; VLANS as usize / 64])),
        }
    }

    /// The device's own address, if it has one.
    #[must_use]
    pub fn mac(&self) -> Option<Mac> {
        self.mac
    }

    /// Whether nothing is filtered.
    #[must_use]
    pub fn takes_all(&self) -> bool {
        self.promiscuous
    }

    /// Whether the frame that starts with `head` is wanted.
    #[must_use]
    pub fn takes(&self, head: &[u8]) -> bool {
        if self.promiscuous {
            return true;
        }
        let Some(to) = header::destination(head) else {
            return false;
        };
        let address_fits = if to == Mac::BROADCAST {
            !self.no_broadcast
        } else if to.is_group() {
            !self.no_multicast && (self.all_multicast || self.multicast.contains(to))
        } else {
            let own = self.mac.is_none_or(|mac| mac == to);
            !self.no_unicast && (self.all_unicast || own || self.unicast.contains(to))
        };
        address_fits && self.takes_vlan(head)
    }

    fn takes_vlan(&self, head: &[u8]) -> bool {
        match (&self.vlans, head.get(12..16)) {
            (Some(vlans), Some(&[0x81, 0x00, high, low])) => {
                let vlan = usize::from(u16::from_be_bytes([high, low]) % VLANS);
                vlans[vlan / 64] >> (vlan % 64) & 1 == 1
            }
            _ => true,
        }
    }

    pub(super) fn set_mode(&mut self, mode: ReceiveMode, on: bool) {
        let switch = match mode {
            ReceiveMode::Promiscuous => &mut self.promiscuous,
            ReceiveMode::AllMulticast => &mut self.all_multicast,
            ReceiveMode::AllUnicast => &mut self.all_unicast,
            ReceiveMode::NoMulticast => &mut self.no_multicast,
            ReceiveMode::NoUnicast => &mut self.no_unicast,
            ReceiveMode::NoBroadcast => &mut self.no_broadcast,
        };
        *switch = on;
    }

    pub(super) fn set_mac(&mut self, mac: Mac) {
        self.mac = Some(mac);
    }

    pub(super) fn set_macs(&mut self, unicast: Vec<Mac>, multicast: Vec<Mac>) {
        self.unicast = Macs::new(unicast);
        self.multicast = Macs::new(multicast);
    }

    /// What a driver would have to say to have this filter from the beginning, but for the device's address and VLANs.
    pub(super) fn commands(&self) -> Vec<Command> {
        let switches = [
            self.promiscuous,
            self.all_multicast,
            self.all_unicast,
            self.no_multicast,
            self.no_unicast,
            self.no_broadcast,
        ];
        let modes = ReceiveMode::ALL.into_iter().zip(switches);
        let modes = modes.filter(|&(mode, on)| on != (mode == ReceiveMode::Promiscuous));
        let mut commands: Vec<_> = modes.map(|(mode, on)| Command::Receive(mode, on)).collect();
        if (&self.unicast, &self.multicast) != (&Macs::default(), &Macs::default()) {
            commands.push(Command::MacTable {
                unicast: self.unicast.to_list(),
                multicast: self.multicast.to_list(),
            });
        }
        commands
    }

    /// The VLANs that are received, a bit for each, if there are some.
    pub(super) fn vlans(&self) -> Option<Vec<u8>> {
        let vlans = self
            .vlans
            .as_ref()
            .filter(|vlans| vlans.iter().any(|&it| it > 0))?;
        Some(vlans.iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    /// Receives these VLANs and no others; whether that is what the bytes say.
    pub(super) fn set_vlans(&mut self, bytes: &[u8]) -> bool {
        let (words, rest) = bytes.as_chunks();
        let Some(vlans) = self.vlans.as_mut().filter(|it| it.len() == words.len()) else {
            return false;
        };
        let words = words.iter().map(|&word| u64::from_le_bytes(word));
        vlans
            .iter_mut()
            .zip(words)
            .for_each(|(to, word)| *to = word);
        rest.is_empty()
    }

    /// Receives a VLAN or does not; whether there is such a VLAN.
    pub(super) fn set_vlan(&mut self, vlan: u16, on: bool) -> bool {
        let (Some(vlans), true) = (&mut self.vlans, vlan < VLANS) else {
            return false;
        };
        let (word, bit) = (&mut vlans[usize::from(vlan) / 64], 1 << (vlan % 64));
        *word = if on { *word | bit } else { *word & !bit };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const GROUP: Mac = Mac([1, 0, 0x5e, 0, 0, 1]);

    fn frame(to: Mac) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[..6].copy_from_slice(&to.0);
        frame
    }

    fn tagged(to: Mac, vlan: u16) -> Vec<u8> {
        let mut frame = frame(to);
        frame[12..14].copy_from_slice(&[0x81, 0]);
        // The priority is not part of the number.
        frame[14..16].copy_from_slice(&(vlan | 0xe000).to_be_bytes());
        frame
    }

    fn filter() -> Filter {
        let mut filter = Filter::new(Some(OWN), true);
        filter.set_mode(ReceiveMode::Promiscuous, false);
        filter
    }

    /// Which of its own address, another one, a group and everybody it takes.
    fn taken(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, Mac::BROADCAST].map(|to| filter.takes(&frame(to)))
    }

    #[test]
    fn everything_is_taken_until_the_driver_says_otherwise() {
        let filter = Filter::new(Some(OWN), true);
        assert!(filter.takes_all() && filter.takes(&tagged(OTHER, 5)) && filter.takes(&[]));
    }

    #[test]
    fn modes_decide_as_the_specification_orders_them() {
        assert_eq!(taken(&filter()), [true, false, false, true]);
        let cases = [
            (ReceiveMode::AllMulticast, [true, false, true, true]),
            (ReceiveMode::AllUnicast, [true, true, true, true]),
            (ReceiveMode::NoMulticast, [true, true, false, true]),
            (ReceiveMode::NoUnicast, [false, false, false, true]),
            (ReceiveMode::NoBroadcast, [false, false, false, false]),
            (ReceiveMode::Promiscuous, [true; 4]),
        ];
        let mut filter = filter();
        for (mode, expected) in cases {
            filter.set_mode(mode, true);
            assert_eq!(taken(&filter), expected, "{mode:?}");
        }
    }

    #[test]
    fn addresses_in_the_table_are_taken_and_too_many_are_all() {
        let mut filter = filter();
        filter.set_macs(vec![OTHER, OTHER], vec![GROUP]);
        assert_eq!(taken(&filter), [true; 4]);
        filter.set_macs(Vec::new(), Vec::new());
        assert_eq!(taken(&filter), [true, false, false, true]);
        let many = (0..=64).map(|k| Mac([2, 9, 9, 9, 9, k])).collect();
        filter.set_macs(many, Vec::new());
        assert_eq!(taken(&filter), [true, true, false, true]);
        filter.set_mac(OTHER);
        assert_eq!(filter.mac(), Some(OTHER));
    }

    #[test]
    fn without_an_address_of_its_own_a_device_takes_all_stations() {
        let mut filter = Filter::new(None, false);
        filter.set_mode(ReceiveMode::Promiscuous, false);
        assert_eq!(taken(&filter), [true, true, false, true]);
        filter.set_mac(OWN);
        assert_eq!(taken(&filter), [true, false, false, true]);
    }

    #[test]
    fn tagged_packets_are_taken_of_the_listed_vlans_only() {
        let mut filter = filter();
        assert!(filter.takes(&frame(OWN)) && !filter.takes(&tagged(OWN, 5)));
        assert!(filter.set_vlan(5, true) && filter.set_vlan(4095, true));
        assert!(filter.takes(&tagged(OWN, 5)) && filter.takes(&tagged(OWN, 4095)));
        assert!(!filter.takes(&tagged(OWN, 6)) && !filter.takes(&tagged(OTHER, 5)));
        assert!(filter.set_vlan(5, false) && !filter.takes(&tagged(OWN, 5)));
        assert!(!filter.set_vlan(4096, true));
        let mut unfiltered = Filter::new(Some(OWN), false);
        unfiltered.set_mode(ReceiveMode::Promiscuous, false);
        assert!(unfiltered.takes(&tagged(OWN, 7)) && !unfiltered.set_vlan(7, true));
    }
}
