"""The command ``virtnet``: networks, ports and looks around, from a shell.

Each command is a module of this package. What a command reports goes to standard output, as tables for people or with
``--json`` as one final JSON object; everything said on the way goes to standard error.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from virtnet import __version__
from virtnet.cli import attached, bench, demo, doctor, file, functions, probe
from virtnet.errors import ConfigError, VirtnetError

__all__ = ["app", "main"]

app = typer.Typer(
    name="virtnet",
    help="Virtual networks: switches, wires, sources and sinks between guests, drivers, interfaces and captures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo.demo)
app.command()(file.run)
app.command("list")(attached.list_)
app.command()(attached.show)
app.command()(attached.stats)
app.command()(attached.apply)
app.command()(attached.rollback)
app.command()(attached.capture)
app.command()(attached.stop)
app.command()(functions.switch)
app.command()(functions.wire)
app.command()(functions.sink)
app.command()(functions.source)
app.command()(functions.echo)
app.command()(bench.bench)
app.command()(probe.probe)
app.command()(file.schema)
app.command()(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        print(f"virtnet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line; mistakes are told in a sentence, with 2 as exit code for the caller's and 1 for others."""
    try:
        app()
    except VirtnetError as error:
        print(f"virtnet: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
