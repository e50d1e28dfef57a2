"""Switches with options for their cables: what is written down, what is refused, what it does."""

from __future__ import annotations

import pytest

import virtnet as vn
from helpers import BROADCAST, eventually, frame, mac, receive

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def net():
    with vn.Net() as net:
        yield net
        assert net.stats().balance().exact


def tagged(vlan: int, packet: bytes) -> bytes:
    return packet[:12] + b"\x81\x00" + vlan.to_bytes(2, "big") + packet[12:]


def lab(net: vn.Net, n: int, **options) -> tuple[vn.Switch, list[vn.PortNode]]:
    nodes = [net.memory(f"vm{i}") for i in range(n)]
    switch = net.switch(name="sw", **options)
    for node in nodes:
        node >> switch
    return switch, nodes


def reached(nodes: list[vn.PortNode], sender: int, packet: bytes) -> dict[int, bytes]:
    """Who gets what of a packet."""
    nodes[sender].end.tx([packet])
    found = {}
    for i, node in enumerate(nodes):
        for got in node.end.rx(0.2):
            found[i] = bytes(got)
    return found


def test_access_cables_and_trunks(net):
    switch, nodes = lab(net, 4)
    switch.access(nodes[0], 10)
    switch.access("vm1", 20)
    switch.trunk(nodes[2], [10, "20-29"])
    switch.trunk(nodes[3], native=10)
    hello = frame(BROADCAST, mac(1), b"hello")
    assert reached(nodes, 0, hello) == {2: tagged(10, hello), 3: hello}
    assert reached(nodes, 1, hello) == {2: tagged(20, hello), 3: tagged(20, hello)}
    answer = frame(mac(1), mac(2), b"answer")
    assert reached(nodes, 2, tagged(20, answer)) == {1: answer}
    assert reached(nodes, 2, answer) == {}
    assert net.stats().functions["sw"].drops == {"vlan": 1}
    assert switch.stats().detail["entries"] == 3


def test_options_change_while_it_runs_and_the_table_stays(net):
    switch, nodes = lab(net, 3)
    switch.access(nodes[0], 10)
    switch.access(nodes[1], 10)
    nodes[0].end.tx([frame(BROADCAST, mac(1))])
    assert len(receive(nodes[1].end)) == 1
    before = net.spec
    switch.access(nodes[2], 10)
    assert net.plan(before).changed == ("sw",)
    assert net.plan(before).restarted == ()
    assert reached(nodes, 2, frame(mac(1), mac(3))) == {0: frame(mac(1), mac(3))}
    # A cable that is plugged in later is in VLAN 1, where there is nobody.
    late = net.memory("late")
    late >> switch
    assert reached([*nodes, late], 3, frame(BROADCAST, mac(4))) == {}
    switch.access(late, 10)
    assert sorted(reached([*nodes, late], 3, frame(BROADCAST, mac(4)))) == [0, 1, 2]


def test_a_cable_is_named_by_who_is_past_what_stands_in_it(net, tmp_path):
    switch, nodes = lab(net, 3)
    switch.access(nodes[0], 10)
    switch.access(nodes[1], 10)
    hello = frame(BROADCAST, mac(1))
    with net.capture(nodes[0], tmp_path / "vm0.pcap") as capture:
        assert reached(nodes, 0, hello) == {1: hello}
        assert eventually(lambda: capture.packets == 1)
    assert reached(nodes, 0, hello) == {1: hello}
    nodes[1].remove()
    assert "vm1" not in switch.spec.options["cables"]
    assert vn.Spec.from_toml(net.spec.to_toml()) == net.spec


def test_isolation_mirrors_limits_and_bonds(net):
    switch, nodes = lab(net, 4)
    switch.isolate(nodes[0], nodes[1])
    switch.mirror(nodes[0], nodes[3])
    hello = frame(BROADCAST, mac(1))
    assert sorted(reached(nodes, 0, hello)) == [2, 3]
    switch.mirror(nodes[0], None)
    assert sorted(reached(nodes, 0, hello)) == [2, 3]
    switch.cable(nodes[0], broadcast_pps=0)
    assert reached(nodes, 0, hello) == {}
    assert switch.stats().drops == {"storm": 1}
    switch.cable(nodes[2], bond="up")
    switch.cable(nodes[3], bond="up")
    assert len(reached(nodes, 1, hello)) == 1
    net["vm3"].remove()
    assert sorted(reached(nodes[:3], 1, hello)) == [2]


