"""Cables with faults: what is asked for comes of it, changes while it runs, and every packet is accounted for."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

import virtnet as vn
from helpers import BROADCAST, eventually, frame, mac, receive

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def net():
    with vn.Net() as net:
        yield net
    assert net.stats().balance().exact
    assert net.stats().balance().in_transit == 0
    for node in net:
        if isinstance(node, vn.PortNode):
            node.end.close()  # who has waited there has a pipe


def numbered(n: int) -> list[bytes]:
    return [frame(BROADCAST, mac(1), i.to_bytes(4, "big")) for i in range(n)]


def test_a_delay_is_never_shorter_and_the_report_says_how_much_longer(net):
    a, b = net.memory("a"), net.memory("b")
    cable = net.impair(a, b, delay_ms=50)
    began = time.monotonic()
    a.end.tx(numbered(200))
    assert receive(b.end, 200) == numbered(200)
    assert time.monotonic() - began >= 0.05
    line = cable.report().from_a
    assert (line.counts["sent"], line.counts["held"]) == (200, 0)
    assert line.asked_delay_ms["min"] == line.asked_delay_ms["max"] == 50
    assert line.delay_ms["min"] >= 50
    assert line.delay_ms["max"] - 50 == pytest.approx(line.late_ms["max"], abs=0.001)
    assert cable.report().to_a.counts["received"] == 0
    assert "asked" in str(cable.report())


def test_packets_that_wait_are_in_transit_and_dropped_at_the_end():
    with vn.Net() as net:
        a, b = net.memory("a"), net.memory("b")
        cable = net.impair(a, b, delay_ms=3_600_000)
        a.end.tx(numbered(100))
        assert eventually(lambda: net.stats().balance().in_transit == 100)
        assert net.stats().balance().exact
        gone = net.impair(net.memory("c"), net.memory("d"), delay_ms=1000)
        net["c"].end.tx(numbered(10))
        assert eventually(lambda: gone.report().from_a.counts["held"] == 10)
        gone.remove()
        assert net.stats().balance().in_transit == 100
        assert net.stats().balance().exact
    assert cable.stats().drops == {"flushed": 100}
    assert net.stats().balance().exact
    assert net.stats().balance().in_transit == 0


def test_losses_are_those_of_the_seed_in_every_run():
    def survivors(seed: int) -> list[bytes]:
        with vn.Net() as net:
            a, b = net.memory("a"), net.memory("b")
            cable = net.impair(a, b, loss=0.2, seed=seed)
            a.end.tx(numbered(1000))
            assert eventually(lambda: cable.report().from_a.counts["received"] == 1000)
            lost = cable.report().from_a.counts["lost"]
            assert cable.stats().drops == {"lost": lost}
            assert cable.report().from_a.loss == pytest.approx(0.2, abs=0.05)
            return receive(b.end, 1000 - lost)

    first = survivors(1)
    assert first == survivors(1)
    assert first != survivors(2)


def test_a_direction_alone_is_impaired(net):
    a, b = net.memory("a"), net.memory("b")
    cable = net.impair(a, b, loss=1, direction="to")
    a.end.tx(numbered(10))
    assert len(receive(b.end, 10)) == 10
    b.end.tx(numbered(10))
    assert eventually(lambda: cable.stats().drops == {"lost": 10})
    assert cable.report().from_a is None


def test_a_rate_is_kept_and_a_full_buffer_drops(net):
    a, b = net.memory("a", capacity=4096), net.memory("b", capacity=4096)
    cable = net.impair(a, b, rate_bps=8_000_000, queue_packets=200)
    began = time.monotonic()
    a.end.tx([bytes(1000)] * 400)
    assert eventually(lambda: cable.report().from_a.counts["sent"] >= 200)
    assert eventually(lambda: cable.report().from_a.counts["held"] == 0)
    assert time.monotonic() - began >= 0.19
    line = cable.report().from_a
    assert line.counts["sent"] + line.counts["queue_full"] == 400
    # The first may have left late, which makes the rest look early.
    assert line.rate_bps == pytest.approx(8e6, rel=0.3)
    assert line.queued_ms["max"] >= 100


def test_orders_change_in_place(net):
    a, b = net.memory("a"), net.memory("b")
    cable = net.impair(a, b, loss=1)
    a.end.tx(numbered(10))
    assert eventually(lambda: cable.stats().drops == {"lost": 10})
    cable.set(loss=0, delay_ms=np.array([1.0, 2.0]), step_s=0.01)
    assert net.spec.functions[cable.name].options["delay_ms"] == [1.0, 2.0]
    a.end.tx(numbered(10))
    assert len(receive(b.end, 10)) == 10
    assert cable.stats().drops == {"lost": 10}, "it is the same function"
    with pytest.raises(vn.ConfigError, match="loss"):
        cable.set(loss=2)


def test_a_cable_that_is_there_is_impaired(net):
    a, b = net.memory("a"), net.memory("b")
    switch = net.switch()
    a >> switch << b
    cable = net.impair(a, switch, delay_ms=1)
    a.end.tx(numbered(5))
    assert len(receive(b.end, 5)) == 5
    assert cable.report().from_a.counts["sent"] == 5


def test_the_checksum_left_to_be_made_does_not_hide_what_was_corrupted(net):
    a, b = net.memory("a"), net.memory("b")
    cable = net.impair(a, b, corrupt=1)
    sent = numbered(50)
    a.end.tx(sent)
    found = receive(b.end, 50)
    for before, after in zip(sent, found, strict=True):
        assert (int.from_bytes(before, "big") ^ int.from_bytes(after, "big")).bit_count() == 1
    assert cable.report().from_a.counts["corrupted"] == 50


def test_several_workers_share_one_cable():
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("needs two processors")
    with vn.Net(cpus=cpus) as net:
        ports = [net.memory(f"p{i}") for i in range(4)]
        cables = [net.impair(a, b, delay_ms=2, jitter_ms=1) for a, b in zip(ports[::2], ports[1::2], strict=True)]
        for a, b in zip(ports[::2], ports[1::2], strict=True):
            a.end.tx(numbered(20))
            b.end.tx(numbered(20))
        for port in ports:
            assert sorted(receive(port.end, 20)) == numbered(20)
        assert all(cable.report().to_a.counts["sent"] == 20 for cable in cables)
        for port in ports:
            port.end.close()
    assert net.stats().balance().exact


def test_a_file_describes_it():
    text = """
    cables = [["a", "far"], ["far", "b"]]
    ports.a.port = "memory:a"
    ports.b.port = "memory:b"
    functions.far = { kind = "impairment", delay_ms = [10, 20], rate_bps = 1e6, gemodel = [0.1, 0.5, 1, 0], a = "a" }
    """
    spec = vn.Spec.from_toml(text)
    assert vn.Spec.from_toml(spec.to_toml()) == spec
    with vn.Net.of(spec) as net:
        assert isinstance(net["far"], vn.Impairment)
        assert net["far"].report().from_a.asked["delay_ms"] == [10, 20]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss": 1.5}, "loss"),
        ({"delay_ms": -1}, "delay_ms"),
        ({"delay_ms": [1, -1]}, "delay_ms"),
        ({"distribution": "flat"}, "distribution"),
        ({"gemodel": [0.1, 0.1]}, "gemodel"),
        ({"direction": "up"}, "direction"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, text):
    with pytest.raises(vn.ConfigError, match=text):
        vn.Net().impair(**options)
