//! The control queue of a network device: what a driver asks for, and what of it is in force.
//!
//! [`Command`] is what is said, [`ControlQueue`] and [`DriverControl`] carry it over a ring, and [`Controls`] is the device that
//! listens: it checks a command, changes its [`Settings`] and says whether it did. Whoever moves packets follows the settings.
//!
//! It guarantees that every request is answered, by an error where it makes no sense or was not negotiated; that a refused command
//! changes nothing; and that no driver can make it keep more than a few kilobytes.
//!
//! Spec: virtio 1.4, 5.1.9.5, Control Virtqueue.

mod command;
mod filter;
mod queue;

use std::sync::Arc;

use virtnet_packet::header::Mac;

use super::rss::{HashTypes, Hasher, KEY_MAX, Rss};
use crate::Features;

pub use command::{Coalescing, Command, ReceiveMode, RssConfig, StatsAsked};
pub use filter::Filter;
pub use queue::{CONTROL_MAX, ControlQueue, DriverControl};

/// The verdict of a command that was carried out, and of one that was not.
pub const OK: u8 = 0;
/// See [`OK`].
pub const ERR: u8 = 1;

/// Kinds of statistics that there are, by their bits: the basic ones of receiveqs and transmitqs, and those of the control queue.
const STATS_RECEIVE: u64 = 1 << 0;
const STATS_TRANSMIT: u64 = 1 << 16;
const STATS_CONTROL: u64 = 1 << 32;

/// What a driver has asked for and got: everything that moving packets depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Which packets it receives.
    pub filter: Filter,
    /// How many queue pairs it uses.
    pub pairs: u16,
    /// Where packets go, if that is not left to the device.
    pub rss: Option<Arc<Rss>>,
    /// What computes the hashes that it is told.
    pub hasher: Option<Arc<Hasher>>,
    /// Those features of [`Features::GUEST_OFFLOADS`] that it wants at the moment.
    pub offloads: Features,
    /// How notifications of each queue are held back, by the queue's number.
    pub coalescing: Box<[Coalescing]>,
}

/// What has passed a queue, as a driver may ask: the six numbers of basic statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounts {
    /// Notifications of the driver.
    pub kicks: u64,
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Notifications of the device.
    pub calls: u64,
    /// Packets dropped for any reason.
    pub drops: u64,
    /// Of these: for lack of buffers (receiveqs), or because they made no sense (transmitqs).
    pub drops_by_driver: u64,
}

/// The device's side of control: what was negotiated, and what was asked for since.
#[derive(Clone, Debug)]
pub struct Controls {
    features: Features,
    /// How many queue pairs the device has.
    pairs_max: u16,
    settings: Settings,
    /// What queues are held back by that are not told otherwise: receiveqs, transmitqs.
    held: [Coalescing; 2],
    /// What the settings' receive-side scaling and hasher were asked for by.
    rss: Option<RssConfig>,
    hash: Option<(HashTypes, Vec<u8>)>,
    /// The device's address before the driver gave it another.
    first_mac: Option<Mac>,
    /// The driver is to announce itself and has not said yet that it has.
    announces: bool,
    commands: u64,
    commands_ok: u64,
}

impl Controls {
    /// A device with so many queue pairs whose driver has negotiated `features` and has said nothing yet.
    #[must_use]
    pub fn new(features: Features, pairs_max: u16, mac: Option<Mac>) -> Self {
        let settings = Settings {
            filter: Filter::new(mac, features.contains(Features::CTRL_VLAN)),
            // Spec: virtio 1.4, 5.1.9.5.6: one pair until the driver asks for more.
            pairs: 1,
            rss: None,
            hasher: None,
            offloads: features & Features::GUEST_OFFLOADS,
            coalescing: vec![Coalescing::default(); 2 * usize::from(pairs_max)].into(),
        };
        Self {
            features,
            pairs_max,
            settings,
            held: [Coalescing::default(); 2],
            rss: None,
            hash: None,
            first_mac: mac,
            announces: false,
            commands: 0,
            commands_ok: 0,
        }
    }

    /// What is in force.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Has the driver announce itself, if it agreed to; whether it is to. Spec: virtio 1.4, 5.1.9.5.4.
    pub fn ask_announce(&mut self) -> bool {
        let agreed = Features::GUEST_ANNOUNCE | Features::CTRL_VQ;
        self.announces |= self.features.contains(agreed);
        self.announces
    }

    /// Whether the driver is to announce itself and has not acknowledged that.
    #[must_use]
    pub fn announces(&self) -> bool {
        self.announces
    }

