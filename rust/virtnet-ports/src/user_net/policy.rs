//! Where a guest's packets may go.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::options::UserNetOptions;

/// The port that questions for names go to.
pub(super) const DNS_PORT: u16 = 53;

/// Where the host is to send what a guest sends to `to`; `None` if that is not allowed.
pub(super) fn target(
    options: &UserNetOptions,
    resolver: Option<SocketAddr>,
    to: SocketAddr,
) -> Option<SocketAddr> {
    if !options.outside {
        return None;
    }
    let ip = to.ip();
    if ip == IpAddr::V4(options.gateway) || Some(ip) == options.gateway6().map(IpAddr::V6) {
        if to.port() == DNS_PORT {
            return resolver;
        }
        let own: IpAddr = if ip.is_ipv4() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        };
        return options
            .host_loopback
            .then(|| SocketAddr::new(own, to.port()));
    }
    (!options.contains(ip) && is_routed(ip)).then_some(to)
}

/// Whether a router hands on what is for an address: not if it means the host itself, a link, or a group.
fn is_routed(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            // All of 0/8 is this host, and Linux takes it for loopback. Spec: RFC 1122, 3.2.1.3.
            let this_host = ip.octets()[0] == 0;
            let reserved = ip.octets()[0] >= 240;
            !(this_host || reserved || ip.is_loopback() || ip.is_link_local() || ip.is_multicast())
        }
        IpAddr::V6(ip) => {
            // IPv4 in disguise is never routed; loopback and the unspecified address are among it.
            !(ip.to_ipv4().is_some() || ip.is_multicast() || ip.is_unicast_link_local())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_outside_is_reached() {
        let mut options = UserNetOptions::new(Ipv4Addr::new(10, 0, 2, 0), 24);
        let at = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let never = [
            "127.0.0.1:80",
            "127.9.9.9:80",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "255.255.255.255:80",
            "224.0.0.1:80",
            "169.254.169.254:80",
            "10.0.2.2:80",
            "10.0.2.15:80",
            "[::]:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "[::ffff:192.0.2.1]:80",
            "[fe80::1]:80",
            "[ff02::1]:80",
            "[fd76:6e00::2]:80",
            "[fd76:6e00::99]:80",
        ];
        for to in never {
            assert_eq!(target(&options, None, at(to)), None, "{to}");
        }
        for to in ["192.0.2.1:80", "10.0.3.2:80", "[2001:db8::1]:80"] {
            assert_eq!(target(&options, None, at(to)), Some(at(to)));
        }
        let resolver = Some(at("192.0.2.53:53"));
        assert_eq!(target(&options, resolver, at("10.0.2.2:53")), resolver);
        options.host_loopback = true;
        assert_eq!(
            target(&options, None, at("10.0.2.2:80")),
            Some(at("127.0.0.1:80"))
        );
        assert_eq!(
            target(&options, None, at("[fd76:6e00::2]:80")),
            Some(at("[::1]:80"))
        );
        options.outside = false;
        for to in ["10.0.2.2:80", "192.0.2.1:80", "10.0.2.2:53"] {
            assert_eq!(target(&options, resolver, at(to)), None, "{to}");
        }
    }
}
