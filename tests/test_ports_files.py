"""pcap files and taps: what other programs read and write arrives, and the other way round."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.utils import rdpcap, wrpcap

import virtnet as vn
from helpers import eventually, frame, mac, receive

PACKETS = [bytes(Ether(dst="52:54:00:00:00:02", src="52:54:00:00:00:01") / IP() / UDP(dport=i)) for i in range(1, 101)]


def test_what_is_sent_is_written_as_scapy_reads_it(tmp_path):
    with vn.PcapPort(tmp_path / "out.pcap") as port:
        assert port.tx(PACKETS) == 100
    assert [bytes(packet) for packet in rdpcap(str(tmp_path / "out.pcap"))] == PACKETS


def test_what_scapy_wrote_is_received(tmp_path):
    wrpcap(str(tmp_path / "in.pcap"), [Ether(packet) for packet in PACKETS])
    with vn.PcapPort(tmp_path / "in.pcap", mode="read") as port:
        assert receive(port, 100) == PACKETS
        assert len(port.rx(0.05)) == 0


def test_a_capture_can_be_read_again_and_again(tmp_path):
    wrpcap(str(tmp_path / "in.pcap"), [Ether(packet) for packet in PACKETS])
    with vn.PcapPort(tmp_path / "in.pcap", mode="read", loop=True) as port:
        assert receive(port, 250)[:250] == (PACKETS * 3)[:250]


def test_a_file_is_not_written_over_unless_asked(tmp_path):
    path = tmp_path / "out.pcap"
    path.write_bytes(b"precious")
    with pytest.raises(vn.ConfigError, match="overwrite=on"):
        vn.PcapPort(path)
    assert path.read_bytes() == b"precious"
    with vn.PcapPort(path, overwrite=True) as port:
        port.tx(PACKETS[:1])
    assert len(rdpcap(str(path))) == 1


@pytest.mark.parametrize("content", [b"", b"no capture at all, but long enough for a header", bytes(24)])
def test_what_is_no_capture_is_refused(tmp_path, content):
    path = tmp_path / "in.pcap"
    path.write_bytes(content)
    with pytest.raises(vn.VirtnetError, match=r"in\.pcap"):
        vn.PcapPort(path, mode="read")


def test_a_missing_capture_is_named(tmp_path):
    with pytest.raises(vn.PortError, match="missing") as caught:
        vn.PcapPort(tmp_path / "missing.pcap", mode="read")
    assert isinstance(caught.value, OSError)


def test_a_network_records_and_replays(tmp_path):
    wrpcap(str(tmp_path / "in.pcap"), [Ether(packet) for packet in PACKETS])
    with vn.Net() as net:
        net.pcap(tmp_path / "in.pcap", mode="read") >> net.pcap(tmp_path / "out.pcap")
        assert eventually(lambda: net["out"].stats().sent == 100)
        assert net.stats().balance().exact
    assert [bytes(packet) for packet in rdpcap(str(tmp_path / "out.pcap"))] == PACKETS


@pytest.fixture
def tap_name():
    if os.geteuid() or not Path("/dev/net/tun").exists():
        pytest.skip("makes a tap: needs root and /dev/net/tun")
    return f"vn{os.getpid() % 100_000}t"


@contextlib.contextmanager
def listening(interface: str):
    """The kernel's side of a tap, up and heard by a packet socket."""
    subprocess.run(["ip", "link", "set", interface, "up"], check=True)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as heard:
        heard.bind((interface, 0x88B5))
        heard.settimeout(5)
        yield heard


@pytest.mark.kernel
def test_a_tap_carries_packets_both_ways(tap_name):
    with vn.TapPort(tap_name) as port, listening(tap_name) as kernel:
        assert port.tx([frame(mac(2), mac(1), b"to the kernel")]) == 1
        assert kernel.recv(2048) == frame(mac(2), mac(1), b"to the kernel")
        kernel.send(frame(mac(1), mac(2), b"from the kernel"))
        assert eventually(lambda: any(b"from the kernel" in one for one in receive(port, 1, 0.2)))


@pytest.mark.kernel
def test_a_tap_takes_its_mtu_and_goes_with_its_port(tap_name):
    with vn.TapPort(tap_name, mtu=9000):
        assert Path(f"/sys/class/net/{tap_name}/mtu").read_text().strip() == "9000"
    assert eventually(lambda: not Path(f"/sys/class/net/{tap_name}").exists())


@pytest.mark.kernel
def test_a_network_joins_a_tap_and_a_driver(tap_name, sockets):
    with vn.Net() as net:
        net.tap(tap_name) >> net.switch() << net.vhost_user(sockets / "vm")
        with vn.VirtioUserPort(sockets / "vm") as vm, listening(tap_name) as kernel:
            assert vm.wait_connected(5)
            vm.tx([frame(mac(2), mac(1), b"hello")])
            assert kernel.recv(2048) == frame(mac(2), mac(1), b"hello")
        assert net.stats().balance().exact
