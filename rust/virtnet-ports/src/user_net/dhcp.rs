//! Addresses for guests: a DHCP server as RFC 2131 has it, on a link of its own.
//!
//! A guest is known by its MAC address. What it was given it gets again, for as long as nobody else needs it. The table has an
//! end: so many addresses there are, at most [`LEASES_MAX`], and one that was offered and not taken is free again soon.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress};

use super::frame::Mac;
use super::options::UserNetOptions;
use super::status::{LeaseStatus, Lost};

/// The most addresses that are given.
const LEASES_MAX: usize = 4096;

const SECOND_NS: u64 = 1_000_000_000;
/// How long an offer stands.
const OFFER_NS: u64 = 30 * SECOND_NS;
/// How long an address that somebody else has is not given.
const DECLINED_NS: u64 = 600 * SECOND_NS;

/// Numbers of options. Spec: RFC 2132; RFC 3397 for none of them.
const DNS_SERVERS: u8 = 6;
const HOST_NAME: u8 = 12;
const DOMAIN: u8 = 15;
const MTU: u8 = 26;

/// What is answered: a message, and whether to everybody.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) message: Vec<u8>,
    pub(super) to: Ipv4Addr,
    pub(super) mac: Mac,
}

#[derive(Debug)]
struct Lease {
    ip: Ipv4Addr,
    host_name: Option<String>,
    /// `None` for one that is fixed.
    until_ns: Option<u64>,
    /// It was only offered so far.
    offered: bool,
}

#[derive(Debug)]
pub(super) struct Dhcp {
    options: UserNetOptions,
    leases: HashMap<Mac, Lease>,
    /// Who has an address; nobody has one that was declined.
    owners: BTreeMap<Ipv4Addr, Mac>,
}

/// Whose an address is that somebody outside our books has.
const NOBODY: Mac = [0; 6];

impl Dhcp {
    pub(super) fn new(options: &UserNetOptions) -> Self {
        let mut dhcp = Self {
            options: options.clone(),
            leases: HashMap::new(),
            owners: BTreeMap::new(),
        };
        for fixed in &options.leases {
            let host_name = fixed.host_name.clone();
            dhcp.owners.insert(fixed.ip, fixed.mac);
            dhcp.leases.insert(
                fixed.mac,
                Lease {
                    ip: fixed.ip,
                    host_name,
                    until_ns: None,
                    offered: false,
                },
            );
        }
        dhcp
    }

    /// Answers a message to the server, if that is due.
    pub(super) fn answer(&mut self, message: &[u8], now_ns: u64) -> Result<Option<Answer>, Lost> {
        let packet = DhcpPacket::new_checked(message).map_err(|_| Lost::Malformed)?;
        let asked = DhcpRepr::parse(&packet).map_err(|_| Lost::Malformed)?;
        let mac = asked.client_hardware_address.0;
        if mac[0] & 1 != 0 || mac == NOBODY {
            return Err(Lost::Malformed);
        }
        if !asked.relay_agent_ip.is_unspecified() {
            return Err(Lost::Unsupported);
        }
        let name = packet
            .options()
            .find(|option| option.kind == HOST_NAME)
            .and_then(|option| host_name(option.data));
        let ours = asked
            .server_identifier
            .is_none_or(|server| server == self.options.gateway);
        match asked.message_type {
            DhcpMessageType::Discover => {
                let ip = self
                    .reserve(mac, asked.requested_ip, now_ns)
                    .ok_or(Lost::NoLease)?;
                Ok(Some(self.reply(&asked, DhcpMessageType::Offer, ip)))
            }
            DhcpMessageType::Request if !ours => {
                self.forget(mac, |lease| lease.offered);
                Ok(None)
            }
            DhcpMessageType::Request => Ok(self.request(&asked, mac, name, now_ns)),
            DhcpMessageType::Release => {
                self.forget(mac, |lease| lease.ip == asked.client_ip);
                Ok(None)
            }
            DhcpMessageType::Decline => {
                let declined = asked.requested_ip;
                if self
                    .leases
                    .get(&mac)
                    .is_some_and(|lease| Some(lease.ip) == declined)
                {
                    self.forget(mac, |_| true);
                    self.decline(declined, now_ns);
                }
                Ok(None)
            }
            DhcpMessageType::Inform => Ok(Some(self.reply(
                &asked,
                DhcpMessageType::Ack,
                Ipv4Addr::UNSPECIFIED,
            ))),
            _ => Err(Lost::Unsupported),
        }
    }

