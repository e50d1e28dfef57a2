"""What guests do to each other: pings, bulk TCP, streams compared by hash, and what their own counters then say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time

from guest import Guest, GuestError

_ports = itertools.count(7000)


@dataclasses.dataclass(frozen=True)
class Pings:
    """Echo requests sent, and answers."""

    sent: int
    answered: int


def ping(*ways: tuple[Guest, Guest], n: int = 20, interval_s: float = 0.05, size: int = 56) -> list[Pings]:
    """Sends echo requests from the first guest of each pair to the second, all pairs at the same time."""
    begun = [
        (source, source.begin(f"ping -c {n} -i {interval_s} -s {size} -W 1 {target.ip}", n * interval_s + 15))
        for source, target in ways
    ]
    return [read_pings(source.finish(command)[1]) for source, command in begun]


def read_pings(printed: str) -> Pings:
    """Reads what ping says at its end."""
    found = re.search(r"(\d+) packets transmitted, (\d+) packets received", printed)
    if found is None:
        raise GuestError(f"ping printed no summary:\n{printed[-1000:]}")
    return Pings(int(found[1]), int(found[2]))


def wait_for_answer(source: Guest, target: Guest, timeout_s: float) -> float | None:
    """Pings until the first answer; returns the seconds it took, None if it did not come in time."""
    started = time.monotonic()
    while time.monotonic() - started < timeout_s:
        status, _ = source.try_run(f"ping -c 1 -W 1 {target.ip}", 5)
        if status == 0:
            return time.monotonic() - started
    return None


def wait_for_link(*guests: Guest, timeout_s: float = 20) -> None:
    """Waits until each guest's interface has a carrier."""
    for guest in guests:
        guest.run("until [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do usleep 20000; done", timeout_s)


def tcp(client: Guest, server: Guest, *, mib: int = 16, reverse: bool = False, streams: int = 1) -> float:
    """Moves some data over TCP with iperf3, towards the client if reversed, and returns the rate in Mbit/s."""
    serve_iperf3(server)
    options = f"-n {mib}M -P {streams}" + (" -R" if reverse else "")
    attempt = f"iperf3 -J -c {server.ip} --connect-timeout 3000 {options} >/tmp/iperf"
    # A server that was only just started may not listen yet.
    printed = client.run(f"for attempt in 1 2 3 4 5; do {attempt} && break; usleep 200000; done; cat /tmp/iperf", 60)
    result = json.loads(printed)
    if "error" in result:
        raise GuestError(f"iperf3 from {client.name} to {server.name}: {result['error']}")
    return result["end"]["sum_received"]["bits_per_second"] / 1e6


def stream_is_intact(source: Guest, target: Guest, *, mib: int = 4) -> bool:
    """Sends random bytes from one guest to the other, and compares their hashes.

    The hash matters: where checksums are offloaded, TCP itself does not notice damaged payload.
    """
    port = next(_ports)
    # The serving nc ends when its own input ends, so it serves a program; the other end must not close first.
    sent = source.run(
        f"dd if=/dev/urandom of=/tmp/stream bs=64k count={16 * mib} 2>/dev/null; sha256sum </tmp/stream\n"
        f"nc -l -p {port} -e cat /tmp/stream >/dev/null 2>&1 &"
    )
    received = target.run(f"sleep 0.1; nc {source.ip} {port} </dev/null | sha256sum")
    return sent.split()[0] == received.split()[0]


@dataclasses.dataclass(frozen=True)
class InterfaceCounters:
    """The guest's own count of what its driver sent and received, and what it refused."""

    received: int
    sent: int
    faulty: int


def keep_busy(source: Guest, target: Guest) -> None:
    """Leaves bulk TCP running from one guest to the other, for longer than any test, and waits until it flows."""
    serve_iperf3(target)
    source.run(
        f"iperf3 -c {target.ip} --connect-timeout 3000 -t 300 >/dev/null 2>&1 &\n"
        "cd /sys/class/net/eth0/statistics; enough=$(($(cat tx_bytes) + 1000000))\n"
        "until [ $(cat tx_bytes) -gt $enough ]; do usleep 20000; done"
    )


def serve_iperf3(guest: Guest) -> None:
    """Leaves an iperf3 server running, unless there is one."""
    guest.run("[ -e /tmp/iperf3.pid ] || iperf3 -s -D -I /tmp/iperf3.pid >/dev/null 2>&1")


def quieten(*guests: Guest, arp: bool = False) -> None:
    """Makes the guests send nothing by themselves, and waits until what was on its way has arrived."""
    for guest in guests:
        guest.run("killall -q -9 iperf3 nc ping; rm -f /tmp/iperf3.pid", check=False)
        if not arp:
            guest.run("ip link set eth0 arp off")
    time.sleep(0.3)


def carrier_losses(guest: Guest) -> int:
    """Returns how often the interface lost its link."""
    return int(guest.run("cat /sys/class/net/eth0/carrier_down_count"))


def interface_counters(guest: Guest) -> InterfaceCounters:
    """Reads the counters of ``eth0``."""
    names = ("rx_packets", "tx_packets", "rx_errors", "rx_dropped", "tx_errors", "tx_dropped")
    printed = guest.run(f"cd /sys/class/net/eth0/statistics; cat {' '.join(names)}")
    received, sent, *faults = (int(line) for line in printed.split())
    return InterfaceCounters(received, sent, sum(faults))


def queue_counters(guest: Guest, direction: str) -> list[int]:
    """Returns the packets of each queue, ``direction`` being ``rx`` or ``tx``."""
    return [int(n) for n in re.findall(rf"\b{direction}_queue_\d+_packets: (\d+)", guest.run("ethtool -S eth0"))]


def driver_features(guest: Guest) -> frozenset[int]:
    """Returns the feature bits that the guest's driver and QEMU's device agreed on."""
    printed = guest.run("cat /sys/bus/virtio/devices/virtio0/features").strip()
    return frozenset(bit for bit, value in enumerate(printed) if value == "1")
