"""DPDK's testpmd at the other end: its virtio-user driver on our devices, its vhost back-end behind our driver.

One by hand, after ``tests/peers/install.sh``::

    pytest tests/peers/test_testpmd.py -m peer -k 'wire and packed'

Testpmd counts every packet, and so does virtnet. A test lets both come to rest and then compares to the last packet;
only where somebody was killed under traffic that is impossible, and what counts there is that traffic comes back.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import struct

import pytest
from benchmarks import ours, testpmd
from benchmarks.ours import Virtnet
from benchmarks.testpmd import Testpmd, is_listening, wait_for

pytestmark = [pytest.mark.peer, pytest.mark.timeout(120)]

#: A guard: no command outlives its test by more than this.
RUN_SECONDS = 90

#: How long traffic may take to come back. Who connects tries again once a second.
BACK_WITHIN_S = 6

RINGS = ["split", "packed"]
RING_SIZE = 256


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Both programs, or the reason why there is nothing to test."""
    missing = [
        text
        for text, found in [
            ("dpdk-testpmd: run tests/peers/install.sh", testpmd.program()),
            ("virtnet", ours.program()),
        ]
        if not found
    ]
    if missing:
        (pytest.fail if os.environ.get("VIRTNET_REQUIRE_PEERS") else pytest.skip)(f"not found: {', '.join(missing)}")


class Bench:
    """The processes of one test; they end with it."""

    def __init__(self, directory, running):
        self._directory = directory
        self._running = running
        self._number = itertools.count()
        self._engines: list[Virtnet] = []
        self._drivers: list[Testpmd] = []

    def tell(self):
        """Prints what everybody has counted who is still there: who has the packets that a test is waiting for."""
        for driver in self._drivers:
            with contextlib.suppress(testpmd.TestpmdError):
                print("testpmd:", *driver.stats(), sep="\n    ")  # noqa: T201 - beside the failure
        for engine in self._engines:
            with contextlib.suppress(ours.VirtnetError, ValueError):
                print("virtnet:", json.dumps(engine.finish(), indent=4))  # noqa: T201 - likewise

    def socket(self, name):
        return self._directory / f"{name}.sock"

    def virtnet(self, command, *ports, options=()):
        log = self._directory / f"{next(self._number)}-virtnet-{command}.log"
        arguments = [command, *ports, *map(str, options), "--seconds", str(RUN_SECONDS)]
        process = self._running.enter_context(Virtnet(arguments, log))
        self._engines.append(process)
        own = [is_listening_port(port) for port in ports]
        wait_for(
            lambda: all(listening() for listening in own) or process.process.poll() is not None,
            f"virtnet {command} to listen",
            timeout_s=30,
        )
        return process

    def testpmd(self, *vdevs, mode, queue_pairs=1, args=(), ready=True):
        log = self._directory / f"{next(self._number)}-testpmd.log"
        queues = [f"--rxq={queue_pairs}", f"--txq={queue_pairs}"]
        peers = [f"--eth-peer={number},{testpmd.mac(1 - number)}" for number in range(2)] if len(vdevs) == 2 else []
        process = self._running.enter_context(
            Testpmd(vdevs, mode=mode, log=log, args=["--no-flush-rx", *queues, *peers, *args])
        )
        self._drivers.append(process)
        return process.ready(timeout_s=30) if ready else process


@pytest.fixture
def bench(request, directory, running):
    made = Bench(directory, running)
    yield made
    if any(report.failed for report in request.node.reports):
        made.tell()


def vhost_user(socket, **options):
    """Our device on a socket, as the command line takes it."""
    return port_text("vhost-user", socket, options)


def virtio_user(socket, **options):
    """Our driver on a socket."""
    return port_text("virtio-user", socket, options)


def port_text(kind, where, options):
    switches = {True: "on", False: "off"}
    texts = [f"{name}={switches[value] if isinstance(value, bool) else value}" for name, value in options.items()]
    return ",".join([f"{kind}:{where}", *texts])


def is_listening_port(text):
    """A question that is true once the port's socket is there, or at once if it is somebody else's to make."""
    kind, _, rest = text.partition(":")
    where, *options = rest.split(",")
    listens = "client=on" not in options if kind == "vhost-user" else "server=on" in options
    return lambda: not listens or is_listening(where)


# Our devices, DPDK's driver.


