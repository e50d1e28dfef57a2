//! What a user-mode network is to be, checked once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::frame::Mac;
use crate::PortError;

/// The longest and the shortest prefix of the IPv4 network: from a pool of two addresses to one of a private network.
pub(super) const PREFIX_MIN: u8 = 8;
pub(super) const PREFIX_MAX: u8 = 29;

/// A transport whose ports can be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of the host that leads to one of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Of which kind.
    pub transport: Transport,
    /// Where the host listens.
    pub host: SocketAddr,
    /// Where it leads; an address of the network.
    pub guest: SocketAddr,
}

/// An address that always goes to one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticLease {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// Its address.
    pub ip: Ipv4Addr,
    /// What it is told to call itself.
    pub host_name: Option<String>,
}

/// What a user-mode network is to be. See [`new`](Self::new) for the usual values.
#[derive(Clone, Debug)]
pub struct UserNetOptions {
    /// First address of the IPv4 network.
    pub network: Ipv4Addr,
    /// Bits of its prefix, 8 to 29.
    pub prefix: u8,
    /// The gateway's own address, which is the name server's as well.
    pub gateway: Ipv4Addr,
    /// First address that is given to guests.
    pub first: Ipv4Addr,
    /// First address of the IPv6 network, whose prefix has 64 bits; no IPv6 without.
    pub network6: Option<Ipv6Addr>,
    /// The gateway's MAC address; made from its IPv4 address if not given.
    pub mac: Option<[u8; 6]>,
    /// What guests are told to send at most, in bytes of an IP packet: 1280 to 65535 (576 without IPv6).
    pub mtu: u16,
    /// Seconds that an address is given for.
    pub lease_s: u32,
    /// Carry what guests send to the outside.
    pub outside: bool,
    /// The gateway's address leads to the host's own loopback.
    pub host_loopback: bool,
    /// Who answers questions for names that are not known here; what the host asks if not given.
    pub resolver: Option<SocketAddr>,
    /// The domain that guests are in.
    pub domain: Option<String>,
    /// Names and their addresses.
    pub names: Vec<(String, IpAddr)>,
    /// Addresses that are always somebody's.
    pub leases: Vec<StaticLease>,
    /// Ports of the host that lead to guests.
    pub forward: Vec<Forward>,
    /// Seconds without a packet after which a TCP connection is given up.
    pub tcp_idle_s: u32,
    /// The same for UDP and echo requests.
    pub udp_idle_s: u32,
}

impl UserNetOptions {
    /// The usual options: the gateway is the second address, guests begin at the fifteenth, as people know it from QEMU; in a
    /// network too small for that, the first and the second.
    #[must_use]
    pub fn new(network: Ipv4Addr, prefix: u8) -> Self {
        let (gateway, first) = if prefix <= 27 { (2, 15) } else { (1, 2) };
        let at = |n: u32| Ipv4Addr::from(u32::from(network).saturating_add(n));
        Self {
            network,
            prefix,
            gateway: at(gateway),
            first: at(first),
            network6: Some(Ipv6Addr::new(0xfd76, 0x6e00, 0, 0, 0, 0, 0, 0)),
            mac: None,
            mtu: 1500,
            lease_s: 86_400,
            outside: true,
            host_loopback: false,
            resolver: None,
            domain: None,
            names: Vec::new(),
            leases: Vec::new(),
            forward: Vec::new(),
            tcp_idle_s: 7200,
            udp_idle_s: 60,
        }
    }

    fn mask(&self) -> u32 {
        u32::MAX << (32 - u32::from(self.prefix.clamp(PREFIX_MIN, PREFIX_MAX)))
    }

    pub(super) fn netmask(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.mask())
    }

    pub(super) fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) | !self.mask())
    }

    /// Whether an address is one that a station of the network can have.
    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => {
                u32::from(ip) & self.mask() == u32::from(self.network)
                    && ip != self.network
                    && ip != self.broadcast()
            }
            IpAddr::V6(ip) => self
                .network6
                .is_some_and(|net| net.octets()[..8] == ip.octets()[..8]),
        }
    }

    /// The gateway's IPv6 address in the network.
    pub(super) fn gateway6(&self) -> Option<Ipv6Addr> {
        let mut octets = self.network6?.octets();
        octets[15] = 2;
        Some(octets.into())
    }

    pub(super) fn gateway_mac(&self) -> Mac {
        let [a, b, c, d] = self.gateway.octets();
        self.mac.unwrap_or([0x52, 0x55, a, b, c, d])
    }

    /// Says what is wrong with the options, if something is.
    pub(super) fn check(&self) -> Result<(), PortError> {
        let wrong = |option, found: String, expected: &str| {
            Err(PortError::Option {
                option,
                found,
                expected: expected.to_owned(),
            })
        };
        let network = format!("{}/{}", self.network, self.prefix);
        if !(PREFIX_MIN..=PREFIX_MAX).contains(&self.prefix)
            || u32::from(self.network) & !self.mask() != 0
        {
            return wrong(
                "network",
                network,
                "the first address of a network with a prefix of 8 to 29 bits",
            );
        }
        let inside = |ip: Ipv4Addr| self.contains(ip.into());
        if self.network.is_loopback()
            || self.network.is_multicast()
            || self.network.is_unspecified()
        {
            return wrong(
                "network",
                network,
                "addresses that a network can have, such as 10.0.2.0/24",
            );
        }
        if !inside(self.gateway) {
            return wrong(
                "gateway",
                self.gateway.to_string(),
                &format!("an address of {network}"),
            );
        }
        if !inside(self.first) {
            return wrong(
                "first",
                self.first.to_string(),
                &format!("an address of {network}"),
            );
        }
        let mtu_min = if self.network6.is_some() { 1280 } else { 576 };
        if self.mtu < mtu_min {
            return wrong(
                "mtu",
                self.mtu.to_string(),
                &format!("{mtu_min} to 65535 (1280 at least with IPv6)"),
            );
        }
        if self.lease_s < 10 {
            return wrong("lease_s", self.lease_s.to_string(), "10 seconds at least");
        }
        for (at, lease) in self.leases.iter().enumerate() {
            let twice = self.leases[..at]
                .iter()
                .any(|other| other.ip == lease.ip || other.mac == lease.mac);
            if !inside(lease.ip) || lease.ip == self.gateway || twice {
                let expected =
                    format!("an address of {network} for each station, and not the gateway's");
                return wrong("leases", lease.ip.to_string(), &expected);
            }
        }
        for forward in &self.forward {
            let gateways = [Some(self.gateway.into()), self.gateway6().map(IpAddr::V6)];
            let guest = forward.guest.ip();
            if !self.contains(guest) || gateways.contains(&Some(guest)) || forward.guest.port() == 0
            {
                let expected = format!("a guest's address in {network} and a port from 1");
                return wrong("forward", forward.guest.to_string(), &expected);
            }
        }
        Ok(())
    }
}
