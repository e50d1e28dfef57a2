"""IPv6 prefixes that are others outside: read by Scapy, and worked out here once more by RFC 6296."""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Network
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    defragment6,
    fragment6,
)
from scapy.layers.l2 import Ether

import virtnet as vn
from helpers import eventually, mac, receive

if TYPE_CHECKING:
    from scapy.packet import Packet

pytestmark = pytest.mark.usefixtures("nothing_left")

PAIRS = {
    "fd01:203:405::/48": "2001:db8:1::/48",
    "fd00:7:7:7::/64": "2001:db8:2:5::/64",
    "fd00:8::/56": "2001:db8:3::/52",
}
FAR = "2001:db8:ffff::9"
#: By the link, the router's address and a station's.
LINKS = {"lan": ("fd01:203:405:1::1", "fd01:203:405:1::1234"), "dmz": ("fd00:7:7:7::1", "fd00:7:7:7::9")}


def words(address: IPv6Address) -> list[int]:
    return [int.from_bytes(address.packed[i : i + 2], "big") for i in range(0, 16, 2)]


def plus(*values: int) -> int:
    total = sum(values)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def outer(address: str) -> str:
    """The address outside of one inside."""
    for inside, outside in PAIRS.items():
        a, b = IPv6Network(inside), IPv6Network(outside)
        length = max(a.prefixlen, b.prefixlen)
        a, b = (IPv6Network((one.network_address, length)) for one in (a, b))
        if IPv6Address(address) not in a:
            continue
        host = int(IPv6Address(address)) & int(a.hostmask)
        found = words(IPv6Address(int(b.network_address) | host))
        at = 3 if length <= 48 else next(i for i in range(4, 8) if found[i] != 0xFFFF)
        adjustment = plus(plus(*words(a.network_address)), ~plus(*words(b.network_address)) & 0xFFFF)
        found[at] = plus(found[at], adjustment) % 0xFFFF
        return str(IPv6Address(b"".join(word.to_bytes(2, "big") for word in found)))
    return address


@pytest.fixture
def lab():
    with vn.Net() as net:
        interfaces = {name: f"{router}/64" for name, (router, _) in LINKS.items()}
        ports = {name: net.memory(name) for name in (*interfaces, "wan")}
        routes = {"::/0": "fd99::9", "fd00:8::/56": "fd00:7:7:7::9"}
        gateway = net.nat(interfaces | {"wan": "fd99::1/64"}, routes, outside="wan", prefixes=PAIRS, name="gateway")
        for i, (name, port) in enumerate(ports.items(), 1):
            port >> gateway
            router, station = LINKS.get(name, ("fd99::1", "fd99::9"))
            question = IPv6(src=station, dst=router) / ICMPv6ND_NS(tgt=router) / ICMPv6NDOptSrcLLAddr(lladdr=text(i))
            port.end.tx([bytes(Ether(dst=b"\x33\x33\xff\0\0\1", src=mac(i)) / question)])
            (answer,) = receive(port.end)
            macs[name] = (mac(i), answer[6:12])
        yield net
        assert net.stats().balance().exact


macs: dict[str, tuple[bytes, bytes]] = {}


def text(n: int) -> str:
    return ":".join(f"{byte:02x}" for byte in mac(n))


def passed(net: vn.Net, link: str, packet: Packet, to: str) -> IPv6:
    """What a packet becomes on another link, with right checksums."""
    me, router = macs[link]
    net[link].end.tx([bytes(Ether(dst=router, src=me) / packet)])
    (frame,) = receive(net[to].end)
    found = Ether(frame)[IPv6]
    again = found.copy()
    for layer in (UDP, TCP):
        if layer in again and not isinstance(again.underlayer, ICMPv6DestUnreach):
            again[layer].chksum = None
    if again.nh == 58:
        again.payload.cksum = None
    assert bytes(again) == bytes(found), "checksum"
    return found


