"""Measuring a path: sending through it at a rate, and searching for the highest one that it carries."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from virtnet.analysing import AnalyserReport, Latency, microseconds
from virtnet.errors import ConfigError, StateError
from virtnet.kinds import FUNCTIONS, discard_frame
from virtnet.net import Net
from virtnet.nodes import Function, Node, PortNode
from virtnet.streams import STREAM_FRAME_MAX, STREAM_FRAME_MIN, STREAMS_MAX, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from virtnet.generating import Analyser, Generator
    from virtnet.streams import Varying

__all__ = ["Path", "Throughput", "Trial", "throughput_search"]

#: Frame sizes of RFC 2544, 9.1, for Ethernet, without the four bytes of the check sequence.
RFC_SIZES = (60, 124, 252, 508, 1020, 1276, 1514)

#: How long packets that are on their way have to arrive once the last was sent. RFC 2544, 23, has two seconds.
SETTLE_S = 0.2

#: How much longer than asked for a trial may take because the host was busy, before what is not sent counts as lost.
LATE = 0.25
LOOK_S = 0.005
SHOW_S = 0.25

#: The search ends when what passed and what failed are this near.
RESOLUTION = 0.01
TRIALS_MAX = 40


@dataclass(frozen=True)
class Trial:
    """What came of sending at one rate for a time.

    Attributes:
        size: bytes of the frames, without check sequence.
        rate_pps: packets a second that were asked for, in each direction; ``None``: as many as the path took.
        seconds: how long it was sent.
        asked: packets that should have been sent, in all directions.
        sent: packets that were.
        received: packets that came.
        loss: share of those asked for that did not come.
        received_pps: packets a second that came, in all directions, from the first to the last.
        reports: what each analyser has counted, in order of directions.
        latency: how long packets were on their way, in all directions.
    """

    size: int
    rate_pps: float | None
    seconds: float
    asked: int
    sent: int
    received: int
    loss: float
    received_pps: float
    reports: tuple[AnalyserReport, ...]
    latency: Latency

    @property
    def received_bps(self) -> float:
        """Bits of frames a second that came, without preamble and check sequence."""
        return self.received_pps * self.size * 8

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("size", "rate_pps", "seconds", "asked", "sent", "received", "loss", "received_pps", "received_bps")
        values = {name: getattr(self, name) for name in names}
        reports = [report.to_dict() for report in self.reports]
        return values | {"latency_ns": self.latency.to_dict(), "directions": reports}

    def __str__(self) -> str:
        """In a line."""
        rate = "as fast as possible" if self.rate_pps is None else f"{self.rate_pps:,.0f} packets/s"
        return (
            f"{self.size} bytes, {rate}: {self.received:,} of {self.asked:,} came, loss {self.loss:.4%}, "
            f"p50 {microseconds(self.latency.percentile(50))} us, p99 {microseconds(self.latency.percentile(99))} us"
        )


@dataclass(frozen=True)
class Throughput:
    """The highest rate at which a path loses no more than allowed, for one frame size.

    Attributes:
        size: bytes of the frames, without check sequence.
        rate_pps: packets a second in each direction; 0 if it lost more at every rate that was tried.
        best: the trial at that rate, with its loss and latencies; ``None`` if there was none.
        trials: all trials in order.
    """

    size: int
    rate_pps: float
    best: Trial | None
    trials: tuple[Trial, ...]

    @property
    def rate_bps(self) -> float:
        """Bits of frames a second in each direction, without preamble and check sequence."""
        return self.rate_pps * self.size * 8

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best = None if self.best is None else self.best.to_dict()
        trials = [{"rate_pps": trial.rate_pps, "loss": trial.loss} for trial in self.trials]
        return {"size": self.size, "rate_pps": self.rate_pps, "rate_bps": self.rate_bps, "best": best, "trials": trials}

    def __str__(self) -> str:
        """In a line."""
        if self.best is None:
            return f"{self.size} bytes: it lost too much at every rate that was tried"
        latency = self.best.latency
        return (
            f"{self.size} bytes: {self.rate_pps:,.0f} packets/s, {self.rate_bps / 1e6:,.2f} Mbit/s, loss "
            f"{self.best.loss:.4%}, latency p50 {microseconds(latency.percentile(50))} us, "
            f"p99 {microseconds(latency.percentile(99))} us, max {microseconds(latency.max)} us"
        )


class Path:
    """A path to be measured: from a place to another, or back to the same one.

    The places are nodes of one network with an end free, which may run already, or texts of ports
    (``"virtio-user:vm1.sock"``), for which a network is made. Generators and analysers are plugged in there for each
    trial, and gone at the end of the ``with`` block.

    Args:
        a: where packets are sent.
        b: where they arrive; the same place if not given, for paths that send back what comes, or that have two ends
            and were given as one node, such as a cable with faults.
        both: send from ``b`` to ``a`` as well.
        streams: streams in each direction, with source ports of their own.
        frame: makes a frame of a size in a direction (0: from a to b), instead of a UDP datagram to port 9 (discard)
            between 198.18.0.1 and 198.19.0.1 (RFC 2544, C.2.2).
        vary: what differs from packet to packet of every stream, as :attr:`Stream.vary`.
        cpus: of the network that is made, see :class:`~virtnet.Net`.
        poll: likewise.

    Raises:
        ConfigError: the places make no sense.
    """

    def __init__(
        self,
        a: Node | str,
        b: Node | str | None = None,
        *,
        both: bool = False,
        streams: int = 1,
        frame: Callable[[int, int], bytes] | None = None,
        vary: Mapping[str | tuple[int, int], Varying] | None = None,
        cpus: Sequence[int] = (),
        poll: Literal["adaptive", "busy", "interrupt"] = "adaptive",
    ) -> None:
        """Only notes what is to be measured; nothing is opened."""
        b = a if b is None else b
        if isinstance(a, Node) != isinstance(b, Node):
            raise ConfigError("a path is between two nodes of a network, or between two texts of ports")
        if not 1 <= streams <= STREAMS_MAX:
            raise ConfigError(f"a direction has 1 to {STREAMS_MAX} streams, found {streams}")
        self.streams = streams
        self._frame = frame or _frame
        self._vary = dict(vary or {})
        self._made: Net | None = None
        if isinstance(a, Node) and isinstance(b, Node):
            self.net = a.net
            ends = [a, b] if a != b or _has_two_ends(a) else [a]
        else:
            self.net = self._made = Net(cpus=cpus, poll=poll)
            ends = [self.net.port(str(text)) for text in dict.fromkeys((a, b))]
        if any(end.net is not self.net for end in ends):
            raise ConfigError("both ends of a path are in one network")
        if both and len(ends) == 1:
            raise ConfigError("a path back to the same port has one direction: leave both out")
        self.ends: list[Node] = ends
        self.generators: list[Generator] = []
        self.analysers: list[Analyser] = []
        self._both = both
        #: What came of a trial that Ctrl-C has cut short.
        self.cut_short: Trial | None = None

    def __enter__(self) -> Self:
        """Starts the network if it does not run."""
        if not self.net.running:
            self.net.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Takes out what has measured; a network that was made for it is stopped."""
        if self._made is not None:
            self._made.stop()
            return
        with self.net.change():
            self._unplug()

    def _unplug(self) -> None:
        for node in (*self.generators, *self.analysers):
            if node.name in self.net:
                node.remove()
        self.generators, self.analysers = [], []

    def _plug(self, size: int, rate_pps: float | None, count: int | None) -> None:
        """Plugs in what measures, anew for each trial: numbers begin at 0, and nothing is left of the last one."""
        first, last = self.ends[0], self.ends[-1]
        self.generators = [self._generator(first, size, 0, rate_pps, count)]
        if self._both:
            self.generators.append(self._generator(last, size, 1, rate_pps, count))
        self.analysers = [self.net.analyser() for _ in self.generators]
        if len(self.ends) == 1:
            self.net.cable(self.analysers[0], self.generators[0])
        elif self._both:
            self.net.cable(self.analysers[0], self.generators[1])
            self.net.cable(self.analysers[1], self.generators[0])
        else:
            self.net.cable(last, self.analysers[0])

    def _generator(self, to: Node, size: int, direction: int, rate_pps: float | None, count: int | None) -> Generator:
        return self.net.generator(*self._streams(size, direction), rate_pps=rate_pps, count=count, to=to)

    def _streams(self, size: int, direction: int) -> list[Stream]:
        frame = self._frame(size, direction)
        way = "a to b" if direction == 0 else "b to a"
        names = [f"{way}, {k}" if self.streams > 1 else way for k in range(self.streams)]
        # Ports for people's own use, from 49152 on.
        ports: list[dict[str | tuple[int, int], Varying]] = [
            {"l4_src": 49152 + k} if self._frame is _frame else {} for k in range(self.streams)
        ]
        return [Stream(frame, vary=own | self._vary, name=name) for own, name in zip(ports, names, strict=True)]

    def wait_ready(self, timeout_s: float | None = 10.0) -> None:
        """Waits until somebody is at the other end of each port.

        Raises:
            StateError: nobody came in time.
        """
        for end in self.ends:
            if isinstance(end, PortNode) and not end.wait_connected(timeout_s):
                raise StateError(f"nobody is at the other end of {end.name!r} ({end.spec}): {end.state}")

    def trial(
        self,
        *,
        size: int = 60,
        rate_pps: float | None = None,
        seconds: float = 1.0,
        show: Callable[[str], None] | None = None,
    ) -> Trial:
        """Sends at a rate for a time, waits for what is on its way, and says what came of it.

        Args:
            size: bytes of frames, without check sequence.
            rate_pps: packets a second in each direction, of all streams together; as many as the path takes if not
                given.
            seconds: how long.
            show: is told now and then how it goes.

        Raises:
            ConfigError: a number is out of its range.
            StateError: the network does not run.
        """
        if not STREAM_FRAME_MIN <= size <= STREAM_FRAME_MAX:
            raise ConfigError(f"a frame has {STREAM_FRAME_MIN} to {STREAM_FRAME_MAX} bytes, found {size}")
        if not 0 < seconds < float("inf") or (rate_pps is not None and not 0 < rate_pps < float("inf")):
            raise ConfigError(f"a trial has a rate and seconds above 0, found {rate_pps} and {seconds}")
        each = None if rate_pps is None else rate_pps / self.streams
        count = None if each is None else max(1, round(each * seconds))

        def outcome(asked: int | None) -> Trial:
            """What has come, once all has had its time."""
            for generator in self.generators:
                generator.set(count=0)
            took = time.monotonic() - began
            time.sleep(SETTLE_S)
            sent = sum(generator.sent for generator in self.generators)
            return self._outcome(size, rate_pps, took, sent if asked is None else asked, sent)

        # One change each: what had the same name and went and came within one would be the same.
        with self.net.change():
            self._unplug()
        with self.net.change():
            self._plug(size, each, count)
        began = time.monotonic()
        try:
            for _ in self._moments(began, seconds, counted=count is not None):
                if show:
                    show(f"{size} bytes, {self._progress(began, seconds)}")
        except KeyboardInterrupt:
            if self.net.running:
                self.cut_short = outcome(None)
            raise
        return outcome(None if count is None else count * self.streams * len(self.generators))

    def _outcome(self, size: int, rate_pps: float | None, seconds: float, asked: int, sent: int) -> Trial:
        """What the analysers have counted, which is little to ask when it has come to rest."""
        reports = tuple(
            analyser.report(generator) for analyser, generator in zip(self.analysers, self.generators, strict=True)
        )
        details = [analyser.stats().detail.get("streams", []) for analyser in self.analysers]
        received = sum(report.received for report in reports)
        return Trial(
            size,
            rate_pps,
            seconds,
            asked,
            sent,
            received,
            max(asked - received, 0) / asked if asked else 1.0,
            sum(_rate(streams) for streams in details),
            reports,
            Latency.of(stream for streams in details for stream in streams),
        )

    def _moments(self, began: float, seconds: float, *, counted: bool) -> Iterator[None]:
        """Moments of a trial: until all is sent, or its time is over."""
        shown = 0.0
        longest = seconds * (1 + LATE) + SETTLE_S if counted else seconds
        while (now := time.monotonic()) < began + longest:
            if not self.net.running:
                raise StateError("the network was stopped while it was measured")
            if counted and now > began + seconds * 0.5 and all(generator.done for generator in self.generators):
                return
            if now > shown + SHOW_S:
                shown = now
                yield
            time.sleep(LOOK_S)

    def _progress(self, began: float, seconds: float) -> str:
        passed = min(time.monotonic() - began, seconds)
        received = sum(analyser.report().received for analyser in self.analysers)
        return f"{passed:.1f} of {seconds:g} s, {received:,} came"

    def _tried(
        self,
        *,
        size: int,
        rate_pps: float | None,
        seconds: float,
        loss: float,
        tries: int,
        show: Callable[[str], None] | None,
    ) -> list[Trial]:
        """Trials at a rate: until one passes, or none is left."""
        tried: list[Trial] = []
        while not tried or (len(tried) < tries and tried[-1].loss > loss and rate_pps is not None):
            tried.append(self.trial(size=size, rate_pps=rate_pps, seconds=seconds, show=show))
            if show:
                show(str(tried[-1]))
        return tried

    def search(
        self,
        *,
        size: int = 60,
        loss: float = 0.0,
        seconds: float = 1.0,
        max_pps: float | None = None,
        resolution: float = RESOLUTION,
        tries: int = 1,
        show: Callable[[str], None] | None = None,
    ) -> Throughput:
        """The highest rate at which no more than a share of packets is lost; see :func:`throughput_search`."""
        _check_search(loss, resolution, tries)
        trials: list[Trial] = []

        def try_(rate: float | None) -> Trial:
            tried = self._tried(size=size, rate_pps=rate, seconds=seconds, loss=loss, tries=tries, show=show)
            trials.extend(tried)
            return tried[-1]

        each = 2 if self._both else 1
        low, high, best = 0.0, max_pps or 0.0, None
        if max_pps is None:
            # What can be sent at all, and what comes of it: no more will ever come.
            first = try_(None)
            high = first.sent / each / first.seconds
            rate = first.received_pps / each
        else:
            rate = max_pps
        while len(trials) < TRIALS_MAX and rate >= 1:
            trial = try_(rate)
            if trial.loss <= loss:
                low, best = rate, trial
                if rate >= high:
                    break
            else:
                high = rate
            if high - low <= resolution * high:
                break
            # What came of too much is a good guess, where it lies between; else the middle.
            guess = trial.received_pps / each * (1 - resolution / 2)
            is_between = trial.loss > loss and low < guess < high * (1 - resolution)
            rate = guess if is_between else (low + high) / 2
        return Throughput(size, low, best, tuple(trials))


