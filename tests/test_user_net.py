"""A network behind a gateway that needs no root: addresses, names, and what is carried to the outside.

Guests are Scapy's packets; the world is servers on loopback, which the gateway's own address leads to.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, ICMPv6ND_RA, ICMPv6ND_RS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw
from scapy.utils import mac2str

import virtnet as vn
from helpers import eventually

pytestmark = pytest.mark.usefixtures("nothing_left")

MAC = "52:54:00:00:00:01"
GATEWAY, GUEST = "10.0.2.2", "10.0.2.15"
NOBODY = "0.0.0.0"  # noqa: S104 - nobody listens there
ALL = "ff:ff:ff:ff:ff:ff"


class Hand:
    """A guest by hand, at a port."""

    def __init__(self, port: vn.Port, mac: str = MAC, ip: str = GUEST) -> None:
        self.port, self.mac, self.ip = port, mac, ip
        self.gateway_mac = ALL
        self.seen: list[Packet] = []

    def send(self, packet: Packet, to: str | None = None) -> None:
        assert self.port.tx([bytes(Ether(src=self.mac, dst=to or self.gateway_mac) / packet)]) == 1

    def expect(self, wanted, timeout_s: float = 10.0) -> Packet:
        """The next packet that is wanted; the others are answered, if they ask for us, and forgotten."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            while self.seen:
                packet = self.seen.pop(0)
                if ARP in packet and packet[ARP].op == 1 and packet[ARP].pdst == self.ip:
                    self.send(ARP(op=2, hwsrc=self.mac, psrc=self.ip, hwdst=packet.src, pdst=packet[ARP].psrc))
                if wanted(packet):
                    return packet
            self.seen += [Ether(bytes(one)) for one in self.port.rx(timeout_s=0.1)]
        raise AssertionError("it did not come")

    def ask(self, packet: Packet, wanted, to: str | None = None) -> Packet:
        self.send(packet, to)
        return self.expect(wanted)

    def meet(self) -> Hand:
        """Asks where the gateway is."""
        reply = self.ask(ARP(psrc=self.ip, hwsrc=self.mac, pdst=GATEWAY), lambda p: ARP in p and p[ARP].op == 2, ALL)
        self.gateway_mac = reply[ARP].hwsrc
        return self

    def dhcp(self, kind: str, *options) -> Packet:
        packet = (
            IP(src=NOBODY, dst="255.255.255.255")
            / UDP(sport=68, dport=67)
            / BOOTP(chaddr=mac2str(self.mac), xid=7)
            / DHCP(options=[("message-type", kind), *options, "end"])
        )
        return self.ask(packet, lambda p: DHCP in p, ALL)

    def dns(self, name: str, kind: str = "A") -> DNS:
        asked = DNS(id=9, qd=DNSQR(qname=name, qtype=kind))
        return self.ask(IP(src=self.ip, dst=GATEWAY) / UDP(sport=5353, dport=53) / asked, lambda p: DNS in p)[DNS]


