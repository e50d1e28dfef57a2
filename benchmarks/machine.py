"""The machine under the measurement: who had which core for how long, huge pages, and what everything is called.

A rate means something only when both forwarding threads had their core to themselves. ``CoreWatch`` measures that
instead of hoping for it: the time a thread ran, from the scheduler, and the time the hypervisor gave the core to
somebody else.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import platform
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import virtnet
from benchmarks import ovs, testpmd

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

#: Two testpmd processes and as many of ours; a process takes about 30 pages.
HUGE_PAGES_NEEDED = 256

#: A line that takes so many times as long, or as short, has another way.
SAME_DISTANCE = 1.6

#: Two runs at once would measure each other.
LOCK = Path(tempfile.gettempdir()) / "virtnet-benchmark.lock"


@dataclass(frozen=True)
class Share:
    """What a process's busiest thread had of its core during a window, and what the hypervisor took from that core."""

    ran: float
    stolen: float


class CoreWatch:
    """Accounts of one process pinned to one core, from now to ``share()``."""

    def __init__(self, pid: int, core: int) -> None:
        """Begin the window."""
        self._pid = pid
        self._core = core
        self._begin = time.monotonic()
        self._ran = _thread_times(pid)
        self._stolen = _stolen_s(core)

    def share(self) -> Share:
        """End the window."""
        elapsed = time.monotonic() - self._begin
        now = _thread_times(self._pid)
        ran = max(value - self._ran.get(thread, 0.0) for thread, value in now.items())
        return Share(ran / elapsed, (_stolen_s(self._core) - self._stolen) / elapsed)


class CoreDistance:
    """How long a cache line takes between the two cores, and whether that is what it was all along.

    Two threads of one core, neighbours and strangers differ by factors of two and five, and a hypervisor moves its
    virtual cores about: rates measured at different distances do not compare.
    """

    def __init__(self, core: int, other: int, *, looks: int = 100) -> None:
        """Look for twenty seconds: what counts is the distance that is there for most of the time."""
        self._cores = core, other
        found = []
        for _ in range(looks):
            found.append(self.measure_ns())
            time.sleep(0.2)
        self.usual_ns = sorted(found)[looks // 2]

    def measure_ns(self, busy: Sequence[int] = ()) -> float:
        """Measure it now, while the processes that are busy on these cores stand still; infinite if others are too."""
        with _standing_still(busy):
            try:
                return virtnet.line_cost_ns(*self._cores)
            except virtnet.PortError:
                return math.inf

    def is_usual(self, found_ns: float) -> bool:
        """Whether the cores were as far apart as they were at first."""
        known = math.isfinite(found_ns)
        return known and self.usual_ns / SAME_DISTANCE <= found_ns <= SAME_DISTANCE * self.usual_ns

    def wait_usual(self, limit_s: float) -> None:
        """Wait until they are, but not longer than the limit."""
        end = time.monotonic() + limit_s
        while not self.is_usual(self.measure_ns()) and time.monotonic() < end:
            time.sleep(0.2)


@contextlib.contextmanager
def _standing_still(pids: Sequence[int]) -> Iterator[None]:
    """Stops processes for the time of a block."""
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # whoever talks to it next will tell
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def prefer(pid: int) -> None:
    """Let a process win against everybody else's jobs on its core, where we may decide that.

    Linux may share a core out among sessions before it looks at processes, so its session is preferred too. The
    processes of a benchmark are sessions of their own.
    """
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("-20")
    with contextlib.suppress(PermissionError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), -20)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other benchmark runs on this machine, and keep others waiting."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def wait_idle(limit_s: float, busy_cores: float = 0.25) -> None:
    """Wait until the machine does almost nothing, but not longer than the limit: shares tell the rest."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        before = _busy_s()
        time.sleep(0.5)
        if (_busy_s() - before) / 0.5 < busy_cores:
            return


@contextlib.contextmanager
def huge_pages() -> Iterator[str]:
    """Reserve the huge pages that are missing for the time of a run, where we may; says what there is in words."""
    count, free = HUGE_PAGES / "nr_hugepages", HUGE_PAGES / "free_hugepages"
    before = None
    try:
        missing = HUGE_PAGES_NEEDED - int(free.read_text())
        if missing > 0:
            old = int(count.read_text())
            count.write_text(str(old + missing))
            before = old
    except OSError:
        pass
    try:
        enough = free.exists() and int(free.read_text()) >= HUGE_PAGES_NEEDED
        yield "2 MiB huge pages" if enough else ""
    finally:
        if before is not None:
            count.write_text(str(before))


def describe() -> dict[str, str]:
    """Names and versions of everything that has a part in the figures."""
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "DPDK": testpmd.version().removeprefix("DPDK "),
        "OVS": ovs.version(),
        "commit": _output(["git", "describe", "--always", "--dirty", "--abbrev=10"]),
    }


def _thread_times(pid: int) -> dict[int, float]:
    times = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            times[int(thread.name)] = int((thread / "schedstat").read_text().split()[0]) / 1e9
    return times


def _cpu_times(name: str) -> list[float]:
    for line in Path("/proc/stat").read_text().splitlines():
        words = line.split()
        if words[0] == name:
            return [int(word) / os.sysconf("SC_CLK_TCK") for word in words[1:]]
    raise ValueError(f"/proc/stat has no line {name}")


def _stolen_s(core: int) -> float:
    return _cpu_times(f"cpu{core}")[7]


def _busy_s() -> float:
    times = _cpu_times("cpu")
    idle, waiting = times[3], times[4]
    return sum(times[:8]) - idle - waiting


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
