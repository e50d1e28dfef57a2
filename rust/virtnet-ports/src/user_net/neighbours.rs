//! Who is where on the link: what ARP and neighbour discovery ask and answer, and what routers advertise.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::IpProtocol;

use super::frame::{BROADCAST, IpIn, Mac, arp, ethernet, ethertype_of, icmpv6_checksum, ip_packet};
use super::options::UserNetOptions;

/// The most guests whose place is remembered, and packets that wait for one to be found.
const KNOWN_MAX: usize = 1024;
const WAITING_MAX: usize = 64;

/// How long somebody who is not heard of is remembered when others need the place.
const STALE_NS: u64 = 60_000_000_000;

/// Seconds that guests keep us for their router, and the network's prefix.
const ROUTER_S: u16 = 1800;

const ROUTER_SOLICIT: u8 = 133;
const ROUTER_ADVERT: u8 = 134;
const SOLICIT: u8 = 135;
const ADVERT: u8 = 136;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

#[derive(Debug)]
pub(super) struct Neighbours {
    mac: Mac,
    gateway: Ipv4Addr,
    gateway6: Option<Ipv6Addr>,
    link_local: Ipv6Addr,
    network6: Option<Ipv6Addr>,
    mtu: u16,
    known: HashMap<IpAddr, (Mac, u64)>,
    /// Packets for guests that were asked for.
    waiting: Vec<(IpAddr, Vec<u8>)>,
}

impl Neighbours {
    pub(super) fn new(options: &UserNetOptions) -> Self {
        let mac = options.gateway_mac();
        Self {
            mac,
            gateway: options.gateway,
            gateway6: options.gateway6(),
            link_local: link_local(mac),
            network6: options.network6,
            mtu: options.mtu,
            known: HashMap::new(),
            waiting: Vec::new(),
        }
    }

