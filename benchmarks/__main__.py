"""The command line of the benchmark: which cells, how long, and where the figures go."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import cells, curves, facts, functions, machine, networks, ours, report, testpmd
from benchmarks.run import FAILURES, SIDES, Bench, Run, measure

#: What is no rate of a cell, by what it is about.
FACTS = {"rest": facts, "networks": networks, "functions": functions}

#: A side that fails this often in one cell is left alone, and so is one that is disturbed this often per run wanted.
FAILURES_SUFFERED = 3
DISTURBANCES_SUFFERED = 4


def main() -> int:
    """Measure what was asked for."""
    options = _options()
    if testpmd.program() is None:
        sys.exit("benchmarks: dpdk-testpmd was not found: install the package dpdk-dev or point TESTPMD at it")
    sides = ["peer"] if options.peer_only else ["peer", "ours"]
    if options.self_check:
        SIDES["ours"] = SIDES["peer"]
    elif "ours" in sides and not ours.program():
        sys.exit("benchmarks: virtnet was not found: install it (make develop), set VIRTNET, or say --peer-only")
    try:
        chosen = (
            []
            if options.only == ["none"]
            else cells.select(options.only, rings=options.rings, sizes=options.sizes, loads=options.loads)
        )
    except ValueError as error:
        sys.exit(f"benchmarks: {error}")

    missing = {options.front_core, options.back_core} - os.sched_getaffinity(0)
    if missing or options.front_core == options.back_core:
        usable = sorted(os.sched_getaffinity(0))
        sys.exit(f"benchmarks: --front-core and --back-core must be two of {usable}, the cores this process may use")
    directory = Path(tempfile.mkdtemp(prefix="virtnet-bench-logs-"))
    with machine.alone(), machine.huge_pages() as pages:
        bench = Bench(
            front_core=options.front_core,
            back_core=options.back_core,
            huge_pages=bool(pages),
            warm_up_s=options.warm_up,
            window_s=options.window,
            logs=directory,
            distance=machine.CoreDistance(options.back_core, options.front_core),
            driver_options=options.driver_options,
            eal=options.eal.split(),
        )
        return _measure_all(chosen, sides, bench, options, pages or "ordinary pages")


def _measure_all(
    chosen: list[cells.Cell], sides: list[str], bench: Bench, options: argparse.Namespace, memory: str
) -> int:
    circumstances = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "memory": memory,
        "runs": str(options.runs),
        "window": f"{options.window:g} s",
        **machine.describe(),
    }
    journal = report.Journal(circumstances)
    versions = ", ".join(f"{name} {version}" for name, version in circumstances.items() if name in {"DPDK", "OVS"})
    print(f"{len(chosen)} cells, {circumstances['cpu']}, {versions}, {memory}", flush=True)
    publishes = options.publish or (options.publish is None and "ours" in sides and not options.self_check)
    publishes = publishes and not (options.quick and options.publish is None)
    figures = report.Figures()
    rows, found = [], []
    for cell in chosen:
        runs = _measure_cell(cell, sides, bench, options, journal)
        rows.append(report.row(cell, runs))
        if publishes:
            figures.renew(rows[-1:], [], circumstances)
    if options.facts:
        for fact in itertools.chain(*(FACTS[name].measure_all(bench) for name in options.facts_of)):
            print(f"  {fact.name}: {fact.peer}, {fact.ours}, aimed at {fact.target or '-'}", flush=True)
            found.append(fact)
    drawn = []
    for curve in curves.CURVES if options.curves else []:
        drawn.append((curve, curve.points(bench)))
        print(f"  {curve.title}: {drawn[-1][1]}", flush=True)
    if rows:
        print("\n" + report.for_terminal(rows))
    print(f"\nall runs: {journal.path}\nlogs of the last run: {bench.logs}")
    if publishes:
        figures.renew([], found, circumstances)
        figures.renew_curves(drawn, circumstances)
        report.publish(figures.for_readme())
        print(f"tables: {report.README}")
    complete = all(side.rates for row in rows for side in ([row.peer, row.ours] if len(sides) == 2 else [row.peer]))
    return 0 if complete else 1


def _measure_cell(
    cell: cells.Cell, sides: list[str], bench: Bench, options: argparse.Namespace, journal: report.Journal
) -> list[Run]:
    """Alternate between the sides until each has its clean runs, repeating the void ones."""
    runs: list[Run] = []
    while due := [side for side in sides if _is_due([run for run in runs if run.side == side], options.runs)]:
        for side in due:
            machine.wait_idle(options.idle_wait)
            bench.distance.wait_usual(options.idle_wait)
            run = _attempt(cell, side, bench)
            journal.add(run)
            runs.append(run)
            _tell(run)
    return runs


def _is_due(made: list[Run], wanted: int) -> bool:
    failed = sum(1 for run in made if run.failed)
    disturbed = sum(1 for run in made if run.void and not run.failed)
    clean = len(made) - failed - disturbed
    return clean < wanted and failed < FAILURES_SUFFERED and disturbed < DISTURBANCES_SUFFERED * wanted


def _attempt(cell: cells.Cell, side: str, bench: Bench) -> Run:
    try:
        return measure(cell, side, bench)
    except FAILURES as error:
        return Run(str(cell), side, time.strftime("%Y-%m-%dT%H:%M:%S"), failed=str(error))


def _tell(run: Run) -> None:
    remark = f"  failed: {run.failed}" if run.failed else f"  void: {run.void}" if run.void else ""
    print(f"  {run.cell:28} {run.side:5} {run.pps / 1e6:7.2f} Mpps{remark}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure virtnet side by side with DPDK's vhost back-end."
    )
    add = parser.add_argument
    add(
        "--only",
        action="append",
        default=[],
        metavar="WORDS",
        help="cells with these words, as in 'echo split 64'; or none",
    )
    add("--quick", action="store_true", help="three runs of half a second; the README is left alone")
    add("--runs", type=int, help="clean runs per side and cell (7)")
    add("--window", type=float, help="seconds measured in a run (0.5)")
    add("--warm-up", type=float, default=0.3, help="seconds of traffic before the window (%(default)s)")
    add("--rings", nargs="+", default=cells.USUAL_RINGS, choices=cells.RINGS, help="ring formats")
    add("--sizes", nargs="+", default=cells.SIZES, type=int, help="frame sizes in bytes, without checksum")
    add("--loads", nargs="+", default=cells.LOADS, choices=cells.LOADS, help="whose driver makes the load")
    add("--front-core", type=int, default=1, help="core of the driver (%(default)s)")
    add("--back-core", type=int, default=0, help="core of the back-ends (%(default)s)")
    add("--idle-wait", type=float, default=20, help="seconds to wait for an idle machine (%(default)s)")
    add("--driver-options", default="", help="more virtio-user options, as in ',vectorized=1'")
    add("--eal", default="", help="more EAL options for testpmd, as in '--force-max-simd-bitwidth=512'")
    add("--peer-only", action="store_true", help="measure DPDK alone")
    add("--self-check", action="store_true", help="measure DPDK against itself: how far from 1 is noise")
    add("--facts-of", nargs="+", choices=FACTS, default=list(FACTS), help="which of what is no rate")
    add("--facts", action=argparse.BooleanOptionalAction, help="measure what is no rate too, or not (whole runs do)")
    add("--curves", action=argparse.BooleanOptionalAction, help="measure how costs grow too, or not (whole runs do)")
    add(
        "--publish",
        action=argparse.BooleanOptionalAction,
        help="write the README's rows, or do not (quick runs do not)",
    )
    options = parser.parse_args()
    options.runs = options.runs or (3 if options.quick else 7)
    options.window = options.window or 0.5
    if options.facts is None:
        options.facts = not (options.only or options.quick or options.self_check or options.peer_only)
    if options.curves is None:
        options.curves = not (options.only or options.quick or options.self_check or options.peer_only)
    return options


if __name__ == "__main__":
    sys.exit(main())
