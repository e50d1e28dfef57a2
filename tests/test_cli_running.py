"""The command line at work: networks run, end when asked, and report one object that adds up."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from scapy.utils import rdpcap

import virtnet as vn
from helpers import eventually, frame, mac, receive
from virtnet.cli.running import Meter

if TYPE_CHECKING:
    from collections.abc import Iterator

VIRTNET = [sys.executable, "-m", "virtnet"]


class Command:
    """One command that runs with ``--json``."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*VIRTNET, *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self, number: int = signal.SIGINT) -> dict[str, Any]:
        """Ends it as Ctrl-C does; its final object."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        assert self.process.returncode == 0, err
        assert out.count("\n") == 1
        return json.loads(out)


@contextmanager
def command(*arguments: str) -> Iterator[Command]:
    running = Command(*arguments)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()


@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_switch_reports_what_passed_each_port(sockets, ring, number):
    with command("switch", f"vhost-user:{sockets}/vm1", f"vhost-user:{sockets}/vm2,queue_pairs=2") as running:
        assert eventually((sockets / "vm2").exists, 10)
        with (
            vn.VirtioUserPort(sockets / "vm1", ring=ring) as a,
            vn.VirtioUserPort(sockets / "vm2", ring=ring) as b,
        ):
            assert a.wait_connected(5)
            assert b.wait_connected(5)
            assert a.tx([frame(mac(2), mac(1))] * 10) == 10
            assert len(receive(b, 10)) == 10
            time.sleep(0.4)
        report = running.end(number)
    vm1, vm2 = report["ports"]["vm1"], report["ports"]["vm2"]
    assert (vm1["received"], vm1["sent"], vm1["drops"]) == (10, 0, {})
    assert (vm2["received"], vm2["sent"], vm2["sent_bytes"]) == (0, 10, 600)
    assert vm1["ring"] == vm2["ring"] == ring
    assert {"version_1", "mrg_rxbuf"} <= set(vm1["features"])
    assert report["balance"]["exact"]
    assert report["command"] == "switch"


def test_a_source_fills_a_sink_across_two_processes(sockets):
    with command("sink", f"vhost-user:{sockets}/a", "--copy", "--poll", "interrupt") as sink:
        assert eventually((sockets / "a").exists, 10)
        arguments = ["--size", "200", "--count", "5000", "--rate", "50000", "--seconds", "5", "--cpu", "0"]
        with command("source", f"virtio-user:{sockets}/a,ring=packed", *arguments) as source:
            assert eventually(lambda: source.process.poll() is not None, 20)
            sent = source.end()
        received = sink.end()
    assert sent["functions"]["source"]["generated"] == sent["ports"]["a"]["sent"] + sum(
        sent["ports"]["a"]["drops"].values()
    )
    assert received["ports"]["a"]["received"] == sent["ports"]["a"]["sent"]
    assert received["ports"]["a"]["received_bytes"] == 200 * sent["ports"]["a"]["sent"]
    assert received["functions"]["sink"]["consumed"] == received["ports"]["a"]["received"]
    assert received["ports"]["a"]["ring"] == "packed"
    assert received["balance"]["exact"]
    assert sent["balance"]["exact"]


def test_a_wire_and_an_echo_are_where_packets_turn(sockets):
    with (
        command("echo", f"vhost-user:{sockets}/a") as echo,
        command("wire", f"virtio-user:{sockets}/a", f"vhost-user:{sockets}/b") as wire,
    ):
        assert eventually((sockets / "b").exists, 10)
        with vn.VirtioUserPort(sockets / "b") as driver:
            assert driver.wait_connected(5)

            def turned() -> bool:
                driver.tx([frame(mac(2), mac(1))])
                return frame(mac(1), mac(2)) in receive(driver, 1, 0.2)

            assert eventually(turned, 10)
        assert wire.end()["balance"]["exact"]
        assert echo.end()["balance"]["exact"]


def test_a_capture_is_copied_and_the_table_says_so(tmp_path):
    frames = [bytes([i]) * 60 for i in range(20)]
    with vn.PcapPort(tmp_path / "in.pcap") as port:
        port.tx(frames)
    done = subprocess.run(
        [*VIRTNET, "wire", f"pcap:{tmp_path}/in.pcap,mode=read", f"pcap:{tmp_path}/out.pcap", "--seconds", "0.5"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert [bytes(packet) for packet in rdpcap(str(tmp_path / "out.pcap"))] == frames
    assert "20 received = 20 sent" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["switch", "vhost-user:{sockets}/live"], "in use"),
        (["switch", "vhost-user:{sockets}/missing/a"], "there is no directory"),
        (["sink", "pcap:{sockets}/none.pcap,mode=read"], "none.pcap"),
        (["probe", "{sockets}/nobody"], "nobody"),
    ],
)
def test_what_the_system_refuses_is_told_in_a_line(sockets, arguments, says):
    with vn.VhostUserPort(sockets / "live"):
        done = subprocess.run(
            [*VIRTNET, *(argument.format(sockets=sockets) for argument in arguments)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("virtnet: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_probe_shows_what_a_back_end_offers(sockets):
    with vn.VhostUserPort(sockets / "a", queue_pairs=2):
        done = subprocess.run([*VIRTNET, "probe", f"{sockets}/a", "--json"], capture_output=True, text=True, check=True)
        offer = json.loads(done.stdout)
        assert {"mrg_rxbuf", "mq", "ring_packed"} <= set(offer["features"])
        assert offer["queue_pairs"] == 2
        shown = subprocess.run([*VIRTNET, "probe", f"{sockets}/a"], capture_output=True, text=True, check=True).stdout
        assert "mrg_rxbuf" in shown


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_the_demo_accounts_for_every_packet(ring):
    done = subprocess.run(
        [*VIRTNET, "demo", "--seconds", "1", "--ring", ring, "--json"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["exact"]
    assert report["ring"] == ring
    assert report["pings"]["resolved"]
    assert report["pings"]["lost"] == 0
    assert 0 < report["pings"]["p50_us"] <= report["pings"]["p99_us"] <= report["pings"]["max_us"]
    assert [bulk["size"] for bulk in report["bulk"]] == [64, 1518]
    assert all(bulk["pps"] > 10_000 for bulk in report["bulk"])


@pytest.mark.parametrize("pause_s", [0.0, 30.0])
@pytest.mark.parametrize("samples", [1, 5])
def test_a_mean_rate_is_that_of_the_time_in_which_packets_passed(monkeypatch, pause_s, samples):
    """A pause before the traffic, in which nobody looked, does not count; the only sample there is counts as it is."""
    now = [100.0]
    monkeypatch.setattr("virtnet.cli.running.time.monotonic", lambda: now[0])
    meter = Meter()
    meter.sample(vn.NetStats(ports={"p": vn.PortStats()}))
    now[0] += pause_s
    sent = 0
    for _ in range(samples):
        now[0] += 0.25
        sent += 1000
        meter.sample(vn.NetStats(ports={"p": vn.PortStats(sent=sent)}))
    now[0] += 60
    assert meter.sample(vn.NetStats(ports={"p": vn.PortStats(sent=sent)})) == 0
    expected = 4000 if samples > 1 or not pause_s else 1000 / (pause_s + 0.25)
    assert meter.mean("p", "sent") == pytest.approx(expected)
    assert meter.mean("p", "received") == 0


def test_a_pause_in_which_somebody_looked_does_not_count(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("virtnet.cli.running.time.monotonic", lambda: now[0])
    meter = Meter()
    meter.sample(vn.NetStats(ports={"p": vn.PortStats()}))
    for _ in range(3):
        now[0] += 10
        meter.rest()
    assert meter.now("p", "sent") == 0
    now[0] += 0.25
    meter.sample(vn.NetStats(ports={"p": vn.PortStats(sent=1000)}))
    assert meter.mean("p", "sent") == pytest.approx(4000)


def test_whether_anything_moves_is_known_without_asking_ports():
    meter = Meter()
    with vn.Net() as net:
        near, far = net.memory("near"), net.memory("far")
        near >> far
        for passed in (0, 6):
            if passed:
                near.end.tx([bytes(60)] * 3)
                assert len(far.end.rx(5.0)) == 3
            assert net._passed() == passed
            meter.sample(net.stats())
            assert meter.passed == passed
    assert net._passed() == 6