def throughput_search(
    a: Node | str,
    b: Node | str | None = None,
    *,
    sizes: Sequence[int] = RFC_SIZES,
    loss: float = 0.0,
    seconds: float = 1.0,
    max_pps: float | None = None,
    resolution: float = RESOLUTION,
    tries: int = 1,
    both: bool = False,
    streams: int = 1,
    show: Callable[[str], None] | None = None,
) -> list[Throughput]:
    """Searches for the throughput of a path: the highest rate at which it loses no more than allowed.

    For each frame size rates are tried between the last one that passed and the last one that failed, until the two
    are near. Each trial sends as many packets as its rate makes in its time; what could not be sent because the host
    was busy counts as lost. The latency is that of all packets of the trial at the rate found.

    A buffer on the path hides what is too much for a time: what it holds should be little against what passes in a
    trial. RFC 2544 has trials of 60 s.

    Source:
        RFC 2544, 26.1 (throughput), where ``loss`` is 0, and 26.2 (latency), but for every packet.

    Args:
        a: where packets are sent: a node of a network, or the text of a port.
        b: where they arrive; the same place if not given.
        sizes: bytes of frames, without check sequence; by default those of RFC 2544, 9.1.
        loss: the share of packets that may be lost.
        seconds: how long each trial is.
        max_pps: the rate to begin with; what can be sent at all if not given.
        resolution: how near a rate that passed and one that failed are in the end, as a share of the rate.
        tries: how often a rate is tried before it counts as failed: more than once where the host itself is busy.
        both: send in both directions.
        streams: streams in each direction.
        show: is told now and then how it goes, and the outcome of each trial.

    Raises:
        ConfigError: an argument makes no sense.
        StateError: nobody is at the other end of a port.
        PortError: a port cannot be opened.

    Example:
        >>> import virtnet as vn
        >>> with vn.Net() as net:
        ...     path = net.impair(rate_pps=2000, queue_packets=20)
        ...     found = vn.throughput_search(path, sizes=[60], seconds=0.2, max_pps=10_000, resolution=0.1, tries=3)
        >>> 200 < found[0].rate_pps < 2600
        True
    """
    with Path(a, b, both=both, streams=streams) as path:
        path.wait_ready()
        return [
            path.search(
                size=size,
                loss=loss,
                seconds=seconds,
                max_pps=max_pps,
                resolution=resolution,
                tries=tries,
                show=show,
            )
            for size in sizes
        ]


