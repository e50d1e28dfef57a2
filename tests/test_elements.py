"""Elements: what a worker makes of packets is what numpy makes of them, and what cannot be is refused with its line."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import virtnet as vn
from helpers import eventually, receive
from test_burst_edit import packet

#: One of each kind, and some that end early or are none.
WHOLE = [
    packet(4, "tcp", "10.0.0.1", "192.168.7.9", ports=(80, 65535)),
    packet(4, "udp", "255.0.0.1", "10.0.0.2", ttl=1, tag=0xE123),
    packet(4, "icmp", "10.0.0.1", "10.0.0.2", ttl=255),
    packet(6, "tcp", "fd00::1", "2001:db8::ffff", ports=(0, 1)),
    packet(6, "udp", "fe80::1:ffff", "ff02::2", ttl=0, tag=7),
    packet(6, "icmp6", "::1", "::"),
    bytes(60),
    b"\xff" * 300,
    packet(4, "udp", "10.9.8.7", "10.0.0.2", ports=(5353, 53)),
]
PACKETS = [one for whole in WHOLE for one in (whole, whole[:40], whole[:16])]


class Bench:
    """A running element between two ports, and another port it can send to."""

    def __init__(self) -> None:
        self.net = vn.Net()
        self.a, self.b, self.c = (self.net.memory(name, capacity=4096) for name in "abc")
        self.function = self.net.element(vn.element(lambda p: np.where(p.length > 0, "pass", "c")), name="element")
        self.a >> self.function >> self.b
        self.net.start()

    def run(self, element: vn.Element, packets: list[bytes]) -> tuple[list[bytes], list[bytes], int]:
        """What arrives at ``b``, at ``c``, and how many were dropped."""
        self.function.set(program=element.program)
        before = self.net.stats()
        assert self.a.end.tx(packets) == len(packets)

        def counts() -> tuple[int, int, int]:
            now = self.net.stats()
            drops = (stats.functions["element"].drops.get("filtered", 0) for stats in (now, before))
            sent = [now.ports[name].sent - before.ports[name].sent for name in "bc"]
            return sent[0], sent[1], -int(np.subtract.reduce(list(drops)[::-1]))

        assert eventually(lambda: sum(counts()) == len(packets))
        b, c, dropped = counts()
        return receive(self.b.end, b) if b else [], receive(self.c.end, c) if c else [], dropped


@pytest.fixture(scope="module")
def bench():
    bench = Bench()
    yield bench
    bench.net.stop()


def under_numpy(element: vn.Element, packets: list[bytes]) -> tuple[list[bytes], list[bytes], int]:
    """The same by numpy."""
    burst = vn.Burst(packets)
    answer = element(burst)
    answer = np.broadcast_to(np.asarray(True if answer is None else answer), (len(packets),))
    if answer.dtype.kind == "b":
        answer = np.where(answer, "pass", "drop")
    by = {way: [bytes(burst.frames[i]) for i in np.flatnonzero(answer == way)] for way in ("pass", "c", "drop")}
    return by["pass"], by["c"], len(by["drop"])


def agree(bench: Bench, element: vn.Element, packets: list[bytes]) -> None:
    # A network refuses runts before any element sees them. Where all are plain IPv4 they are read and written in place.
    plain = [packet for packet in packets if packet[12:15] == b"\x08\x00\x45" and len(packet) >= 54]
    for some in (packets, plain):
        assert bench.run(element, some) == under_numpy(element, some)


COLUMNS = [
    "length",
    "eth_dst",
    "eth_src",
    "eth_type",
    "vlan",
    "ip_version",
    "ip_proto",
    "ip_ttl",
    "ip_src",
    "ip_dst",
    "l4_src",
    "l4_dst",
    "tcp_flags",
    "payload",
]
TYPES = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
BINARY = [
    np.add,
    np.subtract,
    np.multiply,
    np.bitwise_and,
    np.bitwise_or,
    np.bitwise_xor,
    np.left_shift,
    np.right_shift,
    np.floor_divide,
    np.remainder,
    np.minimum,
    np.maximum,
    np.equal,
    np.not_equal,
    np.less,
    np.less_equal,
    np.greater,
    np.greater_equal,
]
NUMBERS = st.sampled_from(
    [-(1 << 63), -300, -3, -1, 0, 1, 2, 7, 8, 63, 64, 127, 255, 256, 65535, 1 << 31, (1 << 64) - 1]
)
TABLES = st.dictionaries(st.integers(-5, 300), st.integers(0, 255), max_size=30).map(
    lambda entries: vn.Table(entries, default=9, dtype=np.uint8)
)

#: Functions of the columns that give a column.
leaves = st.one_of(
    st.sampled_from(COLUMNS).map(lambda name: lambda p: getattr(p, name)),
    st.sampled_from([("ip6_src", 0), ("ip6_dst", 1)]).map(lambda half: lambda p: getattr(p, half[0])[:, half[1]]),
)
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(BINARY), inner, inner).map(lambda t: lambda p: t[0](t[1](p), t[2](p))),
        st.tuples(st.sampled_from(BINARY), inner, NUMBERS).map(lambda t: lambda p: t[0](t[1](p), t[2])),
        st.tuples(st.sampled_from(BINARY), NUMBERS, inner).map(lambda t: lambda p: t[0](t[1], t[2](p))),
        st.tuples(st.sampled_from([np.invert, np.negative]), inner).map(lambda t: lambda p: t[0](t[1](p))),
        st.tuples(inner, inner, inner).map(lambda t: lambda p: np.where(t[0](p) > 3, t[1](p), t[2](p))),
        st.tuples(inner, inner, NUMBERS).map(lambda t: lambda p: np.where(t[0](p) == 0, t[1](p), t[2])),
        st.tuples(inner, st.sampled_from(TYPES)).map(lambda t: lambda p: t[0](p).astype(t[1])),
        st.tuples(inner, TABLES).map(lambda t: lambda p: t[1][t[0](p)]),
        st.tuples(inner, TABLES).map(lambda t: lambda p: t[1].has(t[0](p))),
        st.tuples(inner, st.lists(st.integers(0, 300))).map(
            lambda t: lambda p: np.isin(t[0](p), np.array(t[1], np.int64))
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(expressions, expressions, st.sampled_from(["ip_ttl", "ip_src", "ip_dst", "l4_src", "l4_dst", "eth_src", "vlan"]))
def test_a_worker_computes_what_numpy_computes(bench, value, condition, field):
    def program(p):
        found = value(p)
        setattr(p, field, found.astype(np.uint64))
        p.eth_dst = found.astype(np.int64).astype(np.uint64) & 0xFFFFFFFFFFFF
        asked = condition(p)
        return np.where(asked > 7, "drop", np.where(asked == 1, "c", "pass"))

    try:
        element = vn.element(program)
    except vn.ConfigError:
        assume(False)
    agree(bench, element, PACKETS)


def test_every_operation_on_every_pair_of_types(bench):
    for op, left, right in itertools.product(BINARY, TYPES, TYPES):

        def program(p, op=op, left=left, right=right):
            p.eth_src = op((p.ip_src * 7).astype(left), (p.l4_dst * 3).astype(right)).astype(np.int64).astype(np.uint64)

        try:
            element = vn.element(program)
        except vn.ConfigError:
            continue  # a fraction, or nothing numpy can do either
        agree(bench, element, PACKETS[:9])


def test_fields_that_are_assigned_are_read_again_and_checksums_follow(bench):
    @vn.element
    def rewrite(p):
        p.ip_dst = p.ip_src
        p.ip_src = p.ip_dst + 1
        p.l4_dst = 53
        p.ip_ttl = p.ip_ttl - 1
        p.vlan = 4095
        p.eth_src = 0x020000000001
        return p.ip_dst == p.ip_src - 1

    agree(bench, rewrite, PACKETS)
    sent = packet(4, "tcp", "10.0.0.1", "10.0.0.9", ports=(7, 8))
    wanted = (
        bytes(6) + bytes.fromhex("020000000001") + packet(4, "tcp", "10.0.0.2", "10.0.0.1", ttl=63, ports=(7, 53))[12:]
    )
    assert bench.run(rewrite, [sent]) == ([wanted], [], 0)


def test_it_sees_the_head_of_a_packet_and_no_more(bench):
    options = b"\x3b\x16" + bytes(182)  # a destination header of 184 bytes, then none
    frame = bytes(12) + b"\x86\xdd\x60" + bytes(5) + b"\x3c" + b"\x40" + bytes(32) + options + bytes(40)
    agree(bench, vn.element(lambda p: p.payload > 60), [frame, frame[:230], *PACKETS])


def test_a_set_of_many_addresses():
    blocked = vn.Table(range(0x0A000000, 0x0A000000 + 100_000))
    guard = vn.element(lambda p: ~blocked.has(p.ip_src))
    bench = Bench()
    assert bench.run(guard, WHOLE[:2]) == ([WHOLE[1]], [], 1)
    agree(bench, guard, PACKETS)
    bench.net.stop()


def test_it_is_a_node_like_others(sockets):
    net = vn.Net()
    honeypot = net.memory("honeypot")
    guard = vn.element(lambda p: np.where(p.l4_dst == 23, "honeypot", np.where(p.ip_version > 0, "pass", "drop")))
    assert guard.to == ("honeypot",)
    a, b = net.memory("a"), net.memory("b")
    function = net.element(guard, name="guard")
    a >> function >> b
    spec = net.spec
    assert vn.Spec.from_toml(spec.to_toml()) == spec
    with net:
        a.end.tx([packet(4, "tcp", "10.0.0.1", "10.0.0.2", ports=(1, port)) for port in (22, 23)] + [bytes(60)])
        assert len(receive(b.end)) == len(receive(honeypot.end)) == 1
        b.end.tx([packet(4, "tcp", "10.0.0.1", "10.0.0.2")])
        assert len(receive(a.end)) == 1, "both ways"
        honeypot.end.tx([bytes(60)])
        assert eventually(lambda: function.stats().consumed == 1)
        assert function.stats().drops == {"filtered": 1}
        assert net.stats().balance().exact
        same = net.spec
        assert not net.plan(same)
        with pytest.raises(vn.ConfigError, match="program"):
            function.set(program="{}")
        with pytest.raises(vn.ConfigError, match="step 0"):
            function.set(program='{"steps":[["add","bool",[0,1]]],"tables":[],"to":["honeypot"]}')
        assert net.spec == same
    assert sockets


def test_it_is_a_function_for_on_burst_as_it_stands():
    short = vn.element(lambda p: p.length < 100)
    with vn.Net() as net:
        a, b = net.memory("a"), net.memory("b")
        a >> net.switch() << b
        handler = net.on_burst(a, direction="from")(short)
        a.end.tx([bytes(60), bytes(200), bytes(70)])
        assert receive(b.end, 2) == [bytes(60), bytes(70)]
        assert eventually(lambda: handler.dropped == 1)


def test_nodes_that_are_not_there_are_named():
    with pytest.raises(vn.ConfigError, match="honeypot"):
        vn.Net().element(vn.element(lambda p: np.where(p.l4_dst == 23, "honeypot", "pass")))


def if_on_packets(p):
    if p.ip_ttl > 3:  # the line
        return "drop"
    return "pass"


def and_on_packets(p):
    return p.ip_ttl > 3 and p.ip_ttl < 9  # the line


def loop(p):
    for _ in p.ip_ttl:  # the line
        pass


def fraction(p):
    return (p.ip_ttl / 2) > 1  # the line


def sine(p):
    return np.sin(p.ip_ttl) > 0  # the line


def no_column(p):
    return p.ip_tll > 0  # the line


def too_large(p):
    return (p.ip_ttl + 256) > 0  # the line


def too_large_to_write(p):
    p.ip_ttl = 256  # the line


def not_writable(p):
    p.length = 3  # the line


def both_halves(p):
    return p.ip6_src > 0  # the line


def number_as_answer(p):
    return p.ip_ttl


def text_compared(p):
    return np.where(p.ip_ttl > 1, "drop", "pass") == 1  # the line


def mixed_ways(p):
    return np.where(p.ip_ttl > 1, "drop", 1)  # the line


def with_array(p):
    return p.ip_ttl > np.array([1, 2])  # the line


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (if_on_packets, "all packets at once"),
        (and_on_packets, "all packets at once"),
        (loop, "all packets at once"),
        (fraction, "divide"),
        (sine, "sin"),
        (no_column, "ip_tll"),
        (too_large, "256"),
        (too_large_to_write, "0 to 255"),
        (not_writable, "cannot be written"),
        (both_halves, "not supported|halves|half"),
        (number_as_answer, "found numbers"),
        (text_compared, "chosen and returned"),
        (mixed_ways, "both sides"),
        (with_array, "whole numbers"),
    ],
)
def test_what_it_cannot_do_is_refused_with_its_line(function, words):
    with pytest.raises(vn.ConfigError, match=words) as caught:
        vn.element(function)
    assert function.__name__ in str(caught.value)
    if function is not number_as_answer:
        assert "# the line" in str(caught.value)


@pytest.mark.parametrize("entries", [{1.5: 1}, {1: 1 << 32}, {1: -1}, {1 << 64: 1}, ["a"]])
def test_a_table_holds_whole_numbers(entries):
    with pytest.raises(vn.ConfigError, match="table"):
        vn.Table(entries)
