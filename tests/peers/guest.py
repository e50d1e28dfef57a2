"""Linux guests under QEMU whose network card is served by a vhost-user back-end.

A guest boots in two or three seconds without hardware virtualisation and runs shell commands for a test. It has one
processor whatever its number of queues (the driver spreads flows over them): with several, QEMU 10 now and then ends
with an assertion in its MSI-X code while the guest boots. ::

    image = image.image()
    nic = Nic(directory / "vm1.sock", packed=True)
    with Guest(image, "vm1", nic, address="10.0.0.1/24", directory=directory) as guest:
        guest.wait_ready()
        guest.run("ping -c 3 10.0.0.2")

QEMU does not start its guest before the back-end is there, in either socket direction: start the back-end before
``wait_ready`` (when it listens, before the guest; when it connects, after). To look at one by hand, run this module
with a socket a back-end listens on: ``python tests/peers/guest.py vm1.sock 10.0.0.1/24``, then type commands.

Whatever ends the test, a guest does not outlive it: it is killed by its process id, and the kernel kills it when the
process that started it dies.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self

from image import Image, MissingPeerError, find_program, image

if TYPE_CHECKING:
    from collections.abc import Callable

#: Older versions crash under TCG with a vhost-user device.
WANTED_QEMU = 10

#: What a command may take unless it says otherwise, and how long a guest may take to boot on a busy machine.
COMMAND_SECONDS = 30
BOOT_SECONDS = 90

#: What a step of a migration may take.
MIGRATION_SECONDS = 90

#: Has the kernel kill what follows when the thread that started it ends.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")


class GuestError(Exception):
    """A guest did not do what it was asked; the message ends with what its logs end with."""


@dataclasses.dataclass(frozen=True)
class Nic:
    """One virtio network card and the vhost-user socket behind it.

    Attributes:
        socket: path of the vhost-user socket.
        mac: address of the card; by default it follows from the socket's name.
        listen: QEMU creates the socket and the back-end connects, instead of the other way round.
        packed: the device offers packed rings.
        queue_pairs: receive and transmit queues, two of each for 2.
        mrg_rxbuf: the device offers mergeable receive buffers.
        iommu: the card is behind a virtual IOMMU, and how the guest uses that: ``pt`` for addresses that stay what they
            are, ``strict`` and ``lazy`` for mappings of each buffer.
        properties: further properties of QEMU's device, such as ``{"event_idx": "off"}``.
    """

    socket: Path
    mac: str = ""
    listen: bool = False
    packed: bool = False
    queue_pairs: int = 1
    mrg_rxbuf: bool = True
    iommu: Literal["pt", "strict", "lazy"] | None = None
    properties: dict[str, str] = dataclasses.field(default_factory=dict)

    def arguments(self) -> list[str]:
        """Returns QEMU's arguments for the card."""
        # A back-end that went away is looked for every 200 ms, so that a test of it need not wait long.
        chardev = f"socket,id=nic,path={self.socket}," + ("server=on,wait=off" if self.listen else "reconnect-ms=200")
        device = {
            "mac": self.mac or mac_for(self.socket.name),
            "packed": "on" if self.packed else "off",
            "mrg_rxbuf": "on" if self.mrg_rxbuf else "off",
            "romfile": "",
            **({"bus": "root", "iommu_platform": "on", "ats": "on", "disable-legacy": "on"} if self.iommu else {}),
            **self.properties,
        }
        netdev = "vhost-user,id=net,chardev=nic,vhostforce=on"
        if self.queue_pairs > 1:
            netdev += f",queues={self.queue_pairs}"
            device |= {"mq": "on", "vectors": str(2 * self.queue_pairs + 2)}
        properties = "".join(f",{name}={value}" for name, value in device.items())
        card = ["-chardev", chardev, "-netdev", netdev, "-device", f"virtio-net-pci,netdev=net{properties}"]
        if self.iommu is None:
            return card
        # Only a device of PCI Express, behind a root port, is told what its translations were.
        iommu, port = (
            "intel-iommu,device-iotlb=on,intremap=off,caching-mode=on",
            "pcie-root-port,id=root,chassis=1,slot=1",
        )
        return ["-device", iommu, "-device", port, *card]

    @property
    def kernel_options(self) -> str:
        """What the guest's kernel has to be told of the card."""
        modes = {
            "pt": "iommu=pt",
            "strict": "iommu.passthrough=0 iommu.strict=1",
            "lazy": "iommu.passthrough=0 iommu.strict=0",
        }
        return f"intel_iommu=on {modes[self.iommu]} " if self.iommu else ""


