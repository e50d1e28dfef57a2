"""What Open vSwitch makes of frames in VLANs: its own switching (action NORMAL), in a network namespace.

To be run in a network namespace of its own, as root there, with a directory for its sockets as argument. Reads JSON:
``ports``, a list of what each is in words of ovs-vsctl (``["tag=10"]``), and ``frames``, a list of ``[port, frame]`` in
hexadecimal. Writes for each frame what came out: ``{port: [frame, ...]}``.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_AUXDATA, PACKET_IGNORE_OUTGOING = 8, 23
TP_STATUS_VLAN_VALID = 0x10

SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
#: What is to come out has come out after this long.
SETTLED_S = 0.15
START_S = 40


def run(*command: str) -> None:
    """Runs a program that must succeed."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def start(directory: Path, *command: str) -> subprocess.Popen[bytes]:
    """Starts a program, with its files where those of a system's own are not touched."""
    environment = os.environ | dict.fromkeys(("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR"), str(directory))
    log = (directory / f"{command[0]}.out").open("wb")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def set_up(directory: Path, ports: list[list[str]]) -> tuple[list[subprocess.Popen[bytes]], list[socket.socket]]:
    """The switch with its ports; the far ends of these."""
    database = f"unix:{directory}/db.sock"
    run("ovsdb-tool", "create", f"{directory}/conf.db", SCHEMA)
    server = f"--remote=p{database}", f"--unixctl={directory}/db.ctl", f"{directory}/conf.db"
    running = [start(directory, "ovsdb-server", *server)]
    deadline = time.monotonic() + START_S
    while not (directory / "db.sock").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    vsctl = ("ovs-vsctl", f"--db={database}", f"--timeout={START_S}")
    run(*vsctl, "--no-wait", "init")
    running.append(start(directory, "ovs-vswitchd", f"--unixctl={directory}/vs.ctl", database))
    run(*vsctl, "add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev", "fail-mode=standalone")
    ends = []
    for n, settings in enumerate(ports):
        run("ip", "link", "add", f"in{n}", "type", "veth", "peer", "name", f"out{n}")
        for name in (f"in{n}", f"out{n}"):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
            run("ip", "link", "set", name, "up", "arp", "off")
        run(*vsctl, "add-port", "br0", f"in{n}", *settings)
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        end.bind((f"out{n}", ETH_P_ALL))
        end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        end.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        ends.append(end)
    return running, ends


def receive(end: socket.socket) -> bytes:
    """A frame, with its tag where it was."""
    frame, notes, _, _ = end.recvmsg(65_536, 256)
    for level, kind, data in notes:
        if (level, kind) == (SOL_PACKET, PACKET_AUXDATA):
            status = int.from_bytes(data[:4], sys.byteorder)
            tci = int.from_bytes(data[16:18], sys.byteorder)
            if status & TP_STATUS_VLAN_VALID:
                return frame[:12] + b"\x81\x00" + tci.to_bytes(2, "big") + frame[12:]
    return frame


def exchange(ends: list[socket.socket], port: int, frame: bytes) -> dict[int, list[str]]:
    """Sends a frame into a port; what comes out of all."""
    ends[port].send(frame)
    found: dict[int, list[str]] = {}
    deadline = time.monotonic() + SETTLED_S
    while (left := deadline - time.monotonic()) > 0:
        for end in select.select(ends, [], [], left)[0]:
            got = receive(end)
            # What is not ours is of the switch itself.
            if got[6:10] == b"\x02\0\0\0":
                found.setdefault(ends.index(end), []).append(got.hex())
    return found


def main() -> None:
    """Does what the module says."""
    wanted = json.load(sys.stdin)
    running, ends = set_up(Path(sys.argv[1]), wanted["ports"])
    try:
        out = [exchange(ends, port, bytes.fromhex(frame)) for port, frame in wanted["frames"]]
    finally:
        for program in reversed(running):
            program.terminate()
            program.wait()
    json.dump(out, sys.stdout)


main()