    /// What was asked for and is in force, for a device that is to go on in place of this one: commands that make the same of it, as
    /// their bytes, and the VLANs that are received.
    #[must_use]
    pub fn save(&self) -> (Vec<Vec<u8>>, Option<Vec<u8>>) {
        let settings = &self.settings;
        let mut commands = settings.filter.commands();
        let mac = settings
            .filter
            .mac()
            .filter(|_| settings.filter.mac() != self.first_mac);
        commands.extend(mac.map(Command::SetMac));
        if let Some(rss) = &self.rss {
            commands.push(Command::Rss(rss.clone()));
        } else if settings.pairs != 1 {
            commands.push(Command::SetPairs(settings.pairs));
        }
        let hash = self.hash.clone();
        commands.extend(hash.map(|(types, key)| Command::Hash(types, key)));
        if settings.offloads != self.features & Features::GUEST_OFFLOADS {
            commands.push(Command::SetOffloads(settings.offloads.bits()));
        }
        let [receive, transmit] = self.held;
        if receive != Coalescing::default() {
            commands.push(Command::CoalesceReceive(receive));
        }
        if transmit != Coalescing::default() {
            commands.push(Command::CoalesceTransmit(transmit));
        }
        for queue in 0..2 * settings.pairs {
            let held = settings.coalescing[usize::from(queue)];
            if held != self.held[usize::from(queue % 2)] {
                commands.push(Command::CoalesceQueue(queue, held));
            }
        }
        let commands = commands.iter().map(Command::encode).collect();
        (commands, settings.filter.vlans())
    }

    /// Makes of this device what [`Self::save`] told of another; `None`, and nothing has changed, where it cannot be that.
    pub fn restore(&mut self, commands: &[Vec<u8>], vlans: Option<&[u8]>) -> Option<()> {
        let mut restored = Self::new(self.features, self.pairs_max, self.first_mac);
        for bytes in commands {
            let command = Command::decode(bytes)?;
            let is_possible = self.features.contains(Features::CTRL_VQ | command.needs());
            (is_possible && !command.only_asks()).then_some(())?;
            restored.carry_out(command, |_| QueueCounts::default())?;
        }
        if let Some(vlans) = vlans {
            restored.settings.filter.set_vlans(vlans).then_some(())?;
        }
        *self = restored;
        Some(())
    }

    /// Carries a request out, or not, and appends to `answer` what the device writes: data, the verdict, results. `counts` tells what
    /// has passed a queue. Whether the settings may be others now.
    pub fn serve(
        &mut self,
        request: &[u8],
        counts: impl FnMut(u16) -> QueueCounts,
        answer: &mut Vec<u8>,
    ) -> bool {
        self.commands += 1;
        let command = Command::decode(request)
            .filter(|command| self.features.contains(Features::CTRL_VQ | command.needs()));
        let asks = command.as_ref().is_some_and(Command::only_asks);
        let done = command.and_then(|command| self.carry_out(command, counts));
        self.commands_ok += u64::from(done.is_some());
        let verdict = if done.is_some() { OK } else { ERR };
        let bytes = done.unwrap_or_default();
        let data_len = match request {
            &[class, number, ..] => command::data_len([class, number]),
            _ => 0,
        };
        if data_len == 0 {
            answer.push(verdict);
            answer.extend(bytes);
        } else {
            answer.extend(&bytes);
            answer.resize(data_len, 0);
            answer.push(verdict);
        }
        verdict == OK && !asks
    }

    /// What the device writes beside its verdict; `None` where it refuses, and then nothing has changed.
    fn carry_out(
        &mut self,
        command: Command,
        counts: impl FnMut(u16) -> QueueCounts,
    ) -> Option<Vec<u8>> {
        let settings = &mut self.settings;
        match command {
            Command::Receive(mode, on) => settings.filter.set_mode(mode, on),
            Command::MacTable { unicast, multicast } => {
                settings.filter.set_macs(unicast, multicast);
            }
            Command::SetMac(mac) if mac.is_group() => return None,
            Command::SetMac(mac) => settings.filter.set_mac(mac),
            Command::AddVlan(vlan) => settings.filter.set_vlan(vlan, true).then_some(())?,
            Command::RemoveVlan(vlan) => settings.filter.set_vlan(vlan, false).then_some(())?,
            Command::AcknowledgeAnnounce => self.announces = false,
            Command::SetPairs(pairs) => {
                self.check_pairs(pairs)?;
                // The last of the two commands is the one that counts.
                self.settings.rss = None;
                self.rss = None;
                self.use_pairs(pairs);
            }
            Command::Rss(config) => self.set_rss(&config)?,
            Command::Hash(types, key) => {
                settings.hasher = Some(Arc::new(hasher(types, &key)?));
                self.hash = Some((types, key));
            }
            Command::SetOffloads(bits) => {
                let wanted = command::offloads_of(bits)?;
                let negotiated = self.features & Features::GUEST_OFFLOADS;
                negotiated.contains(wanted).then_some(())?;
                settings.offloads = wanted.with_needs();
            }
            Command::CoalesceReceive(to) => self.hold_back_all(0, to),
            Command::CoalesceTransmit(to) => self.hold_back_all(1, to),
            Command::CoalesceQueue(queue, to) => {
                *self.coalescing_of(queue)? = to;
            }
            Command::AskCoalescing(queue) => {
                let held = *self.coalescing_of(queue)?;
                let words = [held.max_packets, held.max_usecs];
                return Some(words.into_iter().flat_map(u32::to_le_bytes).collect());
            }
            Command::AskStats => {
                let types = STATS_RECEIVE | STATS_TRANSMIT | STATS_CONTROL;
                return Some(types.to_le_bytes().to_vec());
            }
            Command::Stats(asked) => return self.stats(&asked, counts),
        }
        Some(Vec::new())
    }