class Connection:
    """A TCP connection of a guest by hand: one segment at a time, in order."""

    def __init__(self, hand: Hand, port: int, sport: int = 40000) -> None:
        self.hand, self.port, self.sport = hand, port, sport
        self.seq, self.ack = 1000, 0

    def segment(self, flags: str, data: bytes = b"") -> None:
        ends = IP(src=self.hand.ip, dst=GATEWAY) / TCP(
            sport=self.sport, dport=self.port, flags=flags, seq=self.seq, ack=self.ack, window=60000
        )
        self.hand.send(ends / Raw(data) if data else ends)
        self.seq += len(data) + ("S" in flags) + ("F" in flags)

    def expect(self, flags: str) -> Packet:
        return self.hand.expect(
            lambda p: TCP in p and p[TCP].dport == self.sport and set(flags) <= set(str(p[TCP].flags))
        )[TCP]

    def open(self) -> Connection:
        self.segment("S")
        self.ack = self.expect("SA").seq + 1
        self.segment("A")
        return self

    def read(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            got = self.hand.expect(lambda p: TCP in p and p[TCP].dport == self.sport and payload(p))[TCP]
            if got.seq == self.ack:
                data += payload(got)
                self.ack += len(payload(got))
            self.segment("A")
        return data


def payload(packet: Packet) -> bytes:
    """The bytes of a TCP segment, without padding."""
    return bytes(packet[TCP].payload) if packet[TCP].payload.name == "Raw" else b""


@contextmanager
def gateway(**options):
    with vn.UserNetPort(**options) as port:
        yield Hand(port).meet()


def test_a_guest_gets_an_address_with_all_that_belongs_to_it():
    with vn.UserNetPort(domain="lab.example", mtu=1400, leases={"52:54:00:00:00:09": ("10.0.2.99", "fixed")}) as port:
        hand = Hand(port)
        offer = hand.dhcp("discover", ("hostname", "Box"))
        assert offer[BOOTP].yiaddr == GUEST
        ack = hand.dhcp("request", ("requested_addr", GUEST), ("server_id", GATEWAY), ("hostname", "Box"))
        options = dict(option for option in ack[DHCP].options if isinstance(option, tuple) and len(option) == 2)
        assert options["message-type"] == 5
        assert options["router"] == options["name_server"] == options["server_id"] == GATEWAY
        assert (options["subnet_mask"], options["interface-mtu"]) == ("255.255.255.0", 1400)
        assert options["domain"] == b"lab.example"
        lease = next(lease for lease in port.leases if lease.mac == MAC)
        assert (lease.ip, lease.host_name) == (GUEST, "box")
        assert 86000 < lease.expires_s <= 86400
        hand.meet()
        for name in ("box", "box.lab.example"):
            assert hand.dns(name).an[0].rdata == GUEST

        fixed = Hand(port, "52:54:00:00:00:09", "10.0.2.99")
        options = fixed.dhcp("discover")[DHCP].options
        assert ("hostname", b"fixed") in options
        assert fixed.dhcp("request", ("requested_addr", "10.0.2.50"))[DHCP].options[0] == ("message-type", 6)


def test_names_are_answered_for_and_others_do_not_exist_where_nobody_else_can_be_asked():
    with gateway(outside=False, names={"web": "10.0.2.20", "six.example": "fd00::20"}) as hand:
        assert hand.dns("web").an[0].rdata == "10.0.2.20"
        assert hand.dns("six.example", "AAAA").an[0].rdata == "fd00::20"
        assert hand.dns("gateway").an[0].rdata == GATEWAY
        assert hand.dns("web", "AAAA").ancount == 0
        assert hand.dns("example.org").rcode == 3


def test_other_names_are_asked_for_at_the_host_s_name_server():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)

        def answer():
            question, client = server.recvfrom(512)
            reply = DNS(question)
            reply.qr, reply.rcode = 1, 5
            server.sendto(bytes(reply), client)

        with gateway(resolver=f"127.0.0.1:{server.getsockname()[1]}", names={"web": "10.0.2.20"}) as hand:
            thread = threading.Thread(target=answer)
            thread.start()
            assert hand.dns("example.org").rcode == 5
            thread.join()
            assert hand.dns("web").ancount == 1
            assert hand.port.stats().user_net.udp_flows == 1


