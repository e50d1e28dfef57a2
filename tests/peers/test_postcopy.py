"""A Linux guest that moves to another QEMU and runs there before its memory has arrived: post-copy migration.

What QEMU and the switch touch of its memory is fetched when they touch it. Buffers that the guest had given to its old
card are written by the switch in the new place: pages that nobody there has seen.
"""

from __future__ import annotations

import time

import pytest
import traffic
from guest import Guest, Nic
from traffic import Pings

import virtnet

pytestmark = [pytest.mark.peer, pytest.mark.timeout(240)]

MAC = "52:54:00:0a:00:01"


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_runs_on_before_its_memory_has_arrived(guest_image, directory, running, packed):
    net = virtnet.Net()
    switch = net.switch()
    names = ("before", "after", "vm2")
    nics = [Nic(directory / f"{name}.sock", "" if name == "vm2" else MAC, packed=packed) for name in names]
    ports = [net.vhost_user(nic.socket, postcopy=True) for nic in nics]
    for port in ports:
        port >> switch
    running.enter_context(net)

    def guest(nic, number, **options):
        name = nic.socket.stem
        made = Guest(guest_image, name, nic, address=f"10.0.0.{number}/24", directory=directory, **options)
        return running.enter_context(made)

    vm1, vm2 = guest(nics[0], 1), guest(nics[2], 2)
    moved = guest(nics[1], 1, incoming=True)
    vm1.wait_ready()
    vm2.wait_ready()
    traffic.wait_for_link(vm1, vm2)
    assert traffic.ping((vm1, vm2), (vm2, vm1), n=5) == [Pings(5, 5)] * 2
    random = vm1.run("dd if=/dev/urandom of=/tmp/random bs=64k count=512 2>/dev/null; sha256sum </tmp/random")

    for each in (vm1, moved):
        postcopy = [{"capability": "postcopy-ram", "state": True}]
        each.monitor("migrate-set-capabilities", capabilities=postcopy)
    uri = f"unix:{directory / 'migration'}"
    moved.monitor("migrate-incoming", uri=uri)
    # So slowly that most of it is still to come when the guest goes on.
    vm1.monitor("migrate-set-parameters", **{"max-bandwidth": 4 << 20})
    vm1.monitor("migrate", uri=uri)
    deadline = time.monotonic() + 60
    begun = False
    while (status := vm1.monitor("query-migrate"))["status"] != "completed":
        assert status["status"] != "failed", f"{status}\n{moved.logs()}"
        assert time.monotonic() < deadline, f"{status}\n{moved.logs()}"
        if not begun and status["status"] == "active":
            vm1.monitor("migrate-start-postcopy")
            begun = True
        time.sleep(0.05)
    memory = status["ram"]
    assert memory["postcopy-bytes"] > memory["precopy-bytes"], memory
    assert memory["postcopy-requests"] > 0, memory

    assert ports[1].stats().step == "running"
    assert moved.run("sha256sum </tmp/random") == random
    assert traffic.ping((moved, vm2), (vm2, moved)) == [Pings(20, 20)] * 2
    assert traffic.stream_is_intact(moved, vm2)
    assert traffic.stream_is_intact(vm2, moved)
