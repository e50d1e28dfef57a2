"""One measurement: a driver on one core, a back-end on another, a window of time, and the accounts afterwards.

The rate is what the driver counted during the window, for either side. Around it stand the checks that make it worth
writing down: both forwarding threads had their core, frames had the size that was asked for, and after everything has
come to rest the counters of driver and back-end agree to the last packet.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks import testpmd
from benchmarks.machine import CoreDistance, CoreWatch, prefer
from benchmarks.ours import Virtnet, VirtnetError
from benchmarks.testpmd import PortStats, Testpmd, TestpmdError, wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.cells import Cell

#: A thread that had less of its core was disturbed, and so was the figure.
LEAST_SHARE = 0.97

RING_SIZE = 256

#: Flowgen subtracts a checksum field that is not on the ring.
FLOWGEN_TRAILER = 4

#: A guard only: the command is ended when the window is over.
LONGEST_RUN_S = 120

FAILURES = (TestpmdError, VirtnetError, TimeoutError)


@dataclass(frozen=True)
class Bench:
    """What stays the same over all measurements of one invocation."""

    front_core: int
    back_core: int
    huge_pages: bool
    warm_up_s: float
    window_s: float
    logs: Path
    distance: CoreDistance
    driver_options: str = ""
    eal: Sequence[str] = ()


@dataclass(frozen=True)
class Counts:
    """A back-end's own account; received is what came from the driver.

    ``refused`` is the part of the packets it generated itself for which the ring had no room, where it tells.
    """

    received: int
    sent: int
    dropped: int
    refused: float | None = None


@dataclass
class Run:
    """What one measurement found.

    Attributes:
        line_ns: how long a cache line took between the two cores, before and after the window.
        refused: the part of the generated packets that found the ring full: near 0 the generator is the slower side.
        void: who disturbed the measurement; it is to be repeated.
        failed: what went wrong; nothing measured under such circumstances is a figure.
    """

    cell: str
    side: str
    time: str
    pps: int = 0
    back_share: float = 0.0
    front_share: float = 0.0
    line_ns: float = 0.0
    refused: float | None = None
    frame_bytes: float = 0.0
    driver_received: int = 0
    driver_sent: int = 0
    back: dict[str, int] = field(default_factory=dict)
    void: str = ""
    failed: str = ""

    @property
    def clean(self) -> bool:
        """Whether the rate counts."""
        return not self.void and not self.failed


class Backend(Protocol):
    """The side under test, as a measurement sees it."""

    @property
    def pid(self) -> int:
        """The process to account for."""

    def begin(self) -> None:
        """The driver is attached: move packets."""

    def finish(self) -> Counts:
        """Stop and tell what was moved."""


class PeerBackend:
    """DPDK's ``net_vhost`` in a testpmd."""

    def __init__(self, cell: Cell, sockets: list[Path], bench: Bench, log: Path, stack: contextlib.ExitStack) -> None:
        """Start it and wait until it listens."""
        vdevs = [testpmd.vhost(number, socket) for number, socket in enumerate(sockets)]
        self._process = stack.enter_context(
            Testpmd(
                vdevs,
                mode=cell.task.peer_mode,
                log=log,
                core=bench.back_core,
                hugepages=bench.huge_pages,
                args=_arguments(cell, cell.task.peer_mode),
                eal=bench.eal,
            )
        )
        self._process.ready()
        self.pid = self._process.pid

    def begin(self) -> None:
        """Start its forwarding loop."""
        self._process.start()

    def finish(self) -> Counts:
        """Stop its forwarding loop; what found a ring full was dropped."""
        forwarded = self._process.stop()
        received, sent = self._process.totals()
        if self._process.generates:  # what it could not place was never a packet on its way
            return Counts(received, sent, 0, refused=forwarded.refused)
        return Counts(received, sent, forwarded.tx_dropped)


class OurBackend:
    """The virtnet command."""

    def __init__(self, cell: Cell, sockets: list[Path], bench: Bench, log: Path, stack: contextlib.ExitStack) -> None:
        """Start it and wait until it listens."""
        words = cell.task.our_command.format(size=cell.size).split()
        command, options = words[0], words[1:]
        ports = [f"vhost-user:{socket}" for socket in sockets]
        limits = ["--cpu", str(bench.back_core), "--poll", "busy", "--seconds", str(LONGEST_RUN_S)]
        self._process = stack.enter_context(
            Virtnet([command, *ports, *options, *limits], log, core=bench.back_core),
        )
        self.pid = self._process.pid
        wait_for(
            lambda: all(map(testpmd.is_listening, sockets)) or self._process.process.poll() is not None,
            "virtnet to listen",
        )

    def begin(self) -> None:
        """Nothing to do: it works from the moment the driver is attached."""

    def finish(self) -> Counts:
        """End it and read its final object."""
        return account(self._process.finish())


SIDES: dict[str, type[PeerBackend | OurBackend]] = {"peer": PeerBackend, "ours": OurBackend}


def measure(cell: Cell, side: str, bench: Bench) -> Run:
    """Do one measurement of one side."""
    run = Run(str(cell), side, time.strftime("%Y-%m-%dT%H:%M:%S"))
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="virtnet-bench-")))
        sockets = [directory / f"{number}.sock" for number in range(cell.task.ports)]
        back: Backend = SIDES[side](cell, sockets, bench, bench.logs / f"{side}.log", stack)
        front = stack.enter_context(_driver(cell, sockets, bench))
        front.ready()
        back.begin()
        front.start(cell.task.tx_first)
        time.sleep(bench.warm_up_s)
        _window(run, cell, front, back, bench)
        _settle(run, cell, front, back)
    return run


