"""A forwarder as Python programs have them: raw sockets and ``struct``. Prints packets a second.

``python af_packet.py INTERFACE SECONDS`` reads what arrives at an interface, looks at its UDP port, and sends what
matches out at the same interface. Needs root.
"""

from __future__ import annotations

import socket
import struct
import sys
import time

ALL = 3


def main() -> None:
    """Forward for a time."""
    interface, seconds = sys.argv[1], float(sys.argv[2])
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL)) as port:
        port.bind((interface, 0))
        forwarded, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            frame, (_, _, kind, _, _) = port.recvfrom(2048)
            if kind == socket.PACKET_OUTGOING:
                continue
            (eth_type,) = struct.unpack_from("!H", frame, 12)
            protocol, (udp_dst,) = frame[23], struct.unpack_from("!H", frame, 36)
            if eth_type == 0x0800 and protocol == socket.IPPROTO_UDP and udp_dst == 9:
                port.send(frame)
                forwarded += 1
        print(forwarded / elapsed)


if __name__ == "__main__":
    main()
