"""How do I chain functions: a firewall, then a load balancer, then a switch with the servers?

Clients outside ask for a service. The firewall lets its port in and keeps connections; the balancer shares them out;
the servers hang on a switch, and their answers find back through all three. What each has done stands in its counters.
"""

from __future__ import annotations

from ipaddress import IPv4Address

import virtnet as vn

CLIENT = bytes.fromhex("020000000001")
SERVERS = {f"10.0.0.{n}": bytes([2, 0, 0, 0, 1, n]) for n in (5, 6)}
SERVICE = "192.0.2.10"
RULES = """
pass proto arp
pass in proto udp to any port 53 keep-state
"""


def arp(sender: bytes, ip: str, target: str) -> bytes:
    """Who has ``target``? So the balancer learns who asks."""
    addresses = sender + IPv4Address(ip).packed + bytes(6) + IPv4Address(target).packed
    return (b"\xff" * 6 + sender + bytes.fromhex("08060001080006040001") + addresses).ljust(60, b"\0")


def udp(to: bytes, sender: bytes, source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """A datagram without data and without a checksum of its own."""
    addresses = IPv4Address(source[0]).packed + IPv4Address(destination[0]).packed
    header = bytes.fromhex("4500001c0000000040110000") + addresses
    total = sum(int.from_bytes(header[i : i + 2], "big") for i in range(0, 20, 2))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    ports = source[1].to_bytes(2, "big") + destination[1].to_bytes(2, "big")
    return to + sender + b"\x08\x00" + header[:10] + checksum.to_bytes(2, "big") + header[12:] + ports + b"\0\x08\0\0"


def heard(port: vn.PortNode) -> list[bytes]:
    """The IPv4 packets that have come, until it is quiet."""
    packets: list[bytes] = []
    timeout_s = 5.0
    while burst := port.end.rx(timeout_s):
        timeout_s = 0.3
        packets += [packet for packet in map(bytes, burst) if packet[12:14] == b"\x08\x00"]
    return packets


def main() -> None:
    """Builds the chain, and asks."""
    with vn.Net() as net:
        world, farm = net.memory("world"), net.switch(name="farm")
        servers = {ip: net.memory(f"server{ip[-1]}") for ip in SERVERS}
        balancer = net.load_balancer(
            {world: f"{SERVICE}/24", farm: "10.0.0.1/24"},
            services=f"udp:{SERVICE}:53",
            backends=[f"{ip}:53" for ip in SERVERS],
        )
        world >> balancer >> farm
        for port in servers.values():
            port >> farm
        firewall = net.firewall(RULES, at=(world, balancer), inside=balancer)

        world.end.tx([arp(CLIENT, "192.0.2.9", SERVICE)])
        gateway = bytes(world.end.rx(timeout_s=5)[0])[6:12]
        for ip, port in servers.items():
            port.end.tx([arp(SERVERS[ip], ip, "10.0.0.1")])
            port.end.rx(timeout_s=5)

        asked = [udp(gateway, CLIENT, ("192.0.2.9", port), (SERVICE, 53)) for port in range(4000, 4016)]
        world.end.tx([*asked, udp(gateway, CLIENT, ("192.0.2.9", 4000), (SERVICE, 22))])
        answers = 0
        for ip, port in servers.items():
            questions = heard(port)
            print(f"{ip} is asked {len(questions)} times")
            port.end.tx(
                udp(packet[6:12], SERVERS[ip], (ip, 53), ("192.0.2.9", int.from_bytes(packet[34:36], "big")))
                for packet in questions
            )
            answered = heard(world)
            answers += len(answered)
            print("its answers come from", *{str(IPv4Address(packet[26:30])) for packet in answered})
        print(f"{len(asked)} questions, {answers} answers")
        print(f"firewall: {firewall.stats().drops}, balancer: {balancer.stats().detail['flows']} flows")


if __name__ == "__main__":
    main()