@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "not-mergeable"])
@pytest.mark.parametrize("in_order", [True, False], ids=["in-order", "any-order"])
@pytest.mark.parametrize("ring", RINGS)
def test_wire_accounts_for_every_packet_of_two_drivers_at_full_rate(bench, ring, in_order, mergeable):
    wire, drivers = joined(bench, "wire", "flowgen", ring=ring, in_order=in_order, mergeable=mergeable)

    drivers.start()
    assert_moving(drivers)
    report = settle(wire, drivers)

    for port in report["ports"].values():
        assert port["ring"] == ring
        assert ("IN_ORDER" in names(port)) == in_order
        assert ("MRG_RXBUF" in names(port)) == mergeable


@pytest.mark.parametrize("ring", RINGS)
def test_switch_accounts_for_every_packet_of_two_drivers(bench, ring):
    switch, drivers = joined(bench, "switch", "io", ring=ring)

    # Each packet circulates: a driver sends it out again where the packet's sender lives.
    drivers.start(tx_first=4)
    assert_moving(drivers)
    report = settle(switch, drivers)

    assert report["balance"]["dropped"] == 0
    assert next(iter(report["functions"].values()))["copied"] == 0


@pytest.mark.parametrize("command", ["wire", "switch"])
@pytest.mark.parametrize("ring", RINGS)
def test_two_queue_pairs_carry_and_account_for_every_packet(bench, ring, command):
    engine, drivers = joined(bench, command, "io", ring=ring, queue_pairs=2)

    drivers.start(tx_first=2)
    assert_moving(drivers)
    report = settle(engine, drivers)

    assert [port["queue_pairs"] for port in report["ports"].values()] == [2, 2]


@pytest.mark.parametrize("ring", RINGS)
def test_echo_accounts_for_every_packet(bench, ring):
    socket = bench.socket("a")
    echo = bench.virtnet("echo", vhost_user(socket))
    driver = bench.testpmd(testpmd.virtio_user(0, socket, ring=ring), mode="flowgen")

    driver.start()
    assert_moving(driver)
    settle(echo, driver)


@pytest.mark.parametrize("options", [[], ["--copy"]], ids=["look", "copy"])
@pytest.mark.parametrize("ring", RINGS)
def test_sink_takes_every_packet_a_driver_sends(bench, ring, options):
    socket = bench.socket("a")
    sink = bench.virtnet("sink", vhost_user(socket), options=options)
    driver = bench.testpmd(testpmd.virtio_user(0, socket, ring=ring), mode="txonly", args=["--txpkts=1518"])

    driver.start()
    wait_for(lambda: driver.totals()[1] > 10_000, "packets to be sent")
    report = settle(sink, driver)

    port = next(iter(report["ports"].values()))
    assert port["received_bytes"] == 1518 * port["received"]


@pytest.mark.parametrize("size", [60, 64, 1518])
@pytest.mark.parametrize("ring", RINGS)
def test_driver_receives_what_a_source_sends(bench, ring, size):
    socket = bench.socket("a")
    driver = bench.testpmd(testpmd.virtio_user(0, socket, ring=ring, server=True), mode="rxonly", ready=False)
    wait_for(lambda: is_listening(socket), "testpmd to listen")
    source = bench.virtnet("source", vhost_user(socket, client=True), options=["--size", size, "--rate", 50_000])
    driver.ready()

    driver.start()
    wait_for(lambda: driver.totals()[0] > 10_000, "packets to come")
    report = source.finish()
    driver.drain()

    assert report["balance"]["exact"]
    (port,) = driver.stats()
    # DPDK's driver throws away what came between the filling of its ring and its start.
    assert 0 <= report["balance"]["sent"] - port.rx_packets <= RING_SIZE
    assert port.rx_bytes == size * port.rx_packets


@pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "not-mergeable"])
@pytest.mark.parametrize("ring", RINGS)
def test_frames_of_every_size_cross_the_wire_unchanged(bench, directory, ring, mergeable):
    sent = [write_capture(directory / f"sent{number}.pcap", seed=number) for number in range(2)]
    a, b = bench.socket("a"), bench.socket("b")
    wire = bench.virtnet("wire", vhost_user(a), vhost_user(b))
    # Pairs of neighbours forward to each other: a capture's frames go out by the driver beside it, and what that driver
    # receives is captured. With retries nothing is lost to a full ring.
    vdevs = [
        vdev
        for number, socket in enumerate((a, b))
        for vdev in (
            f"net_pcap{number},rx_pcap={directory}/sent{number}.pcap,tx_pcap={directory}/got{number}.pcap",
            testpmd.virtio_user(number, socket, ring=ring, mergeable=mergeable),
        )
    ]
    driver = bench.testpmd(*vdevs, mode="io")
    driver.command("set fwd io retry")
    driver.command("set burst tx retry 1000")
    driver.start()
    wait_for(lambda: frames_of(driver) >= 2 * len(sent[0]), "all frames to arrive")
    driver.stop()
    driver.close()
    report = wire.finish()

    assert report["balance"]["exact"]
    assert read_capture(directory / "got1.pcap") == sent[0]
    assert read_capture(directory / "got0.pcap") == sent[1]


