"""Routers that translate, and load balancers: what is written down, what is refused, what goes where."""

from __future__ import annotations

import pytest

import virtnet as vn
from helpers import eventually, mac, receive
from test_routers import arp, packed, udp

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def net():
    with vn.Net() as net:
        yield net
        assert net.stats().balance().exact


def greeted(net: vn.Net, router: vn.Router, *hosts: str) -> list[bytes]:
    """Plugs in a host for each address and has it tell who it is; the router's addresses on the links."""
    found = []
    for i, address in enumerate(hosts, 1):
        port = net[f"link{i}"]
        port >> router
        gateway = router.spec.options["interfaces"][port.name]["addresses"][0].partition("/")[0]
        port.end.tx([arp(mac(i), address, gateway)])
        (answer,) = receive(port.end)
        found.append(answer[6:12])
    return found


def addressed(packet: bytes) -> tuple[bytes, bytes, bytes]:
    """Source and destination, and ports."""
    return packet[26:30], packet[30:34], packet[34:38]


def test_what_leaves_has_the_outer_address_and_answers_find_back(net):
    lan, wan = net.memory("link1"), net.memory("link2")
    gateway = net.nat({lan: "10.0.0.1/24", wan: "192.0.2.2/24"}, outside=wan, forward={"udp:9": "10.0.0.9:7"})
    inner, outer = greeted(net, gateway, "10.0.0.9", "192.0.2.9")
    lan.end.tx([udp(inner, mac(1), "10.0.0.9", "192.0.2.9")])
    (seen,) = receive(wan.end)
    assert addressed(seen) == (packed("192.0.2.2"), packed("192.0.2.9"), b"\0\7\0\t")
    wan.end.tx([udp(outer, mac(2), "192.0.2.9", "10.0.0.9")])
    assert eventually(lambda: gateway.stats().drops == {"no_mapping": 1})
    # A service, which is one no more then; a flow that has begun goes on.
    wan.end.tx([udp(outer, mac(2), "192.0.2.9", "192.0.2.2")])
    assert addressed(receive(lan.end)[0]) == (packed("192.0.2.9"), packed("10.0.0.9"), b"\0\7\0\7")
    before = net.spec
    gateway.set(forward={})
    assert net.plan(before).changed == (gateway.name,)
    wan.end.tx([udp(outer, mac(2), "192.0.2.9", "192.0.2.2")])
    assert addressed(receive(lan.end)[0])[1] == packed("10.0.0.9")
    assert gateway.stats().detail["flows"] == 2
    assert gateway.stats().kind == "nat"


def test_what_leaves_has_an_address_of_the_link_it_leaves_by(net):
    lan, wan = net.memory("link1"), net.memory("link2")
    gateway = net.nat({lan: "10.0.0.1/24", wan: "192.0.2.2/24"}, {"0.0.0.0/0": "192.0.2.9"}, outside=wan)
    inner, _ = greeted(net, gateway, "10.0.0.9", "192.0.2.9")
    # Another network has numbers that are like those inside.
    lan.end.tx([udp(inner, mac(1), "10.0.0.9", "10.0.1.9")])
    assert addressed(receive(wan.end)[0])[:2] == (packed("192.0.2.2"), packed("10.0.1.9"))


def test_the_router_answers_for_its_pool(net):
    lan, wan = net.memory("link1"), net.memory("link2")
    options = {"outside": wan, "pool": ["192.0.2.77"]}
    inner, _ = greeted(net, net.nat({lan: "10.0.0.1/24", wan: "192.0.2.2/24"}, **options), "10.0.0.9", "192.0.2.9")
    wan.end.tx([arp(mac(2), "192.0.2.9", "192.0.2.77")])
    assert receive(wan.end)[0][28:32] == packed("192.0.2.77")
    lan.end.tx([udp(inner, mac(1), "10.0.0.9", "192.0.2.9")])
    assert addressed(receive(wan.end)[0])[0] == packed("192.0.2.77")


def test_a_balancers_flows_stay_when_its_back_ends_change(net):
    wan, farm = net.memory("link1"), net.memory("link2")
    balancer = net.load_balancer(
        {wan: "192.0.2.10/24", farm: "10.0.0.1/24"}, services="udp:192.0.2.10:9", backends=["10.0.0.9:7"]
    )
    outer, _ = greeted(net, balancer, "192.0.2.9", "10.0.0.9")
    asked = udp(outer, mac(1), "192.0.2.9", "192.0.2.10")
    wan.end.tx([asked])
    assert addressed(receive(farm.end)[0])[1:] == (packed("10.0.0.9"), b"\0\7\0\7")
    balancer.set(backends=["10.0.0.8:7"])
    wan.end.tx([asked])
    assert addressed(receive(farm.end)[0])[1] == packed("10.0.0.9")
    # Another flow goes to the new one, who has to be asked for.
    wan.end.tx([udp(outer, mac(1), "192.0.2.7", "192.0.2.10")])
    (question,) = receive(farm.end)
    assert question[38:42] == packed("10.0.0.8")


def test_they_are_written_down_and_read_back():
    net = vn.Net()
    lan, wan = net.memory("lan"), net.memory("wan")
    nat = net.nat({lan: "10.0.0.1/24", wan: "192.0.2.2/24"}, outside=[wan], forward={"tcp:80": "10.0.0.5:80"})
    lan >> nat << wan
    net.load_balancer({"lan": "10.0.9.1/24"}, services=["tcp:10.0.9.1:80"], backends=["10.0.0.5:80"], flows_max=10)
    spec = net.spec
    assert vn.Spec.from_toml(spec.to_toml()) == spec
    assert vn.Spec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outside": "wan"}, "outside: .*wan"),
        ({"pool": ["x"]}, "pool: .*IPv4"),
        ({"forward": {"tcp": "10.0.0.5:80"}}, r"forward\.tcp: .*tcp or udp"),
        ({"forward": {"icmp:80": "10.0.0.5:80"}}, "tcp or udp"),
        ({"forward": {"tcp:80": "10.0.0.5"}}, "ADDRESS:PORT"),
        ({"forward": {"tcp:0": "10.0.0.5:80"}}, "65535"),
        ({"flows_max": 0}, "flows_max"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_place(options, words):
    with pytest.raises(vn.ConfigError, match=words):
        vn.Net().nat({"lan": "10.0.0.1/24"}, **options)


def test_a_service_of_a_balancer_has_an_address():
    with pytest.raises(vn.ConfigError, match=r"services: .*tcp:192"):
        vn.Net().load_balancer({"lan": "10.0.0.1/24"}, services="tcp:80")