def _driver(cell: Cell, sockets: list[Path], bench: Bench) -> Testpmd:
    vdevs = [
        testpmd.virtio_user(number, socket, ring=cell.ring, in_order=cell.in_order, extra=bench.driver_options)
        for number, socket in enumerate(sockets)
    ]
    peers = []
    if len(sockets) == 2:
        peers = [f"--eth-peer={number},{testpmd.mac(1 - number)}" for number in range(2)]
    return Testpmd(
        vdevs,
        mode=cell.task.driver_mode,
        log=bench.logs / "driver.log",
        core=bench.front_core,
        hugepages=bench.huge_pages,
        args=[*_arguments(cell, cell.task.driver_mode), *peers],
        eal=bench.eal,
    )


def _arguments(cell: Cell, mode: str) -> list[str]:
    size = cell.size + (FLOWGEN_TRAILER if mode == "flowgen" else 0)
    return ["--burst=32", f"--txd={RING_SIZE}", f"--rxd={RING_SIZE}", f"--txpkts={size}"]


def _window(run: Run, cell: Cell, front: Testpmd, back: Backend, bench: Bench) -> None:
    """Measure the rate, and whether both threads had their cores meanwhile."""
    prefer(front.pid)
    prefer(back.pid)
    both = [front.pid, back.pid]
    lines_ns = [bench.distance.measure_ns(both)]
    before = front.stats()
    watches = [CoreWatch(back.pid, bench.back_core), CoreWatch(front.pid, bench.front_core)]
    time.sleep(bench.window_s)
    shares = [watch.share() for watch in watches]
    after = front.stats()
    lines_ns.append(bench.distance.measure_ns(both))
    run.line_ns = round(sum(lines_ns) / 2, 1)
    run.back_share, run.front_share = (round(share.ran, 4) for share in shares)
    if cell.task.counted == "rx":
        run.pps = sum(port.rx_pps for port in after)
    else:
        run.pps = sum(port.tx_pps for port in after)
    run.frame_bytes = _frame_bytes(before, after)
    if run.pps == 0:
        run.failed = "no packet came through"
    elif round(run.frame_bytes) != cell.size:
        run.failed = f"frames had {run.frame_bytes:.1f} bytes"
    elif min(run.back_share, run.front_share) < LEAST_SHARE:
        run.void = f"the back-end had {run.back_share:.1%} of its core, the driver {run.front_share:.1%}"
    elif max(share.stolen for share in shares) > 1 - LEAST_SHARE:
        run.void = f"the hypervisor took {max(share.stolen for share in shares):.0%} of a core"
    elif not all(map(bench.distance.is_usual, lines_ns)):
        run.void = "a cache line took {:.0f} and {:.0f} ns, not {:.0f}".format(*lines_ns, bench.distance.usual_ns)


def _settle(run: Run, cell: Cell, front: Testpmd, back: Backend) -> None:
    """Let everything come to rest in the order in which packets flow, then compare all counters."""
    if cell.task.driver_mode != "rxonly":
        offered = front.stop()
        run.refused = offered.refused if cell.task.driver_generates else None
        front.drain()
        front.mode("rxonly")
        front.start()
    counts = back.finish()
    front.drain()
    run.driver_received, run.driver_sent = front.totals()
    run.back = {"received": counts.received, "sent": counts.sent, "dropped": counts.dropped}
    run.refused = run.refused if counts.refused is None else counts.refused
    wrong = []
    if counts.received != run.driver_sent:
        wrong.append(f"the driver sent {run.driver_sent}, the back-end received {counts.received}")
    # DPDK's driver throws away what came between the filling of its ring and its start; our source sends by then.
    thrown_away = RING_SIZE if cell.task.driver_mode == "rxonly" else 0
    if not 0 <= counts.sent - run.driver_received <= thrown_away:
        wrong.append(f"the back-end sent {counts.sent}, the driver received {run.driver_received}")
    if (
        cell.task.counted == "rx"
        and cell.task.driver_mode != "rxonly"
        and counts.received != counts.sent + counts.dropped
    ):
        wrong.append(f"{counts.received} received, but {counts.sent} sent and {counts.dropped} dropped")
    if wrong and not run.failed:
        run.failed = "; ".join(wrong)


def _frame_bytes(before: list[PortStats], after: list[PortStats]) -> float:
    def total(stats: list[PortStats], direction: str) -> tuple[int, int]:
        packets = sum(getattr(port, f"{direction}_packets") for port in stats)
        return packets, sum(getattr(port, f"{direction}_bytes") for port in stats)

    sizes = []
    for direction in ("rx", "tx"):
        (packets, bytes_), (packets_before, bytes_before) = total(after, direction), total(before, direction)
        if packets > packets_before:
            sizes.append((bytes_ - bytes_before) / (packets - packets_before))
    return sum(sizes) / len(sizes) if sizes else 0.0


def account(final: dict[str, Any]) -> Counts:
    """Sum up virtnet's final object; it must add up by itself before it is compared with anybody else's."""
    balance = final["balance"]
    if not balance["exact"]:
        raise VirtnetError(f"virtnet's own account does not add up: {balance}")
    made, dropped = balance["generated"], balance["dropped"]
    refused = dropped / made if made else None
    return Counts(balance["received"], balance["sent"], 0 if made else dropped, refused)
