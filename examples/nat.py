"""How does a network behind one address reach the world, and the world a service in it?

A guest behind a NAT sends to a server; a client outside asks for a service that is forwarded. Everything is in memory.
"""

import virtnet as vn
from virtnet.burst import Burst


def arp(sender: bytes, ip: str, target: str) -> bytes:
    """Who has ``target``? So the router learns who asks."""
    addresses = sender + bytes(map(int, ip.split("."))) + bytes(6) + bytes(map(int, target.split(".")))
    return (b"\xff" * 6 + sender + bytes.fromhex("08060001080006040001") + addresses).ljust(60, b"\0")


def udp(to: bytes, sender: bytes, source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """A datagram without data and without a checksum of its own."""
    addresses = bytes(map(int, source[0].split("."))) + bytes(map(int, destination[0].split(".")))
    header = bytes.fromhex("4500001c0000000040110000") + addresses
    total = sum(int.from_bytes(header[i : i + 2], "big") for i in range(0, 20, 2))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    header = header[:10] + checksum.to_bytes(2, "big") + header[12:]
    ports = source[1].to_bytes(2, "big") + destination[1].to_bytes(2, "big")
    return to + sender + b"\x08\x00" + header + ports + b"\0\x08\0\0"


def show(who: str, burst: Burst) -> None:
    """Addresses and ports, as they arrive."""
    columns = burst.columns
    source, destination = (".".join(map(str, int(ip[0]).to_bytes(4, "big"))) for ip in (columns.ip_src, columns.ip_dst))
    print(f"{who} sees {source}:{columns.l4_src[0]} > {destination}:{columns.l4_dst[0]}")


GUEST, WORLD = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"

with vn.Net() as net:
    lan, wan = net.memory("lan"), net.memory("wan")
    gateway = net.nat(
        {lan: "10.0.0.1/24", wan: "192.0.2.2/24"},
        {"0.0.0.0/0": "192.0.2.1"},
        outside=wan,
        forward={"udp:53": "10.0.0.9:5353"},
    )
    lan >> gateway << wan

    lan.end.tx([arp(GUEST, "10.0.0.9", "10.0.0.1")])
    wan.end.tx([arp(WORLD, "192.0.2.1", "192.0.2.2")])
    inner, outer = (bytes(port.end.rx(timeout_s=5)[0])[6:12] for port in (lan, wan))

    lan.end.tx([udp(inner, GUEST, ("10.0.0.9", 4000), ("198.51.100.7", 123))])
    show("the server", wan.end.rx(timeout_s=5))
    wan.end.tx([udp(outer, WORLD, ("198.51.100.7", 123), ("192.0.2.2", 4000))])
    show("the guest", lan.end.rx(timeout_s=5))
    wan.end.tx([udp(outer, WORLD, ("203.0.113.5", 999), ("192.0.2.2", 53))])
    show("the service", lan.end.rx(timeout_s=5))
    print(f"{gateway.stats().detail['flows']} flows")
