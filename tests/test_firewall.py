"""Firewalls: the language of their rules, what is refused, what passes, and changes while it runs."""

from __future__ import annotations

import ipaddress
import time

import pytest

import virtnet as vn
from helpers import BROADCAST, eventually, frame, mac, receive
from virtnet.firewalling import Addresses, parse_rules

RULES = """
pass proto arp
pass in proto udp from any to <servers> port 53, 8000-8010   # and comments
reject in proto tcp
pass out keep-state
"""


def udp(source: str, sport: int, destination: str, dport: int) -> bytes:
    """A UDP datagram in a frame."""
    ends = [ipaddress.ip_address(one) for one in (source, destination)]
    above = sport.to_bytes(2, "big") + dport.to_bytes(2, "big") + b"\0\x0c\0\0data"
    if ends[0].version == 6:
        header = b"\x60\0\0\0" + len(above).to_bytes(2, "big") + b"\x11\x40"
        kind = b"\x86\xdd"
    else:
        header = b"\x45\0" + (20 + len(above)).to_bytes(2, "big") + b"\0\0\0\0\x40\x11\0\0"
        kind = b"\x08\0"
    return mac(2) + mac(1) + kind + header + b"".join(end.packed for end in ends) + above


@pytest.fixture
def net():
    with vn.Net() as net:
        net.memory("vm") >> net.memory("uplink")
        yield net
        assert net.stats().balance().exact


def passes(net: vn.Net, sender: str, packet: bytes) -> bool:
    receiver = {"vm": "uplink", "uplink": "vm"}[sender]

    def judged() -> tuple[int, int]:
        stats = net.stats()
        return stats.ports[receiver].sent, sum(stats.drops.values())

    sent, drops = judged()
    net[sender].end.tx([packet])
    assert eventually(lambda: judged() != (sent, drops))
    if judged()[0] == sent:
        return False
    assert receive(net[receiver].end) == [packet]
    return True


def test_rules_are_followed_in_their_order_and_counted(net):
    firewall = net.firewall(RULES, at=net["vm"], sets={"servers": ["10.0.0.0/24", "2001:db8::1"]})
    assert passes(net, "uplink", udp("192.0.2.1", 9, "10.0.0.9", 53))
    assert passes(net, "uplink", udp("2001:db8::2", 9, "2001:db8::1", 8005))
    assert not passes(net, "uplink", udp("192.0.2.1", 9, "10.0.1.9", 53))
    assert passes(net, "vm", udp("10.0.0.9", 4000, "192.0.2.7", 123))
    assert passes(net, "uplink", udp("192.0.2.7", 123, "10.0.0.9", 4000))
    assert not passes(net, "uplink", udp("192.0.2.7", 124, "10.0.0.9", 4000))
    assert not passes(net, "uplink", frame(BROADCAST, mac(1)))
    counted = {rule.text: rule.packets for rule in firewall.rules}
    assert counted == {
        "pass proto arp": 0,
        "pass in proto udp from any to <servers> port 53, 8000-8010": 2,
        "reject in proto tcp": 0,
        "pass out keep-state": 2,
        "": 3,
    }
    detail = firewall.stats().detail
    assert (detail["states"], detail["created"], detail["known"]) == (1, 1, 1)
    assert firewall.stats().drops == {"filtered": 3}


def test_rules_and_sets_change_in_place_and_flows_stay(net, tmp_path):
    firewall = net.firewall("pass out keep-state", at=net["vm"])
    asked, answer = udp("10.0.0.9", 4000, "192.0.2.7", 123), udp("192.0.2.7", 123, "10.0.0.9", 4000)
    assert passes(net, "vm", asked)
    before = net.spec
    firewall.set(rules="drop from <bad>", sets={"bad": ["192.0.2.0/24"]}, default="pass")
    assert net.plan(before).changed == ("firewall",)
    assert net.plan(before).restarted == ()
    assert passes(net, "uplink", answer)
    assert not passes(net, "uplink", udp("192.0.2.7", 123, "10.0.0.9", 4001))
    firewall.discard("bad", "192.0.2.0/24")
    firewall.add("bad", "198.51.100.1", "2001:db8::/32")
    assert passes(net, "uplink", udp("192.0.2.7", 123, "10.0.0.9", 4001))
    assert not passes(net, "uplink", udp("198.51.100.1", 1, "10.0.0.9", 1))
    assert not passes(net, "uplink", udp("2001:db8:7::1", 1, "2001:db8::1", 1))
    # A capture beside it does not make it forget.
    firewall.set(rules="pass out keep-state", default="drop")
    with net.capture(net["vm"], tmp_path / "vm.pcap") as capture:
        assert passes(net, "uplink", answer)
        assert not passes(net, "uplink", udp("192.0.2.7", 123, "10.0.0.9", 4001))
        assert eventually(lambda: capture.packets == 1)
    assert passes(net, "uplink", answer)
    firewall.take_out()
    assert passes(net, "uplink", udp("192.0.2.7", 123, "10.0.0.9", 4001))


def test_who_is_rejected_is_told_so(net):
    net.firewall("reject in", at=net["vm"])
    net["uplink"].end.tx([udp("192.0.2.1", 9, "10.0.0.9", 53)])
    (told,) = receive(net["uplink"].end)
    assert told[:12] == mac(1) + mac(2)
    assert (told[23], told[34:36]) == (1, b"\3\3")


def test_filters_in_the_language_of_tcpdump_are_conditions(net):
    net.firewall('pass in match "udp[2:2] = 7 and net 10"\ndrop', at=net["vm"])
    assert passes(net, "uplink", udp("10.1.1.1", 9, "10.0.0.9", 7))
    assert not passes(net, "uplink", udp("10.1.1.1", 9, "10.0.0.9", 8))


