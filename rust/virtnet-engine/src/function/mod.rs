//! Network functions: what decides where the packets of a burst go.
//!
//! A function is called once per burst and per gate it came in by, and works in two phases. *Classify* gives every packet
//! a [`Fate`]; *act* is the same for all functions and not theirs to do ([`dispatch`](crate::dispatch)). Functions that
//! make packets themselves are asked in every breath.
//!
//! They never touch a port, never wait, and take the time as an argument.

mod analyser;
mod bridge;
mod departures;
mod divert;
mod echo;
mod element;
mod filter;
mod firewall;
mod fragments;
mod frame;
mod generator;
mod host;
mod impair;
mod mac_table;
mod outbox;
mod pace;
mod random;
mod router;
mod signature;
mod sink;
mod source;
mod switch;
mod tcp_reset;
mod tee;
mod wire;

pub use analyser::{Analyser, AnalyserCounters, AnalyserOrders, ReceivedStream};
pub use bridge::{BridgeRules, CableRules, Flap, StormLimits, VlanSet};
pub use divert::{Divert, DivertOrders, Late};
pub use echo::Echo;
pub use element::{Element, Program, ProgramError, Step, Table};
pub use filter::{Filter, FilterError, Instruction};
pub use firewall::{
    Action, AddressSet, Ends, Firewall, FirewallCounters, FirewallOrders, Prefix, Rule,
    RuleCounters, RuleSet, Timeouts,
};
pub use generator::{
    Generator, GeneratorOrders, StreamCounters, StreamOrders, Values, Vary, VaryPlace,
};
pub use host::{Blast, Host, HostCounters, HostOptions, HostOrders, Ping};
pub use impair::{Distribution, GilbertElliott, ImpairOrders, Impairment, LineCounters, Track};
pub(crate) use outbox::Outbox;
pub use router::{
    ERRORS_PPS, PrefixPair, Route, Router, RouterCounters, RouterInterface, RouterOrders,
    RouterTables, Service, TRANSLATED_PREFIX_MAX, Translation,
};
pub use sink::Sink;
pub use source::{Source, SourceOptions, SourceOrders};
pub(crate) use switch::SwitchNews;
pub use switch::{Switch, SwitchCounters, SwitchOptions, SwitchOrders};
pub(crate) use tee::BRANCH;
pub use tee::Tee;
pub use wire::Wire;

use virtnet_packet::{BURST_MAX, Backlog, Burst, DropReason, Picks};

use crate::EngineError;
use crate::change::Node;
use crate::graph::{Gate, NodeKind};
use crate::plan::Leftovers;
use crate::stats::FunctionCounters;

/// What is to happen to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It leaves by this gate.
    To(Gate),
    /// It leaves by every gate but the one it came in by.
    Flood,
    /// It is counted and gone.
    Drop(DropReason),
    /// It has reached its end.
    Consumed,
    /// The function has a copy of it, which leaves later.
    Held,
}

/// A fate for each packet that was picked, in the order of the picks.
pub(crate) type Fates = [Fate; BURST_MAX];

/// What a function says about a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The same for all.
    All(Fate),
    /// Each as written.
    Each,
    /// All go on as they are, after copies of those that are marked by [`Fate::Flood`] have left by the branch of a tee.
    Copied,
    /// Each to as many gates as the switch has laid out ([`Departures`](departures::Departures)).
    Spread,
}

impl Verdict {
    /// As written: once for all where all are to fare the same, which is the usual case.
    #[inline]
    pub(crate) fn of(fates: &[Fate]) -> Self {
        match fates.split_first() {
            Some((&first, others)) if others.iter().all(|&other| other == first) => {
                Self::All(first)
            }
            _ => Self::Each,
        }
    }
}

