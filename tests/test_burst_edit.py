"""Header fields written in many packets at once, and the checksums that cover them, against sums made from scratch."""

from __future__ import annotations

import ipaddress
import itertools
import struct

import numpy as np
import pytest

import virtnet as vn


def checksum(data: bytes) -> int:
    """RFC 1071, word by word."""
    total = sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


PROTOCOLS = {"tcp": (6, 16), "udp": (17, 6), "icmp": (1, 2), "icmp6": (58, 2)}


def pseudo(src: bytes, dst: bytes, proto: int, length: int) -> bytes:
    middle = struct.pack(">BBH", 0, proto, length) if len(src) == 4 else struct.pack(">IHBB", length, 0, 0, proto)
    return src + dst + middle


def packet(version: int, kind: str, src: str, dst: str, *, ttl=64, ports=(1000, 2000), tag=None, left=False) -> bytes:
    """A whole packet, made from scratch; ``left``: only the pseudo-header's sum is in the checksum field."""
    proto, at = PROTOCOLS[kind]
    payload = bytes(range(1, 24))
    transport = bytearray({
        "tcp": struct.pack(">HHIIBBHHH", *ports, 1, 2, 0x50, 0x10, 100, 0, 0),
        "udp": struct.pack(">HHHH", *ports, 8 + len(payload), 0),
    }.get(kind, struct.pack(">BBHI", 128, 0, 0, 7)) + payload)  # fmt: skip
    a, b = ipaddress.ip_address(src).packed, ipaddress.ip_address(dst).packed
    fake = pseudo(a, b, proto, len(transport))
    covered = b"" if kind == "icmp" else fake
    value = ~checksum(fake) & 0xFFFF if left else checksum(covered + transport)
    transport[at : at + 2] = (value or (0xFFFF if kind == "udp" and not left else 0)).to_bytes(2, "big")
    if version == 4:
        header = bytearray(struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(transport), 1, 0, ttl, proto, 0, a, b))
        header[10:12] = checksum(header).to_bytes(2, "big")
    else:
        header = bytearray(struct.pack(">IHBB16s16s", 6 << 28, len(transport), proto, ttl, a, b))
    vlan = b"" if tag is None else struct.pack(">HH", 0x8100, tag)
    kind_of = b"\x08\x00" if version == 4 else b"\x86\xdd"
    return bytes(12) + vlan + kind_of + bytes(header) + bytes(transport)


ADDRESSES = {4: ("10.0.0.1", "192.168.7.9", "255.255.0.3"), 6: ("fd00::1", "2001:db8::7", "fe80::ffff:1")}


@pytest.mark.parametrize(
    ("version", "kind"), [(4, "tcp"), (4, "udp"), (4, "icmp"), (6, "tcp"), (6, "udp"), (6, "icmp6")]
)
@pytest.mark.parametrize("tag", [None, 0x6005])
def test_addresses_ports_and_ttl_leave_the_packet_that_would_have_been_made(version, kind, tag):
    a, b, c = ADDRESSES[version]
    prefix = "ip" if version == 4 else "ip6"
    has_ports = kind in {"tcp", "udp"}
    for left in (False, True) if has_ports else (False,):
        burst = vn.Burst([packet(version, kind, a, b, tag=tag, left=left)] * 3)
        if left:
            burst.columns.offload["flags"] = 1
        fields = {f"{prefix}_src": c, f"{prefix}_dst": a, "ip_ttl": 3}
        if has_ports:
            fields |= {"l4_src": 7, "l4_dst": [1, 2, 3]}
        assert burst.edit(**fields) == 3 * len(fields)
        for n, frame in enumerate(burst.frames):
            ports = (7, n + 1) if has_ports else (0, 0)
            assert bytes(frame) == packet(version, kind, c, a, ttl=3, ports=ports, tag=tag, left=left)


