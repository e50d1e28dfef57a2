"""What networks that run are good for: changed under load, Python in the path and beside it, long frames to taps.

Here virtnet measures itself against what the same load does without the disturbance, and against the kernel's bridge.
Device and driver are in this process, each with a worker pinned to a core.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import virtnet as vn
from benchmarks import frames
from benchmarks.facts import LONGEST_WAIT_S, RUNS, Fact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.run import Bench

#: As many ports, and as many rules of a firewall, come and go under load.
CHANGED = 1_000

#: Rules come and go by so many at a time.
RULES_AT_ONCE = 20

#: So much of what the path carries is the load while it changes: beyond that a receiver loses packets by itself.
LOADED = 0.75

#: Entries of the guests' rings there: what comes while somebody else has the core waits in them.
RING = 1_024

#: Packets that go round where none may be lost: fewer than a ring holds, so that each finds room whoever pauses.
CIRCLING = 192

#: Where they are addressed to.
CIRCLE_MAC = "02:00:00:00:00:02"

#: How long a thread of Python computes beside a network.
SPIN_S = 60

TCP_FRAME = 65_226

#: Long frames a second that are offered to a guest, of which the best counts: it has the same core as who sends to it,
#: and where more is sent than arrives it has no time to make room.
OFFERED_PPS = (40_000, 60_000, 80_000, 100_000, 150_000)
MSS = 1_448


def measure_all(bench: Bench) -> Iterator[Fact]:
    """Measure everything."""
    for one in (changes_under_load, python_beside, on_burst, taps):
        yield from one(bench)


class Lab:
    """A guest at each of two ports that are joined: one worker for the guests, another for the network."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        bench: Bench,
        *,
        join: Callable[[vn.Net, vn.PortNode, vn.PortNode], object] = lambda _net, a, b: a >> b,
        rate_pps: float | None = None,
        queue_size: int = 256,
        packets: list[bytes] | None = None,
    ) -> None:
        """Attach, and let the first guest send."""
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.net = stack.enter_context(vn.Net(cpus=[bench.back_core]))
        self.a, self.b = (self.net.vhost_user(directory / f"{n}.sock", name=n) for n in "ab")
        join(self.net, self.a, self.b)
        self.guests = stack.enter_context(vn.Net(cpus=[bench.front_core], poll="busy"))
        self.source = self.guests.source(packets or frames.between(0, 2, 64), rate_pps=rate_pps, name="source")
        self.sink = self.guests.sink(name="sink")
        left, right = (self.guests.virtio_user(directory / f"{n}.sock", name=n, queue_size=queue_size) for n in "ab")
        self.source >> left
        right >> self.sink
        self.left, self.right = left, right
        for port in (left, right):
            port.wait_connected(10)
        time.sleep(0.2)

    def rate(self, seconds: float = 1.0) -> float:
        """Packets a second that arrive."""
        before, began = self.sink.stats().consumed, time.perf_counter()
        time.sleep(seconds)
        return (self.sink.stats().consumed - before) / (time.perf_counter() - began)

    def finish(self) -> tuple[int, int]:
        """Let the source end, and everything arrive: how many packets it made, and how many did not arrive."""
        self.source.set(count=0)
        made = -1
        while made != self.source.stats().generated + self.sink.stats().consumed:
            made = self.source.stats().generated + self.sink.stats().consumed
            time.sleep(0.1)
        generated = self.source.stats().generated
        return generated, generated - self.sink.stats().consumed


