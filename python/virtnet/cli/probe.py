"""``probe``: what a vhost-user back-end offers."""

from __future__ import annotations

import json as json_
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from virtnet.cli.options import Json  # noqa: TC001 - Typer reads the annotations
from virtnet.probing import probe as probe_back_end

__all__ = ["probe"]


def probe(
    socket: Annotated[str, typer.Argument(metavar="SOCKET", help="The socket on which the back-end listens.")],
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds to wait for its answers.")] = 5.0,
    json: Json = False,
) -> None:
    """Attach to a vhost-user back-end as a front-end and show what it offers."""
    offer = probe_back_end(socket, timeout_s=timeout)
    if json:
        print(json_.dumps({"socket": socket, **offer.to_dict()}))
        return
    table = Table(title=socket, title_justify="left", show_header=False)
    table.add_row("network device", " ".join(offer.net_features.names()) or "nothing")
    table.add_row("rings, transport", " ".join(offer.ring_features.names()) or "nothing")
    table.add_row("vhost-user", " ".join(offer.protocol.names()) or "no protocol features")
    table.add_row("queue pairs", _told(offer.queue_pairs))
    table.add_row("memory slots", _told(offer.memory_slots))
    Console().print(table)


def _told(number: int | None) -> str:
    return "not told" if number is None else str(number)
