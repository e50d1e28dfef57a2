"""A Linux guest that moves from one QEMU to another while it talks: live migration between two switches of virtnet's.

::

        vm1 ──┐                        ┌── vm1, later
              switch "here" ── link ── switch "there"
        vm2 ──┘                        └── a capture of what is broadcast

``vm2`` stays where it is. The guest's memory is copied and then written to by the network, while nobody in the guest
reads it: a stream with the right hash shows that every page was logged. And ``vm2`` finds the guest again because its
new place was announced.
"""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

import pytest
import traffic
from guest import Guest, Nic
from traffic import Pings

import virtnet

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.peer, pytest.mark.timeout(300)]

#: A stream of 4 MiB that takes some 12 seconds.
CHUNKS = 64
STREAM_BYTES = CHUNKS << 16

STREAM_PORT = 6999

#: Ten a second, for longer than the migration.
PINGS = 300

#: The guest's address, the same in both places.
MAC = "52:54:00:0a:00:01"

ARP, RARP = 0x0806, 0x8035


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("announces", [True, False], ids=["guest-announces", "switch-announces"])
def test_a_guest_moves_to_another_switch_and_its_stream_goes_on(guest_image, directory, running, packed, announces):
    target, _ = move(guest_image, directory, running, packed=packed, announces=announces)
    assert target.ring == ("packed" if packed else "split")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_with_several_queue_pairs_moves_with_all_of_them(guest_image, directory, running, packed):
    target, rings = move(guest_image, directory, running, packed=packed, queue_pairs=2)
    assert (target.queue_pairs, target.ring) == (2, "packed" if packed else "split")
    assert [(ring.started, ring.enabled, ring.broken) for ring in rings] == [(True, True, None)] * 4
    # Flows went over both pairs, here and there.
    assert all(ring.bursts for ring in rings), rings


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("iommu", ["pt", "lazy", "strict"])
def test_a_guest_behind_an_iommu_moves(guest_image, directory, running, iommu, packed):
    target, _ = move(guest_image, directory, running, iommu=iommu, packed=packed)
    assert target.features & virtnet.RingFeature.ACCESS_PLATFORM.value
    assert target.ring == ("packed" if packed else "split")


def move(guest_image, directory, running, *, packed=False, announces=True, queue_pairs=1, iommu=None):
    """Moves a guest while it talks; returns what its port at the destination says afterwards, and its rings."""

    def nic(name, mac="", **options):
        properties = {"guest_announce": "on" if announces else "off"}
        return Nic(directory / f"{name}.sock", mac, packed=packed, properties=properties, **options)

    moving = {"queue_pairs": queue_pairs, "iommu": iommu}
    before, after, other = nic("before", MAC, **moving), nic("after", MAC, **moving), nic("vm2")

    here, there = virtnet.Net(), virtnet.Net()
    source = here.vhost_user(before.socket, queue_pairs=queue_pairs)
    switch = here.switch() << source
    switch << here.vhost_user(other.socket)
    switch << here.vhost_user(directory / "link.sock")
    target = there.vhost_user(after.socket, queue_pairs=queue_pairs)
    broadcasts = directory / "broadcasts.pcap"
    there.switch() << target << there.virtio_user(directory / "link.sock") << there.pcap(broadcasts)
    running.enter_context(here)
    running.enter_context(there)

    def guest(name, nic, number, **options):
        made = Guest(guest_image, name, nic, address=f"10.0.0.{number}/24", directory=directory, **options)
        return running.enter_context(made)

    vm1, vm2 = guest("before", before, 1), guest("vm2", other, 2)
    moved = guest("after", after, 1, incoming=True)
    for each in (vm1, vm2):
        each.wait_ready()
    traffic.wait_for_link(vm1, vm2)
    # The first packet into a page that was not told yet may find no room: whoever sends it again is served.
    assert all(traffic.wait_for_answer(*way, timeout_s=20) is not None for way in ((vm1, vm2), (vm2, vm1)))
    assert iommu or traffic.ping((vm1, vm2), (vm2, vm1), n=5) == [Pings(5, 5)] * 2
    assert not source.stats().logging

    vm2.run(f"ping -c {PINGS} -i 0.1 -W 1 {vm1.ip} >/tmp/pings 2>&1 &")
    vm1.begin_migration(moved)
    assert source.stats().logging
    assert "is being moved" in str(source.explain())
    expected = begin_stream(vm2, vm1)
    enough = source.stats().sent_bytes + STREAM_BYTES // 2
    while source.stats().sent_bytes < enough and not vm1.has_migrated():
        time.sleep(0.05)
    vm1.end_migration()
    moved.take_over(vm1)

    assert end_stream(moved) == expected
    pings = traffic.read_pings(vm2.run("until grep transmitted /tmp/pings; do usleep 50000; done", 90))
    assert pings.answered > 0.7 * PINGS, f"the guest was out of reach for long: {pings}"
    assert traffic.ping((moved, vm2), (vm2, moved)) == [Pings(20, 20)] * 2
    assert traffic.stream_is_intact(vm2, moved)
    assert traffic.stream_is_intact(moved, vm2)
    arrived, rings = target.stats(), target.rings
    assert not arrived.logging
    for net in (here, there):
        net.stop()
        assert net.stats().balance().missing == 0
    announced = ethertypes(broadcasts, MAC)
    assert (RARP in announced) == (not announces), announced
    assert ARP in announced or not announces
    return arrived, rings


def begin_stream(source: Guest, target: Guest) -> str:
    """Begins to send random bytes, slowly, which nobody reads before :func:`end_stream`; returns their hash.

    They wait where the device has written them: what no processor has touched is what a page that was not logged loses.
    """
    sent = source.run(
        f"dd if=/dev/urandom of=/tmp/slow bs=64k count={CHUNKS} 2>/dev/null; sha256sum </tmp/slow\n"
        "cat >/tmp/slowly <<'END'\n"
        f"i=0; while [ $i -lt {CHUNKS} ]; do\n"
        "dd if=/tmp/slow bs=64k skip=$i count=1 2>/dev/null; usleep 150000; i=$((i + 1)); done\n"
        "END\n"
        f"nc -l -p {STREAM_PORT} -e sh /tmp/slowly >/dev/null 2>&1 &"
    )
    target.run(
        "echo 4096 33554432 33554432 >/proc/sys/net/ipv4/tcp_rmem; sleep 0.2\n"
        f"nc {source.ip} {STREAM_PORT} </dev/null 2>/dev/null |\n"
        "(until [ -e /tmp/read ]; do usleep 50000; done; sha256sum) >/tmp/hash &"
    )
    return sent.split()[0]


def end_stream(target: Guest) -> str:
    """Has what has arrived read, and what still comes; returns its hash."""
    return target.run("touch /tmp/read; until [ -s /tmp/hash ]; do usleep 50000; done; cat /tmp/hash", 90).split()[0]


def ethertypes(capture: Path, mac: str) -> set[int]:
    """Returns the types of the broadcasts from an address in a capture."""
    found, data = set(), capture.read_bytes()[24:]
    while data:
        (length,) = struct.unpack_from("<8xI", data)
        frame, data = data[16 : 16 + length], data[16 + length :]
        if frame[:6] == b"\xff" * 6 and frame[6:12] == bytes.fromhex(mac.replace(":", "")):
            found.add(int.from_bytes(frame[12:14], "big"))
    return found
