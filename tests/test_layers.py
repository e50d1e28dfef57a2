"""The crates depend on each other only as the layer table says, and `unsafe` lives only where it says."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def layer_table() -> dict[str, dict[str, str]]:
    """The rows of the table in ARCHITECTURE.md, by crate; each a mapping from column to cell."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    found = re.search(r"^\| layer \| crate \|.*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert found, "ARCHITECTURE.md has no table that begins with the columns layer and crate"
    header, _rule, *rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in found[0].splitlines()
    ]
    table = [dict(zip(header, row, strict=True)) for row in rows]
    return {row["crate"].strip("`"): row for row in table}


def allowed(table: dict[str, dict[str, str]], crate: str) -> set[str]:
    """The crates of ours that ``crate`` may use."""
    return {f"virtnet-{name}" for name in re.findall(r"[a-z]+", table[crate]["may use"])}


@pytest.fixture(scope="module")
def packages() -> dict[str, dict[str, object]]:
    """What cargo knows of the crates of this workspace, by name."""
    command = ["cargo", "metadata", "--no-deps", "--format-version=1"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return {package["name"]: package for package in json.loads(done.stdout)["packages"]}


def test_every_crate_has_a_row_and_every_row_a_crate(packages):
    assert set(packages) == set(layer_table())


@pytest.mark.parametrize("crate", layer_table())
def test_a_crate_uses_only_what_its_row_allows(packages, crate):
    table = layer_table()
    ours = [dep for dep in packages[crate]["dependencies"] if dep["name"].startswith("virtnet-")]
    normal = {dep["name"] for dep in ours if dep["kind"] is None}
    for_tests = {dep["name"] for dep in ours if dep["kind"] == "dev"}

    assert normal <= allowed(table, crate)
    assert for_tests <= {"virtnet-testkit"} | allowed(table, crate)
    assert all(dep["kind"] in {None, "dev"} for dep in ours)


@pytest.mark.parametrize("crate", layer_table())
def test_arrows_point_down(crate):
    table = layer_table()
    if table[crate]["layer"] == "dev":
        return
    layer = int(table[crate]["layer"])
    assert all(int(table[used]["layer"]) < layer for used in allowed(table, crate))


@pytest.mark.parametrize("crate", layer_table())
def test_unsafe_lives_where_the_table_says(crate):
    source = ROOT / "rust" / crate / "src"
    cell = layer_table()[crate]["unsafe"]
    assert cell in {"here", "forbid"}
    assert ("#![forbid(unsafe_code)]" in (source / "lib.rs").read_text().splitlines()) == (cell == "forbid")
