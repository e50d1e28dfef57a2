"""Generators and analysers: what is made is what was asked for, and what became of it is counted to the packet."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

import virtnet as vn
from helpers import BROADCAST, eventually, frame, mac, receive

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def net():
    with vn.Net() as net:
        yield net
    assert net.stats().balance().exact
    for node in net:
        if isinstance(node, vn.PortNode) and node.end is not None:
            node.end.close()


def send_all(generator: vn.Generator, analyser: vn.Analyser) -> vn.AnalyserReport:
    """Waits until all is sent and has had its time."""
    assert generator.wait(timeout_s=20)
    assert eventually(lambda: generator.net.stats().balance().in_transit == 0)
    return analyser.report(generator)


def test_all_that_is_sent_is_received_and_its_time_is_counted(net):
    generator, analyser = net.generator(count=5000, rate_pps=50_000), net.analyser()
    generator >> analyser
    report = send_all(generator, analyser)
    assert (report.received, report.lost, report.reordered, report.duplicates, report.late) == (5000, 0, 0, 0, 0)
    (stream,) = report.streams
    assert (stream.sent, stream.name, stream.received_bytes) == (5000, "generator.0", 300_000)
    # Never faster but for what is made up for; a host that is busy makes it slower.
    assert 5000 < stream.rate_pps < 52_000
    assert stream.latency.counts.sum() == stream.latency.count == 5000
    assert (report.foreign, report.corrupted) == (0, 0)


def test_losses_and_duplicates_are_those_of_the_cable(net):
    generator, analyser = net.generator(count=20_000, rate_pps=100_000), net.analyser()
    cable = net.impair(generator, analyser, loss=0.1, duplicate=0.05, direction="from", seed=3)
    report = send_all(generator, analyser)
    counts = cable.report().from_a.counts
    assert counts["lost"] > 1000
    assert report.lost == counts["lost"]
    assert report.duplicates == counts["duplicated"]
    assert report.received + report.duplicates == counts["sent"]
    assert report.streams[0].sent == 20_000


def test_what_overtakes_is_reordered_and_nothing_is_lost(net):
    generator, analyser = net.generator(count=5000, rate_pps=50_000), net.analyser()
    net.impair(generator, analyser, delay_ms=5, reorder=0.1, direction="from", seed=1)
    report = send_all(generator, analyser)
    assert (report.received, report.lost, report.duplicates, report.late) == (5000, 0, 0, 0)
    # A tenth overtakes the others, so that nearly all others come behind one of a higher number.
    assert 4000 < report.reordered < 5000
    assert report.latency.max >= 5_000_000
    assert report.latency.percentile(50) >= 5_000_000
    assert report.latency.min < 5_000_000


def test_every_packet_that_was_changed_on_its_way_is_corrupted_where_checksums_are_looked_at(net):
    datagram = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src="10.0.0.1", dst="10.0.0.2") / UDP()
    generator = net.generator(bytes(datagram / Raw(bytes(1000))), count=2000, rate_pps=50_000)
    analyser = net.analyser(check=True)
    net.impair(generator, analyser, corrupt=1, direction="from", seed=2)
    report = send_all(generator, analyser)
    # What the Ethernet header or the type of the protocol says is covered by no checksum.
    assert report.corrupted + report.foreign + report.received == 2000
    assert report.corrupted > 1900
    assert report.lost == 2000 - report.received


def test_foreign_packets_are_counted_apart(net):
    port, analyser = net.memory("port"), net.analyser()
    port >> analyser
    port.end.tx([frame(BROADCAST, mac(1), bytes([i])) for i in range(10)] + [bytes(14), bytes(1)])
    assert eventually(lambda: analyser.report().foreign == 12)
    assert analyser.report().received == 0
    assert "foreign 12" in str(analyser.report())


def test_streams_are_told_apart_and_so_are_generators(net):
    a = net.generator(vn.Stream(count=100, name="slow", rate_pps=5000), vn.Stream(count=300, size=200))
    b = net.generator(count=50)
    analyser = net.analyser()
    port_a, port_b = net.memory("a"), net.memory("b")
    a >> port_a
    b >> port_b
    into = net.memory("into")
    into >> analyser
    assert a.wait(5)
    assert b.wait(5)
    for port, n in ((port_a, 400), (port_b, 50)):
        into.end.tx(receive(port.end, n))
    assert eventually(lambda: analyser.report().received == 450)
    report = analyser.report(a, b)
    assert [(stream.id, stream.name, stream.received) for stream in report.streams] == [
        (0, "slow", 100),
        (1, "generator.1", 300),
        (2, "generator-2.0", 50),
    ]
    assert report.lost == 0
    assert report.streams[0].latency.min > 0


def test_it_counts_anew_while_it_runs(net):
    generator, analyser = net.generator(rate_pps=20_000), net.analyser()
    generator >> analyser
    assert eventually(lambda: analyser.report().received > 100)
    before = analyser.report().received
    analyser.reset()
    after = analyser.report()
    assert after.received < before + 20_000
    generator.set(count=0)
    analyser.reset()
    assert (analyser.report().received, analyser.report(generator).lost) == (0, 0)
    generator.set(count=500, rate_pps=None)
    report = send_all(generator, analyser)
    assert (report.received, report.lost, report.streams[0].sent) == (500, 0, 500)


def test_the_last_packets_are_missed_where_it_is_known_how_many_were_sent(net):
    generator, analyser = net.generator(count=100), net.analyser()
    net.impair(generator, analyser, loss=1, direction="from")
    assert generator.wait(5)
    assert analyser.report().lost == 0
    report = analyser.report(generator)
    assert (report.lost, report.streams[0].sent) == (100, 100)


FRAMES = {
    "udp": Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1000, dport=2000) / Raw(b"odd" * 11),
    "long": Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1000, dport=2000) / Raw(bytes(range(250)) * 5),
    "tcp": Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(options=[("MSS", 1460)]) / Raw(bytes(40)),
    "icmp": Ether() / IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(id=1, seq=1) / Raw(bytes(40)),
    "vlan": Ether() / Dot1Q(vlan=7, prio=3) / IP(src="10.0.0.1", dst="10.0.0.2") / UDP() / Raw(bytes(40)),
    "ipv6": Ether() / IPv6(src="fd00::1", dst="fd00::2") / UDP(sport=1000, dport=2000) / Raw(bytes(40)),
}


@pytest.mark.parametrize("name", FRAMES)
def test_checksums_are_those_that_scapy_makes(net, name):
    packet = FRAMES[name]
    packet[Ether].src, packet[Ether].dst = "02:00:00:00:00:01", "02:00:00:00:00:02"
    vary: dict = {(0, 6): vn.Counter(2 << 40, count=5)}
    vary |= {"eth_src": vn.Random("02:00:00:00:00:00", "02:00:00:00:00:ff")}
    if IP in packet:
        vary |= {"ip_src": vn.Counter("10.0.0.250", step=1, count=20), "ip_dst": ["10.1.2.3", "10.1.2.4"]}
        vary |= {"ip_ttl": vn.Counter(64, step=-1, count=3)}
    else:
        vary |= {"ip6_src": vn.Counter("fd00::ffff", count=20), "ip6_dst": vn.Random("fd00::", "fd00::ffff:ffff")}
    if UDP in packet or TCP in packet:
        vary |= {"l4_src": range(1024, 65536, 1000), "l4_dst": vn.Random(0, 65535)}
    if Dot1Q in packet:
        vary |= {"vlan": vn.Counter(4090, count=10)}
    generator, port = net.generator(vn.Stream(packet, vary=vary, count=200)), net.memory("port")
    generator >> port
    frames = receive(port.end, 200)
    assert len(frames) == 200
    for sent in frames:
        found = Ether(sent)
        again = Ether(sent)
        for layer in (IP, UDP, TCP, ICMP):
            if layer in again:
                del again[layer].chksum
        assert bytes(again) == sent, found.summary()
        if Dot1Q in found:
            assert found[Dot1Q].prio == 3
    if IP in packet:
        assert {Ether(sent)[IP].src for sent in frames} == {
            f"10.0.{(250 + k) >> 8}.{(250 + k) & 255}" for k in range(20)
        }
        assert {Ether(sent)[IP].ttl for sent in frames} == {62, 63, 64}
    assert len(set(frames)) == 200


def test_a_datagram_without_a_checksum_stays_without(net):
    generator, port = net.generator(vn.Stream(vary={"ip_src": [1, 2]}, count=10)), net.memory("port")
    generator >> port
    for sent in receive(port.end, 10):
        assert Ether(sent)[UDP].chksum == 0
        again = Ether(sent)
        del again[IP].chksum
        assert bytes(again) == sent


def test_a_rate_in_bits_is_one_of_frames_and_bursts_leave_together(net):
    generator = net.generator(size=1000, rate_bps=8e6, burst=50, count=300)
    analyser = net.analyser()
    began = time.monotonic()
    generator >> analyser
    assert generator.wait(5)
    # Five waits of 50 ms between six bursts.
    assert 0.24 < time.monotonic() - began < 2
    assert analyser.report(generator).received == 300


def test_with_a_rate_what_finds_no_room_is_dropped_and_without_one_nothing_is(net):
    slow, fast = net.memory("slow", capacity=64), net.memory("fast", capacity=64)
    paced, unpaced = net.generator(count=1000, rate_pps=1e6), net.generator(count=1000)
    paced >> slow
    unpaced >> fast
    assert paced.wait(5)
    dropped = slow.stats().tx_drops["no_room"]
    assert dropped + len(receive(slow.end, 1000, timeout_s=0.5)) == 1000
    assert len(receive(fast.end, 1000)) == 1000
    assert fast.stats().tx_drops == {}


def test_it_stands_in_a_cable_and_passes_what_comes_back(net):
    analyser, port = net.analyser(), net.memory("port")
    generator = net.generator(count=100, to=port)
    analyser >> generator
    came = receive(port.end, 100)
    port.end.tx(came)
    assert eventually(lambda: analyser.report(generator).received == 100)
    assert analyser.report(generator).lost == 0


def test_a_switch_between_loses_nothing_of_streams_to_several_stations(net):
    generator, switch = (
        net.generator(
            vn.Stream(count=0, vary={"eth_dst": vn.Counter(mac(1).hex(":"), count=2), "eth_src": [mac(9).hex(":")]})
        ),
        net.switch(),
    )
    ports = [net.memory(f"p{i}", capacity=64 * (1 + i)) for i in (1, 2)]
    for i, port in enumerate(ports, 1):
        port >> switch
        port.end.tx([frame(BROADCAST, mac(i))])
    assert eventually(lambda: switch.stats().detail["entries"] == 2)
    ports[0].end.rx(timeout_s=0.3)
    analyser = net.analyser()
    into = net.memory("into", capacity=8192)
    into >> analyser
    generator.set(count=2000)
    generator >> switch
    got = 0
    deadline = time.monotonic() + 10
    while got < 2000 and time.monotonic() < deadline:
        for port in ports:
            burst = port.end.rx(timeout_s=0.01)
            got += into.end.tx(burst)
    assert eventually(lambda: analyser.report().received == 2000)
    assert (analyser.report(generator).lost, analyser.report().duplicates) == (0, 0)


def test_a_file_describes_it():
    text = """
    cables = [["g", "a"]]
    functions.a = { kind = "analyser", check = true }
    [functions.g]
    kind = "generator"
    first_id = 5
    streams = [
        { rate_pps = 1000, count = 7, name = "web", vary = [{ at = "ip_src", start = "10.0.0.1", count = 254 }] },
        { size = 500, rate_bps = 1e6, burst = 2, vary = [{ at = "36:2", values = [80, 443] }] },
    ]
    """
    spec = vn.Spec.from_toml(text)
    assert vn.Spec.from_toml(spec.to_toml()) == spec
    with vn.Net.of(spec) as net:
        assert eventually(lambda: net["a"].report().received > 7)
        assert [stream.id for stream in net["a"].report().streams] == [5, 6]
        assert net["a"].report().streams[0].name == "web"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda net: net.generator(rate_pps=0), "rate_pps|minimum"),
        (lambda net: net.generator(rate_pps=1, rate_bps=1), "not both"),
        (lambda net: net.generator(size=59), "59"),
        (lambda net: net.generator(count=-1), "-1"),
        (lambda net: net.generator(bytes(60), size=70) and net.generator(vn.Stream(bytes(60), size=70)), "size is for"),
        (lambda net: net.generator(vn.Stream(vary={"ip_source": [1]})), "ip_src"),
        (lambda net: net.generator(vn.Stream(vary={"ip_src": ["10.0.0"]})), "no address"),
        (lambda net: net.generator(vn.Stream(vary={"l4_dst": [65536]})), "16 bits"),
        (lambda net: net.generator(vn.Stream(vary={"l4_dst": vn.Random(5, 4)})), "low is above high"),
        (lambda net: net.generator(vn.Stream(vary={(40, 4): [1]})), "overlaps the signature"),
        (lambda net: net.generator(vn.Stream(vary={"ip6_src": [1]})), "a field that its frame has"),
        (lambda net: net.generator(*[vn.Stream()] * 65), "too long|64"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_be(make, text):
    with vn.Net() as net, pytest.raises(vn.ConfigError, match=text):
        make(net)


def test_a_histogram_is_numpy_arrays():
    latency = vn.Latency(4, 1, 100, 30.0, ((1, 1, 1), (8, 8, 2), (96, 99, 1)))
    assert latency.lows.dtype == latency.highs.dtype == latency.counts.dtype == np.uint64
    assert latency.counts.tolist() == [1, 2, 1]
    assert [latency.percentile(p) for p in (0, 25, 50, 75, 99.99)] == [1, 1, 8, 8, 99]
    assert "p50" in repr(latency)
    assert "no packets" in repr(vn.Latency())
