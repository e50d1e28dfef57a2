"""Two hosts, each behind a veth pair, and between the pairs a network of ours: ping and iperf3 go through it.

To be run in a network namespace of its own, as root of the machine there. Prints what was counted as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import virtnet as vn

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("left", "right")


def run(words: str, *, inside: int | None = None) -> str:
    enter = ["nsenter", f"--net=/proc/{inside}/ns/net"] if inside else []
    return subprocess.run([*enter, *words.split()], check=True, capture_output=True, text=True).stdout


def is_attached(name: str) -> bool:
    return "prog/xdp" in run(f"ip -d link show {name}")


@contextlib.contextmanager
def host(name: str, number: int, queues: int) -> Iterator[int]:
    """A namespace with one end of a veth pair, of which the other is ours; the process that keeps it."""
    ends = f"numrxqueues {queues} numtxqueues {queues}"
    run(f"ip link add {name} {ends} type veth peer name {name}-host {ends}")
    # What arrives by AF_XDP has to have its checksums.
    run(f"ethtool -K {name}-host tx off")
    command = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdin
        assert keeper.stdout
        keeper.stdout.readline()
        run(f"ip link set {name}-host netns {keeper.pid}")
        for words in ("link set lo up", f"addr add 10.7.0.{number}/24 dev {name}-host", f"link set {name}-host up"):
            run(f"ip {words}", inside=keeper.pid)
        run(f"ip link set {name} up")
        yield keeper.pid
        keeper.stdin.close()


def build(net: vn.Net, options: argparse.Namespace, folder: Path) -> None:
    """Both uplinks, and between them a switch, or a device and the driver at its other end."""
    # The name stands behind the kind, options behind the name.
    parts = [(name, *text.partition(",")) for name, text in zip(NAMES, options.ports, strict=True)]
    left, right = (net.port(f"{kind}:{name}{comma}{rest}", name=name) for name, kind, comma, rest in parts)
    if options.rings:
        left >> net.vhost_user(folder / "s", name="device")
        net.virtio_user(folder / "s", name="driver") >> right
        return
    left >> net.switch() << right


def flap(until: threading.Event) -> None:
    """Takes an uplink down and up again and again."""
    while not until.wait(0.3):
        run("ip link set left down")
        run("ip link set left up")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("ports", nargs=2, help="kind of port, with options behind a comma")
    parser.add_argument("--rings", action="store_true")
    parser.add_argument("--queues", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--flap", action="store_true")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    workers = {"cpus": [cpus[k % len(cpus)] for k in range(options.workers)]} if options.workers > 1 else {}
    with contextlib.ExitStack() as stack:
        near, far = (stack.enter_context(host(name, k + 1, options.queues)) for k, name in enumerate(NAMES))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with vn.Net(**workers) as net:
            build(net, options, folder)
            if options.rings:
                assert net["driver"].wait_connected(10)
            deadline = time.monotonic() + 20
            while not all(net[name].stats().connected for name in NAMES):
                assert time.monotonic() < deadline, "no link"
                time.sleep(0.01)
            run("ping -c 3 -i 0.05 -W 5 10.7.0.2", inside=near)
            serve = ["nsenter", f"--net=/proc/{far}/ns/net", "iperf3", "-s", "-1", "--forceflush"]
            with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout
                while "listening" not in server.stdout.readline():
                    pass
                over = threading.Event()
                flapping = threading.Thread(target=flap, args=(over,))
                if options.flap:
                    flapping.start()
                try:
                    words = f"iperf3 -c 10.7.0.2 -t 2 -J -P {options.streams}"
                    report = json.loads(run(words, inside=near))
                finally:
                    over.set()
                    if options.flap:
                        flapping.join()
                server.stdout.read()
            events = [event.kind for event in net["left"].events]
            attached = [is_attached(name) for name in NAMES]
            time.sleep(0.2)
            stats = net.stats()
        told = stats.to_dict() | {
            "bits_per_second": report["end"]["sum_received"]["bits_per_second"],
            "attached": attached,
            "left_behind": [is_attached(name) for name in NAMES],
            "events": events,
        }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
