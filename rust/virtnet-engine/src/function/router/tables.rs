//! What a router follows: its interfaces and routes. Made beside the network, never changed, shared by whoever looks at it.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use virtnet_packet::header::Mac;

use super::prefixes::{Answer, Prefix, Prefixes};
use crate::EngineError;
use crate::graph::Gate;

/// The smallest MTU that IPv6 allows. Spec: RFC 8200, 5.
const MTU6_MIN: usize = 1280;
/// The smallest that IPv4 allows. Spec: RFC 791, 3.2.
const MTU4_MIN: usize = 68;

/// A router's place on a link.
#[derive(Clone, Debug)]
pub struct RouterInterface {
    /// The gate whose cable leads there.
    pub gate: Gate,
    /// Its address on the link.
    pub mac: Mac,
    /// The longest packet that the link carries, in bytes, with its IP header.
    pub mtu: usize,
    /// Its addresses, each with the length of the prefix that is on the link.
    pub addresses: Vec<(IpAddr, u8)>,
}

/// Where packets for some addresses go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// For addresses that begin as this one does,
    pub to: IpAddr,
    /// in so many bits.
    pub len: u8,
    /// The next router; none: their receivers are on the link.
    pub via: Option<IpAddr>,
    /// The link; none: the one that the next router is on.
    pub gate: Option<Gate>,
}

/// What is to become of a packet for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Next {
    /// Nobody knows the way.
    Nowhere,
    /// It is one of the router's own.
    Local,
    /// It names all stations of a link.
    Broadcast,
    /// It goes to its receiver, on this link.
    Link(Gate),
    /// It goes to another router.
    Via(Gate, IpAddr),
}

/// A router's interfaces and routes.
#[derive(Debug)]
pub struct RouterTables {
    interfaces: Vec<RouterInterface>,
    /// For each gate the place of its interface, counted from 1.
    by_gate: Vec<u16>,
    v4: Prefixes,
    v6: Prefixes,
    nexts: Vec<Next>,
    routes: usize,
}

impl Default for RouterTables {
    /// Of a router without interfaces.
    fn default() -> Self {
        Self {
            interfaces: Vec::new(),
            by_gate: Vec::new(),
            v4: Prefixes::default(),
            v6: Prefixes::default(),
            nexts: vec![Next::Nowhere],
            routes: 0,
        }
    }
}

impl RouterTables {
    /// Makes the tables of a router.
    ///
    /// # Errors
    /// [`EngineError::Router`] says which interface or route cannot be. The caller's fault.
    pub fn new(
        interfaces: Vec<RouterInterface>,
        routes: impl IntoIterator<Item = Route>,
    ) -> Result<Self, EngineError> {
        let mut by_gate = Vec::new();
        for (interface, place) in interfaces.iter().zip(1..) {
            check(interface)?;
            let gate = usize::from(interface.gate);
            if by_gate.len() <= gate {
                by_gate.resize(gate + 1, 0);
            }
            if by_gate[gate] != 0 {
                let gate = interface.gate;
                return Err(wrong(format!("gate {gate} has two interfaces")));
            }
            by_gate[gate] = place;
        }
        let mut making = Making::default();
        for route in routes {
            let next = next_of(&interfaces, &route)?;
            making.add(route.to, route.len, next)?;
        }
        let routes = making.v4.len() + making.v6.len();
        // Behind the routes, so that they come before equal ones.
        for interface in &interfaces {
            for &(ip, len) in &interface.addresses {
                making.add(ip, len, Next::Link(interface.gate))?;
            }
        }
        for interface in &interfaces {
            for &(ip, len) in &interface.addresses {
                making.add_own(ip, len)?;
            }
        }
        Ok(Self {
            interfaces,
            by_gate,
            v4: Prefixes::new(making.v4),
            v6: Prefixes::new(making.v6),
            nexts: making.nexts,
            routes,
        })
    }

    /// How many routes it was given.
    #[must_use]
    pub fn routes(&self) -> usize {
        self.routes
    }

    /// The prefixes that are looked up, those of its own addresses included.
    #[must_use]
    pub fn prefixes(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    pub(super) fn at(&self, gate: Gate) -> Option<&RouterInterface> {
        let place = usize::from(*self.by_gate.get(usize::from(gate))?);
        self.interfaces.get(place.wrapping_sub(1))
    }

    /// Where packets for an address go. Addresses that name a link's own stations, and groups, are not asked for here.
    #[inline]
    pub(super) fn next(&self, to: IpAddr) -> Next {
        let answer = match to {
            IpAddr::V4(to) => self.v4.find_short(to.to_bits()),
            IpAddr::V6(_) => self.v6.find(bits(to)),
        };
        self.nexts[answer as usize]
    }

    /// The address of the router that a packet to `to`, over the link of `gate`, comes from: of those of the link the one that
    /// shares most with it, of all where the link has none.
    pub(super) fn source(&self, gate: Gate, to: IpAddr) -> Option<IpAddr> {
        let here = self.at(gate)?;
        if let IpAddr::V6(ip) = to
            && ip.is_unicast_link_local()
        {
            return Some(here.link_local().into());
        }
        let everywhere = self.interfaces.iter().flat_map(|it| &it.addresses);
        nearest(&here.addresses, to).or_else(|| nearest(everywhere, to))
    }
}

impl RouterInterface {
    /// The address that it has in every IPv6 link. Spec: RFC 4291, appendix A.
    pub(super) fn link_local(&self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.mac.0;
        let words = [[a ^ 2, b], [c, 0xff], [0xfe, d], [e, f]].map(u16::from_be_bytes);
        Ipv6Addr::new(0xfe80, 0, 0, 0, words[0], words[1], words[2], words[3])
    }

