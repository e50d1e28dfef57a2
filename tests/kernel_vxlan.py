"""Linux's own VXLAN at the far end: two hosts in network namespaces, one of them with our tap and our VXLAN port.

To be run in a network namespace of its own, as root there, which is the left host. Pings and TCP pass in both
directions, and what was counted is printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import virtnet as vn

UNDERLAY = {4: ("192.0.2.1", "192.0.2.2", 24, 1450), 6: ("2001:db8::1", "2001:db8::2", 64, 1430)}


def run(words: str, *, inside: int | None = None) -> str:
    enter = ["nsenter", f"--net=/proc/{inside}/ns/net"] if inside else []
    done = subprocess.run([*enter, *words.split()], check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def until_it_works(words: str, *, inside: int | None = None) -> None:
    enter = ["nsenter", f"--net=/proc/{inside}/ns/net"] if inside else []
    deadline = time.monotonic() + 20
    while subprocess.run([*enter, *words.split()], check=False, capture_output=True).returncode:
        if time.monotonic() > deadline:
            sys.exit(f"never: {words}")
        time.sleep(0.1)


def attempt(words: str) -> dict:
    return json.loads(subprocess.run(words.split(), check=False, capture_output=True, text=True).stdout)


def iperf3(server: int, address: str, *options: str) -> int:
    """Bytes that have arrived over TCP at, or with ``-R`` from, the other end."""
    enter = ["nsenter", f"--net=/proc/{server}/ns/net"]
    with subprocess.Popen([*enter, "iperf3", "-s", "-1"], stdout=subprocess.DEVNULL) as serving:
        try:
            deadline = time.monotonic() + 20
            while "error" in (told := attempt(f"iperf3 -J -c {address} -n 8M {' '.join(options)}")):
                if time.monotonic() > deadline:
                    sys.exit(f"iperf3: {told}")
                time.sleep(0.1)  # the server does not listen yet
        finally:
            serving.kill()
    return told["end"]["sum_received"]["bytes"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ip", type=int, choices=[4, 6], default=4)
    parser.add_argument("--source-ports", type=int, default=16)
    options = parser.parse_args()
    ours, theirs, prefix, mtu = UNDERLAY[options.ip]
    holder = ["unshare", "--net", "sh", "-c", "echo here; exec sleep 600"]
    with subprocess.Popen(holder, stdout=subprocess.PIPE) as far:
        try:
            assert far.stdout
            far.stdout.readline()
            run("ip link set lo up")
            run(f"ip link add road type veth peer name road netns {far.pid}")
            for address, inside in ((ours, None), (theirs, far.pid)):
                nodad = " nodad" if options.ip == 6 else ""
                run(f"ip addr add {address}/{prefix} dev road{nodad}", inside=inside)
                run("ip link set road up", inside=inside)
            # Or the far kernel leaves checksums inside its tunnel to a card that is none.
            run("ethtool -K road tx off", inside=far.pid)
            until_it_works(f"ping -c 1 -W 1 {theirs}")
            tunnel = f"ip link add tunnel type vxlan id 42 dstport 4789 local {theirs} remote {ours}"
            run(tunnel, inside=far.pid)
            run(f"ip link set tunnel mtu {mtu} up", inside=far.pid)
            run("ip addr add 10.0.0.2/24 dev tunnel", inside=far.pid)
            with vn.Net() as net:
                vxlan = net.vxlan(ours, vni=42, remotes=[theirs], source_ports=options.source_ports, name="vxlan")
                net.tap("station", mtu=mtu, name="tap") >> net.switch() << vxlan
                run("ip addr add 10.0.0.1/24 dev station")
                until_it_works("ping -c 1 -W 1 10.0.0.2")
                told = {
                    "pings": run("ping -c 10 -i 0.05 -W 5 -M do -s 1400 10.0.0.2"),
                    "there": iperf3(far.pid, "10.0.0.2", "-P", "4"),
                    "back": iperf3(far.pid, "10.0.0.2", "-R"),
                }
                # As long as the tunnel's MTU, and not a byte longer.
                told["longest"] = run(f"ping -c 1 -W 5 -M do -s {mtu - 28} 10.0.0.2")
                told |= {"explained": str(vxlan.explain())}
                deadline = time.monotonic() + 10
                while not net.stats().balance().exact and time.monotonic() < deadline:
                    time.sleep(0.05)
                told |= net.stats().to_dict()
        finally:
            far.kill()
    sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
