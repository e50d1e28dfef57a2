"""The third door: memory and both sides of a virtqueue, a descriptor at a time."""

from __future__ import annotations

import pytest

import virtnet as vn

RINGS = ["split", "packed"]


@pytest.fixture
def memory():
    return vn.GuestMemory(1 << 20)


def write_buffer(memory: vn.GuestMemory, data: bytes) -> tuple[int, int]:
    addr = memory.alloc(len(data))
    memory.write(addr, data)
    return addr, len(data)


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("features", [vn.RingFeature(0), vn.RingFeature.EVENT_IDX, vn.RingFeature.IN_ORDER])
def test_what_the_driver_adds_the_device_reads_and_gives_back(memory, ring, features):
    driver, device = vn.queue_pair(memory, 4, ring, features)
    for lap in range(100):
        parts = [write_buffer(memory, b"%d" % lap), write_buffer(memory, b"!")]
        chain_id = driver.add(readable=parts)
        driver.publish()
        [chain] = device.take()
        assert b"".join(memory.read(*buffer) for buffer in chain.buffers) == b"%d!" % lap
        assert len(chain) == len(b"%d!" % lap)
        device.give()
        device.publish()
        assert driver.reap() == [vn.Used(chain_id, 0)]
    assert driver.free == 4


@pytest.mark.parametrize("ring", RINGS)
def test_the_device_writes_and_says_how_much(memory, ring):
    driver, device = vn.queue_pair(memory, 8, ring)
    room = memory.alloc(100)
    chain_id = driver.add(writable=[(room, 100)])
    driver.publish()
    [chain] = device.take(writable=True)
    memory.write(chain.buffers[0][0], b"answer")
    device.give([6])
    device.publish()
    assert driver.reap() == [vn.Used(chain_id, 6)]
    assert memory.read(room, 6) == b"answer"


@pytest.mark.parametrize("ring", RINGS)
def test_nothing_is_seen_before_it_is_published_and_a_full_ring_takes_no_more(memory, ring):
    driver, device = vn.queue_pair(memory, 2, ring)
    buffer = write_buffer(memory, b"x")
    assert driver.add([buffer]) is not None
    assert driver.add([buffer]) is not None
    assert driver.add([buffer]) is None
    assert device.take() == []
    driver.publish()
    assert len(device.take()) == 2
    device.give()
    assert driver.reap() == []
    device.publish()
    assert len(driver.reap()) == 2


@pytest.mark.parametrize("ring", RINGS)
def test_a_chain_outside_memory_is_an_error_and_the_ring_goes_on(memory, ring):
    driver, device = vn.queue_pair(memory, 4, ring)
    driver.add(readable=[(0xDEAD_0000, 10)])
    good = driver.add(readable=[write_buffer(memory, b"good")])
    driver.publish()
    bad, chain = device.take()
    assert bad.error == "a buffer is not inside the guest's memory"
    assert bad.buffers == ()
    assert chain.error is None
    device.give()
    device.publish()
    assert driver.reap()[1].id == good


def test_an_index_that_jumps_breaks_a_split_ring(memory):
    driver, device = vn.queue_pair(memory, 4, "split")
    available = driver.areas[1]
    memory.write(vn_guest(memory, available) + 2, (1000).to_bytes(2, "little"))
    with pytest.raises(vn.GuestError, match="available index 1000 is more than 4 ahead"):
        device.take()
    with pytest.raises(vn.GuestError):
        device.take()


def vn_guest(memory: vn.GuestMemory, area: int) -> int:
    """In this memory both address spaces are one."""
    assert memory.start <= area < memory.start + memory.size
    return area


@pytest.mark.parametrize("ring", RINGS)
def test_arming_asks_for_notifications_and_tells_what_waits(memory, ring):
    driver, device = vn.queue_pair(memory, 4, ring)
    assert device.arm() is False
    driver.add([write_buffer(memory, b"x")])
    assert driver.publish() is True
    assert device.arm() is True
    device.disarm()
    device.take()
    driver.disarm()
    device.give()
    device.publish()
    assert driver.arm() is True


def test_mistakes_are_answered_with_what_would_have_been_right(memory):
    with pytest.raises(vn.ConfigError, match="at least one byte"):
        vn.GuestMemory(0)
    with pytest.raises(vn.ConfigError, match="power of two"):
        vn.queue_pair(memory, 3, "split")
    with pytest.raises(vn.ConfigError, match="split or packed"):
        vn.queue_pair(memory, 4, "round")
    with pytest.raises(vn.ConfigError, match="are left"):
        memory.alloc(2 << 20)
    with pytest.raises(vn.ConfigError, match="not inside"):
        memory.write(memory.start + memory.size - 1, b"xy")
    driver, device = vn.queue_pair(memory, 3, "packed")
    with pytest.raises(vn.ConfigError, match="at least one buffer"):
        driver.add()
    driver.add([write_buffer(memory, b"x")])
    driver.publish()
    device.take()
    with pytest.raises(vn.StateError, match="one length for each of the 1 chains"):
        device.give([1, 2])
