"""What does a firewall with state let in, and what happens to its connections when its rules change?

A machine behind a firewall asks for names; the answer comes in, a stranger's packet does not. Then the rules become
stricter: what was begun goes on, what would begin does not.
"""

import virtnet as vn

RULES = """
pass proto arp
pass out proto udp to any port 53 keep-state
pass in proto udp from <friends> to any port 5000-5010
reject in proto tcp
"""

MACS = bytes.fromhex("020000000002 020000000001 0800")


def udp(source: int, sport: int, destination: int, dport: int) -> bytes:
    """A UDP datagram in a frame; addresses are the last number behind 192.0.2."""
    ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    addresses = bytes([192, 0, 2, source, 192, 0, 2, destination])
    return MACS + bytes.fromhex("450000200000000040110000") + addresses + ports + bytes.fromhex("000c0000") + b"text"


def main() -> None:
    """Shows it."""
    with vn.Net() as net:
        machine, world = net.memory("machine"), net.memory("world")
        machine >> world
        firewall = net.firewall(RULES, at=machine, sets={"friends": ["192.0.2.77"]})

        def arrives(sender: vn.PortNode, receiver: vn.PortNode, packet: bytes) -> str:
            sender.end.tx([packet])
            return "passes" if len(receiver.end.rx(timeout_s=0.2)) else "is dropped"

        print("a question", arrives(machine, world, udp(1, 4000, 53, 53)))
        print("its answer", arrives(world, machine, udp(53, 53, 1, 4000)))
        print("a friend's packet", arrives(world, machine, udp(77, 9, 1, 5001)))
        print("a stranger's packet", arrives(world, machine, udp(66, 9, 1, 5001)))

        firewall.set(rules="pass proto arp")
        print("after the rules have changed:")
        print("another answer", arrives(world, machine, udp(53, 53, 1, 4000)))
        print("another question", arrives(machine, world, udp(1, 4001, 53, 53)))

        for rule in firewall.rules:
            print(f"{rule.packets:3} packets  {rule.text or '(no rule)'}")
        print(firewall.stats().drops)


if __name__ == "__main__":
    main()
