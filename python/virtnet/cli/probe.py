"""``probe``: what a vhost-user back-end offers, and whether it keeps the rules."""

from __future__ import annotations

import json as json_
from typing import TYPE_CHECKING, Annotated

import typer

from virtnet.cli.options import Json  # noqa: TC001 - Typer reads the annotations

if TYPE_CHECKING:
    from rich.table import Table

    from virtnet.checking import CheckReport, CheckResult
    from virtnet.probing import Offer

__all__ = ["probe"]

STYLES = {"passed": "green", "failed": "red", "not applicable": "dim"}


def probe(
    socket: Annotated[str, typer.Argument(metavar="SOCKET", help="The socket on which the back-end listens.")],
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait for any one answer.")] = 5.0,
    check: Annotated[
        bool, typer.Option("--check", help="Try out what the specifications demand of it; 1 as exit code if it fails.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="CHECK", help="With --check: run this one; can be repeated.")
    ] = None,
    polite: Annotated[
        bool, typer.Option("--polite", help="With --check: send nothing that no correct front-end or driver sends.")
    ] = False,
    json: Json = False,
) -> None:
    """Attach to a vhost-user back-end as a front-end and show what it offers, or check how it behaves."""
    from rich.console import Console

    from virtnet.probing import probe as probe_back_end

    if check:
        _check(socket, timeout, only or [], hostile=not polite, json=json)
        return
    offer = probe_back_end(socket, timeout_s=timeout)
    if json:
        print(json_.dumps({"socket": socket, **offer.to_dict()}))
    else:
        Console().print(_offer_table(socket, offer))


def _offer_table(socket: str, offer: Offer) -> Table:
    from rich.table import Table

    table = Table(title=socket, title_justify="left", show_header=False)
    table.add_row("network device", " ".join(offer.net_features.names()) or "nothing")
    table.add_row("rings, transport", " ".join(offer.ring_features.names()) or "nothing")
    table.add_row("vhost-user", " ".join(offer.protocol.names()) or "no protocol features")
    table.add_row("queue pairs", _told(offer.queue_pairs))
    table.add_row("memory slots", _told(offer.memory_slots))
    table.add_row("device status", "not told" if offer.status is None else f"{offer.status:#x}")
    if offer.config is None:
        table.add_row("configuration", "not told")
    for name, value in offer.config_space.items():
        table.add_row(f"configuration: {name}", str(value))
    return table


def _told(number: int | None) -> str:
    return "not told" if number is None else str(number)


def _check(socket: str, timeout: float, only: list[str], *, hostile: bool, json: bool) -> None:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from virtnet.checking import check_back_end

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(socket, total=None)

        def show(one: CheckResult) -> None:
            bar.update(task, description=f"{socket}: {one}", advance=1)

        report = check_back_end(socket, timeout_s=timeout, only=only, hostile=hostile, each=show)
    if json:
        print(json_.dumps(report.to_dict()))
    else:
        Console().print(_check_table(report))
        print(report.summary())
    if not report.ok:
        raise typer.Exit(1)


def _check_table(report: CheckReport) -> Table:
    from rich.table import Table
    from rich.text import Text

    from virtnet.checking import MARKS

    table = Table("", "check", "expected", "found", "source", title=report.path, title_justify="left")
    for one in report.results:
        style = "yellow" if one.outcome == "failed" and one.level == "should" else STYLES[one.outcome]
        table.add_row(Text(MARKS[one.outcome], style), one.id, one.demand, Text(one.found, style), one.source)
    return table
