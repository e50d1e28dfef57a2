"""The driver's side of a measurement: DPDK's virtio-user ports in a testpmd, or virtnet's own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO, cast

from benchmarks import testpmd
from benchmarks.testpmd import DIE_WITH_PARENT, Testpmd, wait_for

if TYPE_CHECKING:
    from benchmarks.cells import Cell
    from benchmarks.run import Bench

RING_SIZE = 256

#: Flowgen subtracts a checksum field that is not on the ring.
FLOWGEN_TRAILER = 4

ROOT = Path(__file__).parent.parent


class DriverError(Exception):
    """Our driver did not do what it was asked."""


@dataclass(frozen=True)
class Reading:
    """The driver's counters since it attached, and how fast they grew since the last reading."""

    received: int
    sent: int
    received_bytes: int
    sent_bytes: int
    received_pps: float
    sent_pps: float


class Driver(Protocol):
    """What a measurement asks of either driver. Made, it starts; it is ready when it is attached."""

    @property
    def pid(self) -> int:
        """The process to account for."""

    def ready(self) -> object:
        """Wait until it is attached."""

    def begin(self) -> None:
        """Move packets."""

    def read(self) -> Reading:
        """Read all counters."""

    def calm(self) -> float | None:
        """Send no more, take what still comes; what part of all it wanted to send found the ring full, if known."""

    def settle(self) -> Reading:
        """Wait until nothing comes any more."""

    def __enter__(self) -> Self:
        """The process is ended when the block is left."""

    def __exit__(self, *_: object) -> None:
        """End it."""


class DpdkDriver:
    """DPDK's."""

    def __init__(self, cell: Cell, sockets: list[Path], bench: Bench) -> None:
        """Start testpmd."""
        self._task = cell.task
        vdevs = [
            testpmd.virtio_user(number, socket, ring=cell.format, in_order=cell.in_order, extra=bench.driver_options)
            for number, socket in enumerate(sockets)
        ]
        peers = []
        if len(sockets) == 2:
            peers = [f"--eth-peer={number},{testpmd.mac(1 - number)}" for number in range(2)]
        self._process = Testpmd(
            vdevs,
            mode=self._task.driver_mode,
            log=bench.logs / "driver.log",
            core=bench.front_core,
            hugepages=bench.huge_pages,
            args=[*arguments(cell, self._task.driver_mode), *peers],
            eal=bench.eal,
        )
        self.pid = self._process.pid

    def ready(self) -> None:
        """Wait for its prompt."""
        self._process.ready()

    def begin(self) -> None:
        """Start its forwarding loop."""
        self._process.start(self._task.tx_first)

    def read(self) -> Reading:
        """Read the counters of its ports."""
        ports = self._process.stats()
        return Reading(
            received=sum(port.rx_packets for port in ports),
            sent=sum(port.tx_packets for port in ports),
            received_bytes=sum(port.rx_bytes for port in ports),
            sent_bytes=sum(port.tx_bytes for port in ports),
            received_pps=sum(port.rx_pps for port in ports),
            sent_pps=sum(port.tx_pps for port in ports),
        )

    def calm(self) -> float | None:
        """Become one that only receives, unless it is."""
        if self._task.driver_mode == "rxonly":
            return None
        offered = self._process.stop()
        self._process.drain()
        self._process.mode("rxonly")
        self._process.start()
        return offered.refused if self._task.driver_generates else None

    def settle(self) -> Reading:
        """Take what still waits in its receive queues."""
        self._process.drain()
        return self.read()

    def __enter__(self) -> Self:
        """The process is ended when the block is left."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.close()


class OurDriver:
    """virtnet's, in ``python -m benchmarks.load``."""

    def __init__(self, cell: Cell, sockets: list[Path], bench: Bench) -> None:
        """Start it."""
        core = str(bench.front_core)
        self._log = bench.logs / "driver.log"
        self._errors = self._log.open("w")
        order = "--in-order" if cell.in_order else "--no-in-order"
        words = [cell.task.driver_mode, *map(str, sockets), "--ring", cell.format, order, "--size", str(cell.size)]
        words += ["--stations", str(cell.task.stations), "--learnt", str(cell.task.learnt), "--cpu", core]
        words += ["--in-flight"] if bench.in_flight else []
        self._process = subprocess.Popen(
            [*DIE_WITH_PARENT, "taskset", "-c", core, sys.executable, "-m", "benchmarks.load", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            cwd=ROOT,
        )
        self.pid = self._process.pid
        self._words = cast("TextIO", self._process.stdin)
        self._answers = cast("TextIO", self._process.stdout)
        self._last: dict[str, Any] = {}

    def ready(self) -> None:
        """Wait until it says so."""
        self._answer()

    def begin(self) -> None:
        """Plug its sources in."""
        self._ask("begin")

    def read(self) -> Reading:
        """Read the counters of its ports."""
        before, self._last = self._last, self._ask("read")
        now = self._last
        elapsed = now["at"] - before["at"] if before else float("inf")
        return Reading(
            received=now["received"],
            sent=now["sent"],
            received_bytes=now["received_bytes"],
            sent_bytes=now["sent_bytes"],
            received_pps=(now["received"] - before.get("received", 0)) / elapsed,
            sent_pps=(now["sent"] - before.get("sent", 0)) / elapsed,
        )

    def calm(self) -> float | None:
        """Replace its sources by sinks."""
        self._ask("calm")
        return None

    def settle(self) -> Reading:
        """Wait until its counters stand still."""
        last = self.read()

        def nothing_new() -> bool:
            nonlocal last
            before, last = last, self.read()
            return before.received == last.received

        wait_for(nothing_new, "packets to stop coming", timeout_s=5, every_s=0.05)
        if self._last["lost"]:
            raise DriverError(f"our driver dropped {self._last['lost']} packets")
        return last

    def __enter__(self) -> Self:
        """The process is ended when the block is left."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, word: str) -> dict[str, Any]:
        try:
            self._words.write(f"{word}\n")
            self._words.flush()
        except BrokenPipeError:
            raise self._error() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise self._error()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _error(self) -> DriverError:
        last_lines = self._log.read_text(errors="replace").strip().splitlines()[-8:]
        return DriverError("\n    ".join(["our driver has ended", *last_lines]))


DRIVERS: dict[str, type[DpdkDriver | OurDriver]] = {"testpmd": DpdkDriver, "virtnet": OurDriver}


def arguments(cell: Cell, mode: str) -> list[str]:
    """What every testpmd of a cell is told about rings, bursts and frames."""
    size = cell.size + (FLOWGEN_TRAILER if mode == "flowgen" else 0)
    return ["--burst=32", f"--txd={RING_SIZE}", f"--rxd={RING_SIZE}", f"--txpkts={size}"]