    /// A guest takes an address, or wants to go on with it.
    fn request(
        &mut self,
        asked: &DhcpRepr<'_>,
        mac: Mac,
        name: Option<String>,
        now_ns: u64,
    ) -> Option<Answer> {
        let wanted = asked.requested_ip.unwrap_or(asked.client_ip);
        if self.reserve(mac, Some(wanted), now_ns) != Some(wanted) {
            return Some(self.reply(asked, DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED));
        }
        let lease = self.leases.get_mut(&mac)?;
        lease.offered = false;
        if lease.until_ns.is_some() {
            lease.host_name = name;
            lease.until_ns = Some(now_ns + u64::from(self.options.lease_s) * SECOND_NS);
        }
        Some(self.reply(asked, DhcpMessageType::Ack, wanted))
    }

    /// The address of a guest: what it has, what it wants, or the next one that is free.
    fn reserve(&mut self, mac: Mac, wanted: Option<Ipv4Addr>, now_ns: u64) -> Option<Ipv4Addr> {
        if let Some(lease) = self.leases.get_mut(&mac) {
            if lease.offered {
                lease.until_ns = Some(now_ns + OFFER_NS);
            }
            return Some(lease.ip);
        }
        let wanted = wanted.filter(|ip| self.is_ours_to_give(*ip) && !self.owners.contains_key(ip));
        let ip = wanted.or_else(|| self.free(now_ns))?;
        if self.leases.len() >= LEASES_MAX {
            return None;
        }
        self.owners.insert(ip, mac);
        let until_ns = Some(now_ns + OFFER_NS);
        self.leases.insert(
            mac,
            Lease {
                ip,
                host_name: None,
                until_ns,
                offered: true,
            },
        );
        Some(ip)
    }

    fn is_ours_to_give(&self, ip: Ipv4Addr) -> bool {
        self.options.contains(ip.into()) && ip != self.options.gateway && ip >= self.options.first
    }

    /// The first address that is nobody's; those that ran out become nobody's when there is no other.
    fn free(&mut self, now_ns: u64) -> Option<Ipv4Addr> {
        for attempt in 0..2 {
            let mut next = u32::from(self.options.first);
            for &taken in self.owners.range(self.options.first..).map(|(ip, _)| ip) {
                if u32::from(taken) != next && self.is_ours_to_give(next.into()) {
                    break;
                }
                next = u32::from(taken).saturating_add(1);
                if next == u32::from(self.options.gateway) {
                    next += 1;
                }
            }
            let found = Ipv4Addr::from(next);
            let has_room = self.leases.len() < LEASES_MAX;
            if has_room && self.is_ours_to_give(found) && !self.owners.contains_key(&found) {
                return Some(found);
            }
            if attempt == 0 {
                self.expire(now_ns);
            }
        }
        None
    }

    fn expire(&mut self, now_ns: u64) {
        let over = |lease: &Lease| lease.until_ns.is_some_and(|until| until <= now_ns);
        self.leases.retain(|_, lease| !over(lease));
        let leases = &self.leases;
        self.owners
            .retain(|ip, mac| leases.get(mac).is_some_and(|lease| lease.ip == *ip));
    }

    fn forget(&mut self, mac: Mac, which: impl FnOnce(&Lease) -> bool) {
        if let Some(lease) = self.leases.get(&mac)
            && lease.until_ns.is_some()
            && which(lease)
        {
            self.owners.remove(&lease.ip);
            self.leases.remove(&mac);
        }
    }

    /// One address at a time is kept out of the way, so that a guest cannot empty the pool by declining.
    fn decline(&mut self, ip: Option<Ipv4Addr>, now_ns: u64) {
        self.forget(NOBODY, |_| true);
        if let Some(ip) = ip {
            self.owners.insert(ip, NOBODY);
            let until_ns = Some(now_ns + DECLINED_NS);
            self.leases.insert(
                NOBODY,
                Lease {
                    ip,
                    host_name: None,
                    until_ns,
                    offered: true,
                },
            );
        }
    }

