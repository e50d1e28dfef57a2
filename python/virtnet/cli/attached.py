"""Networks of other processes: ``list``, ``show``, ``stats``, ``apply``, ``rollback``, ``capture`` and ``stop``."""

from __future__ import annotations

import contextlib
import json as json_module
import sys
import time
from pathlib import Path  # noqa: TC003 - Typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from virtnet.cli.file import read_spec
from virtnet.cli.options import Seconds  # noqa: TC001 - Typer reads the annotations
from virtnet.cli.running import Meter, interruptible
from virtnet.cli.tables import ports_table, rings_table, totals_line
from virtnet.errors import ConfigError, VirtnetError
from virtnet.nodes import PortNode
from virtnet.remote import AttachedNet, attach, networks

if TYPE_CHECKING:
    from virtnet.capturing import Place

__all__ = ["apply", "capture", "list_", "rollback", "show", "stats", "stop"]

NetName = Annotated[
    str,
    typer.Argument(
        metavar="NET", help="A network that runs: its name (see `virtnet list`), or its socket.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

WATCH_S = 1.0


def list_(json: Json = False) -> None:
    """List this user's networks that run and have a name."""
    found: list[dict[str, Any]] = []
    for name in networks():
        with contextlib.suppress(VirtnetError):  # it may end meanwhile
            net = attach(name, timeout_s=5)
            spec = net.spec
            found.append(
                {
                    "name": name,
                    "pid": net.pid,
                    "ports": len(spec.ports),
                    "functions": len(spec.functions),
                    "directory": net.directory,
                    "socket": str(net.path),
                }
            )
    if json:
        print(json_module.dumps(found))
        return
    for net_found in found:
        print("{name}: process {pid}, {ports} ports, {functions} functions, in {directory}".format(**net_found))


def show(
    net: NetName,
    port: Annotated[
        str | None,
        typer.Argument(metavar="[PORT]", help="Only this port, and what has happened there.", show_default=False),
    ] = None,
    json: Json = False,
    rings: Annotated[
        bool, typer.Option("--rings", help="Only a table of rings: where they stand, who notified whom how often.")
    ] = False,
    toml: Annotated[bool, typer.Option("--toml", help="Print it as the file that `virtnet run` takes.")] = False,
) -> None:
    """Show how a network's ports and their rings stand."""
    from rich.console import Console

    lab = attach(net)
    if toml:
        print(lab.spec.to_toml(), end="")
        return
    nodes = [_port(lab, port)] if port is not None else [node for node in lab if isinstance(node, PortNode)]
    if json:
        about = {"name": lab.name, "pid": lab.pid, "directory": lab.directory, "spec": lab.spec.to_dict()}
        print(json_module.dumps(about | {"ports": {node.name: _told(node) for node in nodes}}))
        return
    if rings:
        console = Console()
        # A table that is read by a program, or written to a file, is as wide as it is.
        console.width = console.width if console.is_terminal else 120
        console.print(rings_table({node.name: node.rings for node in nodes}))
        return
    if port is not None:
        (node,) = nodes
        print(f"{node.name}: {node.spec}\n{node.explain()}")
        print("\n".join(f"  {event}" for event in node.events))
        return
    console = Console()
    console.print(ports_table(lab.stats(), None, title=f"{lab.name}: process {lab.pid}, in {lab.directory}"))
    for node in nodes:
        for ring in node.rings:
            if ring.started or ring.broken:
                console.print(f"{node.name} {ring}", highlight=False)
    for cable in sorted(lab.spec.cables):
        console.print(f"cable {cable[0]} to {cable[1]}", highlight=False)


def stats(
    net: NetName,
    json: Json = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every second, with rates, until Ctrl-C or its end.")
    ] = False,
) -> None:
    """Show what has passed a network's ports, and whether it adds up."""
    from rich.console import Console

    lab = attach(net)
    if watch:
        _watch(lab, as_json=json)
        return
    found = lab.stats()
    if json:
        print(json_module.dumps(found.to_dict()))
        return
    console = Console()
    console.print(ports_table(found, None, title=lab.name))
    console.print(totals_line(found))


def apply(
    net: NetName,
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="What the network is to be: TOML, as for `run`.", show_default=False),
    ],
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be done.")] = False,
) -> None:
    """Make a network what a file says, wholly or not at all; what stays loses no packet."""
    wanted = read_spec(file)
    lab = attach(net)
    print(lab.plan(wanted) if plan else lab.apply(wanted))