def test_a_set_of_a_hundred_thousand_is_replaced_while_it_runs(net):
    firewall = net.firewall("", at=net["vm"])
    many = [str(ipaddress.ip_address(0x0A000000 + 2 * n)) for n in range(100_000)]
    began = time.monotonic()
    firewall.set(rules="pass from <many>", sets={"many": many})
    assert time.monotonic() - began < 30
    assert passes(net, "uplink", udp(many[-1], 1, "192.0.2.1", 1))
    assert not passes(net, "uplink", udp("10.0.0.1", 1, "192.0.2.1", 1))
    assert len(str(net.plan(vn.Spec()))) < 1000


def test_two_workers_share_a_firewall():
    with vn.Net(cpus=[0, 0]) as net:
        vm, uplink = net.memory("vm"), net.memory("uplink")
        vm >> uplink
        net.firewall("pass out keep-state", at=vm)
        for port in range(50):
            vm.end.tx([udp("10.0.0.9", port, "192.0.2.7", 123)])
        assert len(receive(uplink.end, 50)) == 50
        for port in range(60):
            uplink.end.tx([udp("192.0.2.7", 123, "10.0.0.9", port)])
        assert len(receive(vm.end, 50)) == 50
        assert eventually(lambda: net.stats().drops == {"filtered": 10})
        assert net.stats().balance().exact


def test_files_say_it_too():
    spec = vn.Spec.from_toml("""
        cables = [["vm", "fw"], ["fw", "up"]]
        ports.vm.port = "memory:vm"
        ports.up.port = "memory:up"
        [functions.fw]
        kind = "firewall"
        inside = "vm"
        rules = '''
        pass in proto tcp to <web> port 80 keep-state
        pass out keep-state
        '''
        sets.web = ["192.0.2.1", "2001:db8::/64"]
        timeouts.udp = 5
    """)
    assert vn.Spec.from_toml(spec.to_toml()) == spec
    net = vn.Net.of(spec)
    assert net.spec == spec
    with net:
        net["vm"].end.tx([udp("10.0.0.9", 1, "192.0.2.7", 123)])
        assert len(receive(net["up"].end)) == 1
        assert isinstance(net["fw"], vn.Firewall)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("\npas in", "line 2, column 1: expected pass, drop or reject (did you mean pass?)"),
        ("pass in prto tcp", "line 1, column 9: expected the end of the rule"),
        ("pass proto tpc", "line 1, column 12: expected a protocol"),
        ("pass proto 256", "line 1, column 12: expected a protocol"),
        ("pass from", "line 1, column 10: expected any, <set>, or an address, found 'the end of the line'"),
        (
            "pass from 10.0.0.1/8",
            "line 1, column 11: expected any, <set>, or an address ('10.0.0.1/8' is an address in",
        ),
        ("pass from <bad>", "line 1, column 11: expected the name of a set"),
        ("pass from 10.0.0.0/33", "line 1, column 11: expected any"),
        ("pass to any port 80", "line 1, column 18: expected ports with proto tcp"),
        ("pass proto tcp to any port 9-3", "line 1, column 28: expected ports up to 65535, the lower first"),
        ("pass proto tcp to any port x", "line 1, column 28: expected a port or a range"),
        ("pass from ! any", "line 1, column 13: expected addresses behind !"),
        ("drop keep-state", "line 1, column 6: expected keep-state with pass"),
        ("pass proto arp from any", "line 1, column 16: expected no addresses"),
        ('pass match "nonsense ("', "line 1, column 12: expected a packet filter"),
        ("pass match x", "line 1, column 12: expected a filter in quotation marks"),
        ("pass keep-state from any", "line 1, column 17: expected the end of the rule"),
    ],
)
def test_mistakes_are_told_by_line_and_column(rules, message):
    net = vn.Net()
    vm, uplink = net.memory("vm"), net.memory("uplink")
    vm >> uplink
    with pytest.raises(vn.ConfigError) as error:
        net.firewall(rules, at=vm, sets={"good": []})
    assert str(error.value).startswith(f"rules: {message}")
    assert [node.name for node in net] == ["vm", "uplink", "vm-uplink"]


def test_directions_need_an_inside_and_options_their_values():
    net = vn.Net()
    with pytest.raises(vn.ConfigError, match="line 1, column 6: expected no direction"):
        net.firewall("pass in")
    with pytest.raises(vn.ConfigError, match=r"sets\.bad: expected an address or a prefix.*'10.0.0'"):
        net.firewall("", sets={"bad": ["10.0.0"]})
    with pytest.raises(vn.ConfigError, match=r"timeouts: there is none called 'upd' \(did you mean udp\?\)"):
        net.firewall("", timeouts={"upd": 3})
    with pytest.raises(vn.ConfigError, match="default"):
        net.firewall("", default="maybe")
    with pytest.raises(vn.ConfigError, match="states"):
        net.firewall("", states=0)
    with pytest.raises(vn.ConfigError, match=r"^functions\.fw\.rules: line 1"):
        vn.Spec({}, {"fw": vn.FunctionSpec("firewall", {"rules": "x"})})


def test_what_is_read_is_what_is_written():
    (rule,) = parse_rules("pass in ip6 proto tcp,udp from ! <a> , 2001:db8::/32 to any port 1,2-3 keep-state", {"a"})
    assert (rule.version, rule.protocols, rule.keep_state, rule.direction) == (6, [6, 17], True, "in")
    assert (rule.source.negated, rule.source.sets, rule.source.addresses) == (True, ["a"], ["2001:db8::/32"])
    assert rule.destination.ports == [(1, 1), (2, 3)]
    assert Addresses(["10.0.0.0/8", "::1"]).packed == (b"\x0a\0\0\0\x08", bytes(15) + b"\x01\x80")
