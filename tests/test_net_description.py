"""A network before it runs: names, cables and changes are checked when they are made."""

from __future__ import annotations

import pytest

import virtnet as vn
from helpers import eventually


@pytest.fixture
def net():
    return vn.Net()


def test_arrows_plug_in_cables_whichever_way_they_point(net):
    vm1, vm2, switch = net.vhost_user("vm1.sock"), net.vhost_user("vm2.sock"), net.switch()
    vm1 >> switch << vm2
    assert net.cables == (("vm1", "switch"), ("switch", "vm2"))


def test_chains_read_as_they_are_cabled(net):
    a, b, c = net.switch(name="a"), net.switch(name="b"), net.switch(name="c")
    assert (a >> b >> c) is c
    assert (a << net.tap("tap0") << net.tap("tap1")) is a
    assert set(net.cables) == {("a", "b"), ("b", "c"), ("a", "tap0"), ("a", "tap1")}


def test_two_ports_are_joined_by_a_wire(net):
    net.vhost_user("vm1.sock") >> net.tap("tap0")
    assert net["vm1-tap0"].kind == "wire"
    assert net.cables == (("vm1", "vm1-tap0"), ("tap0", "vm1-tap0"))


def test_names_come_from_what_a_port_is(net):
    ports = [net.port(text) for text in ("vhost-user:/run/a.sock", "vhost-user:a.sock", "tap:tap0", "pcap:b.pcap")]
    assert [port.name for port in ports] == ["a", "a-2", "tap0", "b"]
    assert [node.name for node in net] == ["a", "a-2", "tap0", "b"]
    assert net["a"] is ports[0]
    assert "a-2" in net
    assert len(net) == 4


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda net: net.switch(name="sw"), "the name 'sw' is taken by a switch"),
        (lambda net: net.switch(name=""), "1 to 64 printable characters"),
        (lambda net: net.switch(name="a\nb"), "1 to 64 printable characters"),
        (lambda net: net.switch(ageing_s=0), "above 0"),
        (lambda net: net.source(size=5), "a frame has 14 to 65535 bytes, found 5"),
        (lambda net: net.source(rate_pps=0), "rate_pps is a number above 0"),
        (lambda net: net.source(rate_pps=float("nan")), "rate_pps is a number above 0"),
        (lambda net: net.source(count=-1), "count is a number from 0"),
        (lambda net: net["vm9"], "there is no node 'vm9'"),
        (lambda net: net.remove("vm9"), "there is no node 'vm9'"),
        (lambda net: net.unplug(net["vm1"], net["vm2"]), "there is no cable between 'vm1' and 'vm2'"),
        (lambda net: net["vm1"] >> net["sw"], "joined already"),
        (lambda net: net["vm1"] >> net.sink(), "takes one cable"),
        (lambda net: net["sw"] >> net["sw"], "joins two nodes"),
        (lambda net: net["vm2"] >> vn.Net().switch(), "belongs to another"),
        (lambda net: net.vhost_user("x", queue_pairs=0), "queue_pairs"),
        (lambda net: net["sw"].net.port("tap:"), "an interface's name"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(net, mistake, says):
    net.vhost_user("vm1.sock") >> net.switch(name="sw")
    net.vhost_user("vm2.sock")
    before = net.cables
    with pytest.raises(vn.ConfigError) as caught:
        mistake(net)
    assert says in str(caught.value)
    assert net.cables == before


def test_a_block_of_changes_is_made_whole_or_not_at_all(net):
    switch = net.switch()

    def half_a_change() -> None:
        with net.change():
            net.vhost_user("vm1.sock") >> switch
            net.vhost_user("vm2.sock", name="vm1")

    with pytest.raises(vn.ConfigError, match="taken"):
        half_a_change()
    assert [node.name for node in net] == ["switch"]
    assert net.cables == ()


def test_a_removed_node_takes_its_cables_along(net):
    port, switch = net.vhost_user("vm1.sock"), net.switch()
    port >> switch
    port.remove()
    assert net.cables == ()
    assert port.state == "removed"
    with pytest.raises(vn.ConfigError, match="there is no node 'vm1'"):
        port >> switch


def test_what_is_not_a_node_cannot_be_cabled(net):
    with pytest.raises(TypeError):
        net.switch() >> "vm1"


@pytest.mark.parametrize("options", [{"poll": "lazy"}, {"cpus": [-1]}, {"cpus": ["0"]}, {"cpus": [True]}])
def test_senseless_workers_are_refused(options):
    with pytest.raises(vn.ConfigError, match=r"poll|cpus"):
        vn.Net(**options)


def test_qemu_gets_the_other_end_of_the_port(net):
    args = net.vhost_user("/run/a,b.sock", queue_pairs=2).qemu_args(memory="1G", mac="52:54:00:00:00:07", packed=True)
    assert "socket,id=char0,path=/run/a,,b.sock,reconnect-ms=1000" in args
    assert "memory-backend-memfd,id=memory,size=1G,share=on" in args
    assert "vhost-user,id=net0,chardev=char0,queues=2" in args
    assert args[-1] == "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:07,mq=on,vectors=6,packed=on"
    assert str(args).startswith("-m 1G -object memory-backend-memfd")


def test_qemu_listens_where_the_port_connects(net):
    args = net.vhost_user("/run/a.sock", client=True).qemu_args()
    assert "socket,id=char0,path=/run/a.sock,server=on,wait=off" in args
    with pytest.raises(vn.ConfigError, match="QEMU attaches to vhost-user, stream and dgram ports"):
        net.tap("tap0").qemu_args()


@pytest.mark.parametrize(
    ("port", "netdev"),
    [
        ("stream:/run/a,,b", "stream,id=net0,server=off,reconnect-ms=1000,addr.type=unix,addr.path=/run/a,,b"),
        ("stream:[::1]:5000,client=on", "stream,id=net0,server=on,addr.type=inet,addr.host=::1,addr.port=5000"),
        (
            "dgram:/run/a,remote=/run/b",
            "dgram,id=net0,local.type=unix,local.path=/run/b,remote.type=unix,remote.path=/run/a",
        ),
    ],
)
def test_the_other_end_of_a_socket_is_a_netdev_of_qemu(port, netdev):
    args = vn.Net().port(port).qemu_args(mac="52:54:00:00:00:07")
    assert args == ["-netdev", netdev, "-device", "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:07"]


def test_representations_tell_the_state(net):
    port = net.vhost_user("vm1.sock")
    port >> net.switch()
    assert repr(net) == "<Net not running: 1 ports, 1 functions, 1 cables>"
    assert repr(port) == "<vhost-user 'vm1': not running>"
    assert "vhost-user:vm1.sock" in net._repr_html_()


def test_a_network_that_does_not_run_cannot_be_waited_for(net):
    with pytest.raises(vn.StateError, match="nobody can attach to 'vm1': it is not running"):
        net.vhost_user("vm1.sock").wait_connected(1)


def test_two_ports_that_are_joined_can_be_unplugged_and_joined_to_others() -> None:
    with vn.Net() as net:
        a, b = net.memory("a"), net.memory("b")
        a >> b
        net.unplug(b, a)
        with pytest.raises(vn.ConfigError, match="no cable between 'a' and 'b'"):
            net.unplug(a, b)
        a >> net.sink(name="end")
        b >> net.echo()
        a.end.tx([bytes(60)])
        assert eventually(lambda: net["end"].stats().consumed == 1)
