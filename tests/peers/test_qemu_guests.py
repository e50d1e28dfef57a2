"""Linux guests under QEMU, with the kernel's own virtio-net driver, attached to the switch over vhost-user.

One by hand, after ``tests/peers/install.sh``::

    pytest tests/peers/test_qemu_guests.py -m peer -k packed-2-queues
    VIRTNET_BACKEND="python tests/peers/net_vhost_switch.py {ports} --seconds {seconds}" pytest tests/peers -m peer

The first is virtnet, the second the same against DPDK's vhost library. Guests run without hardware virtualisation, so
rates mean nothing here; what counts is that everything arrives, unharmed, and is accounted for to the last packet.
"""

from __future__ import annotations

import re

import pytest
import traffic
from backend import Backend, PortSpec
from guest import Guest, Nic
from traffic import Pings

pytestmark = [pytest.mark.peer, pytest.mark.timeout(180)]

#: The bits of virtio's feature word whose presence a test asserts.
BITS = {"csum": 0, "mrg_rxbuf": 15, "mq": 22, "indirect_desc": 28, "event_idx": 29, "version_1": 32, "ring_packed": 34}

NO_OFFLOADS = {"csum": "off", "gso": "off", "guest_csum": "off"} | {
    f"{side}_{kind}": "off" for side in ("guest", "host") for kind in ("tso4", "tso6", "ecn", "ufo")
}

#: QEMU's properties for devices that offer less than they could, and the features that then are not negotiated.
DRIVERS = {
    "legacy": ({"disable-modern": "on", "disable-legacy": "off"}, {"version_1"}),
    "legacy-short-header": (
        {"disable-modern": "on", "disable-legacy": "off", "mrg_rxbuf": "off"},
        {"version_1", "mrg_rxbuf"},
    ),
    "plain-notifications": ({"event_idx": "off", "indirect_desc": "off"}, {"event_idx", "indirect_desc"}),
    "no-offloads": (
        NO_OFFLOADS,
        {"csum", "guest_csum", "guest_tso4", "guest_tso6", "host_tso4", "host_tso6"},
    ),
}


class Network:
    """Guests on one back-end; what a test starts here ends with the test."""

    def __init__(self, image, command, directory, running):
        self._image = image
        self._command = command
        self._directory = directory
        self._running = running

    @property
    def is_net_vhost(self):
        """The back-end is the stand-in: DPDK's vhost library, with two ports only."""
        return "net_vhost_switch" in self._command

    def nic(self, name, **options):
        return Nic(self._directory / f"{name}.sock", **options)

    def backend(self, *nics):
        ports = [PortSpec(nic.socket, nic.queue_pairs, connect=nic.listen) for nic in nics]
        return self._running.enter_context(Backend(self._command, ports, self._directory))

    def guest(self, name, nic, number, **options):
        guest = Guest(self._image, name, nic, address=f"10.0.0.{number}/24", directory=self._directory, **options)
        return self._running.enter_context(guest)

    def pair(self, **options):
        """Starts a back-end and two guests, whichever side has to be first, and waits until both have a link."""
        nics = [self.nic(name, **options) for name in ("vm1", "vm2")]
        backend = self.backend(*nics)
        if not nics[0].listen:
            backend.start()
        guests = [self.guest(nic.socket.stem, nic, number) for number, nic in enumerate(nics, 1)]
        if nics[0].listen:
            backend.start()
        for guest in guests:
            guest.wait_ready()
        traffic.wait_for_link(*guests)
        return backend, *guests


@pytest.fixture
def network(guest_image, backend_command, directory, running):
    return Network(guest_image, backend_command, directory, running)


