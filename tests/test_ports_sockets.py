"""Ports on sockets by hand and in networks: VXLAN, datagrams, connections; and iterables."""

from __future__ import annotations

import socket
import struct
import threading

import pytest

import virtnet as vn
from helpers import BROADCAST, eventually, frame, mac, receive

HELLO = frame(mac(2), mac(1), b"hello")


def free(kind: socket.SocketKind = socket.SOCK_DGRAM) -> str:
    with socket.socket(socket.AF_INET, kind) as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


@pytest.mark.usefixtures("nothing_left")
def test_a_vxlan_by_hand_speaks_the_rfc():
    local = free()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
        far.bind(("127.0.0.1", 0))
        far.settimeout(5)
        remote = f"127.0.0.1:{far.getsockname()[1]}"
        with vn.VxlanPort(local, vni=0x123456, remotes=[remote]) as port:
            assert port.connected
            assert port.tx([HELLO]) == 1
            assert far.recv(2000) == bytes.fromhex("0800000012345600") + HELLO
            far.sendto(bytes.fromhex("0800000012345700") + HELLO, address(local))
            far.sendto(bytes.fromhex("0800000012345600") + HELLO, address(local))
            assert receive(port) == [HELLO]
            stats = port.stats()
            assert stats.rx_drops == {"wrong_vni": 1}
            assert stats.detail == {"copies": 1, "copies_lost": 0, "stations": 0}
            assert "detail" in stats.to_dict()
    with pytest.raises(vn.PortError, match="no interface of this host has the address"):
        vn.VxlanPort("192.0.2.77", vni=1, remotes=["192.0.2.78"])
    with pytest.raises(vn.ConfigError, match="same version of IP"):
        vn.VxlanPort(local, vni=1, remotes=["::1"])
    with pytest.raises(vn.ConfigError, match="1 to 64"):
        vn.VxlanPort(local, vni=1)


@pytest.mark.usefixtures("nothing_left")
def test_networks_joined_by_vxlan_forward_what_is_left_undone_complete():
    ends = [free(), free()]
    with vn.Net() as one, vn.Net() as other:
        a, b = one.memory("a"), other.memory("b")
        a >> one.switch() << one.vxlan(ends[0], vni=7, remotes=[ends[1]])
        b >> other.switch() << other.vxlan(ends[1], vni=7, remotes=[ends[0]])
        a.end.tx([frame(BROADCAST, mac(1), b"to all")])
        assert receive(b.end) == [frame(BROADCAST, mac(1), b"to all")]
        b.end.tx([frame(mac(1), mac(2), b"back")])
        assert receive(a.end) == [frame(mac(1), mac(2), b"back")]
        assert one["vxlan7"].stats().sent == 1
        assert eventually(lambda: one.stats().balance().exact and other.stats().balance().exact)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("over", ["unix", "inet"])
def test_two_networks_are_joined_by_datagrams(sockets, over):
    ends = [str(sockets / "a"), str(sockets / "b")] if over == "unix" else [free(), free()]
    with vn.Net() as one:
        a = one.memory("a")
        a >> one.dgram(ends[0], remote=ends[1], name="out")
        a.end.tx([HELLO])
        assert eventually(lambda: one.stats().balance().exact and one["out"].stats().sent + a.stats().received > 0)
        with vn.Net() as other:
            b = other.memory("b")
            b >> other.dgram(ends[1], remote=ends[0], name="out")
            for end, far in ((a.end, b.end), (b.end, a.end)):
                packets = [frame(mac(2), mac(1), b"%d" % i) for i in range(200)]
                assert end.tx(packets) == 200
                assert receive(far, 200) == packets
            assert other["out"].connected
        if over == "unix":
            a.end.tx([HELLO])
            assert one["out"].wait_event("nobody", 5)
            assert not one["out"].connected
            assert "Nobody receives at" in str(one["out"].explain())


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("over", ["unix", "inet"])
def test_connections_are_found_again_and_frames_are_whole(sockets, over):
    where = str(sockets / "s") if over == "unix" else free(socket.SOCK_STREAM)
    with vn.Net() as net:
        here = net.memory("here")
        here >> net.stream(where, client=True, name="out")
        assert net["out"].wait_event("nobody", 5)
        assert "tried again" in str(net["out"].explain())
        for sessions in (1, 2):
            with vn.StreamPort(where) as far:
                assert far.wait_connected(5)
                assert net["out"].wait_connected(5)
                assert far.tx([HELLO]) == 1
                assert receive(here.end) == [HELLO]
                big = [frame(mac(2), mac(1), bytes(9000 + i)) for i in range(50)]
                sent = 0
                got: list[bytes] = []
                while sent < len(big):
                    sent += here.end.tx(big[sent:])
                    got += receive(far, 1)
                got += receive(far, len(big) - len(got))
                assert got == big
            assert net["out"].wait_event("disconnected", 5)
            assert net["out"].stats().sessions == sessions
        assert eventually(lambda: net.stats().balance().exact)


