"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from virtnet.errors import ConfigError

__all__ = ["Cpu", "Events", "Json", "Poll", "PortText", "PortTexts", "Ring", "Seconds", "parse_cpus"]


PortText = Annotated[
    str,
    typer.Argument(
        metavar="PORT", help="KIND:WHERE[,option=value...], such as vhost-user:vm1.sock", show_default=False
    ),
]
PortTexts = Annotated[
    list[str],
    typer.Argument(
        metavar="PORT...", help="KIND:WHERE[,option=value...], such as vhost-user:vm1.sock", show_default=False
    ),
]
Cpu = Annotated[
    str,
    typer.Option("--cpu", metavar="LIST", help="Processors to pin workers to, such as 2 or 2,4-5; one worker each."),
]
Poll = Annotated[
    Literal["adaptive", "busy", "interrupt"],
    typer.Option("--poll", help="What workers do when there is nothing to do."),
]
Seconds = Annotated[
    float | None,
    typer.Option("--seconds", min=0.0, help="How long to run; until Ctrl-C if not given.", show_default=False),
]
Ring = Annotated[Literal["split", "packed"], typer.Option("--ring", help="The format of the rings.")]
Events = Annotated[bool, typer.Option("--events", help="Tell on standard error what happens at each port.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of tables.")]


def parse_cpus(text: str) -> list[int]:
    """Reads ``2,4-5``.

    Raises:
        ConfigError: it is no list of processors.
    """
    cpus: list[int] = []
    for part in text.split(",") if text else []:
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise ConfigError(f"--cpu takes numbers and ranges joined by commas, such as 2,4-5, found {text!r}")
        cpus += range(int(low), int(high or low) + 1)
    if len(set(cpus)) != len(cpus):
        raise ConfigError(f"--cpu names each processor once, found {text!r}")
    return cpus
