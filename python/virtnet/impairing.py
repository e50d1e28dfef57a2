"""Cables with faults, and what came of what was asked of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from virtnet.nodes import Function

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


__all__ = ["Impairment", "ImpairmentReport", "LineReport"]

#: A number, or several that take turns.
OverTime: TypeAlias = "float | Sequence[float] | NDArray[Any]"

NS_PER_MS = 1e6


class Impairment(Function):
    """A cable with faults, as :meth:`Net.impair` makes it."""

    def set(self, **options: Any) -> None:
        """Changes what the cable does, from now on: ``cable.set(loss=0.01)``.

        What is on its way keeps its time, what waits for the rate leaves at the new one, and counters go on.

        Raises:
            ConfigError: there is no such option, or the value is out of its range.
        """
        super().set(**plain_options(options))

    def report(self) -> ImpairmentReport:
        """What was asked for, as it stands, and what came of it since the cable was added."""
        detail = self.stats().detail
        lines = {name: LineReport.of(self.spec.options, detail[name]) for name in ("from", "to") if name in detail}
        return ImpairmentReport(lines.get("from"), lines.get("to"))


@dataclass(frozen=True, slots=True)
class LineReport:
    """What was asked for and what came of it in one direction.

    ``delay_ms`` and the other times are dictionaries of ``min``, ``mean``, ``p50``, ``p90``, ``p99``, ``p999``,
    ``p9999`` and ``max``, in milliseconds; values are known to about 3 %.

    Attributes:
        asked: the options of the cable.
        counts: packets by what happened to them: ``received``, ``sent``, ``lost``, ``queue_full``, ``duplicated``,
            ``corrupted``, ``reordered`` (they left behind one that had come later, RFC 4737) and ``held`` (they wait).
        loss: share of packets that were lost.
        rate_bps: bits of frames a second from the first packet that left to the last; 0 if there were no two.
        rate_pps: packets a second, likewise.
        asked_delay_ms: the delays that were drawn.
        delay_ms: the delays that packets had, behind the buffer.
        late_ms: how much later than drawn a packet left: what the host adds.
        queued_ms: how long packets waited in the buffer for the rate.
    """

    asked: Mapping[str, Any]
    counts: Mapping[str, int]
    loss: float
    rate_bps: float
    rate_pps: float
    asked_delay_ms: Mapping[str, float]
    delay_ms: Mapping[str, float]
    late_ms: Mapping[str, float]
    queued_ms: Mapping[str, float]

    @classmethod
    def of(cls, asked: Mapping[str, Any], found: Mapping[str, Any]) -> LineReport:
        """Made of the options of a cable and what it has counted."""

        def times(name: str) -> dict[str, float]:
            return {key: value / NS_PER_MS for key, value in found[name].items()}

        names = ("received", "sent", "lost", "queue_full", "duplicated", "corrupted", "reordered", "held")
        seconds = found["sending_ns"] / 1e9
        bits = (found["sent_bytes"] - found["first_bytes"]) * 8
        return cls(
            asked,
            {name: found[name] for name in names},
            found["lost"] / found["received"] if found["received"] else 0.0,
            bits / seconds if seconds else 0.0,
            (found["sent"] - 1) / seconds if seconds else 0.0,
            times("asked_ns"),
            times("achieved_ns"),
            times("late_ns"),
            times("queued_ns"),
        )

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, what was asked for, what came of it: for a table."""
        received = self.counts["received"] or 1
        rows = [
            (f"delay {key}", f"{self.asked_delay_ms[key]:.3f} ms", f"{self.delay_ms[key]:.3f} ms")
            for key in ("mean", "p50", "p99", "p9999", "max")
        ]
        rows.append(("loss", _percent(self._asked_loss()), _percent(self.loss)))
        for option, name in (("duplicate", "duplicated"), ("corrupt", "corrupted")):
            rows.append((option, _percent(self.asked[option]), _percent(self.counts[name] / received)))
        rows.append(("reordered", "", _percent(self.counts["reordered"] / (self.counts["sent"] or 1))))
        for option, achieved, unit in (
            ("rate_bps", self.rate_bps / 1e6, "Mbit/s"),
            ("rate_pps", self.rate_pps, "packets/s"),
        ):
            if (wanted := _mean(self.asked[option])) is not None:
                scale = 1e6 if option == "rate_bps" else 1.0
                rows.append(("rate", f"{wanted / scale:,.2f} {unit}", f"{achieved:,.2f} {unit}"))
        rows.append(("buffer full", "", _percent(self.counts["queue_full"] / received)))
        return rows

    def _asked_loss(self) -> float:
        """The mean loss that the options come to."""
        passed = 1 - (_mean(self.asked["loss"]) or 0.0)
        if self.asked["gemodel"]:
            to_bad, to_good, bad, good = self.asked["gemodel"]
            share = to_bad / (to_bad + to_good) if to_bad + to_good else 0.0
            passed *= 1 - share * bad - (1 - share) * good
        return 1 - passed


@dataclass(frozen=True, slots=True)
class ImpairmentReport:
    """What was asked of a cable and what came of it; printed, a table.

    Attributes:
        from_a: for packets from the node at its first end; ``None`` if those are not impaired.
        to_a: for packets to that node, likewise.
    """

    from_a: LineReport | None
    to_a: LineReport | None

    def __str__(self) -> str:
        """A table."""
        lines = []
        for title, line in (("from", self.from_a), ("to", self.to_a)):
            if line is not None:
                lines.append(f"{title:<14}{'asked':>22}{'achieved':>22}")
                lines += [f"{name:<14}{asked:>22}{achieved:>22}" for name, asked, achieved in line.rows()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        from virtnet.showing import table

        lines = [(title, line) for title, line in (("from", self.from_a), ("to", self.to_a)) if line is not None]
        return "".join(table([title, "asked", "achieved"], line.rows()) for title, line in lines)


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with arrays as lists of numbers, as a file has them."""
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [float(one) for one in value] if isinstance(value, list | tuple) else value


def _mean(value: Any) -> float | None:
    return sum(value) / len(value) if isinstance(value, list | tuple) else value


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"