/// A network function with its state.
#[derive(Debug)]
pub enum Function {
    /// Passes packets between its two gates.
    Wire(Wire),
    /// A wire that copies some packets to a branch.
    Tee(Tee),
    /// A wire that leads some packets by a program.
    Divert(Divert),
    /// A program over header fields.
    Element(Box<Element>),
    /// A learning switch.
    Switch(Box<Switch>),
    /// Takes packets and counts them.
    Sink(Sink),
    /// Makes packets.
    Source(Source),
    /// Sends packets back where they came from.
    Echo(Echo),
    /// A small network stack with an address.
    Host(Box<Host>),
    /// Rules, and what belongs to what they have let begin.
    Firewall(Box<Firewall>),
    /// A cable with faults.
    Impairment(Box<Impairment>),
    /// Sends IP packets from link to link.
    Router(Box<Router>),
    /// Makes streams of packets that say who they are.
    Generator(Box<Generator>),
    /// Takes these and counts what became of them.
    Analyser(Box<Analyser>),
}

impl Function {
    /// What it is.
    #[must_use]
    pub fn kind(&self) -> NodeKind {
        match self {
            Self::Wire(_) => NodeKind::Wire,
            Self::Tee(_) => NodeKind::Tee,
            Self::Divert(_) => NodeKind::Divert,
            Self::Element(_) => NodeKind::Element,
            Self::Switch(_) => NodeKind::Switch,
            Self::Sink(_) => NodeKind::Sink,
            Self::Source(_) => NodeKind::Source,
            Self::Echo(_) => NodeKind::Echo,
            Self::Host(_) => NodeKind::Host,
            Self::Firewall(_) => NodeKind::Firewall,
            Self::Impairment(_) => NodeKind::Impairment,
            Self::Router(_) => NodeKind::Router,
            Self::Generator(_) => NodeKind::Generator,
            Self::Analyser(_) => NodeKind::Analyser,
        }
    }

    /// One for each of `n` workers, of which `home` is this one's: those that only decide are with all of them, those that make
    /// or keep packets with one.
    pub(crate) fn spread(mut self, n: usize, home: usize) -> Vec<Option<Self>> {
        let mut all: Vec<Option<Self>> = (0..n)
            .map(|worker| (worker != home).then(|| self.part()).flatten())
            .collect();
        if let Some(own) = all.get_mut(home) {
            *own = Some(self);
        }
        all
    }

    fn part(&mut self) -> Option<Self> {
        Some(match self {
            Self::Wire(_) => Self::Wire(Wire::new()),
            Self::Tee(tee) => Self::Tee(tee.clone()),
            Self::Divert(divert) => Self::Divert(divert.part()),
            Self::Element(element) => Self::Element(Box::new(element.part())),
            Self::Switch(switch) => Self::Switch(Box::new(switch.part())),
            Self::Sink(sink) => Self::Sink(sink.part()),
            Self::Echo(_) => Self::Echo(Echo::new()),
            Self::Source(_)
            | Self::Host(_)
            | Self::Firewall(_)
            | Self::Impairment(_)
            | Self::Router(_)
            | Self::Generator(_)
            | Self::Analyser(_) => {
                return None;
            }
        })
    }

    /// Gives each picked packet its fate.
    #[inline]
    pub(crate) fn classify(
        &mut self,
        burst: &mut Burst,
        picks: &Picks,
        gate: Gate,
        now: u64,
        fates: &mut Fates,
    ) -> Verdict {
        match self {
            Self::Wire(_) => Verdict::All(Wire::fate(gate)),
            Self::Tee(tee) => tee.classify(burst, picks, gate, fates),
            Self::Divert(divert) => divert.classify(burst, picks, gate, fates),
            Self::Element(element) => element.classify(burst, picks, gate, fates),
            Self::Switch(switch) => switch.classify(burst, picks, gate, now, fates),
            Self::Sink(sink) => Verdict::All(sink.take(burst, picks)),
            // Nobody can send to a source; what comes down its cable ends there.
            Self::Source(_) => Verdict::All(Fate::Consumed),
            Self::Echo(_) => Verdict::All(Echo::turn_around(burst, picks, gate)),
            Self::Host(host) => Verdict::All(host.receive(burst, picks, now)),
            Self::Firewall(firewall) => firewall.classify(burst, picks, gate, now, fates),
            Self::Impairment(cable) => cable.classify(burst, picks, gate, now, fates),
            Self::Router(router) => router.classify(burst, picks, gate, now, fates),
            Self::Generator(_) => Verdict::All(Generator::fate(gate)),
            Self::Analyser(analyser) => Verdict::All(analyser.take(burst, picks, now)),
        }
    }

