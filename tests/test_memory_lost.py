"""Guest memory that is taken away: the process lives, the port says so, and nobody else notices."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import virtnet as vn
from helpers import eventually, frame, mac, receive

pytestmark = pytest.mark.usefixtures("nothing_left")

SIZE, GUEST, USER = 1 << 20, 1 << 32, 0x7000_0000_0000
ENTRIES, STRIDE = 16, 0x1000
RING_PACKED = 1 << 34


class Machine:
    """A guest that has started its rings and has a file for a memory, which it can shorten."""

    def __init__(self, path, ring):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.memory = os.memfd_create("guest")
        os.truncate(self.memory, SIZE)
        self.events = [os.eventfd(0) for _ in range(2)]
        features = (1 << 32) | (RING_PACKED if ring == "packed" else 0)
        self.say(2, struct.pack("<Q", features))
        region = struct.pack("<QQQQ", GUEST, SIZE, USER, 0)
        self.say(5, struct.pack("<II", 1, 0) + region, [self.memory])
        for index, event in enumerate(self.events):
            areas = [USER + (3 * index + area) * STRIDE for area in range(3)]
            self.say(8, struct.pack("<II", index, ENTRIES))
            self.say(9, struct.pack("<IIQQQQ", index, 0, areas[0], areas[2], areas[1], 0))
            self.say(12, struct.pack("<Q", index), [event])

    def say(self, request, body, fds=()):
        message = struct.pack("<III", request, 1, len(body)) + body
        socket.send_fds(self.socket, [message], list(fds))

    def shorten(self):
        os.truncate(self.memory, 0)
        for event in self.events:
            os.eventfd_write(event, 1)

    def close(self):
        self.socket.close()
        for fd in [self.memory, *self.events]:
            os.close(fd)


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_one_guest_loses_its_memory_and_the_others_lose_no_packet(sockets, ring):
    assert faulthandler.is_enabled(), "pytest has taken the signal before us"
    with vn.Net() as net:
        a, b, lost = (net.vhost_user(sockets / name) for name in ("a", "b", "lost"))
        a >> b
        lost >> net.sink()
        with vn.VirtioUserPort(sockets / "a") as left, vn.VirtioUserPort(sockets / "b") as right:
            left.wait_connected(5)
            right.wait_connected(5)
            for turn in range(3):
                machine = Machine(sockets / "lost", ring)
                assert eventually(lambda: "packets can flow" in lost.explain().state), str(lost.explain())
                sent = [frame(mac(2), mac(1), bytes([turn, n])) for n in range(60)]
                assert left.tx(sent[:30]) == 30
                machine.shorten()
                assert left.tx(sent[30:]) == 30
                assert receive(right, 60) == sent
                assert eventually(lambda: "any more" in lost.explain().state)
                told = str(lost.explain())
                assert f"process {os.getpid()}'s memory region at guest address {GUEST:#x}" in told
                assert "shortened while it was mapped" in told
                assert machine.socket.recv(1) == b""
                machine.close()
        assert net.stats().ports["a"].received == 180


def child(code: str) -> subprocess.CompletedProcess[str]:
    """Runs a program that knows the machine above."""
    here = str(Path(__file__).parent)
    head = f"import mmap, sys; sys.path.insert(0, {here!r})\nfrom test_memory_lost import *\n"
    body = head + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=60, check=False)


LOSES = """
    def lose(path):
        with vn.VhostUserPort(path) as port:
            machine = Machine(path, "split")
            assert eventually(lambda: "packets can flow" in port.explain().state)
            {before}
            machine.shorten()
            assert eventually(lambda: port.rx() is not None and "shortened" in str(port.explain()))
            machine.close()

    def fault():
        file = os.memfd_create("other")
        os.truncate(file, 4096)
        with mmap.mmap(file, 4096) as mapped:
            os.truncate(file, 0)
            return mapped[0]
"""


@pytest.mark.parametrize("first", [True, False])
def test_a_fault_that_is_not_ours_is_reported_by_whoever_had_the_signal(sockets, first):
    enabled = "faulthandler.enable()" if first else ""
    done = child(f"""
    {enabled}
    {LOSES.format(before="pass")}
    lose({str(sockets / "a")!r})
    print("alive", flush=True)
    fault()
    print("never")
    """)
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == first
    assert done.stderr.count("Fatal Python error") <= 1


def test_a_handler_that_comes_later_does_not_stay_in_the_way(sockets):
    # Within a second the port has seen that the signal is not its own any more.
    done = child(f"""
    import time
    {LOSES.format(before="faulthandler.enable(); time.sleep(1.5)")}
    lose({str(sockets / "a")!r})
    print("alive", flush=True)
    fault()
    """)
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("Fatal Python error: Bus error") == 1
