"""Networks that run: packets go where they should, changes disturb nobody, and everything adds up."""

from __future__ import annotations

import signal
import threading
import time

import pytest

import virtnet as vn
from helpers import BROADCAST, eventually, frame, mac, receive

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def net():
    with vn.Net() as net:
        yield net
        assert net.stats().balance().exact


def hosts(net: vn.Net, switch: vn.Node, n: int) -> list[vn.Port]:
    """Hand-held ports cabled to a switch."""
    nodes = [net.memory(f"host{i}") for i in range(n)]
    for node in nodes:
        node >> switch
    return [node.end for node in nodes]


def test_a_switch_floods_what_it_does_not_know_and_learns_who_is_where(net):
    a, b, c = hosts(net, net.switch(), 3)
    a.tx([frame(mac(2), mac(1))])
    assert receive(b) == receive(c) == [frame(mac(2), mac(1))]
    b.tx([frame(mac(1), mac(2))])
    assert receive(a) == [frame(mac(1), mac(2))]
    a.tx([frame(mac(2), mac(1), b"again")])
    assert receive(b) == [frame(mac(2), mac(1), b"again")]
    assert len(a.rx(0.1)) == len(c.rx(0.1)) == 0
    assert net["switch"].stats().copied == 1


def test_a_switch_forgets_after_a_while(net):
    a, b, c = hosts(net, net.switch(ageing_s=0.3), 3)
    b.tx([frame(BROADCAST, mac(2))])
    assert len(receive(a)) == len(receive(c)) == 1
    a.tx([frame(mac(2), mac(1))])
    assert len(receive(b)) == 1
    assert len(c.rx(0.05)) == 0
    time.sleep(0.5)
    a.tx([frame(mac(2), mac(1))])
    assert len(receive(b)) == len(receive(c)) == 1


def test_a_wire_passes_everything_on_in_order(net):
    a, b = net.memory("a"), net.memory("b")
    a >> b
    sent = [frame(BROADCAST, mac(1), i.to_bytes(4, "big")) for i in range(500)]
    assert a.end.tx(sent) == 500
    assert receive(b.end, 500) == sent


def test_an_echo_swaps_addresses(net):
    port = net.memory("a")
    port >> net.echo()
    port.end.tx([frame(mac(2), mac(1), b"hello")])
    assert receive(port.end) == [frame(mac(1), mac(2), b"hello")]


@pytest.mark.parametrize("copy", [False, True])
def test_a_sink_takes_everything_and_counts_it(net, copy):
    port, sink = net.memory("a"), net.sink(copy=copy)
    port >> sink
    port.end.tx([bytes(1514)] * 300)
    assert eventually(lambda: sink.stats().consumed == 300)
    assert port.stats().received_bytes == 300 * 1514


def test_a_source_sends_as_many_as_asked(net):
    port = net.memory("a", capacity=4096)
    port >> net.source(frame(mac(2), mac(1)), size=100, count=1000)
    assert receive(port.end, 1000) == [frame(mac(2), mac(1)).ljust(100, b"\0")] * 1000
    assert len(port.end.rx(0.1)) == 0
    assert net["source"].stats().generated == 1000


def test_a_source_keeps_its_rate(net):
    port = net.memory("a", capacity=4096)
    port >> net.source(rate_pps=2000)
    began = time.monotonic()
    n = len(receive(port.end, 1000, timeout_s=10))
    assert n >= 1000
    assert 0.4 < time.monotonic() - began < 1.5


def test_what_has_no_cable_is_dropped_and_counted(net):
    port = net.memory("a")
    net.switch()
    port.end.tx([bytes(60)] * 5)
    port >> net["switch"]
    port.end.tx([bytes(60)] * 5)
    assert eventually(lambda: sum(net.stats().drops.values()) >= 5)
    assert net.stats().balance().exact


def test_nodes_come_and_go_while_others_lose_nothing(net):
    switch = net.switch()
    a, b = hosts(net, switch, 2)
    a.tx([frame(BROADCAST, mac(1))])
    b.tx([frame(BROADCAST, mac(2))])
    receive(a)
    receive(b)
    n, sent = 4000, 0
    got: list[bytes] = []

    def send() -> None:
        nonlocal sent
        for i in range(n):
            # The interpreter may keep the reader waiting: no more than the ports hold.
            while sent - len(got) > 500 or not a.tx([frame(mac(2), mac(1), i.to_bytes(4, "big"))]):
                time.sleep(0.001)
            sent += 1

    sender = threading.Thread(target=send)
    sender.start()
    changes = 0
    while len(got) < n and (sender.is_alive() or len(got) < sent):
        node = net.memory("passing")
        node >> switch
        got += receive(b, 1, 0.5)
        node.remove()
        changes += 1
    sender.join()
    got += receive(b, n - len(got), 1)
    assert got == [frame(mac(2), mac(1), i.to_bytes(4, "big")) for i in range(n)]
    assert changes > 10
    assert net.stats().gone.sent >= 0


