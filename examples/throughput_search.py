"""How many packets a second does a path carry without losing any, for each frame size?

Searches for the throughput after RFC 2544, 26.1: of a cable of 20 Mbit/s, of which the answer is known, and of an echo
behind a vhost-user socket, of which it depends on this host. `virtnet bench A B --search` does it for any two ports.
"""

import virtnet as vn

print("a cable of 20 Mbit/s:")
with vn.Net() as net:
    cable = net.impair(rate_bps=20e6, queue_packets=20)
    for found in vn.throughput_search(cable, sizes=[508, 1514], seconds=0.3, max_pps=20_000, resolution=0.05, tries=3):
        print(f"  {found}")

print("an echo behind a vhost-user socket, with no more than a hundredth lost:")
with vn.Net() as net:
    net.vhost_user("echo.sock") >> net.echo()
    for found in vn.throughput_search(
        "virtio-user:echo.sock", sizes=[60], seconds=0.2, loss=0.01, resolution=0.2, max_pps=20_000
    ):
        print(f"  {found}")
