"""Generators and analysers as a program holds them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

from virtnet.errors import StateError
from virtnet.nodes import Function
from virtnet.streams import Stream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtnet.analysing import AnalyserReport

__all__ = ["Analyser", "Generator"]

#: Options of a stream that may be said of all streams of a generator.
ORDERS = ("rate_pps", "rate_bps", "burst", "count")

LOOK_S = 0.005


class Generator(Function):
    """A generator of streams, as :meth:`Net.generator` makes it."""

    def set(self, **options: Any) -> None:
        """Changes streams, or how fast and how many, from now on; counts begin anew, packets' numbers go on.

        Args:
            **options: ``streams``, or of all streams ``rate_pps`` or ``rate_bps`` (``None``: as many as the receiver
                takes), ``burst`` and ``count`` (0: pause).

        Raises:
            ConfigError: there is no such option, or the value is out of its range.
        """
        streams = options.pop("streams", None)
        orders = {name: options.pop(name) for name in ORDERS if name in options}
        tables = stream_tables(streams) if streams is not None else self.spec.options["streams"]
        if orders.get("rate_pps") is not None or orders.get("rate_bps") is not None or "rate_pps" in orders:
            orders = {"rate_pps": None, "rate_bps": None} | orders
        tables = [{key: one for key, one in {**table, **orders}.items() if one is not None} for table in tables]
        super().set(streams=tables, run=self.spec.options["run"] + 1, **options)

    @property
    def sent(self) -> int:
        """Packets it has sent, of all streams."""
        return sum(stream["sent"] for stream in self._counted())

    @property
    def done(self) -> bool:
        """Whether it has sent all packets that its streams have counts for, and none is without."""
        counted = self._counted()
        return bool(counted) and all(stream["left"] == 0 for stream in counted)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until all packets of streams with a count are sent; whether that happened in time.

        Raises:
            StateError: a stream has no count, or the network does not run.
        """
        if any("count" not in table for table in self.spec.options["streams"]):
            raise StateError(f"{self.name!r} has streams without a count, which have no end")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.done:
            if not self.net.running:
                raise StateError(f"{self.name!r} sends nothing: it is {self.state}")
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)
        return True

    def _counted(self) -> list[dict[str, Any]]:
        """What the engine has counted of each stream."""
        return cast("list[dict[str, Any]]", self.stats().detail.get("streams", []))

    def _names(self) -> dict[int, str]:
        """What each of its streams is called, by number."""
        first, tables = self.spec.options["first_id"], self.spec.options["streams"]
        return {first + k: table.get("name") or f"{self.name}.{k}" for k, table in enumerate(tables)}


class Analyser(Function):
    """An analyser of generators' streams, as :meth:`Net.analyser` makes it."""

    def report(self, *generators: Generator) -> AnalyserReport:
        """What it has counted since it was added or reset.

        Args:
            generators: those whose packets all come here, and whose last packets had the time to: what they have sent
                and has not come is lost, too. Without them losses behind the last packet that came are not known.

        Example:
            >>> import virtnet as vn
            >>> with vn.Net() as net:
            ...     generator, analyser = net.generator(count=1000), net.analyser()
            ...     _ = generator >> analyser
            ...     _ = generator.wait(timeout_s=10)
            ...     report = analyser.report(generator)
            >>> report.received, report.lost, report.streams[0].latency.count
            (1000, 0, 1000)
        """
        from virtnet.analysing import AnalyserReport, Latency, StreamReport

        # First what was sent: what is sent meanwhile is not lost.
        sent = {stream["id"]: stream["sent"] for one in generators for stream in one._counted()}  # noqa: SLF001
        names = {id_: name for node in self.net if isinstance(node, Generator) for id_, name in node._names().items()}  # noqa: SLF001
        detail = self.stats().detail
        found = detail.get("streams", [])
        nothing = dict.fromkeys(("received", "received_bytes", "lost", "reordered", "duplicates", "late"), 0)
        nothing |= {"first_ns": 0, "last_ns": 0, "first_number": 0, "latency_ns": {}, "latency_buckets": []}  # type: ignore[dict-item]
        unheard = sent.keys() - {stream["id"] for stream in found}
        all_ = [*found, *({"id": id_, **nothing} for id_ in unheard if not self.spec.options["resets"])]
        streams = (
            StreamReport.of(stream, names.get(stream["id"], str(stream["id"])), sent.get(stream["id"]))
            for stream in sorted(all_, key=lambda stream: stream["id"])
        )
        return AnalyserReport(tuple(streams), detail.get("foreign", 0), detail.get("corrupted", 0), Latency.of(found))

    def reset(self) -> None:
        """Counts anew, from the next packet of each stream on; what is on its way belongs to the new count."""
        self.set(resets=self.spec.options["resets"] + 1)


def stream_tables(streams: Iterable[Any]) -> list[dict[str, Any]]:
    """Streams as files have them."""
    return [
        dict(one) if isinstance(one, dict) else (one if isinstance(one, Stream) else Stream(one)).to_dict()
        for one in streams
    ]
