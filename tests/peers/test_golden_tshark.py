"""What functions make of known packets is well formed, and its checksums are right, as tshark sees it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from golden_captures import GOLDENS, path

pytestmark = pytest.mark.peer

#: Severities of tshark: what is an error is so, a warning may be of what was sent.
ERROR = 8_388_608


@pytest.mark.parametrize("kind", GOLDENS)
def test_tshark_finds_nothing_wrong_with_what_comes_out(kind):
    if not shutil.which("tshark"):
        pytest.skip("needs tshark (Debian: apt install tshark)")
    command = ["tshark", "-r", str(path(kind, "out"))]
    for protocol in ("ip", "tcp", "udp"):
        command += ["-o", f"{protocol}.check_checksum:TRUE"]
    if kind != "user_net":  # elsewhere there is any text behind the ports
        command += [word for protocol in ("dns", "mdns", "ntp") for word in ("--disable-protocol", protocol)]
    command += ["-Y", f"_ws.malformed || _ws.expert.severity >= {ERROR}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    wrong = done.stdout.splitlines()
    if kind == "impairment":
        assert wrong, "it spoils packets, which is what it is for"
    else:
        assert not wrong, done.stdout
