"""Python in the path: what a function may do to packets, what its lateness costs, and that nothing is lost."""

from __future__ import annotations

import ctypes.util
import logging
import threading
import time

import numpy as np
import pytest

import virtnet as vn
from helpers import eventually, frame, mac, receive

needs_libpcap = pytest.mark.skipif(ctypes.util.find_library("pcap") is None, reason="libpcap is not installed")


def pair(net: vn.Net) -> tuple[vn.PortNode, vn.PortNode]:
    a, b = net.memory("a", capacity=4096), net.memory("b", capacity=4096)
    a >> net.switch(name="sw") << b
    return a, b


def numbered(n: int, length: int = 60) -> list[bytes]:
    return [frame(mac(2), mac(1), i.to_bytes(4, "big")).ljust(length, b"\0") for i in range(n)]


@pytest.mark.usefixtures("nothing_left")
def test_all_pass_in_order_both_ways_and_the_function_knows_where_from():
    seen: list[tuple[str, int]] = []
    with vn.Net() as net:
        a, b = pair(net)

        @net.on_burst(a)
        def watch(burst):
            seen.append((burst.came_from, len(burst)))

        there, back = numbered(500), numbered(300)
        a.end.tx(there)
        assert receive(b.end, 500) == there
        b.end.tx(back)
        assert receive(a.end, 300) == back
        watch.stop()
        assert sum(n for name, n in seen if name == "a") == 500
        assert sum(n for name, n in seen if name == "sw") == 300
        assert (watch.handled, watch.passed, watch.late) == (800, 800, 0)
        assert net.stats().balance().exact
        assert net.spec.cables == {("a", "sw"), ("b", "sw")}
        assert "stopped" in repr(watch)


def test_verdicts_by_name_by_mask_and_by_number():
    answers = {
        "names": lambda n: np.where(n % 3 == 0, "drop", np.where(n % 3 == 1, "pass", "c")),
        "numbers": lambda n: n % 3,
    }
    for answer in answers.values():
        with vn.Net() as net:
            a, b = pair(net)
            c = net.memory("c", capacity=4096)

            @net.on_burst(a, direction="from", to=[c], size=30)
            def sort(burst, answer=answer):
                return answer(burst.columns.length)

            packets = [numbered(1, 60 + i % 3)[0] for i in range(300)]
            assert a.end.tx(packets) == 300
            assert eventually(lambda sort=sort: sort.handled == 300)
            assert (sort.passed, sort.dropped, sort.sent) == (100, 100, {"c": 100})
            assert len(receive(b.end, 100)) == len(receive(c.end, 100)) == 100


def test_a_mask_drops_and_one_word_is_for_all():
    with vn.Net() as net:
        a, b = pair(net)
        with net.on_burst(a, direction="from")(lambda burst: burst.columns.length < 100) as short:
            a.end.tx(numbered(3) + numbered(2, 200))
            assert len(receive(b.end, 3)) == 3
            assert eventually(lambda: short.dropped == 2)
        with net.on_burst(a, direction="from", name="none")(lambda _burst: "drop") as none:
            a.end.tx(numbered(5))
            assert eventually(lambda: none.dropped == 5)
        a.end.tx(numbered(1))
        assert receive(b.end, 1) == numbered(1)


def test_edits_are_what_arrives():
    with vn.Net() as net:
        a, b = pair(net)

        @net.on_burst(a, direction="from")
        def rewrite(burst):
            burst.edit(eth_dst="02:00:00:00:00:07")
            for one in burst.frames:
                one[-1] = 0xEE

        a.end.tx(numbered(3))
        arrived = receive(b.end, 3)
        assert [one[:6] for one in arrived] == [bytes.fromhex("020000000007")] * 3
        assert {one[-1] for one in arrived} == {0xEE}


def test_packets_reach_a_port_that_has_a_cable_already_and_a_function():
    with vn.Net() as net:
        a, b = pair(net)
        c, d = net.memory("c"), net.memory("d")
        c >> net.wire(name="cd") << d
        sink = net.sink()

        @net.on_burst(a, direction="from", to=[c, sink])
        def lead(burst):
            return np.array(["c", sink.name, "pass"])[burst.columns.length % 3]

        a.end.tx([numbered(1, 60 + i % 3)[0] for i in range(9)])
        assert len(receive(c.end, 3)) == len(receive(b.end, 3)) == 3
        assert eventually(lambda: sink.stats().consumed == 3)
        c.end.tx(numbered(2))
        assert receive(d.end, 2) == numbered(2), "the cable it has goes on"
        lead.stop()
        assert set(net.spec.functions) == {"sw", "cd", "sink"}
        assert set(net.spec.ports) == {"a", "b", "c", "d"}
        d.end.tx(numbered(1))
        assert receive(c.end, 1) == numbered(1)


@needs_libpcap
def test_only_what_passes_the_filter_is_seen():
    arp = mac(2) + mac(1) + b"\x08\x06" + bytes(46)
    with vn.Net() as net:
        a, b = pair(net)
        handler = net.on_burst(a, "arp")(lambda _burst: "drop")
        a.end.tx([arp, *numbered(4), arp])
        assert receive(b.end, 4) == numbered(4)
        assert eventually(lambda: handler.dropped == 2)
        handler.function.set(filter="ip")
        a.end.tx([arp])
        assert receive(b.end, 1) == [arp]
        assert handler.function.stats().detail == {"late": 0}, "it is the same function"


class Slow:
    """A function that waits until it may go on."""

    def __init__(self) -> None:
        self.entered, self.may = threading.Event(), threading.Event()

    def __call__(self, _burst) -> None:
        self.entered.set()
        assert self.may.wait(60)