    fn check_pairs(&self, pairs: u16) -> Option<()> {
        (1..=self.pairs_max).contains(&pairs).then_some(())
    }

    /// Queues that are used again are held back as all are. Spec: virtio 1.4, 5.1.9.5.9.
    fn use_pairs(&mut self, pairs: u16) {
        let old = std::mem::replace(&mut self.settings.pairs, pairs);
        for pair in old..pairs {
            for side in 0..2 {
                let queue = 2 * usize::from(pair) + side;
                self.settings.coalescing[queue] = self.held[side];
            }
        }
    }

    fn set_rss(&mut self, config: &RssConfig) -> Option<()> {
        self.check_pairs(config.transmitqs)?;
        let pairs = || config.table.iter().chain([&config.unclassified]);
        pairs().all(|&pair| pair < self.pairs_max).then_some(())?;
        let hasher = hasher(config.types, &config.key)?;
        let rss = Rss::new(hasher, &config.table, config.unclassified)?;
        if self.features.contains(Features::HASH_REPORT) {
            self.settings.hasher = Some(Arc::new(rss.hasher().clone()));
            self.hash = Some((config.types, config.key.clone()));
        }
        self.rss = Some(config.clone());
        self.settings.rss = Some(Arc::new(rss));
        self.use_pairs(config.transmitqs);
        Some(())
    }

    fn hold_back_all(&mut self, side: usize, to: Coalescing) {
        self.held[side] = to;
        let queues = self.settings.coalescing.iter_mut();
        queues.skip(side).step_by(2).for_each(|queue| *queue = to);
    }

    /// How a queue that is in use is held back.
    fn coalescing_of(&mut self, queue: u16) -> Option<&mut Coalescing> {
        let in_use = queue / 2 < self.settings.pairs;
        self.settings
            .coalescing
            .get_mut(usize::from(queue))
            .filter(|_| in_use)
    }

    /// Spec: virtio 1.4, 5.1.9.5.11, Device Statistics.
    fn stats(
        &self,
        asked: &[StatsAsked],
        mut counts: impl FnMut(u16) -> QueueCounts,
    ) -> Option<Vec<u8>> {
        // As many as there are queues: an answer has an end.
        if asked.len() > self.settings.coalescing.len() + 1 {
            return None;
        }
        let mut answer = Vec::new();
        for &StatsAsked { queue, types } in asked {
            let (kind, control) = (queue % 2, 2 * self.pairs_max);
            let (bit, numbers) = match types {
                STATS_RECEIVE if queue < control && kind == 0 => (0, basic(counts(queue))),
                STATS_TRANSMIT if queue < control && kind == 1 => (16, basic(counts(queue))),
                STATS_CONTROL if queue == control => (32, vec![self.commands, self.commands_ok]),
                // One that cannot be answered is an answer to none.
                _ => return None,
            };
            let size = u16::try_from(8 + 8 * numbers.len()).ok()?;
            answer.extend([bit, 0]);
            answer.extend(queue.to_le_bytes());
            answer.extend([0; 2]);
            answer.extend(size.to_le_bytes());
            numbers
                .iter()
                .for_each(|number| answer.extend(number.to_le_bytes()));
        }
        Some(answer)
    }
}

fn basic(counts: QueueCounts) -> Vec<u64> {
    let QueueCounts {
        kicks,
        packets,
        bytes,
        calls,
        drops,
        drops_by_driver,
    } = counts;
    vec![kicks, packets, bytes, calls, drops, drops_by_driver]
}

/// A hasher as it was asked for, if there can be one.
fn hasher(types: HashTypes, key: &[u8]) -> Option<Hasher> {
    let possible = HashTypes::SUPPORTED.contains(types) && key.len() <= KEY_MAX;
    possible.then(|| Hasher::new(types, key))
}

#[cfg(test)]
mod tests;
