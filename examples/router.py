"""How do two subnets reach each other, and what does a host see when they do not?

A host on one link sends to another by a router: what arrives, with how far it has come. Then it asks for too much: a
network that nobody knows, a packet whose time is up, one that is too long for the next link, a host that is not there.
"""

from __future__ import annotations

from ipaddress import IPv4Address

import virtnet as vn

LEFT, RIGHT = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
ERRORS = {
    (3, 0): "nobody knows the way",
    (3, 1): "the host does not answer",
    (3, 4): "too long, and not to be cut",
    (11, 0): "its time is up",
}


def arp(sender: bytes, ip: str, target: str) -> bytes:
    """Who has ``target``? So the router learns who asks."""
    addresses = sender + IPv4Address(ip).packed + bytes(6) + IPv4Address(target).packed
    return (b"\xff" * 6 + sender + bytes.fromhex("08060001080006040001") + addresses).ljust(60, b"\0")


def udp(router: bytes, to: str, *, ttl: int = 64, size: int = 20, whole: bool = False) -> bytes:
    """A datagram from the host on the left, by its router; ``whole`` if it must not be cut."""
    words = [0x4500, 28 + size, 1, 0x4000 if whole else 0, ttl << 8 | 17, 0]
    addresses = IPv4Address("10.0.1.9").packed + IPv4Address(to).packed
    total = sum(words) + sum(int.from_bytes(addresses[i : i + 2], "big") for i in range(0, 8, 2))
    words[5] = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    header = b"".join(word.to_bytes(2, "big") for word in words) + addresses
    return router + LEFT + b"\x08\x00" + header + b"\x0f\xa0\0\x09" + (8 + size).to_bytes(2, "big") + bytes(2 + size)


def heard(port: vn.PortNode) -> list[bytes]:
    """The IPv4 packets that have come, until it is quiet."""
    packets: list[bytes] = []
    timeout_s = 5.0
    while burst := port.end.rx(timeout_s):
        timeout_s = 0.3
        packets += [packet for packet in map(bytes, burst) if packet[12:14] == b"\x08\x00"]
    return packets


def told(frame: bytes) -> str:
    """What an ICMP error says, and from whom it comes."""
    kind, code, mtu = frame[34], frame[35], int.from_bytes(frame[40:42], "big")
    limit = f" (at most {mtu} bytes)" if mtu else ""
    return f"{IPv4Address(frame[26:30])} says: {ERRORS[kind, code]}{limit}"


def main() -> None:
    """Shows it."""
    with vn.Net() as net:
        left, right = net.memory("left"), net.memory("right")
        router = net.router({left: "10.0.1.1/24", right: {"addresses": "10.0.2.1/24", "mtu": 1400}})
        left >> router << right

        left.end.tx([arp(LEFT, "10.0.1.9", "10.0.1.1")])
        right.end.tx([arp(RIGHT, "10.0.2.9", "10.0.2.1")])
        gateway = bytes(left.end.rx(timeout_s=5)[0])[6:12]
        right.end.rx(timeout_s=5)

        left.end.tx([udp(gateway, "10.0.2.9")])
        (arrived,) = heard(right)
        print(f"the host on the right gets a packet from {IPv4Address(arrived[26:30])}, time to live {arrived[22]}")
        left.end.tx([udp(gateway, "10.0.2.9", size=1452)])
        lengths = [int.from_bytes(packet[16:18], "big") for packet in heard(right)]
        print(f"a long one arrives in pieces of {lengths} bytes")

        for packet in (
            udp(gateway, "172.16.0.1"),
            udp(gateway, "10.0.2.9", ttl=1),
            udp(gateway, "10.0.2.9", size=1452, whole=True),
            udp(gateway, "10.0.2.77"),
        ):
            left.end.tx([packet])
            print(f"to {IPv4Address(packet[30:34])}:", told(bytes(left.end.rx(timeout_s=10)[0])))

        router.route("172.16.0.0/12", "10.0.2.9")
        left.end.tx([udp(gateway, "172.16.0.1")])
        for packet in heard(right):
            print(f"with a route there, a packet to {IPv4Address(packet[30:34])} goes to the host on the right")
        print(router.stats().drops)


if __name__ == "__main__":
    main()
