"""Switches with VLANs do with the same frames what Open vSwitch does: who gets them, with which tag."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import virtnet as vn
from helpers import BROADCAST, eventually, mac

pytestmark = [pytest.mark.peer, pytest.mark.timeout(240)]

#: What each port is: to Open vSwitch, and to a switch of ours.
PORTS = [
    (["tag=10"], {"access": 10}),
    (["tag=10"], {"access": 10}),
    (["tag=20"], {"access": 20}),
    (["trunks=10,20,30", "vlan_mode=trunk"], {"trunk": [10, 20, 30]}),
    (["tag=20", "trunks=10,20", "vlan_mode=native-untagged"], {"trunk": [10], "native": 20}),
]

STATIONS = 6


def frames(n: int) -> list[tuple[int, bytes]]:
    """Frames of stations that stay where they are, with every tag that makes sense there and some that do not."""
    chance = random.Random(8021)  # noqa: S311 - the same frames every time
    found = []
    for _ in range(n):
        sender = chance.randrange(STATIONS)
        port = sender % len(PORTS)
        to = BROADCAST if chance.random() < 0.3 else mac(1 + chance.randrange(STATIONS))
        tag = b""
        if port >= 3 and chance.random() < 0.8:
            vlan = chance.choice([10, 20, 30, 40])
            tag = b"\x81\x00" + (vlan | chance.choice([0, 3, 7]) << 13).to_bytes(2, "big")
        size = chance.choice([60, 180, 189, 193, 1400])
        found.append((port, (to + mac(1 + sender) + tag + b"\x88\xb5").ljust(size, b"v")))
    return found


def ours(sent: list[tuple[int, bytes]]) -> list[dict[int, list[str]]]:
    """What a switch of ours makes of them."""
    out = []
    with vn.Net() as net:
        nodes = [net.memory(f"p{n}") for n in range(len(PORTS))]
        net.switch(name="switch", cables={node: table for node, (_, table) in zip(nodes, PORTS, strict=True)})
        for node in nodes:
            node >> net["switch"]
        for n, (port, frame) in enumerate(sent):
            nodes[port].end.tx([frame])

            def settled(n: int = n) -> bool:
                balance = net.stats().balance()
                return balance.received > n and balance.exact

            assert eventually(settled)
            bursts = {k: [bytes(got).hex() for got in node.end.rx()] for k, node in enumerate(nodes)}
            out.append({k: got for k, got in bursts.items() if got})
    return out


def test_open_vswitch_does_the_same(sockets):
    if os.geteuid() or not shutil.which("ovs-vswitchd") or not shutil.which("ovsdb-tool"):
        pytest.skip("needs root and Open vSwitch (Debian: apt install openvswitch-switch)")
    if subprocess.run(["unshare", "--net", "true"], check=False).returncode:
        pytest.skip("network namespaces cannot be made here")
    sent = frames(120)
    wanted = {"ports": [words for words, _ in PORTS], "frames": [[port, frame.hex()] for port, frame in sent]}
    script = Path(__file__).parent / "ovs_vlans.py"
    command = ["unshare", "--net", sys.executable, str(script), str(sockets)]
    done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    theirs = [{int(port): got for port, got in one.items()} for one in json.loads(done.stdout)]
    assert sum(bool(one) for one in theirs) > 40
    for n, (expected, own) in enumerate(zip(theirs, ours(sent), strict=True)):
        assert own == expected, (n, sent[n])
