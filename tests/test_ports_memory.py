"""Two ports back to back: what a port does whatever its kind."""

from __future__ import annotations

import signal
import threading
import time

import pytest

import virtnet as vn


def frames(n: int, size: int = 60) -> list[bytes]:
    return [i.to_bytes(4, "big").ljust(size, b"\0") for i in range(n)]


@pytest.mark.parametrize("size", [1, 60, 192, 193, 1514, 65_589])
def test_what_one_sends_the_other_receives(size):
    a, b = vn.memory_pair()
    sent = [bytes([i]) * size for i in range(100)]
    assert a.tx(sent) == 100
    assert [bytes(frame) for frame in b.rx()] == sent
    assert len(b.rx()) == 0


def test_offload_metadata_travels():
    a, b = vn.memory_pair()
    burst = vn.Burst(frames(2))
    for field, value in (("flags", 1), ("gso_type", 4), ("gso_size", 1448), ("csum_start", 34), ("csum_offset", 16)):
        burst.columns.offload[field] = [0, value]
    a.tx(burst)
    assert b.rx().columns.offload.tolist() == burst.columns.offload.tolist()


def test_only_what_has_room_is_accepted():
    a, b = vn.memory_pair(capacity=100)
    assert a.tx(frames(150)) == 100
    assert a.tx(frames(1)) == 0
    assert len(b.rx()) == 100
    assert a.stats().sent == b.stats().received == 100


def test_max_packets_is_exact_and_loses_nothing():
    a, b = vn.memory_pair()
    a.tx(frames(200))
    received = []
    for n in (1, 10, 100, 1, 256):
        burst = b.rx(max_packets=n)
        assert len(burst) == min(n, 200 - len(received))
        received += [bytes(frame) for frame in burst]
    assert received == frames(200)


def test_a_part_of_a_burst_is_sent():
    a, b = vn.memory_pair()
    burst = vn.Burst(frames(10))
    assert a.tx(burst[[7, 3]]) == 2
    assert [bytes(frame) for frame in b.rx()] == [frames(10)[7], frames(10)[3]]


def test_rx_waits_no_longer_than_asked():
    _a, b = vn.memory_pair()
    began = time.monotonic()
    assert len(b.rx(timeout_s=0.2)) == 0
    assert 0.2 <= time.monotonic() - began < 2


def test_rx_ends_its_wait_when_packets_come():
    a, b = vn.memory_pair()
    sender = threading.Timer(0.1, a.tx, [frames(3)])
    sender.start()
    assert len(b.rx(timeout_s=10)) > 0
    sender.join()


def test_ctrl_c_ends_a_wait_without_end():
    _a, b = vn.memory_pair()
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        b.rx(timeout_s=None)
    timer.join()


def test_closing_ends_a_wait_in_another_thread():
    _a, b = vn.memory_pair()
    threading.Timer(0.1, b.close).start()
    with pytest.raises(vn.StateError, match="closed"):
        b.rx(timeout_s=10)


def test_a_closed_port_says_so_and_keeps_its_counters():
    a, b = vn.memory_pair()
    with a:
        a.tx(frames(3))
    for use in (lambda: a.tx(frames(1)), a.rx, a.wait_connected, a.__enter__):
        with pytest.raises(vn.StateError, match="closed"):
            use()
    a.close()
    assert a.stats().sent == 3
    assert "closed" in repr(a)
    assert len(b.rx()) == 3


@pytest.mark.parametrize("arguments", [{"timeout_s": -1}, {"timeout_s": float("nan")}, {"max_packets": 0}])
def test_senseless_waits_are_refused(arguments):
    with pytest.raises(vn.ConfigError, match=r"timeout_s|max_packets"):
        vn.memory_pair()[0].rx(**arguments)


def test_a_released_burst_cannot_be_sent():
    a, _b = vn.memory_pair()
    burst = vn.Burst(frames(1))
    burst.release()
    with pytest.raises(vn.StateError, match="released"):
        a.tx(burst)


def test_a_memory_port_alone_is_refused():
    with pytest.raises(vn.ConfigError, match="memory_pair"):
        vn.open_port("memory:alone")
