"""Routers send on, cut and refuse packets as the kernel does, frame by frame."""

from __future__ import annotations

import pytest
from hop import Hop, Link, Sent, compare
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
)
from scapy.packet import Raw

pytestmark = [pytest.mark.peer, pytest.mark.timeout(240)]

#: Two hosts and a router beyond, on links of which one carries less.
HOP = Hop(
    {
        "lan": Link(
            "02:00:00:00:01:01",
            ["10.0.1.1/24", "fd00:1::1/64"],
            {"10.0.1.9": "02:00:00:00:00:11", "fd00:1::9": "02:00:00:00:00:11"},
        ),
        "wan": Link(
            "02:00:00:00:01:02",
            ["10.0.2.1/24", "fd00:2::1/64"],
            {
                "10.0.2.9": "02:00:00:00:00:21",
                "10.0.2.8": "02:00:00:00:00:22",
                "fd00:2::9": "02:00:00:00:00:21",
                "fd00:2::8": "02:00:00:00:00:22",
            },
        ),
        "thin": Link(
            "02:00:00:00:01:03",
            ["10.0.3.1/24", "fd00:3::1/64"],
            {"10.0.3.9": "02:00:00:00:00:31", "fd00:3::9": "02:00:00:00:00:31"},
            mtu=1300,
        ),
    },
    {
        "172.16.0.0/12": "10.0.2.9",
        "172.16.0.0/16": "10.0.2.8",
        "172.16.5.0/24": "10.0.3.9",
        "172.16.5.128/25": "10.0.2.9",
        "172.16.5.130/32": "10.0.3.9",
        "fd10::/16": "fd00:2::9",
        "fd10:5::/32": "fd00:2::8",
        "fd10:5:0:0:8000::/65": "fd00:3::9",
        "fd10:5::7/128": "fd00:2::9",
        "0.0.0.0/1": "10.0.2.9",
    },
)


def ip(to: str, source: str = "10.0.1.9", **fields: object) -> IP:
    return IP(src=source, dst=to, id=7, **fields)


def ip6(to: str, source: str = "fd00:1::9", **fields: object) -> IPv6:
    return IPv6(src=source, dst=to, **fields)


PAD, TRAILER = bytes(18), bytes(range(200, 240))
DATA = UDP(sport=4000, dport=5000) / b"what is sent"
PING, PING6 = ICMP(id=1, seq=1) / b"ping", ICMPv6EchoRequest(id=1, seq=1, data=b"ping")
LONG = UDP(sport=4000, dport=5000) / (bytes(range(250)) * 5)


def lan(what: str, packet: object, seconds: float | None = None) -> Sent:
    return Sent(what, "lan", packet) if seconds is None else Sent(what, "lan", packet, seconds)


