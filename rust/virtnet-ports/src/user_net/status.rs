//! What a gateway tells of itself: leases, flows, and what it had to drop.

use std::net::Ipv4Addr;

macro_rules! lost {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a packet that reached the gateway, or was to leave it, went no further.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Lost {
            $($(#[$doc])* $variant,)*
        }

        impl Lost {
            /// Every reason, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The counter's name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

lost! {
    /// Lengths or fields that make no sense.
    Malformed = "malformed",
    /// A checksum is wrong.
    BadChecksum = "bad_checksum",
    /// A piece of an IP packet: they are not put together.
    Fragment = "fragment",
    /// For another station, or a group that is no business of a gateway.
    NotForUs = "not_for_us",
    /// From an address that is not of this network, or ours.
    ForeignSource = "foreign_source",
    /// A protocol that is not carried.
    Unsupported = "unsupported",
    /// To somewhere that guests may not reach: the outside where that is closed, the host itself, addresses that are never routed.
    Prohibited = "prohibited",
    /// All flows of its kind are in use.
    TableFull = "table_full",
    /// The host refused: no socket, no route, nobody there.
    Refused = "refused",
    /// There was no room: in the socket, or in the port for what should reach a guest.
    NoRoom = "no_room",
    /// For a guest: longer than the MTU and not to be cut.
    TooBig = "too_big",
    /// For a guest that has not said where it is.
    UnknownGuest = "unknown_guest",
    /// No address is left to give, or not the one that was asked for.
    NoLease = "no_lease",
}

/// An address that a guest has by DHCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseStatus {
    /// Whose it is.
    pub mac: [u8; 6],
    /// Which it is.
    pub ip: Ipv4Addr,
    /// What the guest calls itself, or is to be called.
    pub host_name: Option<String>,
    /// The moment it has to be asked for again by, as [`monotonic_ns`](virtnet_sys::monotonic_ns) counts; `None` if it is fixed.
    pub until_ns: Option<u64>,
}

/// How a gateway stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserNetStatus {
    /// Addresses given, in order.
    pub leases: Vec<LeaseStatus>,
    /// TCP connections that are carried now.
    pub tcp_flows: usize,
    /// UDP conversations that are carried now.
    pub udp_flows: usize,
    /// Series of echo requests that are carried now.
    pub ping_flows: usize,
    /// Flows of all kinds since the start.
    pub flows: u64,
    /// Answers given by the gateway itself: ARP, neighbours, echo, DHCP, DNS.
    pub answered: u64,
    /// Packets that went no further, by reason, in the order of [`Lost::ALL`].
    pub lost: [u64; Lost::ALL.len()],
}

impl UserNetStatus {
    /// Packets lost for one reason.
    #[must_use]
    pub fn lost(&self, reason: Lost) -> u64 {
        self.lost[reason as usize]
    }
}
