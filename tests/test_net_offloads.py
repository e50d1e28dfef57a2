"""What senders leave to be done, with the kernel's TCP at both ends: it verifies checksums."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kernel_tcp.py")

#: As root, with root's rights: that of a user namespace may load no programs.
UNSHARE = ["unshare", "--net"] if not os.geteuid() else ["unshare", "--map-root-user", "--net"]

#: Every way in which frames can be left unfinished.
ALL = "csum+guest_csum"


def between_kernels(*options: str) -> dict:
    """Has two network stacks talk over a pair of taps and what is between them; what was counted."""
    if not Path("/dev/net/tun").exists() or not shutil.which("ip"):
        pytest.skip("there is no /dev/net/tun, or no ip")
    if subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces cannot be made here")
    done = subprocess.run(
        [*UNSHARE, sys.executable, SCRIPT, *options], check=False, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def exact(told: dict) -> bool:
    return told["balance"]["exact"] and told["intact"]


def test_long_frames_pass_from_kernel_to_kernel_through_rings_as_they_are():
    told = between_kernels()
    assert exact(told)
    assert told["bytes_a_packet"] > 5_000
    assert all(port["segmented"] == 0 for port in told["ports"].values())
    assert {"csum", "host_tso4", "guest_tso4"} <= set(told["ports"]["device"]["features"])


def test_the_queues_of_taps_are_spread_over_workers():
    told = between_kernels("--workers", "2")
    assert exact(told)
    # The far tap was moved to another namespace, and is followed.
    assert told["connected"] == [True, True]
    assert told["bytes_a_packet"] > 3_000


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_a_driver_that_takes_nothing_gets_finished_frames(ring):
    told = between_kernels("--device-without", ALL, "--ring", ring)
    assert exact(told)
    # What the kernel leaves is done before the driver sees it; the tap beyond has its checksums from there.
    assert told["ports"]["device"]["segmented"] > 100
    assert not {"csum", "host_tso4", "guest_csum", "guest_tso4"} & set(told["ports"]["device"]["features"])


def test_a_driver_that_takes_checksums_only_gets_segments():
    told = between_kernels("--device-without", "guest_tso4+guest_tso6+guest_uso4+guest_uso6+guest_ecn")
    assert exact(told)
    assert told["ports"]["device"]["segmented"] > 100
    assert "guest_csum" in told["ports"]["device"]["features"]


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_kernels_talk_through_packet_sockets_on_veth_pairs(ring):
    told = between_kernels("--ends", "af-packet", "--ring", ring)
    assert exact(told)
    assert told["bytes_a_packet"] > 5_000
    assert all(port["segmented"] == 0 for port in told["ports"].values())


def test_packet_sockets_get_segments_for_a_driver_that_takes_nothing():
    told = between_kernels("--ends", "af-packet", "--device-without", ALL)
    assert exact(told)
    assert told["ports"]["device"]["segmented"] > 100


@pytest.mark.kernel
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_kernels_talk_through_af_xdp_on_veth_pairs_which_leaves_nothing_undone(ring):
    if os.geteuid() or not shutil.which("ethtool"):
        pytest.skip("loads a program into the kernel: needs root, and ethtool")
    told = between_kernels("--ends", "af-xdp", "--ring", ring)
    assert exact(told)
    assert told["ports"]["near"]["xdp"] == "native, copy"
    assert told["ports"]["near"]["link_up"]
    assert told["bytes_a_packet"] < 1515
