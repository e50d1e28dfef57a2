"""virtnet as the driver of a benchmark: sources and sinks behind virtio-user ports, in a process of their own.

``python -m benchmarks.load MODE SOCKET...`` attaches to one back-end per socket and moves packets as a guest would. It
answers its counters as a line of JSON to each word it reads: ``begin`` has it send, if the mode is one that does,
``calm`` has it only receive again, ``read`` changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import TYPE_CHECKING

import virtnet as vn
from benchmarks import frames
from virtnet.kinds import FRAME_USUAL, SOURCE_PACKETS_MAX

if TYPE_CHECKING:
    from virtnet.nodes import Function

#: What a port of the driver does, by the name of the driver's mode in ``cells``.
SENDS = {"txonly": True, "flowgen": True, "rxonly": False}


#: Frames are finished and short of nothing: neither back-end is asked to do more than move them.
OFFLOADS = vn.NetFeature.CSUM | vn.NetFeature.GUEST_CSUM


class Load:
    """The ports of a driver, each joined to a sink until it is to send."""

    def __init__(self, net: vn.Net, options: argparse.Namespace) -> None:
        """Attach to the back-ends."""
        self.net = net
        rings = {"ring": options.ring, "in_order": options.in_order, "in_flight": options.in_flight}
        self.ports = [net.virtio_user(socket, **rings, without=OFFLOADS) for socket in options.sockets]
        self.ends = [port >> net.sink() for port in self.ports]
        for port in self.ports:
            if not port.wait_connected(10):
                sys.exit(f"nobody serves {port.spec.where}")

    def plug(self, number: int, end: Function) -> None:
        """Join a port to another function, without losing a packet."""
        with self.net.change():
            self.ends[number].remove()
            self.ends[number] = self.ports[number] >> end

    def teach(self, stations: int) -> None:
        """Send a packet from each of many addresses behind each port, a source's worth at a time."""
        for number, port in enumerate(self.ports):
            everybody = frames.between(number, len(self.ports), FRAME_USUAL, stations=stations)
            for first in range(0, stations, SOURCE_PACKETS_MAX):
                some = everybody[first : first + SOURCE_PACKETS_MAX]
                sent = port.stats().sent + len(some)
                self.plug(number, self.net.source(some, count=len(some)))
                while port.stats().sent < sent:
                    time.sleep(0.001)
            self.plug(number, self.net.sink())

    def counters(self) -> dict[str, float]:
        """What the ports have counted so far."""
        stats = self.net.stats()
        own = [stats.ports[port.name] for port in self.ports]
        return {
            "at": time.monotonic(),
            "received": sum(port.received for port in own),
            "sent": sum(port.sent for port in own),
            "received_bytes": sum(port.received_bytes for port in own),
            "sent_bytes": sum(port.sent_bytes for port in own),
            "lost": stats.balance().dropped,
        }


def main() -> None:
    """Attach, say so, and do as told."""
    options = _options()
    n = len(options.sockets)
    packets = [frames.between(number, n, options.size, stations=options.stations) for number in range(n)]
    with vn.Net(cpus=[options.cpu], poll="busy") as net:
        load = Load(net, options)
        print(json.dumps({"attached": n}), flush=True)
        for line in sys.stdin:
            word = line.strip()
            if word == "begin":
                load.teach(options.learnt)
            if word in {"begin", "calm"}:
                for number in range(n):
                    sends = word == "begin" and SENDS[options.mode]
                    load.plug(number, net.source(packets[number]) if sends else net.sink())
            print(json.dumps(load.counters()), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    add = parser.add_argument
    add("mode", choices=SENDS)
    add("sockets", nargs="+")
    add("--ring", choices=["split", "packed"], default="split")
    add("--in-order", action=argparse.BooleanOptionalAction, default=True)
    add("--in-flight", action="store_true", help="have the back-end record what is in flight")
    add("--size", type=int, default=64)
    add("--stations", type=int, default=1, help="addresses behind each port")
    add("--learnt", type=int, default=0, help="addresses to make known behind each port before")
    add("--cpu", type=int, default=min(os.sched_getaffinity(0)))
    return parser.parse_args()


if __name__ == "__main__":
    main()
