"""How costs grow: with ports, stations, memory regions, queue pairs, frame sizes, and packets in a burst.

What depends on two cores is measured as the cells are, beside the peer where it can do the same; what is a matter of
one thread by ``cargo bench``. Each curve is drawn into ``curves/`` and stands in the README with what is to be seen.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, cast

from benchmarks import cells, testpmd
from benchmarks.drivers import ROOT
from benchmarks.ours import Virtnet
from benchmarks.run import FAILURES, LONGEST_RUN_S, SIDES, Counts, OurBackend, account, measure
from benchmarks.testpmd import DIE_WITH_PARENT, wait_for

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.cells import Cell
    from benchmarks.run import Bench

RUNS = 3
TRIES = 12

#: Points of a curve by the name of the series they belong to.
Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        name: what it is called in files and on the command line.
        title: what it shows.
        x: what the abscissa is; it is drawn logarithmically.
        y: what the ordinate is.
        remark: what is to be seen in it, and why its knee is where it is.
        points: how its points are found.
    """

    name: str
    title: str
    x: str
    y: str
    remark: str
    points: Callable[[Bench], Series]


def idle_ports(bench: Bench) -> Series:
    """The rate between two ports of a switch, with further ones attached at which nothing happens."""
    cell = cells.select(["switch-2 split 64 virtnet"])[0]
    points = []
    for ports in (2, 4, 8, 16, 32, 64, 128, 256):
        side = f"crowded-{ports}"
        SIDES[side] = functools.partial(CrowdedBackend, idle=ports - 2)  # type: ignore[assignment]
        points.append((float(ports), _rate(cell, side, bench)))
        del SIDES[side]
    return {"virtnet": points}


def frame_sizes(bench: Bench) -> Series:
    """The bits between two ports of a wire, by the length of frames."""
    series: Series = {"virtnet": [], "DPDK": []}
    cell = cells.select(["vm-to-vm split 64 virtnet"])[0]
    for size in (64, 128, 192, 256, 512, 1024, 1518, 4096, 9000, 65_000):
        for name, side in (("virtnet", "ours"), ("DPDK", "peer")):
            rate = _rate(replace(cell, size=size), side, bench)
            series[name].append((float(size), rate * size * 8 / 1e3))
    return series


def _rate(cell: Cell, side: str, bench: Bench) -> float:
    """Median of some clean runs, in Mpps."""
    rates: list[float] = []
    for _ in range(TRIES):
        bench.distance.wait_usual(20)
        try:
            run = measure(cell, side, bench)
        except FAILURES as error:
            print(f"  {cell} {side}: {error}", file=sys.stderr)
            continue
        if run.failed:
            print(f"  {cell} {side}: {run.failed}", file=sys.stderr)
        if run.clean:
            rates.append(run.pps / 1e6)
        if len(rates) == RUNS:
            break
    if not rates:
        raise RuntimeError(f"{cell} {side}: no clean run in {TRIES}")
    return statistics.median(rates)


class CrowdedBackend(OurBackend):
    """A switch with further ports, each with a driver that is silent. It may let them doze, so it polls adaptively."""

    def __init__(
        self, cell: Cell, sockets: list[Path], bench: Bench, log: Path, stack: contextlib.ExitStack, *, idle: int
    ) -> None:
        """Start it, attach the silent ones, and wait until all are there."""
        del cell
        further = [sockets[0].with_name(f"idle{number}.sock") for number in range(idle)]
        ports = [f"vhost-user:{socket}" for socket in (*sockets, *further)]
        limits = ["--cpu", str(bench.back_core), "--seconds", str(LONGEST_RUN_S)]
        self._process = stack.enter_context(Virtnet(["switch", *ports, *limits], log, core=bench.back_core))
        self.pid = self._process.pid
        wait_for(lambda: all(map(testpmd.is_listening, (*sockets, *further))), "virtnet to listen", timeout_s=30)
        if further:
            silent = subprocess.Popen(
                [*DIE_WITH_PARENT, sys.executable, "-c", SILENT, *map(str, further)],
                stdout=subprocess.PIPE,
                stdin=subprocess.PIPE,
                cwd=ROOT,
            )
            stack.callback(silent.wait)
            stack.callback(silent.kill)
            cast("IO[bytes]", silent.stdout).readline()

    def finish(self) -> Counts:
        """End it, and read what passed its two busy ports: the first packets were flooded to the others as well."""
        final = self._process.finish()
        account(final)
        busy = list(final["ports"].values())[:2]
        received, sent = (sum(port[counter] for port in busy) for counter in ("received", "sent"))
        return Counts(received, sent, received - sent)


