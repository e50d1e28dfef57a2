"""Small hosts for the demo: they answer ARP and ping, and measure how long the others take.

A host is a station on a port used by hand. It works a step at a time, so that a few of them share one thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virtnet.ports import Port

__all__ = ["Host", "resolve_all"]

ARP = b"\x08\x06"
IPV4 = b"\x08\x00"
BROADCAST = b"\xff" * 6
#: Hardware Ethernet, protocol IPv4, lengths 6 and 4.
ARP_HEAD = bytes.fromhex("000108000604")
ECHO_REQUEST = 8
ECHO_REPLY = 0


@dataclass
class Host:
    """A station: an address, a port, and whom it has met.

    Attributes:
        name: what to call it.
        mac: its six bytes.
        ip: its four bytes.
        port: where it is attached.
        neighbours: MAC addresses by IP address, as learned by ARP.
    """

    name: str
    mac: bytes
    ip: bytes
    port: Port
    neighbours: dict[bytes, bytes] = field(default_factory=dict)
    _answered: set[int] = field(default_factory=set)

    def step(self) -> None:
        """Takes what has arrived, and answers what asks for an answer."""
        answers = [answer for frame in self.port.rx() if (answer := self._answer(bytes(frame))) is not None]
        if answers:
            self.port.tx(answers)

    def ask(self, ip: bytes) -> None:
        """Asks who has an address."""
        self.port.tx([self._arp(1, BROADCAST, bytes(6), ip)])

    def ping(self, other: Host, number: int, others: list[Host], timeout_s: float = 1.0) -> float | None:
        """Sends an echo request and lets all hosts work until the answer is there; seconds it took, if it came."""
        mac = self.neighbours[other.ip]
        payload = bytes([ECHO_REQUEST, 0, 0, 0]) + number.to_bytes(4, "big") + bytes(range(48))
        frame = mac + self.mac + IPV4 + ipv4(self.ip, other.ip, with_checksum(payload, 2))
        began = time.perf_counter()
        self.port.tx([frame])
        while number not in self._answered:
            if time.perf_counter() - began > timeout_s:
                return None
            for host in others:
                host.step()
        self._answered.discard(number)
        return time.perf_counter() - began

    def _answer(self, frame: bytes) -> bytes | None:
        kind = frame[12:14]
        if kind == ARP and frame[14:20] == ARP_HEAD and len(frame) >= 42:
            operation, mac, ip, target = frame[20:22], frame[22:28], frame[28:32], frame[38:42]
            if target == self.ip:
                self.neighbours[ip] = mac
                return self._arp(2, mac, mac, ip) if operation == b"\x00\x01" else None
        elif kind == IPV4 and frame[23] == 1 and frame[30:34] == self.ip and len(frame) >= 42:
            if frame[34] == ECHO_REQUEST:
                payload = bytes([ECHO_REPLY, 0, 0, 0]) + frame[38:]
                return frame[6:12] + self.mac + IPV4 + ipv4(self.ip, frame[26:30], with_checksum(payload, 2))
            if frame[34] == ECHO_REPLY:
                self._answered.add(int.from_bytes(frame[38:42], "big"))
        return None

    def _arp(self, operation: int, to: bytes, target_mac: bytes, target_ip: bytes) -> bytes:
        body = ARP_HEAD + operation.to_bytes(2, "big") + self.mac + self.ip + target_mac + target_ip
        return (to + self.mac + ARP + body).ljust(60, b"\0")


def resolve_all(hosts: list[Host], timeout_s: float = 5.0) -> bool:
    """Lets every host ask for every other, and asks again until all are answered; whether that happened in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for host in hosts:
            for other in hosts:
                if other is not host and other.ip not in host.neighbours:
                    host.ask(other.ip)
        again = time.monotonic() + 0.2
        while time.monotonic() < again:
            for host in hosts:
                host.step()
            if all(len(host.neighbours) == len(hosts) - 1 for host in hosts):
                return True
    return False


def ipv4(source: bytes, destination: bytes, payload: bytes, protocol: int = 1) -> bytes:
    """An IPv4 packet."""
    head = b"\x45\x00" + (20 + len(payload)).to_bytes(2, "big") + bytes(4) + bytes([64, protocol, 0, 0])
    return with_checksum(head + source + destination, 10) + payload


def with_checksum(data: bytes, at: int) -> bytes:
    """The bytes with their Internet checksum stored at a place that holds zeros."""
    padded = data + bytes(len(data) % 2)
    total = sum(int.from_bytes(padded[i : i + 2], "big") for i in range(0, len(padded), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return data[:at] + (~total & 0xFFFF).to_bytes(2, "big") + data[at + 2 :]
