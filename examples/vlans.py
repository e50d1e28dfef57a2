"""How do VLANs part one switch into several networks, and what does a trunk carry?

Two machines in VLAN 10, one in VLAN 20, an uplink that carries both with their tags, and a monitor that sees what one
of the machines sends and gets. Everything may change while it runs.
"""

import virtnet as vn


def main() -> None:
    """Shows it."""
    with vn.Net() as net:
        names = ("alice", "bob", "carol", "uplink", "monitor")
        alice, bob, carol, uplink, monitor = nodes = [net.memory(name) for name in names]
        switch = net.switch(name="switch", loop_guard=5)
        for node in nodes:
            node >> switch
        switch.access(alice, 10)
        switch.access(bob, 10)
        switch.access(carol, 20)
        switch.trunk(uplink, [10, 20])
        switch.mirror(alice, to=monitor)
        switch.cable(uplink, broadcast_pps=1000)

        def hello(sender: vn.PortNode, number: int, tag: bytes = b"") -> None:
            """Says hello to everybody, and tells who has heard it."""
            sender.end.tx([b"\xff" * 6 + bytes([2, 0, 0, 0, 0, number]) + tag + b"\x88\xb5" + bytes(46)])
            heard = []
            for node in nodes:
                for packet in map(bytes, node.end.rx(timeout_s=0.1)):
                    tagged = packet[12:14] == b"\x81\x00"
                    vlan = f" with tag {int.from_bytes(packet[14:16], 'big')}" if tagged else ""
                    heard.append(node.name + vlan)
            print(f"{sender.name} is heard by", ", ".join(heard) or "nobody")

        hello(alice, 1)
        hello(carol, 3)
        hello(uplink, 9, tag=bytes.fromhex("81000014"))
        switch.access(carol, 10)
        hello(alice, 1)
        switch.isolate(alice, bob)
        hello(alice, 1)
        print(switch.stats().detail)


if __name__ == "__main__":
    main()
