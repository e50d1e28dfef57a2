"""What each function costs: packets of 64 bytes from one guest to another through it, beside the plain switch."""

from __future__ import annotations

import contextlib
import statistics
from typing import TYPE_CHECKING

import virtnet as vn
from benchmarks.facts import LONGEST_WAIT_S, Fact
from benchmarks.networks import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.run import Bench

RUNS = 5

#: How fast a function is to be beside the plain switch, if it remembers nothing of a packet, and if it does.
STATELESS, STATEFUL = 0.8, 0.5

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


def _firewall_set(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    sets = {"blocked": [f"10.{n >> 8 & 255}.{n & 255}.{n >> 16}" for n in range(100_000)]}
    a >> net.firewall(["drop from <blocked>", "pass proto udp"], sets=sets) >> b


def _firewall_state(net: vn.Net, a: vn.PortNode, b: vn.PortNode) -> None:
    a >> net.firewall("pass proto udp keep-state") >> b


#: What is measured: its name, how it is built, and its target.
FUNCTIONS: list[tuple[str, Callable[[vn.Net, vn.PortNode, vn.PortNode], None], float]] = [
    ("wire", _wire, STATELESS),
    ("tee with a filter that matches nothing", _tee, STATELESS),
    ("element with two conditions", _element, STATELESS),
    (f"element with a table of {LARGE:,} keys", _element_table, STATELESS),
    ("element that writes a field", _element_writing, STATELESS),
    ("firewall of ten rules", _firewall, STATELESS),
    ("firewall with a set of 100,000 addresses", _firewall_set, STATELESS),
    ("firewall that keeps state", _firewall_state, STATEFUL),
]


def measure_all(bench: Bench) -> Iterator[Fact]:
    """Measure everything, each function in turn with the switch."""
    for name, build, target in FUNCTIONS:
        plain, found = [], []
        for _ in range(RUNS):
            bench.distance.wait_usual(LONGEST_WAIT_S)
            plain.append(_rate(bench, _switch))
            found.append(_rate(bench, build))
        a, b = statistics.median(plain), statistics.median(found)
        words = f"{a / 1e6:.1f} Mpps (switch)", f"{b / 1e6:.1f} Mpps"
        yield Fact(f"function: {name}", *words, b / a, f">= {target}x the switch", b / a >= target)


def _rate(bench: Bench, build: Callable[[vn.Net, vn.PortNode, vn.PortNode], None]) -> float:
    with contextlib.ExitStack() as stack:
        return Lab(stack, bench, join=build).rate(0.5)
