"""How do stations of two hosts share one Ethernet?

Two network namespaces play the hosts, a veth pair the network between them. The left host has a station (a tap) and a
VXLAN port, both of this program, though it lives elsewhere (``netns=``); the right host has Linux's own VXLAN
interface. Pings pass between the stations, over UDP between the hosts. (For TCP the right host has to finish its
checksums: ``ethtool -K road tx off``; where there are cards between the hosts, they do.) Needs root::

    python examples/vxlan.py
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import virtnet as vn

VNI = 42
#: A datagram on a network of 1500 bytes has room for so much, less an inner Ethernet header.
MTU = 1450


def host(stack: ExitStack) -> int:
    """A network namespace that lasts as long as the process, whose number is returned, which holds it."""
    program = ["unshare", "--net", "sh", "-c", "echo here; exec sleep 600"]
    holder = stack.enter_context(subprocess.Popen(program, stdout=subprocess.PIPE))
    stack.callback(holder.kill)
    if holder.stdout is None or not holder.stdout.readline():
        sys.exit("namespaces cannot be made here: run this as root")
    return holder.pid


def run(inside: int, words: str) -> str:
    """Runs a program in a namespace."""
    command = ["nsenter", f"--net=/proc/{inside}/ns/net", *words.split()]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Builds both hosts and has them ping."""
    with ExitStack() as stack:
        left, right = host(stack), host(stack)
        run(left, f"ip link add road type veth peer name road netns {right}")
        for pid, number in ((left, 1), (right, 2)):
            run(pid, f"ip addr add 192.0.2.{number}/24 dev road")
            run(pid, "ip link set road up")
        run(right, f"ip link add tunnel type vxlan id {VNI} dstport 4789 local 192.0.2.2 remote 192.0.2.1")
        run(right, f"ip link set tunnel mtu {MTU} up")
        run(right, "ip addr add 10.0.0.2/24 dev tunnel")

        net = stack.enter_context(vn.Net())
        station = net.tap("station", mtu=MTU, netns=f"pid:{left}")
        tunnel = net.vxlan("192.0.2.1", vni=VNI, remotes=["192.0.2.2"], netns=f"pid:{left}")
        station >> net.switch() << tunnel
        run(left, "ip addr add 10.0.0.1/24 dev station")

        print(run(left, "ping -c 5 -i 0.2 -W 5 10.0.0.2"))
        print(tunnel.explain())
        print(net.stats().balance())


if __name__ == "__main__":
    main()