    /// Whether it is one of its own.
    pub(super) fn has(&self, ip: IpAddr) -> bool {
        self.addresses.iter().any(|&(own, _)| own == ip)
            || (self.speaks_v6() && ip == IpAddr::V6(self.link_local()))
    }

    /// Whether an address is on the link.
    pub(super) fn reaches(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V6(v6) if v6.is_unicast_link_local() => self.speaks_v6(),
            _ => self
                .addresses
                .iter()
                .any(|&(own, len)| own.is_ipv4() == ip.is_ipv4() && covers(own, len, ip)),
        }
    }

    fn speaks_v6(&self) -> bool {
        self.addresses.iter().any(|(ip, _)| ip.is_ipv6())
    }
}

#[derive(Debug)]
struct Making {
    v4: Vec<Prefix>,
    v6: Vec<Prefix>,
    nexts: Vec<Next>,
    numbers: HashMap<Next, Answer, foldhash::fast::RandomState>,
}

impl Default for Making {
    fn default() -> Self {
        Self {
            v4: Vec::new(),
            v6: Vec::new(),
            nexts: vec![Next::Nowhere],
            numbers: HashMap::default(),
        }
    }
}

impl Making {
    fn add(&mut self, to: IpAddr, len: u8, next: Next) -> Result<(), EngineError> {
        let (prefixes, most) = match to {
            IpAddr::V4(_) => (&mut self.v4, 32),
            IpAddr::V6(_) => (&mut self.v6, 128),
        };
        if len > most {
            return Err(wrong(format!(
                "a prefix of {to} has 0 to {most} bits, found {len}"
            )));
        }
        let nexts = &mut self.nexts;
        let answer = *self.numbers.entry(next).or_insert_with(|| {
            nexts.push(next);
            Answer::try_from(nexts.len() - 1).unwrap_or_default()
        });
        prefixes.push(Prefix::new(bits(to), u32::from(len), answer));
        Ok(())
    }

    /// The router's own address, and what names everybody on its link.
    fn add_own(&mut self, ip: IpAddr, len: u8) -> Result<(), EngineError> {
        if let IpAddr::V4(v4) = ip
            && len < 31
        {
            let hosts = u32::MAX.checked_shr(u32::from(len)).unwrap_or(0);
            for all in [v4.to_bits() & !hosts, v4.to_bits() | hosts] {
                self.add(Ipv4Addr::from_bits(all).into(), 32, Next::Broadcast)?;
            }
        }
        let whole = if ip.is_ipv4() { 32 } else { 128 };
        self.add(ip, whole, Next::Local)
    }
}

fn check(interface: &RouterInterface) -> Result<(), EngineError> {
    let gate = interface.gate;
    if interface.mac.is_group() || interface.mac == Mac::default() {
        let mac = interface.mac;
        return Err(wrong(format!(
            "the interface at gate {gate} needs the address of one station, found {mac}"
        )));
    }
    let least = if interface.speaks_v6() {
        MTU6_MIN
    } else {
        MTU4_MIN
    };
    if !(least..=65_535).contains(&interface.mtu) {
        let mtu = interface.mtu;
        return Err(wrong(format!(
            "the interface at gate {gate} needs an MTU from {least} to 65535, found {mtu}"
        )));
    }
    for (ip, _) in &interface.addresses {
        if ip.is_multicast() || ip.is_unspecified() || ip.is_loopback() {
            return Err(wrong(format!(
                "the interface at gate {gate} needs addresses of one station, found {ip}"
            )));
        }
    }
    Ok(())
}

fn next_of(interfaces: &[RouterInterface], route: &Route) -> Result<Next, EngineError> {
    let to = format_args!("{}/{}", route.to, route.len).to_string();
    let Some(via) = route.via else {
        let gate = route
            .gate
            .ok_or_else(|| wrong(format!("the route to {to} leads nowhere")))?;
        return Ok(Next::Link(gate));
    };
    if via.is_ipv4() != route.to.is_ipv4() {
        return Err(wrong(format!(
            "the route to {to} leads over {via}, which is an address of the other kind"
        )));
    }
    let reaching = interfaces.iter().find(|it| {
        route
            .gate
            .map_or_else(|| it.reaches(via), |gate| it.gate == gate)
    });
    match reaching {
        Some(interface) if !interface.has(via) => Ok(Next::Via(interface.gate, via)),
        Some(_) => Err(wrong(format!(
            "the route to {to} leads over {via}, which is this router"
        ))),
        None => Err(wrong(format!(
            "the route to {to} leads over {via}, which is on no link of this router"
        ))),
    }
}

fn wrong(what: String) -> EngineError {
    EngineError::Router { what }
}

/// An address as a number that begins at the highest bit.
#[inline]
fn bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()) << 96,
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// Of addresses of the same kind, the first of those that share most with `to`.
fn nearest<'a>(all: impl IntoIterator<Item = &'a (IpAddr, u8)>, to: IpAddr) -> Option<IpAddr> {
    let mut best: Option<(u32, IpAddr)> = None;
    for &(ip, len) in all {
        let shared = (bits(ip) ^ bits(to)).leading_zeros().min(u32::from(len));
        if ip.is_ipv4() == to.is_ipv4() && best.is_none_or(|(most, _)| shared > most) {
            best = Some((shared, ip));
        }
    }
    best.map(|(_, ip)| ip)
}

fn covers(prefix: IpAddr, len: u8, ip: IpAddr) -> bool {
    (bits(prefix) ^ bits(ip)).leading_zeros() >= u32::from(len)
}
