"""What other back-ends do not do that the specifications demand, as ``virtnet probe --check`` finds out.

A finding that is not listed fails the test, and so does one that is listed and not found any more.
"""

from __future__ import annotations

import os

import ovs
import pytest
from benchmarks import testpmd
from benchmarks.testpmd import Testpmd

import virtnet as vn

pytestmark = [pytest.mark.peer, pytest.mark.timeout(180)]

#: DPDK's vhost library, which both peers are made of.
DPDK = {
    # lib/vhost masks HOST_TSO4 and HOST_TSO6 out where the application does no segmentation, and leaves HOST_ECN.
    "offers-what-features-need": "HOST_ECN is offered without HOST_TSO4 or HOST_TSO6",
    # A message of another version is looked at like any other.
    "refuses-version": "a header of version 2 is answered",
    # lib/vhost keeps SET_STATUS as a number: its rings run on until somebody stops them.
    "status-zero-resets": "a device whose status is set to 0 goes on with its rings",
    # The offset of the log in its file is given to mmap and then added once more.
    "log-with-offset": "marks are made at twice the offset",
    # A ring that is disabled is not looked at at all, so a guest that brings its interface down waits for its buffers.
    "disabled-discards": "what is sent on a disabled ring stays there",
    # The field is written with MRG_RXBUF only, so a driver reads what was in its buffer before.
    "plain-header": "num_buffers is not set to 1 without MRG_RXBUF",
}


def findings(path):
    """The checks that failed, must and should, and what was found."""
    report = vn.check_back_end(path, timeout_s=6)
    return report, {one.id: one.found for one in report.results if one.outcome == "failed"}


def test_dpdk_vhost(directory, running):
    if not testpmd.program():
        missing("dpdk-testpmd: run tests/peers/install.sh")
    vdev = testpmd.vhost(0, directory / "a", queue_pairs=2, extra=",postcopy-support=1")
    args = ["--no-flush-rx", "--rxq=2", "--txq=2"]
    process = running.enter_context(Testpmd([vdev], mode="io", log=directory / "testpmd.log", args=args))
    process.ready(timeout_s=30).start()
    report, failed = findings(directory / "a")
    assert failed.keys() == DPDK.keys(), failed
    assert report.count("passed") > 110
    assert process.process.poll() is None


def test_open_vswitch(directory, running):
    if reason := ovs.missing():
        pytest.skip(reason)  # not among what tests/peers/install.sh installs
    switch = running.enter_context(ovs.OpenVSwitch(directory))
    report, failed = findings(switch.socket)
    assert failed.keys() == DPDK.keys(), failed
    assert report.count("passed") > 110
    assert switch.switch.poll() is None


def missing(reason):
    (pytest.fail if os.environ.get("VIRTNET_REQUIRE_PEERS") else pytest.skip)(reason)
