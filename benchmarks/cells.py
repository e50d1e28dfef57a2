"""What is compared: the cells of the table.

A cell is one task, over one ring format and one frame size. Both back-ends are given the same task and
are driven by the same testpmd process with virtio-user ports; only the back-end differs between the two sides.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Ring formats by name: the format, and whether the driver asks for in-order use.
RINGS = {
    "split": ("split", True),
    "packed": ("packed", False),
    "packed-in-order": ("packed", True),
    "split-any-order": ("split", False),
}
#: What a run measures without being asked. (In order is what DPDK's driver does with split rings by itself.)
USUAL_RINGS = ("split", "packed", "packed-in-order")
SIZES = (64, 256, 1518, 65_000)
#: What segmentation makes of a stream: between guests only.
JUMBO = 65_000
#: Bytes of a cache line.
LINE = 64
#: Lines of a frame that a driver writes each time it sends one: testpmd its headers, ours none, since its frames stay
#: in their buffers.
LINES_SENT = {"testpmd": 1, "virtnet": 0}
#: Lines that it looks at of each it receives: testpmd the headers, ours what is private to a burst.
LINES_RECEIVED = {"testpmd": 1, "virtnet": 3}
#: Frames whose copying decides.
LARGE = 1000
#: Who drives: DPDK's testpmd, or virtnet.
LOADS = ("testpmd", "virtnet")


@dataclass(frozen=True)
class Task:
    """One task for a back-end.

    Attributes:
        name: what the table calls it.
        peer_mode: the forwarding mode of testpmd over its ``net_vhost`` ports.
        our_command: the virtnet command with the same task; ``{size}`` is the frame size. Ports are appended.
        driver_mode: the forwarding mode of the driving testpmd over its virtio-user ports.
        ports: how many sockets connect the two.
        counted: the driver's counter that is the result, ``rx`` or ``tx``.
        tx_first: bursts the driver sends first; then packets only circulate (a closed loop).
        usual: whether a run measures it without being asked.
        stations: addresses behind each port of the driver that send.
        learnt: addresses that the driver makes known behind each port before.
        peer: who does it on the other side: ``testpmd``, or ``ovs``.
    """

    name: str
    peer_mode: str
    our_command: str
    driver_mode: str
    ports: int
    counted: str
    tx_first: int = 0
    usual: bool = True
    stations: int = 1
    learnt: int = 0
    peer: str = "testpmd"

    @property
    def driver_generates(self) -> bool:
        """Whether the driver makes packets by itself, in an open loop."""
        return self.driver_mode in {"txonly", "flowgen"}


TASKS = (
    Task("guest-to-host", "rxonly", "sink --copy", "txonly", 1, "tx"),
    Task("host-to-guest", "txonly", "source --size {size}", "rxonly", 1, "rx"),
    Task("echo", "macswap", "echo", "flowgen", 1, "rx"),
    Task("vm-to-vm", "io", "wire", "flowgen", 2, "rx"),
    # Closed loops: the driver generates nothing, so more of what is seen is the back-end.
    Task("echo-closed", "macswap", "echo", "io", 1, "rx", tx_first=4, usual=False),
    Task("vm-to-vm-closed", "io", "wire", "io", 2, "rx", tx_first=4, usual=False),
    Task("switch-2", "NORMAL", "switch", "flowgen", 2, "rx", peer="ovs"),
    Task("switch-16", "NORMAL", "switch", "flowgen", 2, "rx", stations=8, peer="ovs"),
    Task("switch-10000", "NORMAL", "switch", "flowgen", 2, "rx", stations=8, learnt=5_000, peer="ovs"),
    # Not the same task: ours learns and looks up addresses, testpmd only joins two ports.
    Task("switch-2-io", "io", "switch", "flowgen", 2, "rx"),
    Task("switch-closed", "io", "switch", "io", 2, "rx", tx_first=4, usual=False),
)


@dataclass(frozen=True)
class Cell:
    """One cell of the table."""

    task: Task
    ring: str
    size: int
    load: str = "testpmd"

    @property
    def format(self) -> str:
        """The ring format, split or packed."""
        return RINGS[self.ring][0]

    @property
    def in_order(self) -> bool:
        """Whether the driver asks for in-order use."""
        return RINGS[self.ring][1]

    @property
    def lines(self) -> float:
        """Cache lines that move between the cores for a packet at least: what both sides touch of it and of the rings.

        Neither driver looks at more of a long frame than its beginning, or writes more of it every time, unless it
        takes several buffers.
        """
        shares = {"split": (0.31, 0.31), "split-any-order": (0.44, 0.44), "packed": (0.5, 0.5)}
        to_host, to_guest = shares.get(self.ring, (0.28, 0.5))
        in_frame = math.ceil(self.size / LINE)
        sent, received = (min(in_frame, lines[self.load]) for lines in (LINES_SENT, LINES_RECEIVED))
        if self.size == JUMBO:
            sent = in_frame
        if self.task.name == "guest-to-host":
            return sent + to_host
        if self.task.name == "host-to-guest":
            return received + to_guest
        return sent + received + to_host + to_guest

    @property
    def usual(self) -> bool:
        """Whether a run measures it without being asked: of switching, where the look-up counts, the short frames."""
        is_switch = "switch" in self.task.name
        if self.size == JUMBO and (self.task.name, self.load) != ("vm-to-vm", "virtnet"):
            return False
        return self.task.usual and (not is_switch or (self.size == SIZES[0] and self.ring != "packed"))

    @property
    def target(self) -> float:
        """The ratio to the peer that is aimed at."""
        large = self.size >= LARGE
        if self.task.peer == "ovs":
            return 2.5
        if "switch" in self.task.name:
            return 1.2
        if self.size == JUMBO:
            return 1.3
        if self.task.ports == 2:
            return 1.8 if self.load == "virtnet" else 1.5 if large else 1.2
        return 1.25 if self.load == "virtnet" else 1.3 if large else 1.0

    def __str__(self) -> str:
        """Name the cell as ``--only`` takes it."""
        return f"{self.task.name} {self.ring} {self.size} {self.load}"


def select(
    only: Iterable[str],
    *,
    rings: Iterable[str] = USUAL_RINGS,
    sizes: Iterable[int] = SIZES,
    loads: Iterable[str] = LOADS,
) -> list[Cell]:
    """Give the cells to measure, in table order.

    Each text in ``only`` is a list of words that a cell must have, as in ``echo split 64``; a cell is taken when it has
    all words of at least one text. Without any, the usual tasks are taken.

    Raises:
        ValueError: a text fits no cell.
    """
    wanted = [set(text.split()) for text in only]
    found: list[Cell] = []
    used: set[int] = set()
    for cell in _all_cells(rings, sizes, loads):
        fits = {number for number, words in enumerate(wanted) if words <= set(str(cell).split())}
        if fits or (not wanted and cell.usual):
            found.append(cell)
        used |= fits
    for number, words in enumerate(wanted):
        if number not in used:
            names = ", ".join(task.name for task in TASKS)
            raise ValueError(f"no cell has all of {sorted(words)}: say TASK RING SIZE LOAD, with TASK one of {names}")
    return found


def every() -> Iterator[Cell]:
    """All cells there are, in table order."""
    return _all_cells(RINGS, SIZES, LOADS)


def _all_cells(rings: Iterable[str], sizes: Iterable[int], loads: Iterable[str]) -> Iterator[Cell]:
    for load, task, size, ring in itertools.product(loads, TASKS, sizes, rings):
        # Flowgen has the same addresses at every port, so no switch can learn them; our driver has no closed loops.
        if load == "virtnet" and task.tx_first:
            continue
        if load == "testpmd" and "switch" in task.name and not task.tx_first:
            continue
        yield Cell(task, ring, size, load)