STATIONS = ["fd01:203:405:1::1234", "fd01:203:405:fffe::1", "fd00:7:7:7::9", "fd00:7:7:7:ffff:1::", "fd00:8:0:42::5"]
UPPERS = [
    UDP(sport=4000, dport=53) / b"data",
    TCP(sport=4000, dport=80, flags="S", seq=7) / b"odd",
    ICMPv6EchoRequest(id=5, data=b"ping"),
    IPv6ExtHdrDestOpt() / UDP(sport=4000, dport=53) / bytes(range(256)) / bytes(256),
]


@pytest.mark.parametrize("upper", UPPERS, ids=["udp", "tcp", "ping", "options"])
@pytest.mark.parametrize("station", STATIONS)
def test_who_is_inside_is_seen_by_another_prefix_and_found_by_it(lab, station, upper):
    link = "lan" if station.startswith("fd01") else "dmz"
    seen = passed(lab, link, IPv6(src=station, dst=FAR) / upper, "wan")
    assert (seen.src, seen.dst, seen.hlim) == (outer(station), FAR, 63)
    assert seen.src != station
    known = {"fd01:203:405:1::1234": "2001:db8:1:d550::1234"}
    assert seen.src == known.get(station, seen.src), "the example of RFC 6296, 3.6"
    if station in {inner for _, inner in LINKS.values()} | {"fd00:8:0:42::5"}:
        back = passed(lab, "wan", IPv6(src=FAR, dst=seen.src) / upper, link)
        assert (back.src, back.dst) == (FAR, station)


def test_fragments_need_no_first(lab):
    whole = IPv6(src=STATIONS[0], dst=FAR) / IPv6ExtHdrFragment(id=7) / UDP(sport=1, dport=2) / bytes(2000)
    me, router = macs["lan"]
    pieces = fragment6(whole, 1280)
    lab["lan"].end.tx([bytes(Ether(dst=router, src=me) / piece) for piece in reversed(pieces)])
    found = [Ether(frame)[IPv6] for frame in receive(lab["wan"].end, len(pieces))]
    assert {one.src for one in found} == {outer(STATIONS[0])}
    joined = defragment6(found)
    expected = IPv6(src=outer(STATIONS[0]), dst=FAR) / UDP(sport=1, dport=2) / bytes(2000)
    assert bytes(joined.payload) == bytes(IPv6(bytes(expected)).payload)


def test_errors_are_about_what_their_receivers_have_sent(lab):
    inside, outside = STATIONS[0], outer(STATIONS[0])
    quoted = IPv6(src=outside, dst=FAR, hlim=1) / UDP(sport=4000, dport=53) / b"data"
    error = passed(lab, "wan", IPv6(src="2001:db8:eeee::1", dst=outside) / ICMPv6TimeExceeded() / bytes(quoted), "lan")
    inner = IPv6(bytes(error.payload)[8:])
    assert (error.dst, inner.src, inner.dst) == (inside, inside, FAR)
    assert bytes(inner) == bytes(IPv6(src=inside, dst=FAR, hlim=1) / UDP(sport=4000, dport=53) / b"data")
    quoted = IPv6(src=FAR, dst=inside) / UDP(sport=53, dport=4000) / b"data"
    error = passed(lab, "lan", IPv6(src=inside, dst=FAR) / ICMPv6DestUnreach(code=4) / bytes(quoted), "wan")
    inner = IPv6(bytes(error.payload)[8:])
    assert (error.src, inner.src, inner.dst) == (outside, FAR, outside)


def test_stations_inside_reach_each_other_by_either_address(lab):
    (_, a), (_, b) = LINKS["lan"], LINKS["dmz"]
    direct = passed(lab, "lan", IPv6(src=a, dst=b) / UPPERS[0], "dmz")
    assert (direct.src, direct.dst) == (a, b)
    around = passed(lab, "lan", IPv6(src=a, dst=outer(b)) / UPPERS[0], "dmz")
    assert (around.src, around.dst) == (outer(a), b)
    back = passed(lab, "dmz", IPv6(src=b, dst=outer(a)) / UPPERS[0], "lan")
    assert (back.src, back.dst) == (outer(b), a)
    # The error quotes what has arrived, and is about what was sent.
    error = IPv6(src=b, dst=outer(a)) / ICMPv6DestUnreach(code=4) / bytes(around)
    seen = passed(lab, "dmz", error, "lan")
    inner = IPv6(bytes(seen.payload)[8:])
    assert (seen.src, seen.dst, inner.src, inner.dst) == (outer(b), a, a, outer(b))


