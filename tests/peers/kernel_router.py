"""What the kernel's own firewall makes of packets between two sides: nftables on a router in a network namespace.

To be run in a network namespace of its own, as root there. Reads a JSON list of ``[side, frame]`` (side 0 is the
outside, 1 the inside, the frame in hexadecimal and for the router's address), writes one of whether each has passed.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_IGNORE_OUTGOING = 23

#: Whoever sends is where the rules say that everything may begin.
RULES = """
table inet firewall {
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state invalid drop
    ct state established,related accept
    iifname "in0" ct state new accept
  }
}
"""

#: What is to pass has passed after this long, once something else was seen to pass.
SETTLED_S = 0.25

ADDRESSES = {"out": ("192.0.2.254/24", "192.0.2.1"), "in": ("10.0.0.254/24", "10.0.0.1")}


def run(command: str, **options: object) -> None:
    """Runs a program that must succeed."""
    subprocess.run(command.split(), check=True, **options)  # type: ignore[call-overload]


def set_up() -> list[socket.socket]:
    """The router and its neighbours; the far ends of its two interfaces."""
    for name, value in (
        ("ipv4/ip_forward", 1),
        ("ipv6/conf/default/disable_ipv6", 1),
        ("netfilter/nf_conntrack_tcp_loose", 0),
    ):
        Path("/proc/sys/net", name).write_text(str(value))
    ends = []
    for side, (address, neighbour) in ADDRESSES.items():
        run(f"ip link add {side}0 address 02:00:00:00:00:fe type veth peer name {side}1")
        run(f"ip address add {address} dev {side}0")
        for end in (f"{side}0", f"{side}1"):
            run(f"ip link set {end} up arp off")
        run(f"ip neigh add {neighbour} lladdr 02:00:00:00:00:01 dev {side}0 nud permanent")
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        end.bind((f"{side}1", ETH_P_ALL))
        end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        ends.append(end)
    run("nft -f -", input=RULES.encode())
    return ends


def arrives(ends: list[socket.socket], side: int, frame: bytes) -> bool:
    """Whether what is above IP in a frame arrives at the other side."""
    while select.select(ends, [], [], 0)[0]:
        for end in select.select(ends, [], [], 0)[0]:
            end.recv(65_536)
    ends[side].send(frame)
    deadline = time.monotonic() + SETTLED_S
    while (left := deadline - time.monotonic()) > 0:
        if select.select([ends[1 - side]], [], [], left)[0]:
            got = ends[1 - side].recv(65_536)
            if got[26 : len(frame)] == frame[26:]:
                return True
    return False


def main() -> None:
    """Does what the module says."""
    ends = set_up()
    json.dump([arrives(ends, side, bytes.fromhex(frame)) for side, frame in json.load(sys.stdin)], sys.stdout)


main()
