"""AF_XDP without copying: the driver of a guest's virtio card receives into our port's memory, and sends from it.

For that the card is QEMU's own: a back-end of vhost-user is not told that a guest resets one of its rings, as its
driver does when somebody brings memory for it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from guest import Guest, Nic, SocketNic
from image import SCRIPT, with_python

import virtnet as vn
from helpers import receive

pytestmark = [pytest.mark.peer, pytest.mark.timeout(240)]

ECHO = Path(__file__).with_name("xdp_in_guest.py")


def frames(n: int) -> list[bytes]:
    """Frames of all lengths, each with bytes of its own."""
    chance = random.Random(n)  # noqa: S311 - to be compared, not to be kept secret
    lengths = [60, 1514, *(chance.randrange(60, 1515) for _ in range(n - 2))]
    return [b"\xff" * 6 + b"\x02\0\0\0\0\1" + b"\x88\xb5" + chance.randbytes(length - 14) for length in lengths]


def echoed(host: vn.Port, guest: Guest, mode: str) -> str:
    """Has a guest echo frames and compares them; how its port is attached."""
    guest.run(f"{SCRIPT} {mode} 100 >/tmp/told 2>&1 &")
    how = guest.run("until grep -s . /tmp/told; do sleep 0.1; done", 60).strip()
    sent = frames(100)
    assert host.tx(sent) == len(sent), how
    arrived = receive(host, len(sent), 30)
    assert arrived == [frame[6:12] + frame[:6] + frame[12:] for frame in sent]
    told = guest.run("until [ $(wc -l </tmp/told) -gt 1 ]; do sleep 0.1; done; tail -n 1 /tmp/told")
    assert json.loads(told) == {"received": 100, "sent": 100, "drops": {}, "exact": True}
    return how


@pytest.mark.parametrize(("packed", "mode"), [("off", "zero-copy"), ("on", "auto")])
def test_a_virtio_card_shares_its_memory_with_our_port(newer_guest_image, directory, packed, mode):
    image = with_python(newer_guest_image, ECHO, directory)
    path = directory / "vm1.sock"
    # Only a driver that maps its buffers for the device lets others map theirs: that is what iommu_platform says.
    device = f"virtio-net-pci,netdev=net,disable-legacy=on,iommu_platform=on,packed={packed}"
    netdev = f"stream,id=net,server=off,addr.type=unix,addr.path={path}"
    nic = SocketNic(path, qemu_args=("-netdev", netdev, "-device", device))
    with (
        vn.StreamPort(path) as host,
        Guest(image, "vm1", nic, address="", directory=directory, memory_mib=384) as guest,
    ):
        guest.wait_ready()
        assert echoed(host, guest, mode) == "native, zero-copy"


def test_a_card_that_cannot_reset_its_rings_is_copied_from(newer_guest_image, directory):
    image = with_python(newer_guest_image, ECHO, directory)
    nic = Nic(directory / "vm1.sock", properties={"iommu_platform": "on", "disable-legacy": "on"})
    with (
        vn.VhostUserPort(nic.socket) as host,
        Guest(image, "vm1", nic, address="", directory=directory, memory_mib=384) as guest,
    ):
        guest.wait_ready()
        _, refusal = guest.try_run(f"{SCRIPT} zero-copy 100", 60)
        assert "its device cannot have a queue reset for that" in refusal
        assert echoed(host, guest, "auto") == "native, copy"