def rollback(net: NetName) -> None:
    """Take back the last change that was applied to a network."""
    print(attach(net).rollback())


def capture(
    net: NetName,
    where: Annotated[
        list[str],
        typer.Argument(
            metavar="WHERE... [FILE]",
            help="Places: nodes with one cable, or two nodes joined by a comma (vm1 vm2 sw,fw). A last word that is no "
            "node is a file, a FIFO, or - for standard output, as if there were none: ... vm1 | wireshark -k -i -",
            show_default=False,
        ),
    ],
    chosen: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="TEXT",
            help="Which packets, in the language of tcpdump; once for all places, or once for each.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over a file that exists.")] = False,
    seconds: Seconds = None,
) -> None:
    """Write what passes places of a network to a file, or to somebody who reads it live, until Ctrl-C.

    Packets say which way they were going: from the node (the first of two) into the network is inbound.
    """
    lab = attach(net)
    spec = lab.spec
    nodes = {*spec.ports, *spec.functions}
    is_place = nodes.intersection([where[-1], *where[-1].split(",")])
    words, file = (where, "-") if len(where) == 1 or is_place else (where[:-1], where[-1])
    places: list[Place] = [_place(word, nodes) for word in words]
    filters = chosen or [""]
    with interruptible():
        taken = lab.capture(
            places if len(places) > 1 else places[0],
            file,
            filter=filters if len(filters) > 1 else filters[0],
            overwrite=overwrite,
        )
        with contextlib.suppress(KeyboardInterrupt):
            into = "" if file == "-" else f" into {file}"
            print(f"capturing at {' '.join(words)}{into}; Ctrl-C ends it", file=sys.stderr, flush=True)
            taken.wait(seconds)
        taken.stop()
    lost = f", {taken.dropped:,} dropped" if taken.dropped else ""
    why = f": {taken.why}" if taken.why else ""
    print(f"{taken.packets:,} packets captured{lost}{why}", file=sys.stderr)


def _place(word: str, nodes: set[str]) -> Place:
    """A node, or two with a comma between unless that is in the name of one."""
    first, comma, second = word.partition(",")
    return (first, second) if comma and word not in nodes else word


def stop(net: NetName) -> None:
    """Stop a network."""
    attach(net).stop()


def _port(lab: AttachedNet, name: str) -> PortNode:
    node = lab[name]
    if not isinstance(node, PortNode):
        raise ConfigError(f"{name!r} is a {node.kind} and no port")
    return node


def _told(node: PortNode) -> dict[str, Any]:
    return {
        "spec": str(node.spec),
        "state": node.state,
        "stats": node.stats().to_dict(),
        "rings": [ring.to_dict() for ring in node.rings],
        "events": [event.to_dict() for event in node.events],
        "explanation": str(node.explain()),
    }


def _watch(lab: AttachedNet, *, as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    meter = Meter()
    console = Console()
    with interruptible(), contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as shown:
        live: Live | None = None
        if not as_json and console.is_terminal:
            live = shown.enter_context(Live(console=console, auto_refresh=False))
        while True:
            try:
                found = lab.stats()
            except VirtnetError:
                if lab.running:
                    raise
                return
            meter.sample(found)
            if as_json:
                print(json_module.dumps(found.to_dict()), flush=True)
            else:
                table = ports_table(found, meter.now, title=f"{lab.name}; Ctrl-C ends it")
                live.update(table, refresh=True) if live else console.print(table)
            time.sleep(WATCH_S)
