"""What `pip install .` leaves behind: a module that imports and knows what it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import virtnet as vn

ROOT = Path(__file__).parent.parent


def test_one_version_everywhere():
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]
    assert vn.__version__ == workspace["package"]["version"] == metadata.version("virtnet")


def test_build_info_tells_what_runs():
    info = vn.build_info()
    assert info["version"] == vn.__version__
    assert info["profile"] in {"release", "debug"}


def test_a_cache_line_costs_some_nanoseconds_between_two_cpus():
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > 1:
        assert 1 < vn.line_cost_ns(cpus[0], cpus[1]) < 1e6
    with pytest.raises(vn.ConfigError, match="name two CPUs"):
        vn.line_cost_ns(cpus[0], cpus[0])
    with pytest.raises(vn.ConfigError, match="100000"):
        vn.line_cost_ns(cpus[0], 100_000)


def test_everything_public_is_importable_and_sorted():
    assert sorted(vn.__all__) == vn.__all__
    for name in vn.__all__:
        assert getattr(vn, name) is not None


def test_importing_it_loads_only_what_is_asked_for():
    """A command is to answer at once: what is slow to import waits until somebody needs it."""
    program = "import sys, virtnet.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "virtnet.net" in loaded
    slow = {"numpy", "rich.console", "jsonschema", "ctypes.util", "hashlib", "virtnet.stats", "virtnet.checking"}
    assert slow.isdisjoint(loaded)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Nett'"):
        vn.Nett  # noqa: B018
