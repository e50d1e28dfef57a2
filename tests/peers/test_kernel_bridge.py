"""Switches send frames where the kernel's bridge does, frame by frame."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import virtnet as vn
from helpers import BROADCAST, eventually, mac

pytestmark = [pytest.mark.peer, pytest.mark.timeout(120), pytest.mark.usefixtures("nothing_left")]

PORTS = ("p0", "p1", "p2", "p3")

#: What is sent to all bridges of a link, not beyond it. Source: IEEE 802.1Q-2022, table 8-1
#: The first is for spanning trees, and passed on where there is none.
RESERVED = [bytes.fromhex(f"0180c20000{n:02x}") for n in range(16)]


PASSED_ON = "no switch of ours has a protocol of its own that these would be for: it passes them on, as a cable does"
NOT_CHECKED = (
    "no single station has such an address: ours only looks where a frame is to go, and leaves that to the receiver"
)


@dataclass(frozen=True)
class Sent:
    """A frame and the port that it is sent to; where ours differs from the kernel's bridge, how and why."""

    what: str
    port: str
    to: bytes
    source: bytes
    payload: bytes = b"what is sent"
    kind: bytes = b"\x88\xb5"
    differs: str = ""

    @property
    def frame(self) -> bytes:
        return (self.to + self.source + self.kind + self.payload).ljust(60, b"\0")


FRAMES = [
    Sent("to nobody who was heard of", "p0", mac(9), mac(1)),
    Sent("to somebody who was", "p1", mac(1), mac(2)),
    Sent("and back", "p0", mac(2), mac(1)),
    Sent("to everybody", "p2", BROADCAST, mac(3)),
    Sent("to a group", "p2", bytes.fromhex("01005e010203"), mac(3)),
    Sent("to a group of IPv6", "p2", bytes.fromhex("333300000101"), mac(3)),
    Sent("long", "p0", mac(3), mac(1), bytes(range(250)) * 6),
    Sent("of a kind that is a length", "p0", mac(2), mac(1), kind=b"\0\x20"),
    Sent("with a tag", "p0", mac(2), mac(1), kind=b"\x81\x00\x20\x0a\x88\xb5"),
    Sent("with two tags", "p0", mac(2), mac(1), kind=b"\x88\xa8\x00\x14\x81\x00\x20\x0a\x88\xb5"),
    Sent("from behind the port that its receiver is at", "p0", mac(1), mac(4)),
    Sent("a station that has moved", "p3", mac(3), mac(1)),
    Sent("is found where it is now", "p1", mac(1), mac(2)),
    Sent("and not where it was", "p0", mac(1), mac(4)),
    Sent("to itself", "p0", mac(4), mac(4)),
    Sent("to all zeros", "p0", bytes(6), mac(4)),
    Sent("beyond what is reserved", "p0", bytes.fromhex("0180c2000010"), mac(4)),
    Sent("to all routers of a link", "p0", bytes.fromhex("0180c2000021"), mac(4)),
    Sent("from a group", "p0", mac(2), bytes.fromhex("01005e000001"), differs=NOT_CHECKED),
    Sent("from everybody", "p0", mac(2), BROADCAST, differs=NOT_CHECKED),
    Sent("from nobody", "p0", mac(2), bytes(6), differs=NOT_CHECKED),
    Sent("to whom nobody is", "p1", bytes.fromhex("01005e000001"), mac(2)),
    Sent("for spanning trees", "p0", RESERVED[0], mac(4)),
    *(Sent(f"reserved, {to.hex(':')}", "p0", to, mac(4), differs=PASSED_ON) for to in RESERVED[1:]),
]

Out = set[tuple[str, bytes]]


def kernels(ports: dict[str, bool], frames: list[Sent]) -> list[Out]:
    """What the kernel makes of them; skips where it cannot be asked."""
    if os.geteuid():
        pytest.skip("needs root")
    probe = "ip link add bridge type bridge && ip link add here type veth peer name there"
    if subprocess.run(["unshare", "--net", "sh", "-c", probe], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here, or not with bridges")
    wanted = {"ports": ports, "frames": [[one.port, one.frame.hex()] for one in frames]}
    command = ["unshare", "--net", sys.executable, str(Path(__file__).with_name("kernel_bridge.py"))]
    done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found = [[(port, bytes.fromhex(frame)) for port, frame in out] for out in json.loads(done.stdout)]
    assert all(len(set(out)) == len(out) for out in found)
    return [set(out) for out in found]


def ours(ports: dict[str, bool], frames: list[Sent]) -> list[Out]:
    """What a switch of ours makes of them."""
    found = []
    with vn.Net() as net:
        there = {name: net.memory(name) for name in ports}
        switch = net.switch(cables={name: {"isolated": True} for name, isolated in ports.items() if isolated})
        for port in there.values():
            port >> switch
        for n, one in enumerate(frames, 1):
            there[one.port].end.tx([one.frame])
            assert eventually(lambda n=n: net.stats().balance().received == n and net.stats().balance().exact)
            out = [(name, bytes(got)) for name, port in there.items() for got in port.end.rx()]
            assert len(set(out)) == len(out)
            found.append(set(out))
    return found


def compare(ports: dict[str, bool], frames: list[Sent]) -> None:
    theirs = kernels(ports, frames)
    wrong = []
    for one, expected, found in zip(frames, theirs, ours(ports, frames), strict=True):
        if (expected != found) != bool(one.differs):
            names = [sorted(port for port, _ in out) for out in (expected, found)]
            wrong.append(f"{one.what}: the kernel sends it to {names[0]}, ours to {names[1]}")
    assert not wrong, "\n".join(wrong)


def test_frames_leave_where_the_kernels_bridge_sends_them():
    compare(dict.fromkeys(PORTS, False), FRAMES)


def test_ports_that_are_kept_apart_are_kept_apart_as_by_the_kernel():
    compare(
        {"p0": True, "p1": True, "p2": False, "p3": False},
        [
            Sent("to everybody, from one kept apart", "p0", BROADCAST, mac(1)),
            Sent("to everybody, from another", "p1", BROADCAST, mac(2)),
            Sent("from one kept apart to another", "p0", mac(2), mac(1)),
            Sent("to nobody who was heard of", "p1", mac(9), mac(2)),
            Sent("to everybody, from one that is not", "p2", BROADCAST, mac(3)),
            Sent("from one that is not to one kept apart", "p2", mac(1), mac(3)),
            Sent("and back", "p0", mac(3), mac(1)),
            Sent("among those that are not", "p3", mac(3), mac(4)),
            Sent("to a group, from one kept apart", "p1", bytes.fromhex("01005e010203"), mac(2)),
        ],
    )
