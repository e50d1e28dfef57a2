"""Linux at the other end of VXLAN, queues of taps, and ports in other network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import virtnet as vn
from helpers import eventually, frame, mac

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
    ip("link add near type veth peer name far", elsewhere)
    for name in ("near", "far"):
        ip(f"link set {name} addrgenmode none up", elsewhere)
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
