"""Uplinks to network interfaces of the host: ping and iperf3 between two hosts go through a network of ours.

The interfaces are veth pairs, whose driver knows XDP; each host is a network namespace.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.peer, pytest.mark.timeout(60)]

SCRIPT = Path(__file__).with_name("hosts_by_uplinks.py")


def between_hosts(*options: str) -> dict:
    """What was counted while two hosts talked."""
    if os.geteuid():
        pytest.skip("loads a program into the kernel and makes namespaces: needs root")
    if missing := [tool for tool in ("ip", "ethtool", "iperf3", "ping", "nsenter") if not shutil.which(tool)]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    command = ["unshare", "--net", sys.executable, SCRIPT, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def passed(told: dict) -> bool:
    """Something went through, all of it is accounted for, and nothing stays attached."""
    assert told["bits_per_second"] > 1e6
    assert not any(told["left_behind"])
    return told["balance"]["exact"]


def test_two_hosts_talk_by_af_xdp_at_both_ends():
    told = between_hosts("af-xdp", "af-xdp")
    assert passed(told)
    assert all(told["attached"])
    assert [told["ports"][name]["xdp"] for name in ("left", "right")] == ["native, copy"] * 2


def test_generic_mode_and_a_packet_socket_at_the_other_end():
    told = between_hosts("af-xdp,attach=generic", "af-packet")
    assert passed(told)
    assert told["attached"] == [True, False]
    assert told["ports"]["left"]["xdp"] == "generic, copy"


@pytest.mark.parametrize("other", ["af-xdp", "af-packet"])
def test_what_an_uplink_brings_passes_rings(other):
    told = between_hosts("af-xdp", other, "--rings")
    assert passed(told)
    assert told["ports"]["device"]["sent"] > 100


@pytest.mark.parametrize("workers", ["1", "2"])
def test_two_queues_go_to_as_many_workers_as_there_are(workers):
    told = between_hosts("af-xdp", "af-xdp", "--queues", "2", "--workers", workers, "--streams", "4")
    assert passed(told)


def test_small_rings_lose_packets_and_count_them():
    told = between_hosts("af-xdp,ring_size=8", "af-xdp,ring_size=16", "--streams", "4")
    assert passed(told)


def test_an_uplink_that_goes_down_and_up_under_load_goes_on():
    told = between_hosts("af-xdp", "af-packet", "--flap")
    assert passed(told)
    assert told["events"].count("link_down") >= 2
    assert told["events"][-1] == "link_up"
