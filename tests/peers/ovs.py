"""Open vSwitch with DPDK's datapath, with one vhost-user port that sends back what it gets.

Its own database and run directory, and a network namespace of its own for the interfaces that it makes: nothing of a
system's Open vSwitch is touched. It needs root, for DPDK's memory without huge pages and for the namespace.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

#: Debian keeps the program with DPDK beside the one without.
PROGRAMS = (Path("/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"),)
SCHEMA = Path("/usr/share/openvswitch/vswitch.ovsschema")

#: How long it takes at most to begin.
START_S = 40


def missing() -> str | None:
    """What is not here to run it, or nothing."""
    if not any(program.exists() for program in PROGRAMS) or not SCHEMA.exists():
        return "Open vSwitch with DPDK was not found: install openvswitch-switch-dpdk"
    if os.geteuid() != 0:
        return "Open vSwitch with DPDK is started as root only"
    if not shutil.which("unshare"):
        return "unshare was not found"
    return None


class OpenVSwitch:
    """One Open vSwitch; ``socket`` is where its vhost-user port listens."""

    def __init__(self, directory: Path, *, queues: int = 2) -> None:
        """Starts the database and the switch, and waits until the port listens."""
        self._directory = directory
        self.socket = directory / "vp0"
        self._environment = os.environ | {
            "OVS_RUNDIR": str(directory),
            "OVS_LOGDIR": str(directory),
            "OVS_DBDIR": str(directory),
        }
        self._running: list[subprocess.Popen[bytes]] = []
        database = f"unix:{directory}/db.sock"
        try:
            self._run("ovsdb-tool", "create", f"{directory}/conf.db", str(SCHEMA))
            self._start(
                "ovsdb-server", f"--remote=p{database}", f"--unixctl={directory}/db.ctl", f"{directory}/conf.db"
            )
            self._wait((directory / "db.sock").exists, "the database")
            vsctl = ("ovs-vsctl", f"--db={database}", f"--timeout={START_S}")
            eal = f"--legacy-mem --no-huge -m 1024 --no-pci --file-prefix virtnet-{os.getpid()}"
            self._run(*vsctl, "--no-wait", "init")
            self._run(
                *vsctl,
                *("--no-wait", "set", "Open_vSwitch", ".", "other_config:dpdk-init=true"),
                f"other_config:dpdk-extra={eal}",
                "other_config:pmd-cpu-mask=0x1",
            )
            program = next(str(program) for program in PROGRAMS if program.exists())
            self.switch = self._start("unshare", "--net", program, f"--unixctl={directory}/vs.ctl", database)
            self._run(*vsctl, "add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev")
            port = ("type=dpdkvhostuser", f"options:n_rxq={queues}")
            self._run(*vsctl, "add-port", "br0", "vp0", "--", "set", "Interface", "vp0", *port, "ofport_request=1")
            self._wait(self.socket.exists, "its port")
            self._run("ovs-ofctl", "del-flows", f"unix:{directory}/br0.mgmt")
            self._run("ovs-ofctl", "add-flow", f"unix:{directory}/br0.mgmt", "in_port=1,actions=in_port")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        """The switch, ended at the end of the block."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Ends what was started, in the opposite order."""
        for process in reversed(self._running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _run(self, *command: str) -> None:
        subprocess.run(command, env=self._environment, check=True, capture_output=True, timeout=START_S + 5)

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self._directory / f"{len(self._running)}.log").open("w")
        with log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], env=self._environment, stdout=log, stderr=log
            )
        self._running.append(process)
        return process

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            ended = [process for process in self._running if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"Open vSwitch: {what} did not appear; see {self._directory}")
            time.sleep(0.05)