    /// Whether it changes the packets it is given.
    #[inline]
    pub(crate) fn changes_packets(&self) -> bool {
        match self {
            Self::Echo(_) | Self::Router(_) => true,
            Self::Element(element) => element.writes(),
            Self::Switch(switch) => switch.changes_packets(),
            _ => false,
        }
    }

    /// What a port cabled to `gate` has to wait for.
    pub(crate) fn holds(&self, gate: Gate) -> Option<&Backlog> {
        match self {
            Self::Divert(divert) => divert.holds(gate),
            _ => None,
        }
    }

    /// When it wants to be asked again even if no packet arrives, in the worker's time.
    pub(crate) fn due(&self) -> Option<u64> {
        match self {
            Self::Switch(switch) => switch.due(),
            Self::Source(source) => source.due(),
            Self::Host(host) => host.due(),
            Self::Impairment(cable) => cable.due(),
            Self::Firewall(firewall) => firewall.due(),
            Self::Router(router) => router.due(),
            Self::Generator(generator) => generator.due(),
            Self::Wire(_)
            | Self::Tee(_)
            | Self::Divert(_)
            | Self::Element(_)
            | Self::Sink(_)
            | Self::Echo(_)
            | Self::Analyser(_) => None,
        }
    }

    /// Whether it may have something to do where no packet arrives.
    pub(crate) fn may_make(&self) -> bool {
        match self {
            Self::Switch(_)
            | Self::Source(_)
            | Self::Host(_)
            | Self::Firewall(_)
            | Self::Impairment(_)
            | Self::Router(_)
            | Self::Generator(_) => true,
            Self::Wire(_)
            | Self::Tee(_)
            | Self::Divert(_)
            | Self::Element(_)
            | Self::Sink(_)
            | Self::Echo(_)
            | Self::Analyser(_) => false,
        }
    }

    /// Cables were taken out of `gates`, which are in order, or other ones put in.
    pub(crate) fn recabled(&mut self, gates: &[Gate], now: u64) {
        match self {
            Self::Switch(switch) => switch.forget(gates, now),
            Self::Router(router) => router.forget(gates),
            _ => {}
        }
    }

    /// Takes new orders; those for another kind of function were refused before.
    pub(crate) fn update(&mut self, update: Update, now: u64, leftovers: &mut Leftovers) {
        match (self, update) {
            (Self::Divert(divert), Update::Divert(orders)) => leftovers.keep(divert.order(orders)),
            (Self::Element(element), Update::Element(program)) => {
                leftovers.keep(element.order(program))
            }
            (Self::Switch(switch), Update::Switch(orders)) => switch.order(orders, leftovers),
            (Self::Source(source), Update::Source(orders)) => source.order(orders, now),
            (Self::Host(host), Update::Host(orders)) => leftovers.keep(host.order(orders, now)),
            (Self::Firewall(firewall), Update::Firewall(orders)) => {
                leftovers.keep(firewall.order(orders))
            }
            (Self::Impairment(cable), Update::Impairment(orders)) => {
                cable.order(&orders, now);
                leftovers.keep(orders);
            }
            (Self::Router(router), Update::Router(orders)) => {
                leftovers.keep(router.order(orders, now))
            }
            (Self::Generator(generator), Update::Generator(orders)) => {
                leftovers.keep(generator.order(&orders));
                leftovers.keep(orders);
            }
            (Self::Analyser(analyser), Update::Analyser(orders)) => analyser.order(orders),
            _ => debug_assert!(false, "an update reached another kind of function"),
        }
    }

