"""What has happened in a port's life: who came, what was agreed on, which rings ran, what was refused, why it ended.

::

    for event in port.events:
        print(event)                                # 12:00:01.250 connected: a front-end has come, process 4711
    port.wait_event("ring_started", timeout_s=5)
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, overload

from virtnet.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

__all__ = ["Event", "Events"]

#: The kinds of events, in the order in which they mostly come.
EVENT_KINDS = (
    "nobody",
    "attached",
    "link_up",
    "link_down",
    "connected",
    "offered",
    "features",
    "memory",
    "ring_started",
    "ring_recovered",
    "ring_enabled",
    "running",
    "refused",
    "ring_disabled",
    "ring_broken",
    "ring_stopped",
    "reset",
    "announce",
    "disconnected",
    "removed",
)

#: How often a wait looks.
LOOK_S = 0.005


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened to a port.

    Attributes:
        number: which one it is, counted from 0 from the port's beginning.
        at_ns: when, in nanoseconds of the monotonic clock (:func:`time.monotonic_ns`).
        wall_ns: when, in nanoseconds since 1970 by the system's clock.
        kind: one of :attr:`KINDS`.
        text: a sentence.
        data: values that belong to it, by name: ``pid``, ``features``, ``protocol_features``, ``regions``, ``bytes``,
            ``ring``, ``size``, ``base`` and ``given`` (as in SET_VRING_BASE), ``taken_again``, ``enabled``,
            ``queue_pairs``, ``why``, ``interface``, ``native``, ``zero_copy``, ``queues``.
    """

    #: The kinds there are, in the order in which they mostly come.
    KINDS: ClassVar[tuple[str, ...]] = EVENT_KINDS

    number: int
    at_ns: int
    wall_ns: int
    kind: str
    text: str
    data: dict[str, int | bool | str] = field(default_factory=dict)

    @property
    def time(self) -> datetime:
        """When, by the system's clock and in its time zone."""
        from datetime import datetime

        return datetime.fromtimestamp(self.wall_ns / 1e9).astimezone()

    def __str__(self) -> str:
        """Time, kind and sentence."""
        return f"{self.time:%H:%M:%S}.{self.wall_ns // 1_000_000 % 1000:03} {self.kind}: {self.text}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Events:
    """What has happened to a port, in order: a snapshot, used like a tuple.

    Attributes:
        items: the events; the newest 256 are kept.
        dropped: how many older ones are not there any more.
    """

    items: tuple[Event, ...] = ()
    dropped: int = 0

    def of(self, *kinds: str) -> tuple[Event, ...]:
        """Those of these kinds."""
        return tuple(event for event in self.items if event.kind in kinds)

    def __iter__(self) -> Iterator[Event]:
        """The events in order."""
        return iter(self.items)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.items)

    @overload
    def __getitem__(self, at: int) -> Event: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Event, ...]: ...
    def __getitem__(self, at: int | slice) -> Event | tuple[Event, ...]:
        """The event at a place, or those of a slice."""
        return self.items[at]

    def __str__(self) -> str:
        """A line for each."""
        before = [f"({self.dropped} older ones are not kept)"] if self.dropped else []
        return "\n".join([*before, *map(str, self.items)])

    def _repr_html_(self) -> str:
        """The same as a table for notebooks."""
        from virtnet.showing import table

        rows = [(str(event)[:12], event.kind, event.text) for event in self.items]
        before = f"<p>{self.dropped} older ones are not kept.</p>" if self.dropped else ""
        return f"{before}{table(['time', 'event', 'what happened'], rows)}"


def events_of(read: Callable[[int], tuple[list[dict[str, Any]], int]], first: int = 0) -> Events:
    """A snapshot by what the compiled half tells."""
    found, dropped = read(first)
    return Events(tuple(Event(**one) for one in found), dropped)


def wait_for_event(
    read: Callable[[int], tuple[list[dict[str, Any]], int]], kind: str, timeout_s: float | None, since: int
) -> Event | None:
    """Looks again and again for an event of this kind from number ``since`` on; ``None`` when the time is over."""
    if kind not in EVENT_KINDS:
        raise ConfigError(f"there is no event of the kind {kind!r}; there are {', '.join(EVENT_KINDS)}")
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        late = deadline is not None and time.monotonic() > deadline
        if found := events_of(read, since).of(kind):
            return found[0]
        if late:
            return None
        time.sleep(LOOK_S)
