"""Every kind of port joined to every other, under every set of offloads: what arrives is right to the byte.

The packets leave nothing, a checksum, or a whole segmentation to be done. Wherever on its way that is done, the packets
that arrive at the end, finished by the few lines below, must be those that were sent, finished by the same lines.
"""

from __future__ import annotations

import itertools
import random
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest

import virtnet as vn
from helpers import eventually, receive

if TYPE_CHECKING:
    from pathlib import Path

NEEDS_CSUM = 1
TCPV4, TCPV6, UDP_L4, ECN = 1, 4, 5, 0x80

#: What the sides of a port do not agree to.
WITHOUT = {
    "everything": "",
    "no-udp": "guest_uso4+guest_uso6+host_uso",
    "no-ecn": "guest_ecn+host_ecn",
    "no-ipv6": "guest_tso6+host_tso6+guest_uso6",
    "checksums": "guest_tso4+guest_tso6+guest_uso4+guest_uso6+host_tso4+host_tso6+host_uso",
    "nothing": "csum+guest_csum",
}

KINDS = ("memory", "vhost-user", "virtio-user")


def ones_sum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2 + len(data) % 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def packet(version: int, proto: str, payload: int, *, gso: int = 0, flags: int = 0x18, seed: int = 0) -> tuple:
    """A frame of which nothing is finished, and its offload metadata as a row of ``columns.offload``."""
    body = random.Random(seed).randbytes(payload)  # noqa: S311 - the same bytes every time are what is wanted
    if proto == "tcp":
        number, offset = 6, 16
        l4 = struct.pack(">HHIIBBHHH", 1, 2, 0xFFFFF000, 7, 0x50, flags, 512, 0, 0)
    else:
        number, offset = 17, 6
        l4 = struct.pack(">HHHH", 1, 2, 8 + payload, 0)
    if version == 4:
        ip = bytearray(struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(l4) + payload, 0xFFFE, 0x4000, 64, number, 0,
                                   bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])))  # fmt: skip
        struct.pack_into(">H", ip, 10, 0xFFFF ^ ones_sum(ip))
    else:
        ip = bytearray(
            struct.pack(">IHBB16s16s", 0x60000000, len(l4) + payload, number, 64, b"\xfd" * 16, b"\xfe" * 16)
        )
    ether = b"\x02\0\0\0\0\x02\x02\0\0\0\0\x01" + (b"\x08\0" if version == 4 else b"\x86\xdd")
    start = len(ether) + len(ip)
    # What is to be summed up begins with the sum of the pseudo header.
    pseudo = bytes(ip[12:20] if version == 4 else ip[8:40]) + struct.pack(">HH", number, len(l4) + payload)
    l4 = bytearray(l4)
    struct.pack_into(">H", l4, offset, ones_sum(pseudo))
    kind = {("tcp", 4): TCPV4, ("tcp", 6): TCPV6}.get((proto, version), UDP_L4) if gso else 0
    if gso and flags & 0x80:
        kind |= ECN
    return bytes(ether + ip + l4 + body), (NEEDS_CSUM, kind, start + len(l4) if gso else 0, gso, start, offset)


def finished(frame: bytes, offload: tuple) -> list[bytes]:
    """The frames that a receiver sees who takes nothing unfinished, made as simply as can be."""
    flags, kind, _, gso_size, start, offset = offload
    if not flags & NEEDS_CSUM:
        return [frame]
    if kind == 0:
        done = bytearray(frame)
        total = 0xFFFF ^ ones_sum(frame[start:])
        struct.pack_into(">H", done, start + offset, total or 0xFFFF if offset == 6 else total)
        return [bytes(done)]
    version = frame[14] >> 4
    tcp = kind & 0x7F in (TCPV4, TCPV6)
    header = start + ((frame[start + 12] >> 4) * 4 if tcp else 8)
    pieces = [frame[at : at + gso_size] for at in range(header, len(frame), gso_size)]
    segments = []
    for k, piece in enumerate(pieces):
        head = bytearray(frame[:header])
        if tcp:
            sequence = struct.unpack_from(">I", head, start + 4)[0] + k * gso_size
            struct.pack_into(">I", head, start + 4, sequence & 0xFFFFFFFF)
            head[start + 13] &= 0xFF if k == 0 else 0x7F  # CWR: the first
            head[start + 13] &= 0xFF if k == len(pieces) - 1 else 0xF6  # FIN, PSH: the last
        else:
            struct.pack_into(">H", head, start + 4, 8 + len(piece))
        length = len(head) - start + len(piece)
        if version == 4:
            struct.pack_into(">H", head, 16, 20 + length)
            struct.pack_into(">H", head, 18, (struct.unpack_from(">H", head, 18)[0] + k) & 0xFFFF)
            struct.pack_into(">H", head, 24, 0)
            struct.pack_into(">H", head, 24, 0xFFFF ^ ones_sum(head[14:34]))
            pseudo = bytes(head[26:34])
        else:
            struct.pack_into(">H", head, 18, length)
            pseudo = bytes(head[22:54])
        pseudo += struct.pack(">HH", 6 if tcp else 17, length)
        struct.pack_into(">H", head, start + offset, ones_sum(pseudo))
        segments += finished(bytes(head) + piece, (NEEDS_CSUM, 0, 0, 0, start, offset))
    return segments


