"""The ``virtnet`` command as a process: started, ended with Ctrl-C, its final JSON object read."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from benchmarks.testpmd import DIE_WITH_PARENT

if TYPE_CHECKING:
    from collections.abc import Sequence


def program() -> list[str]:
    """How to start virtnet: ``$VIRTNET``, or the one beside this Python, or the one on the path; empty if none is."""
    if given := os.environ.get("VIRTNET"):
        return shlex.split(given)
    found = shutil.which("virtnet", path=str(Path(sys.executable).parent)) or shutil.which("virtnet")
    return [found] if found else []


class VirtnetError(Exception):
    """The command ended by itself, or said something else than its final object; ends with what it printed."""


class Virtnet:
    """One running ``virtnet`` command with ``--json``."""

    def __init__(self, arguments: Sequence[str], log: Path, *, core: int | None = None) -> None:
        """Start it; with a core, every thread stays there."""
        self._log = log
        pin = ["taskset", "-c", str(core)] if core is not None else []
        self._errors = log.open("w")
        self.process = subprocess.Popen(
            [*DIE_WITH_PARENT, *pin, *program(), *arguments, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process, for accounting and signals."""
        return self.process.pid

    def finish(self, timeout_s: float = 10) -> dict[str, Any]:
        """End it as Ctrl-C would, if it has not ended by itself, and return its final object."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 30) -> dict[str, Any]:
        """Wait until it ends by itself and return its final object."""
        try:
            output, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            threads = self._threads()
            # Python's fault handler writes into the log where it is.
            self.process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.communicate(timeout=5)
            raise self._error(f"did not end within {timeout_s:g} s; {threads}", lines=40) from None
        if self.process.returncode != 0:
            raise self._error(f"ended with status {self.process.returncode}")
        try:
            final: dict[str, Any] = json.loads(output)
        except ValueError:
            raise self._error(f"printed no JSON object but {output[-300:]!r}") from None
        return final

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Self:
        """The process is ended when the block is left."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process if it still runs."""
        if self.process.poll() is None:
            self.kill()
        self._errors.close()

    def _threads(self) -> str:
        """What each thread of the process is doing, as far as the kernel tells."""
        tasks = sorted(Path(f"/proc/{self.process.pid}/task").glob("*"))

        def read(task: Path, name: str) -> str:
            with contextlib.suppress(OSError):
                return (task / name).read_text().strip()
            return "?"

        def state(task: Path) -> str:
            return read(task, "stat").rpartition(")")[2].split()[0]

        return ", ".join(f"{read(task, 'comm')} {state(task)} in {read(task, 'wchan')}" for task in tasks)

    def _error(self, message: str, lines: int = 8) -> VirtnetError:
        last_lines = self._log.read_text(errors="replace").strip().splitlines()[-lines:]
        command = shlex.join(map(str, self.process.args))  # type: ignore[arg-type]
        return VirtnetError("\n    ".join([f"{command}: {message}", *last_lines]))
