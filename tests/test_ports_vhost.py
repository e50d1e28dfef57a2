"""vhost-user and virtio-user ports against each other: what is agreed, who comes and goes, and what a socket is."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading

import numpy as np
import pytest

import virtnet as vn
from helpers import BROADCAST, descriptors, eventually, frame, mac, receive

pytestmark = pytest.mark.usefixtures("nothing_left")

RINGS = ["split", "packed"]


def frames(n: int, size: int = 60) -> list[bytes]:
    return [i.to_bytes(4, "big").ljust(size, b"\0") for i in range(n)]


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("without", [None, "mrg_rxbuf", "event_idx", "mrg_rxbuf+event_idx+in_order"])
@pytest.mark.parametrize("size", [60, 193, 1514])
def test_packets_pass_both_ways(sockets, ring, without, size):
    with (
        vn.VhostUserPort(sockets / "a") as device,
        vn.VirtioUserPort(sockets / "a", ring=ring, without=without) as driver,
    ):
        assert driver.wait_connected(5)
        assert device.wait_connected(5)
        sent = frames(100, size)
        assert driver.tx(sent) == 100
        assert receive(device, 100) == sent
        assert device.tx(sent) == 100
        assert receive(driver, 100) == sent
        for stats in (device.stats(), driver.stats()):
            assert (stats.received, stats.sent, stats.received_bytes) == (100, 100, 100 * size)
            assert stats.drops == {}
            assert stats.ring == ring
            assert stats.queue_pairs == 1


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("queue_size", [2, 16, 256, 1024])
def test_rings_of_any_size_keep_every_packet_in_order(sockets, ring, queue_size):
    with (
        vn.VhostUserPort(sockets / "a") as device,
        vn.VirtioUserPort(sockets / "a", ring=ring, queue_size=queue_size) as driver,
    ):
        assert driver.wait_connected(5)
        sent, got = frames(3000), []
        rest = sent
        while len(got) < len(sent):
            rest = rest[driver.tx(rest[:64]) :]
            burst = device.rx(timeout_s=1)
            assert len(burst), f"nothing after {len(got)} packets"
            got += [bytes(one) for one in burst]
        assert got == sent


@pytest.mark.parametrize(("offered", "wanted", "used"), [(1, 1, 1), (2, 2, 2), (4, 2, 2), (2, 1, 1)])
def test_as_many_queue_pairs_as_both_have(sockets, offered, wanted, used):
    with (
        vn.VhostUserPort(sockets / "a", queue_pairs=offered) as device,
        vn.VirtioUserPort(sockets / "a", queue_pairs=wanted) as driver,
    ):
        assert driver.wait_connected(5)
        assert eventually(lambda: driver.stats().queue_pairs == used)
        assert driver.tx(frames(50)) == 50
        assert sorted(receive(device, 50)) == frames(50)


def test_a_driver_that_wants_too_much_says_what_is_missing(sockets):
    with vn.VhostUserPort(sockets / "a"), vn.VirtioUserPort(sockets / "a", queue_pairs=2) as driver:
        assert eventually(lambda: driver.stats().last_error)
        assert not driver.wait_connected(0)
        assert "does not offer 2 queue pairs, only 1" in repr(driver)


def test_features_are_negotiated_and_told(sockets):
    without = vn.NetFeature.MRG_RXBUF | vn.NetFeature.MTU
    with (
        vn.VhostUserPort(sockets / "a", without=without) as device,
        vn.VirtioUserPort(sockets / "a", ring="packed", without=vn.RingFeature.IN_ORDER) as driver,
    ):
        assert driver.wait_connected(5)
        for stats in (device.stats(), driver.stats()):
            assert vn.RingFeature.VERSION_1 | vn.RingFeature.RING_PACKED in stats.ring_features
            assert vn.RingFeature.IN_ORDER not in stats.ring_features
            assert vn.NetFeature.MRG_RXBUF not in stats.net_features
            assert vn.ProtocolFeature.REPLY_ACK in stats.protocol


@pytest.mark.parametrize("ring", RINGS)
def test_a_driver_may_leave_and_come_back(sockets, ring):
    with vn.VhostUserPort(sockets / "a") as device:
        for i in range(3):
            with vn.VirtioUserPort(sockets / "a", ring=ring) as driver:
                assert driver.wait_connected(5)
                assert driver.tx(frames(10)) == 10
                assert len(receive(device, 10)) == 10
            assert eventually(lambda: not device.connected)
            assert device.stats().sessions == i + 1
        assert device.stats().received == 30
        assert device.tx(frames(1)) == 0


@pytest.mark.parametrize("ring", RINGS)
def test_a_device_may_leave_and_come_back(sockets, ring):
    with vn.VirtioUserPort(sockets / "a", ring=ring) as driver:
        for _ in range(3):
            with vn.VhostUserPort(sockets / "a") as device:
                assert driver.wait_connected(10)
                assert driver.tx(frames(10)) == 10
                assert len(receive(device, 10)) == 10
            assert eventually(lambda: not driver.connected)


def test_either_side_may_listen(sockets):
    with (
        vn.VhostUserPort(sockets / "a", client=True) as device,
        vn.VirtioUserPort(sockets / "a", server=True) as driver,
    ):
        assert device.wait_connected(10)
        assert driver.tx(frames(3)) == 3
        assert receive(device, 3) == frames(3)


def test_a_live_socket_is_never_taken_over(sockets):
    with vn.VhostUserPort(sockets / "a") as port:
        with pytest.raises(vn.PortError, match="in use: another process is listening") as caught:
            vn.VhostUserPort(sockets / "a")
        assert caught.value.errno == errno.EADDRINUSE
        with vn.VirtioUserPort(sockets / "a") as driver:
            assert driver.wait_connected(5)
        assert not port.stats().last_error


def test_a_stale_socket_is_replaced_and_the_own_one_taken_away(sockets):
    path = sockets / "a"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    assert path.exists()
    with vn.VhostUserPort(path), vn.VirtioUserPort(path) as driver:
        assert driver.wait_connected(5)
    assert not path.exists()


def test_a_file_that_is_no_socket_is_left_alone(sockets):
    path = sockets / "precious"
    path.write_text("data")
    with pytest.raises(vn.PortError, match="not a socket"):
        vn.VhostUserPort(path)
    assert path.read_text() == "data"


def test_only_its_owner_may_use_a_socket(sockets):
    before = os.umask(0)
    try:
        with vn.VhostUserPort(sockets / "a"):
            assert stat.S_IMODE((sockets / "a").stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_a_missing_directory_is_named(sockets):
    with pytest.raises(vn.PortError, match=f"there is no directory {sockets}/missing") as caught:
        vn.VhostUserPort(sockets / "missing" / "a")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    "nonsense",
    [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(12), b"\xff" * 64, b"\x01\0\0\0\x01\0\0\0\xff\xff\xff\xff", b"\x01\0\0\0"],
)
def test_a_front_end_that_talks_nonsense_disturbs_nobody(sockets, nonsense):
    with vn.VhostUserPort(sockets / "a") as port:
        before = len(descriptors())
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(sockets / "a"))
            peer.sendall(nonsense)
        assert eventually(lambda: len(descriptors()) <= before)
        with vn.VirtioUserPort(sockets / "a") as driver:
            assert driver.wait_connected(5)
            driver.tx(frames(1))
            assert len(receive(port)) == 1


def test_a_back_end_that_talks_nonsense_is_left_and_tried_again(sockets):
    with socket.socket(socket.AF_UNIX) as liar:
        liar.bind(str(sockets / "a"))
        liar.listen()
        with vn.VirtioUserPort(sockets / "a") as driver:
            liar.settimeout(5)
            peer, _ = liar.accept()
            with peer:
                peer.sendall(b"\xff" * 64)
            assert eventually(lambda: driver.stats().last_error)
            assert not driver.connected
            (sockets / "a").unlink()
            with vn.VhostUserPort(sockets / "a"):
                assert driver.wait_connected(10)


@pytest.mark.parametrize("ring", RINGS)
def test_a_switch_joins_drivers_over_sockets_and_every_packet_is_accounted_for(sockets, ring):
    with vn.Net() as net:
        switch = net.switch()
        for i in range(3):
            net.vhost_user(sockets / f"vm{i}") >> switch
        drivers = [vn.VirtioUserPort(sockets / f"vm{i}", ring=ring) for i in range(3)]
        assert all(driver.wait_connected(5) for driver in drivers)
        for i, driver in enumerate(drivers):
            assert driver.tx([frame(BROADCAST, mac(i))]) == 1
        assert [len(receive(driver, 2)) for driver in drivers] == [2, 2, 2]
        rest = [frame(mac(2), mac(0), i.to_bytes(4, "big")) for i in range(2000)]
        sent, got = list(rest), []
        while len(got) < len(sent):
            rest = rest[drivers[0].tx(rest[:32]) :]
            burst = drivers[2].rx(timeout_s=1)
            assert len(burst), f"nothing after {len(got)} packets: {net.stats()}"
            got += [bytes(one) for one in burst]
        assert got == sent
        assert len(drivers[1].rx(0.05)) == 0
        for driver in drivers:
            driver.close()
        stats = net.stats()
        assert stats.balance().exact
        assert stats.drops == {}


def test_a_program_can_change_packets_on_their_way(sockets):
    with vn.VhostUserPort(sockets / "a") as port, vn.VirtioUserPort(sockets / "a") as driver:
        assert driver.wait_connected(5)
        assert driver.tx([frame(mac(2), mac(1), b"x"), frame(mac(3), mac(1), b"y")]) == 2
        with port.rx(timeout_s=1) as burst:
            assert len(burst) == 2
            wanted = burst[burst.columns.eth_dst == int.from_bytes(mac(2), "big")]
            for one in wanted:
                one[:6], one[6:12] = np.asarray(one[6:12]), np.asarray(one[:6])
            assert port.tx(wanted) == 1
        assert receive(driver) == [frame(mac(1), mac(2), b"x")]


def test_a_port_can_be_used_from_two_threads(sockets):
    with vn.VhostUserPort(sockets / "a") as device, vn.VirtioUserPort(sockets / "a", queue_size=1024) as driver:
        assert driver.wait_connected(5)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.extend(receive(device, 500)))
        reader.start()
        for one in frames(500):
            while not driver.tx([one]):
                pass
        reader.join()
        assert got == frames(500)


def test_probing_tells_what_is_offered_and_leaves_no_trace(sockets):
    with vn.VhostUserPort(sockets / "a", queue_pairs=4) as port:
        offer = vn.probe(sockets / "a")
        assert vn.NetFeature.MRG_RXBUF | vn.NetFeature.MQ in offer.net_features
        assert vn.RingFeature.RING_PACKED | vn.RingFeature.EVENT_IDX in offer.ring_features
        assert vn.ProtocolFeature.MQ in offer.protocol
        assert offer.queue_pairs == 4
        assert offer.memory_slots
        with vn.VirtioUserPort(sockets / "a") as driver:
            assert driver.wait_connected(5)
        assert eventually(lambda: not port.connected)


def test_probing_nobody_is_an_error(sockets):
    with pytest.raises(vn.PortError, match="a"):
        vn.probe(sockets / "nobody")
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(sockets / "mute"))
        mute.listen()
        with pytest.raises(vn.PeerError):
            vn.probe(sockets / "mute", timeout_s=0.3)
    with pytest.raises(vn.ConfigError, match="timeout_s"):
        vn.probe(sockets / "a", timeout_s=0)
