"""Firewalls judge packets as the kernel's does with its connection tracking: nftables in a network namespace."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import virtnet as vn
from helpers import eventually

pytestmark = [pytest.mark.peer, pytest.mark.timeout(180)]

ROUTER, HOST = bytes.fromhex("0200000000fe"), bytes.fromhex("020000000001")
OUTSIDE, INSIDE = bytes([192, 0, 2, 1]), bytes([10, 0, 0, 1])
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


def checksum(data: bytes) -> bytes:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def ip(side: int, protocol: int, above: bytes, *, identification: int = 1, fragment: int = 0) -> tuple[int, bytes]:
    """A packet from one side to the other."""
    source, destination = (OUTSIDE, INSIDE) if side == 0 else (INSIDE, OUTSIDE)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(above), identification, fragment, 64, protocol, 0)
    head += source + destination
    head = head[:10] + checksum(head) + head[12:]
    return side, (ROUTER + HOST + b"\x08\x00" + head + above)


def above(side: int, protocol: int, segment: bytes, at: int) -> bytes:
    source, destination = (OUTSIDE, INSIDE) if side == 0 else (INSIDE, OUTSIDE)
    pseudo = source + destination + struct.pack("!BBH", 0, protocol, len(segment))
    return segment[:at] + checksum(pseudo + segment) + segment[at + 2 :]


def tcp(
    side: int, flags: int, sequence: int, acknowledged: int = 0, size: int = 0, *, port: int = 4000, window: int = 500
) -> tuple[int, bytes]:
    ports = (80, port) if side == 0 else (port, 80)
    options = b"\x01\x03\x03\x07" if flags & SYN else b""
    words = (sequence & 0xFFFFFFFF, acknowledged & 0xFFFFFFFF)
    segment = struct.pack("!HHIIBBHHH", *ports, *words, (5 + len(options) // 4) << 4, flags, window, 0, 0)
    return ip(side, 6, above(side, 6, segment + options + bytes(size), 16))


def udp(side: int, far: int, near: int) -> tuple[int, bytes]:
    ports = (far, near) if side == 0 else (near, far)
    return ip(side, 17, above(side, 17, struct.pack("!HHHH", *ports, 12, 0) + b"text", 6))


def icmp(side: int, kind: int, code: int, rest: bytes, data: bytes) -> tuple[int, bytes]:
    message = bytes([kind, code, 0, 0]) + rest + data
    return ip(side, 1, message[:2] + checksum(message) + message[4:])


def error_about(side: int, packet: tuple[int, bytes]) -> tuple[int, bytes]:
    """That the port is not there."""
    return icmp(side, 3, 3, bytes(4), packet[1][14 : 14 + 28])


def opened(port: int, ours: int = 1_000, theirs: int = 900_000) -> list[tuple[int, bytes]]:
    return [
        tcp(1, SYN, ours, port=port),
        tcp(0, SYN | ACK, theirs, ours + 1, port=port),
        tcp(1, ACK, ours + 1, theirs + 1, port=port),
    ]


A, B = 1_001, 900_001
PACKETS = [
    # Nobody asked; nothing began.
    tcp(0, SYN, 5),
    tcp(0, ACK, 5, 5, 10),
    tcp(1, ACK, 5, 5, 10),
    udp(0, 53, 999),
    icmp(0, 8, 0, b"\0\1\0\1", b"ping"),
    icmp(0, 0, 0, b"\0\1\0\1", b"ping"),
    # Flows without connections.
    udp(1, 53, 999),
    udp(0, 53, 999),
    udp(0, 54, 999),
    udp(0, 53, 998),
    icmp(1, 8, 0, b"\0\1\0\1", b"ping"),
    icmp(0, 0, 0, b"\0\1\0\1", b"ping"),
    icmp(0, 0, 0, b"\0\2\0\1", b"ping"),
    icmp(0, 8, 0, b"\0\1\0\1", b"ping"),
    # Errors about them, and about nothing.
    udp(1, 55, 777),
    error_about(0, udp(1, 55, 777)),
    error_about(0, udp(1, 55, 778)),
    error_about(0, udp(0, 55, 777)),
    # A connection: data both ways, once more, ahead of the window, never sent. (The kernel lets pass what is a little
    # ahead, and what is much too old, without believing it.)
    *opened(4000),
    tcp(1, ACK | PSH, A, B, 100),
    tcp(0, ACK, B, A + 100, 1_400),
    tcp(0, ACK, B, A + 100, 1_400),
    tcp(1, ACK, A + 100, B + 1_400),
    tcp(0, ACK, B + 1_400 + (2_000 << 7), A + 100, 10),
    tcp(0, ACK, B + 1_400 + 2**31 - 9, A + 100, 10),
    tcp(1, ACK, A + 100 + (2_000 << 7), B + 1_400, 10),
    tcp(0, ACK, B + 1_400, A + 200),
    tcp(0, RST, B + 5_000_000),
    tcp(1, ACK, A + 100, B + 1_400, 50),
    tcp(0, ACK, B + 1_400, A + 150, 50),
    # Its end, and the same ports again.
    tcp(0, FIN | ACK, B + 1_450, A + 150),
    tcp(1, ACK, A + 150, B + 1_451),
    tcp(1, FIN | ACK, A + 150, B + 1_451),
    tcp(0, ACK, B + 1_451, A + 151),
    *opened(4000, 70_000_000, 80_000_000),
    # Refused.
    tcp(1, SYN, 5_000, port=4001),
    tcp(0, RST | ACK, 0, 5_001, port=4001),
    # Broken off.
    *opened(4002),
    tcp(1, RST, A, port=4002),
    # Agreed to, but to what was not asked.
    tcp(1, SYN, 5_000, port=4003),
    tcp(0, SYN | ACK, 7_000, 999_999, port=4003),
    tcp(0, SYN | ACK, 7_000, 5_001, port=4003),
    # Errors about a connection.
    error_about(0, tcp(1, ACK, 70_000_001, 80_000_001)),
    error_about(0, tcp(1, ACK, 1, 1, port=4999)),
    # Nonsense.
    tcp(1, SYN | FIN, 1, port=4005),
    tcp(1, SYN | RST, 1, port=4006),
]


def ours() -> list[bool]:
    """What a firewall of ours makes of them."""
    judged = []
    with vn.Net() as net:
        outside, inside = net.memory("outside"), net.memory("inside")
        outside >> inside
        net.firewall("pass out keep-state", at=inside)
        ends = [outside, inside]

        def counted() -> tuple[int, int]:
            stats = net.stats()
            return sum(port.sent for port in stats.ports.values()), sum(stats.drops.values())

        for side, packet in PACKETS:
            sent, dropped = counted()
            ends[side].end.tx([packet])
            assert eventually(lambda before=(sent, dropped): counted() != before)
            judged.append(counted()[0] > sent)
        assert net.stats().balance().exact
    return judged


def test_the_kernel_judges_the_same():
    if os.geteuid() or not shutil.which("nft"):
        pytest.skip("needs root and nft (Debian: apt install nftables)")
    if subprocess.run(["unshare", "--net", "nft", "list", "ruleset"], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces with nftables cannot be made here")
    script = Path(__file__).parent / "kernel_router.py"
    listed = json.dumps([[side, packet.hex()] for side, packet in PACKETS])
    command = ["unshare", "--net", sys.executable, str(script)]
    done = subprocess.run(command, input=listed, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert len(theirs) == len(PACKETS)
    assert 0 < sum(theirs) < len(theirs)
    different = [
        (n, PACKETS[n][0], kernel, own)
        for n, (kernel, own) in enumerate(zip(theirs, ours(), strict=True))
        if kernel != own
    ]
    assert not different, str(different)
