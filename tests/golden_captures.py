"""What functions make of known packets, kept as captures: ``golden/KIND.in.pcapng`` and ``golden/KIND.out.pcapng``.

A packet's interface in a capture is the port by which it comes or leaves, its time in microseconds which packet of the
input it is, or has come of. Whoever changes what a function does, and means to, writes them anew and looks at what has
become different (``git diff --stat``, ``tshark -r``)::

    python tests/golden_captures.py [KIND...]
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, ICMPv6TimeExceeded, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

import virtnet as vn
from helpers import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

GOLDEN = Path(__file__).with_name("golden")

#: How long what comes of a packet is waited for where it is not known how much that is.
SETTLED_S = 0.2

ALL = "ff:ff:ff:ff:ff:ff"
SECTION, INTERFACE, PACKET = 0x0A0D0D0A, 1, 6
ETHERNET, IF_NAME = 1, 2

#: Ports and frames.
Frames = list[tuple[str, bytes]]


def station(n: int) -> str:
    """The address of a station."""
    return f"02:00:00:00:00:{n:02x}"


# Captures, as far as they are needed here: pcapng, draft-ietf-opsawg-pcapng.


def _block(kind: int, body: bytes) -> bytes:
    body = body.ljust(-(-len(body) // 4) * 4, b"\0")
    length = struct.pack("<I", 12 + len(body))
    return struct.pack("<I", kind) + length + body + length


def written(ports: list[str], frames: Iterable[tuple[int, str, bytes]]) -> bytes:
    """A capture of numbered frames."""
    out = _block(SECTION, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    for port in ports:
        name = port.encode()
        option = struct.pack("<HH", IF_NAME, len(name)) + name.ljust(-(-len(name) // 4) * 4, b"\0") + bytes(4)
        out += _block(INTERFACE, struct.pack("<HHI", ETHERNET, 0, 0) + option)
    for n, port, frame in frames:
        out += _block(PACKET, struct.pack("<IIIII", ports.index(port), 0, n, len(frame), len(frame)) + frame)
    return out


def read(data: bytes) -> Iterator[tuple[int, str, bytes]]:
    """The numbered frames of a capture."""
    ports: list[str] = []
    while data:
        kind, length = struct.unpack_from("<II", data)
        body, data = data[8 : length - 4], data[length:]
        if kind == INTERFACE:
            ports.append(body[12 : 12 + int.from_bytes(body[10:12], "little")].decode())
        elif kind == PACKET:
            port, _, n, size, _ = struct.unpack_from("<IIIII", body)
            yield n, ports[port], body[20 : 20 + size]


# The functions, and what is sent to them.


@dataclass(frozen=True)
class Golden:
    """A function between ports in memory, and other hosts: who makes it, and what is sent to it."""

    ports: list[str]
    make: Callable[..., object]
    sent: list[tuple[str, Packet]]
    #: Those of the ports that are other hosts, which whoever makes the function is handed.
    hosts: tuple[str, ...] = ()

    def play(self, sent: Frames, expected: dict[int, int] | None = None) -> list[tuple[int, str, bytes]]:
        """What comes out, with the number of what it has come of; as much as expected where that is known."""
        found = []
        with ExitStack() as stack, vn.Net() as net:
            hosts = {name: stack.enter_context(closing(OtherHost(n))) for n, name in enumerate(self.hosts, 2)}
            ports = {name: hosts.get(name) or net.memory(name).end for name in self.ports}
            self.make(net, *hosts.values())
            for n, (port, frame) in enumerate(sent):
                ports[port].tx([frame])
                assert eventually(lambda n=n: net.stats().balance().received > n and net.stats().balance().exact)
                deadline = time.monotonic() + (SETTLED_S if expected is None else 5)
                out: Frames = []
                while time.monotonic() < deadline and (expected is None or len(out) < expected.get(n, 0)):
                    out += [(name, bytes(got)) for name, end in ports.items() for got in end.rx()]
                    time.sleep(0.002)
                out += [(name, bytes(got)) for name, end in ports.items() for got in end.rx()]
                found += [(n, *one) for one in sorted(out, key=lambda one: self.ports.index(one[0]))]
        return found


class OtherHost:
    """The far end of datagrams on this host, which stand in captures as if hosts of a network had sent them."""

    #: What stands in a frame before the data: headers of Ethernet, IPv4 and UDP.
    HEADERS = 14 + 20 + 8

    def __init__(self, n: int) -> None:
        self.n = n
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((f"127.0.0.{n}", 0))
        self.socket.setblocking(False)
        self.address = "{}:{}".format(*self.socket.getsockname())
        self.peer: tuple[str, int] = ("", 0)

    def close(self) -> None:
        """Closes its socket."""
        self.socket.close()

    def tx(self, frames: list[bytes]) -> None:
        """Sends what is in frames."""
        for frame in frames:
            self.socket.sendto(frame[self.HEADERS :], self.peer)

    def rx(self) -> list[bytes]:
        """What has come, in frames."""
        found = []
        try:
            while True:
                found.append(bytes(self.between(1, self.n) / Raw(self.socket.recv(65_536))))
        except BlockingIOError:
            return found

    @staticmethod
    def between(sender: int, receiver: int) -> Packet:
        """Headers of a datagram between two hosts, without a checksum."""
        ethernet = Ether(dst=f"02:00:00:00:02:{receiver:02x}", src=f"02:00:00:00:02:{sender:02x}")
        ip = IP(src=f"192.0.2.{sender}", dst=f"192.0.2.{receiver}", id=0, flags="DF")
        return ethernet / ip / UDP(sport=49_152, dport=4789, chksum=0)


def frames(sent: list[tuple[str, Packet]]) -> Frames:
    """The packets as bytes, no shorter than Ethernet has them."""
    return [(port, bytes(packet).ljust(60, b"\0")) for port, packet in sent]


def hello(mac: str, ip: str, of: str) -> Packet:
    """Asks for an address, and so tells one's own."""
    return Ether(dst=ALL, src=mac) / ARP(hwsrc=mac, psrc=ip, pdst=of)


