"""Runs a network for a command: watches it, shows it, reports at the end."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from virtnet import __version__
from virtnet.cli.tables import ports_table, totals_line
from virtnet.nodes import PortNode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from virtnet.net import Net
    from virtnet.stats import NetStats

__all__ = ["Meter", "interruptible", "run"]

SAMPLE_S = 0.25

#: Where nobody watches and nothing moves, less often: looking wakes every thread.
IDLE_SAMPLE_S = 4.0

#: A full ring of the slowest driver is read in less.
SETTLE_S = 0.1

#: What both ends of a port agree on when they meet.
AGREED = ("features", "protocol_features", "ring", "queue_pairs")


@dataclass
class _Slope:
    """How fast a counter grew, between the first and the last time it did."""

    #: The last time before it first grew, and from when on it is known to have grown.
    still: tuple[float, int] = (0.0, 0)
    began: tuple[float, int] | None = None
    ended: tuple[float, int] | None = None
    last: tuple[float, int] = (0.0, 0)
    now: float = 0.0

    def sample(self, at: float, value: int) -> None:
        before_at, before = self.last
        if value > before and before_at:
            if self.began is None:
                # After a long pause nobody knows when it began, only that it has: it counts from here.
                is_pause = at - before_at > 2 * SAMPLE_S
                self.still, self.began = self.last, (at, value) if is_pause else self.last
            self.ended = (at, value)
        self.now = (value - before) / (at - before_at) if before_at and at > before_at else 0.0
        self.last = (at, value)

    @property
    def mean(self) -> float:
        if self.began is None or self.ended is None:
            return 0.0
        since = self.began if self.began != self.ended else self.still
        return (self.ended[1] - since[1]) / (self.ended[0] - since[0])


@dataclass
class Meter:
    """Turns snapshots into rates, by port and direction, and remembers what was agreed with whoever was there."""

    slopes: dict[tuple[str, str], _Slope] = field(default_factory=dict)
    agreed: dict[str, dict[str, Any]] = field(default_factory=dict)
    passed: int = 0

    def sample(self, stats: NetStats) -> int:
        """Takes a snapshot of now; how many packets have passed since the last one."""
        at = time.monotonic()
        before = self.passed
        self.passed = sum(port.received + port.sent for port in stats.ports.values())
        for name, port in stats.ports.items():
            if port.ring is not None:
                self.agreed[name] = {word: getattr(port, word) for word in AGREED}
            for counter in ("received", "sent", "received_bytes", "sent_bytes"):
                self.slopes.setdefault((name, counter), _Slope()).sample(at, getattr(port, counter))
        return self.passed - before

    def rest(self) -> None:
        """Notes that nothing has passed since the last snapshot. Many ports cost something to ask how they are."""
        at = time.monotonic()
        for slope in self.slopes.values():
            slope.sample(at, slope.last[1])

    def with_agreed(self, stats: NetStats) -> NetStats:
        """The snapshot, with what was agreed last at ports whose other end has left."""
        ports = {
            name: replace(port, **self.agreed[name]) if port.ring is None and name in self.agreed else port
            for name, port in stats.ports.items()
        }
        return replace(stats, ports=ports)

    def mean(self, port: str, counter: str) -> float:
        """The rate while packets passed, without the time before the first and after the last."""
        return self.slopes.get((port, counter), _Slope()).mean

    def now(self, port: str, counter: str) -> float:
        """The rate between the last two snapshots."""
        return self.slopes.get((port, counter), _Slope()).now


def run(
    command: str,
    net: Net,
    *,
    seconds: float | None,
    as_json: bool,
    events: bool = False,
    reload: Callable[[], None] | None = None,
) -> None:
    """Runs a network until Ctrl-C or for a time, and reports; ``reload`` is called for every SIGHUP."""
    from rich.console import Console

    meter = Meter()
    told: dict[str, int] = {}
    with interruptible(), _hangups(heard=reload is not None) as hangups:
        net.start()
        started = time.monotonic()
        try:
            with contextlib.suppress(KeyboardInterrupt), _shown(net, meter, quiet=as_json) as show:
                deadline = float("inf") if seconds is None else started + seconds
                pause = SAMPLE_S
                while (left := deadline - time.monotonic()) > 0:
                    if _wait(net, min(pause, left), hangups):
                        break
                    if reload and hangups:
                        hangups.clear()
                        reload()
                    if events:
                        _tell_events(net, told)
                    if pause > SAMPLE_S and net._passed() == meter.passed:  # noqa: SLF001 - a part of the network
                        meter.rest()
                        moves = False
                    else:
                        moves = meter.sample(net.stats()) > 0
                    watched = show() or events
                    pause = SAMPLE_S if moves or watched else min(2 * pause, IDLE_SAMPLE_S)
        finally:
            _ignore_interrupts()
            _settle(net)
            net.stop()
            if events:
                _tell_events(net, told)
    meter.sample(net.stats())
    stats = meter.with_agreed(net.stats())
    elapsed = time.monotonic() - started
    if as_json:
        print(json.dumps(report(command, stats, meter, elapsed)))
        return
    console = Console()
    console.print(ports_table(stats, meter.mean, title=f"{command}, {elapsed:.1f} s"))
    for name, port in stats.ports.items():
        if port.last_error:
            console.print(f"{name}: {port.last_error}", style="yellow")
    console.print(totals_line(stats))


def _tell_events(net: Net, told: dict[str, int]) -> None:
    """Says what has happened at each port since the last time."""
    for name in net.stats().ports:
        port = net[name]
        if not isinstance(port, PortNode):
            continue
        for event in port.events:
            if event.number >= told.get(name, 0):
                print(f"{name} {event}", file=sys.stderr, flush=True)
                told[name] = event.number + 1


def _wait(net: Net, seconds: float, hangups: Sequence[int]) -> bool:
    """Waits until the network is stopped, or for a time that a SIGHUP cuts short; whether it is stopped."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not hangups:
        if net.wait(min(left, SAMPLE_S)):
            return True
    return False


