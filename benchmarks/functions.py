"""What each function costs: packets of 64 bytes from one guest to another through it, beside the plain switch."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

import virtnet as vn
from benchmarks import cells, frames, run
from benchmarks.facts import LONGEST_WAIT_S, Fact
from benchmarks.networks import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.run import Bench

RUNS = 5

#: How fast a function is to be beside the plain switch, if it remembers nothing of a packet, and if it does.
STATELESS, STATEFUL = 0.8, 0.5

#: Flows that take turns, where a function is quicker with packets that go the same way one behind the other.
FLOWS = 64

#: Keys of a large table.
LARGE = 1_000_000


def _switch(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    a >> net.switch() << b


def _wire(_net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    a >> b


def _tee(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    a >> net.tee(net.sink(), filter="tcp port 80 and host 10.0.0.1") >> b


def _element(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    a >> net.element(lambda packets: (packets.l4_dst == 9) & (packets.ip_ttl > 1)) >> b


def _element_table(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    blocked = vn.Table(range(LARGE))
    a >> net.element(lambda packets: ~blocked.has(packets.ip_src)) >> b


def _element_writing(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    def count_down(packets: vn.Columns) -> None:
        packets.ip_ttl = packets.ip_ttl - 1

    a >> net.element(count_down) >> b


def _firewall(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    rules = [f"drop proto tcp to any port {port}" for port in range(1, 10)]
    a >> net.firewall([*rules, "pass proto udp"]) >> b


def _firewall_long(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    rules = [f"drop proto udp to any port {port}" for port in range(1_000, 1_999)]
    a >> net.firewall([*rules, "pass proto udp"]) >> b


def _firewall_set(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    sets = {"blocked": [f"10.{n >> 8 & 255}.{n & 255}.{n >> 16}" for n in range(100_000)]}
    a >> net.firewall(["drop from <blocked>", "pass proto udp"], sets=sets) >> b


def _firewall_state(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    a >> net.firewall("pass proto udp keep-state") >> b


def _switch_vlans(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    switch = a >> net.switch() << b
    for port in (a, b):
        switch.access(port, 10)


def _impair(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    net.impair(a, b, loss=1e-6)


def _impair_delay(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    net.impair(a, b, delay_ms=0.1, queue_packets=100_000)


def _interfaces(a: vn.PortNode, b: vn.PortNode) -> dict[str | vn.Node, Any]:
    """The guest at ``a`` sends to its router, which has the guest at ``b`` on its link."""
    return {a: {"addresses": ["192.0.2.1/24"], "mac": frames.mac(1).hex(":")}, b: "198.18.0.254/24"}


def _router(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    a >> net.router(_interfaces(a, b)) << b


def _router_large(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    routes = {f"{16 + n // 65_536}.{n >> 8 & 255}.{n & 255}.0/24": "192.0.2.9" for n in range(LARGE)}
    a >> net.router(_interfaces(a, b), routes) << b


def _nat(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    a >> net.nat(_interfaces(a, b), outside=b) << b


#: What is measured: its name, how it is built, and its target.
FUNCTIONS: list[tuple[str, Callable[[vn.Net, vn.PortNode, vn.PortNode], None], float]] = [
    ("wire", _wire, STATELESS),
    ("tee with a filter that matches nothing", _tee, STATELESS),
    ("element with two conditions", _element, STATELESS),
    (f"element with a table of {LARGE:,} keys", _element_table, STATELESS),
    ("element that writes a field", _element_writing, STATELESS),
    ("firewall of ten rules", _firewall, STATELESS),
    (f"firewall of ten rules, {FLOWS} flows in turn", _firewall, STATELESS),
    (f"firewall of a thousand rules, {FLOWS} flows in turn", _firewall_long, STATELESS),
    ("firewall with a set of 100,000 addresses", _firewall_set, STATELESS),
    ("firewall that keeps state", _firewall_state, STATEFUL),
    ("switch with VLANs", _switch_vlans, STATELESS),
    ("router", _router, STATELESS),
    (f"router with {LARGE:,} routes", _router_large, STATELESS),
    ("NAT", _nat, STATEFUL),
    ("cable that loses packets", _impair, STATELESS),
    ("cable that delays packets", _impair_delay, STATEFUL),
]


def measure_all(bench: Bench) -> Iterator[Fact]:
    """Measure everything, each function in turn with the switch."""
    for name, build, target in FUNCTIONS:
        plain, found = [], []
        packets = frames.flows(64, FLOWS) if "flows" in name else frames.between(0, 2, 64)
        for _ in range(RUNS):
            bench.distance.wait_usual(LONGEST_WAIT_S)
            plain.append(_rate(bench, _switch, packets))
            found.append(_rate(bench, build, packets))
        a, b = statistics.median(plain), statistics.median(found)
        words = f"{a / 1e6:.1f} Mpps (switch)", f"{b / 1e6:.1f} Mpps"
        yield Fact(f"function: {name}", *words, b / a, f">= {target}x the switch", b / a >= target)
    for ring in ("split", "packed-in-order"):
        yield _in_flight(bench, ring)


def _in_flight(bench: Bench, ring: str) -> Fact:
    """What it costs to record what is in flight."""
    cell = cells.select([f"switch-2 {ring} 64 virtnet"])[0]
    recording = dataclasses.replace(bench, in_flight=True)
    plain, found = [], []
    for _ in range(RUNS):
        for rates, how in ((plain, bench), (found, recording)):
            bench.distance.wait_usual(LONGEST_WAIT_S)
            found_now = run.measure(cell, "ours", how)
            if found_now.clean:
                rates.append(found_now.pps)
    a, b = statistics.median(plain), statistics.median(found)
    words = f"{a / 1e6:.1f} Mpps (no record)", f"{b / 1e6:.1f} Mpps"
    return Fact(f"switch, {ring}, what is in flight recorded", *words, b / a, f">= {STATELESS}x", b / a >= STATELESS)


def _rate(bench: Bench, build: Callable[[vn.Net, vn.PortNode, vn.PortNode], None], packets: list[bytes]) -> float:
    with contextlib.ExitStack() as stack:
        lab = Lab(stack, bench, join=build, packets=packets)
        _say_who_is_there(lab)
        return lab.rate(0.5)


def _say_who_is_there(lab: Lab) -> None:
    """The guest that receives answers ARP before it is asked: a router asks."""
    mac, mine, theirs = frames.mac(1), bytes([198, 18, 0, 2]), bytes([198, 18, 0, 254])
    arp = bytes.fromhex("0001080006040002") + mac + mine + bytes(6) + theirs
    with lab.guests.change():
        lab.guests.unplug(lab.right, lab.sink)
        talk = lab.guests.memory("talk")
        talk >> lab.right
    talk.end.tx([b"\xff" * 6 + mac + b"\x08\x06" + arp + bytes(18)])
    while talk.stats().received == 0:
        time.sleep(0.01)
    with lab.guests.change():
        lab.guests.unplug(talk, lab.right)
        talk.remove()
        lab.right >> lab.sink
    time.sleep(0.1)
