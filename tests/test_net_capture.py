"""Captures of a place in a network: what is in the file, and what it costs the others."""

from __future__ import annotations

import ctypes.util
import struct

import pytest

import virtnet as vn
from helpers import eventually, frame, mac, receive
from virtnet.filters import compile_filter

needs_libpcap = pytest.mark.skipif(ctypes.util.find_library("pcap") is None, reason="libpcap is not installed")


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
