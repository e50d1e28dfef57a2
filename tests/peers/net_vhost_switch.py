"""DPDK's vhost library behind the face of ``virtnet switch``: the same ports, the same report, for two ports.

The tests of this folder run against it through ``VIRTNET_BACKEND`` (see ``backend.py``). What fails here too is no
fault of virtnet's. It is testpmd with two ``net_vhost`` ports, passing on whatever comes, so a wire rather than a
switch, and it polls: one core is busy as long as it runs. What testpmd says goes into a log beside the first socket. By
hand::

    python tests/peers/net_vhost_switch.py vhost-user:vm1.sock vhost-user:vm2.sock --seconds 60
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

#: Bits of virtio's feature word by name; those a data path cares about.
FEATURES = {
    0: "csum", 1: "guest_csum", 3: "mtu", 7: "guest_tso4", 8: "guest_tso6", 9: "guest_ecn", 10: "guest_ufo",
    11: "host_tso4", 12: "host_tso6", 13: "host_ecn", 14: "host_ufo", 15: "mrg_rxbuf", 17: "ctrl_vq", 18: "ctrl_rx",
    21: "guest_announce", 22: "mq", 27: "any_layout", 28: "indirect_desc", 29: "event_idx", 32: "version_1",
    34: "ring_packed", 35: "in_order",
}  # fmt: skip


def main() -> int:
    """Runs testpmd until told to end, and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ports", nargs=2, metavar="PORT")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    ports = [parse_port(text) for text in options.ports]

    end_at = time.monotonic() + options.seconds
    asked_to_end = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked_to_end.append(True))
    with Path(ports[0][0]).with_suffix(".testpmd.log").open("w+b") as log:
        process = subprocess.Popen(
            command(ports), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=False
        )
        try:
            while not asked_to_end and process.poll() is None and time.monotonic() < end_at:
                time.sleep(0.02)
            with contextlib.suppress(BrokenPipeError):
                process.communicate(b"stop\nquit\n", timeout=10)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        printed = log.read().decode(errors="replace")
    report = {
        "ports": {Path(path).stem: port_report(printed, number, path) for number, (path, _) in enumerate(ports)},
        "network_drops": {},
    }
    sys.stdout.write(json.dumps(report) + "\n")
    return process.returncode


def parse_port(text: str) -> tuple[str, dict[str, str]]:
    """Splits ``vhost-user:PATH,name=value`` into the path and the options; a stale socket is taken away."""
    kind, _, rest = text.partition(":")
    if kind != "vhost-user":
        raise SystemExit(f"only vhost-user ports here, not {text!r}")
    path, *options = rest.split(",")
    named = dict(option.split("=", 1) for option in options)
    if named.get("client") != "on":
        Path(path).unlink(missing_ok=True)
    return path, named


def command(ports: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Returns testpmd's command line."""
    queues = max(int(options.get("queue_pairs", "1")) for _, options in ports)
    devices = []
    for number, (path, options) in enumerate(ports):
        client = int(options.get("client") == "on")
        devices += ["--vdev", f"net_vhost{number},iface={path},queues={queues},client={client}"]
    return [
        "setpriv", "--pdeathsig", "KILL", "dpdk-testpmd",
        "--no-huge", "-m", "256", "--no-pci", "--file-prefix", f"net-vhost-switch-{os.getpid()}", "--lcores", "0,1",
        *devices, "--", "-i", "--auto-start", "--forward-mode=io", f"--rxq={queues}", f"--txq={queues}", "--nb-cores=1",
        "--total-num-mbufs=8192",
    ]  # fmt: skip


def port_report(printed: str, number: int, path: str) -> dict[str, object]:
    """Reads a port's forwarding statistics and the features of its last session from what testpmd printed."""
    counted = re.findall(rf"Forward statistics for port {number} +-+\n(.*?)\n +-----", printed, re.DOTALL)
    text = counted[-1] if counted else ""
    words = re.findall(rf"\({re.escape(path)}\) negotiated Virtio features: 0x([0-9a-f]+)", printed)
    word = int(words[-1], 16) if words else 0
    features = [name for bit, name in FEATURES.items() if word >> bit & 1]
    return {
        "received": counter(text, "RX-packets"),
        "sent": counter(text, "TX-packets"),
        "drops": {"not_received": counter(text, "RX-dropped"), "not_sent": counter(text, "TX-dropped")},
        "features": features,
        "ring": "packed" if "ring_packed" in features else "split",
    }


def counter(text: str, name: str) -> int:
    """Returns one number of testpmd's table."""
    found = re.search(rf"{name}: (\d+)", text)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    sys.exit(main())
