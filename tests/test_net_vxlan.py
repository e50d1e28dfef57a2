"""Linux at the other end of VXLAN, queues of taps and packet sockets, and ports in other network namespaces."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import virtnet as vn
from helpers import eventually, frame, mac, receive

pytestmark = pytest.mark.kernel

SCRIPT = Path(__file__).with_name("kernel_vxlan.py")


@pytest.fixture
def as_root():
    """Skips where namespaces and interfaces cannot be made."""
    missing = [name for name in ("ip", "unshare", "nsenter", "ping", "ethtool") if not shutil.which(name)]
    if os.geteuid() or missing or not Path("/dev/net/tun").exists():
        pytest.skip(f"needs root, /dev/net/tun and {missing or 'no more programs'}")
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here")


@pytest.fixture
def elsewhere(as_root):  # noqa: ARG001 - it may skip
    """A process that holds a network namespace."""
    program = ["unshare", "--net", "sh", "-c", "echo here; exec sleep 600"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "here\n"
        yield holder.pid
        holder.kill()


def ip(words: str, inside: int) -> str:
    command = ["nsenter", f"--net=/proc/{inside}/ns/net", "ip", *words.split()]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def veth(inside: int) -> None:
    ip("link add near type veth peer name far", inside)
    for name in ("near", "far"):
        ip(f"link set {name} addrgenmode none up", inside)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(("version", "source_ports"), [(4, 16), (4, 0), (6, 16)])
def test_linux_is_at_the_other_end_of_a_vxlan(version, source_ports):
    if not shutil.which("iperf3"):
        pytest.skip("needs iperf3")
    try:
        vxlan = subprocess.run(
            ["unshare", "--net", "ip", "link", "add", "x", "type", "vxlan", "id", "1", "dstport", "4789"],
            check=True,
            capture_output=True,
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel has no VXLAN: {error.stderr}")
    assert not vxlan.returncode
    command = [sys.executable, SCRIPT, "--ip", str(version), "--source-ports", str(source_ports)]
    done = subprocess.run(["unshare", "--net", *command], check=False, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "10 packets transmitted, 10 received" in told["pings"]
    assert "1 packets transmitted, 1 received" in told["longest"]
    # Whichever end closes first, some of the eight is on its way.
    assert told["there"] > 1 << 20
    assert told["back"] > 1 << 20
    port = told["ports"]["vxlan"]
    # The tap leaves segments to be done, which no datagram carries.
    assert port["segmented"] > 100
    assert told["balance"]["exact"], told
    assert port["detail"]["copies"] == port["sent"]


@pytest.mark.usefixtures("nothing_left")
def test_ports_open_in_another_namespace_and_nobody_moves(elsewhere):
    before = Path("/proc/self/ns/net").readlink()
    veth(elsewhere)
    with vn.Net() as net:
        tap = net.tap("vnx0", netns=f"pid:{elsewhere}")
        near = net.af_packet("near", netns=f"/proc/{elsewhere}/ns/net")
        switch = net.switch()
        tap >> switch << near
        with vn.AfPacketPort("far", netns=f"pid:{elsewhere}") as far:
            assert near.wait_connected(10)
            assert far.wait_connected(10)
            there = net.memory("there")
            there >> switch
            hello = frame(mac(1), mac(2), b"hello")
            there.end.tx([hello])
            # The host says something by its tap as well.
            assert eventually(lambda: hello in [bytes(one) for one in far.rx(0.2)], 10)
        assert "vnx0" in ip("-o link show dev vnx0", elsewhere)
        assert not Path("/sys/class/net/vnx0").exists()
        ip("link set near down", elsewhere)
        assert near.wait_event("link_down", 10)
        assert eventually(lambda: not near.connected)
        assert "down" in near.explain().state
        ip("link del near", elsewhere)
        assert near.wait_event("removed", 10)
        assert near.stats().last_error == "the interface is gone"
        ip("link del vnx0", elsewhere)
        assert tap.wait_event("removed", 10)
    assert Path("/proc/self/ns/net").readlink() == before


@pytest.mark.usefixtures("nothing_left")
def test_a_tap_has_as_many_queues_as_it_is_told(elsewhere):
    with vn.Net() as net:
        tap = net.tap("vnq0", queue_pairs=4, netns=f"pid:{elsewhere}")
        tap >> net.sink()
        assert tap.wait_connected(10)
        assert tap.stats().mtu == 1500
        queues = ip("-d -o link show dev vnq0", elsewhere)
        assert "multi_queue" in queues
        assert "numtxqueues" in queues
        ip("tuntap add dev vnq1 mode tap", elsewhere)
        with pytest.raises(vn.PortError, match="multi_queue"):
            vn.TapPort("vnq1", queue_pairs=2, netns=f"pid:{elsewhere}")


def datagram(flow: int, number: int) -> bytes:
    """A UDP datagram of one of several flows, numbered."""
    udp = bytes([0x10, flow, 0, 9, 0, 16, 0, 0])
    ip = bytes.fromhex("450000240000000040110000c6120001c6120002")
    return mac(2) + mac(1) + b"\x08\x00" + ip + udp + bytes([flow, number]) + bytes(26)


@pytest.mark.usefixtures("nothing_left")
def test_flows_of_a_packet_socket_are_spread_over_workers_and_keep_their_order(elsewhere):
    veth(elsewhere)
    netns = f"pid:{elsewhere}"
    with vn.Net(cpus=[0, 0]) as net:
        near, there = net.af_packet("near", queues=4, netns=netns), net.memory("there")
        near >> there
        with vn.AfPacketPort("far", queues=2, netns=netns) as far:
            assert near.wait_connected(10)
            assert far.wait_connected(10)
            assert far.spec == vn.PortSpec.parse(f"af-packet:far,queues=2,netns=pid:{elsewhere}")
            sent = [datagram(flow, number) for number in range(30) for flow in range(32)]
            arrived = []
            for start in range(0, len(sent), 64):
                some = sent[start : start + 64]
                assert far.tx(some) == len(some)
                arrived += receive(there.end, len(some))
            assert sorted(arrived) == sorted(sent)
            flows = defaultdict(list)
            for got in arrived:
                flows[got[42]].append(got[43])
            assert flows == {flow: list(range(30)) for flow in range(32)}
            # And back, by whichever worker has them.
            for start in range(0, len(sent), 64):
                some = sent[start : start + 64]
                assert there.end.tx(some) == len(some)
                assert len(receive(far, len(some))) == len(some)
            stats = net.stats()
    assert [worker.busy_breaths > 0 for worker in stats.workers] == [True, True]
    port = stats.ports["near"]
    assert (port.received, port.sent) == (len(sent), len(sent)), "nothing that was sent here is received here"
    assert not port.rx_drops
    assert stats.balance().exact
    assert stats.balance().in_transit == 0


#: Makes a group of its own with each of the first numbers, says so, and tries to join another whose number it is told.
STRANGER = """
import socket, struct, sys
HASH_WITHOUT_OUTGOING = 0x4000
def join(number):
    stranger = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    stranger.bind(("near", 3))
    stranger.setsockopt(263, 18, struct.pack("=HH", number, HASH_WITHOUT_OUTGOING))
    return stranger