    fn reply(&self, asked: &DhcpRepr<'_>, message_type: DhcpMessageType, ip: Ipv4Addr) -> Answer {
        let options = &self.options;
        let mac = asked.client_hardware_address.0;
        let fixed = self
            .leases
            .get(&mac)
            .filter(|lease| lease.until_ns.is_none());
        let own_name = fixed.and_then(|lease| lease.host_name.clone());
        let (dns, mtu) = (options.gateway.octets(), options.mtu.to_be_bytes());
        let nak = message_type == DhcpMessageType::Nak;
        let mut more: Vec<DhcpOption<'_>> = Vec::new();
        if !nak {
            more.push(DhcpOption {
                kind: DNS_SERVERS,
                data: &dns,
            });
            more.push(DhcpOption {
                kind: MTU,
                data: &mtu,
            });
            more.extend(own_name.as_ref().map(|name| DhcpOption {
                kind: HOST_NAME,
                data: name.as_bytes(),
            }));
            more.extend(options.domain.as_ref().map(|name| DhcpOption {
                kind: DOMAIN,
                data: name.as_bytes(),
            }));
        }
        let leased = (!nak && !ip.is_unspecified()).then_some(options.lease_s);
        let repr = DhcpRepr {
            message_type,
            transaction_id: asked.transaction_id,
            secs: 0,
            client_hardware_address: EthernetAddress(mac),
            client_ip: if nak {
                Ipv4Addr::UNSPECIFIED
            } else {
                asked.client_ip
            },
            your_ip: ip,
            server_ip: options.gateway,
            router: (!nak).then_some(options.gateway),
            subnet_mask: (!nak).then(|| options.netmask()),
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: asked.broadcast,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(options.gateway),
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: leased,
            renew_duration: leased.map(|seconds| seconds / 2),
            rebind_duration: leased.map(|seconds| seconds / 8 * 7),
            additional_options: &more,
        };
        let mut message = vec![0; repr.buffer_len().max(300)];
        // It cannot fail: the options are few and short, and there is room for all of them.
        let _ = repr.emit(&mut DhcpPacket::new_unchecked(&mut message[..]));
        // Whoever has no address yet listens to its MAC address alone, unless it says otherwise.
        let to = match (asked.client_ip, asked.broadcast || nak) {
            (_, true) => Ipv4Addr::BROADCAST,
            (has, false) if !has.is_unspecified() => has,
            _ => ip,
        };
        Answer { message, to, mac }
    }

    /// The address of a guest that calls itself so.
    pub(super) fn by_name(&self, name: &str) -> Option<Ipv4Addr> {
        let named = |lease: &&Lease| {
            !lease.offered
                && lease
                    .host_name
                    .as_deref()
                    .is_some_and(|own| own.eq_ignore_ascii_case(name))
        };
        // Of two that call themselves the same, always the same one.
        self.leases
            .values()
            .filter(named)
            .map(|lease| lease.ip)
            .min()
    }

    /// What is given, in order of addresses; some may have run out since.
    pub(super) fn status(&self) -> Vec<LeaseStatus> {
        let leases = self.owners.values().filter_map(|mac| {
            let lease = self.leases.get(mac).filter(|lease| !lease.offered)?;
            Some(LeaseStatus {
                mac: *mac,
                ip: lease.ip,
                host_name: lease.host_name.clone(),
                until_ns: lease.until_ns,
            })
        });
        leases.collect()
    }
}

