"""What a rate does not say: Python in the path, a network at rest, round trips, set-up and memory.

Each measurement gives rows: a name, what the peer needs, what virtnet needs, and the ratio that counts. They run one
after the other, several times, and the medians are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import virtnet as vn
from benchmarks import cells, frames, testpmd
from benchmarks.drivers import DRIVERS
from benchmarks.machine import prefer
from benchmarks.ours import Virtnet
from benchmarks.run import Bench, PeerBackend
from benchmarks.testpmd import Testpmd, is_listening, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNS = 7

#: How long to wait until the cores are as far apart as usual.
LONGEST_WAIT_S = 20


@dataclass(frozen=True)
class Fact:
    """One row.

    Attributes:
        name: what was measured.
        peer: the other side's figure, or the limit, in words.
        ours: virtnet's, in words.
        ratio: how many times better, where that is the question.
        target: what was aimed at, in words.
        met: whether it was reached.
    """

    name: str
    peer: str
    ours: str
    ratio: float | None
    target: str
    met: bool


def measure_all(bench: Bench) -> Iterator[Fact]:
    """Measure everything."""
    for one in (python_in_the_path, round_trips, idle_network, first_packet, set_up, memory):
        yield from one(bench)


# Python in the path.


def python_in_the_path(bench: Bench) -> list[Fact]:
    """A Python program that forwards what matches a condition on a column, beside the same with other means."""
    rates = [_our_forwarder(bench) for _ in range(RUNS)]
    ours = statistics.median(rates)
    facts = [
        Fact(
            "forward what matches, bursts of 256, numpy",
            "-",
            f"{ours / 1e6:.2f} Mpps",
            None,
            ">= 5 Mpps",
            ours >= 5e6,
        )
    ]
    others = {
        "Scapy, parsing and building only": _scapy,
        "dpkt, parsing and building only": _dpkt,
        "AF_PACKET sockets, struct": _af_packet,
    }
    for name, forwarder in others.items():
        with contextlib.suppress(OSError, ImportError, subprocess.CalledProcessError):
            peer = statistics.median(forwarder(bench) for _ in range(3))
            ratio = ours / peer
            words = f"{peer / 1e3:.1f} kpps"
            facts.append(Fact(f"the same with {name}", words, f"{ours / 1e6:.2f} Mpps", ratio, ">= 100x", ratio >= 100))
    return facts


def _our_forwarder(bench: Bench, seconds: float = 1.0) -> float:
    """Packets a second through two ports held by this program."""
    bench.distance.wait_usual(LONGEST_WAIT_S)
    cell = cells.select(["vm-to-vm split 64 virtnet"])[0]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sockets = [directory / "0.sock", directory / "1.sock"]
        a, b = (stack.enter_context(vn.VhostUserPort(str(socket))) for socket in sockets)
        stack.enter_context(_pinned(bench.back_core))
        driver = stack.enter_context(DRIVERS["virtnet"](cell, sockets, bench))
        driver.ready()
        driver.begin()
        forwarded, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            burst = a.rx(256)
            if len(burst):
                forwarded += b.tx(burst[burst.columns.l4_dst == 9])
    return forwarded / elapsed


def _scapy(bench: Bench, packets: int = 2_000) -> float:
    """Packets a second that Scapy takes apart and puts together, without sending them anywhere."""
    from scapy.layers.inet import UDP
    from scapy.layers.l2 import Ether

    frame = frames.between(0, 2, 64)[0]
    with _pinned(bench.back_core):
        began = time.perf_counter()
        for _ in range(packets):
            packet = Ether(frame)
            if packet[UDP].dport == 9:
                bytes(packet)
        return packets / (time.perf_counter() - began)


def _dpkt(bench: Bench, packets: int = 20_000) -> float:
    """The same with dpkt."""
    import dpkt

    frame = frames.between(0, 2, 64)[0]
    with _pinned(bench.back_core):
        began = time.perf_counter()
        for _ in range(packets):
            packet = dpkt.ethernet.Ethernet(frame)
            if packet.data.data.dport == 9:
                bytes(packet)
        return packets / (time.perf_counter() - began)


def _af_packet(bench: Bench, seconds: float = 1.0) -> float:
    """Packets a second that a loop over two raw sockets forwards, between two taps."""
    program = Path(__file__).with_name("af_packet.py")
    with Virtnet(
        ["source", "tap:vnbench0", "--size", "64", "--cpu", str(bench.front_core), "--seconds", "60"],
        bench.logs / "af_packet.log",
        core=bench.front_core,
    ):
        wait_for(lambda: Path("/sys/class/net/vnbench0").exists(), "a tap")
        command = ["taskset", "-c", str(bench.back_core), sys.executable, str(program), "vnbench0", str(seconds)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


# Round trips.


def round_trips(bench: Bench) -> list[Fact]:
    """One packet that goes round between DPDK's driver and an echo."""
    task = dataclasses.replace(cells.Task("echo", "macswap", "echo", "io", 1, "rx", tx_first=1), usual=False)
    cell = cells.Cell(task, "split", 64)
    busy, adaptive, dpdk = [], [], []
    for _ in range(RUNS):
        busy.append(_round_trip_ns(bench, cell, "busy"))
        adaptive.append(_round_trip_ns(bench, cell, "adaptive"))
        dpdk.append(_round_trip_ns(bench, cell, "dpdk"))
    of_busy, of_adaptive, of_dpdk = map(statistics.median, (busy, adaptive, dpdk))
    ratio = of_adaptive / of_busy
    return [
        Fact(
            "round trip, adaptive beside busy polling",
            f"{of_busy:.0f} ns (busy)",
            f"{of_adaptive:.0f} ns",
            ratio,
            "<= 1.3x",
            ratio <= 1.3,
        ),
        Fact(
            "round trip, busy polling beside DPDK",
            f"{of_dpdk:.0f} ns",
            f"{of_busy:.0f} ns",
            of_dpdk / of_busy,
            "",
            True,
        ),
    ]