V4 = [
    lan("from link to link", ip("10.0.2.9") / DATA),
    lan("with a class", ip("10.0.2.9", tos=0xB8) / DATA),
    lan("back to where it came from", ip("10.0.1.9", "10.0.1.8") / DATA),
    *(
        lan(f"the longest prefix of {to}", ip(to) / DATA)
        for to in (
            "172.16.0.1",
            "172.31.255.255",
            "172.16.255.1",
            "172.16.4.255",
            "172.16.5.0",
            "172.16.5.127",
            "172.16.5.128",
            "172.16.5.130",
            "172.16.6.0",
            "127.255.255.254",
            "126.0.0.1",
            "1.0.0.0",
        )
    ),
    lan("nobody knows the way", ip("192.168.0.1") / DATA),
    lan("nobody knows the way, and its time has passed", ip("192.168.0.1", ttl=1) / DATA),
    lan("of the last class", ip("240.0.0.1") / DATA),
    lan("its time has passed", ip("10.0.2.9", ttl=1) / DATA),
    lan("its time had passed", ip("10.0.2.9", ttl=0) / DATA),
    lan("its time has passed; with a class", ip("10.0.2.9", ttl=1, tos=0x28) / DATA),
    lan("its time has passed; with much to quote", ip("10.0.2.9", ttl=1) / LONG),
    lan("its time has passed; TCP", ip("10.0.2.9", ttl=1) / TCP(sport=1, dport=2, flags="S")),
    lan("its time has passed; a ping", ip("10.0.2.9", ttl=1) / PING),
    lan("its time passes at the next", ip("10.0.2.9", ttl=2) / DATA),
    lan("its time has passed; an error", ip("10.0.2.9", ttl=1) / ICMP(type=3, code=1) / ip("10.0.1.9") / DATA),
    lan(
        "its time has passed; a redirection",
        ip("10.0.2.9", ttl=1) / ICMP(type=5, gw="10.0.1.7") / ip("10.0.9.9") / DATA,
    ),
    lan("its time has passed; the answer to a ping", ip("10.0.2.9", ttl=1) / ICMP(type=0) / b"ping"),
    lan("its time has passed; a first fragment", ip("10.0.2.9", ttl=1, flags="MF") / DATA),
    lan("its time has passed; a later fragment", ip("10.0.2.9", ttl=1, frag=4) / Raw(b"more")),
    lan("too long", ip("10.0.3.9", flags="DF") / LONG),
    lan("as long as may be", ip("10.0.3.9", flags="DF") / UDP() / bytes(1272)),
    lan("longer by one", ip("10.0.3.9", flags="DF") / UDP() / bytes(1273)),
    lan("too long, its time has passed", ip("10.0.3.9", flags="DF", ttl=1) / LONG / bytes(200)),
    lan("cut into two", ip("10.0.3.9") / LONG / bytes(200)),
    lan("cut, longer by one", ip("10.0.3.9") / UDP() / bytes(1273)),
    lan("cut once more, the first", fragment(ip("10.0.3.9") / UDP() / bytes(4000), fragsize=1480)[0]),
    lan("cut once more, the second", fragment(ip("10.0.3.9") / UDP() / bytes(4000), fragsize=1480)[1]),
    lan("cut once more, the last", fragment(ip("10.0.3.9") / UDP() / bytes(4000), fragsize=1480)[2]),
    lan("cut, with an option for the first", ip("10.0.3.9", options=[IPOption_NOP()] * 4) / LONG / bytes(200)),
    lan("from nowhere", ip("10.0.2.9", "0.0.0.0") / DATA),  # noqa: S104 - nobody listens there
    lan("from within", ip("10.0.2.9", "127.0.0.1") / DATA),
    lan("from a group", ip("10.0.2.9", "224.0.0.5") / DATA),
    lan("from everybody", ip("10.0.2.9", "255.255.255.255") / DATA),
    lan("to within", ip("127.0.0.1") / DATA),
    lan("to this network", ip("0.0.0.5") / DATA),
    lan("to nobody", ip("0.0.0.0") / DATA),  # noqa: S104 - nobody listens there
    lan("to everybody", ip("255.255.255.255") / DATA),
    lan("to everybody of a link", ip("10.0.2.255") / DATA),
    lan("to a group", ip("224.0.0.5") / DATA),
    lan("with a wrong checksum", IP(src="10.0.1.9", dst="10.0.2.9", chksum=0x1234) / DATA),
    lan("shorter than it says", IP(src="10.0.1.9", dst="10.0.2.9", len=200) / DATA),
    lan("longer than it says", IP(src="10.0.1.9", dst="10.0.2.9", len=40) / UDP(len=20) / bytes(100)),
    lan("of another version", IP(src="10.0.1.9", dst="10.0.2.9", version=5) / DATA),
    lan("a ping", ip("10.0.1.1") / PING),
    lan("a ping of another of its addresses", ip("10.0.2.1") / PING),
    lan("a ping whose time passes here", ip("10.0.1.1", ttl=1) / PING),
    lan("a ping from nobody who can be reached", ip("10.0.1.1", "192.168.0.9") / PING),
    lan("nobody listens", ip("10.0.1.1") / DATA),
    lan("nobody listens at another of its addresses", ip("10.0.2.1") / DATA),
    lan("an answer that nobody has asked for", ip("10.0.1.1") / ICMP(type=0) / b"ping"),
    *(
        Sent(f"{what} behind the packet", "lan", packet, trailer=trailer)
        for what, trailer in (("what fills it up", PAD), ("a trailer", TRAILER), ("a long one", bytes(range(256)) * 3))
        for packet in (
            ip("10.0.2.9") / UDP(sport=4000, dport=5000),
            ip("10.0.2.9") / UDP(sport=4000, dport=5000) / bytes(range(150)),
            ip("10.0.2.9") / UDP(sport=4000, dport=5000) / (bytes(range(200)) * 3),
            ip("10.0.2.9", ttl=1) / DATA,
            ip("10.0.1.1") / PING,
            ip("10.0.1.1") / DATA,
            ip("10.0.1.1") / TCP(sport=4000, dport=80, flags="S", seq=100),
        )
    ),
    Sent("as long as may be, and a trailer", "lan", ip("10.0.3.9", flags="DF") / UDP() / bytes(1272), trailer=TRAILER),
    *(
        lan(f"nobody serves it, {said}", ip("10.0.1.1", **fields) / TCP(sport=4000, dport=80, **segment) / data)
        for said, fields, segment, data in (
            ("opens", {}, {"flags": "S", "seq": 100}, b""),
            ("opens, with a class", {"tos": 0xBB}, {"flags": "S", "seq": 100}, b""),
            ("opens, with data", {}, {"flags": "S", "seq": 2**32 - 1}, b"data"),
            ("opens, with options", {}, {"flags": "S", "seq": 1, "options": [("MSS", 1460), ("SAckOK", b"")]}, b""),
            ("answers", {}, {"flags": "SA", "seq": 100, "ack": 7}, b""),
            ("goes on", {}, {"flags": "PA", "seq": 100, "ack": 2**31}, b"data"),
            ("without anything", {}, {"flags": "", "seq": 100}, b"data"),
            ("closes", {}, {"flags": "F", "seq": 100}, b"data"),
            ("breaks off", {}, {"flags": "R", "seq": 100}, b""),
            ("its time passes here", {"ttl": 1}, {"flags": "S", "seq": 100}, b""),
            ("with a wrong checksum", {}, {"flags": "S", "seq": 100, "chksum": 7}, b""),
            ("with half a header", {}, {"flags": "S", "seq": 100, "dataofs": 3}, b""),
            ("with half the options", {}, {"flags": "S", "seq": 100, "dataofs": 9}, b""),
            ("behind an option", {"options": [IPOption_NOP()] * 4}, {"flags": "S", "seq": 100}, b""),
        )
    ),
    lan("nobody listens, without a checksum", ip("10.0.1.1") / UDP(sport=4000, dport=5000, chksum=0) / b"data"),
    lan("nobody listens, with a wrong checksum", ip("10.0.1.1") / UDP(sport=4000, dport=5000, chksum=7) / b"data"),
    lan("nobody listens, longer than the packet", ip("10.0.1.1") / UDP(sport=4000, dport=5000, len=99) / b"data"),
    lan("nobody listens, shorter than a header", ip("10.0.1.1") / UDP(sport=4000, dport=5000, len=7) / b"data"),
    lan("nobody listens, from nobody who can be reached", ip("10.0.1.1", "192.168.0.9") / DATA),
    lan("nobody listens, a first fragment", ip("10.0.1.1", flags="MF") / DATA / bytes(3)),
    lan("nobody listens, a later fragment", ip("10.0.1.1", frag=4) / Raw(b"more")),
    lan("of a protocol that nobody speaks", ip("10.0.1.1", proto=253) / Raw(b"what?")),
    lan("of a protocol that nobody speaks, at another of its addresses", ip("10.0.2.1", proto=99) / Raw(b"what?")),
    lan("of a protocol that nobody speaks, a fragment", ip("10.0.1.1", proto=253, flags="MF") / Raw(bytes(16))),
    lan("an error about nothing", ip("10.0.1.1") / ICMP(type=3, code=1) / ip("10.0.1.9", "10.0.1.1") / DATA),
    lan("a message that nobody knows", ip("10.0.1.1") / ICMP(type=99)),
    Sent("an error goes another way than its packet came", "lan", ip("10.0.2.9", "172.16.5.1", ttl=1) / DATA),
    Sent("an error about nobody's way", "wan", ip("192.168.0.1", "172.16.5.2") / DATA),
    Sent("who does not answer", "lan", ip("10.0.2.77") / DATA, 0.6),
    Sent("who does not answer, over a router", "wan", ip("10.0.3.77", "10.0.2.9") / PING, 0.6),
]