def hello6(mac: str, ip: str, of: str) -> Packet:
    """The same in IPv6."""
    return Ether(dst=ALL, src=mac) / IPv6(src=ip, dst=of) / ICMPv6ND_NS(tgt=of) / ICMPv6NDOptSrcLLAddr(lladdr=mac)


def joined(net: vn.Net, function: vn.Node, *ports: str) -> None:
    """Plugs ports into a function."""
    for port in ports:
        net[port] >> function


def switch(net: vn.Net) -> None:
    """Two access cables of one VLAN, one of another, and a trunk."""
    cables = {"a": {"access": 10}, "b": {"access": 10}, "c": {"access": 20}, "trunk": {"trunk": [10, 20]}}
    joined(net, net.switch(cables=cables), *cables)


def switched() -> list[tuple[str, Packet]]:
    """Frames with tags and without, for everybody, for a station, for nobody who is known."""

    def text(to: str, sender: int, vlan: int | None = None, priority: int = 0) -> Packet:
        frame = Ether(dst=to, src=station(sender))
        tagged = frame / Dot1Q(vlan=vlan, prio=priority) if vlan else frame
        return tagged / IP(src="10.0.0.1", dst="10.0.0.2") / UDP() / b"text"

    return [
        ("a", text(ALL, 1)),
        ("b", text(station(1), 2)),
        ("trunk", text(station(2), 4, 10, 5)),
        ("trunk", text(ALL, 4, 20)),
        ("c", text(station(4), 3)),
        ("c", text(station(1), 3)),
        ("trunk", text(ALL, 4, 30)),
        ("a", text(ALL, 1, 10)),
    ]


RULES = """
pass proto arp
pass out keep-state
reject in proto tcp to any port 22
reject in proto udp to any port 23
"""


def firewall(net: vn.Net) -> None:
    """Lets in what was asked for, and refuses two ports aloud."""
    net["outside"] >> net["inside"]
    net.firewall(RULES, at=net["inside"])


