"""The back-end the guests attach to: a command that is a switch of vhost-user ports, by default ``virtnet switch``.

``VIRTNET_BACKEND`` names another command, with ``{ports}`` where the ports go in virtnet's textual form
(``vhost-user:vm1.sock,queue_pairs=2``) and ``{seconds}`` where the time to run goes. The command ends early on SIGINT
and prints one JSON object last. With ``"python tests/peers/net_vhost_switch.py {ports} --seconds {seconds}"`` the same
tests run against DPDK's vhost library, which tells a fault of the guests or of a test from one of virtnet's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from guest import DIE_WITH_PARENT, tail
from image import MissingPeerError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT = "{virtnet} switch {ports} --json --seconds {seconds}"

#: The back-end ends by itself after this long, whatever becomes of the test.
RUN_SECONDS = 300


class BackendError(Exception):
    """The back-end did not do what it was asked; the message ends with what its log ends with."""


@dataclasses.dataclass(frozen=True)
class PortSpec:
    """One vhost-user port of the back-end.

    Attributes:
        socket: path of the vhost-user socket.
        queue_pairs: how many the port offers.
        connect: the back-end connects to a socket that QEMU listens on.
    """

    socket: Path
    queue_pairs: int = 1
    connect: bool = False

    def __str__(self) -> str:
        options = ",client=on" if self.connect else ""
        options += f",queue_pairs={self.queue_pairs}" if self.queue_pairs > 1 else ""
        return f"vhost-user:{self.socket}{options}"


@dataclasses.dataclass(frozen=True)
class PortReport:
    """What the back-end says about one port when it ends.

    Attributes:
        received: packets from the guest.
        sent: packets to the guest.
        dropped: packets that went no further, whatever the reason.
        features: what was negotiated, by the specification's names in lower case.
        ring: ``split`` or ``packed``.
    """

    received: int
    sent: int
    dropped: int
    features: frozenset[str]
    ring: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The JSON object a back-end ends with, its ports in the order of the command line."""

    ports: list[PortReport]
    json: dict[str, Any]

    @property
    def received(self) -> int:
        """Packets received by all ports."""
        return sum(port.received for port in self.ports)

    @property
    def copied(self) -> int:
        """Copies the switch made: a packet flooded to three ports is received once, copied twice, sent three times."""
        return sum(function.get("copied", 0) for function in self.json.get("functions", {}).values())

    @property
    def sent(self) -> int:
        """Packets sent by all ports, copies included."""
        return sum(port.sent for port in self.ports)

    @property
    def dropped(self) -> int:
        """Packets dropped by all ports and by the switch between them."""
        return sum(port.dropped for port in self.ports) + n_drops(self.json)


def read_report(text: str) -> Report:
    """Reads the report from what the back-end printed: the last line."""
    document = json.loads(text.strip().rpartition("\n")[2])
    ports: dict[str, dict[str, Any]] = document["ports"]
    return Report(
        ports=[
            PortReport(
                received=port["received"],
                sent=port["sent"],
                dropped=n_drops(port),
                features=frozenset(port["features"]),
                ring=port["ring"],
            )
            for port in ports.values()
        ],
        json=document,
    )


def n_drops(part: dict[str, Any]) -> int:
    """Adds up every counter of drops by reason in one part of the report."""
    return sum(
        sum(reasons.values()) for name, reasons in part.items() if name.endswith("drops") and isinstance(reasons, dict)
    )


def command_template() -> str:
    """Returns the command to test, with the placeholders still in it."""
    if given := os.environ.get("VIRTNET_BACKEND"):
        return given
    # The one installed beside this interpreter is the one under test, on PATH or not.
    beside = Path(sys.executable).parent / "virtnet"
    virtnet = str(beside) if beside.exists() else shutil.which("virtnet")
    if virtnet is None:
        raise MissingPeerError("the virtnet command is not installed, and VIRTNET_BACKEND names no other")
    return DEFAULT.replace("{virtnet}", shlex.quote(virtnet))


class Backend:
    """A running back-end. Start one from the main thread: it dies with the thread that started it."""

    def __init__(self, template: str, ports: Sequence[PortSpec], directory: Path) -> None:
        self._ports = list(ports)
        self._directory = directory
        self._command = shlex.split(
            template.format(ports=" ".join(shlex.quote(str(port)) for port in ports), seconds=RUN_SECONDS)
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._output = directory / "backend.out"
        self._log = directory / "backend.log"

    def start(self, timeout_s: float = 30) -> Self:
        """Starts the command, and waits until it listens on the sockets that are its own to make."""
        before = {port.socket: made_at(port.socket) for port in self._ports}
        with self._output.open("wb") as output, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*DIE_WITH_PARENT, *self._command],
                stdin=subprocess.DEVNULL, stdout=output, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + timeout_s
        own = [port.socket for port in self._ports if not port.connect]
        while any(made_at(socket) in (None, before[socket]) for socket in own):
            if (status := self._process.poll()) is not None:
                raise BackendError(f"the back-end ended at once with {status}\n{self.logs()}")
            if time.monotonic() > deadline:
                self.kill()
                raise BackendError(f"the back-end did not listen on {own} within {timeout_s:g} s\n{self.logs()}")
            time.sleep(0.02)
        return self

    def stop(self, timeout_s: float = 10) -> Report:
        """Ends the back-end as Ctrl-C does and returns its report."""
        if self._process is None:
            raise BackendError("the back-end was never started")
        if (status := self._process.poll()) is not None:
            raise BackendError(f"the back-end ended by itself with {status}\n{self.logs()}")
        self._process.send_signal(signal.SIGINT)
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise BackendError(f"the back-end was still there {timeout_s:g} s after SIGINT\n{self.logs()}") from None
        if status != 0:
            raise BackendError(f"the back-end ended with {status} on SIGINT\n{self.logs()}")
        text = self._output.read_text(errors="replace")
        try:
            return read_report(text)
        except (ValueError, KeyError, TypeError) as error:
            raise BackendError(
                f"the back-end ended with no report that can be read: {error!r}\n{self.logs()}"
            ) from error

    def kill(self) -> None:
        """Ends the back-end without a chance to tidy up. Nothing happens if it is gone already."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            # The whole session: the command may have started others.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def pid(self) -> int:
        """The back-end's process id; it has to be running."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """The process is there."""
        return self._process is not None and self._process.poll() is None

    def logs(self) -> str:
        """Returns the command and the ends of what it printed."""
        return f"  {shlex.join(self._command)}\n  its output:\n{tail(self._output)}\n  its messages:\n{tail(self._log)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def made_at(path: Path) -> int | None:
    """Returns when a file was made, which tells a new one from a stale one of the same name."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return None