@pytest.mark.parametrize("segment_size", [0, 500], ids=["checksums", "segments"])
@pytest.mark.parametrize("side", ["driver", "back-end"])
@pytest.mark.parametrize("ring", RINGS)
def test_what_dpdk_leaves_to_be_done_is_done_for_a_file(bench, directory, ring, side, segment_size):
    sent = write_segments(directory / "sent.pcap")
    socket, got = bench.socket("a"), f"pcap:{directory}/got.pcap"
    captured = f"net_pcap0,rx_pcap={directory}/sent.pcap,tx_pcap={directory}/nothing.pcap"
    if side == "driver":
        wire = bench.virtnet("wire", vhost_user(socket), got)
        driver = bench.testpmd(captured, testpmd.virtio_user(1, socket, ring=ring), mode="csum")
    else:
        driver = bench.testpmd(captured, testpmd.vhost(1, socket, extra=",tso=1"), mode="csum")
        wire = bench.virtnet("wire", virtio_user(socket, ring=ring), got)
        wait_for(driver.links_up, "our driver to come")
    for line in ("port stop 1", "csum set ip sw 1", "csum set tcp hw 1", f"tso set {segment_size} 1", "port start 1"):
        driver.command(line)
    wait_for(driver.links_up, "the link to come back")
    assert "TCP_CKSUM" in driver.command("show port 1 tx_offload configuration")
    driver.start()
    wait_for(lambda: driver.stats()[1].tx_packets >= len(sent), "all frames to leave")
    driver.drain()
    driver.close()
    report = wire.finish()

    assert report["balance"]["exact"]
    segmented = sum(port["segmented"] for port in report["ports"].values())
    assert (segmented > 0) == (segment_size > 0)
    got = read_capture(directory / "got.pcap")
    assert all(checksums_are_right(frame) for frame in got)
    assert not any(checksums_are_right(frame) for frame in sent)
    longest = max(len(frame) for frame in got) - 54
    assert longest == (segment_size or 1460)
    assert stream_of(got) == stream_of(sent)


# Our driver, DPDK's back-end.


@pytest.mark.parametrize("listens", ["back-end", "driver"])
@pytest.mark.parametrize("in_order", [True, False], ids=["in-order", "any-order"])
@pytest.mark.parametrize("ring", RINGS)
def test_back_end_receives_every_packet_of_our_driver(bench, ring, in_order, listens):
    back, source = our_driver(bench, "source", "rxonly", listens, options=["--size", 64], ring=ring, in_order=in_order)

    wait_for(lambda: back.totals()[0] > 10_000, "packets to come")
    report = source.finish()
    back.drain()

    assert report["balance"]["exact"]
    (port,) = back.stats()
    assert port.rx_packets == report["balance"]["sent"]
    assert port.rx_bytes == 64 * port.rx_packets


@pytest.mark.parametrize("options", [{}, {"without": "mrg_rxbuf"}], ids=["mergeable", "not-mergeable"])
@pytest.mark.parametrize("listens", ["back-end", "driver"])
@pytest.mark.parametrize("ring", RINGS)
def test_our_driver_receives_every_packet_of_a_back_end(bench, ring, listens, options):
    back, sink = our_driver(bench, "sink", "txonly", listens, ring=ring, **options)

    wait_for(lambda: back.totals()[1] > 10_000, "packets to be sent")
    back.stop()
    report = sink.finish()

    assert report["balance"]["exact"]
    assert report["balance"]["received"] == back.totals()[1]
    assert report["balance"]["dropped"] == 0


@pytest.mark.parametrize("queue_pairs", [1, 2], ids=["1-queue", "2-queues"])
@pytest.mark.parametrize("ring", RINGS)
def test_our_driver_echoes_what_a_back_end_generates(bench, ring, queue_pairs):
    back, echo = our_driver(bench, "echo", "flowgen", "back-end", ring=ring, queue_pairs=queue_pairs)

    assert_moving(back)
    settle(echo, back)


# Either side is killed under traffic.


