"""The configuration space: what a device tells its driver, and a link that goes down and comes back."""

from __future__ import annotations

import pytest

import virtnet as vn
from helpers import eventually, receive
from virtnet.cli import app

pytestmark = pytest.mark.usefixtures("nothing_left")

MAC = "02:00:00:00:00:07"


def test_a_driver_and_a_probe_are_told_what_the_device_is(sockets):
    with vn.VhostUserPort(sockets / "a", mac=MAC.replace(":", "-").upper(), mtu=9000, speed_mbps=25000) as device:
        offer = vn.probe(sockets / "a")
        told = {"mac": MAC, "status": 1, "mtu": 9000, "speed": 25000, "duplex": 1}
        hashing = {"rss_max_key_size": 40, "supported_hash_types": 63}
        assert offer.config_space == told | hashing
        assert {vn.NetFeature.MAC, vn.NetFeature.STATUS, vn.NetFeature.SPEED_DUPLEX} <= set(offer.net_features)
        with vn.VirtioUserPort(sockets / "a") as driver:
            assert driver.wait_connected(5)
            assert eventually(lambda: device.connected)
            for stats in (device.stats(), driver.stats()):
                assert (stats.mac, stats.link_up, stats.mtu, stats.speed_mbps) == (MAC, True, 9000, 25000)
                assert {vn.ProtocolFeature.CONFIG, vn.ProtocolFeature.BACKEND_REQ} <= set(stats.protocol)


def test_a_link_that_goes_down_carries_nothing_until_it_comes_back(sockets):
    with vn.VhostUserPort(sockets / "a") as device, vn.VirtioUserPort(sockets / "a") as driver:
        assert driver.wait_connected(5)
        assert eventually(lambda: device.connected)
        device.set_link(False)
        assert eventually(lambda: driver.stats().link_up is False)
        assert not device.connected
        assert "link down" in repr(device)
        assert (driver.tx([bytes(60)]), device.tx([bytes(60)])) == (0, 0)
        device.set_link(True)
        assert eventually(lambda: driver.stats().link_up)
        assert driver.tx([bytes(60)]) == 1
        assert receive(device) == [bytes(60)]


def test_a_link_goes_down_in_a_network_that_runs(sockets):
    with vn.Net() as net:
        device = net.vhost_user(sockets / "a")
        device >> net.echo()
        with vn.VirtioUserPort(sockets / "a") as driver:
            assert driver.wait_connected(5)
            assert eventually(lambda: device.connected)
            device.set_link(False)
            assert eventually(lambda: driver.stats().link_up is False)
            device.set_link(True)
            assert eventually(lambda: driver.stats().link_up)
            assert driver.tx([bytes(60)]) == 1
            assert receive(driver) == [bytes(60)]
        hand = net.memory("hand")
        with pytest.raises(vn.ConfigError, match="only vhost-user ports"):
            hand.set_link(False)
        device.remove()
        with pytest.raises(vn.StateError, match="removed"):
            device.set_link(False)
    with pytest.raises(vn.StateError, match="not running"):
        hand.set_link(True)


def test_qemu_gives_its_guest_the_address_of_the_port():
    port = vn.Net().vhost_user("a.sock", mac=MAC)
    assert f"virtio-net-pci,netdev=net0,mac={MAC}" in port.qemu_args()
    assert "virtio-net-pci,netdev=net0,mac=02:00:00:00:00:09" in port.qemu_args(mac="02:00:00:00:00:09")
    assert str(port.spec) == f"vhost-user:a.sock,mac={MAC}"


@pytest.mark.parametrize("mac", ["01:00:00:00:00:00", "00:00:00:00:00:00", "02:00:00:00:00", "somewhere", ""])
def test_an_address_that_is_none_is_refused(mac):
    with pytest.raises(vn.ConfigError, match="MAC address of one station"):
        vn.PortSpec.of("vhost-user", "a.sock", mac=mac)


def test_probe_shows_the_configuration_space(sockets, capsys):
    with vn.VhostUserPort(sockets / "a", mac=MAC, mtu=2000) as device:
        device.set_link(False)
        app(["probe", str(sockets / "a")], standalone_mode=False)
    shown = capsys.readouterr().out
    assert MAC in shown
    assert "2000" in shown
    assert "status" in shown
