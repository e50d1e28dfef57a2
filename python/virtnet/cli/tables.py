"""Tables of ports, and numbers as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rich.table import Table
    from rich.text import Text

    from virtnet.stats import NetStats, PortStats, RingState

__all__ = ["drops_text", "ports_table", "rate", "rings_table", "totals_line"]


def ports_table(stats: NetStats, pps: Callable[[str, str], float] | None, *, title: str) -> Table:
    """One row a port: what it is, what passed, what was dropped. ``pps`` tells a port's rate by counter."""
    from rich.table import Table

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


def rings_table(rings: Mapping[str, Iterable[RingState]]) -> Table:
    """One row a ring, by queue and number of its pair: where it stands, and how often who notified whom."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for head in ("port", "ring", "state", "size"):
        table.add_column(head, no_wrap=True)
    for head in ("avail", "used", "waiting", "bursts", "kicks", "calls", "again"):
        table.add_column(head, justify="right", no_wrap=True)
    for port, of_port in rings.items():
        for ring in of_port:
            counts = (ring.avail, ring.used, ring.waiting, ring.bursts, ring.kicks, ring.calls, ring.taken_again)
            table.add_row(
                port,
                f"{ring.kind} {ring.queue_pair}",
                _ring_state(ring),
                f"{ring.format} {ring.size}" if ring.started else "",
                *("" if count is None else str(count) for count in counts),
            )
    return table


def _ring_state(ring: RingState) -> Text:
    from rich.text import Text

    if ring.broken is not None:
        return Text("given up", "red")
    if not ring.started:
        return Text("stopped", "yellow")
    return Text("runs", "green") if ring.enabled else Text("disabled", "yellow")


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
    from rich.text import Text

    if port.kind not in {"vhost-user", "virtio-user"}:
        is_well = port.kind != "pcap" or port.state in {None, "writing"}
        return Text(port.kind, "green") if is_well else Text(f"{port.kind}: {port.state}", "yellow")
    return Text("connected", "green") if port.connected else Text("nobody there", "yellow")


def _rings(port: PortStats) -> str:
    return f"{port.ring} x {port.queue_pairs}" if port.ring else ""