@pytest.mark.parametrize("command", ["wire", "switch"])
@pytest.mark.parametrize("ring", RINGS)
def test_drivers_that_were_killed_are_served_again(bench, ring, command):
    engine, drivers = joined(bench, command, "io", ring=ring)
    for _ in range(2):
        drivers.start(tx_first=4)
        assert_moving(drivers)
        drivers.kill()
        drivers = two_drivers(bench, "io", ring=ring)

    drivers.start(tx_first=4)
    assert_moving(drivers)
    drivers.drain()
    report = engine.finish()
    assert report["balance"]["exact"]
    assert [port["sessions"] for port in report["ports"].values()] == [3, 3]


@pytest.mark.parametrize("command", ["wire", "switch"])
@pytest.mark.parametrize("ring", RINGS)
def test_traffic_comes_back_when_a_killed_device_is_there_again(bench, ring, command):
    engine, drivers = joined(bench, command, "flowgen", drivers_listen=True, ring=ring)
    drivers.start()
    assert_moving(drivers)

    for _ in range(2):
        engine.kill()
        engine = bench.virtnet(command, *(vhost_user(bench.socket(name), client=True) for name in "ab"))
        assert_moving(drivers)

    drivers.stop()
    assert engine.finish()["balance"]["exact"]


@pytest.mark.parametrize("ring", RINGS)
def test_device_finds_drivers_that_were_killed_and_listen_again(bench, ring):
    wire, drivers = joined(bench, "wire", "flowgen", drivers_listen=True, ring=ring)
    drivers.start()
    assert_moving(drivers)

    drivers.kill()
    for name in "ab":
        bench.socket(name).unlink()
    again = two_drivers(bench, "flowgen", ring=ring, server=True, ready=False).ready(timeout_s=30)
    again.start()
    assert_moving(again)

    again.drain()
    assert wire.finish()["balance"]["exact"]


@pytest.mark.parametrize("listens", ["back-end", "driver"])
@pytest.mark.parametrize("ring", RINGS)
def test_our_driver_goes_on_when_a_killed_back_end_is_there_again(bench, ring, listens):
    back, source = our_driver(bench, "source", "rxonly", listens, ring=ring)
    socket = bench.socket("a")

    for _ in range(2):
        wait_for(lambda back=back: back.totals()[0] > 1000, "packets to come")
        back.kill()
        if listens == "back-end":
            socket.unlink()
        back = bench.testpmd(testpmd.vhost(0, socket, client=listens == "driver"), mode="rxonly")
        back.start()
        wait_for(lambda back=back: back.totals()[0] > 1000, "packets to come again", timeout_s=BACK_WITHIN_S)

    report = source.finish()
    assert report["balance"]["exact"]
    assert next(iter(report["ports"].values()))["sessions"] == 3


@pytest.mark.parametrize("listens", ["back-end", "driver"])
@pytest.mark.parametrize("ring", RINGS)
def test_back_end_serves_our_driver_again_after_it_was_killed(bench, ring, listens):
    back, echo = our_driver(bench, "echo", "flowgen", listens, ring=ring)
    port = virtio_user(bench.socket("a"), ring=ring, server=listens == "driver")

    for _ in range(2):
        assert_moving(back)
        echo.kill()
        echo = bench.virtnet("echo", port)
        assert_moving(back)

    assert echo.finish()["balance"]["exact"]


def joined(bench, command, mode, *, drivers_listen=False, queue_pairs=1, **options):
    """Two ports of DPDK's driver on one of our functions."""
    ports = [bench.socket(name) for name in "ab"]
    offered = {"queue_pairs": queue_pairs} if queue_pairs > 1 else {}
    if not drivers_listen:
        engine = bench.virtnet(command, *(vhost_user(socket, **offered) for socket in ports))
        return engine, two_drivers(bench, mode, queue_pairs=queue_pairs, **options)
    drivers = two_drivers(bench, mode, queue_pairs=queue_pairs, server=True, ready=False, **options)
    engine = bench.virtnet(command, *(vhost_user(socket, client=True, **offered) for socket in ports))
    return engine, drivers.ready(timeout_s=30)


def two_drivers(bench, mode, *, ready=True, queue_pairs=1, **options):
    vdevs = [
        testpmd.virtio_user(number, bench.socket(name), queue_pairs=queue_pairs, **options)
        for number, name in enumerate("ab")
    ]
    return bench.testpmd(*vdevs, mode=mode, queue_pairs=queue_pairs, ready=ready)