    /// What it has counted beyond what every function counts.
    pub(crate) fn detail(&self) -> FunctionDetail {
        match self {
            Self::Wire(_) => FunctionDetail::Wire,
            Self::Tee(_) => FunctionDetail::Tee,
            Self::Element(_) => FunctionDetail::Element,
            Self::Divert(divert) => FunctionDetail::Divert {
                late: divert.late(),
            },
            Self::Switch(switch) => FunctionDetail::Switch(switch.counters()),
            Self::Sink(sink) => FunctionDetail::Sink {
                bytes: sink.bytes(),
                copied_bytes: sink.copied_bytes(),
            },
            Self::Source(source) => FunctionDetail::Source {
                frame_len: source.frame_len(),
            },
            Self::Echo(_) => FunctionDetail::Echo,
            Self::Host(host) => FunctionDetail::Host(Box::new(host.counters())),
            Self::Firewall(firewall) => FunctionDetail::Firewall(Box::new(firewall.counters())),
            Self::Router(router) => FunctionDetail::Router(router.counters()),
            Self::Generator(generator) => FunctionDetail::Generator(generator.counters()),
            Self::Analyser(analyser) => FunctionDetail::Analyser(analyser.counters()),
            Self::Impairment(cable) => FunctionDetail::Impairment(Box::new(cable.counters())),
        }
    }

    /// What it has in its own books: copies, and packets that wait.
    pub(crate) fn books(&self) -> FunctionCounters {
        match self {
            Self::Impairment(cable) => cable.books(),
            _ => FunctionCounters::default(),
        }
    }

    /// Drops packets that wait, and closes those books.
    pub(crate) fn close(&mut self) -> FunctionCounters {
        match self {
            Self::Impairment(cable) => cable.close(),
            _ => FunctionCounters::default(),
        }
    }
}

/// What one kind of function counts beyond what all of them do.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum FunctionDetail {
    /// A wire.
    Wire,
    /// A tee.
    Tee,
    /// An element.
    Element,
    /// A divert.
    Divert {
        /// Packets for which its program had no time.
        late: u64,
    },
    /// A switch.
    Switch(SwitchCounters),
    /// A sink.
    Sink {
        /// Bytes of the frames it took.
        bytes: u64,
        /// Bytes it copied out, if it copies.
        copied_bytes: u64,
    },
    /// A source.
    Source {
        /// Bytes of each frame it makes.
        frame_len: usize,
    },
    /// An echo.
    Echo,
    /// A host.
    Host(Box<HostCounters>),
    /// A firewall.
    Firewall(Box<FirewallCounters>),
    /// An impairment, by the gate that packets came in by.
    Impairment(Box<[Option<LineCounters>; 2]>),
    /// A router.
    Router(RouterCounters),
    /// A generator, by stream.
    Generator(Vec<StreamCounters>),
    /// An analyser.
    Analyser(AnalyserCounters),
}

impl FunctionDetail {
    /// Adds what the part of the same function with another worker has counted.
    pub(crate) fn add(&mut self, other: &Self) {
        match (self, other) {
            (Self::Switch(sum), Self::Switch(other)) => sum.add(other),
            (
                Self::Sink {
                    bytes,
                    copied_bytes,
                },
                Self::Sink {
                    bytes: more,
                    copied_bytes: more_copied,
                },
            ) => {
                *bytes += more;
                *copied_bytes += more_copied;
            }
            (Self::Divert { late }, Self::Divert { late: more }) => *late += more,
            // Others count nothing, or are with one worker.
            _ => {}
        }
    }
}

/// New orders for a function that is running.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Update {
    /// For a divert.
    Divert(DivertOrders),
    /// For an element: another program.
    Element(Program),
    /// For a switch.
    Switch(SwitchOrders),
    /// For a source.
    Source(SourceOrders),
    /// For a host.
    Host(HostOrders),
    /// For a firewall.
    Firewall(FirewallOrders),
    /// For an impairment.
    Impairment(Box<ImpairOrders>),
    /// For a router.
    Router(RouterOrders),
    /// For a generator.
    Generator(Box<GeneratorOrders>),
    /// For an analyser.
    Analyser(AnalyserOrders),
}