def judged() -> list[tuple[str, Packet]]:
    """A flow of UDP, one of TCP, what nobody has asked for, what is refused."""
    out = Ether(dst=station(2), src=station(1)) / IP(src="10.0.0.1", dst="192.0.2.1", id=1)
    back = Ether(dst=station(1), src=station(2)) / IP(src="192.0.2.1", dst="10.0.0.1", id=2)
    return [
        ("outside", back / UDP(sport=53, dport=999) / b"no"),
        ("inside", out / UDP(sport=999, dport=53) / b"question"),
        ("outside", back / UDP(sport=53, dport=999) / b"answer"),
        ("inside", out / TCP(sport=4000, dport=80, flags="S", seq=1)),
        ("outside", back / TCP(sport=80, dport=4000, flags="SA", seq=9, ack=2)),
        ("inside", out / TCP(sport=4000, dport=80, flags="A", seq=2, ack=10)),
        ("outside", back / TCP(sport=80, dport=4000, flags="A", seq=1_000_000_000, ack=2) / b"no"),
        ("outside", back / TCP(sport=4001, dport=22, flags="S", seq=5)),
        ("outside", back / UDP(sport=4001, dport=23) / b"telnet"),
        ("outside", back / ICMP() / b"ping"),
    ]


LAN, WAN, THIN = "02:00:00:00:01:01", "02:00:00:00:01:02", "02:00:00:00:01:03"
LAN_WAN = {
    "lan": {"addresses": ["10.0.0.1/24", "fd00:1::1/64"], "mac": LAN},
    "wan": {"addresses": ["192.0.2.2/24", "fd00:2::1/64"], "mac": WAN},
}


def router(net: vn.Net) -> None:
    """Three links, one of which carries little."""
    thin = {"addresses": ["10.0.3.1/24"], "mac": THIN, "mtu": 600}
    joined(net, net.router(LAN_WAN | {"thin": thin}, {"0.0.0.0/0": "192.0.2.1"}), "lan", "wan", "thin")


def routed() -> list[tuple[str, Packet]]:
    """From link to link, and what does not go there."""
    lan = Ether(dst=LAN, src=station(1))

    def ip(to: str, **fields: object) -> Packet:
        return lan / IP(src="10.0.0.9", dst=to, id=7, **fields)

    def ip6(to: str, **fields: object) -> Packet:
        return lan / IPv6(src="fd00:1::9", dst=to, **fields)

    return [
        ("lan", hello(station(1), "10.0.0.9", "10.0.0.1")),
        ("wan", hello(station(2), "192.0.2.1", "192.0.2.2")),
        ("thin", hello(station(3), "10.0.3.9", "10.0.3.1")),
        ("lan", hello6(station(1), "fd00:1::9", "fd00:1::1")),
        ("wan", hello6(station(2), "fd00:2::9", "fd00:2::1")),
        ("lan", ip("192.0.2.1") / UDP() / b"next"),
        ("lan", ip("198.51.100.7") / UDP() / b"far"),
        ("lan", ip("198.51.100.7", ttl=1) / UDP() / b"late"),
        ("lan", ip("10.0.3.9", flags="DF") / UDP() / bytes(600)),
        ("lan", ip("10.0.3.9") / UDP() / bytes(range(200)) / bytes(range(200)) / bytes(range(200)) / bytes(range(200))),
        ("lan", ip("10.0.0.1") / ICMP(id=1) / b"ping"),
        ("lan", ip("192.0.2.2") / UDP() / b"nobody listens"),
        ("lan", ip("192.0.2.2") / TCP(sport=4000, dport=80, flags="S", seq=1)),
        ("lan", ip("10.0.0.1", proto=253) / Raw(b"nobody knows")),
        ("lan", ip6("fd00:2::9") / UDP() / b"next"),
        ("lan", ip6("fd00:2::9", hlim=1) / UDP() / b"late"),
        ("lan", ip6("fd00:9::9") / UDP() / b"nowhere"),
        ("lan", ip6("fd00:1::1") / ICMPv6EchoRequest(id=1, data=b"ping")),
        ("lan", ip6("fd00:1::1") / UDP() / b"nobody listens"),
        ("lan", ip6("fd00:2::1") / TCP(sport=4000, dport=80, flags="PA", seq=1, ack=7) / b"nobody"),
        ("lan", ip6("fd00:1::1", nh=253) / Raw(b"nobody knows")),
        ("wan", Ether(dst=WAN, src=station(2)) / IP(src="192.0.2.1", dst="10.0.0.9") / UDP() / b"back"),
    ]


def nat(net: vn.Net) -> None:
    """A network behind one address, with a service."""
    options = {
        "outside": "wan",
        "forward": {"udp:53": "10.0.0.5:5353"},
        "prefixes": {"fd00:1::/48": "2001:db8:1::/48"},
    }
    routes = {"0.0.0.0/0": "192.0.2.1", "2000::/3": "fd00:2::9"}
    joined(net, net.nat(LAN_WAN, routes, **options), "lan", "wan")


