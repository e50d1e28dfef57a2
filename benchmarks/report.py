"""From single runs to a table: medians, spread, ratios, and the section of README.md that shows them."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.cells import Cell
    from benchmarks.run import Run

README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

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

    def texts(self) -> list[str]:
        """The columns of the table."""
        ratio = f"{self.ratio:.2f}" if self.ratio is not None else "-"
        order = "" if self.cell.in_order else " no in-order"
        ring = self.cell.ring + order
        return [self.cell.task.name, ring, str(self.cell.size), str(self.peer), str(self.ours), ratio, self.slower_side]


HEADS = ["task", "ring", "bytes", "DPDK, Mpps", "virtnet, Mpps", "ratio", "slower side"]


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
    """Put the cells in which we lose first, worst first; the others stay in table order."""
    behind = [row for row in rows if row.ratio is None or row.ratio < 1]
    return sorted(behind, key=lambda row: row.ratio or 0) + [row for row in rows if row not in behind]


def for_terminal(rows: list[Row]) -> str:
    """Give the table with aligned columns."""
    lines = [HEADS, *(row.texts() for row in in_reading_order(rows))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def for_readme(rows: list[Row], facts: dict[str, str]) -> str:
    """Give the section that stands between the markers."""
    lines = [
        f"Measured {facts['date']} with `{facts['command']}`:",
        f"DPDK {facts['dpdk'].removeprefix('DPDK ')}, {facts['virtnet']} (commit {facts['commit']}),",
        f"Linux {facts['kernel']}, {facts['cpu']}, {facts['cores']} cores, {facts['memory']},",
        f"{facts['runs']} runs of {facts['window']} per side and cell. Median (minimum-maximum).",
        "",
        "| " + " | ".join(HEADS) + " |",
        "| --- | --- | --: | --: | --: | --: | --- |",
    ]
    for each in in_reading_order(rows):
        texts = each.texts()
        if each.ratio is not None and each.ratio < 1:
            texts[5] = f"**{texts[5]}**"
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def publish(section: str, readme: Path = README) -> None:
    """Put the section between the marker lines of the README, instead of the last one."""
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme} has no marker lines {BEGIN} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}")


class Journal:
    """A file with one JSON object a line: first the facts, then every run as it was, void ones too."""

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


def _slower_side(cell: Cell, runs: list[Run]) -> str:
    """Say who set the pace, DPDK's driver or the back-end (ours, if it was there), where an open loop shows it."""
    made = [run for run in runs if run.clean and run.refused is not None]
    made = [run for run in made if run.side == "ours"] or made
    if not made:
        return ""
    generator, other = ("driver", "back-end") if cell.task.driver_generates else ("back-end", "driver")
    refused = statistics.median(run.refused or 0.0 for run in made)
    return generator if refused < HARDLY_EVER_REFUSED else other
