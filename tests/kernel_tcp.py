"""Two network stacks, a tap in each, and between the taps a vhost-user port and the driver at its other end.

To be run in a network namespace of its own, as root there. Sends some megabytes of TCP from one stack to the other and
back, and prints what was counted as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import virtnet as vn

SIZE = 8 << 20

#: Sends all that it receives back when the sender is through.
FAR_SIDE = """
import socket, sys
print("there", flush=True)
sys.stdin.readline()
with socket.create_server(("10.9.0.2", 7)) as server:
    print("listens", flush=True)
    peer, _ = server.accept()
    with peer:
        data = b""
        while piece := peer.recv(1 << 20):
            data += piece
        peer.sendall(data)
"""


def ip(words: str, *, inside: int | None = None) -> None:
    enter = ["nsenter", f"--net=/proc/{inside}/ns/net"] if inside else []
    subprocess.run([*enter, "ip", *words.split()], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device-without", default="")
    parser.add_argument("--ring", default="split")
    parser.add_argument("--ends", choices=["tap", "af-packet", "af-xdp"], default="tap")
    parser.add_argument("--workers", type=int, default=1, help="so many, and queues of taps")
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    cpus = [cpus[i % len(cpus)] for i in range(options.workers)] if options.workers > 1 else []
    with tempfile.TemporaryDirectory() as directory, vn.Net(cpus=cpus) as net:
        place = Path(directory) / "s"
        without = f",without={options.device_without}" if options.device_without else ""
        if options.ends != "tap":
            for name in ("near", "far"):
                ip(f"link add {name}0 type veth peer name {name}1")
                ip(f"link set {name}1 up")
                if options.ends == "af-xdp":
                    # What is received there has to have its checksums.
                    subprocess.run(["ethtool", "-K", f"{name}0", "tx", "off"], check=True, stdout=subprocess.DEVNULL)
        near, far_end = (
            net.tap(f"{name}0", queue_pairs=options.workers, name=name)
            if options.ends == "tap"
            else net.port(f"{options.ends}:{name}1", name=name)
            for name in ("near", "far")
        )
        pairs = f",queue_pairs={options.workers}"
        near >> net.port(f"vhost-user:{place}{without}{pairs}", name="device")
        net.port(f"virtio-user:{place},ring={options.ring}{pairs}", name="driver") >> far_end
        far = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-c", FAR_SIDE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with far:
            assert far.stdin
            assert far.stdout
            far.stdout.readline()
            ip(f"link set far0 netns {far.pid}")
            for name, number, inside in (("near0", 1, None), ("far0", 2, far.pid)):
                ip("link set lo up", inside=inside)
                ip(f"addr add 10.9.0.{number}/24 dev {name}", inside=inside)
                ip(f"link set {name} up", inside=inside)
            far.stdin.write("\n")
            far.stdin.flush()
            far.stdout.readline()
            net["driver"].wait_connected(5)
            sent = random.Random(1).randbytes(SIZE)  # noqa: S311 - the same bytes every time are what is wanted
            with socket.create_connection(("10.9.0.2", 7), timeout=20) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                digest = hashlib.sha256()
                while piece := connection.recv(1 << 20):
                    digest.update(piece)
        time.sleep(0.1)
        followed = [net[name].stats().connected for name in ("near", "far")]
        stats = net.stats()
    near = stats.ports["near"]
    told = stats.to_dict() | {
        "intact": digest.digest() == hashlib.sha256(sent).digest(),
        "connected": followed,
        "bytes_a_packet": near.received_bytes / near.received,
    }
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