def translated() -> list[tuple[str, Packet]]:
    """Flows out, a service, a hairpin, errors, two flows that want the same port, fragments, prefixes of IPv6."""

    def lan(source: str, to: str, **fields: object) -> Packet:
        return Ether(dst=LAN, src=station(int(source.rpartition(".")[2]))) / IP(src=source, dst=to, id=7, **fields)

    def wan(source: str, to: str = "192.0.2.2", **fields: object) -> Packet:
        return Ether(dst=WAN, src=station(2)) / IP(src=source, dst=to, id=8, **fields)

    def lan6(source: str, to: str) -> Packet:
        return Ether(dst=LAN, src=station(9)) / IPv6(src=source, dst=to)

    def wan6(to: str) -> Packet:
        return Ether(dst=WAN, src=station(2)) / IPv6(src=far6, dst=to)

    far, far6 = "198.51.100.7", "2001:db8:ffff::9"
    inner6, outer6 = "fd00:1::9", "2001:db8:1:cf47::9"
    gone6 = IPv6(src=outer6, dst=far6, hlim=1) / UDP(sport=4000, dport=123) / b"time?"
    gone = IP(src="192.0.2.2", dst=far, id=7, ttl=1) / UDP(sport=4000, dport=123) / b"time?"
    long = IP(src="10.0.0.9", dst=far, id=9) / UDP(sport=4000, dport=123) / bytes(800)
    longer = IP(src="10.0.0.9", dst=far, id=10) / UDP(sport=4000, dport=123) / bytes(1000)
    return [
        ("lan", hello(station(9), "10.0.0.9", "10.0.0.1")),
        ("lan", hello(station(8), "10.0.0.8", "10.0.0.1")),
        ("lan", hello(station(5), "10.0.0.5", "10.0.0.1")),
        ("wan", hello(station(2), "192.0.2.1", "192.0.2.2")),
        ("lan", lan("10.0.0.9", far) / UDP(sport=4000, dport=123) / b"time?"),
        ("lan", lan("10.0.0.8", far) / UDP(sport=4000, dport=123) / b"time?"),
        ("wan", wan(far) / UDP(sport=123, dport=4000) / b"late"),
        ("wan", wan(far) / UDP(sport=124, dport=4000) / b"no"),
        ("wan", wan("203.0.113.1") / ICMP(type=11) / gone),
        ("wan", wan("203.0.113.1") / UDP(sport=999, dport=53) / b"name?"),
        ("lan", lan("10.0.0.5", "203.0.113.1") / UDP(sport=5353, dport=999) / b"name"),
        ("lan", lan("10.0.0.9", "192.0.2.2") / UDP(sport=998, dport=53) / b"name?"),
        ("lan", lan("10.0.0.5", "192.0.2.2") / UDP(sport=5353, dport=998) / b"name"),
        ("lan", lan("10.0.0.9", far) / TCP(sport=4000, dport=80, flags="S", seq=1)),
        ("wan", wan(far) / TCP(sport=80, dport=4000, flags="SA", seq=9, ack=2)),
        ("lan", lan("10.0.0.9", far) / ICMP(id=77) / b"ping"),
        ("wan", wan(far) / ICMP(type=0, id=77) / b"ping"),
        *(("lan", Ether(dst=LAN, src=station(9)) / one) for one in fragment(long, fragsize=400)),
        *(("lan", Ether(dst=LAN, src=station(9)) / one) for one in reversed(fragment(longer, fragsize=400))),
        ("lan", hello6(station(9), inner6, "fd00:1::1")),
        ("wan", hello6(station(2), "fd00:2::9", "fd00:2::1")),
        ("lan", lan6(inner6, far6) / UDP(sport=4000, dport=123) / b"time?"),
        ("wan", wan6(outer6) / UDP(sport=123, dport=4000) / b"late"),
        ("wan", wan6(outer6) / ICMPv6TimeExceeded() / gone6),
        ("wan", wan6(outer6) / ICMPv6EchoRequest(id=1, data=b"ping")),
        ("lan", lan6("fd00:1:0:ffff::9", far6) / UDP(sport=4000, dport=123) / b"no"),
    ]


