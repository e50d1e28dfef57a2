"""``run`` and ``schema``: a whole network from a file, reloaded while it runs."""

from __future__ import annotations

import json as json_module
import re
import sys
from pathlib import Path  # noqa: TC003 - Typer reads the annotations
from typing import Annotated

import typer

from virtnet.cli.options import Json, Seconds  # noqa: TC001 - Typer reads the annotations
from virtnet.cli.running import run as run_net
from virtnet.description import Spec
from virtnet.description import schema as schema_of
from virtnet.errors import ConfigError, VirtnetError
from virtnet.net import Net

__all__ = ["read_spec", "run", "schema"]


def run(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A network in TOML, such as lab.toml.", show_default=False)
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="What `virtnet show NAME` and others find it by; the file's name if not given, none if empty.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Say whether the file is good, and run nothing.")] = False,
    seconds: Seconds = None,
    json: Json = False,
) -> None:
    """Run the network that a file describes; SIGHUP has it read again, and what stayed loses no packet."""
    spec = read_spec(file)
    if check:
        print(f"{file}: {len(spec.ports)} ports, {len(spec.functions)} functions, {len(spec.cables)} cables")
        return
    net = Net.of(spec, name=(_name_of(file) if name is None else name) or None)
    run_net("run", net, seconds=seconds, as_json=json, reload=lambda: _reload(net, file))


def schema() -> None:
    """Print the JSON Schema of the files that `run` takes."""
    print(json_module.dumps(schema_of(), indent=2))


def _name_of(file: Path) -> str:
    """What a network from a file is called, with nothing in it that names do not have."""
    return re.sub("[^A-Za-z0-9_.-]", "_", file.stem).lstrip(".-")[:64]


def read_spec(file: Path) -> Spec:
    """What a file describes, which has to make sense without a Python program around it."""
    spec = Spec.read(file)
    for name, port in spec.ports.items():
        if port.kind == "memory":
            raise ConfigError(f"{file}: ports.{name}: its other end is in a Python program: a file has no use for it")
    return spec


def _reload(net: Net, file: Path) -> None:
    """A file that does not fit, or a port that cannot be opened, leaves everything as it was."""
    try:
        plan = net.apply(read_spec(file))
    except VirtnetError as error:
        print(f"not reloaded: {error}", file=sys.stderr, flush=True)
    else:
        print(f"reloaded:\n{plan}" if plan else "reloaded: nothing changes", file=sys.stderr, flush=True)
