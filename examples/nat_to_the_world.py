"""How do virtual machines reach the world without root?

A gateway gives them addresses and names and carries what they send by ordinary sockets of this user, as QEMU's
user-mode networking does. Give it the socket of a machine, boot the machine with the arguments that are printed, and
let it ask for an address by DHCP; port 8080 of this host leads to its port 80. Ctrl-C ends it::

    python examples/nat_to_the_world.py vm1.sock

Without a socket it tries the same by hand: a server on this host's loopback stands in for the world, and frames put
together here for a machine.
"""

from __future__ import annotations

import socket
import struct
import sys
from ipaddress import IPv4Address

import virtnet as vn

MACHINE, GATEWAY = IPv4Address("10.0.2.15"), IPv4Address("10.0.2.2")
MAC = bytes.fromhex("525400000001")


def serve(path: str) -> None:
    """A machine, a switch, a gateway."""
    with vn.Net() as net:
        gateway = net.user_net("10.0.2.0/24", forward={8080: (str(MACHINE), 80)})
        machine = net.vhost_user(path)
        machine >> net.switch() << gateway
        print(f"qemu-system-x86_64 ... {machine.qemu_args()}")
        net.serve()
        print(*gateway.leases, sep="\n")


def datagram(port: int, data: bytes) -> bytes:
    """A frame with a UDP datagram from the machine to the gateway."""
    udp = struct.pack("!HHHH", 4000, port, 8 + len(data), 0) + data
    fields = [0x4500, 20 + len(udp), 0, 0, 64 << 8 | socket.IPPROTO_UDP, 0]
    addresses = struct.unpack("!HHHH", MACHINE.packed + GATEWAY.packed)
    total = sum((*fields, *addresses))
    fields[5] = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    ip = struct.pack("!HHHHHH", *fields) + MACHINE.packed + GATEWAY.packed
    return b"\xff" * 6 + MAC + b"\x08\x00" + ip + udp


def heard(machine: vn.Port) -> bytes:
    """The next datagram for the machine."""
    while packets := machine.rx(10):
        for frame in map(bytes, packets):
            if frame[12:14] == b"\x08\x00" and frame[23] == socket.IPPROTO_UDP:
                return frame[42 : 34 + int.from_bytes(frame[38:40], "big")]
    raise TimeoutError


def try_out() -> None:
    """Asks a server of the world something, and the gateway for a name."""
    with vn.Net() as net, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as world:
        world.bind(("127.0.0.1", 0))
        # The gateway's address leads to this host's loopback only if that is asked for.
        gateway = net.user_net("10.0.2.0/24", host_loopback=True, names={"world.example": "192.0.2.1"})
        machine = net.memory("machine")
        machine >> net.switch() << gateway

        machine.end.tx([datagram(world.getsockname()[1], b"hello out there")])
        data, carrier = world.recvfrom(100)
        print(f"the world hears {data.decode()!r} from {carrier[0]}")
        world.sendto(b"hello in there", carrier)
        print(f"the machine hears {heard(machine.end).decode()!r}")

        question = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x05world\x07example\0\0\x01\0\x01"
        machine.end.tx([datagram(53, question)])
        print("world.example is", IPv4Address(heard(machine.end)[-4:]))

        carried = gateway.stats().user_net
        print(f"{carried.flows} conversation carried, {carried.answered} answers given, lost: {carried.lost}")


if __name__ == "__main__":
    serve(sys.argv[1]) if len(sys.argv) > 1 else try_out()
