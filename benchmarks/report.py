"""From single runs to tables: medians, spread, ratios, and the section of README.md that shows them.

What a cell or a fact was found to be is kept in ``figures.json`` until it is measured again, so that a run of some
cells renews some rows.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import cells, curves

if TYPE_CHECKING:
    from benchmarks.cells import Cell
    from benchmarks.curves import Curve, Series
    from benchmarks.facts import Fact
    from benchmarks.run import Run

README = Path(__file__).with_name("README.md")
FIGURES = Path(__file__).with_name("figures.json")
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

#: What virtnet's driver is to be better by than DPDK's.
DRIVERS_TARGET = 1.15

#: Who generates packets and is refused less often than this has no faster other side: it is the slower one itself.
HARDLY_EVER_REFUSED = 0.02


@dataclass(frozen=True)
class Side:
    """The figures of one side of a cell, in Mpps, from the runs that count."""

    rates: list[float]
    troubles: list[str]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.rates)

    def __str__(self) -> str:
        """Median and range, or why there is none."""
        if not self.rates:
            return f"no clean run ({self.troubles[-1] if self.troubles else 'none made'})"
        return f"{self.median:.2f} ({min(self.rates):.2f}-{max(self.rates):.2f})"


@dataclass(frozen=True)
class Row:
    """One cell with both sides."""

    cell: Cell
    peer: Side
    ours: Side
    slower_side: str

    @property
    def ratio(self) -> float | None:
        """Ours over peer, of medians."""
        return self.ours.median / self.peer.median if self.peer.rates and self.ours.rates else None

    @property
    def is_behind(self) -> bool:
        """Whether the ratio is below what is aimed at."""
        return self.ratio is None or self.ratio < self.cell.target

    def texts(self) -> list[str]:
        """The columns of the table."""
        ratio = f"{self.ratio:.2f}" if self.ratio is not None else "-"
        sides = [str(self.peer), str(self.ours)]
        return [
            self.cell.task.name,
            self.cell.ring,
            str(self.cell.size),
            *sides,
            ratio,
            f"{self.cell.target:.2f}",
            self.slower_side,
        ]


HEADS = ["task", "ring", "bytes", "peer, Mpps", "virtnet, Mpps", "ratio", "target", "slower side"]
RULE = "| --- | --- | --: | --: | --: | --: | --: | --- |"


def row(cell: Cell, runs: list[Run]) -> Row:
    """Sum up all runs of one cell."""
    sides = {}
    for name in ("peer", "ours"):
        made = [run for run in runs if run.side == name]
        sides[name] = Side(
            rates=[run.pps / 1e6 for run in made if run.clean],
            troubles=[run.failed or run.void for run in made if not run.clean],
        )
    return Row(cell, sides["peer"], sides["ours"], _slower_side(cell, runs))


def in_reading_order(rows: list[Row]) -> list[Row]:
    """Put the cells below their target first, worst first; the others stay in table order."""
    behind = [row for row in rows if row.is_behind]
    return sorted(behind, key=_how_far) + [row for row in rows if not row.is_behind]


def for_terminal(rows: list[Row]) -> str:
    """Give the table with aligned columns."""
    lines = [HEADS, *(row.texts() for row in in_reading_order(rows))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


class Figures:
    """All that was measured last, by cell and by fact."""

    def __init__(self, path: Path = FIGURES) -> None:
        """Read what is known."""
        self._path = path
        self._known: dict[str, Any] = {"cells": {}, "facts": {}, "curves": {}}
        if path.exists():
            self._known |= json.loads(path.read_text())

    def renew(self, rows: list[Row], facts: list[Fact], circumstances: dict[str, str]) -> None:
        """Take over what has just been measured."""
        for one in rows:
            sides = {"peer": one.peer.rates, "ours": one.ours.rates, "slower_side": one.slower_side}
            self._known["cells"][str(one.cell)] = {"at": circumstances, **sides}
        for fact in facts:
            self._known["facts"][fact.name] = {"at": circumstances, **asdict(fact)}
        self._write()

    def renew_curves(self, drawn: list[tuple[Curve, Series]], circumstances: dict[str, str]) -> None:
        """The same for curves, which are drawn."""
        if not drawn:
            return
        from benchmarks import plots

        for curve, series in drawn:
            self._known["curves"][curve.name] = {"at": circumstances, "series": series}
            plots.draw(curve, series)
        self._write()

    def _write(self) -> None:
        self._path.write_text(json.dumps(self._known, indent=1) + "\n")

    def for_readme(self) -> str:
        """Give the section that stands between the markers."""
        texts = [self._circumstances()]
        rows = [(cell, self._known["cells"][str(cell)]) for cell in cells.every() if str(cell) in self._known["cells"]]
        for load, title in TITLES.items():
            of_load = [_known_row(cell, known) for cell, known in rows if cell.load == load]
            if of_load:
                texts += [f"### {title}", _summary(of_load), _table(of_load, self._lines())]
        if drivers := _drivers_table(self._known["cells"]):
            texts += ["### virtnet's driver beside DPDK's, on DPDK's back-end", drivers]
        if self._known["facts"]:
            texts += ["### Beside rates", _facts_table(list(self._known["facts"].values()))]
        if self._known["curves"]:
            texts += ["### How costs grow"]
            for curve in curves.CURVES:
                if curve.name in self._known["curves"]:
                    texts += [f"![{curve.title}](curves/{curve.name}.svg)", curve.remark]
        return "\n\n".join(texts)

    def _lines(self) -> list[list[float]]:
        """What items of so many lines cost when they are streamed from core to core, in ns."""
        known = self._known["curves"].get("lines")
        return known["series"]["stream"] if known else []

    def _circumstances(self) -> str:
        """When, where and with what; rows measured at different times are told apart by commit."""
        seen: dict[str, list[str]] = {}
        for kind in ("cells", "facts", "curves"):
            for name, known in self._known[kind].items():
                at = known["at"]
                versions = ", ".join(f"{peer} {at[peer]}" for peer in ("DPDK", "OVS") if peer in at)
                text = (
                    f"{at['date']}, `{at['command']}`: commit {at['commit']}, {versions}, Linux {at['kernel']}, "
                    f"{at['cpu']}, {at['cores']} cores, {at['memory']}; {at['runs']} runs of {at['window']} a side."
                )
                seen.setdefault(text, []).append(name)
        if len(seen) == 1:
            return f"Measured {next(iter(seen))} Median (minimum-maximum)."
        lines = [f"- {text} {len(names)} rows." for text, names in seen.items()]
        return "Median (minimum-maximum). Measured\n\n" + "\n".join(lines)


TITLES = {
    "testpmd": "Load by DPDK's driver",
    "virtnet": "Load by virtnet's driver, the same for both",
}


def publish(section: str, readme: Path = README) -> None:
    """Put the section between the marker lines of the README, instead of the last one."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no marker lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}")