PACKETS = [
    packet(4, "tcp", 100),
    packet(6, "udp", 101, seed=1),
    packet(4, "tcp", 9_001, gso=1_400, seed=2),
    packet(6, "tcp", 60_000, gso=1_440, flags=0x19, seed=3),
    packet(4, "tcp", 5_000, gso=500, flags=0x98, seed=4),
    packet(4, "udp", 20_000, gso=1_200, seed=5),
    packet(6, "udp", 3_000, gso=1_000, seed=6),
    (packet(4, "udp", 50, seed=7)[0], (0, 0, 0, 0, 0, 0)),
]


def attach(net: vn.Net, kind: str, name: str, directory: Path, without: str):
    """A port of this kind and, beyond it, the end of a memory port."""
    memory = net.memory(f"{name}-end", capacity=1024)
    if kind == "memory":
        return memory, memory.end, None
    path = directory / name
    device = net.port(f"vhost-user:{path}" + (f",without={without}" if without else ""), name=f"{name}-device")
    driver = net.port(f"virtio-user:{path}", name=f"{name}-driver")
    port, beyond = (device, driver) if kind == "vhost-user" else (driver, device)
    beyond >> memory
    return port, memory.end, driver


def unfinished_burst() -> vn.Burst:
    burst = vn.Burst([frame for frame, _ in PACKETS])
    offload = burst.columns.offload
    offload[:] = np.array([row for _, row in PACKETS], dtype=offload.copy().dtype)
    return burst


@pytest.mark.parametrize("without", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize(("sender", "receiver"), list(itertools.product(KINDS, KINDS)))
def test_what_arrives_is_what_was_sent(tmp_path, sender, receiver, without):
    with vn.Net() as net:
        near, put, near_driver = attach(net, sender, "near", tmp_path, without if sender != "memory" else "")
        far, take, far_driver = attach(net, receiver, "far", tmp_path, without)
        near >> far
        for driver in (near_driver, far_driver):
            if driver is not None:
                driver.wait_connected(5)
        burst = unfinished_burst()

        assert put.tx(burst) == len(PACKETS)
        wanted = [frame for one in PACKETS for frame in finished(*one)]
        arrived, unfinished = [], 0
        while len(arrived) < len(wanted):
            received = take.rx(timeout_s=5)
            assert len(received) > 0, f"{len(arrived)} of {len(wanted)} frames came"
            for frame, row in zip(map(bytes, received), received.columns.offload.copy().tolist(), strict=True):
                unfinished += row[0] & NEEDS_CSUM
                arrived += finished(frame, row)

        assert arrived == wanted
        assert net.stats().balance().exact
    if without == WITHOUT["everything"]:
        assert unfinished == len(PACKETS) - 1
    elif without == WITHOUT["nothing"] and {sender, receiver} != {"memory"}:
        assert unfinished == 0


def test_a_file_gets_finished_frames(tmp_path):
    path = tmp_path / "out.pcap"
    with vn.Net() as net:
        memory = net.memory("end")
        memory >> net.pcap(path, mode="write")
        memory.end.tx(unfinished_burst())
        wanted = [frame for one in PACKETS for frame in finished(*one)]
        assert eventually(lambda: net.stats().balance().sent == len(wanted))
    with vn.Net() as net:
        memory = net.memory("end")
        net.pcap(path, mode="read") >> memory
        assert receive(memory.end, len(wanted)) == wanted