def test_what_left_stays_in_the_balance(net):
    switch = net.switch()
    a, b = hosts(net, switch, 2)
    a.tx([frame(BROADCAST, mac(1))] * 7)
    assert len(receive(b, 7)) == 7
    net.remove("host0")
    stats = net.stats()
    assert set(stats.ports) == {"host1"}
    assert stats.gone.received == 7
    assert stats.balance().received == 7
    assert stats.balance().exact


def test_a_change_that_fails_leaves_everything_as_it_was(net, sockets):
    switch = net.switch()
    a, b = hosts(net, switch, 2)
    before = [node.name for node in net], net.cables

    def change() -> None:
        with net.change():
            net.remove("host1")
            net.vhost_user(sockets / "missing" / "vm1.sock") >> switch

    with pytest.raises(vn.PortError, match="there is no directory"):
        change()
    assert ([node.name for node in net], net.cables) == before
    a.tx([frame(BROADCAST, mac(1))])
    assert len(receive(b)) == 1


def test_ten_networks_live_in_one_process():
    nets = [vn.Net() for _ in range(10)]
    try:
        for net in nets:
            net.start()
            net.memory("a") >> net.memory("b")
        for i, net in enumerate(nets):
            net["a"].end.tx([bytes([i]) * 60])
        for i, net in enumerate(nets):
            assert receive(net["b"].end) == [bytes([i]) * 60]
    finally:
        for net in nets:
            net.stop()


def test_counters_stay_readable_after_the_end():
    net = vn.Net()
    a = net.memory("a")
    with net:
        a >> net.sink()
        a.end.tx([bytes(60)] * 3)
        assert eventually(lambda: a.stats().received == 3)
    assert net.stats().ports["a"].received == 3
    assert a.state == "not running"
    net.stop()


def test_starting_twice_is_refused():
    with vn.Net() as net, pytest.raises(vn.StateError, match="runs already"):
        net.start()


def test_a_start_that_fails_leaves_nothing_open(sockets):
    net = vn.Net()
    net.vhost_user(sockets / "vm1.sock")
    net.vhost_user(sockets / "missing" / "vm2.sock")
    with pytest.raises(vn.PortError):
        net.start()
    assert not net.running
    assert list(sockets.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serving_ends_when_asked_to(number):
    net = vn.Net()
    net.sink()
    timer = threading.Timer(0.3, signal.raise_signal, [number])
    timer.start()
    began = time.monotonic()
    net.serve(seconds=20)
    timer.join()
    assert time.monotonic() - began < 5
    assert not net.running


def test_serving_ends_after_a_time_and_when_stopped_elsewhere():
    net = vn.Net()
    began = time.monotonic()
    net.serve(seconds=0.3)
    assert 0.3 <= time.monotonic() - began < 3
    timer = threading.Timer(0.3, net.stop)
    timer.start()
    net.serve(seconds=20)
    timer.join()
    assert time.monotonic() - began < 5


def test_an_idle_network_costs_next_to_nothing():
    with vn.Net() as net:
        net.memory("a") >> net.sink()
        time.sleep(0.2)
        before = net.stats().worker.cpu_s
        time.sleep(1)
        assert net.stats().worker.cpu_s - before < 0.05
        assert 0 < net.stats().worker.longest_pause_s < 60


@pytest.mark.parametrize("poll", ["adaptive", "busy", "interrupt"])
def test_packets_pass_whatever_workers_do_when_idle(poll, sockets):
    with vn.Net(cpus=[0], poll=poll) as net:
        net.vhost_user(sockets / "vm.sock") >> net.echo()
        with vn.VirtioUserPort(sockets / "vm.sock") as vm:
            assert vm.wait_connected(5)
            for i in range(3):
                time.sleep(0.05)
                vm.tx([frame(mac(2), mac(1), bytes([i]))])
                assert receive(vm) == [frame(mac(1), mac(2), bytes([i]))]


def test_a_source_sends_its_packets_in_turn_with_their_metadata():
    with vn.Net() as net:
        port = net.memory("p")
        port >> net.source([frame(mac(2), mac(1)), frame(mac(3), mac(1)) + b"more"], count=5)
        assert [packet[:6] for packet in receive(port.end, 5)] == [mac(number) for number in (2, 3, 2, 3, 2)]
        burst = vn.Burst([frame(mac(4), mac(1))])
        burst.columns.offload["flags"][:] = 1
        other = net.memory("q")
        other >> net.source(burst, count=1)
        assert other.end.rx(timeout_s=5).columns.offload["flags"].tolist() == [1]
    for none_or_many in ([], [bytes(60)] * 65):
        with pytest.raises(vn.ConfigError, match="1 to 64 packets"):
            vn.Net().source(none_or_many)
