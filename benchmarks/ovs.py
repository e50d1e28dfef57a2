"""OVS with DPDK's datapath as a back-end: a bridge that learns addresses, between vhost-user ports.

Its database, sockets and logs are in a directory of the measurement, its interfaces in a network namespace of their
own. It needs root.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

from benchmarks.testpmd import DIE_WITH_PARENT, wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: Debian has the build with DPDK beside the plain one.
PROGRAMS = ("/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk", "ovs-vswitchd")
SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
MEMORY_MB = 320

#: Counters in the database are at most so old.
COUNTERS_S = 5.5


class OvsError(Exception):
    """A tool of OVS failed; ends with what it printed."""


def program() -> str | None:
    """Where the daemon with DPDK is: ``$OVS_VSWITCHD``, or Debian's, or ``None``."""
    places = (os.environ.get("OVS_VSWITCHD", ""), *PROGRAMS)
    return next((found for place in places if place and (found := shutil.which(place))), None)


def version() -> str:
    """What the daemon calls itself."""
    if (executable := program()) is None:
        return "unknown"
    answer = subprocess.run([executable, "--version"], capture_output=True, text=True, check=False, timeout=20)
    found = re.search(r"Open vSwitch\) (\S+)", answer.stdout)
    return found[1] if found else "unknown"


class Ovs:
    """A bridge ``br0`` with ports ``p0``, ``p1``, … whose forwarding thread has a core."""

    def __init__(self, ports: int, directory: Path, *, core: int, addresses: int = 20_000) -> None:
        """Start the database and the daemon, and add the ports; ``addresses`` is the size of the address table."""
        executable = program()
        if executable is None:
            raise OvsError("ovs-vswitchd was not found: install the package openvswitch-switch-dpdk")
        self._directory = directory
        place = str(directory)
        names = ("OVS_RUNDIR", "OVS_SYSCONFDIR", "OVS_DBDIR", "OVS_LOGDIR")
        self._environment = os.environ | dict.fromkeys(names, place)
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._run("ovsdb-tool", "create", f"{place}/conf.db", SCHEMA)
            sockets = [f"--remote=punix:{place}/db.sock", f"--unixctl={place}/db.ctl"]
            self._spawn("ovsdb-server", f"{place}/conf.db", *sockets)
            wait_for((directory / "db.sock").exists, "OVS's database")
            mask = hex(1 << core)
            extra = f"--no-pci --in-memory --single-file-segments --file-prefix=ovs{os.getpid()} --no-telemetry"
            settings = {
                "dpdk-init": "true",
                "pmd-cpu-mask": mask,
                "dpdk-lcore-mask": mask,
                "dpdk-socket-limit": MEMORY_MB,
                "dpdk-extra": extra,
            }
            self._control("--no-wait", "init")
            words = [f'other_config:{name}="{value}"' for name, value in settings.items()]
            self._control("--no-wait", "set", "Open_vSwitch", ".", *words)
            daemon = [executable, f"unix:{place}/db.sock", f"--unixctl={place}/vswitchd.ctl", "-vconsole:off"]
            log = f"--log-file={place}/vswitchd.log"
            self._spawn("unshare", "-n", "taskset", "-c", str(core), *daemon, log)
            wait_for((directory / "vswitchd.ctl").exists, "OVS's daemon", timeout_s=30)
            bridge = ["set", "bridge", "br0", "datapath_type=netdev", f"other_config:mac-table-size={addresses}"]
            self._control("add-br", "br0", "--", *bridge)
            for number in range(ports):
                name = f"p{number}"
                self._control("add-port", "br0", name, "--", "set", "Interface", name, "type=dpdkvhostuser")
        except BaseException:
            self.close()
            raise
        self.pid = self._processes[-1].pid
        self.sockets = [directory / f"p{number}" for number in range(ports)]

    def wait_up(self) -> None:
        """Wait until the daemon has taken notice of a driver at every port; before that it drops what is for them."""
        names = [socket.name for socket in self.sockets]

        def all_up() -> bool:
            return self._control("--columns=link_state", "list", "Interface", *names).count("up") == len(names)

        wait_for(all_up, "OVS's links to come up", timeout_s=20, every_s=0.3)

    def account(self) -> tuple[int, int]:
        """Packets that came in at all ports, and those of them that found no room at the port they were for.

        Counted by the datapath and by the senders. The latter's counters get into the database now and then: they count
        once they stand still.
        """
        last = None
        while (now := self._dropped()) != last:
            last = now
            time.sleep(COUNTERS_S)
        show = self._run("ovs-appctl", "-t", f"{self._directory}/vswitchd.ctl", "dpctl/show")
        lookups = re.search(r"lookups: hit:(\d+) missed:(\d+) lost:(\d+)", show)
        if lookups is None:
            raise OvsError(f"dpctl/show said {show!r}")
        hit, missed, lost = map(int, lookups.groups())  # lost are some of the missed
        return hit + missed, lost + now

    def _dropped(self) -> int:
        texts = [self._control("get", "Interface", socket.name, "statistics") for socket in self.sockets]
        return sum(int(count) for count in re.findall(r"ovs_tx_\w+_drops=(\d+)", " ".join(texts)))

    def close(self) -> None:
        """End both processes."""
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _control(self, *words: str) -> str:
        return self._run("ovs-vsctl", f"--db=unix:{self._directory}/db.sock", "--timeout=40", *words)

    def _run(self, *command: str) -> str:
        try:
            done = subprocess.run(
                command, env=self._environment, check=True, capture_output=True, text=True, timeout=60
            )
        except subprocess.CalledProcessError as error:
            raise OvsError(f"{' '.join(command[:3])}: {error.stderr.strip()[-500:]}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise OvsError(f"{command[0]}: {error}") from None
        return done.stdout

    def _spawn(self, *command: str) -> None:
        words: Sequence[str] = [*DIE_WITH_PARENT, *command]
        nothing = subprocess.DEVNULL
        self._processes.append(
            subprocess.Popen(
                words, env=self._environment, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
            )
        )
