"""A ``dpdk-testpmd`` process that a program drives: start, command, read, end.

Testpmd is DPDK's own test application. With ``net_virtio_user`` ports it plays the driver, that is a guest without a
guest; with ``net_vhost`` ports it is DPDK's vhost back-end. The benchmark uses it as both, the peer tests mostly as
the driver.

Nothing here waits for a fixed time: a command returns when the prompt is back, and whoever needs a socket or a link
waits for that, up to a limit. All output goes to a log file as well, so that a failed run can be read afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from io import FileIO

PROMPT = "testpmd> "

#: Packet buffers of a measured process; by itself it takes ten times as many.
MBUFS = 16_384

#: A busy-polling process must not outlive the program that started it.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")

_process_number = itertools.count()


def program() -> str | None:
    """Where testpmd is: ``$TESTPMD``, or the distribution's name on the path, or ``None``."""
    return shutil.which(os.environ.get("TESTPMD", "dpdk-testpmd"))


def version() -> str:
    """What testpmd calls itself, as in ``DPDK 22.11.11``."""
    if (executable := program()) is None:
        return "unknown"
    # It tells only on the way to a start, so it is given no memory to start with.
    words = [executable, "-v", "--no-huge", "--no-shconf", "--no-pci", "--no-telemetry", "-m", "64", "--", "--help"]
    with tempfile.TemporaryDirectory() as directory:
        answer = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"RUNTIME_DIRECTORY": directory},
        )
    found = re.search(r"RTE Version: '(.*)'", answer.stdout + answer.stderr)
    return found[1] if found else "unknown"


class TestpmdError(Exception):
    """Testpmd did not do what it was asked; the message ends with the last lines it printed."""

    __test__ = False  # pytest: not a test class


@dataclass(frozen=True)
class PortStats:
    """The counters of one port since it was opened. ``rx_pps`` and ``tx_pps`` are since the last reading."""

    rx_packets: int
    tx_packets: int
    rx_missed: int
    rx_errors: int
    rx_nombuf: int
    tx_errors: int
    rx_bytes: int
    tx_bytes: int
    rx_pps: int
    tx_pps: int


@dataclass(frozen=True)
class ForwardStats:
    """What the forwarding loop did between start and stop, all ports: a dropped packet found the ring full."""

    rx_packets: int
    tx_packets: int
    tx_dropped: int

    @property
    def refused(self) -> float:
        """The part of the packets to send that found the ring full."""
        return self.tx_dropped / max(1, self.tx_dropped + self.tx_packets)


def virtio_user(
    number: int,
    socket: Path,
    *,
    ring: str = "split",
    in_order: bool = True,
    mergeable: bool = True,
    queue_pairs: int = 1,
    queue_size: int = 256,
    server: bool = False,
    extra: str = "",
) -> str:
    """The ``--vdev`` text of a driver port on a vhost-user socket."""
    options = [
        f"net_virtio_user{number}",
        f"path={socket}",
        f"mac={mac(number)}",
        f"queues={queue_pairs}",
        f"queue_size={queue_size}",
        f"packed_vq={int(ring == 'packed')}",
        f"in_order={int(in_order)}",
        f"mrg_rxbuf={int(mergeable)}",
    ]
    if queue_pairs > 1:
        options.append("cq=1")  # more than one pair needs the control queue, which the driver emulates by itself
    if server:
        options.append("server=1")
    return ",".join(options) + extra


def vhost(number: int, socket: Path, *, queue_pairs: int = 1, client: bool = False, extra: str = "") -> str:
    """The ``--vdev`` text of DPDK's vhost back-end on a socket."""
    return f"net_vhost{number},iface={socket},queues={queue_pairs},client={int(client)}" + extra


def mac(number: int) -> str:
    """The address given to driver port ``number``."""
    return f"02:00:00:00:00:{number + 1:02x}"


