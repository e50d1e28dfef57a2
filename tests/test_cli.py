"""The command line: what it answers, in which words, with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import virtnet as vn


def virtnet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "virtnet", *arguments], capture_output=True, text=True, timeout=30, check=False
    )


def test_version():
    assert virtnet("--version").stdout == f"virtnet {vn.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "switch", "wire", "sink", "source", "echo", "probe", "doctor"])
def test_every_command_explains_itself(command):
    done = virtnet(command, "--help")
    assert done.returncode == 0
    assert "Usage: virtnet" in done.stdout.replace("python -m ", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["switch", "vhostuser:vm1.sock"], "did you mean vhost-user?"),
        (["switch", "vhost-user:vm1.sock,queue_pairs=many"], "a whole number from 1 to 128"),
        (["switch", "memory:x"], "the command line has no use for it"),
        (["wire", "tap:a", "pcap:"], "needs a file's path"),
        (["sink", "tap:a", "--cpu", "one"], "--cpu takes numbers and ranges"),
        (["sink", "tap:a", "--cpu", "1,1"], "names each processor once"),
        (["source", "tap:a", "--size", "3"], "a frame has 14 to 65535 bytes"),
        (["source", "tap:a", "--rate", "0"], "rate_pps is a number above 0"),
    ],
)
def test_the_callers_mistake_is_told_in_a_line(arguments, says):
    done = virtnet(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("virtnet: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [["swich"], ["wire", "tap:a"], ["switch", "tap:a", "--poll", "lazy"]])
def test_an_unknown_word_is_a_mistake_of_usage(arguments):
    done = virtnet(*arguments)
    assert done.returncode == 2
    assert "Usage:" in done.stderr


def test_doctor_reports_findings_with_consequences():
    findings = json.loads(virtnet("doctor", "--json").stdout)["findings"]
    assert {"processors", "huge pages", "taps", "open files"} <= {finding["what"] for finding in findings}
    assert {finding["level"] for finding in findings} <= {"good", "fine", "poor"}
    assert "huge pages" in virtnet("doctor").stdout