def balancer(net: vn.Net) -> None:
    """A service that three share."""
    backends = [f"10.0.0.{n}:8080" for n in (5, 6, 7)]
    joined(net, net.load_balancer(LAN_WAN, services="tcp:192.0.2.2:80", backends=backends), "lan", "wan")


def shared() -> list[tuple[str, Packet]]:
    """Flows to the service, and answers."""
    wan = Ether(dst=WAN, src=station(2)) / IP(src="192.0.2.9", dst="192.0.2.2", id=1)
    lan = Ether(dst=LAN, src=station(5)) / IP(src="10.0.0.5", dst="192.0.2.9", id=2)
    return [
        *(("lan", hello(station(n), f"10.0.0.{n}", "10.0.0.1")) for n in (5, 6, 7)),
        ("wan", hello(station(2), "192.0.2.9", "192.0.2.2")),
        *(("wan", wan / TCP(sport=sport, dport=80, flags="S", seq=1)) for sport in range(4000, 4012)),
        *(("lan", lan / TCP(sport=8080, dport=dport, flags="SA", seq=9, ack=2)) for dport in range(4000, 4004)),
        ("wan", wan / TCP(sport=4000, dport=81, flags="S", seq=1)),
    ]


def impairment(net: vn.Net) -> None:
    """A cable that loses, doubles and spoils, by a seed."""
    net.impair(net["a"], net["b"], loss=0.2, duplicate=0.2, corrupt=0.2, seed=7)


def numbered(n: int = 24) -> list[tuple[str, Packet]]:
    """Datagrams with numbers, either way."""

    def text(k: int) -> Packet:
        return (
            Ether(dst=station(2), src=station(1)) / IP(src="10.0.0.1", dst="10.0.0.2", id=k) / UDP() / f"number {k:3}"
        )

    return [("ab"[k % 2], text(k)) for k in range(n)]


def mixed() -> list[tuple[str, Packet]]:
    """Packets of several protocols between two ends."""
    there = Ether(dst=station(2), src=station(1)) / IP(src="10.0.0.1", dst="10.0.0.2", id=1)
    back = Ether(dst=station(1), src=station(2)) / IP(src="10.0.0.2", dst="10.0.0.1", id=2)
    return [
        ("a", there / UDP(sport=4000, dport=53) / b"question"),
        ("b", back / UDP(sport=53, dport=4000) / b"answer"),
        ("a", there / TCP(sport=4000, dport=80, flags="S", seq=1)),
        ("a", there / TCP(sport=4000, dport=23, flags="S", seq=1)),
        ("b", back / ICMP(id=1) / b"ping"),
        ("a", Ether(dst=station(2), src=station(1), type=0x88B5) / Raw(bytes(46))),
        ("a", Ether(dst=station(2), src=station(1)) / IPv6(src="fd00::1", dst="fd00::2") / UDP(dport=53) / b"six"),
    ]


def wire(net: vn.Net) -> None:
    """Hands on."""
    net.wire(net["a"], net["b"])


def tee(net: vn.Net) -> None:
    """Copies names that are asked for."""
    joined(net, net.tee(net["copies"], filter="udp port 53"), "a", "b")


def echo(net: vn.Net) -> None:
    """Sends back."""
    joined(net, net.echo(), "a", "b")


@vn.element
def policy(packets: vn.Columns) -> np.ndarray:
    """Keeps telnet out, leads the web elsewhere, and hides how far packets have come."""
    packets.ip_ttl = np.where(packets.ip_ttl > 0, 33, packets.ip_ttl)
    return np.where(packets.l4_dst == 23, "drop", np.where(packets.l4_dst == 80, "web", "pass"))


def element(net: vn.Net) -> None:
    """A program on columns."""
    joined(net, net.element(policy), "a", "b")


def user_net(net: vn.Net) -> None:
    """A gateway whose outside is closed."""
    options = {"outside": False, "mac": "52:55:0a:00:02:02", "names": {"web.example": "10.0.2.20"}}
    net["a"] >> net.user_net("10.0.2.0/24", **options)


