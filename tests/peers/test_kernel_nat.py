"""NAT translates packets as nftables does: masquerading, forwarded services, hairpins, and errors about all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hop import Hop, Link, Sent, compare, kernels, masked, ours
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment

if TYPE_CHECKING:
    from scapy.packet import Packet

pytestmark = [pytest.mark.peer, pytest.mark.timeout(240)]

OUTER = "192.0.2.2"
HOST, SERVER, ROUTER = "10.0.0.9", "10.0.0.5", "10.0.0.7"
FAR, OTHER, GATEWAY = "198.51.100.7", "203.0.113.9", "192.0.2.1"

#: Hosts inside, one of which serves; the gateway of the world outside. The kernel is told what ours does by itself:
#: that nobody comes in from outside but to services and by flows, and that hairpins are seen from the outer address.
HOP = Hop(
    {
        "lan": Link(
            "02:00:00:00:01:01",
            ["10.0.0.1/24"],
            {HOST: "02:00:00:00:00:11", SERVER: "02:00:00:00:00:12", ROUTER: "02:00:00:00:00:13"},
        ),
        "wan": Link("02:00:00:00:01:02", [f"{OUTER}/24"], {GATEWAY: "02:00:00:00:00:21"}),
        "dmz": Link("02:00:00:00:01:03", ["10.0.9.1/24"], {"10.0.9.9": "02:00:00:00:00:31"}),
        "thin": Link("02:00:00:00:01:04", ["10.0.8.1/24"], {"10.0.8.9": "02:00:00:00:00:41"}, mtu=600),
    },
    {"0.0.0.0/0": GATEWAY, "10.7.0.0/16": ROUTER},
    rules=f"""
