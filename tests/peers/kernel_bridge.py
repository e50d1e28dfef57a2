"""What the kernel's bridge makes of frames: veth pairs in a network namespace, each with an end in the bridge.

To be run in a network namespace of its own, as root there. Reads JSON: ``ports`` (names, with whether they are kept
apart from each other) and ``frames``, a list of ``[port, frame]`` in hexadecimal. Writes for each frame what came out:
``[[port, frame], ...]``.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_IGNORE_OUTGOING = 23
PACKET_AUXDATA = 8
TP_STATUS_VLAN_VALID = 1 << 4

#: ``struct tpacket_auxdata``: status, two lengths, two places, a tag that was taken out of the frame and its kind.
AUXDATA = struct.Struct("=IIIHHHH")

#: How long what comes of a frame may take.
SETTLED_S = 0.1


def run(*command: str) -> None:
    """Runs a program that must succeed."""
    subprocess.run(command, check=True)


def plug(name: str, *, isolated: bool) -> socket.socket:
    """Makes a port of the bridge; the far end of its cable."""
    far = f"{name}-far"
    run("ip", "link", "add", name, "type", "veth", "peer", "name", far)
    for end in (name, far):
        Path("/proc/sys/net/ipv6/conf", end, "disable_ipv6").write_text("1")
    run("ip", "link", "set", name, "master", "bridge")
    run("bridge", "link", "set", "dev", name, "isolated", "on" if isolated else "off")
    for end in (name, far):
        run("ip", "link", "set", end, "up")
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    end.bind((far, ETH_P_ALL))
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
    return end


def receive(end: socket.socket) -> bytes:
    """A frame, with the tag that the kernel keeps beside it."""
    frame, control, _flags, _address = end.recvmsg(65_536, socket.CMSG_SPACE(AUXDATA.size))
    status, _, _, _, _, tag, kind = AUXDATA.unpack(control[0][2])
    return frame[:12] + struct.pack(">HH", kind, tag) + frame[12:] if status & TP_STATUS_VLAN_VALID else frame


def exchange(ends: dict[str, socket.socket], port: str, frame: bytes) -> list[tuple[str, str]]:
    """Sends a frame to a port; what comes out of all."""
    names = {end: name for name, end in ends.items()}
    ends[port].send(frame)
    found: list[tuple[str, str]] = []
    deadline = time.monotonic() + SETTLED_S
    while (left := deadline - time.monotonic()) > 0:
        ready = select.select(list(names), [], [], left)[0]
        found += [(names[end], receive(end).hex()) for end in ready]
    return found


def main() -> None:
    """Does what the module says."""
    wanted = json.load(sys.stdin)
    options = ("stp_state", "0", "mcast_snooping", "0", "forward_delay", "0")
    run("ip", "link", "add", "bridge", "type", "bridge", *options)
    Path("/proc/sys/net/ipv6/conf/bridge/disable_ipv6").write_text("1")
    run("ip", "link", "set", "bridge", "up")
    ends = {name: plug(name, isolated=isolated) for name, isolated in wanted["ports"].items()}
    time.sleep(SETTLED_S)
    for end in ends.values():  # what interfaces have to say when they come
        while select.select([end], [], [], 0.05)[0]:
            end.recv(65_536)
    json.dump([exchange(ends, port, bytes.fromhex(frame)) for port, frame in wanted["frames"]], sys.stdout)


main()
