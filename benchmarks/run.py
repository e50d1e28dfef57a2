"""One measurement: a driver on one core, a back-end on another, a window of time, and the accounts afterwards.

The rate is what the driver counted during the window, for either side. Around it stand the checks that make it worth
writing down: both forwarding threads had their core, frames had the size that was asked for, and after everything has
come to rest the counters of driver and back-end agree to the last packet.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks import testpmd
from benchmarks.drivers import DRIVERS, RING_SIZE, Driver, DriverError, Reading, arguments
from benchmarks.machine import CoreDistance, CoreWatch, prefer
from benchmarks.ours import Virtnet, VirtnetError
from benchmarks.ovs import Ovs, OvsError
from benchmarks.testpmd import Testpmd, TestpmdError, wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.cells import Cell

#: A thread that had less of its core was disturbed, and so was the figure.
LEAST_SHARE = 0.97

#: A guard only: the command is ended when the window is over.
LONGEST_RUN_S = 120

FAILURES = (OvsError, TestpmdError, VirtnetError, DriverError, TimeoutError)


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
    #: Whether our driver has a back-end record what is in flight, which none but ours does.
    in_flight: bool = False
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

    def __init__(self, cell: Cell, sockets: list[Path], bench: Bench, log: Path, stack: contextlib.ExitStack) -> None:
        """Start it and wait until it listens."""

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
                args=arguments(cell, cell.task.peer_mode),
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


class OvsBackend:
    """OVS with DPDK's datapath."""

    def __init__(self, cell: Cell, sockets: list[Path], bench: Bench, log: Path, stack: contextlib.ExitStack) -> None:
        """Start it and wait until it listens."""
        directory = log.parent / f"ovs-{cell.task.name}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        self._ovs = Ovs(len(sockets), directory, core=bench.back_core)
        stack.callback(self._ovs.close)
        for socket, place in zip(self._ovs.sockets, sockets, strict=True):
            place.symlink_to(socket)
        self.pid = self._ovs.pid

    def begin(self) -> None:
        """Wait until it knows that the driver is attached."""
        self._ovs.wait_up()

    def finish(self) -> Counts:
        """Read its counters; a packet that came in went to one port, or was dropped there."""
        received, dropped = self._ovs.account()
        return Counts(received, received - dropped, dropped)


SIDES: dict[str, type[PeerBackend | OurBackend]] = {"peer": PeerBackend, "ours": OurBackend}


def measure(cell: Cell, side: str, bench: Bench) -> Run:
    """Do one measurement of one side."""
    run = Run(str(cell), side, time.strftime("%Y-%m-%dT%H:%M:%S"))
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="virtnet-bench-")))
        sockets = [directory / f"{number}.sock" for number in range(cell.task.ports)]
        kind: type[Backend] = OvsBackend if SIDES[side] is PeerBackend and cell.task.peer == "ovs" else SIDES[side]
        back: Backend = kind(cell, sockets, bench, bench.logs / f"{side}.log", stack)
        front: Driver = stack.enter_context(DRIVERS[cell.load](cell, sockets, bench))
        front.ready()
        back.begin()
        front.begin()
        time.sleep(bench.warm_up_s)
        _window(run, cell, front, back, bench)
        _settle(run, cell, front, back)
    return run


def _window(run: Run, cell: Cell, front: Driver, back: Backend, bench: Bench) -> None:
    """Measure the rate, and whether both threads had their cores meanwhile."""
    prefer(front.pid)
    prefer(back.pid)
    both = [front.pid, back.pid]
    lines_ns = [bench.distance.measure_ns(both)]
    before = front.read()
    watches = [CoreWatch(back.pid, bench.back_core), CoreWatch(front.pid, bench.front_core)]
    time.sleep(bench.window_s)
    shares = [watch.share() for watch in watches]
    after = front.read()
    lines_ns.append(bench.distance.measure_ns(both))
    run.line_ns = round(sum(lines_ns) / 2, 1)
    run.back_share, run.front_share = (round(share.ran, 4) for share in shares)
    run.pps = round(after.received_pps if cell.task.counted == "rx" else after.sent_pps)
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


def _settle(run: Run, cell: Cell, front: Driver, back: Backend) -> None:
    """Let everything come to rest in the order in which packets flow, then compare all counters."""
    run.refused = front.calm()
    counts = back.finish()
    last = front.settle()
    run.driver_received, run.driver_sent = last.received, last.sent
    run.back = {"received": counts.received, "sent": counts.sent, "dropped": counts.dropped}
    run.refused = run.refused if counts.refused is None else counts.refused
    wrong = []
    if counts.received != run.driver_sent:
        wrong.append(f"the driver sent {run.driver_sent}, the back-end received {counts.received}")
    # DPDK's driver throws away what came between the filling of its ring and its start; our source sends by then.
    thrown_away = RING_SIZE if cell.load == "testpmd" and cell.task.driver_mode == "rxonly" else 0
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


def _frame_bytes(before: Reading, after: Reading) -> float:
    """Mean length of the frames that passed between two readings."""
    sizes = []
    for direction in ("received", "sent"):
        packets = getattr(after, direction) - getattr(before, direction)
        if packets > 0:
            size = getattr(after, f"{direction}_bytes") - getattr(before, f"{direction}_bytes")
            sizes.append(size / packets)
    return sum(sizes) / len(sizes) if sizes else 0.0


def account(final: dict[str, Any]) -> Counts:
    """Sum up virtnet's final object; it must add up by itself before it is compared with anybody else's."""
    balance = final["balance"]
    if not balance["exact"]:
        raise VirtnetError(f"virtnet's own account does not add up: {balance}")
    made, dropped = balance["generated"], balance["dropped"]
    refused = dropped / made if made else None
    return Counts(balance["received"], balance["sent"], 0 if made else dropped, refused)