def our_driver(bench, command, mode, listens, *, options=(), queue_pairs=1, **port_options):
    """Our driver on DPDK's back-end, whose forwarding runs."""
    socket = bench.socket("a")
    pairs = {"queue_pairs": queue_pairs} if queue_pairs > 1 else {}
    port = virtio_user(socket, server=listens == "driver", **pairs, **port_options)
    ours_first = listens == "driver"
    driver = bench.virtnet(command, port, options=options) if ours_first else None
    back = bench.testpmd(
        testpmd.vhost(0, socket, queue_pairs=queue_pairs, client=ours_first), mode=mode, queue_pairs=queue_pairs
    )
    back.start()
    return back, driver or bench.virtnet(command, port, options=options)


def assert_moving(process, packets=1000):
    """On every port packets arrive, within the time traffic may take to come back."""
    before = [port.rx_packets for port in process.stats()]

    def arrived():
        return all(port.rx_packets >= old + packets for port, old in zip(process.stats(), before, strict=True))

    wait_for(arrived, "packets to arrive on every port", timeout_s=BACK_WITHIN_S)


def settle(virtnet, other):
    """Lets packets come to rest, and compares all that both sides counted; returns virtnet's final object."""
    other.drain()
    report = virtnet.finish()
    other.drain()
    assert report["balance"]["exact"]
    for port, counted in zip(report["ports"].values(), other.stats(), strict=True):
        assert (port["received"], port["sent"]) == (counted.tx_packets, counted.rx_packets)
    return report


def names(port):
    """Names of the negotiated features, whatever their prefix."""
    return {name.upper().removeprefix("VIRTIO_NET_F_").removeprefix("VIRTIO_F_") for name in port["features"]}


# Captures: what testpmd reads, what it wrote.


def write_capture(path, seed, n_frames=150):
    """Writes frames with random bytes, of sizes from the smallest to the largest, and returns them."""
    chance = random.Random(seed)  # noqa: S311 - the same bytes every time are what is wanted
    sizes = [
        60,
        61,
        127,
        128,
        129,
        191,
        192,
        193,
        1513,
        1514,
        *(chance.randint(60, 1514) for _ in range(n_frames - 10)),
    ]
    frames = [bytes([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]) + chance.randbytes(size - 14) for size in sizes]
    write_frames(path, frames)
    return frames


def write_frames(path, frames):
    records = [struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame for frame in frames]
    path.write_bytes(struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + b"".join(records))


def write_segments(path, n_frames=60):
    """Writes TCP segments of one stream, with checksums that are wrong, and returns them."""
    chance = random.Random(7)  # noqa: S311 - the same bytes every time are what is wanted
    frames, sequence = [], 0xFFFFF000
    for number in range(n_frames):
        payload = chance.randbytes(chance.choice([1460, 1000, 999, 1]))
        frames.append(
            bytes([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0])
            + struct.pack(
                ">BBHHHBBHII", 0x45, 0, 40 + len(payload), number, 0x4000, 64, 6, 0xBAD, 0x0A000001, 0x0A000002
            )
            + struct.pack(">HHIIBBHHH", 1, 2, sequence, 7, 0x50, 0x10, 512, 0xBAD, 0)
            + payload
        )
        sequence = (sequence + len(payload)) & 0xFFFFFFFF
    write_frames(path, frames)
    return frames


def stream_of(frames):
    """What the segments carry, put together by their sequence numbers."""
    start = struct.unpack_from(">I", frames[0], 38)[0]
    pieces = {(struct.unpack_from(">I", frame, 38)[0] - start) & 0xFFFFFFFF: tcp_payload(frame) for frame in frames}
    stream = b""
    while (piece := pieces.get(len(stream))) is not None:
        stream += piece
    return stream


def tcp_payload(frame):
    return frame[54 : 14 + struct.unpack_from(">H", frame, 16)[0]]


def checksums_are_right(frame):
    length = struct.unpack_from(">H", frame, 16)[0]
    tcp = frame[34 : 14 + length]
    return ones_sum(frame[14:34]) == 0xFFFF == ones_sum(frame[26:34] + struct.pack(">HH", 6, len(tcp)) + tcp)


def ones_sum(data):
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def read_capture(path):
    data, position, frames = path.read_bytes(), 24, []
    while position < len(data):
        (length,) = struct.unpack_from("<8xI4x", data, position)
        frames.append(data[position + 16 : position + 16 + length])
        position += 16 + length
    return frames


def frames_of(driver):
    """Frames written to the captures, which are every second port."""
    return sum(port.tx_packets for port in driver.stats()[::2])