def _check_search(loss: float, resolution: float, tries: int) -> None:
    if not 0 <= loss < 1:
        raise ConfigError(f"loss is a share from 0 up to 1, found {loss}")
    if not 0 < resolution < 1:
        raise ConfigError(f"resolution is a share between 0 and 1, found {resolution}")
    if tries < 1:
        raise ConfigError(f"tries is a number from 1, found {tries}")


def _has_two_ends(node: Node) -> bool:
    return isinstance(node, Function) and FUNCTIONS[node.kind].cables[0] == 2  # noqa: PLR2004 - in and out


def _rate(streams: list[dict[str, Any]]) -> float:
    """Packets a second of streams together, from the first that came to the last."""
    came = [stream for stream in streams if stream["received"]]
    if not came:
        return 0.0
    ns = max(stream["last_ns"] for stream in came) - min(stream["first_ns"] for stream in came)
    received = sum(stream["received"] for stream in came)
    return (received - 1) * 1e9 / ns if ns else 0.0


def _frame(size: int, direction: int) -> bytes:
    """A UDP datagram from one end of a path to the other."""
    ends = [bytes([0x02, 0, 0, 0, 0, n, 198, 17 + n, 0, 1]) for n in (1, 2)]
    return discard_frame(size, *(ends if direction == 0 else ends[::-1]))
