"""Tables of ports, and numbers as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtnet.stats import NetStats, PortStats

__all__ = ["drops_text", "ports_table", "rate", "totals_line"]


def ports_table(stats: NetStats, pps: Callable[[str, str], float] | None, *, title: str) -> Table:
    """One row a port: what it is, what passed, what was dropped. ``pps`` tells a port's rate by counter."""
    columns = ["received", "pps", "sent", "pps", "dropped"] if pps else ["received", "sent", "dropped"]
    table = Table(title=title, title_justify="left", title_style="dim")
    for head in ("port", "state", "rings"):
        table.add_column(head)
    for head in columns:
        table.add_column(head, justify="right")
    for name, port in stats.ports.items():
        row: list[Text | str] = [
            name,
            _state(port),
            _rings(port),
            f"{port.received:,}",
            f"{port.sent:,}",
            drops_text(port.drops),
        ]
        if pps:
            row[4:4] = [rate(pps(name, "received"))]
            row[6:6] = [rate(pps(name, "sent"))]
        table.add_row(*row)
    return table


def totals_line(stats: NetStats) -> str:
    """Whether every packet is accounted for, in a sentence."""
    balance = stats.balance()
    came = f"{balance.received:,} received"
    came += f" + {balance.generated:,} generated" if balance.generated else ""
    came += f" + {balance.copied:,} copied" if balance.copied else ""
    went = f"{balance.sent:,} sent"
    went += f" + {balance.consumed:,} taken" if balance.consumed else ""
    went += f" + {balance.dropped:,} dropped ({drops_text(stats.drops)})" if balance.dropped else ""
    return f"{came} = {went}" if balance.exact else f"{came} ≠ {went}: {balance.missing:,} packets unaccounted for"


def rate(value: float) -> str:
    """``12.3 M`` for 12,300,000."""
    for unit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {prefix}"
    return f"{value:.3g} "


def drops_text(drops: Mapping[str, int]) -> str:
    """Drops by reason, most frequent first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in sorted(drops.items(), key=lambda item: -item[1])) or "0"


def _state(port: PortStats) -> Text:
    if port.kind not in {"vhost-user", "virtio-user"}:
        return Text(port.kind, "green")
    return Text("connected", "green") if port.connected else Text("nobody there", "yellow")


def _rings(port: PortStats) -> str:
    return f"{port.ring} x {port.queue_pairs}" if port.ring else ""
