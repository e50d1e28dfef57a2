"""How do I look at a guest's packets as columns?

Plays a device and a driver in one process, so that it runs anywhere: the driver sends a mix of packets, the program
counts them by protocol and sends the UDP ones back. With a real guest attached to the socket, leave out the driver::

    python examples/columns.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import virtnet as vn

UDP = 17


def ipv4(protocol: int, size: int) -> bytes:
    """A frame with an IPv4 header and nothing that matters after it."""
    ethernet = bytes.fromhex("525400000002 525400000001 0800".replace(" ", ""))
    header = b"\x45\x00" + (size - 14).to_bytes(2, "big") + bytes(4) + bytes([64, protocol, 0, 0]) + bytes(8)
    return (ethernet + header).ljust(size, b"\0")


def main() -> dict[int, int]:
    """Returns the bytes seen by protocol."""
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder, "vm.sock")
        with vn.VhostUserPort(socket) as port, vn.VirtioUserPort(socket) as guest:
            guest.wait_connected(5)
            guest.tx([ipv4(17, 100), ipv4(6, 1500), ipv4(17, 60), ipv4(1, 98), ipv4(6, 60)])

            with port.rx(timeout_s=5) as burst:
                columns = burst.columns
                protocols, row = np.unique(columns.ip_proto, return_inverse=True)
                n_bytes = np.bincount(row, weights=columns.length).astype(int)
                udp = burst[columns.ip_proto == UDP]
                print(f"{len(burst)} packets, bytes by protocol: {dict(zip(protocols, n_bytes, strict=True))}")
                print(f"{port.tx(udp)} UDP packets sent back")

            print(f"the guest received {guest.rx(timeout_s=5)}")
            return dict(zip(protocols.tolist(), n_bytes.tolist(), strict=True))


if __name__ == "__main__":
    main()
