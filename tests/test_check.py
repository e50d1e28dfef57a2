"""Checks of back-ends, from Python and from a shell: a good one passes, and what fails is told."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading

import pytest

import virtnet as vn

pytestmark = pytest.mark.usefixtures("nothing_left")

PROBE = [sys.executable, "-m", "virtnet", "probe", "--check"]


@contextlib.contextmanager
def echo_behind(path, **options):
    """A back-end of ours that sends back what it gets."""
    with vn.Net() as net:
        net.vhost_user(path, **options) >> net.echo()
        yield


def probe(*arguments):
    return subprocess.run([*PROBE, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


def test_our_own_back_end_passes_from_another_process(sockets):
    with echo_behind(sockets / "a", queue_pairs=2, in_band=True, postcopy=True):
        done = probe(sockets / "a", "--json", "--timeout", "20")
        report = json.loads(done.stdout)
        assert done.returncode == 0, [one for one in report["checks"] if one["outcome"] == "failed"]
    assert report["ok"] is True
    assert report["failed"] == report["warned"] == 0
    assert report["passed"] > 150
    by_id = {one["id"]: one for one in report["checks"]}
    assert by_id["returns-mergeable-packed"]["outcome"] == "passed"
    assert by_id["gives-descriptors-back"]["outcome"] == "passed"
    assert by_id["postcopy-returns"]["outcome"] == "passed"
    assert by_id["takes-split"]["source"] == "virtio 1.4, 2.7.8"


def test_a_report_is_typed_and_reads_well(sockets):
    seen = []
    with echo_behind(sockets / "a"):
        report = vn.check_back_end(sockets / "a", only=["answer-form", "second-pair"], timeout_s=20, each=seen.append)
        polite = vn.check_back_end(
            sockets / "a", only=["head-beyond-table", "answer-form"], timeout_s=20, hostile=False
        )
    assert report.ok
    assert tuple(seen) == report.results
    form, pair = report.results
    assert (form.outcome, pair.outcome) == ("passed", "not applicable")
    assert "1 passed, 0 failed, 1 not applicable" in report.summary()
    assert "✓ answer-form: request 1, flags 0x5, 8 bytes" in str(report)
    assert "<td>answer-form</td>" in report._repr_html_()
    assert [one.id for one in polite.results] == ["answer-form"]


def test_what_fails_is_told_with_what_was_expected_and_the_exit_code_says_so(sockets):
    # Nobody takes what is sent: the port is open and nobody works on it.
    with vn.VhostUserPort(sockets / "a"):
        done = probe(sockets / "a", "--only", "takes-split", "--only", "answer-form", "--timeout", "0.3")
        assert done.returncode == 1
        assert "1 passed, 1 failed, 0 not applicable" in done.stdout
        assert "✗" in done.stdout
        report = vn.check_back_end(sockets / "a", only=["takes-split"], timeout_s=0.3)
    assert not report.ok
    assert report.failed == report.results
    assert "expected: what a driver sends" in str(report)
    assert "found: of 32 frames 0 were taken" in str(report)


def test_a_back_end_that_dies_is_told_and_not_waited_for(sockets):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sockets / "a"))
        listener.listen()

        def serve_none():
            for _ in range(2):
                listener.accept()[0].close()
            listener.close()

        thread = threading.Thread(target=serve_none)
        thread.start()
        report = vn.check_back_end(sockets / "a", only=["answer-form", "acknowledges"], timeout_s=0.2)
        thread.join()
    form, next_one = report.results
    assert "afterwards nobody answers" in form.found
    assert next_one.outcome == "not applicable"
    assert "gone" in next_one.found


def test_mistakes_are_told(sockets):
    with pytest.raises(vn.PortError, match="nobody"):
        vn.check_back_end(sockets / "nobody")
    with pytest.raises(vn.ConfigError, match="timeout_s"):
        vn.check_back_end(sockets / "a", timeout_s=0)
    with vn.VhostUserPort(sockets / "a"), pytest.raises(vn.ConfigError, match="did you mean takes-split"):
        vn.check_back_end(sockets / "a", only="take-split")
    assert probe(sockets / "nobody").returncode == 1


def test_a_configuration_space_is_read_by_what_is_offered():
    space = bytes([2, 0, 0, 0, 0, 1, 1, 0, 4, 0, 0xDC, 5]) + bytes(12)
    features = vn.NetFeature.MAC | vn.NetFeature.MQ | vn.NetFeature.MTU
    offer = vn.Offer(features.value, config=space)
    assert offer.config_space == {"mac": "02:00:00:00:00:01", "max_virtqueue_pairs": 4, "mtu": 1500}
    assert offer.to_dict()["config"] == offer.config_space
    assert vn.Offer(0).config_space == {}