@contextlib.contextmanager
def _hangups(*, heard: bool) -> Iterator[list[int]]:
    """In the block SIGHUP, if it is to be heard, makes longer what is given and does nothing else."""
    came: list[int] = []
    if not heard:
        yield came
        return
    before = signal.signal(signal.SIGHUP, lambda number, _frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGHUP, before)


def _settle(net: Net) -> None:
    """Lets sources make no more and what they made arrive: nothing stays behind in a ring that is about to go."""
    made_by = [ends for ends in net.cables if any(net[name].kind == "source" for name in ends)]
    if not made_by or not net.running:
        return
    for a, b in made_by:
        net.unplug(net[a], net[b])
    time.sleep(SETTLE_S)


def report(command: str, stats: NetStats, meter: Meter, seconds: float) -> dict[str, Any]:
    """The final object: what happened at each port, and whether it adds up."""
    ports = {}
    for name, port in stats.ports.items():
        ports[name] = port.to_dict() | {
            "received_pps": round(meter.mean(name, "received"), 1),
            "sent_pps": round(meter.mean(name, "sent"), 1),
            "received_bytes_per_s": round(meter.mean(name, "received_bytes"), 1),
            "sent_bytes_per_s": round(meter.mean(name, "sent_bytes"), 1),
        }
    return {"virtnet": __version__, "command": command, "seconds": round(seconds, 3), **stats.to_dict(), "ports": ports}


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In the block Ctrl-C and a request to end (SIGTERM) raise ``KeyboardInterrupt``, whatever a shell arranged."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _ignore_interrupts() -> None:
    """What is left to do is short and must be done whole."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _shown(net: Net, meter: Meter, *, quiet: bool) -> Iterator[Callable[[], bool]]:
    """A live table on a terminal, otherwise one line that says what runs; gives what shows it, and tells if it does."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        ports = ", ".join(f"{name} {port.kind}" for name, port in net.stats().ports.items())
        print(f"running: {ports}; Ctrl-C ends it", file=sys.stderr, flush=True)
        yield lambda: False
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show() -> bool:
            live.update(ports_table(net.stats(), meter.now, title="Ctrl-C ends it"), refresh=True)
            return True

        show()
        yield show
