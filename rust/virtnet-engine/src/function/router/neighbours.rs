//! Who is on the links: stations by their IP addresses, found by asking (ARP, neighbour discovery), and packets that wait for an
//! answer.
//!
//! A station that was heard of is believed for [`FRESH_NS`]. One that was sent to meanwhile is then asked again, by its own
//! address, and forgotten if it does not answer; one that was not is forgotten at once. Everything is bounded, each link for
//! itself, so that nobody fills the table for others.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use virtnet_packet::Offload;
use virtnet_packet::header::Mac;

use crate::graph::Gate;

/// How long a station is believed to be where it was.
const FRESH_NS: u64 = 30_000_000_000;
/// How long an answer is waited for. Spec: RFC 4861, 10 (RETRANS_TIMER).
const ANSWER_NS: u64 = 1_000_000_000;
/// How often a station is asked. Spec: RFC 4861, 10 (MAX_MULTICAST_SOLICIT).
const ASKED_MAX: u8 = 3;
/// Stations of one link.
const STATIONS_MAX: u32 = 4_096;
/// Packets that wait for one station.
const WAITING_MAX: usize = 64;
/// Bytes that wait for all stations together.
const WAITING_BYTES: usize = 4 << 20;

/// Where a station is, and its address there.
pub(super) type Station = (Gate, IpAddr);

/// A frame that waits for its receiver's address on the link.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) frame: Vec<u8>,
    pub(super) offload: Offload,
}

/// A question that is to be asked: of everybody, or of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) station: Station,
    pub(super) of: Option<Mac>,
}

#[derive(Debug)]
struct Neighbour {
    mac: Option<Mac>,
    /// Something was sent to it since it was heard of.
    used: bool,
    /// Questions without an answer.
    asked: u8,
    /// When something is to be done about it.
    due: u64,
    waiting: VecDeque<Waiting>,
}

/// The stations on a router's links.
#[derive(Debug)]
pub(super) struct Neighbours {
    stations: HashMap<Station, Neighbour, foldhash::fast::RandomState>,
    /// Stations by gate.
    counts: Vec<u32>,
    /// Nothing is to be done before.
    due: u64,
    waiting_bytes: usize,
    /// Questions to be asked.
    pub(super) questions: Vec<Question>,
    /// Those that were waited for and have answered.
    answered: Vec<Station>,
}

impl Default for Neighbours {
    fn default() -> Self {
        Self {
            stations: HashMap::default(),
            counts: Vec::new(),
            due: u64::MAX,
            waiting_bytes: 0,
            questions: Vec::new(),
            answered: Vec::new(),
        }
    }
}

impl Neighbours {
    /// The address of a station on its link. None: it is being asked for, and packets [`wait`](Self::wait).
    #[inline]
    pub(super) fn find(&mut self, station: Station, now: u64) -> Option<Mac> {
        let known = self.known(station);
        if known.is_none() && !self.stations.contains_key(&station) {
            self.ask(station, now);
        }
        known
    }

    /// The same without asking for it.
    #[inline]
    pub(super) fn known(&mut self, station: Station) -> Option<Mac> {
        let there = self.stations.get_mut(&station)?;
        // What waits for it goes first.
        if !there.waiting.is_empty() {
            return None;
        }
        there.used = true;
        there.mac
    }

    #[cold]
    fn ask(&mut self, station: Station, now: u64) {
        if !self.make_room(station.0) {
            return;
        }
        self.insert(station, None, now + ANSWER_NS);
        self.questions.push(Question { station, of: None });
    }

    fn make_room(&mut self, gate: Gate) -> bool {
        let at = usize::from(gate);
        if self.counts.len() <= at {
            self.counts.resize(at + 1, 0);
        }
        self.counts[at] < STATIONS_MAX
    }

    fn insert(&mut self, station: Station, mac: Option<Mac>, due: u64) {
        self.counts[usize::from(station.0)] += 1;
        self.due = self.due.min(due);
        self.stations.insert(
            station,
            Neighbour {
                mac,
                used: false,
                asked: u8::from(mac.is_none()),
                due,
                waiting: VecDeque::new(),
            },
        );
    }

