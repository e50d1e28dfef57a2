"""Captures as the programs of the field read them: tshark, capinfos and tcpdump, from files and live from pipes."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import virtnet as vn
from helpers import eventually, mac, receive

pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("readers", "nothing_left")]


@pytest.fixture(scope="module")
def readers() -> None:
    """The programs are there."""
    missing = [name for name in ("tshark", "capinfos", "tcpdump") if shutil.which(name) is None]
    if missing:
        says = pytest.fail if os.environ.get("VIRTNET_REQUIRE_PEERS") else pytest.skip
        says(f"{' and '.join(missing)} not found: make peers installs them")


def udp(port: int, size: int = 60) -> bytes:
    n = size - 14
    packet = struct.pack(
        ">BBHHHBBH4s4sHHHH", 0x45, 0, n, 0, 0, 64, 17, 0, b"\x0a\0\0\1", b"\x0a\0\0\2", 7, port, n - 20, 0
    )
    return (mac(2) + mac(1) + b"\x08\x00" + packet).ljust(size, b"\0")


def tool(*arguments: str, given: bytes | None = None) -> str:
    done = subprocess.run(arguments, input=given, capture_output=True, timeout=60, check=True)
    return done.stdout.decode()


@pytest.fixture
def net():
    with vn.Net() as net:
        net.memory("vm1") >> net.switch(name="sw") << net.memory("vm2")
        yield net


def send(net: vn.Net, frames: list[bytes]) -> None:
    net["vm1"].end.tx(frames)
    assert len(receive(net["vm2"].end, len(frames))) == len(frames)


def test_tshark_and_capinfos_read_names_filters_and_counts(net, tmp_path):
    path = tmp_path / "out.pcapng"
    with net.capture(net["vm1"], path, filter="udp port 53") as capture:
        send(net, [udp(53), udp(54), udp(53, 1400)])
        assert eventually(lambda: capture.packets == 2)
    fields = ["-e", "frame.interface_name", "-e", "udp.dstport", "-e", "frame.len", "-e", "frame.time_epoch"]
    rows = [row.split("\t") for row in tool("tshark", "-n", "-r", str(path), "-T", "fields", *fields).splitlines()]
    assert [row[:3] for row in rows] == [["vm1", "53", "60"], ["vm1", "53", "1400"]]
    assert len(rows[0][3].partition(".")[2].rstrip("0")) > 6  # nanoseconds
    assert float(rows[0][3]) <= float(rows[1][3])
    info = tool("capinfos", str(path))
    assert "Name = vm1" in info
    assert "Filter string = udp port 53" in info
    assert "Number of packets = 2" in info
    assert "Number of stat entries = 1" in info
    assert f"Capture application: virtnet {vn.__version__}" in info.replace("  ", " ")


def reply(net: vn.Net) -> None:
    net["vm2"].end.tx([mac(1) + mac(2) + udp(7)[12:]])
    assert len(receive(net["vm1"].end)) == 1


FIELDS = ["-T", "fields", "-e", "frame.interface_name", "-e", "frame.packet_flags_direction", "-e", "udp.dstport"]


def test_tshark_and_capinfos_read_places_directions_and_counts_of_each(net, tmp_path):
    path = tmp_path / "out.pcapng"
    with net.capture(["vm1", ("vm2", "sw")], path, filter=["", "udp port 53"]) as capture:
        send(net, [udp(53), udp(54)])
        reply(net)
        assert eventually(lambda: capture.packets == 4)
    rows = [row.split("\t") for row in tool("tshark", "-n", "-r", str(path), *FIELDS).splitlines()]
    # 1 is inbound, 2 outbound.
    assert rows == [
        ["vm1", "0x00000001", "53"],
        ["vm1", "0x00000001", "54"],
        ["vm2-sw", "0x00000002", "53"],
        ["vm1", "0x00000002", "7"],
    ]
    found = tool("tshark", "-n", "-r", str(path), "-Y", "frame.packet_flags_direction == 2", *FIELDS)
    assert len(found.splitlines()) == 2
    info = tool("capinfos", str(path))
    assert "Number of interfaces in file: 2" in info
    assert "Name = vm1" in info
    assert "Name = vm2-sw" in info
    assert "Filter string = udp port 53" in info
    assert "Number of packets = 3" in info
    assert "Number of packets = 1" in info
    assert info.count("Number of stat entries = 1") == 2


def test_directions_are_those_that_tcpdump_sees_at_a_guests_tap(tmp_path):
    """What a guest sends is inbound to `tcpdump -i tap0` on its host, and what the host sends to it outbound."""
    if subprocess.run(["unshare", "--net", "test", "-w", "/dev/net/tun"], check=False).returncode:
        pytest.skip("makes a tap in a network namespace: needs root")
    program = Path(__file__).with_name("tap_directions.py")
    tool("unshare", "--net", sys.executable, str(program), str(tmp_path))
    rows = tool("tshark", "-n", "-r", str(tmp_path / "ours.pcapng"), *FIELDS).splitlines()
    assert rows == ["guest\t0x00000001\t53"] * 3 + ["guest\t0x00000002\t54"] * 2
    for way, ports in (("in", ["53"] * 3), ("out", ["54"] * 2)):
        found = tool("tshark", "-n", "-r", str(tmp_path / f"{way}.pcap"), "-T", "fields", "-e", "udp.dstport")
        assert found.split() == ports, way


def test_tcpdump_reads_both_forms(net, tmp_path):
    for suffix in ("pcap", "pcapng"):
        path = tmp_path / f"out.{suffix}"
        with net.capture(net["vm1"], path) as capture:
            send(net, [udp(4711)] * 3)
            assert eventually(lambda: capture.packets == 3)
        assert tool("tcpdump", "-nn", "-r", str(path)).count("10.0.0.1.7 > 10.0.0.2.4711: UDP") == 3


def test_tshark_sees_packets_while_they_pass(net):
    """Through a pipe, as Wireshark does it: `virtnet capture lab vm1 - | wireshark -k -i -`."""
    with subprocess.Popen(
        ["tshark", "-n", "-l", "-i", "-", "-T", "fields", "-e", "udp.dstport"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as shark:
        capture = net.capture(net["vm1"], shark.stdin)
        shark.stdin.close()
        for port in (53, 54, 55):
            send(net, [udp(port)])
            assert int(shark.stdout.readline()) == port  # not at the end: now
        shark.terminate()
        assert capture.wait(20)
        assert capture.why == "its reader has left"
        capture.stop()
    send(net, [udp(56)])


def test_tshark_sees_several_places_live(net):
    """`virtnet capture lab vm1 vm2 - | tshark -i -`."""
    with subprocess.Popen(
        ["tshark", "-n", "-l", "-i", "-", *FIELDS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as shark:
        capture = net.capture(["vm1", "vm2"], shark.stdin)
        shark.stdin.close()
        for port in (53, 54):
            send(net, [udp(port)])
            rows = [shark.stdout.readline().decode().split("\t") for _ in range(2)]
            assert [row[1:] for row in rows] == [["0x00000001", f"{port}\n"], ["0x00000002", f"{port}\n"]]
        shark.terminate()
        assert capture.wait(20)
        capture.stop()


def test_the_command_line_feeds_a_fifo_and_tshark_counts_what_was_dropped(tmp_path, sockets):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    name = str(sockets / "lab.sock")
    out = tmp_path / "copy.pcapng"
    with vn.Net(name=name) as net:
        net.memory("vm1") >> net.switch(name="sw") << net.memory("vm2")
        with out.open("wb") as copy, subprocess.Popen(["cat", str(fifo)], stdout=copy) as reader:
            taking = subprocess.Popen(
                [sys.executable, "-m", "virtnet", "capture", name, "vm1", str(fifo), "--seconds", "2"],
                stderr=subprocess.PIPE,
                text=True,
            )
            assert eventually(lambda: "capture" in net.stats().ports, 20)
            send(net, [udp(53)] * 50)
            _, said = taking.communicate(timeout=30)
            assert said == f"capturing at vm1 into {fifo}; Ctrl-C ends it\n50 packets captured\n"
            assert reader.wait(20) == 0
        stats = json.loads(
            subprocess.run(
                [sys.executable, "-m", "virtnet", "stats", name, "--json"], capture_output=True, text=True, check=True
            ).stdout
        )
        assert stats["balance"]["exact"]
    assert tool("tshark", "-n", "-r", str(out), "-T", "fields", "-e", "udp.dstport").split() == ["53"] * 50
    assert "Number of stat entries = 1" in tool("capinfos", str(out))
