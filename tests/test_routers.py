"""Routers: what is written down, what is refused, what goes where while it changes."""

from __future__ import annotations

import ipaddress
import os

import pytest

import virtnet as vn
from helpers import eventually, mac, receive

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def net():
    with vn.Net() as net:
        yield net
        assert net.stats().balance().exact


def packed(address: str) -> bytes:
    return ipaddress.ip_address(address).packed


def checksum(data: bytes) -> int:
    total = sum(int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def arp(sender: bytes, ip: str, target: str, *, to: bytes | None = None) -> bytes:
    """A request for an address, or the answer to one."""
    kind = b"\0\1" if to is None else b"\0\2"
    body = b"\0\1\10\0\6\4" + kind + sender + packed(ip) + (to or bytes(6)) + packed(target)
    return ((to or b"\xff" * 6) + sender + b"\x08\x06" + body).ljust(60, b"\0")


def udp(to: bytes, sender: bytes, source: str, destination: str, *, ttl: int = 64, payload: bytes = b"hello") -> bytes:
    body = b"\0\7\0\t" + (8 + len(payload)).to_bytes(2, "big") + bytes(2) + payload
    header = bytearray(b"\x45\0" + (20 + len(body)).to_bytes(2, "big") + bytes(4) + bytes([ttl, 17, 0, 0]))
    header += packed(source) + packed(destination)
    header[10:12] = checksum(header).to_bytes(2, "big")
    return to + sender + b"\x08\0" + bytes(header) + body


def lab(net: vn.Net, **options) -> tuple[vn.Router, vn.PortNode, vn.PortNode, list[bytes]]:
    """Two hosts, .9 of two networks, known to a router; its addresses on the links."""
    lan, wan = net.memory("lan"), net.memory("wan")
    router = net.router({lan: "10.0.1.1/24", wan: ["10.0.2.1/24", "fd00:2::1/64"]}, name="router", **options)
    lan >> router << wan
    found = []
    for i, host in enumerate((lan, wan), 1):
        host.end.tx([arp(mac(i), f"10.0.{i}.9", f"10.0.{i}.1")])
        (answer,) = receive(host.end)
        found.append(answer[6:12])
    return router, lan, wan, found


def test_a_packet_goes_from_link_to_link(net):
    router, lan, wan, (inner, outer) = lab(net)
    lan.end.tx([udp(inner, mac(1), "10.0.1.9", "10.0.2.9")])
    assert receive(wan.end) == [udp(mac(2), outer, "10.0.1.9", "10.0.2.9", ttl=63)]
    assert router.stats().detail["forwarded"] == 1
    assert router.stats().detail["neighbours"] == 2
    # A ping's answer comes from whom it was sent to.
    lan.end.tx([udp(inner, mac(1), "10.0.1.9", "10.0.2.9", ttl=1)])
    (error,) = receive(lan.end)
    assert error[23] == 1
    assert error[26:30] == packed("10.0.1.1")
    assert error[34:36] == b"\x0b\0"
    assert router.stats().drops == {"ttl_expired": 1}


def test_errors_come_from_whom_it_was_for_or_from_the_link_they_leave_by(net):
    _, lan, wan, (inner, _) = lab(net, routes={"172.16.0.0/12": "10.0.2.9"})
    lan.end.tx([udp(inner, mac(1), "10.0.1.9", "10.0.2.1")])
    (error,) = receive(lan.end)
    assert (error[26:30], error[34:36]) == (packed("10.0.2.1"), b"\3\3")
    lan.end.tx([udp(inner, mac(1), "172.16.0.9", "10.0.2.9", ttl=1)])
    (error,) = receive(wan.end)
    assert (error[26:34], error[34:36]) == (packed("10.0.2.1") + packed("172.16.0.9"), b"\x0b\0")


def test_routes_and_interfaces_change_while_it_runs(net):
    router, lan, wan, (inner, outer) = lab(net)
    far = udp(inner, mac(1), "10.0.1.9", "172.16.0.1")
    lan.end.tx([far])
    (error,) = receive(lan.end)
    assert error[34:36] == b"\x03\0"
    before = net.spec
    router.route("172.16.0.0/12", "10.0.2.9")
    assert net.plan(before).changed == ("router",)
    assert not net.plan(before).restarted
    lan.end.tx([far])
    assert receive(wan.end) == [udp(mac(2), outer, "10.0.1.9", "172.16.0.1", ttl=63)]
    router.unroute("172.16.0.0/12")
    with pytest.raises(vn.ConfigError, match="has no route"):
        router.unroute("172.16.0.0/12")
    # Another link, and one that is not there any more.
    dmz = net.memory("dmz")
    with net.change():
        dmz >> router
        router.interface(dmz, "10.0.3.1/24", mtu=1400)
        router.route("172.16.0.0/12", dmz)
    lan.end.tx([far])
    (question,) = receive(dmz.end)
    assert question[28:32] == packed("10.0.3.1")
    assert question[38:42] == packed("172.16.0.1")
    dmz.end.tx([arp(mac(3), "172.16.0.1", "10.0.3.1", to=question[6:12])])
    assert eventually(lambda: router.stats().detail["waiting"] == 1)
    with pytest.raises(vn.ConfigError, match="172"):
        dmz.remove()
    with net.change():
        router.unroute("172.16.0.0/12")
        dmz.remove()
    assert list(router.spec.options["interfaces"]) == ["lan", "wan"]
    lan.end.tx([far])
    assert receive(lan.end)[0][34:36] == b"\x03\0"
    assert router.stats().detail["neighbours"] == 2


def test_a_packet_waits_until_its_receiver_has_answered(net):
    router, lan, wan, (inner, outer) = lab(net)
    lan.end.tx([udp(inner, mac(1), "10.0.1.9", "10.0.2.7", payload=text) for text in (b"1", b"2")])
    (question,) = receive(wan.end)
    assert question[38:42] == packed("10.0.2.7")
    assert router.stats().detail["waiting"] == 2
    wan.end.tx([arp(mac(7), "10.0.2.7", "10.0.2.1", to=outer)])
    expected = [udp(mac(7), outer, "10.0.1.9", "10.0.2.7", ttl=63, payload=text) for text in (b"1", b"2")]
    assert receive(wan.end, 2) == expected


def test_a_cable_without_an_interface_leads_nowhere(net):
    router, lan, _, (inner, _) = lab(net)
    other = net.memory("other")
    other >> router
    other.end.tx([udp(inner, mac(1), "10.0.1.9", "10.0.2.9")])
    assert eventually(lambda: router.stats().drops == {"no_interface": 1})
    assert lan.end.rx() is not None


def test_a_capture_in_a_cable_leaves_the_interface_with_it(net, tmp_path):
    _, lan, wan, (inner, outer) = lab(net)
    with net.capture(wan, tmp_path / "wan.pcapng"):
        lan.end.tx([udp(inner, mac(1), "10.0.1.9", "10.0.2.9")])
        # Another cable is in the gate now: the station is asked for again.
        (question,) = receive(wan.end)
        wan.end.tx([arp(mac(2), "10.0.2.9", "10.0.2.1", to=outer)])
        assert question[12:14] == b"\x08\x06"
        assert receive(wan.end) == [udp(mac(2), outer, "10.0.1.9", "10.0.2.9", ttl=63)]


def test_it_is_written_down_and_read_back():
    net = vn.Net()
    lan, wan = net.memory("lan"), net.switch(name="wan")
    router = net.router(
        {lan: "10.0.1.1/24", wan: {"addresses": ["10.0.2.1/24"], "mtu": 1400, "mac": "02:0A:00:00:00:01"}}
    )
    lan >> router << wan
    router.route("0.0.0.0/0", "10.0.2.254")
    spec = net.spec
    assert vn.Spec.from_toml(spec.to_toml()) == spec
    assert vn.Spec.from_dict(spec.to_dict()) == spec
    assert router.spec.options["interfaces"]["wan"] == {
        "addresses": ["10.0.2.1/24"],
        "mtu": 1400,
        "mac": "02:0a:00:00:00:01",
    }
    short = """
        cables = [["lan", "router"], ["wan", "router"]]
        ports.lan.port = "memory:lan"
        functions.wan.kind = "switch"
        [functions.router]
        kind = "router"
        interfaces = {lan = "10.0.1.1/24", wan = {addresses = "10.0.2.1/24", mtu = 1400, mac = "02:0a:00:00:00:01"}}
        routes = {"0.0.0.0/0" = "10.0.2.254"}
    """
    assert vn.Spec.from_toml(short) == spec


@pytest.mark.parametrize(
    ("interfaces", "routes", "words"),
    [
        ({"lan": "10.0.0.1"}, {}, r"interfaces\.lan: .* prefix"),
        ({"lan": []}, {}, r"interfaces\.lan"),
        ({"lan": "10.0.0.1/40"}, {}, r"interfaces\.lan"),
        ({"lan": {"addresses": "10.0.0.1/24", "mtu": 60}}, {}, r"interfaces\.lan\.mtu"),
        ({"lan": {"addresses": "fd00::1/64", "mtu": 1000}}, {}, r"interfaces\.lan\.mtu.*1280"),
        ({"lan": {"addresses": "10.0.0.1/24", "mac": "01:00:00:00:00:00"}}, {}, r"interfaces\.lan\.mac"),
        ({"lan": {"addresses": "10.0.0.1/24", "adress": 1}}, {}, "adress"),
        ({"lan": "224.0.0.1/24"}, {}, "one station"),
        ({"lan": "10.0.0.1/24"}, {"10.0.0.0": "10.0.0.2"}, "ADDRESS/LENGTH"),
        ({"lan": "10.0.0.1/24"}, {"10.0.0.0/33": "10.0.0.2"}, "32 bits"),
        ({"lan": "10.0.0.1/24"}, {"0.0.0.0/0": "10.0.1.2"}, "on no link"),
        ({"lan": "10.0.0.1/24"}, {"0.0.0.0/0": "10.0.0.1"}, "this router"),
        ({"lan": "10.0.0.1/24"}, {"::/0": "10.0.0.2"}, "other kind"),
        ({"lan": "10.0.0.1/24"}, {"0.0.0.0/0": "wan"}, r"routes\.0\.0\.0\.0/0.*lan"),
        ({"lan": "10.0.0.1/24"}, {"0.0.0.0/0": "10.0.0.2%wan"}, "wan"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_place(interfaces, routes, words):
    with pytest.raises(vn.ConfigError, match=words):
        vn.Net().router(interfaces, routes)


def test_a_spec_names_nodes_that_are_there():
    with pytest.raises(vn.ConfigError, match=r"functions\.router\.interfaces\.lann: there is no 'lann'.*lan"):
        vn.Spec.from_toml(
            'ports.lan.port = "memory:lan"\n[functions.router]\nkind = "router"\ninterfaces = {lann = "10.0.0.1/24"}'
        )


def test_a_million_routes_are_a_table_like_any_other(net):
    router, lan, wan, (inner, outer) = lab(net)
    routes = {f"{a}.{b}.{c}.0/24": "10.0.2.9" for a in range(11, 31) for b in range(200) for c in range(250)}
    router.set(routes=routes)
    assert router.stats().detail["routes"] == len(routes) == 10**6
    lan.end.tx([udp(inner, mac(1), "10.0.1.9", "30.199.249.7"), udp(inner, mac(1), "10.0.1.9", "30.200.0.1")])
    assert receive(wan.end) == [udp(mac(2), outer, "10.0.1.9", "30.199.249.7", ttl=63)]
    assert receive(lan.end)[0][34:36] == b"\x03\0"


def test_several_workers_share_it():
    with vn.Net(cpus=[min(os.sched_getaffinity(0))] * 2) as net:
        _, lan, wan, (inner, outer) = lab(net)
        frames = [udp(inner, mac(1), "10.0.1.9", "10.0.2.9", payload=bytes([i])) for i in range(64)]
        lan.end.tx(frames)
        expected = [udp(mac(2), outer, "10.0.1.9", "10.0.2.9", ttl=63, payload=bytes([i])) for i in range(64)]
        assert receive(wan.end, 64) == expected
        assert net.stats().balance().exact
