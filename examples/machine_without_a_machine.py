"""How do I test a virtual switch without booting anything?

Two drivers of virtio-net devices attach to a switch as guests would: here to one of virtnet's own, but any vhost-user
back-end will do. One sends numbered packets to the other, which checks that each comes once and in order::

    python examples/machine_without_a_machine.py [SOCKET SOCKET]
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import virtnet as vn

N_PACKETS = 10_000
MACS = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


def check(sockets: list[str], ring: str = "split") -> int:
    """Returns how many packets came in order."""
    with ExitStack() as stack:
        a, b = (stack.enter_context(vn.open_port(f"virtio-user:{socket},ring={ring}")) for socket in sockets)
        if not (a.wait_connected(5) and b.wait_connected(5)):
            raise SystemExit(f"nobody serves {sockets}: {a!r}, {b!r}")
        b.tx([b"\xff" * 6 + MACS[1] + b"\x88\xb5" + bytes(46)])  # now the switch knows where b is
        a.rx(timeout_s=1)

        rest = [MACS[1] + MACS[0] + b"\x88\xb5" + i.to_bytes(4, "big") + bytes(42) for i in range(N_PACKETS)]
        expected = 0
        while expected < N_PACKETS:
            rest = rest[a.tx(rest[:64]) :]
            for packet in b.rx(timeout_s=1):
                number = int.from_bytes(bytes(packet[14:18]), "big")
                if number != expected:
                    raise SystemExit(f"expected packet {expected}, received {number}")
                expected += 1
        return expected


def main() -> None:
    """Checks the switch at the sockets given, or one of our own."""
    if sys.argv[1:]:
        print(f"{check(sys.argv[1:3])} packets in order")
        return
    with tempfile.TemporaryDirectory() as folder, vn.Net() as net:
        switch = net.switch()
        sockets = [str(Path(folder, f"vm{i}.sock")) for i in (1, 2)]
        for socket in sockets:
            net.vhost_user(socket) >> switch
        for ring in ("split", "packed"):
            print(f"{ring} rings: {check(sockets, ring)} packets in order")
        print(net.stats().balance())


if __name__ == "__main__":
    main()
