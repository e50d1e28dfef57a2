"""The examples run and show what they say: in docstrings, in the README, in examples/."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import virtnet

ROOT = Path(__file__).parent.parent
MODULES = [name for _, name, _ in pkgutil.walk_packages(virtnet.__path__, "virtnet.") if not name.endswith("__main__")]


@pytest.mark.parametrize("name", ["virtnet", *MODULES])
def test_examples_of(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


@pytest.fixture
def here(sockets, monkeypatch):
    """A working directory where relative sockets are short and nobody's."""
    monkeypatch.chdir(sockets)


@pytest.mark.usefixtures("here", "nothing_left")
def test_the_ten_lines_of_the_readme_run(capsys):
    program = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert "net.serve()" in program
    exec(program.replace("net.serve()", "net.serve(seconds=0.2)"), {})  # noqa: S102 - that is what it is there for
    printed = capsys.readouterr().out
    for argument in printed.split():
        shown = argument.replace(f"{Path.cwd()}/", "")
        assert shown in (ROOT / "README.md").read_text(), argument


def test_the_readme_names_every_option_of_every_port():
    readme = (ROOT / "README.md").read_text()
    for kind in virtnet.spec.KINDS.values():
        if kind.name == "memory":
            continue
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{kind.name}:"))
        assert set(re.findall(r"(\w+)=", row)) == {option.name for option in kind.options}


@pytest.mark.usefixtures("here", "nothing_left")
@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "examples").glob("*.py"))])
def test_the_example_runs(name, monkeypatch, capsys):
    if name == "uplink.py" and (os.geteuid() or subprocess.run(["unshare", "--net", "true"], check=False).returncode):
        pytest.skip("loads a program into the kernel, in a network namespace: needs root")
    if name == "vxlan.py" and (os.geteuid() or subprocess.run(["unshare", "--net", "true"], check=False).returncode):
        pytest.skip("makes interfaces in network namespaces: needs root")
    monkeypatch.setattr(sys, "argv", [name, "1"] if name == "switch.py" else [name])
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # it keeps its fonts open; without it there is a table
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert capsys.readouterr().out


def test_the_notebook_runs(tmp_path):
    command = [Path(sys.executable).with_name("jupyter-execute"), ROOT / "examples" / "tour.ipynb"]
    subprocess.run([*command, f"--output={tmp_path / 'ran.ipynb'}"], check=True, timeout=120)
    cells = json.loads((tmp_path / "ran.ipynb").read_text())["cells"]
    shown = [output for cell in cells for output in cell.get("outputs", ())]
    tables = [output for output in shown if "text/html" in output.get("data", ())]
    assert len(tables) >= 6
    assert not any("stderr" in output.get("name", "") for output in shown)
