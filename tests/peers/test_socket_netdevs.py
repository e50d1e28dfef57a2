"""Linux guests whose card is one of QEMU's socket netdevs, with a port of ours at the other end.

Frames go through sockets, so any guest can have such a card, whatever its memory is made of.
"""

from __future__ import annotations

import socket

import pytest
import traffic
from guest import Guest, SocketNic, mac_for
from traffic import Pings

import virtnet as vn

pytestmark = [pytest.mark.peer, pytest.mark.timeout(180)]


def free(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def port(kind: str, name: str, directory) -> str:
    """Our port."""
    ours, theirs = directory / f"{name}.ours", directory / f"{name}.theirs"
    match kind:
        case "stream-unix":
            return f"stream:{ours}"
        case "stream-unix-qemu-listens":
            return f"stream:{theirs},client=on"
        case "stream-tcp":
            return f"stream:127.0.0.1:{free(socket.SOCK_STREAM)}"
        case "stream-tcp-qemu-listens":
            return f"stream:127.0.0.1:{free(socket.SOCK_STREAM)},client=on"
        case "dgram-unix":
            return f"dgram:{ours},remote={theirs}"
        case _:
            return f"dgram:127.0.0.1:{free(socket.SOCK_DGRAM)},remote=127.0.0.1:{free(socket.SOCK_DGRAM)}"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("stream-unix", "stream-unix-qemu-listens"),
        ("stream-tcp", "stream-tcp-qemu-listens"),
        ("dgram-unix", "dgram-udp"),
    ],
)
def test_guests_talk_through_sockets(guest_image, directory, running, one, other):
    net = running.enter_context(vn.Net())
    switch = net.switch()
    guests = []
    for number, (name, kind) in enumerate((("vm1", one), ("vm2", other)), 1):
        net.port(port(kind, name, directory), name=name) >> switch
        arguments = net[name].qemu_args(mac=mac_for(name))
        nic = SocketNic(directory / f"{name}.sock", qemu_args=tuple(arguments))
        guest = Guest(guest_image, name, nic, address=f"10.0.0.{number}/24", directory=directory)
        guests.append(running.enter_context(guest))
    vm1, vm2 = (guest.wait_ready() for guest in guests)
    for name in ("vm1", "vm2"):
        assert net[name].wait_connected(20), net[name].explain()

    assert traffic.wait_for_answer(vm1, vm2, timeout_s=20) is not None
    assert traffic.ping((vm1, vm2), (vm2, vm1)) == [Pings(20, 20)] * 2
    for source, target in ((vm1, vm2), (vm2, vm1)):
        assert traffic.tcp(source, target, mib=4) > 0
        assert traffic.stream_is_intact(source, target, mib=2)
    traffic.quieten(vm1, vm2)
    stats = net.stats()
    assert stats.balance().exact, stats
    for guest in (vm1, vm2):
        counted = traffic.interface_counters(guest)
        here = stats.ports[guest.name]
        assert counted.faulty == 0
        assert here.received == counted.sent, stats
        # What QEMU does not take in time out of a UDP socket, the system loses.
        lost = here.sent - counted.received
        assert lost == 0 or (lost > 0 and net[guest.name].spec.where.startswith("127.0.0.1") and other == "dgram-udp")

    if one.startswith("stream"):
        vm1.kill()
        assert net["vm1"].wait_event("disconnected", 20)
        assert not net["vm1"].connected
