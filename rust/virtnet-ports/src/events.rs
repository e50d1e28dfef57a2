//! What has happened in a port's life, in order: for a person who wants to know why nothing moves, and for a test that waits.
//!
//! The control half of a port records, whoever is interested reads; neither waits for a worker. A log keeps the newest
//! [`KEPT`] events and counts those that it let go, so nobody at the other end can make it grow.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use virtnet_sys::monotonic_ns;

/// How many events a log keeps.
pub const KEPT: usize = 256;

/// Something that has happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// Which one it is, counted from 0 from the port's beginning.
    pub number: u64,
    /// When, on the monotonic clock.
    pub at_ns: u64,
    /// When, since 1970, by the clock on the wall.
    pub wall_ns: u64,
    /// What.
    pub what: What,
}

/// Who is at the other end of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Of a device.
    FrontEnd,
    /// Of a driver.
    BackEnd,
    /// Of a socket that frames go through.
    Socket,
}

/// What can happen; its text is a sentence without a full stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// Somebody has come to the other end.
    Connected {
        /// Who it is to us.
        peer: Peer,
        /// Which process.
        pid: Option<i32>,
    },
    /// The back-end has told what it offers.
    Offered {
        /// Virtio features.
        features: u64,
        /// Protocol features.
        protocol: u64,
    },
    /// Virtio features are agreed on.
    Features {
        /// Which.
        features: u64,
    },
    /// There is other guest memory than before.
    Memory {
        /// In so many regions.
        regions: usize,
        /// Of so many bytes together.
        bytes: u64,
    },
    /// A ring has been started.
    RingStarted {
        /// Which.
        ring: usize,
        /// How many entries it has.
        size: u16,
        /// Where it begins, as SET_VRING_BASE has it.
        base: u32,
        /// Whether it is enabled.
        enabled: bool,
    },
    /// A ring goes on where the device before this one had got to, which was killed.
    RingRecovered {
        /// Which.
        ring: usize,
        /// Where the front-end had said that it begins.
        given: u32,
        /// Where it goes on.
        base: u32,
        /// Chains that had been taken and are taken again, as far as that is known.
        taken_again: u16,
    },
    /// A ring has been stopped.
    RingStopped {
        /// Which.
        ring: usize,
        /// Where it goes on, as GET_VRING_BASE has it; `None` if that is not known.
        base: Option<u32>,
    },
    /// A running ring has been enabled or disabled.
    RingEnabled {
        /// Which.
        ring: usize,
        /// Whether it is enabled now.
        enabled: bool,
    },
    /// A ring had to be given up.
    RingBroken {
        /// Which.
        ring: usize,
        /// Why.
        why: String,
    },
    /// A request was not carried out.
    Refused {
        /// Which, and why.
        why: String,
    },
    /// The device was reset, and the session goes on.
    Reset,
    /// The device wants to be announced to the network, and has been told that it is.
    Announce,
    /// The back-end has been told everything: packets can flow.
    Running {
        /// Over so many queue pairs.
        queue_pairs: usize,
    },
    /// Whoever was there has gone.
    Disconnected {
        /// Who it was to us.
        peer: Peer,
        /// Why, if it did not simply leave.
        why: Option<String>,
    },
    /// The port has an interface of the host.
    Attached {
        /// The driver hands its packets over, not the network stack.
        native: bool,
        /// The card shares our memory.
        zero_copy: bool,
        /// Over so many queues.
        queues: usize,
    },
    /// An interface of the host is up, and so is the other end of its cable.
    LinkUp {
        /// Its name.
        interface: String,
    },
    /// It is not.
    LinkDown {
        /// Its name.
        interface: String,
    },
    /// It is gone for good.
    Removed {
        /// Its name.
        interface: String,
    },
    /// Nobody can be reached; it is tried again and again. Told once for each reason.
    Nobody {
        /// Why.
        why: String,
    },
}

/// A value that belongs to an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Datum {
    /// A number.
    Number(u64),
    /// Yes or no.
    Flag(bool),
    /// A text.
    Text(String),
}