@dataclasses.dataclass(frozen=True)
class SocketNic(Nic):
    """A card whose frames go through a socket: QEMU's ``stream`` and ``dgram``.

    Attributes:
        qemu_args: QEMU's arguments for it, the device last.
    """

    qemu_args: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Returns QEMU's arguments for the card."""
        *others, device = self.qemu_args
        return [*others, f"{device},romfile="]


def mac_for(name: str) -> str:
    """Returns a locally administered address that is the same for the same name."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in hashlib.sha256(name.encode()).digest()[:3])


@functools.cache
def find_qemu() -> Path:
    """Returns QEMU's path, and says what is wrong with it where it is unfit."""
    qemu = find_program("qemu-system-x86_64")
    printed = subprocess.run([qemu, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.search(r"version (\d+)", printed)
    if found is None or int(found[1]) < WANTED_QEMU:
        raise MissingPeerError(
            f"needs QEMU {WANTED_QEMU} or newer, found {printed.splitlines()[0]}: run tests/peers/install.sh"
        )
    return qemu


def tail(path: Path, n_lines: int = 15) -> str:
    """Returns the end of a log for an error message."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join(f"    {line}" for line in lines[-n_lines:]) or "    (empty)"


class Guest:
    """A running guest. Start one from the main thread: it dies with the thread that started it.

    Args:
        image: the kernel and initramfs.
        name: for the log files and messages.
        nic: the card.
        address: address and prefix of the guest's ``eth0``.
        directory: where the logs and the command line's socket go.
        memory_mib: small boots faster.
        mtu: the interface's, where the card allows another than 1500.
        incoming: it does not boot, but waits for another guest, started with the same options, to migrate to it.
        arguments: further ones for QEMU.
    """

    def __init__(
        self,
        image: Image,
        name: str,
        nic: Nic,
        *,
        address: str,
        directory: Path,
        memory_mib: int = 192,
        mtu: int = 0,
        incoming: bool = False,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.nic = nic
        self.ip = address.partition("/")[0]
        self.console_log = directory / f"{name}.console.log"
        self.qemu_log = directory / f"{name}.qemu.log"
        self._shell_path = directory / f"{name}.shell"
        self._shell: socket.socket | None = None
        self._monitor_path = directory / f"{name}.qmp"
        self._monitor: socket.socket | None = None
        self._monitor_lines: BinaryIO
        self._migration_path = directory / f"{name}.migration"
        self._received = b""
        self._ids = itertools.count()
        self._boot_started = time.monotonic()
        self.boot_seconds: float | None = None

        settings = {"address": address, "queues": nic.queue_pairs if nic.queue_pairs > 1 else "", "mtu": mtu or ""}
        kernel_line = (
            "console=ttyS0 loglevel=5 panic=-1 tsc=reliable no_timer_check mitigations=off random.trust_cpu=on "
            "lsm=none audit=0 cryptomgr.notests "
            + nic.kernel_options
            + " ".join(f"virtnet.{key}={value}" for key, value in settings.items() if value)
        )
        command = [
            str(find_qemu()), "-name", name, "-nodefaults", "-display", "none", "-no-reboot",
            "-machine", "q35,memory-backend=memory", "-accel", "tcg,thread=multi", "-cpu", "max",
            "-smp", "1", "-m", str(memory_mib),
            "-object", f"memory-backend-memfd,id=memory,size={memory_mib}M,share=on",
            "-serial", f"file:{self.console_log}",
            "-chardev", f"socket,id=shell,path={self._shell_path},server=on,wait=off", "-serial", "chardev:shell",
            "-qmp", f"unix:{self._monitor_path},server=on,wait=off", *(["-incoming", "defer"] if incoming else []),
            "-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", kernel_line,
            *nic.arguments(), *arguments,
        ]  # fmt: skip
        self._shell_path.unlink(missing_ok=True)
        self._monitor_path.unlink(missing_ok=True)
        with self.qemu_log.open("wb") as log:
            self._process = subprocess.Popen(
                [*DIE_WITH_PARENT, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            # At once: what the guest writes while nobody is connected is lost.
            self._connect()
        except BaseException:
            self.kill()
            raise

    def wait_ready(self, timeout_s: float = BOOT_SECONDS) -> Self:
        """Waits until the guest takes commands."""
        self._line(b"@ready ", timeout_s, "boot")
        self.boot_seconds = time.monotonic() - self._boot_started
        return self

    def run(self, command: str, timeout_s: float = COMMAND_SECONDS, check: bool = True) -> str:
        """Runs a shell command in the guest and returns what it printed, both streams together.

        Args:
            command: one or more lines of shell. ``command &`` stays behind; give it its own output.
            timeout_s: after that the guest kills it.
            check: a status other than 0 is an error.
        """
        status, printed = self.try_run(command, timeout_s)
        if check and status != 0:
            ended = f"did not end within {timeout_s} s" if status == 137 else f"ended with {status}"
            raise GuestError(f"{self.name}: {command!r} {ended}:\n{printed[-2000:]}")
        return printed

    def try_run(self, command: str, timeout_s: float = COMMAND_SECONDS) -> tuple[int, str]:
        """Runs a shell command in the guest and returns its status, 137 if it was killed, and what it printed."""
        return self.finish(self.begin(command, timeout_s))

    def begin(self, command: str, timeout_s: float = COMMAND_SECONDS) -> tuple[str, float]:
        """Sends a command without waiting for its end; ``finish`` takes what this returns."""
        name = f"c{next(self._ids)}"
        line = f"{name} {max(1, round(timeout_s))} {base64.b64encode(command.encode()).decode()}\n"
        if self._shell is None:
            raise GuestError(f"{self.name}: is not running")
        self._shell.sendall(line.encode())
        return name, timeout_s

    def finish(self, begun: tuple[str, float]) -> tuple[int, str]:
        """Waits for a command that ``begin`` sent, and returns its status and what it printed."""
        name, timeout_s = begun
        # The guest keeps the time; twice as much here covers a guest that is slow to notice.
        answer = self._line(f"@{name} ".encode(), 2 * timeout_s + 10, f"answer to command {name}")
        fields = answer.split()
        return int(fields[1]), base64.b64decode(fields[2]).decode(errors="replace") if len(fields) > 2 else ""

    def monitor(self, command: str, **arguments: object) -> Any:
        """Has QEMU itself do something, and returns its answer. The commands are those of QEMU's machine protocol."""
        if self._monitor is None:
            self._monitor = socket.socket(socket.AF_UNIX)
            self._monitor.settimeout(COMMAND_SECONDS)
            self._monitor.connect(str(self._monitor_path))
            self._monitor_lines = self._monitor.makefile("rb")
            self.monitor("qmp_capabilities")
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        # Greeting and events come in between.
        for line in self._monitor_lines:
            answer = json.loads(line)
            if "error" in answer:
                raise GuestError(f"{self.name}: QEMU refused {command}: {answer['error']['desc']}\n{self.logs()}")
            if "return" in answer:
                return answer["return"]
        raise GuestError(f"{self.name}: QEMU ended while it was asked for {command}\n{self.logs()}")

    def begin_migration(self, target: Guest) -> None:
        """Begins to move to where ``target`` waits: all memory is copied, and then again and again what has changed.

        So slowly that it comes to no end by itself, as long as the guest has something to do.
        """
        uri = f"unix:{target._migration_path}"
        target.monitor("migrate-incoming", uri=uri)
        self.monitor("migrate-set-parameters", **{"max-bandwidth": 16 << 20, "downtime-limit": 1})
        self.monitor("migrate", uri=uri)
        self._wait_for_migration(lambda ram: ram["remaining"] < 2 << 20)
        self.monitor("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
        self._wait_for_migration(lambda ram: ram["dirty-sync-count"] > 1)

    def end_migration(self) -> None:
        """Ends the migration: this guest stops, and what has changed since it was copied last is copied once more."""
        self.monitor("migrate-set-parameters", **{"max-bandwidth": 1 << 30, "downtime-limit": 10_000})
        self._wait_for_migration()

    def has_migrated(self) -> bool:
        """Tells whether the migration is over, and this guest stopped."""
        return self.monitor("query-migrate").get("status") == "completed"

    def _wait_for_migration(self, far_enough: Callable[[dict[str, int]], bool] | None = None) -> None:
        """Waits until memory has been copied so far, or the migration is over."""
        deadline = time.monotonic() + MIGRATION_SECONDS
        while not self.has_migrated():
            found = self.monitor("query-migrate")
            if far_enough is not None and "ram" in found and far_enough(found["ram"]):
                return
            if found.get("status") == "failed" or time.monotonic() > deadline:
                raise GuestError(f"{self.name}: the migration does not get on: {found}\n{self.logs()}")
            time.sleep(0.02)

    def take_over(self, source: Guest) -> None:
        """Goes on where ``source`` has stopped, commands that have not ended included; ``source`` is killed."""
        self._ids, self._boot_started, self.boot_seconds = source._ids, source._boot_started, source.boot_seconds
        source.kill()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    def kill(self) -> None:
        """Ends the guest as a power cut would. Nothing happens if it is gone already."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._shell is not None:
            self._shell.close()
            self._shell = None
        if self._monitor is not None:
            self._monitor_lines.close()
            self._monitor.close()
            self._monitor = None

    def logs(self) -> str:
        """Returns the ends of the guest's console and of QEMU's own messages."""
        return f"  console of {self.name}:\n{tail(self.console_log)}\n  QEMU of {self.name}:\n{tail(self.qemu_log)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _connect(self, timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while self._shell is None:
            self._must_run("start")
            attempt = socket.socket(socket.AF_UNIX)
            with contextlib.ExitStack() as on_failure:
                on_failure.callback(attempt.close)
                with contextlib.suppress(OSError):
                    attempt.connect(str(self._shell_path))
                    on_failure.pop_all()
                    self._shell = attempt
                    return
            if time.monotonic() > deadline:
                raise GuestError(f"{self.name}: QEMU made no {self._shell_path} within {timeout_s} s\n{self.logs()}")
            time.sleep(0.02)

    def _line(self, start: bytes, timeout_s: float, what: str) -> str:
        """Reads lines until one holds ``start``, and returns it from there."""
        deadline = time.monotonic() + timeout_s
        while True:
            *complete, self._received = self._received.split(b"\n")
            for position, line in enumerate(complete):
                if start in line:
                    self._received = b"\n".join([*complete[position + 1 :], self._received])
                    return line[line.index(start) :].decode(errors="replace").strip()
            if self._shell is None:
                raise GuestError(f"{self.name}: is not running")
            if time.monotonic() > deadline:
                raise GuestError(f"{self.name}: no {what} within {timeout_s:g} s\n{self.logs()}")
            self._shell.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                received = self._shell.recv(1 << 16)
                if not received:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(2)
                    self._must_run(what)
                    raise GuestError(f"{self.name}: closed its command line while waiting for {what}\n{self.logs()}")
                self._received += received

    def _must_run(self, what: str) -> None:
        if (status := self._process.poll()) is not None:
            raise GuestError(f"{self.name}: QEMU ended with {status} while waiting for {what}\n{self.logs()}")


def main() -> None:
    """Boots one guest on a socket given by hand and passes commands on."""
    path, address = sys.argv[1:3]
    nic = Nic(Path(path).resolve())
    with Guest(image(), "guest", nic, address=address, directory=Path(path).resolve().parent) as guest:
        guest.wait_ready()
        sys.stderr.write(f"ready in {guest.boot_seconds:.1f} s; commands, one a line:\n")
        for line in sys.stdin:
            status, printed = guest.try_run(line)
            sys.stdout.write(printed if status == 0 else f"{printed}[{status}]\n")


if __name__ == "__main__":
    main()