def test_who_is_not_of_a_prefix_and_the_router_stay_as_they_are(lab):
    assert passed(lab, "lan", IPv6(src="fd77::1", dst=FAR) / UPPERS[0], "wan").src == "fd77::1"
    answer = passed(lab, "wan", IPv6(src="fd99::9", dst="fd99::1") / UPPERS[2], "wan")
    assert ICMPv6EchoReply in answer


@pytest.mark.parametrize(
    ("link", "source", "to", "pointer"),
    [
        ("lan", "fd01:203:405:ffff::1", FAR, 8),
        ("dmz", "fd00:7:7:7:ffff:ffff:ffff:ffff", FAR, 8),
        ("wan", FAR, "2001:db8:1:ffff::1", 24),
    ],
)
def test_what_cannot_be_translated_is_told_so(lab, link, source, to, pointer):
    me, router = macs[link]
    lab[link].end.tx([bytes(Ether(dst=router, src=me) / IPv6(src=source, dst=to) / UPPERS[0])])
    assert eventually(lambda: lab.stats().functions["gateway"].drops == {"no_mapping": 1})
    if link == "wan":
        (frame,) = receive(lab[link].end)
        told = Ether(frame)[ICMPv6ParamProblem]
        assert (told.code, told.ptr, IPv6(bytes(told)[8:]).dst) == (0, pointer, to)


def test_senders_hear_of_who_does_not_answer_by_the_addresses_they_used(lab):
    missing = outer("fd01:203:405:1::77")
    me, router = macs["wan"]
    packet = IPv6(src=FAR, dst=missing, hlim=64) / UPPERS[0]
    lab["wan"].end.tx([bytes(Ether(dst=router, src=me) / packet)])
    packet.hlim = 63
    (frame,) = receive(lab["wan"].end, 1, 10)
    error = Ether(frame)[ICMPv6DestUnreach]
    assert (error.code, bytes(error)[8:]) == (3, bytes(packet))


@pytest.mark.parametrize(
    ("prefixes", "words"),
    [
        ("fd00::/48", "prefixes: .*table"),
        ({"fd00::": "2001:db8::/48"}, "prefixes: .*found 'fd00::'"),
        ({"fd00::/48": "192.0.2.0/24"}, r"prefixes\.fd00::/48: .*found '192"),
        ({"fd00::1/48": "2001:db8::/48"}, "nothing behind it"),
        ({"fd00::/65": "2001:db8::/48"}, "64 bits"),
        ({"fd00::/48": "fd00::/56"}, "another prefix"),
        ({"fd00::/48": "2001:db8::/48", "fd00:0:0:1::/64": "2001:db8:1::/64"}, "overlap"),
        ({"fd00::/48": "2001:db8::/48", "fd01::/48": "2001:db8::/48"}, "overlap"),
    ],
)
def test_prefixes_that_make_no_sense_are_refused_by_their_place(prefixes, words):
    with pytest.raises(vn.ConfigError, match=words):
        vn.Net().nat({"lan": "fd00::1/64"}, prefixes=prefixes)


def test_prefixes_are_written_down_compared_and_changed(lab):
    spec = lab.spec
    assert vn.Spec.from_toml(spec.to_toml()) == spec
    gateway = lab["gateway"]
    gateway.set(prefixes={"fd01:203:405::/48": "2001:db8:9::/48"})
    assert lab.plan(spec).changed == ("gateway",)
    seen = passed(lab, "lan", IPv6(src=STATIONS[0], dst=FAR) / UPPERS[0], "wan")
    assert IPv6Address(seen.src) in IPv6Network("2001:db8:9::/48")