@pytest.mark.usefixtures("nothing_left")
def test_a_peer_that_speaks_of_something_else_is_sent_away(sockets):
    with vn.StreamPort(sockets / "s") as port, socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(5)
        peer.connect(str(sockets / "s"))
        assert port.wait_connected(5)
        peer.sendall(struct.pack("!I", len(HELLO)) + HELLO + b"GET / HTTP/1.1\r\n\r\n")
        assert receive(port) == [HELLO]
        port.rx(0.1)
        assert peer.recv(1) == b""
        assert not port.connected
        assert "a frame of 1195725856 bytes" in str(port.stats().last_error)
        assert port.wait_event("disconnected", 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vxlan:10.0.0.1", "needs vni=...: a whole number from 0 to 16777215"),
        ("vxlan:eth0,vni=1", "an IP address of this host was expected"),
        ("vxlan:10.0.0.1:0,vni=1", "an IP address of this host was expected"),
        ("vxlan:10.0.0.1,vni=16777216", "from 0 to 16777215"),
        ("vxlan:10.0.0.1,vni=1,remotes=host", "IP addresses joined by +"),
        ("vxlan:10.0.0.1,vni=1,remotes=" + "+".join(["10.0.0.2"] * 65), "at most 64"),
        ("dgram:/tmp/a", "needs remote=..."),
        ("dgram:127.0.0.1:5000,remote=localhost:5001", "an IP address and a port"),
        ("stream:localhost:5000", "names are not looked up"),
        ("stream:" + "x" * 108, "at most 107 bytes"),
        ("tap:tap0,netns=", "a network namespace"),
        ("tap:tap0,netns=..", "a network namespace"),
        ("tap:tap0,netns=pid:x", "a network namespace"),
    ],
)
def test_what_cannot_be_is_answered_with_what_was_expected(text, says):
    with pytest.raises(vn.ConfigError) as caught:
        vn.PortSpec.parse(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("vxlan:10.0.0.1,vni=1,remotes=10.0.0.2+10.0.0.3:4790", {"vni": 1, "remotes": ("10.0.0.2", "10.0.0.3:4790")}),
        ("vxlan:[fd00::1]:4790,vni=0,remotes=fd00::2+[fd00::3]:1", {"remotes": ("fd00::2", "[fd00::3]:1")}),
        ("stream:[::1]:5000,client=on", {"client": True}),
        ("stream:vm1.sock,netns=/proc/1/ns/net", {"netns": "/proc/1/ns/net"}),
        ("dgram:127.0.0.1:1,remote=127.0.0.1:2,netns=pid:7", {"remote": "127.0.0.1:2", "netns": "pid:7"}),
    ],
)
def test_ports_on_sockets_are_written_as_they_are_read(text, options):
    spec = vn.PortSpec.parse(text)
    assert {name: spec.options[name] for name in options} == options
    assert str(spec) == text
    net = vn.Spec({"p": spec})
    assert vn.Spec.from_toml(net.to_toml()) == net


def test_a_file_may_list_remotes_and_has_to_say_the_number():
    wanted = vn.PortSpec.of("vxlan", "10.0.0.1", vni=5, remotes=["10.0.0.2", "10.0.0.3"])
    text = '[ports.out]\nkind = "vxlan"\nwhere = "10.0.0.1"\nremotes = ["10.0.0.2", "10.0.0.3"]\n'
    assert vn.Spec.from_toml(text + "vni = 5\n").ports["out"] == wanted
    with pytest.raises(vn.ConfigError, match=r"ports\.out.*vni"):
        vn.Spec.from_toml(text)


@pytest.mark.usefixtures("nothing_left")
def test_a_namespace_that_is_not_there_is_named():
    for kind in (
        "tap:x",
        "af-packet:x",
        "vxlan:10.0.0.1,vni=1,remotes=10.0.0.2",
        "dgram:127.0.0.1:9,remote=127.0.0.1:8",
    ):
        with pytest.raises(vn.PortError, match="/run/netns/no-such-place"):
            vn.open_port(f"{kind},netns=no-such-place")


def packets(n: int) -> list[bytes]:
    return [frame(mac(2), mac(1), b"%d" % i) for i in range(n)]


@pytest.mark.usefixtures("nothing_left")
def test_an_iterable_is_played_in_order_however_slowly_it_is_taken():
    net = vn.Net()
    player = net.iterable(iter(packets(3000)), capacity=16)
    there = net.memory("there", capacity=65536)
    with net:
        assert not player.done
        assert player.played == 0, "nobody would get it"
        player >> there
        assert player.wait(20)
        assert receive(there.end, 3000) == packets(3000)
        assert (player.played, player.error) == (3000, None)
        assert "at its end" in player.state
        assert eventually(lambda: net.stats().balance().exact)


@pytest.mark.usefixtures("nothing_left")
def test_what_an_iterable_raises_is_told_and_the_network_goes_on(caplog):
    def broken():
        yield HELLO
        yield vn.Burst([HELLO, HELLO])
        raise ZeroDivisionError("no more")

    with vn.Net() as net:
        there = net.memory("there")
        player = net.iterable(broken(), name="player")
        player >> there
        with pytest.raises(ZeroDivisionError):
            player.wait(10)
        assert receive(there.end, 3) == [HELLO] * 3
        assert "ZeroDivisionError: no more" in player.state
        assert "the iterable of 'player' raised" in caplog.text
        player.remove()
        bad = net.iterable([b""], name="bad")
        bad >> net.sink()
        with pytest.raises(vn.ConfigError):
            bad.wait(10)


@pytest.mark.usefixtures("nothing_left")
def test_an_endless_iterable_ends_with_its_port_or_its_network():
    closed = []

    def endless():
        try:
            while True:
                yield HELLO
        finally:
            closed.append(threading.current_thread().name)

    with vn.Net() as net:
        sink = net.sink()
        first, second = net.iterable(endless()), net.iterable(endless())
        first >> sink
        second >> sink
        assert eventually(lambda: first.played > 100 and second.played > 100)
        first.remove()
        assert first.wait(5)
    assert second.done
    assert len(closed) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("virtnet-iter")]