def test_a_station_that_flaps_is_reported(net):
    switch, nodes = lab(net, 3, loop_guard=2)
    for n in range(5):
        nodes[n % 2].end.tx([frame(BROADCAST, mac(1))])
        assert len(receive(nodes[2].end)) == (n < 4), n
    detail = switch.stats().detail
    assert (detail["moved"], detail["flaps"]) == (3, 1)
    assert detail["last_flap"] == {"vlan": 0, "mac": "02:00:00:00:00:01", "cable": "vm1"}
    assert switch.stats().drops == {"flapping": 1}


def test_files_say_it_too():
    spec = vn.Spec.from_toml("""
        cables = [["vm1", "sw"], ["up", "sw"], ["watch", "sw"]]
        ports.vm1.port = "memory:vm1"
        ports.up.port = "memory:up"
        ports.watch.port = "memory:watch"
        [functions.sw]
        kind = "switch"
        loop_guard = 5
        [functions.sw.cables.vm1]
        access = 10
        mirror = "watch"
        stations = ["10/02:00:00:00:00:01"]
        [functions.sw.cables.up]
        trunk = [10, "20-29"]
        native = 1
        broadcast_pps = 1000
    """)
    assert vn.Spec.from_toml(spec.to_toml()) == spec
    net = vn.Net.of(spec)
    assert net.spec == spec
    with net:
        net["up"].end.tx([tagged(10, frame(mac(1), mac(2)))])
        assert len(receive(net["vm1"].end)) == len(receive(net["watch"].end)) == 1


@pytest.mark.parametrize(
    ("tables", "place"),
    [
        ({"vm1": {"access": 0}}, "cables.vm1.access: expected a VLAN from 1 to 4094, found 0"),
        ({"vm1": {"access": True}}, "cables.vm1.access: expected a VLAN"),
        ({"vm1": {"trunk": ["9-3"]}}, "cables.vm1.trunk: VLANs are 1 to 4094, the lower first, found '9-3'"),
        ({"vm1": {"trunk": ["x"]}}, "cables.vm1.trunk: expected a VLAN, a range"),
        ({"vm1": {"trunk": [1], "access": 1}}, "cables.vm1: a cable has an access VLAN, or is a trunk"),
        ({"vm1": {"native": 1}}, "cables.vm1.native: a trunk has a native VLAN"),
        ({"vm1": {"acces": 1}}, "cables.vm1.acces: a cable has no such option (did you mean access?)"),
        ({"vm1": {"mirror": "vm1"}}, "cables.vm1.mirror: expected another cable"),
        ({"vm1": {"stations": ["01:00:00:00:00:01"]}}, "cables.vm1.stations: '01:00:00:00:00:01' is not the address"),
        ({"vm1": {"stations": ["5/02:00:00:00:00:01"]}}, "cables.vm1.stations: expected a station without a VLAN"),
    ],
)
def test_mistakes_are_told_with_their_place(tables, place):
    net = vn.Net()
    with pytest.raises(vn.ConfigError) as error:
        net.switch(cables=tables)
    assert str(error.value).startswith(place)
    with pytest.raises(vn.ConfigError) as error:
        vn.Spec({"vm1": vn.PortSpec.parse("memory:vm1")}, {"sw": vn.FunctionSpec("switch", {"cables": tables})})
    assert str(error.value).startswith(f"functions.sw.{place}")
    switch = net.switch(name="sw")
    with pytest.raises(vn.ConfigError):
        switch.cable("vm1", **tables["vm1"])
    assert switch.spec.options["cables"] == {}


def test_a_far_end_that_is_not_there_is_an_error_in_a_spec():
    switch = vn.FunctionSpec("switch", {"cables": {"vm2": {"access": 1}}})
    with pytest.raises(vn.ConfigError, match=r"^functions\.sw\.cables\.vm2: there is no 'vm2' \(did you mean vm1\?\)"):
        vn.Spec({"vm1": vn.PortSpec.parse("memory:vm1")}, {"sw": switch})


def test_two_workers_tell_vlans_apart():
    with vn.Net(cpus=[0, 0]) as net:
        switch, nodes = lab(net, 3)
        switch.access(nodes[0], 10)
        switch.access(nodes[1], 10)
        hello = frame(BROADCAST, mac(1))
        nodes[0].end.tx([hello])
        assert receive(nodes[1].end) == [hello]
        nodes[1].end.tx([frame(mac(1), mac(2))])
        assert receive(nodes[0].end) == [frame(mac(1), mac(2))]
        assert len(nodes[2].end.rx(0.1)) == 0