class Journal:
    """A file with one JSON object a line: first the circumstances, then every run as it was, void ones too."""

    def __init__(self, facts: dict[str, str], directory: Path = RESULTS) -> None:
        """Begin a new file."""
        directory.mkdir(exist_ok=True)
        self.path = directory / time.strftime("%Y%m%d-%H%M%S.jsonl")
        self._write(facts)

    def add(self, run: Run) -> None:
        """Add one run."""
        self._write(asdict(run))

    def _write(self, value: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(value) + "\n")


def _how_far(row: Row) -> float:
    return row.ratio / row.cell.target if row.ratio is not None else 0.0


def _known_row(cell: Cell, known: dict[str, Any]) -> Row:
    return Row(cell, Side(known["peer"], []), Side(known["ours"], []), known["slower_side"])


def _summary(rows: list[Row]) -> str:
    ratios = [row.ratio for row in rows if row.ratio]
    mean = math.exp(statistics.fmean(map(math.log, ratios))) if ratios else 0.0
    reached = sum(not row.is_behind for row in rows)
    return f"{reached} of {len(rows)} cells reach their target; geometric mean of all ratios: {mean:.2f}."


def _limit(cell: Cell, lines: list[list[float]]) -> str:
    """What moving the cell's lines between the cores allows, in Mpps."""
    (x0, y0), (x1, y1) = next(
        ((a, b) for a, b in itertools.pairwise(lines) if cell.lines <= b[0]),
        (lines[0], lines[-1]),
    )
    limit = 1e3 / (y0 + (cell.lines - x0) * (y1 - y0) / (x1 - x0))
    return f"{limit:.0f}" if limit >= 1 else f"{limit:.2f}"


def _table(rows: list[Row], lines_ns: list[list[float]]) -> str:
    heads, rule = HEADS, RULE
    if lines_ns:
        heads, rule = [*HEADS, "limit, Mpps"], f"{RULE} --: |"
    lines = ["| " + " | ".join(heads) + " |", rule]
    for each in in_reading_order(rows):
        texts = each.texts() + ([_limit(each.cell, lines_ns)] if lines_ns else [])
        if each.is_behind:
            texts[5] = f"**{texts[5]}**"
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _drivers_table(known: dict[str, Any]) -> str:
    """What DPDK's back-end does under either driver, one direction at a time."""
    lines = ["| direction | ring | bytes | DPDK's, Mpps | virtnet's, Mpps | ratio | target |"]
    lines += ["| --- | --- | --: | --: | --: | --: | --: |"]
    for cell in cells.every():
        dpdk, ours = str(replace(cell, load="testpmd")), str(cell)
        one_way = cell.task.name in {"guest-to-host", "host-to-guest"}
        if not one_way or cell.load != "virtnet" or dpdk not in known or ours not in known:
            continue
        direction = "send" if cell.task.name == "guest-to-host" else "receive"
        sides = [Side(known[name]["peer"], []) for name in (dpdk, ours)]
        if known[dpdk]["at"]["cpu"] != known[ours]["at"]["cpu"]:
            shown = "other processor"
        else:
            ratio = sides[1].median / sides[0].median
            shown = f"{ratio:.2f}" if ratio >= DRIVERS_TARGET else f"**{ratio:.2f}**"
        words = [direction, cell.ring, str(cell.size), *map(str, sides), shown, f"{DRIVERS_TARGET:.2f}"]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _facts_table(facts: list[dict[str, Any]]) -> str:
    lines = ["| what | peer | virtnet | ratio | target |", "| --- | --: | --: | --: | --: |"]
    for fact in sorted(facts, key=lambda fact: fact["met"]):
        ratio = f"{fact['ratio']:.2f}" if fact["ratio"] is not None else ""
        target = fact["target"] if fact["met"] else f"**{fact['target']}**"
        lines.append(f"| {fact['name']} | {fact['peer']} | {fact['ours']} | {ratio} | {target} |")
    return "\n".join(lines)


def _slower_side(cell: Cell, runs: list[Run]) -> str:
    """Say who set the pace, the driver or the back-end (ours, if it was there), where an open loop shows it."""
    made = [run for run in runs if run.clean and run.refused is not None]
    made = [run for run in made if run.side == "ours"] or made
    if not made:
        return ""
    generator, other = ("driver", "back-end") if cell.task.driver_generates else ("back-end", "driver")
    refused = statistics.median(run.refused or 0.0 for run in made)
    return generator if refused < HARDLY_EVER_REFUSED else other
