"""How do I join virtual machines by a switch, and add one while it runs?

Starts a switch for two machines, prints what to give QEMU, adds a third socket a little later, and tells every second
what passed. Run it in a directory of your own and stop it with Ctrl-C::

    python examples/switch.py
"""

from __future__ import annotations

import sys

import virtnet as vn


def main(seconds: float | None = None) -> None:
    """Serves until Ctrl-C, or for a time."""
    with vn.Net() as net:
        switch = net.switch()
        for i in (1, 2):
            vm = net.vhost_user(f"vm{i}.sock")
            vm >> switch
            print(f"vm{i}: qemu-system-x86_64 ... {vm.qemu_args()}")
        ended = net.wait(1)

        # The others do not notice.
        net.vhost_user("vm3.sock") >> switch

        left = seconds
        while not ended and (left is None or left > 0):
            for name, port in net.stats().ports.items():
                print(f"{name}: {port.received} received, {port.sent} sent, drops {port.drops}")
            ended = net.wait(1)
            left = None if left is None else left - 1


if __name__ == "__main__":
    try:
        main(float(sys.argv[1]) if sys.argv[1:] else None)
    except KeyboardInterrupt:
        print()