@pytest.mark.parametrize("late", ["pass", "drop", "hold"])
def test_lateness_costs_what_was_said_and_the_worker_goes_on(late):
    slow = Slow()
    with vn.Net() as net:
        a, b = pair(net)
        x, y = net.memory("x"), net.memory("y")
        x >> y
        handler = net.on_burst(a, direction="from", queue=64, size=64, late=late, name="slow")(slow)
        packets = numbered(1000)
        a.end.tx(packets[:1])
        assert slow.entered.wait(60), "it has one packet, and the queue is empty"
        assert a.end.tx(packets[1:]) == 999
        if late == "pass":
            assert len(receive(b.end, 999 - 64)) == 999 - 64
        if late == "drop":
            assert eventually(lambda: handler.function.stats().drops == {"late": 999 - 64})
        # Whatever becomes of them, others do not wait.
        x.end.tx(numbered(50))
        assert receive(y.end, 50) == numbered(50)
        slow.may.set()
        if late == "hold":
            assert receive(b.end, 1000, timeout_s=30) == packets, "none is late, and all are in order"
        assert eventually(lambda: handler.late == (0 if late == "hold" else 999 - 64))
        handler.stop()
        assert net.stats().balance().exact


def test_a_held_port_does_not_keep_its_worker_busy():
    slow = Slow()
    with vn.Net() as net:
        a, _b = pair(net)
        handler = net.on_burst(a, direction="from", queue=64, late="hold", name="slow")(slow)
        a.end.tx(numbered(1))
        assert slow.entered.wait(60)
        a.end.tx(numbered(500))
        sleeps = net.stats().worker.sleeps
        assert eventually(lambda: net.stats().worker.sleeps > sleeps + 20, 30)
        slow.may.set()
        assert eventually(lambda: handler.passed == 501, 30)


@pytest.mark.parametrize("late", ["pass", "drop"])
def test_what_raises_is_told_once_and_the_packets_go_where_late_ones_go(late, caplog):
    with vn.Net() as net:
        a, b = pair(net)

        @net.on_burst(a, direction="from", late=late)
        def broken(_burst):
            raise ZeroDivisionError("of my own")

        with caplog.at_level(logging.ERROR, "virtnet"):
            for n in (1, 2):
                a.end.tx(numbered(1))
                assert eventually(lambda n=n: broken.failed == n)
        assert isinstance(broken.error, ZeroDivisionError)
        assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]
        assert len(receive(b.end, 2, timeout_s=5 if late == "pass" else 0.1)) == (2 if late == "pass" else 0)


@pytest.mark.parametrize(
    ("answer", "words"), [("elsewhere", "none of"), ([True], "was given"), (5, "none of"), (0.5, "answers with")]
)
def test_an_answer_that_makes_no_sense_is_an_error_of_the_function(answer, words):
    with vn.Net() as net:
        a, _b = pair(net)
        handler = net.on_burst(a, direction="from", name="odd")(lambda _burst: answer)
        a.end.tx(numbered(2))
        a.end.tx(numbered(2))
        assert eventually(lambda: handler.failed == 4)
        assert words in str(handler.error)


@pytest.mark.usefixtures("nothing_left")
def test_stopping_loses_nothing_under_traffic():
    with vn.Net() as net:
        a, b = pair(net)
        arrived: list[bytes] = []
        sent = 0
        for round_ in range(10):
            handler = net.on_burst(a, size=16, name=f"round-{round_}")(lambda _burst: None)
            for _ in range(5):
                packets = [frame(mac(2), mac(1), (sent + i).to_bytes(4, "big")) for i in range(40)]
                assert a.end.tx(packets) == 40
                sent += 40
            handler.stop()
            assert handler.handled == handler.passed
            arrived += receive(b.end, 200)
        assert len(arrived) == sent
        assert len(set(arrived)) == sent
        assert net.stats().balance().exact


@pytest.mark.usefixtures("nothing_left")
def test_it_ends_with_the_network_and_with_its_removal():
    with vn.Net() as net:
        a, _b = pair(net)
        net.on_burst(a, name="one")(lambda _burst: None)
        net.remove("one")
        handler = net.on_burst(a if net.spec.neighbours("a") else net["b"], name="two")(lambda _burst: None)
        assert handler.running
    assert eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("virtnet-two")])


def test_it_may_be_described_before_the_network_runs():
    net = vn.Net()
    a, b = pair(net)
    handler = net.on_burst(a)(lambda burst: burst.columns.length > 0)
    with net:
        a.end.tx(numbered(10))
        assert receive(b.end, 10) == numbered(10)
        assert eventually(lambda: handler.passed == 10)


def test_a_thread_that_computes_does_not_slow_workers_down():
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    with vn.Net() as net:
        source = net.source()
        sink = net.sink()
        net.wire(source, sink)

        def sunk_in(seconds: float) -> int:
            before = sink.stats().consumed
            time.sleep(seconds)
            return sink.stats().consumed - before

        threads = [threading.Thread(target=spin) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            assert sunk_in(1.0) > 10_000, "the workers never wait for the interpreter"
        finally:
            stop.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"late": "soon"}, "late"),
        ({"queue": 63}, "queue"),
        ({"queue": 65_000}, "queue"),
        ({"size": 0}, "size"),
        ({"direction": "up"}, "direction"),
        ({"filter": "tcp port no"}, "filter|tcp port no"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(options, words):
    with vn.Net() as net:
        a, _b = pair(net)
        before = net.spec
        with pytest.raises(vn.ConfigError, match=words):
            net.on_burst(a, **options)(lambda _burst: None)
        assert net.spec == before
        with pytest.raises(vn.ConfigError, match="has 2 cables"):
            net.on_burst(net["sw"])(lambda _burst: None)
