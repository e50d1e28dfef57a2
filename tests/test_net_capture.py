"""Captures of a place in a network: what is in the file, and what it costs the others."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import struct
import threading

import numpy as np
import pytest
from scapy.utils import RawPcapNgReader

import virtnet as vn
from helpers import eventually, frame, mac, receive
from virtnet.filters import compile_filter

needs_libpcap = pytest.mark.skipif(ctypes.util.find_library("pcap") is None, reason="libpcap is not installed")


pytestmark = pytest.mark.usefixtures("nothing_left")


@contextlib.contextmanager
def pair(**options):
    """Two memory ports at a switch."""
    with vn.Net(**options) as net:
        a, b = net.memory("a"), net.memory("b")
        a >> net.switch(name="sw") << b
        yield net, a, b
        assert net.stats().balance().exact


def read_all(path, into: list[bytes]) -> threading.Thread:
    """A reader of a pipe that reads to its end."""

    def read() -> None:
        with open(path, "rb") as pipe:  # noqa: PTH123 - or a descriptor
            into.append(pipe.read())

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def blocks(data: bytes) -> dict[int, list[dict[int, bytes]]]:
    """The options of the blocks of a pcapng file, by kind of block. Written after the specification."""
    found: dict[int, list[dict[int, bytes]]] = {}
    at = 0
    while at < len(data):
        kind, length = struct.unpack_from("<II", data, at)
        assert struct.unpack_from("<I", data, at + length - 4) == (length,)
        body, options = data[at + 8 : at + length - 4], {}
        start = {0x0A0D0D0A: 16, 1: 8, 5: 12}.get(kind, len(body))
        while start < len(body):
            code, n = struct.unpack_from("<HH", body, start)
            options[code] = body[start + 4 : start + 4 + n]
            start += 4 + -(-n // 4) * 4
        found.setdefault(kind, []).append(options)
        at += length
    return found


def written(path) -> list[bytes]:
    with vn.PcapPort(path, mode="read") as port:
        return receive(port, 1000, timeout_s=0.5)


def udp(port: int) -> bytes:
    packet = struct.pack(">BBHHHBBH4s4sHHHH", 0x45, 0, 28, 0, 0, 64, 17, 0, b"\x0a\0\0\1", b"\x0a\0\0\2", 7, port, 8, 0)
    return (mac(2) + mac(1) + b"\x08\x00" + packet).ljust(60, b"\0")


def test_both_directions_are_written_until_it_is_stopped(tmp_path):
    path = tmp_path / "out.pcapng"
    with vn.Net() as net:
        a, b = net.memory("a"), net.memory("b")
        a >> net.switch(name="sw") << b
        there, back = frame(mac(2), mac(1), b"there"), frame(mac(1), mac(2), b"back")
        with net.capture(a, path) as capture:
            a.end.tx([there])
            assert receive(b.end) == [there]
            b.end.tx([back])
            assert receive(a.end) == [back]
            assert eventually(lambda: capture.packets == 2)
        a.end.tx([there] * 3)
        assert receive(b.end, 3) == [there] * 3
        assert net.spec.cables == {("a", "sw"), ("b", "sw")}
        assert len(net) == 3
        capture.stop()
        assert net.stats().balance().exact
    assert written(path) == [there, back]


@needs_libpcap
def test_a_filter_chooses_what_is_written(tmp_path):
    path = tmp_path / "dns.pcap"
    with vn.Net() as net:
        a, b = net.memory("a"), net.memory("b")
        a >> b
        with net.capture((a, net["a-b"]), path, filter="udp port 53") as capture:
            a.end.tx([udp(53), udp(54), frame(mac(2), mac(1)), udp(53)])
            assert len(receive(b.end, 4)) == 4
            assert eventually(lambda: capture.packets == 2)
            assert vn.Spec.from_toml(net.spec.to_toml()) == net.spec
    assert written(path) == [udp(53)] * 2


def test_two_captures_of_a_place_do_not_know_of_each_other(tmp_path):
    with vn.Net() as net:
        a, b = net.memory("a"), net.memory("b")
        a >> net.switch(name="sw") << b
        first = net.capture(a, tmp_path / "1.pcapng")
        second = net.capture(a, tmp_path / "2.pcapng")
        a.end.tx([frame(mac(2), mac(1))])
        assert eventually(lambda: (first.packets, second.packets) == (1, 1))
        first.stop()
        a.end.tx([frame(mac(2), mac(1))])
        assert eventually(lambda: second.packets == 2)
        second.stop()
        assert net.spec.cables == {("a", "sw"), ("b", "sw")}
        assert len(receive(b.end, 2)) == 2


@pytest.mark.parametrize("n_cables", [0, 2])
def test_a_place_must_be_one(tmp_path, n_cables):
    net = vn.Net()
    switch = net.switch(name="sw")
    for n in range(n_cables):
        net.memory(f"m{n}") >> switch
    with pytest.raises(vn.ConfigError, match=f"'sw' has {n_cables} cables"):
        net.capture(switch, tmp_path / "x.pcap")
    other = net.memory("other")
    with pytest.raises(vn.ConfigError, match="no cable between 'sw' and 'other'"):
        net.capture((switch, other), tmp_path / "x.pcap")


def test_a_capture_that_cannot_be_leaves_the_network_as_it_was(tmp_path):
    (tmp_path / "there.pcap").write_text("mine")
    with vn.Net() as net:
        a, b = net.memory("a"), net.memory("b")
        a >> net.switch(name="sw") << b
        before = net.spec
        with pytest.raises(vn.ConfigError, match="exists already"):
            net.capture(a, tmp_path / "there.pcap")
        with pytest.raises(vn.VirtnetError):
            net.capture(a, "/no/such/place.pcap")
        assert net.spec == before
        a.end.tx([frame(mac(2), mac(1))])
        assert len(receive(b.end)) == 1
    assert (tmp_path / "there.pcap").read_text() == "mine"


@needs_libpcap
@pytest.mark.parametrize(("text", "length"), [("", 0), ("  ", 0), ("ip and udp port 53", 13)])
def test_filters_are_compiled(text, length):
    assert len(compile_filter(text)) == length


@needs_libpcap
def test_what_is_no_filter_is_refused():
    with pytest.raises(vn.ConfigError, match="'tpc port 80' is no packet filter: "):
        compile_filter("tpc port 80")


@needs_libpcap
def test_a_file_names_its_place_and_filter_and_ends_with_what_was_dropped(tmp_path):
    path = tmp_path / "out.pcapng"
    with pair() as (net, a, b):
        with net.capture(a, path, filter="udp") as capture:
            a.end.tx([udp(53), frame(mac(2), mac(1)), udp(54)])
            assert len(receive(b.end, 3)) == 3
            assert eventually(lambda: capture.packets == 2)
        assert capture.packets == 2
    found = blocks(path.read_bytes())
    (interface,) = found[1]
    assert interface[2] == b"a"
    assert interface[11] == b"\0udp"
    (statistics,) = found[5]
    assert {code: int.from_bytes(statistics[code], "little") for code in (5, 6, 8)} == {5: 0, 6: 2, 8: 2}
    assert 4 not in statistics  # how many there were before the filter, nobody has counted
    with RawPcapNgReader(str(path)) as reader:
        assert [bytes(data) for data, _ in reader] == [udp(53), udp(54)]


def test_a_network_is_the_same_whoever_looks_at_it(tmp_path):
    with pair() as (net, a, b):
        before = net.spec
        with net.capture(a, tmp_path / "out.pcapng") as capture:
            assert net.captures == (capture,)
            assert net.spec == before
            assert not net.plan(before)
            assert net[capture.file.name] == capture.file
            with pytest.raises(vn.ConfigError, match="is taken"):
                net.memory(capture.file.name)
            # Another network is described, and the capture goes on where it is.
            more = vn.Spec(before.ports | {"c": vn.PortSpec.of("memory", "c")}, before.functions, before.cables)
            net.apply(more)
            net.rollback()
            a.end.tx([frame(mac(2), mac(1))])
            assert len(receive(b.end)) == 1
            assert eventually(lambda: capture.packets == 1)
        assert net.captures == ()


def test_a_capture_stays_with_its_node_and_ends_with_it(tmp_path):
    with pair() as (net, a, b):
        capture = net.capture(a, tmp_path / "out.pcapng")
        with net.change():  # to another switch
            net.unplug(a, net["sw"])
            a >> net.switch(name="other") << net.memory("c")
        a.end.tx([frame(mac(2), mac(1))])
        assert len(receive(net["c"].end)) == 1
        assert eventually(lambda: capture.packets == 1)
        net.remove(a)
        assert not capture.running
        assert capture.wait(5)
        assert net.captures == ()
        b.end.tx([frame(mac(1), mac(2))])
        capture.stop()
    assert len(written(tmp_path / "out.pcapng")) == 1


def test_a_capture_before_the_start_begins_with_it_and_ends_with_the_end(tmp_path):
    net = vn.Net()
    a, b = net.memory("a"), net.memory("b")
    a >> b
    capture = net.capture(a, tmp_path / "out.pcapng")
    with net:
        a.end.tx([frame(mac(2), mac(1))] * 2)
        assert len(receive(b.end, 2)) == 2
        assert eventually(lambda: capture.packets == 2)
    assert capture.packets == 2
    assert net.captures == ()
    assert len(written(tmp_path / "out.pcapng")) == 2


def test_a_switch_knows_its_cables_by_who_is_behind_a_capture(tmp_path):
    with vn.Net() as net:
        a, b, c = net.memory("a"), net.memory("b"), net.memory("c")
        switch = net.switch(name="sw", cables={"a": {"access": 1}, "b": {"access": 1}, "c": {"access": 2}})
        a >> switch << b
        c >> switch
        with net.capture(a, tmp_path / "1.pcapng"), net.capture(a, tmp_path / "2.pcapng"):
            a.end.tx([frame(b"\xff" * 6, mac(1))])
            assert len(receive(b.end)) == 1
            assert len(c.end.rx(timeout_s=0.05)) == 0


def test_beside_python_in_the_path_both_see_what_passes(tmp_path):
    with pair() as (net, a, b):
        capture = net.capture(a, tmp_path / "out.pcapng")

        @net.on_burst(a)
        def see(_burst):
            return None

        with see:
            a.end.tx([frame(mac(2), mac(1))])
            assert len(receive(b.end)) == 1
            assert eventually(lambda: capture.packets == 1)
            with net.capture((a, net["see"]), tmp_path / "two.pcapng") as second:
                b.end.tx([frame(mac(1), mac(2))])
                assert len(receive(a.end)) == 1
                assert eventually(lambda: (capture.packets, second.packets) == (2, 1))


def test_a_fifo_is_written_when_somebody_reads_and_no_longer(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pair() as (net, a, b):
        capture = net.capture(a, fifo)
        assert eventually(lambda: capture.stats().state == "waiting")
        a.end.tx([frame(mac(2), mac(1))])
        assert eventually(lambda: capture.stats().drops == {"port_down": 1})
        assert "nobody reads it yet" in capture.file.state
        assert f"wireshark -k -i {fifo}" in capture.file.explain().remedy
        found: list[bytes] = []
        reading = read_all(fifo, found)
        assert eventually(lambda: capture.stats().state == "writing")
        a.end.tx([frame(mac(2), mac(1))] * 3)
        assert len(receive(b.end, 4)) == 4
        assert eventually(lambda: capture.packets == 3)
        capture.stop()
        reading.join(10)
    (data,) = found
    assert len(blocks(data)[6]) == 3
    assert len(blocks(data)[5]) == 1


def test_a_reader_that_leaves_ends_the_capture_and_not_the_network():
    reader, writer = os.pipe()
    with pair() as (net, a, b):
        capture = net.capture(a, writer)
        os.close(writer)
        a.end.tx([frame(mac(2), mac(1))])
        assert os.read(reader, 1 << 16)
        os.close(reader)
        assert capture.wait(10)
        assert capture.why == "its reader has left"
        assert str(capture.file.explain()).startswith("Nothing is written any more: its reader has left.")
        assert repr(capture).startswith("<capture to '-': ended (its reader has left)")
        a.end.tx([frame(mac(2), mac(1))] * 5)
        assert len(receive(b.end, 6)) == 6
        capture.stop()
        assert net.spec.cables == {("a", "sw"), ("b", "sw")}


def test_a_reader_that_does_not_read_costs_packets_that_are_counted():
    reader, writer = os.pipe()
    found: list[bytes] = []
    with pair() as (net, a, b), os.fdopen(writer, "wb") as opened:
        capture = net.capture(a, opened)
        opened.close()
        sent = 0
        frames = [frame(mac(2), mac(1)).ljust(9000, b"x")] * 100
        while not capture.dropped:
            assert a.end.tx(frames) == 100
            assert len(receive(b.end, 100)) == 100  # nobody waits
            sent += 100
        assert capture.stats().drops.keys() == {"no_room"}
        assert eventually(lambda: capture.packets + capture.dropped == sent)
        packets, dropped = capture.packets, capture.dropped
        reading = read_all(reader, found)
        assert eventually(lambda: a.end.tx(frames[:1]) and capture.packets > packets, 10)
        assert capture.dropped >= dropped
        capture.stop()
        reading.join(10)
    (data,) = found
    statistics = blocks(data)[5][0]
    received, lost = (int.from_bytes(statistics[code], "little") for code in (4, 5))
    assert lost >= dropped
    assert len(blocks(data)[6]) == received - lost


def test_what_cannot_be_written_to_is_refused_and_nothing_is_kept():
    with pair() as (net, a, _b):
        for to in (12345, -1):
            with pytest.raises(vn.ConfigError, match="cannot be written to"):
                net.capture(a, to)
        with pytest.raises(vn.ConfigError, match="for reading only"), open(__file__) as own:  # noqa: PTH123
            net.capture(a, own)
        reader, writer = os.openpty()
        try:
            with pytest.raises(vn.ConfigError, match="terminal"):
                net.capture(a, writer)
        finally:
            os.close(reader)
            os.close(writer)
        with pytest.raises(vn.ConfigError, match="snap is a number of bytes"):
            net.capture(a, snap=3)
        with pytest.raises(vn.ConfigError, match="memory is a number of bytes"):
            net.capture(a, memory=1 << 40)
        assert net.captures == ()


def test_a_full_disk_ends_the_capture_and_says_so():
    with pair() as (net, a, b):
        with pytest.raises(vn.PortError, match="No space left"):
            net.capture(a, "/dev/full")
        a.end.tx([frame(mac(2), mac(1))])
        assert len(receive(b.end)) == 1


def test_packets_become_columns_with_their_times():
    with pair() as (net, a, b), net.capture(a, filter="udp" if ctypes.util.find_library("pcap") else "") as capture:
        before = np.datetime64("now", "ns").astype(np.int64) - 10**9
        a.end.tx([udp(53), udp(54)])
        assert len(receive(b.end, 2)) == 2
        b.end.tx([udp(55).ljust(700, b"x")])
        assert len(receive(a.end)) == 1
        assert eventually(lambda: capture.packets == 3)
        burst = capture.read(timeout_s=5)
        assert burst.columns.l4_dst.tolist() == [53, 54, 55]
        assert burst.columns.wire_length.tolist() == burst.columns.length.tolist() == [60, 60, 700]
        times = burst.columns.time_ns.copy()
        assert (np.diff(times) >= 0).all()
        assert before < times[0] <= times[2] < before + 3600 * 10**9
        assert bytes(burst[0]) == udp(53)
        later = burst[burst.columns.l4_dst > 53]
        assert later.columns.time_ns.tolist() == times[1:].tolist()
        assert later[::-1].columns.wire_length.tolist() == [700, 60]
        assert {"time_ns", "wire_length"} <= burst.columns.to_dict().keys()
        assert len(capture.read()) == 0
        a.end.tx([udp(56)])
        assert len(capture.read(timeout_s=None)) == 1
        a.end.tx([udp(57)])
        assert len(receive(b.end, 2)) == 2
    assert capture.read().columns.l4_dst.tolist() == [57]  # what came before the end is there after it
    assert len(capture.read(timeout_s=None)) == 0


def test_columns_take_bounded_memory_and_what_does_not_fit_is_counted():
    with pair() as (net, a, b):
        capture = net.capture(a, snap=64, memory=10_000)
        for _ in range(5):
            a.end.tx([frame(mac(2), mac(1)).ljust(1500, b"x")] * 100)
            assert len(receive(b.end, 100)) == 100
        assert eventually(lambda: capture.packets + capture.dropped == 500)
        assert capture.stats().drops.keys() == {"no_room"}
        burst = capture.read()
        assert len(burst) == capture.packets == 102
        assert set(burst.columns.length.tolist()) == {64}
        assert set(burst.columns.wire_length.tolist()) == {1500}
        a.end.tx([frame(mac(2), mac(1))])
        assert len(capture.read(timeout_s=5)) == 1
        capture.stop()
        capture.stop()


def test_several_workers_write_into_one_capture(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    with pair(cpus=sorted(os.sched_getaffinity(0))[:2]) as (net, a, b):
        files = net.capture(a, tmp_path / "out.pcapng")
        columns = net.capture(b)
        for _ in range(10):
            a.end.tx([frame(mac(2), mac(1))] * 50)
            assert len(receive(b.end, 50)) == 50
        assert eventually(lambda: (files.packets, columns.packets) == (500, 500))
        assert eventually(lambda: net.stats().balance().exact)
        files.stop()
        assert len(columns.read()) == 500
    assert len(written(tmp_path / "out.pcapng")) == 500


def test_captures_that_come_and_go_lose_nobody_a_packet(tmp_path):
    with pair() as (net, a, b):
        ended = threading.Event()
        found: list[int] = []

        def talk() -> None:
            number = 0
            while not ended.is_set():
                frames = [frame(mac(2), mac(1), (number + i).to_bytes(4, "big")) for i in range(50)]
                number += a.end.tx(frames)
                found.extend(int.from_bytes(one[14:18], "big") for one in receive(b.end, 50))
            assert number == len(found)

        talking = threading.Thread(target=talk)
        b.end.tx([frame(b"\xff" * 6, mac(2))])
        talking.start()
        for i in range(15):
            reader, writer = os.pipe()
            with (
                net.capture(a, tmp_path / f"{i}.pcapng") as file,
                net.capture(b) as columns,
                net.capture((a, net["sw"]), writer),
            ):
                os.close(writer)
                assert eventually(lambda file=file, columns=columns: file.packets and columns.packets)
                if i % 2:
                    os.close(reader)
            if not i % 2:
                os.close(reader)
        ended.set()
        talking.join(20)
        assert found == list(range(len(found)))
        assert net.stats().functions["sw"].drops == {}


def seen(path) -> list[tuple[str, int | None, bytes]]:
    """Where each packet of a pcapng file was seen, which way it was going (1: inbound, 2: outbound), and its bytes."""
    with RawPcapNgReader(str(path)) as reader:
        return [(about.ifname.decode(), about.direction, bytes(data)) for data, about in reader]


def counts(path) -> list[dict[int, int]]:
    """The counts that each interface ends with: 4 received, 5 dropped, 6 passed by the filter, 8 delivered."""
    return [
        {code: int.from_bytes(value, "little") for code, value in options.items() if code > 3}
        for options in blocks(path.read_bytes())[5]
    ]


there, back = frame(mac(2), mac(1), b"there"), frame(mac(1), mac(2), b"back")


def talk(a, b) -> None:
    """One frame there and one back."""
    a.end.tx([there])
    assert receive(b.end) == [there]
    b.end.tx([back])
    assert receive(a.end) == [back]


@pytest.mark.parametrize(
    ("place", "name", "ways"),
    [
        ("a", "a", (1, 2)),
        ("b", "b", (2, 1)),
        (("a", "sw"), "a-sw", (1, 2)),
        (("sw", "a"), "sw-a", (2, 1)),
        (("sw", "fw"), "sw-fw", (1, 2)),
        (("fw", "sw"), "fw-sw", (2, 1)),
        (("fw", "b"), "fw-b", (1, 2)),
    ],
)
def test_what_comes_from_the_place_is_inbound_and_what_goes_to_it_outbound(tmp_path, place, name, ways):
    """At a port, at a cable, and at either side of a function; b is plugged in before a."""
    path = tmp_path / "out.pcapng"
    with vn.Net() as net:
        b, a = net.memory("b"), net.memory("a")
        b >> net.firewall(["pass"], name="fw") >> net.switch(name="sw") << a
        where = tuple(net[end] for end in place) if isinstance(place, tuple) else net[place]
        with net.capture(where, path) as capture, net.capture(place) as columns:
            assert capture.places == columns.places == (name,)
            talk(a, b)
            assert eventually(lambda: (capture.packets, columns.packets) == (2, 2))
        assert net.stats().balance().exact
    assert seen(path) == [(name, ways[0], there), (name, ways[1], back)]
    found = columns.read()
    assert found.columns.direction.tolist() == list(ways)
    assert found.columns.place.tolist() == [0, 0]


def test_a_reply_is_seen_after_what_it_replies_to(tmp_path):
    path = tmp_path / "out.pcapng"
    with vn.Net() as net:
        a = net.memory("a")
        a >> net.echo(name="mirror")
        with net.capture(["a"], path) as capture:
            a.end.tx([there])
            assert len(receive(a.end)) == 1
            assert eventually(lambda: capture.packets == 2)
    assert [way for _, way, _ in seen(path)] == [1, 2]


@needs_libpcap
def test_several_places_are_interfaces_with_names_filters_and_counts_of_their_own(tmp_path):
    path = tmp_path / "out.pcapng"
    with pair() as (net, a, b):
        c = net.memory("c")
        c >> net["sw"]
        with net.capture([a, (net["sw"], b), "c"], path, filter=["udp", "", "udp port 53"]) as capture:
            assert capture.places == ("a", "sw-b", "c")
            assert [tee.name for tee in capture.tees] == ["tee-capture-out", "tee-capture-out-2", "tee-capture-out-3"]
            c.end.tx([frame(mac(1), mac(3))])  # the switch learns who is where: nobody else sees what follows
            assert len(receive(a.end)) == len(receive(b.end)) == 1
            b.end.tx([frame(mac(3), mac(2))])
            assert len(receive(c.end)) == 1
            a.end.tx([udp(53), frame(mac(2), mac(1)), udp(54)])
            assert len(receive(b.end, 3)) == 3
            assert eventually(lambda: capture.packets == 7)
    interfaces = blocks(path.read_bytes())[1]
    assert [(options[2], options.get(11)) for options in interfaces] == [
        (b"a", b"\0udp"),
        (b"sw-b", None),
        (b"c", b"\0udp port 53"),
    ]
    found = seen(path)
    assert [way for place, way, _ in found if place == "a"] == [1, 1]
    assert [way for place, way, _ in found if place == "sw-b"] == [1, 2, 1, 1, 1]
    assert counts(path) == [{5: 0, 6: 2, 8: 2}, {4: 5, 5: 0, 8: 5}, {5: 0, 6: 0, 8: 0}]
    with pair() as (net, a, b), net.capture([a, b], tmp_path / "one.pcapng", filter="udp port 53") as capture:
        a.end.tx([udp(53), udp(54)])
        assert len(receive(b.end, 2)) == 2
        assert eventually(lambda: capture.packets == 2)
    assert [options[11] for options in blocks((tmp_path / "one.pcapng").read_bytes())[1]] == [b"\0udp port 53"] * 2


def test_several_places_are_columns_with_the_place_and_the_direction():
    with pair() as (net, a, b), net.capture([a, b]) as capture:
        talk(a, b)
        assert eventually(lambda: capture.packets == 4)
        columns = capture.read().columns
        places = [capture.places[place] for place in columns.place]
        assert list(zip(places, columns.direction.tolist(), strict=True)) == [("a", 1), ("b", 2), ("b", 1), ("a", 2)]
        assert {"place", "direction"} <= columns.to_dict().keys()
        talk(a, b)
        assert eventually(lambda: capture.packets == 8)
        later = capture.read()
        inbound = later[later.columns.direction == 1]
        assert inbound.columns.place.tolist() == [0, 1]
        assert inbound[::-1].heads(14).columns.place.tolist() == [1, 0]
        assert inbound.places == inbound.heads(14).places == capture.places == ("a", "b")
    fresh = vn.Burst([there])
    assert (fresh.columns.direction.tolist(), fresh.columns.place.tolist(), fresh.places) == ([0], [0], ())


def test_a_live_reader_gets_several_places_and_each_counts_what_it_lost():
    reader, writer = os.pipe()
    found: list[bytes] = []
    with pair() as (net, a, b):
        capture = net.capture([a, b], writer)
        os.close(writer)
        frames = [frame(mac(2), mac(1)).ljust(9000, b"x")] * 100
        sent = 0
        while not capture.dropped:
            assert a.end.tx(frames) == 100
            assert len(receive(b.end, 100)) == 100
            sent += 100
        assert eventually(lambda: capture.packets + capture.dropped == 2 * sent)
        dropped = capture.dropped
        reading = read_all(reader, found)
        capture.stop()
        reading.join(20)
    (data,) = found
    statistics = [{code: int.from_bytes(one[code], "little") for code in (4, 5, 8)} for one in blocks(data)[5]]
    assert [one[4] for one in statistics] == [sent, sent]
    assert sum(one[5] for one in statistics) == dropped
    assert all(one[4] == one[5] + one[8] for one in statistics)
    assert len(blocks(data)[6]) == sum(one[8] for one in statistics)


def test_a_place_that_goes_leaves_the_others_and_the_last_one_ends_the_capture(tmp_path):
    path = tmp_path / "out.pcapng"
    with pair() as (net, a, b):
        capture = net.capture(["a", "b"], path)
        talk(a, b)
        assert eventually(lambda: capture.packets == 4)
        before = net.spec
        net.apply(vn.Spec({"b": before.ports["b"]}, before.functions, {("b", "sw")}))
        assert capture.running
        b.end.tx([back])
        assert eventually(lambda: capture.packets == 5)
        net.rollback()  # its place is not taken up again
        net["a"].end.tx([there])
        assert receive(b.end) == [there]
        assert eventually(lambda: capture.packets == 6)
        net.remove(b)
        assert capture.wait(5)
        assert net.captures == ()
    assert [(place, way) for place, way, _ in seen(path)[4:]] == [("b", 1), ("b", 2)]
    assert counts(path) == [{4: 2, 5: 0, 8: 2}, {4: 4, 5: 0, 8: 4}]


def test_directions_stay_when_captures_come_and_go_around_and_cables_move(tmp_path):
    path = tmp_path / "out.pcapng"
    with pair() as (net, a, b):
        before = net.capture(("sw", "a"))
        with net.capture([a], path) as capture, net.capture(a) as behind:
            talk(a, b)
            assert eventually(lambda: (capture.packets, before.packets, behind.packets) == (2, 2, 2))
            before.stop()
            talk(a, b)
            assert eventually(lambda: (capture.packets, behind.packets) == (4, 4))
            with net.change():
                net.unplug(a, net["sw"])
                net.switch(name="other") << a
                net["other"] << net.memory("c")
            a.end.tx([there])
            assert receive(net["c"].end) == [there]
            assert eventually(lambda: (capture.packets, behind.packets) == (5, 5))
        assert before.read().columns.direction.tolist() == [2, 1]
        assert behind.read().columns.direction.tolist() == [1, 2, 1, 2, 1]
    assert [way for _, way, _ in seen(path)] == [1, 2, 1, 2, 1]


def test_several_workers_know_places_and_directions():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    with pair(cpus=sorted(os.sched_getaffinity(0))[:2]) as (net, a, b), net.capture([a, b]) as capture:
        for _ in range(20):
            talk(a, b)
        assert eventually(lambda: capture.packets == 80)
        columns = capture.read().columns
        seen_there = (columns.eth_src == int.from_bytes(mac(1), "big")).tolist()
        expected = [(0, 1) if is_there else (0, 2) for is_there in seen_there]
        found = list(zip(columns.place.tolist(), columns.direction.tolist(), strict=True))
        at_a = [(one, wanted) for one, wanted in zip(found, expected, strict=True) if one[0] == 0]
        assert len(at_a) == 40
        assert all(one == wanted for one, wanted in at_a)
        assert sorted(found) == sorted([(0, 1), (0, 2), (1, 1), (1, 2)] * 20)
        assert eventually(lambda: net.stats().balance().exact)


@pytest.mark.parametrize(
    ("where", "options", "says"),
    [
        ([], {}, "at 1 to 4096 places, found 0"),
        (["a", "a"], {}, "'a' and 'a' are the same cable"),
        (["a", "b", ("sw", "a")], {}, "'a' and 'sw-a' are the same cable"),
        (["a", "nobody"], {}, "there is no node 'nobody'"),
        (["a", "sw"], {}, "'sw' has 2 cables"),
        ([("a", "sw", "b")], {}, "found 3 nodes"),
        (["a", "b"], {"filter": ["arp"]}, "one for each of 2 places"),
        (["a", "b"], {"filter": ["arp", 7]}, "one for each of 2 places"),
        (["a", "b"], {"pcap": True}, "write pcapng"),
        ([7], {}, "expected a node"),
    ],
)
def test_places_that_cannot_be_are_refused_and_nothing_is_left(tmp_path, where, options, says):
    with pair() as (net, a, b):
        with pytest.raises(vn.ConfigError, match=says):
            net.capture(where, tmp_path / "out.pcapng", **options)
        assert net.captures == ()
        assert not (tmp_path / "out.pcapng").exists()
        with pytest.raises(vn.ConfigError, match="write pcapng"):
            net.capture([a, b], tmp_path / "out.PCAP")
        talk(a, b)


def test_a_capture_file_is_read_back_as_the_columns_that_were_written(tmp_path):
    path = tmp_path / "out.pcapng"
    with pair() as (net, a, b):
        with net.capture([a, b], path) as capture, net.capture([a, b]) as columns:
            talk(a, b)
            assert eventually(lambda: (capture.packets, columns.packets) == (4, 4))
        expected = columns.read()
    found = vn.Burst.from_capture(path)
    assert found.places == expected.places == ("a", "b")
    assert [bytes(one) for one in found] == [bytes(one) for one in expected]
    for name in ("direction", "place", "wire_length", "length", "eth_src"):
        assert found.columns[name].tolist() == expected.columns[name].tolist()
    with RawPcapNgReader(str(path)) as reader:
        times = [(about.tshigh << 32) + about.tslow for _, about in reader]
    assert found.columns.time_ns.tolist() == times


def test_capture_files_of_others_are_read_with_what_they_say(tmp_path):
    """Sections of either byte order, interfaces without a name, packets without flags, cut ones; and pcap."""

    def block(order: str, kind: int, body: bytes) -> bytes:
        length = struct.pack(order + "I", 12 + len(body))
        return struct.pack(order + "I", kind) + length + body + length

    def section(order: str, *interfaces: bytes) -> bytes:
        head = block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))
        return head + b"".join(block(order, 1, struct.pack(order + "HHI", 1, 0, 0) + options) for options in interfaces)

    def packet(order: str, interface: int, us: int, flags: int | None) -> bytes:
        body = struct.pack(order + "5I", interface, us >> 32, us & 0xFFFFFFFF, 16, 1500) + bytes(16)
        option = b"" if flags is None else struct.pack(order + "HHIHH", 2, 4, flags, 0, 0)
        return block(order, 6, body + option)

    path = tmp_path / "others.pcapng"
    eth0 = struct.pack(">HH4sHH", 2, 4, b"eth0", 0, 0)
    now_us = 1_790_000_000_123_456
    path.write_bytes(
        section(">", eth0, b"")
        + packet(">", 1, now_us, 0b101)
        + packet(">", 0, now_us + 1, None)
        + section("<", b"")
        + packet("<", 0, now_us - 5, 0b1110)
        + packet("<", 0, now_us + 7, 3)
    )
    found = vn.Burst.from_capture(str(path))
    assert found.places == ("eth0", "", "")
    assert found.columns.place.tolist() == [1, 0, 2, 2]
    assert found.columns.direction.tolist() == [1, 0, 2, 0]
    assert found.columns.length.tolist() == [16] * 4
    assert found.columns.wire_length.tolist() == [1500] * 4
    assert found.columns.time_ns.tolist() == [(now_us + us) * 1000 for us in (0, 1, -5, 7)]
    (tmp_path / "cut.pcapng").write_bytes(path.read_bytes()[:-70])
    with pytest.raises(vn.VirtnetError, match=r"it is cut: 50 bytes are left, .* \(block 8, byte 236"):
        vn.Burst.from_capture(tmp_path / "cut.pcapng")
    (tmp_path / "one.pcap").write_bytes(
        struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 96, 1) + struct.pack("<4I", 7, 9, 14, 60) + bytes(14)
    )
    found = vn.Burst.from_capture(tmp_path / "one.pcap")
    assert (found.places, found.columns.time_ns.tolist()) == (("",), [7_000_000_009])
    assert (found.columns.wire_length.tolist(), found.columns.direction.tolist()) == ([60], [0])
    (tmp_path / "none.pcap").write_bytes((tmp_path / "one.pcap").read_bytes()[:24])
    assert len(vn.Burst.from_capture(tmp_path / "none.pcap")) == 0
    with pytest.raises(vn.PortError, match="No such file"):
        vn.Burst.from_capture(tmp_path / "nowhere.pcap")
