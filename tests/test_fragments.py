"""Fragments in any order through what decides by ports: Scapy cuts datagrams and puts them together again."""

from __future__ import annotations

from itertools import permutations

import pytest
from scapy.layers.inet import IP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, defragment6, fragment6
from scapy.layers.l2 import Ether

import virtnet as vn
from helpers import eventually, mac, receive
from test_nat import greeted
from test_routers import arp

pytestmark = pytest.mark.usefixtures("nothing_left")

DATA = bytes(range(251)) * 8


@pytest.fixture
def net():
    with vn.Net() as net:
        yield net
        assert net.stats().balance().exact


def pieces(source: str, to: str, dport: int, number: int) -> list[IP]:
    """A datagram in four fragments."""
    found = fragment(IP(src=source, dst=to, id=number) / UDP(sport=4000, dport=dport) / DATA, fragsize=512)
    assert len(found) == 4
    return found


def joined(frames: list[bytes]) -> IP:
    """The datagram that fragments were cut from, with its checksum looked at."""
    parts = sorted((Ether(frame)[IP] for frame in frames), key=lambda part: part.frag)
    assert all(IP(bytes(part)).chksum == recomputed(part).chksum for part in parts), "header"
    whole = parts[0].copy()
    whole.remove_payload()
    whole.len = whole.chksum = None
    whole.flags = whole.frag = 0
    whole = IP(bytes(whole / b"".join(bytes(part.payload) for part in parts)))
    checksum = whole[UDP].chksum
    whole[UDP].chksum = whole.chksum = None
    whole = IP(bytes(whole))
    assert whole[UDP].chksum == checksum
    return whole


def recomputed(part: IP) -> IP:
    part = part.copy()
    part.chksum = None
    return IP(bytes(part))


def ends(packet: IP) -> tuple[str, int, str, int]:
    return packet.src, packet[UDP].sport, packet.dst, packet[UDP].dport


def test_nat_carries_fragments_in_every_order_both_ways(net):
    lan, wan = net.memory("link1"), net.memory("link2")
    gateway = net.nat({lan: "10.0.0.1/24", wan: "192.0.2.2/24"}, outside=wan, forward={"udp:53": "10.0.0.9:5353"})
    inner, outer = greeted(net, gateway, "10.0.0.9", "192.0.2.9")
    ways = [
        (lan, wan, inner, mac(1), ("10.0.0.9", "192.0.2.9", 7), ("192.0.2.2", 4000, "192.0.2.9", 7)),
        (wan, lan, outer, mac(2), ("192.0.2.9", "192.0.2.2", 53), ("192.0.2.9", 4000, "10.0.0.9", 5353)),
    ]
    number = 0
    for sender, receiver, router, me, packet, expected in ways:
        for order in permutations(range(4)):
            number += 1
            parts = pieces(*packet, number)
            for k in order:
                sender.end.tx([bytes(Ether(dst=router, src=me) / parts[k])])
            out = joined(receive(receiver.end, 4))
            assert (ends(out), bytes(out[UDP].payload)) == (expected, DATA), order
    assert gateway.stats().drops == {}


def test_balancers_send_all_of_a_datagram_to_one_back_end(net):
    wan, farm = net.memory("link1"), net.memory("link2")
    balancer = net.load_balancer(
        {wan: "192.0.2.10/24", farm: "10.0.0.1/24"},
        services="udp:192.0.2.10:80",
        backends=["10.0.0.5:80", "10.0.0.6:80"],
    )
    outer, _ = greeted(net, balancer, "192.0.2.9", "10.0.0.5")
    farm.end.tx([arp(mac(3), "10.0.0.6", "10.0.0.1")])
    assert len(receive(farm.end)) == 1
    parts = pieces("192.0.2.9", "192.0.2.10", 80, 5)
    wan.end.tx([bytes(Ether(dst=outer, src=mac(1)) / part) for part in reversed(parts)])
    out = joined(receive(farm.end, 4))
    assert out.dst in {"10.0.0.5", "10.0.0.6"}
    assert bytes(out[UDP].payload) == DATA


def test_firewalls_let_later_ones_wait_for_the_first(net):
    inside, outside = net.memory("vm"), net.memory("uplink")
    inside >> outside
    firewall = net.firewall("pass out proto udp to port 7", at=inside)
    whole = IPv6(src="2001:db8::9", dst="2001:db8::1") / IPv6ExtHdrFragment(id=9) / UDP(sport=4000, dport=7) / DATA
    six = fragment6(whole, 700)
    assert len(six) > 2
    for number, order in enumerate(permutations(range(4))):
        parts = pieces("10.0.0.9", "192.0.2.9", 7, number)
        inside.end.tx([bytes(Ether(dst=mac(2), src=mac(1)) / parts[k]) for k in order])
        out = joined(receive(outside.end, 4))
        assert bytes(out[UDP].payload) == DATA, order
    for order in permutations(range(len(six))):
        inside.end.tx([bytes(Ether(dst=mac(2), src=mac(1)) / six[k]) for k in order])
        got = [Ether(frame)[IPv6] for frame in receive(outside.end, len(six))]
        assert bytes(UDP(bytes(defragment6(got).payload)).payload) == DATA
    # What the rules do not let pass takes the rest with it.
    blocked = pieces("10.0.0.9", "192.0.2.9", 8, 99)
    inside.end.tx([bytes(Ether(dst=mac(2), src=mac(1)) / part) for part in reversed(blocked)])
    assert eventually(lambda: firewall.stats().drops == {"filtered": 1, "fragment": 3}, 10)
    assert not receive(outside.end, 1, 0.1)


def test_a_flood_of_them_is_given_up_and_everything_is_counted(net):
    lan, wan = net.memory("link1"), net.memory("link2")
    gateway = net.nat({lan: "10.0.0.1/24", wan: "192.0.2.2/24"}, outside=wan)
    inner, outer = greeted(net, gateway, "10.0.0.9", "192.0.2.9")
    n = 5_000
    flood = [bytes(Ether(dst=outer, src=mac(2)) / later("192.0.2.9", "192.0.2.2", k)) for k in range(n)]
    sent = 0
    while sent < n:
        sent += wan.end.tx(flood[sent : sent + 64])
    # In the middle of it datagrams come through, whose fragments come in another order.
    parts = pieces("10.0.0.9", "192.0.2.9", 7, 1)
    lan.end.tx([bytes(Ether(dst=inner, src=mac(1)) / part) for part in reversed(parts)])
    assert bytes(joined(receive(wan.end, 4))[UDP].payload) == DATA
    assert eventually(lambda: gateway.stats().drops == {"fragment": n}, 10)


def later(source: str, to: str, number: int) -> IP:
    return IP(src=source, dst=to, id=number, proto=17, frag=64, flags="MF") / DATA[:512]