class Testpmd:
    """One testpmd process with one forwarding thread.

    The constructor starts the process and returns at once; ``ready()`` waits for the prompt. They are apart because a
    driver port that listens (``server=1``) gets no further until its back-end has connected.
    """

    __test__ = False  # pytest: not a test class

    def __init__(
        self,
        vdevs: Sequence[str],
        *,
        mode: str,
        log: Path,
        core: int | None = None,
        hugepages: bool = False,
        args: Iterable[str] = (),
        eal: Iterable[str] = (),
        mbufs: int | None = MBUFS,
    ) -> None:
        """Start the process with these ports; ``core`` pins it, and without one it may use what we may use."""
        executable = program()
        if executable is None:
            raise TestpmdError("dpdk-testpmd was not found: install the package dpdk-dev or point TESTPMD at it")
        # The forwarding thread and the command line share one core; the latter sleeps unless it is asked something.
        cores = str(core) if core is not None else "(" + ",".join(map(str, sorted(os.sched_getaffinity(0)))) + ")"
        memory = ["--in-memory", "--single-file-segments"] if hugepages else ["--no-huge", "--no-shconf", "-m", "256"]
        prefix = f"virtnet-{os.getpid()}-{next(_process_number)}"
        command = [
            *DIE_WITH_PARENT,
            "stdbuf",
            "-oL",
            executable,
            "-v",
            "--lcores",
            f"0@{cores},1@{cores}",
            "--no-pci",
            "--no-telemetry",
        ]
        command += ["--file-prefix", prefix, *memory, *eal]
        command += [word for vdev in vdevs for word in ("--vdev", vdev)]
        # Nobody else must write into the prompt: no news of links and queues, and what libraries say goes to the log.
        command += ["--", "-i", "--no-mlockall", "--mask-event=intr_lsc", "--mask-event=queue_state"]
        command += [f"--total-num-mbufs={mbufs}"] if mbufs else []
        command += [f"--forward-mode={mode}", *args]
        log.unlink(missing_ok=True)
        self._log = log.open("a")
        self._log.write(" ".join(command) + "\n")
        self._log.flush()
        self._output = ""
        self._ended = False
        self._news = threading.Condition()
        self._mode = mode
        self.forwarding = False
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            start_new_session=True,
            env=os.environ | {"RUNTIME_DIRECTORY": str(log.parent)},  # else it leaves files below /var/run
        )
        self._input = cast("FileIO", self.process.stdin)
        self._chunks = cast("FileIO", self.process.stdout)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def generates(self) -> bool:
        """Whether the forwarding mode makes packets instead of passing them on."""
        return self._mode in {"txonly", "flowgen"}

    @property
    def pid(self) -> int:
        """The process, for accounting and signals."""
        return self.process.pid

    def ready(self, timeout_s: float = 20) -> Self:
        """Wait until testpmd takes commands."""
        self._until_prompt("its prompt", timeout_s)
        return self

    def command(self, line: str, timeout_s: float = 10) -> str:
        """Send one line and return what testpmd printed until it was ready for the next."""
        with self._news:
            self._output = ""
        self._send(line)
        return self._until_prompt(f"an answer to {line!r}", timeout_s)

    def mode(self, mode: str) -> None:
        """Choose what the next ``start`` does with packets: rxonly, txonly, flowgen, io, macswap, ..."""
        if f"Set {mode} packet forwarding mode" not in self.command(f"set fwd {mode}"):
            raise self._error(f"no forwarding mode {mode}")
        self._mode = mode

    def start(self, tx_first: int = 0) -> None:
        """Start forwarding; with ``tx_first``, every port sends that many bursts before."""
        self.command(f"start tx_first {tx_first}" if tx_first else "start", timeout_s=30)
        self.forwarding = True

    def stop(self) -> ForwardStats:
        """Stop forwarding and return what was forwarded since the start."""
        text = self.command("stop").partition("Accumulated forward statistics")[2]
        self.forwarding = False
        found = {name: int(value) for name, value in re.findall(r"([RT]X-\w+): (\d+)", text)}
        if not found:
            raise self._error("no forward statistics after stop")
        return ForwardStats(found["RX-packets"], found["TX-packets"], found["TX-dropped"])

    def stats(self) -> list[PortStats]:
        """The counters of all ports, in port order."""
        text = self.command("show port stats all")
        blocks = re.split(r"NIC statistics for port \d+", text)[1:]
        if not blocks:
            raise self._error("no port statistics")
        return [_port_stats(block) for block in blocks]

    def totals(self) -> tuple[int, int]:
        """Packets received and sent, all ports together."""
        stats = self.stats()
        return sum(port.rx_packets for port in stats), sum(port.tx_packets for port in stats)

    def links_up(self) -> bool:
        """Whether every port sees its other side."""
        rows = re.findall(r"net_\w+\s+(up|down)\s", self.command("show port summary all"))
        return bool(rows) and all(state == "up" for state in rows)

    def drain(self, settle_s: float = 0.1) -> None:
        """Take every packet that still waits in the receive queues, so that counters agree to the last one."""
        if self.forwarding:
            self.stop()
        mode = self._mode
        self.mode("rxonly")
        self.start()
        wait_for(self._quiet(settle_s), "packets to stop coming", timeout_s=5)
        self.stop()
        self.mode(mode)

    def kill(self) -> None:
        """End the process as a crash would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._finish()

    def close(self) -> None:
        """End the process politely, or after a few seconds without ceremony."""
        with contextlib.suppress(OSError, TestpmdError):
            if self.process.poll() is None:
                self._send("stop\nquit")
        try:
            self.process.wait(8)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._finish()

    def __enter__(self) -> Self:
        """The process is ended when the block is left."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def _send(self, line: str) -> None:
        try:
            self._input.write(f"{line}\n".encode())
        except BrokenPipeError:
            raise self._error("the process has ended") from None

    def _quiet(self, settle_s: float) -> Callable[[], bool]:
        last = -1

        def nothing_new() -> bool:
            nonlocal last
            before, last = last, self.totals()[0]
            time.sleep(settle_s)
            return before == last

        return nothing_new

    def _until_prompt(self, what: str, timeout_s: float) -> str:
        with self._news:
            if not self._news.wait_for(lambda: PROMPT in self._output or self._ended, timeout_s):
                raise self._error(f"{what} did not come within {timeout_s:g} s")
            text, prompt, self._output = self._output.partition(PROMPT)
            if not prompt:
                raise self._error(f"the process ended before {what}")
            return text

    def _read(self) -> None:
        while chunk := self._chunks.read(1 << 16):
            text = chunk.decode(errors="replace").replace("\r", "")
            self._log.write(text)
            self._log.flush()
            with self._news:
                self._output += text
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _finish(self) -> None:
        self._reader.join(5)
        for stream in (self._input, self._chunks, self._log):
            stream.close()

    def _error(self, message: str) -> TestpmdError:
        last_lines = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-6:]
        return TestpmdError("\n    ".join([f"testpmd: {message}; log {self._log.name}", *last_lines]))


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 10, *, every_s: float = 0.01) -> float:
    """Wait until a condition holds and return how many seconds that took."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > timeout_s:
            raise TimeoutError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(every_s)
    return time.monotonic() - begin


def is_listening(socket: Path) -> bool:
    """Whether somebody accepts connections on a unix socket; asking leaves no trace at the listener."""
    accepting = 0x10000
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == str(socket) and int(fields[3], 16) & accepting:
            return True
    return False


def _port_stats(block: str) -> PortStats:
    found = {name.lower(): int(value) for name, value in re.findall(r"([RT][Xx]-\w+):\s+(\d+)", block)}
    return PortStats(
        rx_packets=found["rx-packets"],
        tx_packets=found["tx-packets"],
        rx_missed=found["rx-missed"],
        rx_errors=found["rx-errors"],
        rx_nombuf=found["rx-nombuf"],
        tx_errors=found["tx-errors"],
        rx_bytes=found["rx-bytes"],
        tx_bytes=found["tx-bytes"],
        rx_pps=found["rx-pps"],
        tx_pps=found["tx-pps"],
    )