SILENT = """
import sys
import virtnet as vn
with vn.Net(poll="interrupt") as net:
    ports = [net.virtio_user(socket, queue_size=64) for socket in sys.argv[1:]]
    if all(port.wait_connected(30) for port in ports):
        print("attached", flush=True)
    sys.stdin.read()
"""


def bench_program(package: str, curve: str, bench: Bench) -> Series:
    """The points of a curve that a bench of one of the crates prints."""
    env = {**os.environ, "CURVE": curve, "CORES": f"{bench.back_core},{bench.front_core}"}
    command = ["cargo", "bench", "--locked", "--quiet", "--package", package, "--benches"]
    output = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    series: Series = {}
    for line in output.splitlines():
        if line.startswith("{"):
            point = json.loads(line)
            if point["curve"] == curve:
                series.setdefault(point["series"], []).append((point["x"], point["y"]))
    return series


CURVES = (
    Curve(
        "ports",
        "Two busy ports beside idle ones",
        "ports attached to a switch",
        "Mpps between two of them",
        "Idle ports doze: they are asked to notify, and a look whether any has costs the same for all of them "
        "together.",
        idle_ports,
    ),
    Curve(
        "macs",
        "Stations of a switch",
        "stations known, each sending to another",
        "ns a packet for switching",
        "The table has 32 bytes a station. Knees are where it outgrows a cache: the first level (48 KiB, 1 500 "
        "stations) and the second (2 MiB, 65 000); beyond 2^19 stations the misses of a burst are fetched together.",
        functools.partial(bench_program, "virtnet-engine", "macs"),
    ),
    Curve(
        "regions",
        "Memory regions of a front-end",
        "regions",
        "ns to find an address",
        "Buffers that follow each other are mostly in one region, which is tried first. Otherwise it is a binary "
        "search: a step for each doubling.",
        functools.partial(bench_program, "virtnet-virtio", "regions"),
    ),
    Curve(
        "pairs",
        "Queue pairs on one and two workers",
        "queue pairs of each of two ports",
        "Mpps over a wire between them",
        "Drivers and devices of a queue pair share a worker here. Two workers do twice the work of one as soon as "
        "each has a pair of its own. With one pair a port every packet crosses from one worker to the other, "
        "which costs a copy and a few lines. One worker with eight pairs goes round in 16 MiB of buffers, more "
        "than its near caches hold.",
        functools.partial(bench_program, "virtnet-testkit", "pairs"),
    ),
    Curve(
        "sizes",
        "Frame sizes from guest to guest",
        "bytes of a frame",
        "Gbit/s over a wire",
        "The longer a frame, the more its bytes decide: DPDK copies them twice. Frames of more than 2 KiB take "
        "several of our driver's buffers, which it fills one frame after the other without fetching them ahead, "
        "and which it writes anew each time.",
        frame_sizes,
    ),
    Curve(
        "burst",
        "Packets in a burst",
        "packets moved at once",
        "ns a packet, all four stages",
        "What is done once a burst (looking for work, publishing, fetching ahead) is spread over its packets: "
        "eight bring most of the gain, sixty-four the rest. One thread plays both sides, so no line crosses.",
        functools.partial(bench_program, "virtnet-virtio", "burst"),
    ),
    Curve(
        "lines",
        "Cache lines from core to core",
        "lines an item",
        "ns an item",
        "What the hardware takes for moving lines and nothing else, many at once: the limit in the tables above. "
        "Beyond four lines an item the ring no longer fits the first-level cache.",
        functools.partial(bench_program, "virtnet-sys", "lines"),
    ),
)