def test_the_gateway_answers_echo_and_neighbour_discovery():
    with gateway(outside=False) as hand:
        reply = hand.ask(IP(src=GUEST, dst=GATEWAY) / ICMP(id=3, seq=4) / b"hello", lambda p: ICMP in p)
        assert (reply[ICMP].type, reply[ICMP].id, reply[ICMP].seq) == (0, 3, 4)
        assert reply[Raw].load.startswith(b"hello")
        advert = hand.ask(IPv6(src="fe80::1", dst="ff02::2", hlim=255) / ICMPv6ND_RS(), lambda p: ICMPv6ND_RA in p, ALL)
        assert advert[ICMPv6ND_RA].routerlifetime > 0
        ns = IPv6(src="fd76:6e00::15", dst="ff02::1:ff00:2", hlim=255) / ICMPv6ND_NS(tgt="fd76:6e00::2")
        answer = hand.ask(ns, lambda p: p.haslayer("ICMPv6ND_NA"), "33:33:ff:00:00:02")
        assert answer["ICMPv6ND_NA"].tgt == "fd76:6e00::2"
        assert answer["ICMPv6NDOptDstLLAddr"].lladdr == hand.gateway_mac
        six = IPv6(src="fd76:6e00::15", dst="fd76:6e00::2") / ICMPv6EchoRequest(id=5)
        assert hand.ask(six, lambda p: p.haslayer("ICMPv6EchoReply"))["ICMPv6EchoReply"].id == 5


def test_datagrams_go_out_and_come_back_and_a_closed_port_is_told():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, gateway(host_loopback=True) as hand:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        port = server.getsockname()[1]
        ends = IP(src=GUEST, dst=GATEWAY) / UDP(sport=1234, dport=port)
        hand.send(ends / b"there")
        data, client = server.recvfrom(100)
        assert data == b"there"
        server.sendto(b"back" * 1000, client)
        first = hand.expect(lambda p: IP in p and p[IP].proto == 17)
        assert first[IP].flags == "MF"
        rest = [hand.expect(lambda p: IP in p and p[IP].frag > 0) for _ in range(2)]
        whole = b"".join(bytes(p[IP].payload)[: p[IP].len - 20] for p in (first, *rest))
        assert whole[8:] == b"back" * 1000
        assert UDP(whole).dport == 1234

        server.close()
        told = hand.ask(ends / b"nobody", lambda p: ICMP in p)
        assert (told[ICMP].type, told[ICMP].code) == (3, 3)


def test_a_connection_carries_data_and_ends_half_by_half():
    with socket.create_server(("127.0.0.1", 0)) as server, gateway(host_loopback=True) as hand:
        server.settimeout(10)
        connection = Connection(hand, server.getsockname()[1])
        connection.segment("S")
        host, _ = server.accept()
        host.settimeout(10)
        connection.ack = connection.expect("SA").seq + 1
        connection.segment("A")
        assert hand.port.stats().user_net.tcp_flows == 1
        connection.segment("PA", b"question")
        assert host.recv(100) == b"question"
        connection.segment("FA")
        assert host.recv(100) == b"", "the guest's end is handed on"
        host.sendall(b"answer" * 1000)
        assert connection.read(6000) == b"answer" * 1000, "and the other way still goes"
        host.close()
        connection.ack = connection.expect("F").seq + 1
        connection.segment("A")
        assert eventually(lambda: hand.port.stats().user_net.tcp_flows == 0, 20)


def test_resets_are_handed_on_both_ways():
    with socket.create_server(("127.0.0.1", 0)) as server, gateway(host_loopback=True) as hand:
        server.settimeout(10)
        port = server.getsockname()[1]
        connection = Connection(hand, port).open()
        host, _ = server.accept()
        host.settimeout(10)
        connection.segment("R")
        with pytest.raises(ConnectionResetError):
            host.recv(1)
        host.close()

        connection = Connection(hand, port, 40001).open()
        host, _ = server.accept()
        host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        host.close()
        assert connection.expect("R")
        server.close()
        refused = Connection(hand, port, 40002)
        refused.segment("S")
        assert refused.expect("RA").ack == 1001
        # The answer is on its way before it is counted.
        assert eventually(lambda: hand.port.stats().user_net.lost.get("refused") == 1)
        assert eventually(lambda: hand.port.stats().user_net.tcp_flows == 0)


def test_a_guest_that_does_not_read_holds_its_sender_up():
    with socket.create_server(("127.0.0.1", 0)) as server, gateway(host_loopback=True) as hand:
        server.settimeout(10)
        connection = Connection(hand, server.getsockname()[1]).open()
        host, _ = server.accept()
        host.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        host.settimeout(1)
        sent = 0
        with suppress(TimeoutError):
            while sent < 64 << 20:
                sent += host.send(bytes(65536))
        assert 0 < sent < 64 << 20
        host.close()
        connection.segment("R")