def changes_under_load(bench: Bench) -> list[Fact]:
    """Ports come and go, each by a change of its own, and rules of a firewall, beside traffic they do not concern.

    Once with packets that go round as fast as both cores can: a pause of either side makes them wait, so what is
    missing at the end was lost by a change. And once with a source that never waits, paced below what the path carries
    at most, as found just before: there every pause of longer than a ring lasts costs packets, and the same load
    without a change, for as long, tells what the machine itself costs.
    """
    bench.distance.wait_usual(LONGEST_WAIT_S)
    circling = _circle(bench, _change)
    still = _circle(bench, lambda _net: time.sleep(circling.seconds))
    with contextlib.ExitStack() as stack:
        full = Lab(stack, bench, queue_size=RING).rate()
    changing = _loss(bench, LOADED * full, _change)
    at_rest = _loss(bench, LOADED * full, lambda _net: time.sleep(changing.seconds))
    what = f"{CHANGED} ports and {CHANGED} rules come and go"
    return [
        Fact(
            f"{what} beside {CIRCLING} packets that go round as fast as they can: lost of those that pass",
            f"{still} (nothing changes)",
            str(circling),
            None,
            "0",
            circling.lost == 0,
        ),
        Fact(
            f"{what} beside a source that never waits, at {LOADED:.0%} of what the path carries: did not arrive",
            f"{at_rest} (nothing changes)",
            str(changing),
            None,
            "",
            True,
        ),
    ]


class Loss(NamedTuple):
    """What became of packets on a path."""

    made: int
    lost: int
    seconds: float
    #: Of the network's worker.
    longest_pause_s: float

    def __str__(self) -> str:
        """As a cell of a table."""
        pause = f"longest pause {self.longest_pause_s * 1e6:.0f} us"
        return f"{self.lost} of {self.made / 1e6:.0f} M in {self.seconds:.0f} s, {pause}"


def _loss(bench: Bench, rate_pps: float, act: Callable[[vn.Net], object]) -> Loss:
    """Packets that do not arrive while something is done to their network."""
    with contextlib.ExitStack() as stack:
        lab = Lab(stack, bench, rate_pps=rate_pps, queue_size=RING)
        began = time.perf_counter()
        act(lab.net)
        seconds = time.perf_counter() - began
        return Loss(*lab.finish(), seconds, lab.net.stats().worker.longest_pause_s)


