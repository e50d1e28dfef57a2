"""Capture to a table: which flows pass a port, how many packets and bytes each has, and for how long.

Three stations talk through a switch while everything at one of them is captured into memory. The capture comes back as
columns, one row a packet, and a few lines of numpy make a row a flow of them. With pandas it is
``pandas.DataFrame(burst.columns.to_dict()).groupby([...])``.
"""

import socket
import struct
import time
from ipaddress import IPv4Address

import numpy as np

import virtnet as vn


def datagram(source: str, to: str, port: int, size: int) -> bytes:
    """A UDP datagram in an Ethernet frame of ``size`` bytes."""
    ip = struct.pack(">BBHHHBBH", 0x45, 0, size - 14, 0, 0, 64, socket.IPPROTO_UDP, 0)
    addresses = IPv4Address(source).packed + IPv4Address(to).packed
    udp = struct.pack(">HHHH", 4711, port, size - 34, 0)
    ethernet = b"".join(b"\x02\0" + IPv4Address(address).packed for address in (to, source)) + b"\x08\0"
    return (ethernet + ip + addresses + udp).ljust(size, b"\0")


with vn.Net() as net:
    server, *clients = nodes = [net.memory(name) for name in ("server", "alice", "bob")]
    switch = net.switch()
    for node in nodes:
        node >> switch
    server.end.tx([datagram("10.0.0.1", "10.0.0.9", 9, 60)])  # the switch learns who is where

    # snap: the headers are enough here; memory is what waits to be read, and what does not fit is counted.
    with net.capture(server, snap=64, memory=16 << 20) as capture:
        for i in range(100):
            clients[0].end.tx([datagram("10.0.0.2", "10.0.0.1", 53, 90)])
            clients[1].end.tx([datagram("10.0.0.3", "10.0.0.1", 443, 1400)] * 3)
            if i % 2:
                server.end.tx([datagram("10.0.0.1", "10.0.0.2", 53, 300)])
        while capture.packets < 450:  # noqa: PLR2004 - what was sent above
            time.sleep(0.01)
    burst = capture.read()

columns = burst.columns
KEY = ["ip_src", "ip_dst", "ip_proto", "l4_dst"]
packets = np.rec.fromarrays([columns[name] for name in KEY], names=",".join(KEY))
flows, flow, count = np.unique(packets, return_inverse=True, return_counts=True)
total = np.bincount(flow, columns.wire_length)
order = np.argsort(-total)

times = columns.time_ns.copy()
first = np.full(len(flows), times.max())
np.minimum.at(first, flow, times)
last = np.zeros(len(flows), times.dtype)
np.maximum.at(last, flow, times)

print(f"{'from':<12}{'to':<12}{'port':>6}{'packets':>9}{'bytes':>10}{'ms':>9}")
for i in order:
    source, to = IPv4Address(int(flows.ip_src[i])), IPv4Address(int(flows.ip_dst[i]))
    duration_ms = (last[i] - first[i]) / 1e6
    print(f"{source!s:<12}{to!s:<12}{flows.l4_dst[i]:>6}{count[i]:>9}{total[i]:>10.0f}{duration_ms:>9.2f}")
print(f"{len(burst)} packets captured, {capture.dropped} dropped")
