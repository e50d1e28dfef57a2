"""What a vhost-user port offers beyond rings and memory, and only if it is asked to."""

from __future__ import annotations

import pytest

import virtnet as vn
from helpers import frame, mac, receive

pytestmark = pytest.mark.usefixtures("nothing_left")

ALWAYS = {"device_state", "gpa_addresses", "configure_mem_slots", "status"}


@pytest.mark.parametrize(("option", "name"), [("postcopy", "pagefault"), ("in_band", "inband_notifications")])
def test_what_has_a_price_is_offered_only_if_asked_for(sockets, option, name):
    with vn.VhostUserPort(sockets / "a"):
        offered = set(vn.probe(sockets / "a").protocol.names())
        assert offered >= ALWAYS
        assert name not in offered
    assert vn.PortSpec.parse(f"vhost-user:x,{option}=on").options[option]
    with vn.Net() as net:
        net.vhost_user(sockets / "b", **{option: True}) >> net.echo()
        assert name in vn.probe(sockets / "b").protocol.names()
        with vn.VirtioUserPort(sockets / "b") as driver:
            driver.wait_connected(5)
            sent = [frame(mac(2), mac(1), bytes([n])) for n in range(10)]
            assert driver.tx(sent) == len(sent)
            assert receive(driver, len(sent)) == [frame(mac(1), mac(2), bytes([n])) for n in range(10)]


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_a_driver_can_do_without_eventfds(sockets, ring):
    with vn.Net() as net:
        net.vhost_user(sockets / "a", in_band=True) >> net.echo()
        with vn.VirtioUserPort(sockets / "a", ring=ring, in_band=True) as driver:
            driver.wait_connected(5)
            for n in range(10):
                assert driver.tx([frame(mac(2), mac(1), bytes([n]))]) == 1
                assert receive(driver, 1) == [frame(mac(1), mac(2), bytes([n]))]
    assert vn.PortSpec.parse("virtio-user:x,in_band=on").options["in_band"]
    with vn.VhostUserPort(sockets / "b"), vn.VirtioUserPort(sockets / "b", in_band=True) as driver:
        left = driver.wait_event("disconnected", 5)
        assert left is not None
        assert "INBAND_NOTIFICATIONS" in str(left)


@pytest.mark.parametrize("in_flight", [True, False])
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_what_is_in_flight_is_recorded_unless_the_driver_does_without(sockets, ring, in_flight):
    options = f"ring={ring}" if in_flight else f"ring={ring},in_flight=off"
    device, driver = vn.VhostUserPort(sockets / "a"), vn.open_port(f"virtio-user:{sockets / 'a'},{options}")
    with device, driver:
        assert device.wait_connected(5)
        assert driver.wait_connected(5)
        assert ("inflight_shmfd" in device.stats().protocol.names()) == in_flight
        # What the driver has sent when its device goes waits for the next one, or is gone with it.
        assert driver.tx([frame(mac(1), mac(2), b"kept")]) == 1
        device.close()
        assert driver.wait_event("disconnected", 5) is not None
        with vn.VhostUserPort(sockets / "a") as second:
            assert second.wait_connected(5)
            assert driver.wait_connected(5)
            assert ("inflight_shmfd" in second.stats().protocol.names()) == in_flight
            assert driver.tx([frame(mac(1), mac(2), b"next")]) == 1
            kept = [frame(mac(1), mac(2), b"kept")] if in_flight else []
            expected = [*kept, frame(mac(1), mac(2), b"next")]
            assert receive(second, len(expected)) == expected