V6 = [
    lan("from link to link", ip6("fd00:2::9") / DATA),
    lan("with a class and a label", ip6("fd00:2::9", tc=0xB8, fl=0x12345) / DATA),
    lan("with options", ip6("fd00:2::9") / IPv6ExtHdrDestOpt() / DATA),
    *(
        lan(f"the longest prefix of {to}", ip6(to) / DATA)
        for to in (
            "fd10::1",
            "fd10:4:ffff::1",
            "fd10:5::1",
            "fd10:5::7",
            "fd10:5::8000:0:0:1",
            "fd10:5:1::1",
            "fd10:6::",
        )
    ),
    lan("nobody knows the way", ip6("2001:db8::1") / DATA),
    lan("its hops are over", ip6("fd00:2::9", hlim=1) / DATA),
    lan("its hops were over", ip6("fd00:2::9", hlim=0) / DATA),
    lan("its hops are over at the next", ip6("fd00:2::9", hlim=2) / DATA),
    lan("its hops are over; with much to quote", ip6("fd00:2::9", hlim=1) / LONG),
    lan("its hops are over; a ping", ip6("fd00:2::9", hlim=1) / PING6),
    lan("its hops are over; an error", ip6("fd00:2::9", hlim=1) / ICMPv6DestUnreach() / ip6("fd00:1::9") / DATA),
    lan(
        "its hops are over; an error behind options",
        ip6("fd00:2::9", hlim=1) / IPv6ExtHdrDestOpt() / ICMPv6TimeExceeded() / ip6("fd00:1::9") / DATA,
    ),
    lan("its hops are over; a fragment", ip6("fd00:2::9", hlim=1) / IPv6ExtHdrFragment(m=1, id=5) / DATA),
    lan(
        "its hops are over; a later fragment of a ping",
        ip6("fd00:2::9", hlim=1) / IPv6ExtHdrFragment(nh=58, offset=10, id=5) / Raw(b"\1" * 16),
    ),
    lan("too long", ip6("fd00:3::9") / UDP() / bytes(1300)),
    lan("as long as may be", ip6("fd00:3::9") / UDP() / bytes(1252)),
    lan("longer by one", ip6("fd00:3::9") / UDP() / bytes(1253)),
    lan("too long, its hops are over", ip6("fd00:3::9", hlim=1) / UDP() / bytes(1300)),
    lan("from within", ip6("fd00:2::9", "::1") / DATA),
    lan("from a group", ip6("fd00:2::9", "ff02::9") / DATA),
    lan("to within", ip6("::1") / DATA),
    Sent(
        "to nobody",
        "lan",
        ip6("::") / DATA,
        differs="nothing is to be sent there (RFC 4291, 2.5.2): dropped even if there is a route for everything; the "
        "kernel says that there is no route",
    ),
    lan("to a group of everybody", ip6("ff0e::5") / DATA),
    lan("from its link only", ip6("fd00:2::9", "fe80::9") / DATA),
    lan("shorter than it says", IPv6(src="fd00:1::9", dst="fd00:2::9", plen=200) / DATA),
    lan("a ping", ip6("fd00:1::1") / PING6),
    lan("a ping of another of its addresses", ip6("fd00:2::1") / PING6),
    lan("nobody listens", ip6("fd00:1::1") / DATA),
    lan("nobody listens at another of its addresses", ip6("fd00:2::1") / DATA),
    lan("nobody listens, behind options", ip6("fd00:1::1") / IPv6ExtHdrDestOpt() / DATA),
    lan("nobody listens, without a checksum", ip6("fd00:1::1") / UDP(sport=4000, dport=5000, chksum=0) / b"data"),
    lan("nobody listens, with a wrong checksum", ip6("fd00:1::1") / UDP(sport=4000, dport=5000, chksum=7) / b"data"),
    lan("nobody listens, a first fragment", ip6("fd00:1::1") / IPv6ExtHdrFragment(m=1, id=5) / DATA / bytes(4)),
    lan(
        "nobody listens, a later fragment", ip6("fd00:1::1") / IPv6ExtHdrFragment(nh=17, offset=4, id=5) / Raw(b"more")
    ),
    *(
        lan(f"nobody serves it, {said}", ip6("fd00:1::1", **fields) / TCP(sport=4000, dport=80, **segment) / data)
        for said, fields, segment, data in (
            ("opens", {}, {"flags": "S", "seq": 100}, b""),
            ("opens, with a class and a label", {"tc": 0xBB, "fl": 0x12345}, {"flags": "S", "seq": 100}, b""),
            ("goes on", {}, {"flags": "PA", "seq": 100, "ack": 2**31}, b"data"),
            ("breaks off", {}, {"flags": "R", "seq": 100}, b""),
            ("its hops are over", {"hlim": 1}, {"flags": "S", "seq": 100}, b""),
            ("with a wrong checksum", {}, {"flags": "S", "seq": 100, "chksum": 7}, b""),
        )
    ),
    lan("of a protocol that nobody speaks", ip6("fd00:1::1", nh=253) / Raw(b"what?")),
    lan("of a protocol that nobody speaks, behind options", ip6("fd00:1::1") / IPv6ExtHdrDestOpt(nh=253) / Raw(b"?")),
    lan("nothing behind the header", ip6("fd00:1::1", nh=59) / Raw(b"what?")),
    lan("an error about nothing", ip6("fd00:1::1") / ICMPv6DestUnreach() / ip6("fd00:1::9", "fd00:1::1") / DATA),
    *(
        Sent(f"{what} behind the packet", "lan", packet, trailer=trailer)
        for what, trailer in (("a trailer", TRAILER), ("a long one", bytes(range(256)) * 3))
        for packet in (
            ip6("fd00:2::9") / UDP(sport=4000, dport=5000),
            ip6("fd00:2::9") / UDP(sport=4000, dport=5000) / (bytes(range(200)) * 3),
            ip6("fd00:2::9", hlim=1) / DATA,
            ip6("fd00:1::1") / PING6,
            ip6("fd00:1::1") / DATA,
        )
    ),
    Sent(
        "an error goes another way than its packet came",
        "lan",
        ip6("fd00:2::9", "fd10:5::8000:0:0:1", hlim=1) / DATA,
        differs="it comes from where any packet of the router to there would (RFC 4443, 2.2 (b)); the kernel takes the "
        "address of the link that the packet came by, which the same rule allows",
    ),
    Sent("who does not answer", "lan", ip6("fd00:2::77") / DATA, 0.6),
]


def test_ipv4_goes_the_same_way():
    theirs = compare(HOP, V4)
    assert sum(map(len, theirs)) > len(V4) // 2


def test_ipv6_goes_the_same_way():
    theirs = compare(HOP, V6)
    assert sum(map(len, theirs)) > len(V6) // 2