def test_every_value_of_a_port_keeps_the_checksum_right():
    values = np.arange(0, 65536, 97)
    burst = vn.Burst([packet(4, "udp", "10.0.0.1", "10.0.0.2")] * len(values))
    burst.edit(l4_dst=values)
    for value, frame in zip(values, burst.frames, strict=True):
        assert bytes(frame) == packet(4, "udp", "10.0.0.1", "10.0.0.2", ports=(1000, int(value)))


def test_udp_without_a_checksum_stays_without():
    frame = bytearray(packet(4, "udp", "10.0.0.1", "10.0.0.2"))
    frame[14 + 20 + 6 :][:2] = frame[40:42] = b"\0\0"
    burst = vn.Burst([frame])
    burst.edit(ip_src="10.9.9.9", l4_src=5)
    assert bytes(burst.frames[0])[40:42] == b"\0\0"


def test_a_later_fragment_has_no_ports_and_keeps_its_payload():
    frame = bytearray(packet(4, "udp", "10.0.0.1", "10.0.0.2"))
    frame[20:22] = b"\x00\x08"
    burst = vn.Burst([frame])
    assert burst.edit(l4_src=5) == 0
    assert burst.edit(ip_src="10.9.9.9") == 1
    assert bytes(burst.frames[0])[34:] == bytes(frame)[34:]


def test_ethernet_and_the_tag_that_is_there():
    burst = vn.Burst([packet(4, "udp", "10.0.0.1", "10.0.0.2", tag=0xE00A), bytes(60), b"short"])
    assert burst.edit(eth_dst="02:00:00:00:00:09", eth_src=5, vlan=77) == 5
    assert burst.columns.vlan.tolist() == [77, -1, -1]
    assert bytes(burst.frames[0])[14] >> 4 == 0xE
    assert burst.columns.eth_dst.tolist()[:2] == [0x020000000009] * 2
    assert burst.columns.eth_src.tolist() == [5, 5, 0]


def test_only_chosen_packets_are_changed():
    burst = vn.Burst([packet(4, "tcp", "10.0.0.1", f"10.0.0.{n}") for n in range(1, 5)])
    assert burst.edit(burst.columns.ip_dst > 0x0A000002, l4_dst=80) == 2
    assert burst.columns.l4_dst.tolist() == [2000, 2000, 80, 80]
    assert burst.edit([0, 3], l4_dst=np.array([1, 2])) == 2
    assert burst.columns.l4_dst.tolist() == [1, 2000, 80, 2]
    assert burst.edit(np.zeros(4, bool), l4_dst=9) == 0


def test_any_bytes_at_all_are_left_in_peace_or_edited():
    rng = np.random.default_rng(1)
    good = packet(6, "tcp", "fd00::1", "fd00::2"), packet(4, "tcp", "10.0.0.1", "10.0.0.2", tag=1)
    frames = [bytes(rng.integers(0, 256, int(n), np.uint8)) for n in rng.integers(1, 90, 300)]
    frames += [one[:n] for one, n in itertools.product(good, range(1, 60))]
    burst = vn.Burst(frames)
    burst.edit(eth_dst=1, vlan=2, ip_ttl=3, ip_src=4, ip_dst=5, ip6_src=6, ip6_dst=7, l4_src=8, l4_dst=9)
    assert [len(frame) for frame in burst.frames] == [len(frame) for frame in frames]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"length": 3}, "cannot be written"),
        ({"l4_dst": 65536}, "0 to 65535"),
        ({"l4_dst": -1}, "0 to 65535"),
        ({"l4_dst": [1, 2, 3]}, "each of 2 packets"),
        ({"l4_dst": 0.5}, "float64"),
        ({"ip_src": "fd00::1"}, "no address of 32 bits"),
        ({"ip6_src": 1 << 128}, "128 bits"),
        ({"eth_dst": "02:00"}, "no address of 48 bits"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(fields, words):
    frame = packet(4, "tcp", "10.0.0.1", "10.0.0.2")
    burst = vn.Burst([frame] * 2)
    with pytest.raises(vn.ConfigError, match=words):
        burst.edit(**fields)
    assert [bytes(one) for one in burst.frames] == [frame] * 2
