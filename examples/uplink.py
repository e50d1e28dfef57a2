"""How do virtual machines reach a card of the host?

A switch for two machines has the card as its uplink, by AF_XDP: what arrives there comes to the switch and no longer to
the host's own network stack, so give it a card that the host does not need for itself. (``net.af_packet`` leaves the
host its share.) As root, in a directory of your own; Ctrl-C ends it, and the host has its card back::

    python examples/uplink.py eth1

Without a card it tries the same in a network namespace of its own, where a veth pair stands in for the card, and for
the machine a driver by hand.
"""

from __future__ import annotations

import subprocess
import sys

import virtnet as vn

MACHINE, GATEWAY = bytes.fromhex("020000000001"), bytes.fromhex("020000000009")


def build(net: vn.Net, card: str) -> None:
    """A card and two machines, joined by a switch."""
    switch = net.switch()
    net.af_xdp(card, name="uplink") >> switch
    for name in ("vm1", "vm2"):
        net.vhost_user(f"{name}.sock") >> switch


def serve(card: str) -> None:
    """Tells what to give QEMU, and serves until Ctrl-C."""
    with vn.Net() as net:
        build(net, card)
        for name in ("vm1", "vm2"):
            print(f"{name}: qemu-system-x86_64 ... {net[name].qemu_args()}")
        print(net["uplink"].explain())
        net.serve()


def try_out() -> None:
    """Sends something from a machine's place out of the card, and something else back in."""
    # Without addresses of its own the host is silent at both ends.
    ends = [f"set {end} addrgenmode none up" for end in ("card", "street")]
    for words in ("add card type veth peer name street", *ends):
        subprocess.run(["ip", "link", *words.split()], check=True)
    with vn.Net() as net, vn.AfPacketPort("street") as street, vn.VirtioUserPort("vm1.sock") as machine:
        build(net, "card")
        net["uplink"].wait_event("link_up", timeout_s=10)
        machine.wait_connected(10)

        machine.tx([GATEWAY + MACHINE + b"\x88\xb5" + b"hello out there".ljust(46)])
        (hello,) = street.rx(10)
        print("outside:", bytes(hello)[14:].decode().strip())

        street.tx([MACHINE + GATEWAY + b"\x88\xb5" + b"hello in there".ljust(46)])
        (hello,) = machine.rx(10)
        print("inside:", bytes(hello)[14:].decode().strip())

        print(net["uplink"].explain())
        print(net.stats().balance())


def main() -> None:
    """A card that is named is served; without one, the rest happens in a namespace of its own."""
    match sys.argv[1:]:
        case ["--inside"]:
            try_out()
        case [card]:
            serve(card)
        case _:
            inside = ["unshare", "--net", sys.executable, __file__, "--inside"]
            print(subprocess.run(inside, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    main()