def _round_trip_ns(bench: Bench, cell: cells.Cell, how: str) -> float:
    bench.distance.wait_usual(LONGEST_WAIT_S)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        socket = directory / "0.sock"
        if how == "dpdk":
            back: PeerBackend | Virtnet = PeerBackend(cell, [socket], bench, bench.logs / "echo.log", stack)
        else:
            words = ["echo", f"vhost-user:{socket}", "--cpu", str(bench.back_core), "--poll", how, "--seconds", "60"]
            back = stack.enter_context(Virtnet(words, bench.logs / "echo.log", core=bench.back_core))
            wait_for(lambda: is_listening(socket), "virtnet to listen")
        front = stack.enter_context(
            Testpmd(
                [testpmd.virtio_user(0, socket)],
                mode="io",
                log=bench.logs / "driver.log",
                core=bench.front_core,
                hugepages=bench.huge_pages,
                args=["--burst=1", "--txd=256", "--rxd=256", "--txpkts=64"],
            )
        )
        front.ready()
        if isinstance(back, PeerBackend):
            back.begin()
        front.start(tx_first=1)
        prefer(front.pid)
        prefer(back.pid)
        time.sleep(0.2)
        front.stats()
        time.sleep(0.3)
        return 1e9 / max(1, front.stats()[0].rx_pps)


# At rest.


def idle_network(bench: Bench, ports: int = 64, seconds: float = 4.0) -> list[Fact]:
    """What a switch costs that has many ports attached and nothing to do."""
    with _switch(bench, ports) as (back, sockets), contextlib.ExitStack() as stack:
        for socket in sockets:
            stack.enter_context(vn.VirtioUserPort(str(socket))).wait_connected(10)
        time.sleep(4)  # until nobody looks any more whether something moves
        before = _cpu_s(back.pid)
        time.sleep(seconds)
        share = (_cpu_s(back.pid) - before) / seconds
    return [
        Fact(f"idle, {ports} ports attached", "100 % of a core", f"{share:.2%}", None, "< 0.5 %", share < 0.005),
    ]


def first_packet(bench: Bench, tries: int = 200) -> list[Fact]:
    """How long a packet takes through a switch that has slept, seen by a Python program at both ends."""
    with _switch(bench, 2) as (_, sockets), contextlib.ExitStack() as stack:
        stack.enter_context(_pinned(bench.front_core))
        a, b = (stack.enter_context(vn.VirtioUserPort(str(socket))) for socket in sockets)
        for port in (a, b):
            port.wait_connected(10)
        there, back = (vn.Burst(frames.between(number, 2, 64)) for number in range(2))
        for sender, burst in ((a, there), (b, back)):  # now the switch knows who is where
            sender.tx(burst)
            time.sleep(0.05)
        b.rx()
        times = []
        for _ in range(tries):
            time.sleep(0.02)
            began = time.perf_counter()
            a.tx(there)
            while not len(b.rx()):
                pass
            times.append(time.perf_counter() - began)
    median, floor = statistics.median(times), statistics.median(_wake_up_s(bench) for _ in range(tries))
    words = f"{floor * 1e6:.0f} us (bare wake-up)", f"{median * 1e6:.0f} us"
    return [Fact("first packet after 20 ms of idling", *words, None, "<= 100 us", median <= 100e-6)]


