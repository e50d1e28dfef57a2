"""Measuring a path: trials, the search for its throughput, and the command that does both."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

import virtnet as vn
from helpers import mac, receive

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_the_search_finds_the_rate_of_a_path_that_has_one():
    with vn.Net() as net:
        cable = net.impair(rate_bps=8e6, queue_packets=20)
        lines: list[str] = []
        (found,) = vn.throughput_search(
            cable, sizes=[500], seconds=0.3, max_pps=20_000, resolution=0.05, tries=4, show=lines.append
        )
        assert list(net) == [cable], "what has measured is gone"
    # 2000 frames a second, a buffer of twenty and one that is sent; a busy host may find less, and never more.
    assert 1400 < found.rate_pps < 2000 + 60 / 0.3
    assert found.best is not None
    assert found.best.loss == 0
    assert found.best.latency.count == found.best.received == found.best.asked
    assert any(trial.loss > 0 for trial in found.trials), "it tried too much, too"
    assert found.rate_bps == pytest.approx(found.rate_pps * 4000)
    assert any("came" in line for line in lines)


def test_a_path_may_lose_what_is_allowed_and_no_more():
    with vn.Net() as net:
        cable = net.impair(loss=0.05, seed=1)
        common = {"sizes": [60], "seconds": 0.2, "max_pps": 5000, "resolution": 0.3, "tries": 3}
        (never,) = vn.throughput_search(cable, **common)
        assert (never.rate_pps < 200) or never.best is None
        (found,) = vn.throughput_search(cable, loss=0.1, **common)
        assert found.rate_pps == 5000
        assert 0.02 < found.best.loss < 0.1


def test_both_directions_are_told_apart():
    with vn.Net() as net:
        a, b = net.switch(name="a"), net.switch(name="b")
        net.impair(a, b, loss=1, direction="to")
        with vn.Path(a, b, both=True, streams=2) as path:
            trial = path.trial(rate_pps=2000, seconds=0.2)
    there, back = trial.reports
    assert (there.received, there.lost) == (400, 0)
    assert (back.received, back.lost) == (0, 400)
    assert [stream.name for stream in there.streams] == ["a to b, 0", "a to b, 1"]
    assert (trial.asked, trial.sent, trial.received, trial.loss) == (800, 800, 400, 0.5)


def test_a_place_that_sends_back_is_a_path_by_itself():
    with vn.Net() as net:
        echo = net.echo()
        with vn.Path(echo) as path:
            trial = path.trial(rate_pps=1000, seconds=0.5)
        assert trial.received == trial.sent > 0
        assert trial.reports[0].lost == 0


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (lambda net: vn.Path(net.switch(), "tap:t0"), "two nodes"),
        (lambda net: vn.Path(net.echo(), both=True), "one direction"),
        (lambda net: vn.Path(net.switch(), streams=65), "1 to 64"),
        (lambda net: vn.Path(net.switch(), vn.Net().switch()), "one network"),
        (lambda net: vn.throughput_search(net.echo(), loss=1), "loss"),
        (lambda net: vn.throughput_search(net.echo(), resolution=0), "resolution"),
        (lambda net: vn.throughput_search(net.echo(), sizes=[59]), "60 to 65535"),
        (lambda net: vn.throughput_search(net.echo(), seconds=0), "seconds above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(use, text):
    with vn.Net() as net, pytest.raises(vn.ConfigError, match=text):
        use(net)


@pytest.fixture
def between(sockets):
    """Two sockets with a wire between them, and one with an echo behind."""
    with vn.Net() as net:
        net.vhost_user(str(sockets / "a.sock")) >> net.vhost_user(str(sockets / "b.sock"))
        net.vhost_user(str(sockets / "echo.sock")) >> net.echo()
        yield [f"virtio-user:{sockets}/{name}.sock" for name in ("a", "b", "echo")]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "virtnet", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_command_tells_what_came_of_it(between):
    a, b, _ = between
    done = bench(a, b, "--both", "--rate", "2000", "--seconds", "0.5", "--size", "60,1000", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [trial["size"] for trial in found["trials"]] == [60, 1000]
    for trial in found["trials"]:
        assert trial["asked"] == 2000
        assert trial["received"] + sum(one["lost"] for one in trial["directions"]) == trial["sent"]
        assert trial["latency_ns"]["count"] == trial["received"] > 1000


def test_the_command_sends_the_frames_that_it_is_given(between, tmp_path):
    a, b, _ = between
    there = bytes(Ether(dst=mac(2), src=mac(1)) / IP(src="10.0.0.1", dst="10.0.0.2") / UDP(dport=53) / bytes(60))
    back = bytes(Ether(dst=mac(1), src=mac(2)) / IP(src="10.0.0.2", dst="10.0.0.1") / UDP(sport=53) / bytes(60))
    with vn.PcapPort(tmp_path / "back.pcap", mode="write") as file:
        file.tx([back, there])
    options = ["--rate", "1000", "--seconds", "0.3", "--json"]
    with vn.Net() as net:
        seen = net.memory("seen")
        ports = [net.vhost_user(str(tmp_path / f"{name}.sock")) for name in "ab"]
        ports[0] >> net.tee(seen) >> ports[1]
        ends = [f"virtio-user:{tmp_path}/{name}.sock" for name in "ab"]
        done = bench(*ends, "--both", "--frame", there.hex(), "--frame", str(tmp_path / "back.pcap"), *options)
        assert done.returncode == 0, done.stderr
        trial = json.loads(done.stdout)["trials"][0]
        assert trial["size"] == len(there)
        assert [one["received"] > 100 for one in trial["directions"]] == [True, True]
        # The signature stands in the data, the headers are as they were.
        assert {bytes(one)[:42] for one in receive(seen.end, 10)} <= {there[:42], back[:42]}
    for frames, words in [
        (["--frame", "xyz"], "hexadecimal or the name of a pcap file, found 'xyz'"),
        (["--frame", there.hex(), "--size", "60"], "leave out --size"),
        (["--frame", there.hex(), "--both"], "2 in all, found 1"),
        (["--frame", there.hex(), "--both", "--frame", back.hex() + "00"], "equally long"),
        (["--frame", there.hex()[:40]], "60 to 65"),
    ]:
        done = bench(a, b, *frames, *options)
        assert done.returncode != 0
        assert words in " ".join(done.stderr.split()), done.stderr


def test_the_command_varies_what_it_is_told_to(between, tmp_path):
    options = ["--rate", "1000", "--seconds", "0.3", "--size", "80", "--json", "--streams", "2"]
    with vn.Net() as net:
        ports = [net.vhost_user(str(tmp_path / f"{name}.sock")) for name in "ab"]
        ports[0] >> ports[1]
        with net.capture(ports[0]) as seen:
            varied = ["--vary", "ip_src=10.0.0.1+3", "--vary", "l4_dst=80,443", "--vary", "0:2=513"]
            done = bench(*(f"virtio-user:{tmp_path}/{name}.sock" for name in "ab"), *varied, *options)
            assert done.returncode == 0, done.stderr
            burst = seen.read(timeout_s=1.0)
        columns = burst.columns
    found = set(zip(columns.ip_src.tolist(), columns.l4_dst.tolist(), columns.l4_src.tolist(), strict=True))
    assert found == {
        (0x0A000001 + host, port, source) for host in range(3) for port in (80, 443) for source in (49152, 49153)
    }
    assert {bytes(frame)[:2] for frame in burst} == {b"\x02\x01"}
    for text, words in [("ip_src", "a field and its values"), ("colour=3", "colour"), ("l4_dst=http", "http")]:
        done = bench(*between[:2], "--vary", text)
        assert done.returncode != 0
        assert words in done.stderr, done.stderr


def test_the_command_searches_and_shows_a_table(between):
    done = bench(
        between[2], "--search", "--loss", "0.5", "--rate", "1000", "--seconds", "0.2", "--size", "60", "--tries", "3"
    )
    assert done.returncode == 0, done.stderr
    assert "throughput" in done.stdout
    assert "1,000" in done.stdout, done.stdout
    assert " came, " in done.stderr


def test_ctrl_c_ends_the_command_with_what_there_is(between):
    a, b, _ = between
    command = [sys.executable, "-m", "virtnet", "bench", a, b, "--rate", "1000", "--seconds", "3600", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "Ctrl-C" in process.stderr.readline()
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
    found = json.loads(out)
    assert (process.returncode, found["cut_short"]) == (0, True)
    assert found["trials"][0]["received"] > 0


def test_mistakes_are_told_in_a_sentence(between):
    assert "numbers of bytes" in bench(between[0], "--size", "big").stderr
    assert "Python program" in bench("memory:x").stderr
    nobody = bench("vhost-user:nobody.sock", "--wait", "0.2")
    assert (nobody.returncode, "nobody is at the other end" in nobody.stderr) == (1, True)
