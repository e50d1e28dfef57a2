//! What happens to a burst: worker, graph, switch and the other network functions.
//!
//! A network is nodes (ports, and functions such as a [`Switch`]) with gates, and cables between gates. An [`Engine`] runs one
//! on a thread of its own and changes it while it runs: describe a [`Change`], [`Engine::apply`] it. A [`Worker`] is the same
//! without the thread, driven breath by breath, which is how tests drive it.
//!
//! It guarantees that every packet is accounted for at every breath boundary ([`NetBalance`]), that a change is one for all
//! packets at once, and that an idle network costs no CPU. It refuses networks that cannot be, by the place that is wrong. A
//! circle of cables is possible and bounded. In the breath there is no lock, and no dynamic call per packet.
//!
//! In a packet's way this crate stands between the port it came from and the ports it leaves by (see `ARCHITECTURE.md`).
#![forbid(unsafe_code)]

mod change;
mod dispatch;
mod engine;
mod error;
mod function;
mod graph;
mod histogram;
mod passage;
mod patience;
mod plan;
mod sleep;
mod stats;
mod worker;

pub use change::{Change, Node};
pub use engine::{Engine, EngineOptions, Poll, Rejected, Remains};
pub use error::EngineError;
pub use function::{
    Action, AddressSet, Analyser, AnalyserCounters, AnalyserOrders, Blast, BridgeRules, CableRules,
    Distribution, Divert, DivertOrders, ERRORS_PPS, Echo, Element, Ends, Filter, FilterError,
    Firewall, FirewallCounters, FirewallOrders, Flap, Function, FunctionDetail, Generator,
    GeneratorOrders, GilbertElliott, Host, HostCounters, HostOptions, HostOrders, ImpairOrders,
    Impairment, Instruction, Late, LineCounters, Ping, Prefix, PrefixPair, Program, ProgramError,
    ReceivedStream, Route, Router, RouterCounters, RouterInterface, RouterOrders, RouterTables,
    Rule, RuleCounters, RuleSet, Service, Sink, Source, SourceOptions, SourceOrders, Step,
    StormLimits, StreamCounters, StreamOrders, Switch, SwitchCounters, SwitchOptions, SwitchOrders,
    TRANSLATED_PREFIX_MAX, Table, Tee, Timeouts, Track, Translation, Update, Values, Vary,
    VaryPlace, VlanSet, Wire,
};
pub use graph::{Cable, Gate, Graph, NodeId, NodeKind, Place};
pub use histogram::{Histogram, Summary};
pub use stats::{FunctionCounters, FunctionStats, NetBalance, PortStats, Snapshot, WorkerStats};
pub use virtnet_sys::line_cost;
pub use worker::Worker;