impl Update {
    pub(crate) fn kind(&self) -> NodeKind {
        match self {
            Self::Divert(_) => NodeKind::Divert,
            Self::Element(_) => NodeKind::Element,
            Self::Switch(_) => NodeKind::Switch,
            Self::Source(_) => NodeKind::Source,
            Self::Host(_) => NodeKind::Host,
            Self::Firewall(_) => NodeKind::Firewall,
            Self::Impairment(_) => NodeKind::Impairment,
            Self::Router(_) => NodeKind::Router,
            Self::Generator(_) => NodeKind::Generator,
            Self::Analyser(_) => NodeKind::Analyser,
        }
    }

    pub(crate) fn check(&self) -> Result<(), EngineError> {
        match self {
            Self::Divert(_) | Self::Element(_) | Self::Analyser(_) => Ok(()),
            Self::Switch(orders) => orders.check(),
            Self::Source(orders) => orders.check(),
            Self::Host(orders) => orders.check(),
            Self::Firewall(_) => Ok(()),
            Self::Impairment(orders) => orders.check(),
            Self::Router(orders) => orders.check(),
            Self::Generator(orders) => orders.check(),
        }
    }
}

impl From<DivertOrders> for Update {
    fn from(orders: DivertOrders) -> Self {
        Self::Divert(orders)
    }
}

impl From<Program> for Update {
    fn from(program: Program) -> Self {
        Self::Element(program)
    }
}

impl From<SwitchOrders> for Update {
    fn from(orders: SwitchOrders) -> Self {
        Self::Switch(orders)
    }
}

impl From<SourceOrders> for Update {
    fn from(orders: SourceOrders) -> Self {
        Self::Source(orders)
    }
}

impl From<FirewallOrders> for Update {
    fn from(orders: FirewallOrders) -> Self {
        Self::Firewall(orders)
    }
}

impl From<HostOrders> for Update {
    fn from(orders: HostOrders) -> Self {
        Self::Host(orders)
    }
}

impl From<ImpairOrders> for Update {
    fn from(orders: ImpairOrders) -> Self {
        Self::Impairment(Box::new(orders))
    }
}

impl From<RouterOrders> for Update {
    fn from(orders: RouterOrders) -> Self {
        Self::Router(orders)
    }
}

impl From<GeneratorOrders> for Update {
    fn from(orders: GeneratorOrders) -> Self {
        Self::Generator(Box::new(orders))
    }
}

impl From<AnalyserOrders> for Update {
    fn from(orders: AnalyserOrders) -> Self {
        Self::Analyser(orders)
    }
}

macro_rules! node_from {
    ($($kind:ident),*) => {$(
        impl From<$kind> for Node {
            fn from(function: $kind) -> Self {
                Self::Function(Function::$kind(function))
            }
        }
    )*};
}
node_from!(Wire, Tee, Divert, Sink, Source, Echo);

impl From<Element> for Node {
    fn from(element: Element) -> Self {
        Self::Function(Function::Element(Box::new(element)))
    }
}

impl From<Switch> for Node {
    fn from(switch: Switch) -> Self {
        Self::Function(Function::Switch(Box::new(switch)))
    }
}

impl From<Firewall> for Node {
    fn from(firewall: Firewall) -> Self {
        Self::Function(Function::Firewall(Box::new(firewall)))
    }
}

impl From<Host> for Node {
    fn from(host: Host) -> Self {
        Self::Function(Function::Host(Box::new(host)))
    }
}

impl From<Impairment> for Node {
    fn from(cable: Impairment) -> Self {
        Self::Function(Function::Impairment(Box::new(cable)))
    }
}

impl From<Router> for Node {
    fn from(router: Router) -> Self {
        Self::Function(Function::Router(Box::new(router)))
    }
}

impl From<Generator> for Node {
    fn from(generator: Generator) -> Self {
        Self::Function(Function::Generator(Box::new(generator)))
    }
}

impl From<Analyser> for Node {
    fn from(analyser: Analyser) -> Self {
        Self::Function(Function::Analyser(Box::new(analyser)))
    }
}
