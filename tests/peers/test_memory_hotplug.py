"""Guests whose memory grows and shrinks while packets flow: DIMMs that QEMU plugs in and takes out.

QEMU tells a back-end of each DIMM by itself (ADD_MEM_REG, REM_MEM_REG). What is plugged in lies above 4 GiB, where a
Linux guest takes the pages of packets from first, so packets are in new memory as soon as there is any.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import traffic
from backend import Backend, PortSpec
from guest import Guest, Nic
from traffic import Pings

pytestmark = [pytest.mark.peer, pytest.mark.timeout(240)]

DIMM_MIB = 128


def plug(guest, name):
    """Plugs a DIMM into a guest."""
    backing = {"qom-type": "memory-backend-memfd", "id": f"m-{name}", "size": DIMM_MIB << 20, "share": True}
    guest.monitor("object-add", **backing)
    guest.monitor("device_add", driver="pc-dimm", id=name, memdev=f"m-{name}")


def unplug(guest, name):
    """Takes it out again, once the guest agrees."""
    guest.monitor("device_del", id=name)
    deadline = time.monotonic() + 30
    while any(device["data"]["id"] == name for device in guest.monitor("query-memory-devices")):
        assert time.monotonic() < deadline, "the guest does not give the DIMM back"
        time.sleep(0.1)
    guest.monitor("object-del", id=f"m-{name}")


def memory_mib(guest):
    """Memory that the guest uses, in MiB."""
    return int(re.search(r"MemTotal: +(\d+)", guest.run("cat /proc/meminfo"))[1]) >> 10


def use_new_memory(guest, how="online"):
    """Has the guest use what was plugged in, once it has noticed; names of its blocks."""
    return guest.run(
        "until grep -q offline /sys/devices/system/memory/memory*/state; do usleep 20000; done\n"
        "for block in /sys/devices/system/memory/memory*; do\n"
        f"  grep -q offline $block/state && echo {how} >$block/state && echo $block\n"
        "done; true"
    ).split()


def mapped(pid):
    """How many memory files of guests a process has mapped."""
    return sum("memfd:memory-backend-memfd" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_memory_grows_and_shrinks_under_traffic_and_nothing_is_lost(
    guest_image, backend_command, directory, running, packed
):
    nics = [Nic(directory / f"{name}.sock", packed=packed) for name in ("vm1", "vm2")]
    ports = [PortSpec(nic.socket, 1, connect=False) for nic in nics]
    backend = running.enter_context(Backend(backend_command, ports, directory)).start()
    more = ("-m", "192,slots=8,maxmem=2G")
    vm1, vm2 = (
        running.enter_context(
            Guest(guest_image, nic.socket.stem, nic, address=f"10.0.0.{n}/24", directory=directory, arguments=arguments)
        )
        for n, (nic, arguments) in enumerate(zip(nics, (more, ()), strict=True), 1)
    )
    vm1.wait_ready()
    vm2.wait_ready()
    traffic.wait_for_link(vm1, vm2)
    before, maps = memory_mib(vm1), mapped(backend.pid)

    vm2.run(f"ping -c 400 -i 0.05 -W 2 {vm1.ip} >/tmp/pings 2>&1 &")
    for n in range(3):
        plug(vm1, f"dimm{n}")
        use_new_memory(vm1)
        assert traffic.stream_is_intact(vm1, vm2)
        assert traffic.stream_is_intact(vm2, vm1)
    assert memory_mib(vm1) > before + 2 * DIMM_MIB
    assert mapped(backend.pid) == maps + 3

    # What is to be taken out again must not hold anything that cannot be moved.
    plug(vm1, "movable")
    blocks = use_new_memory(vm1, "online_movable")
    assert mapped(backend.pid) == maps + 4
    assert traffic.stream_is_intact(vm1, vm2)
    vm1.run(f"for block in {' '.join(blocks)}; do echo offline >$block/state || exit 1; done")
    unplug(vm1, "movable")
    assert mapped(backend.pid) == maps + 3
    assert traffic.stream_is_intact(vm2, vm1)

    pings = vm2.run("until grep transmitted /tmp/pings; do usleep 20000; done", 60)
    assert traffic.read_pings(pings) == Pings(400, 400)
    traffic.quieten(vm1, vm2)
    counted = [traffic.interface_counters(guest) for guest in (vm1, vm2)]
    report = backend.stop()
    assert report.received == report.sent + report.dropped, report.json
    for port, guest in zip(report.ports, counted, strict=True):
        assert guest.faulty == 0
        assert (port.received, port.sent) == (guest.sent, guest.received), report.json
