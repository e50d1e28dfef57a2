"""Networks with several workers: queue pairs spread over them, and all of it still one network."""

from __future__ import annotations

from collections import defaultdict

import pytest

import virtnet as vn
from helpers import BROADCAST, eventually, frame, mac, receive

pytestmark = pytest.mark.usefixtures("nothing_left")

#: Both on the first processor, which every machine has.
TWO = [0, 0]


def datagram(flow: int, number: int) -> bytes:
    """A UDP datagram of one of several flows, numbered."""
    udp = bytes([0x10, flow, 0, 9, 0, 16, 0, 0])
    ip = bytes.fromhex("450000240000000040110000c6120001c6120002")
    return mac(2) + mac(1) + b"\x08\x00" + ip + udp + bytes([flow]) + number.to_bytes(7, "big") + bytes(20)


def by_flow(frames) -> dict[int, list[int]]:
    flows = defaultdict(list)
    for got in frames:
        flows[got[42]].append(int.from_bytes(got[43:50], "big"))
    return flows


@pytest.mark.parametrize("used", [1, 2, 4])
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_queue_pairs_are_spread_over_the_workers(sockets, ring, used):
    with vn.Net(cpus=TWO) as net:
        a = net.vhost_user(sockets / "a", queue_pairs=4)
        b = net.vhost_user(sockets / "b", queue_pairs=4)
        a >> b
        with (
            vn.VirtioUserPort(sockets / "a", queue_pairs=used, ring=ring) as left,
            vn.VirtioUserPort(sockets / "b", queue_pairs=used, ring=ring) as right,
        ):
            left.wait_connected(5)
            right.wait_connected(5)
            assert eventually(lambda: net.stats().ports["a"].queue_pairs == used)
            sent = [datagram(flow, number) for number in range(30) for flow in range(16)]
            arrived = []
            for start in range(0, len(sent), 64):
                some = sent[start : start + 64]
                assert left.tx(some) == len(some)
                arrived += receive(right, len(some))
            assert sorted(arrived) == sorted(sent)
            assert by_flow(arrived) == {flow: list(range(30)) for flow in range(16)}
            stats = net.stats()
    assert len(stats.workers) == 2
    assert stats.balance().exact
    assert stats.balance().in_transit == 0
    busy = [worker.busy_breaths > 0 for worker in stats.workers]
    assert busy == [True, True], "a driver of one pair has its packets cross from worker to worker"
    assert stats.worker.busy_breaths == sum(worker.busy_breaths for worker in stats.workers)


@pytest.mark.parametrize("rss", [True, False])
def test_a_port_that_stays_with_one_worker_offers_rss(sockets, rss):
    with vn.Net(cpus=TWO) as net:
        net.vhost_user(sockets / "a", queue_pairs=4, rss=rss) >> net.vhost_user(sockets / "b")
        assert (vn.NetFeature.RSS in vn.probe(sockets / "a").net_features) == rss
        with (
            vn.VirtioUserPort(sockets / "a", queue_pairs=4, control=True) as left,
            vn.VirtioUserPort(sockets / "b") as right,
        ):
            left.wait_connected(5)
            right.wait_connected(5)
            if not rss:
                with pytest.raises(vn.StateError, match="rss was not negotiated"):
                    left.set_rss([3])
                return
            left.set_rss([3, 2], types=vn.HashType.UDPV4)
            sent = [datagram(flow, 0) for flow in range(32)]
            assert right.tx(sent) == len(sent)
            assert sorted(receive(left, len(sent))) == sorted(sent)
            counts = [queue.packets for queue in left.device_stats().receive]
    assert counts[:2] == [0, 0]
    assert min(counts[2:]) > 0
    assert sum(counts) == len(sent)


def test_ports_of_one_queue_pair_are_spread_over_the_workers_and_the_switch_is_one():
    with vn.Net(cpus=TWO) as net:
        switch = net.switch()
        ends = []
        for n in range(4):
            node = net.memory(f"host{n}")
            node >> switch
            ends.append(node.end)
        for n, end in enumerate(ends):
            end.tx([frame(BROADCAST, mac(n + 1))])
            for other in ends:
                assert other is end or len(receive(other)) == 1
        for n, end in enumerate(ends):
            to = (n + 1) % 4
            end.tx([frame(mac(to + 1), mac(n + 1), b"hello")])
            assert receive(ends[to]) == [frame(mac(to + 1), mac(n + 1), b"hello")]
        assert all(len(end.rx(0.02)) == 0 for end in ends), "every station is known to all workers"
        stats = net.stats()
        assert stats.functions["switch"].copied == 4 * 2
        assert stats.balance().exact
        net.remove(net["host3"])
        ends[0].tx([frame(mac(4), mac(1))])
        assert len(receive(ends[1])) == len(receive(ends[2])) == 1
    assert net.stats().balance().exact


def test_a_source_reaches_ports_of_every_worker():
    with vn.Net(cpus=TWO) as net:
        for n in range(3):
            node = net.memory(f"port{n}")
            net.source(count=1_000) >> node
            assert len(receive(node.end, 1_000)) == 1_000
        balance = net.stats().balance()
        assert (balance.generated, balance.sent, balance.dropped) == (3_000, 3_000, 0)


def test_a_cpu_that_is_not_there_is_refused():
    with pytest.raises(vn.VirtnetError):
        vn.Net(cpus=[0, 4095]).start()
