"""What the kernel makes of packets that it routes and translates: links in a network namespace, nftables if asked for.

To be run in a network namespace of its own, as root there. Reads JSON: ``links`` (by name ``mac``, ``mtu``,
``addresses``, ``neighbours``), ``routes`` (by prefix a next router or the name of a link), ``rules`` of nftables, and
``frames``, a list of ``[link, frame, seconds]`` in hexadecimal, with how long what comes of it may take. Writes for
each frame what came out: ``[[link, frame], ...]``, without what is for a group and without ARP.
"""

from __future__ import annotations

import array
import fcntl
import json
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_IGNORE_OUTGOING = 23
SIOCETHTOOL = 0x8946
ETHTOOL_STXCSUM = 0x17

#: It forwards, and sends errors as fast as there is something to be told.
SETTINGS = {
    "ipv4/ip_forward": 1,
    "ipv6/conf/all/forwarding": 1,
    "ipv4/conf/all/rp_filter": 0,
    "ipv4/conf/default/rp_filter": 0,
    "ipv4/conf/all/send_redirects": 0,
    "ipv4/conf/default/send_redirects": 0,
    "ipv6/conf/default/accept_dad": 0,
    "ipv6/conf/default/addr_gen_mode": 1,
    "ipv6/auto_flowlabels": 0,
    "ipv4/icmp_ratelimit": 0,
    "ipv4/icmp_msgs_per_sec": 100_000,
    "ipv6/icmp/ratelimit": 0,
}

IPV6_MTU_MIN = 1280

#: How fast stations are asked for, so that tests do not wait for those who never answer.
ASKED_AGAIN_MS = 30


def run(*command: str, **options: object) -> None:
    """Runs a program that must succeed."""
    subprocess.run(command, check=True, **options)  # type: ignore[call-overload]


def put(name: str, value: int) -> None:
    """Writes a setting."""
    Path("/proc/sys/net", name).write_text(str(value))


def plug(name: str, link: dict[str, Any]) -> socket.socket:
    """Makes an interface; the far end of its cable."""
    run("ip", "link", "add", name, "address", link["mac"], "type", "veth", "peer", "name", f"{name}-far")
    for end, mtu in ((name, link["mtu"]), (f"{name}-far", 9000)):
        run("ip", "link", "set", end, "mtu", str(mtu), "up")
    finish_checksums(name)
    put(f"ipv6/conf/{name}-far/disable_ipv6", 1)
    for version in ("ipv4", "ipv6") if link["mtu"] >= IPV6_MTU_MIN else ("ipv4",):
        put(f"{version}/neigh/{name}/retrans_time_ms", ASKED_AGAIN_MS)
    for address in link["addresses"]:
        run("ip", "address", "add", address, "dev", name)
    for neighbour, mac in link["neighbours"].items():
        run("ip", "neigh", "add", neighbour, "lladdr", mac, "dev", name, "nud", "permanent")
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    end.bind((f"{name}-far", ETH_P_ALL))
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    return end


def finish_checksums(name: str) -> None:
    """Has an interface send no checksum that somebody else is to finish."""
    wanted = array.array("B", struct.pack("II", ETHTOOL_STXCSUM, 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCETHTOOL, struct.pack("16sP", name.encode(), wanted.buffer_info()[0]))


def exchange(ends: dict[str, socket.socket], link: str, frame: bytes, seconds: float) -> list[tuple[str, str]]:
    """Sends a frame by a link; what comes out of all."""
    names = {end: name for name, end in ends.items()}
    ends[link].send(frame)
    found: list[tuple[str, str]] = []
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        for end in select.select(list(names), [], [], left)[0]:
            got = end.recv(65_536)
            if not got[0] & 1 and got[12:14] != b"\x08\x06":
                found.append((names[end], got.hex()))
    return found


def main() -> None:
    """Does what the module says."""
    wanted = json.load(sys.stdin)
    for name, value in SETTINGS.items():
        put(name, value)
    run("ip", "link", "set", "lo", "up")
    ends = {name: plug(name, link) for name, link in wanted["links"].items()}
    for to, over in wanted["routes"].items():
        run("ip", "route", "add", to, *(["dev", over] if over in ends else ["via", over]))
    if wanted["rules"]:
        run("nft", "-f", "-", input=wanted["rules"].encode())
    for end in ends.values():  # what interfaces have to say when they come
        while select.select([end], [], [], 0.05)[0]:
            end.recv(65_536)
    json.dump([exchange(ends, link, bytes.fromhex(frame), s) for link, frame, s in wanted["frames"]], sys.stdout)


main()