def _circle(bench: Bench, act: Callable[[vn.Net], object]) -> Loss:
    """Packets that go round through two guests and their network while something is done to it."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        net = stack.enter_context(vn.Net(cpus=[bench.back_core]))
        net.vhost_user(directory / "a.sock", name="a") >> net.vhost_user(directory / "b.sock", name="b")
        guests = stack.enter_context(vn.Net(cpus=[bench.front_core], poll="busy"))
        left, right = (guests.virtio_user(directory / f"{n}.sock", name=n) for n in ("a", "b"))
        for port in (left, right):
            port.wait_connected(10)
        hub, hand = guests.switch(), guests.memory("hand")
        for port in (left, right, hand):
            port >> hub
        hub.cable(left, stations=[CIRCLE_MAC])
        packets = frames.between(0, 2, 64)
        hand.end.tx([bytes.fromhex(CIRCLE_MAC.replace(":", "")) + packets[0][6:]] * CIRCLING)
        with guests.change():
            hub.remove()
            left >> right
        time.sleep(0.2)
        sent, began = left.stats().sent, time.perf_counter()
        act(net)
        seconds, passed = time.perf_counter() - began, left.stats().sent - sent
        with guests.change():
            guests.unplug(left, right)
            sink = guests.sink()
            right >> sink
        time.sleep(0.5)
        return Loss(passed, CIRCLING - sink.stats().consumed, seconds, net.stats().worker.longest_pause_s)


def _change(net: vn.Net) -> None:
    """Ports come, rules come and go, ports go: about two thousand changes."""
    switch, firewall = net.switch(), net.firewall()
    net.memory("fenced") >> firewall >> switch
    ports = [net.memory(f"m{number}") for number in range(CHANGED)]
    for port in ports:
        port >> switch
    rules = [f"pass proto udp to any port {number + 1}" for number in range(CHANGED)]
    counts = range(0, CHANGED + 1, RULES_AT_ONCE)
    for count in (*counts, *reversed(counts)):
        firewall.set(rules="\n".join(rules[:count]))
    for port in ports:
        port.remove()


def python_beside(bench: Bench) -> list[Fact]:
    """What a thread that computes without end takes from a network in the same program."""
    with contextlib.ExitStack() as stack:
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory()), "0.sock")
        net = stack.enter_context(vn.Net(cpus=[bench.back_core]))
        sink = net.sink()
        net.vhost_user(socket) >> sink
        # Device and driver have the same worker, so that the other core is the thread's.
        guest = net.virtio_user(socket)
        net.source() >> guest
        guest.wait_connected(10)

        def rates(n: int) -> list[float]:
            return [_rate(lambda: sink.stats().consumed, 1.0) for _ in range(n)]

        alone = rates(10)
        with _spinning():
            beside = rates(SPIN_S)
    a, b = statistics.median(alone), statistics.median(beside)
    noise = max(0.02, (max(alone) - min(alone)) / a)
    name = f"a thread of Python that computes for {SPIN_S} s beside a network: its rate"
    figures = f"{a / 1e6:.1f} Mpps (alone)", f"{b / 1e6:.1f} Mpps"
    return [Fact(name, *figures, b / a, f"within {noise:.0%}, its noise", b / a > 1 - noise)]


def on_burst(bench: Bench) -> list[Fact]:
    """Packets a second that a function in the path looks at, and what the others keep when it has no time."""
    with contextlib.ExitStack() as stack:
        lab = Lab(stack, bench)
        with lab.net.on_burst(lab.a, direction="from", late="drop")(lambda burst: burst.columns.l4_dst == 9) as handler:
            rates = []
            for _ in range(RUNS):
                before, began = handler.passed, time.perf_counter()
                time.sleep(0.5)
                rates.append((handler.passed - before) / (time.perf_counter() - began))
    with contextlib.ExitStack() as stack:
        lab = Lab(stack, bench)
        alone = statistics.median(lab.rate(0.5) for _ in range(RUNS))
        stop = threading.Event()
        with lab.net.on_burst(lab.a, direction="from", late="pass")(lambda _burst: stop.wait(SPIN_S) and None):
            late = statistics.median(lab.rate(0.5) for _ in range(RUNS))
            stop.set()
    return [
        Fact(
            "on_burst, numpy condition on a column", "-", f"{statistics.median(rates) / 1e6:.2f} Mpps", None, "", True
        ),
        Fact(
            "on_burst that never answers, late packets pass: the rate",
            f"{alone / 1e6:.1f} Mpps (without)",
            f"{late / 1e6:.1f} Mpps",
            late / alone,
            "",
            True,
        ),
    ]


# Long frames between guests and the kernel.


def taps(bench: Bench) -> list[Fact]:
    """Frames of 64 KiB that are left to be segmented, between a guest and a tap, beside the kernel's bridge of two."""
    facts = []
    for name, ours, peer in (
        ("64 KiB TCP frames, guest to tap, beside a kernel bridge of two taps", _guest_to_tap, _bridge),
        ("64 KiB TCP frames, tap to guest, beside a kernel bridge of two taps", _tap_to_guest, _bridge),
    ):
        rates: dict[Callable[[Bench], float], list[float]] = {ours: [], peer: []}
        for _ in range(RUNS):
            for side, found in rates.items():
                bench.distance.wait_usual(LONGEST_WAIT_S)
                found.append(side(bench))
        a, b = (statistics.median(rates[side]) for side in (ours, peer))
        gbits = [f"{rate * TCP_FRAME * 8 / 1e9:.1f} Gbit/s" for rate in (b, a)]
        facts.append(Fact(name, *gbits, a / b, ">= 1.3x", a / b >= 1.3))
    return facts


