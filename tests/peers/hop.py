"""The same packets through the kernel and through a router or NAT of ours, and what came out of each."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from scapy.layers.inet6 import ICMPv6ND_NS, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

import virtnet as vn
from helpers import eventually

if TYPE_CHECKING:
    from scapy.packet import Packet

BROADCAST = "ff:ff:ff:ff:ff:ff"

#: How long the kernel may take for what it does at once.
AT_ONCE_S = 0.1


@dataclass(frozen=True)
class Link:
    """A link of the router: its own place there, and who else is."""

    mac: str
    addresses: list[str]
    neighbours: dict[str, str]
    mtu: int = 1500

    def own(self, ip: str) -> str:
        """The router's address in the prefix of another."""
        for one in map(ipaddress.ip_interface, self.addresses):
            if ipaddress.ip_address(ip) in one.network:
                return str(one.ip)
        raise ValueError(ip)


@dataclass(frozen=True)
class Sent:
    """A packet that is sent by a link to the router; what it is to show; how long that may take the kernel.

    Where the specifications leave a choice that is taken otherwise here, ``differs`` says which and why. A ``trailer``
    stands in the frame behind the packet.
    """

    what: str
    link: str
    packet: Packet
    seconds: float = AT_ONCE_S
    differs: str = ""
    trailer: bytes = b""

    def frame(self, hop: Hop) -> bytes:
        """The packet to the router, from the station that has its source's address, or from the first one."""
        link = hop.links[self.link]
        sender = link.neighbours.get(self.packet.src, next(iter(link.neighbours.values())))
        return bytes(Ether(dst=link.mac, src=sender) / self.packet) + self.trailer


@dataclass(frozen=True)
class Hop:
    """A router with its links and routes; to translate, with rules for the kernel and options for ours."""

    links: dict[str, Link]
    routes: dict[str, str] = field(default_factory=dict)
    rules: str = ""
    nat: dict[str, Any] | None = None

    @property
    def addresses(self) -> set[bytes]:
        """The router's own."""
        return {ipaddress.ip_interface(one).ip.packed for link in self.links.values() for one in link.addresses}


Out = list[tuple[str, bytes]]


def kernels(hop: Hop, sent: list[Sent]) -> list[Out]:
    """What the kernel makes of them; skips where it cannot be asked."""
    if os.geteuid() or (hop.rules and not shutil.which("nft")):
        pytest.skip("needs root and nft (Debian: apt install nftables)")
    probe = ["nft", "list", "ruleset"] if hop.rules else ["true"]
    if subprocess.run(["unshare", "--net", *probe], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here, or not with nftables")
    wanted = {
        "links": {name: asdict(link) for name, link in hop.links.items()},
        "routes": hop.routes,
        "rules": hop.rules,
        "frames": [[one.link, one.frame(hop).hex(), one.seconds] for one in sent],
    }
    command = ["unshare", "--net", sys.executable, str(Path(__file__).with_name("kernel_hop.py"))]
    done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    return [[(link, bytes.fromhex(frame)) for link, frame in out] for out in json.loads(done.stdout)]


def ours(hop: Hop, sent: list[Sent], expected: list[Out]) -> list[Out]:
    """What a router of ours makes of them, after its neighbours have told it who they are."""
    found = []
    with vn.Net() as net:
        ports = {name: net.memory(name) for name in hop.links}
        interfaces = {
            name: {"addresses": link.addresses, "mac": link.mac, "mtu": link.mtu} for name, link in hop.links.items()
        }
        if hop.nat is None:
            router = net.router(interfaces, hop.routes, errors_pps=100_000, name="router")
        else:
            router = net.nat(interfaces, hop.routes, errors_pps=100_000, name="router", **hop.nat)
        for port in ports.values():
            port >> router
        meet(net, hop)
        before = net.stats().balance().received
        for n, (one, theirs) in enumerate(zip(sent, expected, strict=True), 1):
            ports[one.link].end.tx([one.frame(hop)])
            assert eventually(lambda n=n: net.stats().balance().received >= before + n and net.stats().balance().exact)
            out: Out = []

            def is_there(out: Out = out, theirs: Out = theirs) -> bool:
                out += [got for got in collected(ports) if not got[1][0] & 1 and got[1][12:14] != b"\x08\x06"]
                return len(out) >= len(theirs)

            eventually(is_there, 1 if one.seconds == AT_ONCE_S else 6)
            found.append(out)
        assert net.stats().balance().exact
    return found


def collected(ports: dict[str, vn.PortNode]) -> Out:
    """What has come out by now."""
    return [(name, bytes(frame)) for name, port in ports.items() for frame in port.end.rx()]


def meet(net: vn.Net, hop: Hop) -> None:
    """Has every station ask for the router, which so learns of it."""
    asked = 0
    for name, link in hop.links.items():
        for ip, mac in link.neighbours.items():
            if ":" in ip:
                question = (
                    IPv6(src=ip, dst=link.own(ip)) / ICMPv6ND_NS(tgt=link.own(ip)) / ICMPv6NDOptSrcLLAddr(lladdr=mac)
                )
                frame = Ether(dst=link.mac, src=mac) / question
            else:
                frame = Ether(dst=BROADCAST, src=mac) / ARP(hwsrc=mac, psrc=ip, pdst=link.own(ip))
            net[name].end.tx([bytes(frame)])
            asked += 1
    assert eventually(lambda: net.stats().functions["router"].detail["answered"] == asked)
    for name in hop.links:
        while len(net[name].end.rx(0.05)):
            pass


def masked(hop: Hop, frame: bytes) -> bytes:
    """A frame without what may differ by the specifications.

    Of what the router itself says by ICMP over IPv4 that is the packet's identification, which only has to differ from
    others (RFC 6864), whether it may be cut, and the checksum over both.
    """
    if frame[12:14] == b"\x86\xdd":
        return frame
    is_made = frame[26:30] in hop.addresses and frame[23] == 1 and frame[34] in (0, 3, 11, 12)
    return frame[:18] + bytes(4) + frame[22:24] + bytes(2) + frame[26:] if is_made else frame


def told(frame: bytes) -> str:
    """A frame for whoever reads of it."""
    return f"{Ether(frame).summary()}\n      {frame.hex()}"


def compare(hop: Hop, sent: list[Sent]) -> list[Out]:
    """Sends packets through both: the same comes out, but for what is masked or differs. What the kernel has sent."""
    theirs = kernels(hop, sent)
    different = []
    for one, kernel, own in zip(sent, theirs, ours(hop, sent, theirs), strict=True):
        expected, got = (sorted((link, masked(hop, frame)) for link, frame in out) for out in (kernel, own))
        if one.differs:
            assert expected != got, f"{one.what}: it does not differ any more"
        elif expected != got:
            lines = [f"{one.what}: {one.packet.summary()}"]
            lines += [
                f"  {who} {link}: {told(f)}" for who, out in (("kernel", expected), ("ours  ", got)) for link, f in out
            ]
            different.append("\n".join(lines))
    assert not different, "\n" + "\n".join(different)
    return theirs
