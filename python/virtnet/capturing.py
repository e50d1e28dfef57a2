"""Captures: what passes a place of a network, written down while it passes.

A capture is how somebody looks at a network, not a part of what the network is: ``net.spec`` does not know of it, a
change leaves it where it is, and it ends with the place that it looks at.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, TypeAlias

from virtnet.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtnet import _virtnet
    from virtnet.burst import Burst
    from virtnet.net import Net
    from virtnet.nodes import Function, Node, PortNode
    from virtnet.plans import PlannedNode, Plans
    from virtnet.stats import PortStats

__all__ = [
    "Capture",
    "ColumnsCapture",
    "Opened",
    "Place",
    "PlannedCapture",
    "PlannedPlace",
    "Target",
    "check_room",
    "filters_of",
    "open_target",
    "place_name",
    "places_of",
]

#: How often an end, or packets, are looked for.
LOOK_S = 0.01


class HasDescriptor(Protocol):
    """An open file, or something like it."""

    def fileno(self) -> int:
        """The number of its descriptor."""
        ...


#: Where a capture can be written to: a path, ``-`` for standard output, an open descriptor or file.
Target: TypeAlias = "str | os.PathLike[str] | int | HasDescriptor"

#: Where a capture is taken: a node with one cable, or the two nodes at the ends of a cable, or their names.
Place: TypeAlias = "str | Node | tuple[str | Node, str | Node]"

#: As many as a switch has cables.
PLACES_MAX = 4096


@dataclass
class Opened:
    """What a capture is written to, for the engine to open.

    Attributes:
        where: a path; that of a descriptor of this process where somebody else has opened it.
        name: what to call the port.
        append: whether it goes on where the file ends.
    """

    where: str
    name: str
    append: bool = False
    #: Held until the engine has opened it.
    descriptor: int | None = None

    def close(self) -> None:
        """Lets go of what was held. Again does nothing."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        """Lets go of it at the latest now."""
        with contextlib.suppress(OSError):
            self.close()


def open_target(target: Target) -> Opened:
    """Gets hold of what a capture is to be written to.

    Raises:
        ConfigError: it is a terminal, or nothing that can be written to.
    """
    if isinstance(target, str | os.PathLike) and str(target) != "-":
        path = str(target)
        return Opened(path, f"capture-{Path(path).stem}")
    number = 1 if isinstance(target, str | os.PathLike) else target if isinstance(target, int) else target.fileno()
    try:
        mode = os.fstat(number).st_mode
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise ConfigError(f"a capture is written, and descriptor {number} is open for reading only")
        if os.isatty(number):
            raise ConfigError("a capture is not for a terminal: write it to a file, or pipe it into what reads it")
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            raise ConfigError(f"a capture is written to a file or a pipe, and descriptor {number} is neither")
        held = os.dup(number)
    except OSError as error:
        raise ConfigError(f"descriptor {number} cannot be written to: {error.strerror}") from None
    return Opened(f"/proc/self/fd/{held}", "capture", append=True, descriptor=held)


def places_of(where: Place | list[Place]) -> list[Place]:
    """The places that are meant.

    Raises:
        ConfigError: there are none, or too many.
    """
    places = list(where) if isinstance(where, list) else [where]
    if not 1 <= len(places) <= PLACES_MAX:
        raise ConfigError(f"a capture is taken at 1 to {PLACES_MAX} places, found {len(places)}")
    return places


def place_name(place: Place) -> str:
    """What a place is called: as the node, or as both with a dash between."""
    ends = place if isinstance(place, tuple) else (place,)
    return "-".join(end if isinstance(end, str) else end.name for end in ends)


def filters_of(chosen: str | Sequence[str], places: int) -> list[str]:
    """The filter of each place: the same for all, or one for each.

    Raises:
        ConfigError: there are more or fewer.
    """
    filters = [chosen] * places if isinstance(chosen, str) else chosen
    is_list = isinstance(filters, list | tuple) and len(filters) == places
    if not is_list or not all(isinstance(one, str) for one in filters):
        raise ConfigError(f"filter is a text, or one for each of {places} places, found {chosen!r}")
    return list(filters)


class Capture:
    """A capture that runs; as a context manager it is stopped at the end of the block.

    It ends by itself when its place is gone, when the network stops, when whoever reads it has left, or when its file
    cannot be written any more. In the last two cases its port stays until it is stopped, and drops what comes.

    Attributes:
        file: the port that writes.
        places: the names of the places, in the order in which they were given: interfaces in a pcapng file.
        tees: the functions that copy, one at each place.
    """

    def __init__(
        self, net: Net, file: PortNode, places: Sequence[str], tees: Sequence[Function], opened: Opened | None
    ) -> None:
        """Made by the network."""
        from virtnet.stats import PortStats

        self.net = net
        self.file = file
        self.places = tuple(places)
        self.tees = tuple(tees)
        self._opened = opened
        self._last = PortStats("pcap")

    def stats(self) -> PortStats:
        """What was written and dropped; of a capture that has ended, up to a moment before its end."""
        found = self.net.stats().ports.get(self.file.name)
        if found is not None:
            self._last = found
        return self._last

    @property
    def packets(self) -> int:
        """Packets written so far. A segment that was left to be made is as many packets as it becomes."""
        return self.stats().sent

    @property
    def dropped(self) -> int:
        """Packets that were to be written and were not: a reader did not keep up, memory or the disk was full."""
        return sum(self.stats().drops.values())

    @property
    def running(self) -> bool:
        """Whether packets are, or will be, written."""
        return self.file.name in self.net and self.stats().state != "ended"

    @property
    def why(self) -> str | None:
        """Why it has ended by itself, ``None`` if it has not."""
        return self.stats().last_error

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until it has ended; whether that happened within the time given."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while self.running and self.net.running:
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)
        return True

    def stop(self) -> None:
        """Closes the file and joins again what was apart; nobody else loses a packet. Again does nothing."""
        self.stats()
        self.net._end_capture(self)  # noqa: SLF001 - a part of the network
        self.opened()

    def opened(self) -> None:
        """Said by the network when what is written to is open there, or will not be any more."""
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> Self:
        """The capture."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Stops it."""
        self.stop()

    def __repr__(self) -> str:
        """What is written where."""
        return f"<capture to {self.file.spec.where!r}: {self.file.state}>"


