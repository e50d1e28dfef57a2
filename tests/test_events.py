"""What has happened at a port, in order and in words, and how its rings stand."""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest

import virtnet as vn
from helpers import BROADCAST, eventually, frame, mac, receive
from test_explain import SET_FEATURES, FrontEnd

pytestmark = pytest.mark.usefixtures("nothing_left")

SET_VRING_NUM, GET_VRING_BASE = 8, 11


def kinds(port):
    return [event.kind for event in port.events]


def test_a_session_is_told_from_its_beginning_to_its_end(sockets):
    before = time.monotonic_ns()
    with vn.VhostUserPort(sockets / "a") as device:
        with vn.VirtioUserPort(sockets / "a") as driver:
            assert driver.wait_connected(5)
            assert kinds(driver)[-4:] == ["connected", "offered", "features", "running"]
        gone = device.wait_event("disconnected", 5)
        assert gone is not None
        assert gone.data == {}
        # Drivers reset a device when they begin.
        story = [kind for kind in kinds(device) if kind != "reset"]
        assert story[:3] == ["connected", "features", "memory"]
        assert story.count("ring_started") == 2
        events = device.events
        assert events.dropped == 0
        assert [event.number for event in events] == list(range(len(events)))
        assert all(a.at_ns <= b.at_ns for a, b in itertools.pairwise(events))
        assert before <= events[0].at_ns <= time.monotonic_ns()
        assert abs(events[0].time.timestamp() - time.time()) < 60
        connected, features, memory = [event for event in events if event.kind != "reset"][:3]
        assert connected.data == {"pid": os.getpid()}
        assert str(os.getpid()) in connected.text
        assert features.data["features"] & vn.RingFeature.VERSION_1.value
        assert memory.data["regions"] == 1
        assert memory.data["bytes"] > 0
        started = events.of("ring_started")
        assert {(event.data["ring"], event.data["size"]) for event in started} == {(0, 256), (1, 256)}
    # It can be read when the port is closed, too.
    assert [kind for kind in kinds(device) if kind != "reset"][:3] == ["connected", "features", "memory"]
    text = str(device.events)
    assert "connected: a front-end has come" in text
    assert "<table>" in device.events._repr_html_()


def test_refusals_are_told_with_their_reason(sockets):
    with vn.VhostUserPort(sockets / "a") as port:
        front = FrontEnd(sockets / "a")
        front.say(SET_FEATURES, struct.pack("<Q", 1 << 47))
        refused = port.wait_event("refused", 5)
        assert refused is not None
        assert "was not offered" in refused.data["why"]
        front.say(SET_VRING_NUM, struct.pack("<II", 99, 64))
        again = port.wait_event("refused", 5, since=refused.number + 1)
        assert again is not None
        assert "SET_VRING_NUM names ring 99" in again.text
        front.socket.sendall(struct.pack("<III", 1, 2, 0))
        gone = port.wait_event("disconnected", 5)
        assert gone is not None
        assert "version 1 was expected" in gone.data["why"]
        front.socket.close()


def test_a_flood_of_refusals_is_bounded_and_counted(sockets):
    with vn.VhostUserPort(sockets / "a") as port:
        front = FrontEnd(sockets / "a")
        for _ in range(400):
            front.say(SET_VRING_NUM, struct.pack("<II", 99, 64))
        assert eventually(lambda: port.stats().refusals == 400)
        events = port.events
        assert len(events) == 256
        # One that somebody came, and 400.
        assert events.dropped == 401 - 256
        assert events[-1].number == 400
        assert f"({events.dropped} older ones are not kept)" in str(events)
        front.socket.close()


