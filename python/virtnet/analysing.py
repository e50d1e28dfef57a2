"""What an analyser has counted of the streams of generators, as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

__all__ = ["AnalyserReport", "Latency", "StreamReport"]

#: The percentiles that reports show.
SHOWN = (50, 90, 99, 99.9, 99.99)


@dataclass(frozen=True, repr=False)
class Latency:
    """How long packets were on their way, in ns, as a log-linear histogram: a value is known to about 3 %.

    Times are those of workers' breaths: a packet that was sent and arrived within one took no time. All latencies of
    one host are by the same clock (CLOCK_MONOTONIC), whichever process looks at it.

    Attributes:
        count: packets.
        min: the shortest, exactly.
        max: the longest, exactly.
        mean: their mean, exactly; 0 if there are none.
        buckets: those that hold something, in order: smallest and largest value that belongs there, packets in it.
    """

    count: int = 0
    min: int = 0
    max: int = 0
    mean: float = 0.0
    buckets: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(cls, streams: Iterable[Mapping[str, Any]]) -> Latency:
        """The times of all packets of some streams, as an analyser counts them."""
        held: dict[tuple[int, int], int] = {}
        total = 0
        shortest: list[int] = []
        longest = [0]
        for stream in streams:
            if not stream["latency_buckets"]:
                continue
            total += stream["latency_sum_ns"]
            shortest.append(stream["latency_ns"]["min"])
            longest.append(stream["latency_ns"]["max"])
            for low, high, n in stream["latency_buckets"]:
                held[low, high] = held.get((low, high), 0) + n
        count = sum(held.values())
        buckets = tuple((low, high, n) for (low, high), n in sorted(held.items()))
        return cls(count, min(shortest, default=0), max(longest), total / count if count else 0.0, buckets)

    def percentile(self, percent: float) -> int:
        """A time in ns that ``percent`` of 100 packets do not pass by more than a bucket's width; 0 without packets."""
        rank, below = max(1.0, self.count * percent / 100), 0
        for _, high, n in self.buckets:
            below += n
            # A share such as 99.9 % is no binary fraction.
            if below >= rank - 1e-6:
                return min(max(high, self.min), self.max)
        return self.max

    @property
    def lows(self) -> NDArray[Any]:
        """Of the buckets that hold something, the smallest values, ``uint64[n]`` in ns."""
        return self._column(0)

    @property
    def highs(self) -> NDArray[Any]:
        """Their largest values, ``uint64[n]`` in ns."""
        return self._column(1)

    @property
    def counts(self) -> NDArray[Any]:
        """Packets in them, ``uint64[n]``."""
        return self._column(2)

    def _column(self, at: int) -> NDArray[Any]:
        import numpy as np

        return np.array([bucket[at] for bucket in self.buckets], np.uint64)

    def to_dict(self) -> dict[str, float]:
        """``count``, ``min``, ``mean``, ``p50`` to ``p99.99`` and ``max``, for JSON; times in ns."""
        percentiles = {f"p{percent}": self.percentile(percent) for percent in SHOWN}
        return {"count": self.count, "min": self.min, "mean": round(self.mean, 1), **percentiles, "max": self.max}

    def __repr__(self) -> str:
        """Its shape in a line."""
        if not self.count:
            return "<Latency of no packets>"
        shape = ", ".join(f"p{percent} {microseconds(self.percentile(percent))}" for percent in SHOWN)
        return (
            f"<Latency of {self.count} packets in us: min {microseconds(self.min)}, mean {microseconds(self.mean)}, "
            f"{shape}, max {microseconds(self.max)}>"
        )


def microseconds(ns: float) -> str:
    """A time in us with three digits that count."""
    us = ns / 1000
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 1000 else f"{us:,.0f}"  # noqa: PLR2004


