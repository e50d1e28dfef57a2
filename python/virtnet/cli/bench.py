"""``bench``: what a path between two ports does to traffic, and the highest rate that it carries."""

from __future__ import annotations

import contextlib
import json as json_
import re
import sys
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from virtnet import __version__
from virtnet.cli.options import Cpu, Json, Poll, PortText, parse_cpus
from virtnet.cli.running import interruptible
from virtnet.errors import ConfigError, VirtnetError
from virtnet.ports import PcapPort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.table import Table

    from virtnet.analysing import Latency
    from virtnet.searching import Throughput, Trial
    from virtnet.streams import Varying

__all__ = ["bench"]


def bench(
    port_a: PortText,
    port_b: Annotated[
        str, typer.Argument(metavar="PORT", help="Where packets arrive; where they came from if not given.")
    ] = "",
    both: Annotated[bool, typer.Option("--both", help="Send in both directions.")] = False,
    size: Annotated[
        str, typer.Option("--size", metavar="BYTES", help="Bytes of frames, without checksum; several as 60,1514.")
    ] = "",
    frame: Annotated[
        list[str] | None,
        typer.Option(
            "--frame",
            metavar="HEX|FILE",
            help="What to send instead of UDP to port 9: a frame in hexadecimal, or the first one of a pcap file; with "
            "--both once more, for the way back.",
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="FIELD=VALUES",
            help="What differs from packet to packet: so many values from the first on, ip_src=10.0.0.1+254, or some "
            "in turn, l4_dst=80,443; once for each field.",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", metavar="PPS", help="Packets a second in each direction; as many as there is room for."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="How long: 10, of each trial of a search 1.")
    ] = None,
    streams: Annotated[int, typer.Option("--streams", help="Streams in each direction, by UDP source port.")] = 1,
    search: Annotated[
        bool, typer.Option("--search", help="Search for the highest rate (RFC 2544, 26.1); begins with --rate.")
    ] = False,
    tries: Annotated[
        int, typer.Option("--tries", min=1, help="How often a search tries a rate before it counts as failed.")
    ] = 1,
    loss: Annotated[float, typer.Option("--loss", help="Share of packets that may be lost in a search.")] = 0.0,
    wait: Annotated[float, typer.Option("--wait", help="Seconds to wait for somebody at the other ends.")] = 10.0,
    cpu: Cpu = "",
    poll: Poll = "adaptive",
    json: Json = False,
) -> None:
    """Send from one port to another, and tell what was lost, reordered and repeated, and how long it took."""
    from virtnet.searching import RFC_SIZES, Path

    for port in (port_a, port_b):
        if port.startswith("memory:"):
            raise ConfigError(f"{port} has its other end in a Python program: the command line has no use for it")
    frames = [_frame(text) for text in frame or ()]
    if frames and size:
        raise ConfigError("a frame has the size that it has: leave out --size, or --frame")
    if frames and len(frames) != 1 + both:
        raise ConfigError(f"--frame is given once for each direction, {1 + both} in all, found {len(frames)}")
    if len({len(one) for one in frames}) > 1:
        raise ConfigError(
            f"frames of both directions are equally long, found {' and '.join(str(len(f)) for f in frames)}"
        )
    sizes = [len(frames[0])] if frames else _sizes(size) if size else list(RFC_SIZES) if search else [60]
    path = Path(
        port_a,
        port_b or None,
        both=both,
        streams=streams,
        frame=(lambda _, direction: frames[direction]) if frames else None,
        vary=dict(map(_varying, vary or ())),
        cpus=parse_cpus(cpu),
        poll=poll,
    )
    trials: list[Trial] = []
    found: list[Throughput] = []
    is_cut_short = False
    with interruptible():
        try:
            with path, _progress(quiet=json) as show:
                path.wait_ready(wait)
                for one in sizes:
                    if search:
                        found.append(
                            path.search(
                                size=one, loss=loss, seconds=seconds or 1.0, max_pps=rate, tries=tries, show=show
                            )
                        )
                    else:
                        trials.append(path.trial(size=one, rate_pps=rate, seconds=seconds or 10.0, show=show))
        except KeyboardInterrupt:
            is_cut_short = True
            trials += [path.cut_short] if path.cut_short and not search else []
    result = (
        {"throughput": [one.to_dict() for one in found]} if search else {"trials": [one.to_dict() for one in trials]}
    )
    _print(result, trials, found, is_cut_short=is_cut_short, as_json=json)


def _print(
    result: dict[str, Any], trials: list[Trial], found: list[Throughput], *, is_cut_short: bool, as_json: bool
) -> None:
    from rich.console import Console

    if as_json:
        print(json_.dumps({"virtnet": __version__, "command": "bench", "cut_short": is_cut_short, **result}))
        return
    console = Console()
    if found:
        console.print(*_throughput_tables(found), sep="\n")
    for trial in trials:
        console.print(*_trial_tables(trial), sep="\n")
    if is_cut_short:
        console.print("cut short by Ctrl-C", style="yellow")


def _frame(text: str) -> bytes:
    """A frame that is given as such, or the first one of a file."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        pass
    if not FilePath(text).is_file():
        raise ConfigError(f"--frame takes a frame in hexadecimal or the name of a pcap file, found {text!r}")
    try:
        with PcapPort(text, mode="read") as port:
            found = [bytes(one) for one in port.rx(1.0)]
    except VirtnetError as error:
        raise ConfigError(f"--frame: {error}") from None
    if not found:
        raise ConfigError(f"--frame: there is no packet in {text}")
    return found[0]


def _varying(text: str) -> tuple[str | tuple[int, int], Varying]:
    """A field, or an offset and a width in bytes, and what is there in turn."""
    from virtnet.streams import Counter

    field, _, values = text.partition("=")
    if not field or not values:
        raise ConfigError(
            f"--vary takes a field and its values, such as ip_src=10.0.0.1+254 or l4_dst=80,443, found {text!r}"
        )
    place = re.fullmatch(r"(\d+):(\d+)", field)
    at = (int(place[1]), int(place[2])) if place else field
    first, _, count = values.rpartition("+")
    if first and count.isdecimal():
        return at, Counter(_value(first), count=int(count))
    return at, [_value(value) for value in values.split(",")]


def _value(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _sizes(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--size takes numbers of bytes joined by commas, such as 60,1514, found {text!r}")
    return [int(part) for part in parts]


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Shows lines in place on a terminal; otherwise says that it runs, and the outcomes."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        print("running; Ctrl-C ends it", file=sys.stderr, flush=True)
        yield lambda line: None if quiet or " came, " not in line else print(line, file=sys.stderr, flush=True)
        return
    with console.status("Ctrl-C ends it") as status:
        yield status.update


def _trial_tables(trial: Trial) -> tuple[str, Table, Table]:
    from virtnet.analysing import SHOWN

    rate = "as fast as possible" if trial.rate_pps is None else f"{trial.rate_pps:,.0f} packets/s each way"
    title = (
        f"{trial.size} bytes, {rate}, {trial.seconds:.1f} s: loss {trial.loss:.4%}, "
        f"{trial.received_pps:,.0f} packets/s and {trial.received_bps / 1e6:,.2f} Mbit/s came"
    )
    counts = _table("stream", "sent", "received", "lost", "reordered", "twice", "foreign")
    times = _table("latency in us", "min", *(f"p{percent}" for percent in SHOWN), "max")
    for report in trial.reports:
        for stream in report.streams:
            numbers = (stream.sent or 0, stream.received, stream.lost, stream.reordered, stream.duplicates)
            counts.add_row(stream.name, *(f"{number:,}" for number in (*numbers, report.foreign)))
            times.add_row(stream.name, *_times(stream.latency))
    return title, counts, times


def _throughput_tables(found: list[Throughput]) -> tuple[str, Table, Table]:
    from virtnet.analysing import SHOWN

    rates = _table("bytes", "packets/s", "Mbit/s", "loss", "trials")
    times = _table("latency in us", "min", *(f"p{percent}" for percent in SHOWN), "max")
    for one in found:
        loss = f"{one.best.loss:.4%}" if one.best else "too much"
        rates.add_row(str(one.size), f"{one.rate_pps:,.0f}", f"{one.rate_bps / 1e6:,.2f}", loss, str(len(one.trials)))
        if one.best:
            times.add_row(f"{one.size} bytes", *_times(one.best.latency))
    return "throughput, each way", rates, times


def _table(first: str, *heads: str) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    table.add_column(first)
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _times(latency: Latency) -> list[str]:
    from virtnet.analysing import SHOWN, microseconds

    return [*map(microseconds, [latency.min, *map(latency.percentile, SHOWN), latency.max])]