def test_a_driver_tells_whom_it_waits_for_once(sockets):
    with vn.VirtioUserPort(sockets / "a") as driver:
        assert driver.wait_event("nobody", 5)
        time.sleep(0.7)
        assert kinds(driver) == ["nobody"]
        with vn.VhostUserPort(sockets / "a"):
            assert driver.wait_event("running", 5)
        gone = driver.wait_event("disconnected", 5)
        assert gone is not None
        assert driver.wait_event("nobody", 5, since=gone.number)
        assert driver.wait_event("reset", 0.01) is None
        with pytest.raises(vn.ConfigError, match="no event of the kind 'gone'"):
            driver.wait_event("gone")


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_rings_tell_where_they_stand(sockets, ring):
    with vn.VhostUserPort(sockets / "a") as device, vn.VirtioUserPort(sockets / "a", ring=ring) as driver:
        assert device.wait_connected(5)
        assert driver.wait_connected(5)
        driver.tx([frame(BROADCAST, mac(1))] * 5)
        waiting = device.rings[1]
        assert (waiting.index, waiting.kind, waiting.queue_pair) == (1, "transmitq", 0)
        assert (waiting.started, waiting.enabled, waiting.broken) == (True, True, None)
        assert (waiting.format, waiting.size, waiting.waiting) == (ring, 256, 5)
        assert (waiting.kick, waiting.call) == (True, True)
        assert (waiting.avail, waiting.used) == (0, 0)
        assert waiting.published == (5 if ring == "split" else None)
        assert waiting.avail_wrap == (None if ring == "split" else True)
        assert len(receive(device, 5)) == 5
        after = device.rings[1]
        assert (after.avail, after.used, after.waiting) == (5, 5, 0)
        receiveq, transmitq = driver.rings
        assert (receiveq.kind, transmitq.kind) == ("receiveq", "transmitq")
        assert (transmitq.avail, transmitq.size, transmitq.started) == (5, 256, True)
        assert transmitq.waiting == (5 if ring == "split" else 1)
        told = str(device.explain())
        assert f"Ring 1 (transmitq of pair 0) runs: {ring}, 256 entries, next available 5" in told
    assert device.rings == ()
    assert "Ring" not in str(device.explain())


def test_a_ring_that_its_driver_breaks_is_told_and_says_why(sockets):
    with vn.VhostUserPort(sockets / "a") as device:
        report = vn.check_back_end(sockets / "a", only=["available-index-jumps"], timeout_s=0.3)
        assert report.results
    # Nobody looked at that ring: no port works without its hand.
    assert not device.events.of("ring_broken")
    with vn.Net() as net:
        port = net.vhost_user(sockets / "b")
        port >> net.echo()
        breaks(sockets / "b")
        broken = port.wait_event("ring_broken", 5)
        assert broken is not None
        assert broken.data["ring"] == 1
        assert "driver is at fault" in broken.data["why"]
    assert "ring_broken" in kinds(port)


def breaks(path):
    """A driver that publishes far more than its ring has room for, and waits until that is found."""
    vn.check_back_end(path, only=["available-index-jumps"], timeout_s=20)


def test_a_network_tells_of_each_of_its_ports(sockets):
    with vn.Net() as net:
        device = net.vhost_user(sockets / "a", queue_pairs=2)
        driver = net.virtio_user(sockets / "a", queue_pairs=2)
        device >> driver
        assert device.wait_event("ring_started", 5)
        assert driver.wait_event("running", 5)
        assert eventually(lambda: all(ring.started for ring in device.rings))
        assert [ring.index for ring in device.rings] == [0, 1, 2, 3]
        assert [ring.queue_pair for ring in driver.rings] == [0, 0, 1, 1]
        assert device.rings[2].to_dict()["kind"] == "receiveq"
    assert "running" in kinds(driver)
    assert device.rings == ()
    a, b = vn.memory_pair()
    with a, b:
        assert len(a.events) == 0
        assert a.rings == ()


def test_the_command_line_tells_events_as_they_happen(sockets):
    command = [sys.executable, "-m", "virtnet", "sink", f"vhost-user:{sockets}/a", "--events", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert eventually((sockets / "a").exists, 20)
        with vn.VirtioUserPort(sockets / "a") as driver:
            assert driver.wait_connected(10)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
    assert json.loads(out)["balance"]["exact"]
    assert "connected: a front-end has come" in errors
    assert "ring_started: ring 1 of 256 entries was started" in errors
    assert errors.count("connected: a front-end has come") == 1