@dataclass(frozen=True)
class StreamReport:
    """What became of one stream. All packets that came are ``received``, ``duplicates`` and ``late``.

    Attributes:
        id: the stream's number.
        name: its name, or that of its generator and the number.
        received: packets that came, each counted once.
        received_bytes: bytes of their frames.
        lost: packets that have not come, of those up to the highest number that has, or of all that were sent, where
            that is known.
        reordered: of ``received``, packets that came behind one with a higher number. Source: RFC 4737, 3.3.
        duplicates: packets that had come before.
        late: packets more than 65_536 numbers behind, of which nobody knows whether they had come, or of a time before
            the last reset. Those are lost if they have not come otherwise.
        sent: packets that were sent since counting began, where that is known.
        rate_pps: packets a second from the first that came to the last; 0 if there were no two.
        rate_bps: bits of frames a second, likewise.
        latency: how long packets were on their way.
    """

    id: int
    name: str
    received: int
    received_bytes: int
    lost: int
    reordered: int
    duplicates: int
    late: int
    sent: int | None
    rate_pps: float
    rate_bps: float
    latency: Latency = field(repr=False)

    @property
    def loss(self) -> float:
        """The share of packets that were lost."""
        all_ = self.received + self.lost
        return self.lost / all_ if all_ else 0.0

    @classmethod
    def of(cls, raw: Mapping[str, Any], name: str, sent: int | None) -> StreamReport:
        """Made of what an analyser has counted; ``sent`` packets were sent since the stream began."""
        seconds = (raw["last_ns"] - raw["first_ns"]) / 1e9
        received = raw["received"]
        first = raw["first_number"]
        since = None if sent is None or first is None else max(sent - first, 0)
        return cls(
            raw["id"],
            name,
            received,
            raw["received_bytes"],
            raw["lost"] if since is None else max(since - received, 0),
            raw["reordered"],
            raw["duplicates"],
            raw["late"],
            since,
            (received - 1) / seconds if seconds else 0.0,
            raw["received_bytes"] * (received - 1) / received * 8 / seconds if seconds else 0.0,
            Latency.of([raw]),
        )


@dataclass(frozen=True)
class AnalyserReport:
    """What an analyser has counted since it was added or reset; printed, a table.

    Attributes:
        streams: what became of each stream, in order of their numbers.
        foreign: packets that no generator has made.
        corrupted: packets whose signature is damaged, or whose checksum is wrong where that is looked at. They are
            lost to their streams.
        latency: of all streams together.
    """

    streams: tuple[StreamReport, ...]
    foreign: int
    corrupted: int
    latency: Latency

    @property
    def received(self) -> int:
        """Packets of all streams that came, each counted once."""
        return sum(stream.received for stream in self.streams)

    @property
    def lost(self) -> int:
        """Packets of all streams that were lost."""
        return sum(stream.lost for stream in self.streams)

    @property
    def reordered(self) -> int:
        """Packets of all streams that came behind one with a higher number."""
        return sum(stream.reordered for stream in self.streams)

    @property
    def duplicates(self) -> int:
        """Packets of all streams that came again."""
        return sum(stream.duplicates for stream in self.streams)

    @property
    def late(self) -> int:
        """Packets of all streams that came too late to be told from duplicates."""
        return sum(stream.late for stream in self.streams)

    @property
    def loss(self) -> float:
        """The share of packets that were lost."""
        all_ = self.received + self.lost
        return self.lost / all_ if all_ else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("received", "lost", "reordered", "duplicates", "late")
        streams = [
            {"id": stream.id, "name": stream.name, **{name: getattr(stream, name) for name in names}}
            | {"sent": stream.sent, "rate_pps": stream.rate_pps, "rate_bps": stream.rate_bps}
            | {"latency_ns": stream.latency.to_dict()}
            for stream in self.streams
        ]
        totals = {name: getattr(self, name) for name in names}
        return {
            **totals,
            "foreign": self.foreign,
            "corrupted": self.corrupted,
            "latency_ns": self.latency.to_dict(),
            "streams": streams,
        }

    def _lines(self) -> list[list[str]]:
        """Heads, and a row for each stream."""
        heads = ["stream", "received", "lost", "reordered", "twice", "late", "min us"]
        heads += [f"p{percent}" for percent in SHOWN] + ["max"]
        rows = [(stream.name, stream) for stream in self.streams]
        rows += [("all", self)] if len(rows) != 1 else []  # type: ignore[list-item] # it counts the same things
        lines = [heads]
        for name, one in rows:
            counts = [one.received, one.lost, one.reordered, one.duplicates, one.late]
            percentiles = [one.latency.percentile(percent) for percent in SHOWN]
            times = [one.latency.min, *percentiles, one.latency.max]
            lines.append([name, *map(str, counts), *map(microseconds, times)])
        return lines

    def __str__(self) -> str:
        """A table with a row for each stream; times in us."""
        lines = self._lines()
        widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
        texts = [
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
                ]
            )
            for line in lines
        ]
        return "\n".join([*texts, f"foreign {self.foreign}, corrupted {self.corrupted}"])

    def __repr__(self) -> str:
        """The same, since a prompt is where it is read."""
        return str(self)

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        from virtnet.showing import table

        heads, *rows = self._lines()
        return f"{table(heads, rows)}<p>foreign {self.foreign}, corrupted {self.corrupted}</p>"
