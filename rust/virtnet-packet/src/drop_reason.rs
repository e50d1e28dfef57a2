//! Why a packet is counted and gone: every drop has one of these, and a counter.

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a packet was dropped. Its name is the counter's name everywhere: JSON, statistics, documentation.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum DropReason {
            $($(#[$doc])* $variant,)*
        }

        impl DropReason {
            /// Every reason, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

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

reasons! {
    /// Received: the guest's descriptors or header make no sense (out of range, wrong direction, too short).
    Malformed = "malformed",
    /// Received: shorter than an Ethernet header.
    Runt = "runt",
    /// Received: asks for an offload that was not negotiated or cannot be done to this frame.
    BadOffload = "bad_offload",
    /// Received on a queue that is started but not enabled.
    Disabled = "disabled",
    /// Received: belongs to another virtual network than the port does.
    WrongVni = "wrong_vni",
    /// Received from somebody who is none of the port's peers.
    UnknownSender = "unknown_sender",
    /// Received by the host and lost there, because the port was not emptied fast enough.
    Overrun = "overrun",
    /// To be sent: the receiver has no room (its ring is full, or the socket's buffer is).
    NoRoom = "no_room",
    /// To be sent: longer than the receiver's buffers or MTU; received by the host: longer than ours.
    TooBig = "too_big",
    /// To be sent: the port is not up (nobody attached, ring stopped).
    PortDown = "port_down",
    /// To be sent: the receiver's buffers make no sense (out of range, not writable).
    BadBuffer = "bad_buffer",
    /// To be sent: the receiver has asked for other packets only (its addresses, VLANs, receive mode).
    NotWanted = "not_wanted",
    /// To be sent: the system refused the write.
    SendError = "send_error",
    /// In the network: nothing is cabled to where the packet would go.
    NoCable = "no_cable",
    /// In the network: the destination is the port it came from.
    SamePort = "same_port",
    /// In the network: forwarded from function to function too many times.
    Loop = "loop",
    /// In the network: a program that wanted to see the packet had no time for it.
    Late = "late",
    /// In the network: a function decided so (a rule, a filter).
    Filtered = "filtered",
    /// In a switch: of a VLAN that its cable does not carry, or of none where there has to be one.
    Vlan = "vlan",
    /// In a switch: between two cables that are kept apart (isolated, one split horizon group, a mirror's).
    Isolated = "isolated",
    /// In a switch: more of this kind than its cable may send in a second.
    Storm = "storm",
    /// In a switch: from a station that is heard of behind one cable and another in turn, as in a loop.
    Flapping = "flapping",
    /// In a firewall: it belongs to no connection as far as that has come.
    BadState = "bad_state",
    /// In a firewall: there is no room to remember one connection more.
    StatesFull = "states_full",
    /// In a firewall or NAT: a fragment, where these do not pass or where the first of its packet has not come.
    Fragment = "fragment",
    /// In the network: lost on an impaired cable, as was asked for.
    Lost = "lost",
    /// In the network: the buffer before a limited rate was full.
    QueueFull = "queue_full",
    /// In the network: it waited in a function that was removed or stopped.
    Flushed = "flushed",
    /// In a router: over a cable for which it has no interface.
    NoInterface = "no_interface",
    /// In a router: to another station of the link, or to a group.
    NotForUs = "not_for_us",
    /// In a router: not IP, and none of what IP needs.
    UnknownProtocol = "unknown_protocol",
    /// In a router: its source or its destination is an address that no packet can have.
    Martian = "martian",
    /// In a router: no route leads to its destination, or none over which it may go.
    NoRoute = "no_route",
    /// In a router: forwarded by too many.
    TtlExpired = "ttl_expired",
    /// In a router: its receiver's address on the link is not known, and there is no answer or no room to wait for one.
    NoNeighbour = "no_neighbour",
    /// In a router that translates: from one side to the other, and part of nothing that has begun.
    NoMapping = "no_mapping",
    /// In a router that translates: there is no room for one flow more, or no port.
    TableFull = "table_full",
}