impl What {
    /// Its name, which stays the same.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Connected { .. } => "connected",
            Self::Offered { .. } => "offered",
            Self::Features { .. } => "features",
            Self::Memory { .. } => "memory",
            Self::RingStarted { .. } => "ring_started",
            Self::RingRecovered { .. } => "ring_recovered",
            Self::RingStopped { .. } => "ring_stopped",
            Self::RingEnabled { enabled: true, .. } => "ring_enabled",
            Self::RingEnabled { enabled: false, .. } => "ring_disabled",
            Self::RingBroken { .. } => "ring_broken",
            Self::Refused { .. } => "refused",
            Self::Reset => "reset",
            Self::Announce => "announce",
            Self::Running { .. } => "running",
            Self::Disconnected { .. } => "disconnected",
            Self::Attached { .. } => "attached",
            Self::LinkUp { .. } => "link_up",
            Self::LinkDown { .. } => "link_down",
            Self::Removed { .. } => "removed",
            Self::Nobody { .. } => "nobody",
        }
    }

    /// Its values by name; what is not known is left out.
    #[must_use]
    pub fn data(&self) -> Vec<(&'static str, Datum)> {
        let number = |n: u64| Datum::Number(n);
        let count = |n: usize| Datum::Number(n as u64);
        let text = |text: &String| Datum::Text(text.clone());
        match self {
            Self::Connected { pid, .. } => {
                let pid = pid.and_then(|pid| u64::try_from(pid).ok());
                pid.map(|pid| ("pid", number(pid))).into_iter().collect()
            }
            Self::Offered { features, protocol } => vec![
                ("features", number(*features)),
                ("protocol_features", number(*protocol)),
            ],
            Self::Features { features } => vec![("features", number(*features))],
            Self::Memory { regions, bytes } => {
                vec![("regions", count(*regions)), ("bytes", number(*bytes))]
            }
            Self::RingStarted {
                ring,
                size,
                base,
                enabled,
            } => vec![
                ("ring", count(*ring)),
                ("size", number((*size).into())),
                ("base", number((*base).into())),
                ("enabled", Datum::Flag(*enabled)),
            ],
            Self::RingRecovered {
                ring,
                given,
                base,
                taken_again,
            } => vec![
                ("ring", count(*ring)),
                ("given", number((*given).into())),
                ("base", number((*base).into())),
                ("taken_again", number((*taken_again).into())),
            ],
            Self::RingStopped { ring, base } => {
                let base = base.map(|base| ("base", number(base.into())));
                [("ring", count(*ring))].into_iter().chain(base).collect()
            }
            Self::RingEnabled { ring, .. } => vec![("ring", count(*ring))],
            Self::RingBroken { ring, why } => vec![("ring", count(*ring)), ("why", text(why))],
            Self::Running { queue_pairs } => vec![("queue_pairs", count(*queue_pairs))],
            Self::Disconnected { why, .. } => why.iter().map(|why| ("why", text(why))).collect(),
            Self::Refused { why } | Self::Nobody { why } => vec![("why", text(why))],
            Self::Attached {
                native,
                zero_copy,
                queues,
            } => vec![
                ("native", Datum::Flag(*native)),
                ("zero_copy", Datum::Flag(*zero_copy)),
                ("queues", count(*queues)),
            ],
            Self::LinkUp { interface }
            | Self::LinkDown { interface }
            | Self::Removed { interface } => vec![("interface", text(interface))],
            Self::Reset | Self::Announce => Vec::new(),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FrontEnd => "front-end",
            Self::BackEnd => "back-end",
            Self::Socket => "peer",
        })
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connected {
                peer,
                pid: Some(pid),
            } => write!(f, "a {peer} has come, process {pid}"),
            Self::Connected { peer, pid: None } => write!(f, "a {peer} has come"),
            Self::Offered { features, protocol } => {
                write!(
                    f,
                    "the back-end offers features {features:#x} and protocol features {protocol:#x}"
                )
            }
            Self::Features { features } => write!(f, "features {features:#x} are agreed on"),
            Self::Memory { regions, bytes } => {
                write!(f, "guest memory has {bytes} bytes in {regions} regions")
            }
            Self::RingStarted {
                ring,
                size,
                base,
                enabled,
            } => {
                let state = if *enabled {
                    "enabled"
                } else {
                    "not enabled yet"
                };
                write!(
                    f,
                    "ring {ring} of {size} entries was started at {base:#x}, {state}"
                )
            }
            Self::RingRecovered {
                ring,
                given,
                base,
                taken_again,
            } => write!(
                f,
                "ring {ring} goes on at {base:#x}, where a device that is gone had got to (the front-end said {given:#x}), and \
                 {taken_again} chains that had been taken are taken again"
            ),
            Self::RingStopped {
                ring,
                base: Some(base),
            } => write!(f, "ring {ring} was stopped at {base:#x}"),
            Self::RingStopped { ring, base: None } => write!(f, "ring {ring} was stopped"),
            Self::RingEnabled {
                ring,
                enabled: true,
            } => write!(f, "ring {ring} was enabled"),
            Self::RingEnabled {
                ring,
                enabled: false,
            } => write!(f, "ring {ring} was disabled"),
            Self::RingBroken { ring, why } => write!(f, "ring {ring} was given up, {why}"),
            Self::Refused { why } => write!(f, "refused: {why}"),
            Self::Reset => f.write_str("the device was reset"),
            Self::Announce => f.write_str(
                "the device has come to another place and wants that to be announced: whoever stands behind this port is to send \
                 something, such as an ARP packet about itself",
            ),
            Self::Running { queue_pairs } => {
                write!(f, "packets can flow over {queue_pairs} queue pairs")
            }
            Self::Disconnected {
                peer,
                why: Some(why),
            } => write!(f, "the {peer} has gone: {why}"),
            Self::Disconnected { peer, why: None } => write!(f, "the {peer} has gone"),
            Self::Attached {
                native,
                zero_copy,
                queues,
            } => {
                let place = if *native {
                    "its driver"
                } else {
                    "the network stack"
                };
                let memory = if *zero_copy {
                    "shares our memory"
                } else {
                    "copies"
                };
                let s = if *queues == 1 { "" } else { "s" };
                write!(
                    f,
                    "attached to the interface by {place}, which {memory}, with {queues} queue{s}"
                )
            }
            Self::LinkUp { interface } => write!(f, "{interface} is up"),
            Self::LinkDown { interface } => write!(f, "{interface} is down"),
            Self::Removed { interface } => {
                write!(f, "{interface} is gone, and does not come back")
            }
            Self::Nobody { why } => {
                write!(f, "nobody is there: {why}; it is tried again and again")
            }
        }
    }
}