groups = [join(number) for number in range(300)]
print("here", flush=True)
try:
    join(int(sys.stdin.readline()))
except OSError as error:
    print(error.strerror, flush=True)
else:
    print("joined", flush=True)
"""


def groups(inside: int) -> list[int]:
    """The fanout groups of the packet sockets in a namespace, a number for each socket."""
    command = ["nsenter", f"--net=/proc/{inside}/ns/net", "ss", "--packet", "--extended"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [int(number) for number in re.findall(r"fanout\(id:(\d+),type:hash", told)]


@pytest.mark.usefixtures("nothing_left")
def test_nobody_elses_packet_sockets_are_joined_and_nobody_joins(elsewhere):
    veth(elsewhere)
    command = ["nsenter", f"--net=/proc/{elsewhere}/ns/net", sys.executable, "-c", STRANGER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout
        assert stranger.stdout.readline() == "here\n"
        with vn.AfPacketPort("near", queues=3, netns=f"pid:{elsewhere}"):
            [(ours, sockets)] = [
                (group, n) for group, n in Counter(groups(elsewhere)).items() if group not in range(300)
            ]
            assert sockets == 3
            told, _ = stranger.communicate(f"{ours:d}\n", timeout=20)
        assert told == "No space left on device\n"
    assert not groups(elsewhere)