def tcp_frame() -> vn.Burst:
    """A frame of 64 KiB of TCP, whose checksum and segments are left to be done."""
    ip_len = TCP_FRAME - 14
    ethernet = frames.mac(1) + frames.mac(0) + b"\x08\x00"
    header = bytearray(
        b"\x45\x00" + ip_len.to_bytes(2, "big") + bytes(4) + bytes([64, 6, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2])
    )
    total = sum(int.from_bytes(header[i : i + 2], "big") for i in range(0, 20, 2))
    header[10:12] = (~(total + (total >> 16)) & 0xFFFF).to_bytes(2, "big")
    tcp = b"\x00\x07\x00\x09" + bytes(8) + b"\x50\x10\xff\xff" + bytes(4)
    burst = vn.Burst([(ethernet + bytes(header) + tcp).ljust(TCP_FRAME, b"x")])
    offload = burst.columns.offload
    for field, value in {
        "flags": 1,
        "gso_type": 1,
        "hdr_len": 54,
        "gso_size": MSS,
        "csum_start": 34,
        "csum_offset": 16,
    }.items():
        offload[field] = value
    return burst


def _rate(count: Callable[[], int], seconds: float = 0.5) -> float:
    time.sleep(0.1)
    before, began = count(), time.perf_counter()
    time.sleep(seconds)
    return (count() - before) / (time.perf_counter() - began)


def _guest_to_tap(bench: Bench) -> float:
    """Frames a second that a guest gets out through a switch and a tap, which throws them away behind."""
    with contextlib.ExitStack() as stack:
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory()), "0.sock")
        net = stack.enter_context(vn.Net(cpus=[bench.back_core], poll="busy"))
        tap = net.tap("vnbtap0")
        net.vhost_user(socket) >> net.switch() << tap
        _ip("link", "set", "vnbtap0", "up")
        guest = stack.enter_context(vn.Net(cpus=[bench.front_core], poll="busy"))
        port = guest.virtio_user(socket)
        port.wait_connected(10)
        guest.source(tcp_frame()) >> port
        return _rate(lambda: tap.stats().sent)


def _tap_to_guest(bench: Bench) -> float:
    """Frames a second that a guest gets which the kernel sends into a tap."""
    with contextlib.ExitStack() as stack:
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory()), "0.sock")
        net = stack.enter_context(vn.Net(cpus=[bench.back_core], poll="busy"))
        net.vhost_user(socket) >> net.switch() << net.tap("vnbtap0")
        _ip("link", "set", "vnbtap0", "up")
        guest = stack.enter_context(vn.Net(cpus=[bench.front_core], poll="busy"))
        sink = guest.sink()
        port = guest.virtio_user(socket)
        port.wait_connected(10)
        port >> sink
        source = guest.source(tcp_frame(), count=0)
        source >> guest.af_packet("vnbtap0")
        rates = []
        for rate_pps in OFFERED_PPS:
            source.set(count=None, rate_pps=rate_pps)
            rates.append(_rate(lambda: sink.stats().consumed))
        return max(rates)


def _bridge(bench: Bench) -> float:
    """Frames a second from one tap through the kernel's bridge out of another."""
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(vn.Net(cpus=[bench.back_core], poll="busy"))
        sink = out.sink()
        out.tap("vnbtap1") >> sink
        into = stack.enter_context(vn.Net(cpus=[bench.front_core], poll="busy"))
        tap = into.tap("vnbtap0")
        _ip("link", "add", "vnbbr", "type", "bridge")
        stack.callback(_ip, "link", "del", "vnbbr")
        for name in ("vnbtap0", "vnbtap1"):
            _ip("link", "set", name, "master", "vnbbr", "up")
        _ip("link", "set", "vnbbr", "up")
        time.sleep(0.2)
        into.source(tcp_frame()) >> tap
        return _rate(lambda: sink.stats().consumed)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def _spinning() -> Iterator[None]:
    """In the block a thread computes in Python without a pause."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            np.sum(sum(range(1_000)))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