    /// Keeps a frame until its receiver has answered; false: there is no room.
    pub(super) fn wait(&mut self, station: Station, frame: Waiting) -> bool {
        let bytes = self.waiting_bytes + frame.frame.len();
        let Some(there) = self.stations.get_mut(&station) else {
            return false;
        };
        if there.waiting.len() >= WAITING_MAX || bytes > WAITING_BYTES {
            return false;
        }
        self.waiting_bytes = bytes;
        there.waiting.push_back(frame);
        true
    }

    /// A station says where it is. One that nobody has asked for is remembered only if it speaks `to_us`.
    pub(super) fn hear(&mut self, station: Station, mac: Mac, to_us: bool, now: u64) {
        if mac.is_group() || mac == Mac::default() {
            return;
        }
        let due = now + FRESH_NS;
        let Some(there) = self.stations.get_mut(&station) else {
            if to_us && self.make_room(station.0) {
                self.insert(station, Some(mac), due);
            }
            return;
        };
        if there.mac.is_none() && !there.waiting.is_empty() {
            self.answered.push(station);
        }
        (there.mac, there.used, there.asked, there.due) = (Some(mac), false, 0, due);
        self.due = self.due.min(due);
    }

    /// A station whose answer was waited for, its address and what waits for it.
    pub(super) fn next_answered(&mut self) -> Option<(Station, Mac, VecDeque<Waiting>)> {
        while let Some(station) = self.answered.pop() {
            if let Some(there) = self.stations.get_mut(&station)
                && let Some(mac) = there.mac
            {
                there.used = true;
                let waiting = std::mem::take(&mut there.waiting);
                self.waiting_bytes -= bytes(&waiting);
                return Some((station, mac, waiting));
            }
        }
        None
    }

    /// Asks again, doubts and forgets whom it is time for. What waited for those who never answered is handed to `lose`.
    pub(super) fn pass_time(&mut self, now: u64, mut lose: impl FnMut(Gate, Waiting)) {
        if now < self.due {
            return;
        }
        let (questions, counts) = (&mut self.questions, &mut self.counts);
        let mut lost_bytes = 0;
        let mut due = u64::MAX;
        self.stations.retain(|&station, there| {
            if there.due <= now {
                let is_wanted = there.mac.is_none() || there.used || there.asked > 0;
                if !is_wanted || there.asked >= ASKED_MAX {
                    counts[usize::from(station.0)] -= 1;
                    lost_bytes += bytes(&there.waiting);
                    there.waiting.drain(..).for_each(|one| lose(station.0, one));
                    return false;
                }
                questions.push(Question {
                    station,
                    of: there.mac,
                });
                there.asked += 1;
                there.due = now + ANSWER_NS;
            }
            due = due.min(there.due);
            true
        });
        self.waiting_bytes -= lost_bytes;
        self.due = due;
    }

    /// When something is to be done.
    pub(super) fn due(&self) -> Option<u64> {
        (self.due != u64::MAX).then_some(self.due)
    }

    /// Whether there is something to be sent.
    pub(super) fn is_pending(&self) -> bool {
        !self.questions.is_empty() || !self.answered.is_empty()
    }

    /// A gate leads somewhere else now. What waits there is handed to `lose`.
    pub(super) fn forget(&mut self, gates: &[Gate], mut lose: impl FnMut(Waiting)) {
        let is_gone = |gate| gates.binary_search(&gate).is_ok();
        let mut lost_bytes = 0;
        self.stations.retain(|&(at, _), there| {
            if is_gone(at) {
                lost_bytes += bytes(&there.waiting);
                there.waiting.drain(..).for_each(&mut lose);
            }
            !is_gone(at)
        });
        self.waiting_bytes -= lost_bytes;
        self.questions
            .retain(|question| !is_gone(question.station.0));
        self.answered.retain(|station| !is_gone(station.0));
        for &gate in gates {
            if let Some(count) = self.counts.get_mut(usize::from(gate)) {
                *count = 0;
            }
        }
    }