def _wake_up_s(bench: Bench) -> float:
    """How long the system takes to wake a thread on the other core that waits for a descriptor."""
    with contextlib.ExitStack() as stack:
        event = os.eventfd(0)
        stack.callback(os.close, event)
        woken: list[float] = []

        def wait() -> None:
            os.sched_setaffinity(0, {bench.back_core})
            os.eventfd_read(event)
            woken.append(time.perf_counter())

        stack.enter_context(_pinned(bench.front_core))
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.02)
        began = time.perf_counter()
        os.eventfd_write(event, 1)
        thread.join()
        return woken[0] - began


# Set-up and memory.


def set_up(bench: Bench) -> list[Fact]:
    """From attaching a driver to both ports to the first packet through, and from the process's start to that."""
    times = {side: [_set_up_s(bench, side) for _ in range(RUNS)] for side in ("peer", "ours")}
    facts = []
    for number, name in enumerate(("attaching two drivers to first packet", "start of the process to first packet")):
        peer, ours = (statistics.median(time[number] for time in times[side]) for side in ("peer", "ours"))
        words = f"{peer * 1e3:.1f} ms", f"{ours * 1e3:.1f} ms"
        facts.append(Fact(name, *words, peer / ours, ">= 10x", peer / ours >= 10))
    return facts


def _set_up_s(bench: Bench, side: str) -> tuple[float, float]:
    started = time.perf_counter()
    with _two_ports(bench, side) as (_, sockets), contextlib.ExitStack() as stack:
        burst = vn.Burst(frames.between(0, 2, 64))
        began = time.perf_counter()
        a, b = (stack.enter_context(vn.VirtioUserPort(str(socket))) for socket in sockets)
        while not len(b.rx()):
            a.tx(burst)
        now = time.perf_counter()
        return now - began, now - started


def memory(bench: Bench) -> list[Fact]:
    """Resident memory of a process that joins two ports and rests, huge pages included; testpmd as it is by itself."""
    kilobytes = {}
    for side in ("peer", "ours"):
        with _two_ports(bench, side, mbufs=None) as (pid, _):
            time.sleep(0.5)
            status = Path(f"/proc/{pid}/status").read_text()
            kilobytes[side] = sum(map(int, re.findall(r"(?:VmRSS|HugetlbPages):\s+(\d+) kB", status)))
    ratio = kilobytes["peer"] / kilobytes["ours"]
    words = [f"{kilobytes[side] / 1024:.0f} MiB" for side in ("peer", "ours")]
    return [Fact("memory of an idle switch with 2 ports", *words, ratio, ">= 10x", ratio >= 10)]


@contextlib.contextmanager
def _two_ports(bench: Bench, side: str, *, mbufs: int | None = testpmd.MBUFS) -> Iterator[tuple[int, list[Path]]]:
    """A process that joins two ports and listens: its number, and the sockets."""
    if side == "ours":
        with _switch(bench, 2) as (back, sockets):
            yield back.pid, sockets
        return
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sockets = [directory / f"{number}.sock" for number in range(2)]
        vdevs = [testpmd.vhost(number, socket) for number, socket in enumerate(sockets)]
        words = {"core": bench.back_core, "hugepages": bench.huge_pages, "mbufs": mbufs}
        peer = stack.enter_context(Testpmd(vdevs, mode="io", log=bench.logs / "peer.log", **words))
        peer.ready()
        peer.start()
        yield peer.pid, sockets


@contextlib.contextmanager
def _switch(bench: Bench, ports: int) -> Iterator[tuple[Virtnet, list[Path]]]:
    """A virtnet switch that listens at so many sockets."""
    with tempfile.TemporaryDirectory() as directory:
        sockets = [Path(directory) / f"{number}.sock" for number in range(ports)]
        words = ["switch", *(f"vhost-user:{socket}" for socket in sockets), "--seconds", "60"]
        with Virtnet(words, bench.logs / "switch.log", core=bench.back_core) as back:
            wait_for(lambda: all(map(is_listening, sockets)), "virtnet to listen", every_s=0.001)
            yield back, sockets


def _cpu_s(pid: int) -> float:
    """What all threads of a process have run so far."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


@contextlib.contextmanager
def _pinned(core: int) -> Iterator[None]:
    """This process stays on one core for the time of a block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