def asked() -> list[tuple[str, Packet]]:
    """An address by DHCP, the gateway's own, a name, whether the gateway is there."""
    guest, gateway = station(1), "52:55:0a:00:02:02"
    nobody = IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67)  # noqa: S104 - nobody listens there
    boot = nobody / BOOTP(chaddr=bytes.fromhex(guest.replace(":", "")), xid=7)
    to_gateway = Ether(dst=gateway, src=guest) / IP(src="10.0.2.15", dst="10.0.2.2")
    dns = IP(src="10.0.2.15", dst="10.0.2.3") / UDP(sport=4000, dport=53)
    return [
        ("a", Ether(dst=ALL, src=guest) / boot / DHCP(options=[("message-type", "discover"), "end"])),
        (
            "a",
            Ether(dst=ALL, src=guest)
            / boot
            / DHCP(options=[("message-type", "request"), ("requested_addr", "10.0.2.15"), "end"]),
        ),
        ("a", hello(guest, "10.0.2.15", "10.0.2.2")),
        ("a", hello(guest, "10.0.2.15", "10.0.2.77")),
        ("a", to_gateway / ICMP(id=1) / b"ping"),
        ("a", to_gateway / UDP(sport=4000, dport=53) / DNS(id=9, qd=DNSQR(qname="web.example"))),
        ("a", Ether(dst=gateway, src=guest) / dns / DNS(id=9, qd=DNSQR(qname="web.example"))),
    ]


def vxlan(net: vn.Net, west: OtherHost, east: OtherHost) -> None:
    """A virtual network over two other hosts."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        here = free.getsockname()
    west.peer = east.peer = here
    net["a"] >> net.vxlan("{}:{}".format(*here), vni=5_000, remotes=[west.address, east.address], source_ports=0)


def tunnelled() -> list[tuple[str, Packet]]:
    """Frames for everybody, for stations that were heard of and others, with a tag, of another network, and none."""

    def text(to: str, sender: int, vlan: int | None = None) -> Packet:
        frame = Ether(dst=to, src=station(sender))
        tagged = frame / Dot1Q(vlan=vlan) if vlan else frame
        return tagged / IP(src="10.0.0.1", dst="10.0.0.2", id=1) / UDP() / b"text"

    def over(host: int, inner: Packet, vni: int = 5_000, flags: int = 8) -> Packet:
        return OtherHost.between(host, 1) / VXLAN(flags=flags, vni=vni) / inner

    return [
        ("a", text(ALL, 1)),
        ("west", over(2, text(station(1), 2))),
        ("a", text(station(2), 1)),
        ("east", over(3, text(ALL, 3, 10))),
        ("a", text(station(3), 1, 10)),
        ("a", text(station(9), 1)),
        ("east", over(3, text(station(1), 2))),
        ("a", text(station(2), 1)),
        ("west", over(2, text(station(1), 2), vni=5_001)),
        ("west", over(2, text(station(1), 2), flags=0)),
        ("west", OtherHost.between(2, 1) / Raw(bytes.fromhex("0800000000138800") + b"short")),
    ]


GOLDENS: dict[str, Golden] = {
    "switch": Golden(["a", "b", "c", "trunk"], switch, switched()),
    "wire": Golden(["a", "b"], wire, mixed()),
    "tee": Golden(["a", "b", "copies"], tee, mixed()),
    "element": Golden(["a", "b", "web"], element, mixed()),
    "firewall": Golden(["outside", "inside"], firewall, judged()),
    "echo": Golden(["a", "b"], echo, mixed()),
    "impairment": Golden(["a", "b"], impairment, numbered()),
    "router": Golden(["lan", "wan", "thin"], router, routed()),
    "nat": Golden(["lan", "wan"], nat, translated()),
    "load_balancer": Golden(["lan", "wan"], balancer, shared()),
    "user_net": Golden(["a"], user_net, asked()),
    "vxlan": Golden(["a", "west", "east"], vxlan, tunnelled(), hosts=("west", "east")),
}


def path(kind: str, side: str) -> Path:
    """A capture's file; the side is ``in`` or ``out``."""
    return GOLDEN / f"{kind}.{side}.pcapng"


def main(kinds: list[str]) -> None:
    """Writes captures anew."""
    for kind in kinds or GOLDENS:
        golden = GOLDENS[kind]
        sent = frames(golden.sent)
        for side, packets in ("in", [(n, *one) for n, one in enumerate(sent)]), ("out", golden.play(sent)):
            path(kind, side).write_bytes(written(golden.ports, packets))
            sys.stdout.write(f"{path(kind, side)}: {len(packets)} packets\n")


if __name__ == "__main__":
    main(sys.argv[1:])