    /// Stations whose address is known, and packets that wait.
    pub(super) fn count(&self) -> (u64, u64) {
        let known = self.stations.values().filter(|it| it.mac.is_some()).count();
        let waiting: usize = self.stations.values().map(|it| it.waiting.len()).sum();
        (known as u64, waiting as u64)
    }
}

fn bytes(waiting: &VecDeque<Waiting>) -> usize {
    waiting.iter().map(|one| one.frame.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);

    fn station(n: u8) -> Station {
        (1, IpAddr::from([10, 0, 0, n]))
    }

    fn frame() -> Waiting {
        Waiting {
            frame: vec![0; 100],
            offload: Offload::default(),
        }
    }

    #[test]
    fn a_station_is_asked_for_thrice_and_then_given_up_with_what_waits() {
        let mut all = Neighbours::default();
        assert_eq!(all.find(station(1), 0), None);
        assert!(all.wait(station(1), frame()));
        let mut lost = 0;
        for second in 0..4 {
            all.pass_time(second * ANSWER_NS, |gate, _| lost += usize::from(gate));
        }
        let asked: Vec<Question> = std::mem::take(&mut all.questions);
        let everybody = Question {
            station: station(1),
            of: None,
        };
        assert_eq!((asked, lost), (vec![everybody; 3], 1));
        assert_eq!(
            (all.count(), all.due(), all.waiting_bytes),
            ((0, 0), None, 0)
        );
    }

    #[test]
    fn what_waits_goes_first_when_the_answer_comes() {
        let mut all = Neighbours::default();
        assert_eq!(all.find(station(1), 0), None);
        assert!(all.wait(station(1), frame()));
        all.hear(station(1), MAC, false, 1);
        assert_eq!(all.find(station(1), 1), None);
        assert!(all.wait(station(1), frame()));
        let (whom, mac, waiting) = all.next_answered().unwrap();
        assert_eq!((whom, mac, waiting.len()), (station(1), MAC, 2));
        assert_eq!(all.find(station(1), 1), Some(MAC));
        assert!(all.next_answered().is_none());
    }

    #[test]
    fn one_that_is_used_is_asked_again_and_one_that_is_not_is_forgotten() {
        let mut all = Neighbours::default();
        all.hear(station(1), MAC, true, 0);
        all.hear(station(2), MAC, true, 0);
        all.hear(station(3), MAC, false, 0);
        assert_eq!(all.count().0, 2);
        assert_eq!(all.find(station(1), 5), Some(MAC));
        all.pass_time(FRESH_NS, |_, _| {});
        let doubt = Question {
            station: station(1),
            of: Some(MAC),
        };
        assert_eq!((all.count().0, &all.questions[..]), (1, &[doubt][..]));
        assert_eq!(all.find(station(1), FRESH_NS), Some(MAC));
        all.hear(station(1), MAC, false, FRESH_NS + 1);
        all.pass_time(FRESH_NS + ANSWER_NS, |_, _| {});
        assert_eq!((all.count().0, all.questions.len()), (1, 1));
    }

    #[test]
    fn room_is_bounded_for_each_link_and_each_station() {
        let mut all = Neighbours::default();
        for n in 0..STATIONS_MAX + 10 {
            all.find((1, IpAddr::from(n.to_be_bytes())), 0);
        }
        assert_eq!(all.questions.len(), STATIONS_MAX as usize);
        all.find((2, IpAddr::from([1, 1, 1, 1])), 0);
        assert_eq!(all.questions.len(), STATIONS_MAX as usize + 1);
        let waited =
            (0..WAITING_MAX + 5).filter(|_| all.wait((2, IpAddr::from([1, 1, 1, 1])), frame()));
        assert_eq!(waited.count(), WAITING_MAX);
        let mut lost = 0;
        all.forget(&[2], |_| lost += 1);
        assert_eq!((lost, all.waiting_bytes), (WAITING_MAX, 0));
        assert!(all.wait((1, IpAddr::from([0, 0, 0, 0])), frame()));
    }
}