@pytest.mark.parametrize("mrg_rxbuf", [True, False], ids=["mergeable", "not-mergeable"])
@pytest.mark.parametrize("queue_pairs", [1, 2], ids=["1-queue", "2-queues"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_all_that_two_guests_send_arrives_and_is_counted(network, packed, queue_pairs, mrg_rxbuf):
    # DPDK 22.11 takes an indirect descriptor of a packed ring for a buffer when it sends four packets at once: the
    # driver gets rubbish and drops it. Buffers that are one descriptor each keep clear of that.
    properties = NO_OFFLOADS if network.is_net_vhost and packed and not mrg_rxbuf else {}
    backend, vm1, vm2 = network.pair(packed=packed, queue_pairs=queue_pairs, mrg_rxbuf=mrg_rxbuf, properties=properties)

    assert traffic.ping((vm1, vm2), (vm2, vm1)) == [Pings(20, 20)] * 2
    assert traffic.tcp(vm1, vm2, streams=2 * queue_pairs) > 0
    assert traffic.tcp(vm1, vm2, streams=2 * queue_pairs, reverse=True) > 0
    assert traffic.stream_is_intact(vm1, vm2)
    assert traffic.stream_is_intact(vm2, vm1)
    for guest in (vm1, vm2):
        for direction in ("tx", "rx"):
            counted = traffic.queue_counters(guest, direction)
            assert len(counted) == queue_pairs
            assert all(counted), f"{guest.name}: a queue was never used for {direction}: {counted}"

    traffic.quieten(vm1, vm2)
    counted = [traffic.interface_counters(guest) for guest in (vm1, vm2)]
    agreed = traffic.driver_features(vm1)
    report = backend.stop()
    assert_negotiated(report.ports, agreed, packed=packed, queue_pairs=queue_pairs, mrg_rxbuf=mrg_rxbuf)
    assert_exact(report, counted)


def test_packets_larger_than_one_buffer_arrive_unharmed(network):
    backend, vm1, vm2 = network.pair()
    for guest in (vm1, vm2):
        guest.run("ip link set eth0 mtu 9000")

    assert traffic.ping((vm1, vm2), (vm2, vm1), size=8972) == [Pings(20, 20)] * 2
    assert traffic.stream_is_intact(vm1, vm2)
    assert backend.is_running


@pytest.mark.parametrize(("properties", "missing"), DRIVERS.values(), ids=DRIVERS)
def test_driver_that_accepts_less_is_served_too(network, properties, missing):
    backend, vm1, vm2 = network.pair(properties=properties)

    assert traffic.ping((vm1, vm2), (vm2, vm1)) == [Pings(20, 20)] * 2
    assert traffic.stream_is_intact(vm1, vm2)
    traffic.quieten(vm1, vm2)
    counted = [traffic.interface_counters(guest) for guest in (vm1, vm2)]
    report = backend.stop()
    assert_exact(report, counted)
    for port in report.ports:
        assert not port.features & missing


@pytest.mark.parametrize("iommu", ["pt", "lazy", "strict"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_guests_behind_an_iommu_are_served(network, packed, iommu):
    if network.is_net_vhost:
        pytest.skip("DPDK's back-end does not pass this")
    backend, vm1, vm2 = network.pair(packed=packed, iommu=iommu)

    # The first packet into a page that was not told yet may find no room: whoever sends it again is served.
    assert traffic.wait_for_answer(vm1, vm2, timeout_s=20) is not None
    assert traffic.wait_for_answer(vm2, vm1, timeout_s=20) is not None
    assert traffic.stream_is_intact(vm1, vm2)
    assert traffic.stream_is_intact(vm2, vm1)
    assert traffic.tcp(vm1, vm2, mib=2) > 0
    traffic.quieten(vm1, vm2)
    counted = [traffic.interface_counters(guest) for guest in (vm1, vm2)]
    report = backend.stop()
    assert report.received == report.sent + report.dropped, report.json
    for port, guest in zip(report.ports, counted, strict=True):
        assert "access_platform" in port.features
        assert guest.faulty == 0
        assert (port.received, port.sent) == (guest.sent, guest.received), report.json


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_that_takes_long_frames_talks_to_one_that_takes_none(network, packed):
    if network.is_net_vhost:
        pytest.skip("DPDK's library passes on what a receiver did not agree to")
    nics = [network.nic("vm1", packed=packed), network.nic("vm2", packed=packed, properties=NO_OFFLOADS)]
    backend = network.backend(*nics).start()
    vm1, vm2 = (network.guest(nic.socket.stem, nic, n).wait_ready() for n, nic in enumerate(nics, 1))
    traffic.wait_for_link(vm1, vm2)

    assert traffic.ping((vm1, vm2), (vm2, vm1)) == [Pings(20, 20)] * 2
    assert traffic.tcp(vm1, vm2) > 0
    assert traffic.tcp(vm1, vm2, reverse=True) > 0
    assert traffic.stream_is_intact(vm1, vm2)
    assert traffic.stream_is_intact(vm2, vm1)
    traffic.quieten(vm1, vm2)
    counted = [traffic.interface_counters(guest) for guest in (vm1, vm2)]
    report = backend.stop()
    offloads = {"csum", "guest_csum", "host_tso4", "guest_tso4", "host_tso6", "guest_tso6"}
    assert offloads <= report.ports[0].features
    assert not offloads & report.ports[1].features
    segmented = [port["segmented"] for port in report.json["ports"].values()]
    assert segmented[0] == 0
    assert segmented[1] > 100
    assert report.received + sum(segmented) == report.sent + report.dropped
    for port, guest in zip(report.ports, counted, strict=True):
        assert guest.faulty == 0
        assert (port.received, port.sent) == (guest.sent, guest.received), report.json


@pytest.mark.parametrize("feature", ["tx", "tso", "gso", "gro", "rx-gro-hw"])
def test_a_guest_may_switch_any_offload_off_and_on_again(network, feature):
    backend, vm1, vm2 = network.pair()
    for state in ("off", "on"):
        vm1.run(f"ethtool -K eth0 {feature} {state}")
        assert traffic.tcp(vm1, vm2, mib=4) > 0
        assert traffic.stream_is_intact(vm1, vm2)
        assert traffic.stream_is_intact(vm2, vm1)
    traffic.quieten(vm1, vm2)
    assert all(traffic.interface_counters(guest).faulty == 0 for guest in (vm1, vm2))
    assert backend.is_running


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_changes_its_number_of_queues_under_traffic(network, packed):
    if network.is_net_vhost:
        pytest.skip("what is counted here is the back-end's way of counting")
    backend, vm1, vm2 = network.pair(packed=packed, queue_pairs=2)
    vm2.run(f"ping -i 0.05 -W 1 {vm1.ip} >/tmp/pings 2>&1 &")
    for n in (1, 2, 1, 2):
        vm1.run(f"ethtool -L eth0 combined {n}")
        assert re.findall(r"Combined:\s+(\d+)", vm1.run("ethtool -l eth0")) == ["2", str(n)]
        before = traffic.queue_counters(vm1, "rx")
        # Some flows more than there are queues, so that none is left out by chance.
        assert traffic.tcp(vm1, vm2, mib=4, streams=8) > 0
        assert traffic.tcp(vm1, vm2, mib=4, streams=8, reverse=True) > 0
        moved = [now > then for now, then in zip(traffic.queue_counters(vm1, "rx"), before, strict=True)]
        assert moved == [True] * n, f"with {n} queues these received packets: {moved}"
    pings = traffic.read_pings(vm2.run("killall -INT ping; sleep 0.3; cat /tmp/pings"))
    assert pings.sent > 20
    assert pings.answered >= pings.sent - 8, "more than a few packets were lost with each change"

    assert traffic.stream_is_intact(vm1, vm2)
    assert traffic.stream_is_intact(vm2, vm1)
    traffic.quieten(vm1, vm2)
    counted = [traffic.interface_counters(guest) for guest in (vm1, vm2)]
    assert_exact(backend.stop(), counted)


def test_back_end_that_connects_to_qemu_serves_guests_with_packed_rings(network):
    backend, vm1, vm2 = network.pair(packed=True, listen=True)

    assert traffic.ping((vm1, vm2), (vm2, vm1)) == [Pings(20, 20)] * 2
    assert traffic.stream_is_intact(vm1, vm2)
    traffic.quieten(vm1, vm2)
    counted = [traffic.interface_counters(guest) for guest in (vm1, vm2)]
    assert_exact(backend.stop(), counted)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_driver_that_is_loaded_again_finds_its_device_working(network, packed):
    _, vm1, vm2 = network.pair(packed=packed)
    assert traffic.ping((vm1, vm2), n=5) == [Pings(5, 5)]

    vm1.run("rmmod virtio_net; insmod /modules/*virtio_net.ko")
    vm1.run(
        "until [ -e /sys/class/net/eth0 ]; do usleep 20000; done; ip addr add 10.0.0.1/24 dev eth0; ip link set eth0 up"
    )
    traffic.wait_for_link(vm1)

    assert traffic.ping((vm1, vm2), (vm2, vm1)) == [Pings(20, 20)] * 2
    assert traffic.stream_is_intact(vm2, vm1)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize(
    ("listen", "queue_pairs"),
    [(False, 1), (True, 1), (False, 2)],
    ids=["back-end-listens", "qemu-listens", "back-end-listens-2-queues"],
)
def test_guests_talk_again_after_the_switch_was_killed_under_traffic(network, listen, queue_pairs, packed):
    if network.is_net_vhost and packed:
        pytest.skip("DPDK's library starts a packed ring where QEMU says, which is not where it was")
    backend, vm1, vm2 = network.pair(listen=listen, queue_pairs=queue_pairs, packed=packed)
    assert traffic.ping((vm1, vm2), n=5) == [Pings(5, 5)]

    for _ in range(2):
        traffic.keep_busy(vm1, vm2)
        backend.kill()
        assert traffic.wait_for_answer(vm1, vm2, timeout_s=1) is None, "answers came without a back-end"
        backend.start()

        assert traffic.wait_for_answer(vm1, vm2, timeout_s=10) is not None, "the guests did not find each other again"
        traffic.quieten(vm1, vm2, arp=True)
        assert traffic.ping((vm1, vm2), (vm2, vm1)) == [Pings(20, 20)] * 2
        assert traffic.stream_is_intact(vm1, vm2)
    assert backend.is_running


def test_guest_that_is_killed_and_started_again_is_served_and_its_peer_never_notices(network):
    nics = [network.nic(name) for name in ("vm1", "vm2")]
    backend, vm1, vm2 = network.pair()
    traffic.ping((vm1, vm2), n=5)

    lost_before = traffic.carrier_losses(vm1)
    traffic.keep_busy(vm1, vm2)
    vm2.kill()
    again = network.guest("vm2", nics[1], 2).wait_ready()
    traffic.wait_for_link(again)

    assert traffic.carrier_losses(vm1) == lost_before
    traffic.quieten(vm1, again, arp=True)
    assert traffic.ping((vm1, again), (again, vm1)) == [Pings(20, 20)] * 2
    assert traffic.stream_is_intact(again, vm1)
    assert backend.is_running


def test_two_guests_lose_nothing_while_a_third_is_killed_and_started_again(network):
    if network.is_net_vhost:
        pytest.skip("this back-end has two ports only")
    nics = [network.nic(name) for name in ("vm1", "vm2", "vm3")]
    backend = network.backend(*nics).start()
    guests = [network.guest(f"vm{number}", nic, number) for number, nic in enumerate(nics, 1)]
    vm1, vm2, vm3 = (guest.wait_ready() for guest in guests)
    traffic.wait_for_link(*guests)
    assert traffic.ping((vm1, vm2), (vm2, vm3), (vm3, vm1)) == [Pings(20, 20)] * 3

    pinging = vm1.begin(f"ping -c 150 -i 0.05 -W 1 {vm2.ip}", 60)
    traffic.keep_busy(vm3, vm2)
    vm3.kill()
    again = network.guest("vm3", nics[2], 3).wait_ready()

    assert traffic.read_pings(vm1.finish(pinging)[1]) == Pings(150, 150)
    assert traffic.ping((again, vm1), (vm2, again)) == [Pings(20, 20)] * 2
    report = backend.stop()
    assert report.copied > 0, "what was broadcast to two guests was not counted twice"
    assert report.received + report.copied == report.sent + report.dropped, report.json


def assert_negotiated(ports, agreed, **options):
    """The report names what the driver really uses, not what was offered."""
    expected = {"version_1"}
    expected |= {"ring_packed"} if options["packed"] else set()
    expected |= {"mq"} if options["queue_pairs"] > 1 else set()
    expected |= {"mrg_rxbuf"} if options["mrg_rxbuf"] else set()
    for port in ports:
        assert port.ring == ("packed" if options["packed"] else "split")
        assert port.features & {"version_1", "ring_packed", "mq", "mrg_rxbuf"} == expected
        for name, bit in BITS.items():
            assert name not in port.features or bit in agreed, f"{name} is reported, the driver did not accept it"


def assert_exact(report, counted):
    """Nothing is missing: between two ports a flooded packet has one copy, so what came is what left or was dropped."""
    assert report.received > 0
    assert report.received == report.sent + report.dropped, report.json
    for port, guest in zip(report.ports, counted, strict=True):
        assert guest.faulty == 0
        assert (port.received, port.sent) == (guest.sent, guest.received), report.json