class ColumnsCapture(Capture):
    """A capture into memory, to be read as packets with columns. What was captured can be read after its end too."""

    def __init__(
        self, net: Net, file: PortNode, places: Sequence[str], tees: Sequence[Function], recorder: _virtnet.Recorder
    ) -> None:
        """Made by the network."""
        super().__init__(net, file, places, tees, None)
        self._recorder = recorder

    def read(self, timeout_s: float | None = 0.0) -> Burst:
        """All packets since the last time, as one burst.

        ``columns.time_ns`` says when each passed, ``columns.direction`` which way (1: inbound, 2: outbound), and
        ``columns.place`` where, as a position in ``places``, which the burst has too.

        Args:
            timeout_s: seconds to wait for the first one; ``None`` waits as long as the capture goes on.

        Example:
            >>> import virtnet as vn
            >>> with vn.Net() as net:
            ...     vm1, vm2 = net.memory("vm1"), net.memory("vm2")
            ...     _ = vm1 >> vm2
            ...     with net.capture(vm1) as capture:
            ...         _ = vm1.end.tx([bytes(60), bytes(1500)])
            ...         len(vm2.end.rx(timeout_s=5)) and capture.read(timeout_s=5).columns.length
            View(array([  60, 1500], dtype=uint32))
        """
        from virtnet.burst import Burst

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._recorder.is_empty() and not self._recorder.is_over() and self.net.running:
            if deadline is not None and time.monotonic() >= deadline:
                break
            time.sleep(LOOK_S)
        return Burst._recorded(self._take(), self.places)  # noqa: SLF001 - a constructor of it

    def _take(self) -> tuple[bytearray, bytes, bytes, bytearray, bytes, bytes, bytes]:
        """All that has come since the last time, as it travels to other processes."""
        return self._recorder.take()


@dataclass(frozen=True)
class PlannedPlace:
    """A place of a capture in the description of a network: a tee that stands in a cable.

    Attributes:
        ends: the ends of the cable. What comes from the first is inbound.
    """

    ends: tuple[str, str]
    tee: PlannedNode

    def follow(self, plans: Plans) -> PlannedPlace | None:
        """The same in another description: at the same cable, or at the only one that its first end has now."""
        first, second = self.ends
        others = plans.cables_of(first)
        if second in others:
            return self
        return replace(self, ends=(first, others[0])) if len(others) == 1 else None


@dataclass(frozen=True)
class PlannedCapture:
    """A capture in the description of a network: a port, and the places that it takes copies from."""

    handle: Capture
    file: PlannedNode
    places: tuple[PlannedPlace, ...]

    def follow(self, plans: Plans) -> PlannedCapture | None:
        """The same in another description, without the places that are gone; it ends with the last one."""
        places = tuple(filter(None, (place.follow(plans) for place in self.places)))
        return replace(self, places=places) if places else None


def check_room(snap: int, memory: int) -> None:
    """Checks the limits of a capture into memory.

    Raises:
        ConfigError: they make no sense.
    """
    for name, value, low, high in (("snap", snap, 14, 1 << 20), ("memory", memory, 1 << 12, 1 << 31)):
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{name} is a number of bytes from {low} to {high}, found {value!r}")
