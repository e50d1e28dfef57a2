"""Bursts: packets as arrays, parsed right, and views that end with their burst."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Raw

import virtnet as vn

ETHER = Ether(dst="52:54:00:00:00:02", src="52:54:00:00:00:01")


def mixed() -> vn.Burst:
    return vn.Burst(
        [
            ETHER / IP(src="10.0.0.1", dst="10.0.0.2", ttl=7) / UDP(sport=53, dport=4000) / Raw(b"abc"),
            ETHER / Dot1AD(vlan=5) / Dot1Q(vlan=6) / IP() / TCP(sport=80, dport=81, flags="SA"),
            ETHER / IPv6(src="fe80::1", dst="2001:db8::2") / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP(dport=9),
            ETHER / IP(frag=100, proto=17) / Raw(bytes(20)),
            ETHER / IPv6() / IPv6ExtHdrFragment(offset=10, nh=6) / Raw(bytes(20)),
            ETHER / ARP(),
            ETHER / IP() / ICMP(),
        ]
    )


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("eth_dst", [0x525400000002] * 7),
        ("eth_type", [0x800, 0x800, 0x86DD, 0x800, 0x86DD, 0x806, 0x800]),
        ("vlan", [-1, 5, -1, -1, -1, -1, -1]),
        ("ip_version", [4, 4, 6, 4, 6, 0, 4]),
        ("ip_proto", [17, 6, 17, 17, 6, 0, 1]),
        ("ip_ttl", [7, 64, 64, 64, 64, 0, 64]),
        ("ip_src", [0x0A000001, 0x7F000001, 0, 0x7F000001, 0, 0, 0x7F000001]),
        ("l4_src", [53, 80, 53, 0, 0, 0, 0]),
        ("l4_dst", [4000, 81, 9, 0, 0, 0, 0]),
        ("tcp_flags", [0, 0x12, 0, 0, 0, 0, 0]),
        ("payload", [42, 62, 78, 34, 62, 14, 34]),
    ],
)
def test_columns_hold_what_scapy_put_in(column, expected):
    assert mixed().columns[column].tolist() == expected


def test_usual_packets_have_the_same_columns_alone_and_among_others():
    usual = [
        ETHER / IP(src="10.0.0.1", dst="10.0.0.2", ttl=7) / UDP(sport=53, dport=4000) / Raw(b"abc"),
        ETHER / IP(src="10.0.0.3", dst="10.0.0.4") / TCP(sport=80, dport=81, flags="SA", options=[("MSS", 1460)]),
        ETHER / IP(src="10.0.0.5", dst="10.0.0.6") / ICMP() / Raw(bytes(30)),
    ]
    alone, among_others = vn.Burst(usual).columns, vn.Burst([*usual, ETHER / ARP()]).columns
    for name in alone:
        assert alone[name].tolist() == among_others[name][:3].tolist(), name


def test_ipv6_addresses_are_two_numbers():
    assert mixed().columns.ip6_dst[2].tolist() == [0x20010DB8 << 32, 2]


@given(st.lists(st.binary(min_size=1, max_size=100), max_size=8))
def test_any_bytes_give_a_row(frames):
    burst = vn.Burst(frames)
    table = burst.columns.to_dict()
    assert all(len(column) == len(frames) for column in table.values())
    assert [bytes(frame) for frame in burst.frames] == frames
    assert table["length"].tolist() == [len(frame) for frame in frames]
    assert (table["payload"] <= table["length"]).all()


def test_a_part_is_chosen_by_mask_numbers_or_slice():
    burst = mixed()
    for key, expected in [
        (burst.columns.ip_proto == 17, [0, 2, 3]),
        ([5, 0], [5, 0]),
        (slice(1, 3), [1, 2]),
        (np.array([], bool), []),
        ([], []),
        (burst.columns.l4_dst, None),
    ]:
        if expected is None:
            with pytest.raises(IndexError):
                burst[key]
            continue
        part = burst[key]
        assert [bytes(frame) for frame in part] == [bytes(burst.frames[i]) for i in expected]


def test_a_part_shares_the_bytes_of_the_whole():
    burst = vn.Burst([bytes(60), bytes(60)])
    burst[1:][0][:6] = 0xFF
    assert burst.columns.eth_dst.tolist() == [0, (1 << 48) - 1]


def test_a_slice_shares_what_is_left_to_be_done_and_a_choice_has_its_own():
    burst = vn.Burst([bytes(60), bytes(60), bytes(60)])
    burst[1:][1:].columns.offload["csum_start"] = 34
    assert burst.columns.offload["csum_start"].tolist() == [0, 0, 34]
    burst[[2, 0]].columns.offload["csum_start"] = 14
    assert burst.columns.offload["csum_start"].tolist() == [0, 0, 34]
    assert burst[[-1, 0]].columns.offload["csum_start"].tolist() == [34, 0]
    assert burst.heads(20).columns.offload["csum_start"].tolist() == [0, 0, 34]


@pytest.mark.parametrize("key", [[3], [-4], [[0, 1]], ["a"], np.array([True])])
def test_what_names_no_packets_is_an_index_error(key):
    with pytest.raises(IndexError):
        vn.Burst([bytes(60)] * 3)[key]


def test_views_compute_like_arrays():
    burst = vn.Burst([bytes(60), bytes(100)])
    length = burst.columns.length
    assert (length + 1).tolist() == [61, 101]
    assert (length > 60).tolist() == [False, True]
    assert (length.sum(), length.mean(), length.min(), length.max()) == (160, 80, 60, 100)
    assert length[length > 60].tolist() == [100]
    assert np.unique(length).tolist() == [60, 100]
    assert np.add.reduce(length) == 160
    assert (length.shape, length.size, length.dtype) == ((2,), 2, np.uint32)
    assert list(length) == [60, 100]


def test_frames_can_be_written_and_columns_only_where_it_means_something():
    burst = vn.Burst([bytes(60)])
    burst.frames[0][12:14] = [0x08, 0x06]
    assert burst.columns.eth_type.tolist() == [0x0806]
    burst.columns.offload["csum_start"] = 34
    assert burst.columns.offload["csum_start"].tolist() == [34]
    with pytest.raises(ValueError, match="columns are what was parsed"):
        burst.columns.eth_type[0] = 0


def test_views_raise_after_their_burst_is_gone():
    with mixed() as burst:
        part, frame, column, frames, columns = (
            burst[:2],
            burst.frames[0],
            burst.columns.length,
            burst.frames,
            burst.columns,
        )
        slice_of_column = column[1:]
        kept = np.asarray(column)
    uses = {
        "burst": lambda: len(burst),
        "part": lambda: part.n_bytes,
        "index": lambda: burst[0],
        "frame": lambda: bytes(frame),
        "item": lambda: frame[0],
        "rows": lambda: list(column),
        "write": lambda: frame.__setitem__(0, 1),
        "column": lambda: column + 1,
        "compare": lambda: column == 1,
        "array": lambda: np.asarray(column),
        "numpy": lambda: np.unique(column),
        "slice": lambda: slice_of_column + 1,
        "frames": lambda: frames[0],
        "columns": lambda: columns["length"],
    }
    for name, use in uses.items():
        with pytest.raises(vn.StateError, match="released"):
            pytest.fail(f"{name} gave {use()!r}")
    assert kept[0] == 45
    assert repr(burst) == "<Burst, released>"
    assert "released" in repr(column)
    burst.release()


@pytest.mark.parametrize("frame", [b"", bytes(65_590)])
def test_a_frame_that_no_network_carries_is_refused(frame):
    with pytest.raises(vn.ConfigError, match="a frame has 1 to 65589 bytes, frame 1 has"):
        vn.Burst([bytes(60), frame])


def test_there_is_no_such_column():
    with pytest.raises(AttributeError, match="there are length, eth_dst"):
        _ = mixed().columns.ip_source
    with pytest.raises(KeyError, match="ip_source"):
        mixed().columns["ip_source"]


def test_columns_are_a_table_of_what_there_is_to_see():
    shown = vn.Burst(
        [ETHER / IP(src="10.0.0.1") / UDP(dport=53), ETHER / IPv6(dst="fe80::2")] * 15
    ).columns._repr_html_()
    for cell in ("ip6_dst", "10.0.0.1", "fe80::2", "52:54:00:00:00:02", "0x86dd", "and 10 more"):
        assert cell in shown
    assert "vlan" not in shown
    assert "wire_length" not in shown
    assert vn.Burst().columns._repr_html_() == "<table><tr><th></th></tr></table>"
