"""What a virtio-user port asks its device for, and what a vhost-user port makes of it, by the Python objects."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

import virtnet as vn
from helpers import eventually

OWN, OTHER = "02:00:00:00:00:01", "02:00:00:00:00:02"


def to(mac: str, source_port: int = 7) -> bytes:
    """A UDP packet to that station."""
    ip = b"\x45\x00\x00\x1c" + bytes(5) + b"\x11" + bytes(2) + bytes([10, 0, 0, 1, 10, 0, 0, 2])
    udp = source_port.to_bytes(2, "big") + b"\x00\x35\x00\x08\x00\x00"
    return (bytes.fromhex(mac.replace(":", "")) + bytes(6) + b"\x08\x00" + ip + udp).ljust(60, b"\0")


@pytest.fixture
def connect(tmp_path):
    """Makes a device and a driver that is attached to it; both are closed in the end."""
    opened = []

    def make(queue_pairs=1, **options):
        path = tmp_path / f"{len(opened)}.sock"
        device = vn.VhostUserPort(path, queue_pairs=queue_pairs)
        driver = vn.VirtioUserPort(path, queue_pairs=queue_pairs, **options)
        opened.extend([device, driver])
        assert device.wait_connected(20)
        assert driver.wait_connected(20)
        deadline = time.monotonic() + 20
        while driver.stats().queue_pairs < queue_pairs and time.monotonic() < deadline:
            time.sleep(0.001)
        return device, driver

    yield make
    for port in opened:
        port.close()


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_a_driver_says_what_it_wants_and_the_rest_is_counted(connect, ring):
    device, driver = connect(control=True, ring=ring)
    driver.set_mac(OWN)
    driver.set_receive_mode("promiscuous", on=False)
    assert device.tx([to(OWN), to(OTHER), to("01:00:5e:00:00:01")]) == 3
    assert [bytes(frame) for frame in driver.rx(5.0)] == [to(OWN)]
    driver.set_mac_table(unicast=[OTHER], multicast=["01:00:5e:00:00:01"])
    tagged = to(OWN)[:12] + b"\x81\x00\x00\x05" + to(OWN)[12:]
    assert device.tx([to(OTHER), to("01:00:5e:00:00:01"), tagged]) == 3
    assert len(driver.rx(5.0)) == 2
    driver.set_vlan(5)
    device.tx([tagged])
    assert [bytes(frame) for frame in driver.rx(5.0)] == [tagged]
    assert device.stats().tx_drops == {"not_wanted": 3}
    queue = driver.device_stats().receive[0]
    assert (queue.packets, queue.bytes) == (4, 3 * 60 + 64)


def test_hashes_stand_in_a_column_and_choose_the_queue(connect):
    device, driver = connect(queue_pairs=2, control=True, hash_report=True)
    burst = [to(OWN, port) for port in range(100)]
    device.tx(burst)
    assert not driver.rx(5.0).columns.hash["report"].any()
    key = driver.set_rss([0, 1], types=vn.HashType.UDPV4)
    assert len(key) == 40
    before = [queue.packets for queue in driver.device_stats().receive]
    device.tx(burst)
    hashes = driver.rx(5.0).columns.hash
    assert hashes["report"].tolist() == [3] * 100
    odd = int(np.count_nonzero(hashes["value"] & 1))
    after = [queue.packets for queue in driver.device_stats().receive]
    assert [now - then for now, then in zip(after, before, strict=True)] == [100 - odd, odd]
    assert len(np.unique(hashes["value"])) > 90
    driver.set_queue_pairs(1)
    assert driver.stats().queue_pairs == 1
    table = driver.rx().columns.to_dict()
    assert {"hash_value", "hash_report"} <= table.keys()


def test_offloads_are_taken_back(connect):
    _, driver = connect(control=True)
    driver.set_offloads(vn.NetFeature(0))
    with pytest.raises(vn.PeerError, match="refused to change offloads"):
        # By hand none were agreed to.
        driver.set_offloads(vn.NetFeature.GUEST_CSUM)


def test_what_cannot_be_asked_says_why(connect):
    _, driver = connect()
    with pytest.raises(vn.StateError, match="open it with control=True"):
        driver.set_mac(OWN)
    _, driver = connect(control=True, without="ctrl_vlan+device_stats")
    with pytest.raises(vn.StateError, match="ctrl_vlan was not negotiated"):
        driver.set_vlan(1)
    with pytest.raises(vn.StateError, match="device_stats"):
        driver.device_stats()
    with pytest.raises(vn.StateError, match="rss"):
        driver.set_rss([0])
    with pytest.raises(vn.ConfigError, match="1 to 1"):
        driver.set_queue_pairs(2)
    with pytest.raises(vn.ConfigError, match="MAC address"):
        driver.set_mac("2:0:0:0:0:1")
    with pytest.raises(vn.ConfigError, match="promiscuous"):
        driver.set_receive_mode("everything")
    with pytest.raises(vn.PeerError, match="MAC address"):
        driver.set_mac("ff:ff:ff:ff:ff:ff")
    driver.close()
    with pytest.raises(vn.StateError, match="closed"):
        driver.set_mac(OWN)


def test_hashes_cannot_be_told_without_a_control_queue(tmp_path):
    with pytest.raises(vn.ConfigError, match="control"):
        vn.VirtioUserPort(tmp_path / "a.sock", hash_report=True)


def test_a_port_of_a_network_is_asked_as_one_by_hand(tmp_path):
    path = tmp_path / "a.sock"
    device, driver = vn.Net(), vn.Net()
    there = device.vhost_user(path, queue_pairs=2, name="there")
    hand = device.memory(name="hand")
    hand >> there
    here = driver.virtio_user(path, queue_pairs=2, control=True, name="here")
    here >> driver.sink()
    with pytest.raises(vn.StateError, match="not running"):
        here.device.set_vlan(1)
    with pytest.raises(vn.ConfigError, match="only a virtio-user port"):
        hand.device.set_vlan(1)
    with device, driver:
        assert here.wait_connected(20)
        here.device.set_mac(OWN)
        here.device.set_receive_mode("promiscuous", on=False)
        here.device.set_mac_table(multicast=["01:00:5e:00:00:01"])
        here.device.set_vlan(5)
        here.device.set_queue_pairs(2)
        here.device.set_coalescing(receive=True, max_packets=4, max_usecs=100)
        here.device.set_coalescing(receive=False, queue=1, max_packets=0, max_usecs=0)
        assert len(here.device.set_rss([0, 1])) == 40
        hand.end.tx([to(OWN), to(OTHER)])
        assert eventually(lambda: there.stats().tx_drops == {"not_wanted": 1}, 20)
        assert eventually(lambda: sum(queue.packets for queue in here.device.device_stats().receive) == 1, 20)
        assert eventually(lambda: here.stats().received == 1, 20)
        assert eventually(lambda: sum(ring.bursts for ring in there.rings) == 1, 20)


def test_a_port_of_a_network_elsewhere_is_asked_through_that(sockets):
    device, driver = vn.Net(), vn.Net(name="elsewhere")
    there = device.vhost_user(sockets / "a", name="there")
    there >> device.sink()
    driver.virtio_user(sockets / "a", control=True, iommu=True, name="here") >> driver.sink()
    with device, driver:
        here = vn.attach("elsewhere")["here"]
        assert here.wait_connected(20)
        here.device.set_mac(OWN)
        assert eventually(lambda: there.stats().mac == OWN, 20)
        assert here.device.device_stats().receive[0].packets == 0
        with pytest.raises(vn.ConfigError, match="MAC address"):
            here.device.set_mac("2")


def test_notifications_are_held_back_as_the_driver_says(connect):
    device, driver = connect(control=True)
    driver.set_coalescing(receive=True, max_packets=8, max_usecs=2**32 - 1)
    before = device.rings[0].calls
    for _ in range(7):
        device.tx([to(OWN)])
        assert len(driver.rx(5.0)) == 1
    assert device.rings[0].calls == before
    assert device.rings[0].bursts >= 7
    with pytest.raises(vn.ConfigError, match="max_usecs"):
        driver.set_coalescing(receive=True, max_packets=8, max_usecs=-1)
    with pytest.raises(vn.ConfigError, match="queue"):
        driver.set_coalescing(receive=True, queue=1, max_packets=8, max_usecs=1)


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_the_state_of_a_device_goes_to_another_one(connect, ring):
    (device, driver), (other, second) = connect(control=True, ring=ring), connect(control=True, ring=ring)
    driver.set_mac(OWN)
    driver.set_receive_mode("promiscuous", on=False)
    state = driver.save_state()
    assert driver.save_state() == state
    second.load_state(state)
    assert second.save_state() == state
    announced = second.wait_event("announce", 5)
    assert announced is not None
    assert "to be announced" in announced.text
    assert driver.events.of("announce") == ()
    for sender, receiver in ((device, driver), (other, second)):
        assert sender.tx([to(OTHER), to(OWN)]) == 2
        assert [bytes(frame) for frame in receiver.rx(5.0)] == [to(OWN)]
    with pytest.raises(vn.PeerError, match="refused to load"):
        second.load_state(b"nonsense")
    assert second.save_state() == state
    with pytest.raises(vn.StateError, match="65536 bytes"):
        second.load_state(bytes(65537))
    second.close()
    with pytest.raises(vn.StateError, match="closed"):
        second.save_state()


def test_a_port_of_a_network_has_the_state_of_its_device_too(tmp_path):
    path = tmp_path / "a.sock"
    with vn.Net() as device, vn.Net(name=f"state-{os.getpid()}") as net:
        device.vhost_user(path) >> device.echo()
        port = net.virtio_user(path, name="vm")
        port >> net.sink()
        assert port.wait_connected(20)
        state = port.device.save_state()
        assert state.startswith(b"vnst")
        port.device.load_state(state)
        # From beside, too.
        beside = vn.attach(net.name)["vm"].device
        assert beside.save_state() == state
        beside.load_state(state)
        with pytest.raises(vn.PeerError, match="refused to load"):
            beside.load_state(b"nonsense")