table ip nat {{
  chain prerouting {{
    type nat hook prerouting priority dstnat;
    ip daddr {OUTER} tcp dport 8080 dnat to {SERVER}:80
    ip daddr {OUTER} udp dport 53 dnat to {SERVER}:5353
    ip daddr {OUTER} udp dport 54 dnat to 10.0.8.9:54
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    oifname "wan" masquerade
    iifname != "wan" oifname != "wan" ct status dnat snat to {OUTER}
  }}
  chain forward {{
    type filter hook forward priority 0;
    ct state invalid drop
    iifname "wan" oifname != "wan" ct state new ct status & dnat == 0 drop
  }}
}}
""",
    nat={
        "outside": "wan",
        "forward": {
            "tcp:8080": f"{SERVER}:80",
            "udp:53": f"{SERVER}:5353",
            "udp:54": "10.0.8.9:54",
        },
    },
)


def ip(source: str, to: str, **fields: object) -> IP:
    return IP(src=source, dst=to, id=7, **fields)


def udp(source: str, sport: int, to: str, dport: int, data: bytes = b"data", **fields: object) -> Packet:
    return ip(source, to, **fields) / UDP(sport=sport, dport=dport) / data


def tcp(source: str, sport: int, to: str, dport: int, *said: object) -> Packet:
    """A segment with its flags, and with its number, what it acknowledges and data, as far as they are given."""
    flags, seq, ack, data = (*said, *("S", 100, 0, b"")[len(said) :])
    return ip(source, to) / TCP(sport=sport, dport=dport, flags=flags, seq=seq, ack=ack) / data


def ping(source: str, to: str, number: int, kind: int = 8) -> Packet:
    return ip(source, to) / ICMP(type=kind, id=number, seq=1) / b"ping"


def error(source: str, to: str, about: Packet, kind: int = 3, code: int = 3, **fields: object) -> Packet:
    """An error about a packet as it arrived where it was noticed, of which as much is quoted as most do."""
    return ip(source, to) / ICMP(type=kind, code=code, **fields) / bytes(about)[:548]


def lan(what: str, packet: Packet) -> Sent:
    return Sent(what, "lan", packet)


def wan(what: str, packet: Packet) -> Sent:
    return Sent(what, "wan", packet)


def thin(what: str, packet: Packet) -> Sent:
    return Sent(what, "thin", packet)


def big(source: str, sport: int, to: str, dport: int, *, number: int) -> list[Packet]:
    """A datagram in fragments."""
    whole = IP(src=source, dst=to, id=number) / UDP(sport=sport, dport=dport) / (bytes(range(250)) * 6)
    return [IP(bytes(one)) for one in fragment(whole, fragsize=800)]


UDP_FLOWS = [
    lan("out", udp(HOST, 4000, FAR, 123)),
    wan("and back", udp(FAR, 123, OUTER, 4000)),
    wan("from another port", udp(FAR, 124, OUTER, 4000)),
    wan("from another address", udp(OTHER, 123, OUTER, 4000)),
    wan("to another port", udp(FAR, 123, OUTER, 4001)),
    wan("to an inner address", udp(FAR, 123, HOST, 4000)),
    wan("to an inner address, another port", udp(FAR, 123, HOST, 4001)),
    lan("without a checksum", ip(HOST, FAR) / UDP(sport=4002, dport=123, chksum=0) / b"data"),
    wan("and back", ip(FAR, OUTER) / UDP(sport=123, dport=4002, chksum=0) / b"data"),
    lan("out to the gateway itself", udp(HOST, 4000, GATEWAY, 53)),
    wan("a service", udp(FAR, 999, OUTER, 53)),
    lan("and back", udp(SERVER, 5353, FAR, 999)),
    lan("the server asks somebody", udp(SERVER, 5353, OTHER, 999)),
    lan("between insides", udp(HOST, 4000, "10.0.9.9", 7)),
    Sent("and back", "dmz", udp("10.0.9.9", 7, HOST, 4000)),
    lan("to the router itself", udp(HOST, 4000, "10.0.0.1", 7)),
    lan("to the router's outer address", udp(HOST, 4000, OUTER, 7)),
    wan("to the router's outer address, where nobody serves", udp(FAR, 999, OUTER, 7)),
    lan("its time has passed", udp(HOST, 4003, FAR, 123, ttl=1)),
    wan("the answer's time has passed", udp(FAR, 123, OUTER, 4000, ttl=1)),
    wan("a service's, whose time has passed", udp(FAR, 998, OUTER, 53, ttl=1)),
    wan("too long for a service's link", udp(FAR, 997, OUTER, 54, bytes(600), flags="DF")),
    wan("cut for a service's link", udp(FAR, 997, OUTER, 54, bytes(range(200)) * 4)),
    thin("and back", udp("10.0.8.9", 54, FAR, 997)),
    lan("nobody knows the way", udp(HOST, 4004, "10.0.8.77", 9)),
]

TCP_FLOWS = [
    lan("opens", tcp(HOST, 4000, FAR, 80, "S")),
    wan("is opened", tcp(FAR, 80, OUTER, 4000, "SA", 900, 101)),
    lan("asks", tcp(HOST, 4000, FAR, 80, "PA", 101, 901, b"GET /")),
    wan("answers", tcp(FAR, 80, OUTER, 4000, "PA", 901, 106, b"no")),
    lan("closes", tcp(HOST, 4000, FAR, 80, "FA", 106, 903)),
    wan("is closed", tcp(FAR, 80, OUTER, 4000, "FA", 903, 107)),
    lan("knows", tcp(HOST, 4000, FAR, 80, "A", 107, 904)),
    wan("opens a service", tcp(FAR, 5000, OUTER, 8080, "S")),
    lan("is opened", tcp(SERVER, 80, FAR, 5000, "SA", 900, 101)),
    wan("asks", tcp(FAR, 5000, OUTER, 8080, "PA", 101, 901, b"GET /")),
    lan("is broken off", tcp(SERVER, 80, FAR, 5000, "RA", 901, 106)),
    wan("opens nothing", tcp(FAR, 5001, HOST, 80, "S")),
]

HAIRPINS = [
    lan("a service of one's own side", udp(HOST, 4000, OUTER, 53)),
    lan("and back", udp(SERVER, 5353, OUTER, 4000)),
    lan("the server asks itself", udp(SERVER, 4001, OUTER, 53)),
    lan("and answers", udp(SERVER, 5353, OUTER, 4001)),
    Sent("from another inside", "dmz", udp("10.0.9.9", 4002, OUTER, 53)),
    lan("and back", udp(SERVER, 5353, OUTER, 4002)),
    lan("opens", tcp(HOST, 4000, OUTER, 8080, "S")),
    lan("is opened", tcp(SERVER, 80, OUTER, 4000, "SA", 900, 101)),
    lan("an error about it", error(SERVER, OUTER, udp(OUTER, 4000, SERVER, 5353))),
]

PINGS = [
    lan("asks", ping(HOST, FAR, 77)),
    wan("is answered", ping(FAR, OUTER, 77, 0)),
    wan("is answered by another", ping(OTHER, OUTER, 77, 0)),
    wan("another is answered", ping(FAR, OUTER, 78, 0)),
    wan("is asked", ping(FAR, OUTER, 77)),
    wan("is asked within", ping(FAR, HOST, 77)),
    lan("asks the router", ping(HOST, "10.0.0.1", 5)),
    lan("asks the router's outer address", ping(HOST, OUTER, 5)),
    lan("its time has passed", ip(HOST, FAR, ttl=1) / ICMP(id=80) / b"ping"),
    lan("answers what nobody has asked", ping(HOST, FAR, 99, 0)),
    wan("is asked by that number", ping(FAR, OUTER, 99)),
]

ERRORS = [
    lan("out", udp(HOST, 4000, FAR, 123, bytes(100))),
    wan("nobody listens", error(FAR, OUTER, udp(OUTER, 4000, FAR, 123, bytes(100), ttl=60))),
    wan("a router says: too long", error(OTHER, OUTER, udp(OUTER, 4000, FAR, 123, bytes(100)), 3, 4, nexthopmtu=1400)),
    wan(
        "a router says: its time has passed", error(OTHER, OUTER, udp(OUTER, 4000, FAR, 123, bytes(100), ttl=1), 11, 0)
    ),
    wan("quoted as little as may be", ip(OTHER, OUTER) / ICMP(type=11) / bytes(udp(OUTER, 4000, FAR, 123))[:28]),
    wan("quoted too little", ip(OTHER, OUTER) / ICMP(type=11) / bytes(udp(OUTER, 4000, FAR, 123))[:22]),
    wan("about no flow", error(OTHER, OUTER, udp(OUTER, 4009, FAR, 123))),
    wan("about an inner address", error(OTHER, OUTER, udp(HOST, 4000, FAR, 123))),
    wan("to an inner address", error(OTHER, HOST, udp(HOST, 4000, FAR, 123))),
    wan("back", udp(FAR, 123, OUTER, 4000)),
    lan("nobody listens any more", error(HOST, FAR, udp(FAR, 123, HOST, 4000))),
    lan("an inner router says: its time has passed", error(ROUTER, FAR, udp(FAR, 123, HOST, 4000, ttl=1), 11, 0)),
    lan("out, without a checksum", ip(HOST, FAR) / UDP(sport=4002, dport=123, chksum=0) / b"data"),
    wan("nobody listens", error(FAR, OUTER, ip(OUTER, FAR) / UDP(sport=4002, dport=123, chksum=0) / b"data")),
    wan("a service", udp(FAR, 999, OUTER, 53)),
    lan("nobody serves", error(SERVER, FAR, udp(FAR, 999, SERVER, 5353))),
    lan("an inner router says: nobody is there", error(ROUTER, FAR, udp(FAR, 999, SERVER, 5353), 3, 1)),
    lan("served", udp(SERVER, 5353, FAR, 999)),
    wan("who asked does not listen any more", error(FAR, OUTER, udp(OUTER, 53, FAR, 999))),
    lan("opens", tcp(HOST, 4000, FAR, 80, "S")),
    wan("its time has passed", error(OTHER, OUTER, tcp(OUTER, 4000, FAR, 80, "S"), 11, 0)),
    lan("asks", ping(HOST, FAR, 77)),
    wan("its time has passed", error(OTHER, OUTER, ping(OUTER, FAR, 77), 11, 0)),
    wan("of a parameter", error(OTHER, OUTER, ping(OUTER, FAR, 77), 12, 0)),
    wan("about another ping", error(OTHER, OUTER, ping(OUTER, FAR, 78), 11, 0)),
]

OF_THE_LINK = (
    "an error comes from the address of the link that it leaves by (RFC 1812, 4.3.2.4); the kernel translates its own "
    "error as if it had come from outside"
)
UNANSWERED = [
    Sent("who does not answer", "lan", udp(HOST, 4000, "192.0.2.77", 9), 0.6, OF_THE_LINK),
    Sent("between insides", "lan", udp(HOST, 4000, "10.0.9.77", 9), 0.6),
    Sent("a ping", "lan", ping(HOST, "192.0.2.78", 6), 0.6, OF_THE_LINK),
]

FRAGMENTS = [
    *(lan(f"out, piece {n}", one) for n, one in enumerate(big(HOST, 4000, FAR, 123, number=11))),
    *(wan(f"back, piece {n}", one) for n, one in enumerate(big(FAR, 123, OUTER, 4000, number=12))),
    *(wan(f"a service, piece {n}", one) for n, one in enumerate(big(FAR, 999, OUTER, 53, number=13))),
]


@pytest.mark.parametrize(
    "sent",
    [UDP_FLOWS, TCP_FLOWS, HAIRPINS, PINGS, ERRORS, UNANSWERED],
    ids=["udp", "tcp", "hairpins", "pings", "errors", "unanswered"],
)
def test_nftables_translates_the_same(sent):
    theirs = compare(HOP, sent)
    assert sum(map(bool, theirs)) > len(sent) // 3


def test_nftables_translates_the_same_pieces():
    """The kernel puts packets together first and cuts them again; ours sends pieces on as they come."""
    theirs = kernels(HOP, FRAGMENTS)
    own = ours(HOP, FRAGMENTS, [[("any", b"")]] * len(FRAGMENTS))
    assert all(len(out) == 1 for out in own)
    kernel, got = ([(link, masked(HOP, frame)) for out in outs for link, frame in out] for outs in (theirs, own))
    assert got == kernel


def test_nftables_translates_the_same_pieces_in_another_order():
    """Ours sends on the first piece when it comes, and behind it those that have waited for it."""
    turned = [*FRAGMENTS[1::-1], *FRAGMENTS[3:1:-1], *FRAGMENTS[5:3:-1]]
    theirs = kernels(HOP, turned)
    own = ours(HOP, turned, [[], [("any", b"")] * 2] * 3)
    assert [len(out) for out in own] == [0, 2] * 3
    kernel, got = (sorted((link, masked(HOP, frame)) for out in outs for link, frame in out) for outs in (theirs, own))
    assert got == kernel