def test_ports_of_the_host_lead_to_guests():
    forward = {0: (GUEST, 80), "udp/127.0.0.1:0": f"{GUEST}:53"}
    with gateway(outside=False, forward=forward) as hand:
        tcp, udp = [int(at.rpartition(":")[2]) for at in hand.port.listening.values()]
        with socket.create_connection(("127.0.0.1", tcp)) as client:
            client.settimeout(10)
            syn = hand.expect(lambda p: TCP in p and p[TCP].flags == "S" and p[TCP].dport == 80)
            assert syn[IP].src == GATEWAY
            connection = Connection(hand, syn[TCP].sport, 80)
            connection.ack = syn[TCP].seq + 1
            connection.segment("SA")
            connection.segment("PA", b"hello from the guest")
            assert client.recv(100) == b"hello from the guest"
            client.sendall(b"and back")
            assert connection.read(8) == b"and back"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(10)
            client.sendto(b"ask", ("127.0.0.1", udp))
            asked = hand.expect(lambda p: UDP in p and p[UDP].dport == 53)
            hand.send(IP(src=GUEST, dst=asked[IP].src) / UDP(sport=53, dport=asked[UDP].sport) / b"told")
            assert client.recv(100) == b"told"


def test_what_guests_may_not_reach_is_refused():
    with gateway() as hand:
        for to in ("127.0.0.1", "0.0.0.1", "169.254.169.254", GATEWAY):
            told = hand.ask(IP(src=GUEST, dst=to) / UDP(sport=1, dport=9) / b"x", lambda p: ICMP in p)
            assert (told[ICMP].type, told[ICMP].code) == (3, 13)
            hand.send(IP(src=GUEST, dst=to) / TCP(sport=2, dport=9, flags="S"))
            assert hand.expect(lambda p: TCP in p)[TCP].flags == "RA"
        assert hand.port.stats().user_net.lost["prohibited"] == 8
        assert hand.port.stats().user_net.flows == 0


def test_what_makes_no_sense_is_counted_and_a_flood_is_bounded():
    with gateway(outside=True, host_loopback=True) as hand:
        right = IP(src=GUEST, dst=GATEWAY) / UDP(sport=1, dport=9) / b"x"
        hand.send(IP(bytes(IP(src=GUEST, dst=GATEWAY) / UDP(sport=1, dport=9, chksum=1) / b"x")))
        hand.send(Raw(bytes(right)[:-3]), None)
        for piece in fragment(IP(src=GUEST, dst=GATEWAY) / UDP() / bytes(3000)):
            hand.send(piece)
        hand.send(IP(src="192.0.2.1", dst=GATEWAY) / UDP(sport=1, dport=9))
        hand.send(right, "02:00:00:00:00:77")

        def lost():
            return hand.port.stats().user_net.lost

        assert eventually(lambda: lost().get("not_for_us")), lost()
        assert {"bad_checksum", "fragment", "foreign_source"} <= lost().keys()

        for n in range(600):
            hand.send(IP(src=GUEST, dst=GATEWAY) / UDP(sport=1000 + n, dport=9) / b"x")
        assert eventually(lambda: lost().get("table_full", 0) >= 300)
        assert hand.port.stats().user_net.udp_flows <= 256
        assert hand.ask(IP(src=GUEST, dst=GATEWAY) / ICMP(), lambda p: ICMP in p and p[ICMP].type == 0)


def test_flows_that_are_silent_end():
    options = {"host_loopback": True, "udp_idle_s": 1, "tcp_idle_s": 1}
    with socket.create_server(("127.0.0.1", 0)) as server, gateway(**options) as hand:
        hand.send(IP(src=GUEST, dst=GATEWAY) / UDP(sport=1, dport=server.getsockname()[1]) / b"x")
        connection = Connection(hand, server.getsockname()[1]).open()
        assert connection.expect("R")
        assert eventually(lambda: hand.port.stats().user_net.udp_flows == 0, 10)


