"""How do I divert a port scan with a few lines of numpy?

Two machines talk through a switch, and a third one scans the first. A function in the path counts, for each sender,
the ports it has asked for connections; who asks for many is led to a honeypot instead. Only packets that open a
connection are led by Python: the filter is applied before, and everything else passes at full speed.
"""

from __future__ import annotations

import time

import numpy as np

import virtnet as vn

SYN = 2
SUSPICIOUS_PORTS = 20


def syn(sender: int, port: int) -> bytes:
    """A packet of machine number ``sender`` that asks machine 1 for a connection to a port."""
    ethernet = bytes.fromhex("020000000001") + bytes([2, 0, 0, 0, 0, sender]) + b"\x08\x00"
    ip = bytes.fromhex("450000280000400040060000") + bytes([10, 0, 0, sender, 10, 0, 0, 1])
    tcp = (40000).to_bytes(2, "big") + port.to_bytes(2, "big") + bytes(8) + bytes([0x50, SYN]) + bytes(6)
    return (ethernet + ip + tcp).ljust(60, b"\0")


def main() -> tuple[int, int]:
    """Returns how many packets reached the server and the honeypot."""
    with vn.Net() as net:
        server, friend, scanner = net.memory("server"), net.memory("friend"), net.memory("scanner")
        honeypot = net.memory("honeypot")
        switch = net.switch()
        for machine in (server, friend, scanner):
            machine >> switch

        asked: set[tuple[int, int]] = set()
        suspects: set[int] = set()

        @net.on_burst(server, "tcp[tcpflags] & tcp-syn != 0", to=[honeypot], direction="to", late="hold")
        def detect(burst: vn.Burst) -> np.ndarray:
            senders, ports = np.asarray(burst.columns.ip_src), np.asarray(burst.columns.l4_dst)
            asked.update(zip(senders.tolist(), ports.tolist(), strict=True))
            who, n_ports = np.unique([sender for sender, _ in asked], return_counts=True)
            suspects.update(who[n_ports > SUSPICIOUS_PORTS].tolist())
            return np.where(np.isin(senders, list(suspects)), "honeypot", "pass")

        # Python's own end of a port in memory stands for a machine here.
        friend.end.tx([syn(2, 443)] * 50)
        for first in range(1, 401, 20):
            scanner.end.tx([syn(3, port) for port in range(first, first + 20)])
        while detect.handled < 50 + 400:
            time.sleep(0.01)

        reached = len(server.end.rx(timeout_s=1, max_packets=1000)), len(honeypot.end.rx(timeout_s=1, max_packets=1000))
        print(f"{reached[0]} packets reached the server, {reached[1]} the honeypot: {detect!r}")
        return reached


if __name__ == "__main__":
    main()
