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

if TYPE_CHECKING:
    from virtnet.nodes import PortNode

#: What a port of the driver does, by the name of the driver's mode in ``cells``.
SENDS = {"txonly": True, "flowgen": True, "rxonly": False}


def main() -> None:
    """Attach, say so, and do as told."""
    options = _options()
    net = vn.Net(cpus=[options.cpu], poll="busy")
    n = len(options.sockets)
    packets = [frames.between(number, n, options.size, stations=options.stations) for number in range(n)]
    with net:
        ports = [
            net.virtio_user(socket, ring=options.ring, in_order=options.in_order, queue_pairs=options.queue_pairs)
            for socket in options.sockets
        ]
        ends = [port >> net.sink() for port in ports]
        for port in ports:
            if not port.wait_connected(10):
                sys.exit(f"nobody serves {port.spec.where}")
        print(json.dumps({"attached": n}), flush=True)
        for line in sys.stdin:
            word = line.strip()
            if word in {"begin", "calm"}:
                sends = word == "begin" and SENDS[options.mode]
                with net.change():
                    for number, port in enumerate(ports):
                        ends[number].remove()
                        ends[number] = port >> (net.source(packets[number]) if sends else net.sink())
            print(json.dumps(_counters(net, ports)), flush=True)


def _counters(net: vn.Net, ports: list[PortNode]) -> dict[str, float]:
    stats = net.stats()
    own = [stats.ports[port.name] for port in ports]
    return {
        "at": time.monotonic(),
        "received": sum(port.received for port in own),
        "sent": sum(port.sent for port in own),
        "received_bytes": sum(port.received_bytes for port in own),
        "sent_bytes": sum(port.sent_bytes for port in own),
        "lost": stats.balance().dropped,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    add = parser.add_argument
    add("mode", choices=SENDS)
    add("sockets", nargs="+")
    add("--ring", choices=["split", "packed"], default="split")
    add("--in-order", action=argparse.BooleanOptionalAction, default=True)
    add("--size", type=int, default=64)
    add("--stations", type=int, default=1, help="addresses behind each port")
    add("--queue-pairs", type=int, default=1)
    add("--cpu", type=int, default=min(os.sched_getaffinity(0)))
    return parser.parse_args()


if __name__ == "__main__":
    main()