def test_a_network_of_ports_finds_its_way_out():
    with vn.Net() as net, socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        vm, way_out = net.memory("vm"), net.user_net(host_loopback=True)
        _ = vm >> net.switch() << way_out
        hand = Hand(vm.end).meet()
        hand.dhcp("discover")
        hand.dhcp("request", ("requested_addr", GUEST))
        assert [lease.ip for lease in way_out.leases] == [GUEST]
        connection = Connection(hand, server.getsockname()[1]).open()
        server.accept()[0].close()
        connection.expect("F")
        assert "1 leases" in way_out.state
        assert net.stats().to_dict()["ports"][way_out.name]["user_net"]["leases"][0]["ip"] == GUEST
        assert eventually(lambda: net.stats().balance().exact)


@pytest.mark.parametrize(
    "text",
    [
        "user-net:10.0.2.0/24",
        "user-net:192.168.7.0/28,gateway=192.168.7.9,first=192.168.7.3,ipv6=off,outside=off,host_loopback=on",
        "user-net:10.0.2.0/24,forward=8080/10.0.2.15:80+udp/0.0.0.0:53/10.0.2.15:53+[::1]:80/[fd76:6e00::15]:80",
        "user-net:10.0.2.0/24,resolver=192.0.2.53:53,domain=lab,names=web/10.0.2.20+six/fd00::1",
        "user-net:10.0.2.0/24,mtu=9000,leases=52:54:00:00:00:01/10.0.2.20/web+52:54:00:00:00:02/10.0.2.21",
    ],
)
def test_what_it_is_to_be_is_written_and_read(text):
    spec = vn.PortSpec.parse(text)
    assert str(spec) == text
    whole = vn.Spec.from_dict({"ports": {"up": {"port": text}}})
    assert vn.Spec.from_toml(whole.to_toml()) == whole
    with vn.Net() as net:
        net.port(vn.PortSpec.of("user-net", spec.where, **{**spec.options, "forward": ()}))


def test_a_file_says_it_in_tables():
    spec = vn.Spec.from_toml("""
        [ports.up]
        kind = "user-net"
        where = "10.0.2.0/24"
        forward = {8080 = "10.0.2.15:80"}
        names = {web = "10.0.2.20"}
        leases = ["52:54:00:00:00:01/10.0.2.20/web"]
    """)
    options = spec.ports["up"].options
    assert options["forward"] == ("tcp/127.0.0.1:8080/10.0.2.15:80",)
    assert options["names"] == ("web/10.0.2.20",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "10.0.2.1/24"}, "first address of an IPv4 network"),
        ({"network": "10.0.2.0/30"}, "a prefix of 8 to 29"),
        ({"gateway": "10.0.3.1"}, "gateway"),
        ({"mtu": 1000}, "1280"),
        ({"forward": {80: "10.0.3.1:80"}}, "forward"),
        ({"forward": {"http": "10.0.2.15:80"}}, "forward: expected"),
        ({"forward": {80: "10.0.2.2:80"}}, "a guest's address"),
        ({"leases": {MAC: "10.0.2.2"}}, "leases"),
        ({"names": {"a b": "10.0.2.2"}}, "names: expected NAME/ADDRESS"),
        ({"resolver": "localhost"}, "a name server's address"),
        ({"ipv6": "fd00::/48"}, "an IPv6 network of 64 bits"),
        ({"domain": "-x"}, "domain"),
    ],
)
def test_what_does_not_fit_together_is_said(options, message):
    with pytest.raises(vn.ConfigError, match=message):
        vn.UserNetPort(**options)


def test_a_port_of_the_host_that_is_taken_is_said():
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(vn.PortError, match=f"listen at 127.0.0.1:{taken}"):
            vn.UserNetPort(forward={taken: "10.0.2.15:80"})
