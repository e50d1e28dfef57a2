"""How do I have a worker run a rule of my own, without Python in the path?

An element is a function on columns that is written down as a program when it is defined. Here it keeps telnet out,
leads one network's web traffic to a cache, and hides how many hops a packet has come. The same function runs under
numpy, which is how one tests it; what it cannot do is refused at its definition, with the line.
"""

from __future__ import annotations

import numpy as np

import virtnet as vn

TELNET, WEB = 23, 80
customers = vn.Table({0x0A000000 + host for host in range(256)})  # 10.0.0.0/24


@vn.element
def policy(packets: vn.Columns) -> np.ndarray:
    """Says for each packet where it goes."""
    is_web = (packets.l4_dst == WEB) & customers.has(packets.ip_src)
    packets.ip_ttl = np.where(packets.ip_ttl > 0, 64, packets.ip_ttl)
    return np.where(packets.l4_dst == TELNET, "drop", np.where(is_web, "cache", "pass"))


def syn(source: int, port: int) -> bytes:
    """A packet from 10.0.0.``source`` to a port of 10.9.9.9, which has come a long way."""
    ip = bytes.fromhex("45000028000000000506") + bytes(2) + bytes([10, 0, 0, source, 10, 9, 9, 9])
    return (bytes(12) + b"\x08\x00" + ip + b"\x9c\x40" + port.to_bytes(2, "big") + bytes(16)).ljust(60, b"\0")


def main() -> None:
    """Tries the policy under numpy, then in a network."""
    packets = [syn(1, TELNET), syn(1, WEB), syn(1, 443)]
    print(f"numpy says: {policy(vn.Burst(packets)).tolist()}")

    with vn.Net() as net:
        inside, outside, cache = net.memory("inside"), net.memory("outside"), net.memory("cache")
        element = net.element(policy)  # its third way is the node called "cache"
        inside >> element >> outside

        inside.end.tx(packets)
        for port in (outside, cache):
            with port.end.rx(timeout_s=5) as burst:
                print(f"{port.name}: port {burst.columns.l4_dst.tolist()}, ttl {burst.columns.ip_ttl.tolist()}")
        print(f"dropped: {element.stats().drops}")


if __name__ == "__main__":
    main()