/// A name that a guest gives itself, if it is one that can be asked for. Spec: RFC 1123, 2.1.
fn host_name(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?.trim_end_matches('\0');
    let fits = (1..=63).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    fits.then(|| text.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(prefix: u8) -> Dhcp {
        Dhcp::new(&UserNetOptions::new(Ipv4Addr::new(10, 0, 2, 0), prefix))
    }

    fn ask(
        dhcp: &mut Dhcp,
        n: u16,
        kind: DhcpMessageType,
        ip: Option<Ipv4Addr>,
        now_ns: u64,
    ) -> Result<Option<(DhcpMessageType, Ipv4Addr)>, Lost> {
        let [high, low] = n.to_be_bytes();
        let repr = DhcpRepr {
            message_type: kind,
            transaction_id: 7,
            secs: 0,
            client_hardware_address: EthernetAddress([2, 0, 0, 0, high, low]),
            client_ip: Ipv4Addr::UNSPECIFIED,
            your_ip: Ipv4Addr::UNSPECIFIED,
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: None,
            subnet_mask: None,
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: false,
            requested_ip: ip,
            client_identifier: None,
            server_identifier: None,
            parameter_request_list: None,
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[DhcpOption {
                kind: HOST_NAME,
                data: b"vm",
            }],
        };
        let mut message = vec![0; repr.buffer_len()];
        repr.emit(&mut DhcpPacket::new_unchecked(&mut message[..]))
            .unwrap();
        let answer = dhcp.answer(&message, now_ns)?;
        Ok(answer.map(|answer| {
            let packet = DhcpPacket::new_checked(&answer.message[..]).unwrap();
            let repr = DhcpRepr::parse(&packet).unwrap();
            assert_eq!(repr.transaction_id, 7);
            (repr.message_type, repr.your_ip)
        }))
    }

    const DISCOVER: DhcpMessageType = DhcpMessageType::Discover;
    const REQUEST: DhcpMessageType = DhcpMessageType::Request;

    #[test]
    fn each_guest_gets_an_address_and_the_same_one_again() {
        let mut dhcp = server(24);
        for round in 0..3 {
            for n in 0..10u16 {
                let ip = Ipv4Addr::from(u32::from(dhcp.options.first) + u32::from(n));
                assert_eq!(
                    ask(&mut dhcp, n, DISCOVER, None, round).unwrap(),
                    Some((DhcpMessageType::Offer, ip))
                );
                assert_eq!(
                    ask(&mut dhcp, n, REQUEST, Some(ip), round).unwrap(),
                    Some((DhcpMessageType::Ack, ip))
                );
            }
        }
        assert_eq!(dhcp.status().len(), 10);
        assert_eq!(dhcp.by_name("VM"), Some(dhcp.options.first));
    }

    #[test]
    fn an_address_of_elsewhere_is_refused() {
        let mut dhcp = server(24);
        for elsewhere in [
            [192, 168, 1, 5],
            [10, 0, 2, 2],
            [10, 0, 2, 255],
            [10, 0, 2, 0],
            [10, 0, 2, 3],
        ] {
            let answer = ask(&mut dhcp, 1, REQUEST, Some(elsewhere.into()), 0)
                .unwrap()
                .unwrap();
            assert_eq!(answer.0, DhcpMessageType::Nak, "{elsewhere:?}");
        }
    }

    #[test]
    fn a_pool_that_is_empty_fills_again_when_offers_run_out() {
        let mut dhcp = server(28);
        let mut given = 0;
        while ask(&mut dhcp, given, DISCOVER, None, 0).is_ok() {
            given += 1;
        }
        assert_eq!(given, 13, "16 addresses, less the ends and the gateway");
        assert_eq!(
            ask(&mut dhcp, 99, DISCOVER, None, OFFER_NS - 1).unwrap_err(),
            Lost::NoLease
        );
        ask(&mut dhcp, 99, DISCOVER, None, OFFER_NS)
            .unwrap()
            .unwrap();
    }

    #[test]
    fn a_flood_does_not_grow_the_table_without_end() {
        let mut dhcp = server(8);
        for n in 0..10_000 {
            let _ = ask(&mut dhcp, n, DISCOVER, None, 0);
        }
        assert!(dhcp.leases.len() <= LEASES_MAX && dhcp.owners.len() <= LEASES_MAX);
    }

    #[test]
    fn what_is_released_is_free_and_what_is_declined_is_not() {
        let mut dhcp = server(24);
        let first = dhcp.options.first;
        ask(&mut dhcp, 1, DISCOVER, None, 0).unwrap();
        assert_eq!(
            ask(&mut dhcp, 1, DhcpMessageType::Decline, Some(first), 0).unwrap(),
            None
        );
        let next = ask(&mut dhcp, 1, DISCOVER, None, 0).unwrap().unwrap().1;
        assert_ne!(next, first);
        assert!(dhcp.status().is_empty(), "nobody took one");
    }
}