    /// Whether an address is the gateway's.
    pub(super) fn is_ours(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => ip == self.gateway,
            IpAddr::V6(ip) => {
                self.network6.is_some() && (Some(ip) == self.gateway6 || ip == self.link_local)
            }
        }
    }

    /// Remembers where somebody is; frames that waited for that.
    pub(super) fn learn(&mut self, ip: IpAddr, mac: Mac, now_ns: u64) -> Vec<Vec<u8>> {
        if self.known.len() >= KNOWN_MAX && !self.known.contains_key(&ip) {
            self.known
                .retain(|_, (_, heard)| now_ns.saturating_sub(*heard) < STALE_NS);
            if self.known.len() >= KNOWN_MAX {
                return Vec::new();
            }
        }
        self.known.insert(ip, (mac, now_ns));
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let (found, rest) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<Vec<_>, _>(|(of, _)| *of == ip);
        self.waiting = rest;
        let framed = |(_, packet): (IpAddr, Vec<u8>)| {
            ethernet(mac, self.mac, ethertype_of(&packet), &packet)
        };
        found.into_iter().map(framed).collect()
    }

    pub(super) fn find(&self, ip: IpAddr) -> Option<Mac> {
        self.known.get(&ip).map(|(mac, _)| *mac)
    }

    /// Keeps a packet for a guest whose place is not known, and the frame that asks for it; `None` if too many wait.
    pub(super) fn wait_for(&mut self, ip: IpAddr, packet: Vec<u8>) -> Option<Vec<u8>> {
        if self.waiting.len() >= WAITING_MAX {
            // Whoever was asked for first has had the most time to answer.
            self.waiting.remove(0);
        }
        self.waiting.push((ip, packet));
        match ip {
            IpAddr::V4(ip) => Some(arp(true, (self.mac, self.gateway), (BROADCAST, ip))),
            IpAddr::V6(ip) => self.solicit(ip),
        }
    }

    /// Answers an ARP packet that is about us.
    pub(super) fn answer_arp(&self, mac: Mac, ip: Ipv4Addr, target: Ipv4Addr) -> Option<Vec<u8>> {
        (target == self.gateway).then(|| arp(false, (self.mac, self.gateway), (mac, ip)))
    }

    /// Answers what is asked about neighbours and routers. Whatever was heard of someone is for [`learn`](Self::learn).
    pub(super) fn answer_icmpv6(&self, packet: &IpIn<'_>) -> Option<Vec<u8>> {
        let (IpAddr::V6(src), Some(&hops)) = (packet.src, packet.packet.get(7)) else {
            return None;
        };
        // What was forwarded is not of this link. Spec: RFC 4861, 7.1.1.
        if hops != 255 || self.network6.is_none() {
            return None;
        }
        match *packet.payload.first()? {
            ROUTER_SOLICIT => self.router_advert(),
            SOLICIT => {
                let target: [u8; 16] = packet.payload.get(8..24)?.try_into().ok()?;
                let target = Ipv6Addr::from(target);
                if !self.is_ours(target.into()) {
                    return None;
                }
                // Somebody without an address looks for others with the same one: everybody hears the answer.
                let (to, to_mac, solicited) = if src.is_unspecified() {
                    (ALL_NODES, multicast(ALL_NODES), 0)
                } else {
                    (src, packet.mac, 0x40)
                };
                let mut message = vec![ADVERT, 0, 0, 0, 0x80 | 0x20 | solicited, 0, 0, 0];
                message.extend_from_slice(&target.octets());
                message.extend_from_slice(&[2, 1]);
                message.extend_from_slice(&self.mac);
                self.icmpv6(message, target, to, to_mac)
            }
            _ => None,
        }
    }

    /// Says that we are the router, and which addresses and name server there are. Spec: RFC 4861, 4.2; RFC 8106, 5.1.
    pub(super) fn router_advert(&self) -> Option<Vec<u8>> {
        let (network, gateway) = (self.network6?, self.gateway6?);
        let life = u32::from(ROUTER_S).to_be_bytes();
        let mut message = vec![ROUTER_ADVERT, 0, 0, 0, 64, 0];
        message.extend_from_slice(&ROUTER_S.to_be_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(&[1, 1]);
        message.extend_from_slice(&self.mac);
        message.extend_from_slice(&[5, 1, 0, 0]);
        message.extend_from_slice(&u32::from(self.mtu).to_be_bytes());
        // On this link, and good for making an address of one's own.
        message.extend_from_slice(&[3, 4, 64, 0xc0]);
        message.extend_from_slice(&life);
        message.extend_from_slice(&life);
        message.extend_from_slice(&[0; 4]);
        message.extend_from_slice(&network.octets());
        message.extend_from_slice(&[25, 3, 0, 0]);
        message.extend_from_slice(&life);
        message.extend_from_slice(&gateway.octets());
        self.icmpv6(message, self.link_local, ALL_NODES, multicast(ALL_NODES))
    }

    fn solicit(&self, target: Ipv6Addr) -> Option<Vec<u8>> {
        let last = target.octets();
        let to = Ipv6Addr::from([
            0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, last[13], last[14], last[15],
        ]);
        let mut message = vec![SOLICIT, 0, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(&target.octets());
        message.extend_from_slice(&[1, 1]);
        message.extend_from_slice(&self.mac);
        self.icmpv6(message, self.link_local, to, multicast(to))
    }

    fn icmpv6(
        &self,
        mut message: Vec<u8>,
        src: Ipv6Addr,
        to: Ipv6Addr,
        to_mac: Mac,
    ) -> Option<Vec<u8>> {
        icmpv6_checksum(&mut message, src, to);
        let packet = ip_packet(src.into(), to.into(), IpProtocol::Icmpv6, &message)?;
        Some(ethernet(to_mac, self.mac, ethertype_of(&packet), &packet))
    }
}

/// The address that goes with a MAC address on its link. Spec: RFC 4291, appendix A.
fn link_local([a, b, c, d, e, f]: Mac) -> Ipv6Addr {
    Ipv6Addr::from([
        0xfe,
        0x80,
        0,
        0,
        0,
        0,
        0,
        0,
        a ^ 2,
        b,
        c,
        0xff,
        0xfe,
        d,
        e,
        f,
    ])
}

/// Where a group's packets go in Ethernet. Spec: RFC 2464, 7.
fn multicast(group: Ipv6Addr) -> Mac {
    let last = group.octets();
    [0x33, 0x33, last[12], last[13], last[14], last[15]]
}
