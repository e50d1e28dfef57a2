"""Packets both ways through a tap, seen by the host's tcpdump and by a capture at the guest behind the tap.

Runs in a network namespace of its own, and writes ``in.pcap`` and ``out.pcap`` (tcpdump's) and ``ours.pcapng`` into the
directory that is its argument.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import virtnet as vn
from helpers import eventually, mac

directory = Path(sys.argv[1])


def udp(port: int) -> bytes:
    """A datagram without a checksum."""
    packet = struct.pack(
        ">BBHHHBBH4s4sHHHH", 0x45, 0, 46, 0, 0, 64, 17, 0, b"\x0a\0\0\1", b"\x0a\0\0\2", 7, port, 26, 0
    )
    return (mac(2) + mac(1) + b"\x08\x00" + packet).ljust(60, b"\0")


def dump(way: str) -> subprocess.Popen[str]:
    """Tcpdump, when it listens."""
    command = ["tcpdump", "-n", "-U", "-i", "tap0", "-Q", way, "-w", f"{directory}/{way}.pcap", "udp"]
    dumping = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "listening on" not in (line := dumping.stderr.readline()):
        assert line, "tcpdump does not run"
    return dumping


with vn.Net() as net:
    guest = net.memory("guest")
    guest >> net.tap("tap0", name="tap")
    subprocess.run(["ip", "link", "set", "tap0", "up"], check=True)
    dumps = [dump(way) for way in ("in", "out")]
    with net.capture(guest, directory / "ours.pcapng", filter="udp") as capture:
        guest.end.tx([udp(53)] * 3)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as host:
            host.bind(("tap0", 0))
            for _ in range(2):
                host.send(udp(54))
        assert eventually(lambda: capture.packets == 5), capture.stats()
    sizes = {"in.pcap": 24 + 3 * 76, "out.pcap": 24 + 2 * 76}
    assert eventually(lambda: all((directory / name).stat().st_size >= size for name, size in sizes.items()))
    for dumping in dumps:
        dumping.terminate()
        dumping.communicate()