/// The newest events of a port. A copy is the same log.
#[derive(Clone, Debug, Default)]
pub struct EventLog(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    events: VecDeque<Event>,
    /// How many there were in all.
    recorded: u64,
}

impl EventLog {
    /// Adds an event that happens now.
    pub(crate) fn record(&self, what: What) {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH);
        let wall = wall.unwrap_or_default().as_nanos();
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.events.len() == KEPT {
            kept.events.pop_front();
        }
        let number = kept.recorded;
        kept.recorded += 1;
        kept.events.push_back(Event {
            number,
            at_ns: monotonic_ns(),
            wall_ns: u64::try_from(wall).unwrap_or(u64::MAX),
            what,
        });
    }

    /// Adds one if it is another one than the last.
    pub(crate) fn record_if_new(&self, what: What) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_last = kept.events.back().is_some_and(|last| last.what == what);
        drop(kept);
        if !is_last {
            self.record(what);
        }
    }

    /// The events from number `first` on that are still there, in order, and how many of all have been let go.
    #[must_use]
    pub fn since(&self, first: u64) -> (Vec<Event>, u64) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = kept.events.iter().filter(|event| event.number >= first);
        let dropped = kept.recorded - kept.events.len() as u64;
        (wanted.cloned().collect(), dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept_in_order_and_the_others_are_counted() {
        let log = EventLog::default();
        for ring in 0..KEPT + 10 {
            log.record(What::RingEnabled {
                ring,
                enabled: true,
            });
        }
        let (events, dropped) = log.since(0);
        assert_eq!((events.len(), dropped), (KEPT, 10));
        let numbers: Vec<_> = events.iter().map(|event| event.number).collect();
        assert_eq!(numbers, (10..10 + KEPT as u64).collect::<Vec<_>>());
        assert!(events.is_sorted_by_key(|event| event.at_ns));
        let (last, _) = log.since(KEPT as u64 + 9);
        assert_eq!(
            last[0].what.data(),
            [("ring", Datum::Number(KEPT as u64 + 9))]
        );
    }

    #[test]
    fn what_is_tried_again_and_again_is_told_once() {
        let log = EventLog::default();
        let nobody = |why: &str| What::Nobody {
            why: why.to_owned(),
        };
        for why in ["a", "a", "a", "b", "b", "a"] {
            log.record_if_new(nobody(why));
        }
        let told: Vec<_> = log.since(0).0.into_iter().map(|event| event.what).collect();
        assert_eq!(told, [nobody("a"), nobody("b"), nobody("a")]);
        assert_eq!(told[0].kind(), "nobody");
    }
}
