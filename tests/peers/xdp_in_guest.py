"""An echo by AF_XDP in a guest: what comes to its card goes back with its addresses exchanged.

Prints how the port is attached, and once as many frames have gone back as it is told, what was counted, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import virtnet as vn


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def echo(net: vn.Net, card: vn.PortNode, n: int) -> None:
    """Sends ``n`` frames back, or as many as come within half a minute."""
    card >> net.echo()
    with net:
        tell(str(card.stats().xdp))
        deadline = time.monotonic() + 30
        while card.stats().sent < n and time.monotonic() < deadline:
            time.sleep(0.05)
        stats = card.stats()
        told = {"received": stats.received, "sent": stats.sent, "drops": stats.rx_drops | stats.tx_drops}
        tell(json.dumps(told | {"exact": net.stats().balance().exact}))


def main() -> None:
    """In the guest with a mode and how many frames to expect, or with ``--imports`` what can be done without one."""
    net = vn.Net()
    if sys.argv[1] == "--imports":
        echo(net, net.memory("card"), 0)
        return
    subprocess.run(["/bin/ip", "link", "set", "eth0", "up"], check=True)
    mode, n = sys.argv[1:]
    echo(net, net.port(f"af-xdp:eth0,mode={mode}"), int(n))


if __name__ == "__main__":
    main()
