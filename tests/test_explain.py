"""Ports say how they stand: at every step of a handshake, what is missing and what to do."""

from __future__ import annotations

import os
import socket
import struct

import pytest

import virtnet as vn
from helpers import eventually

pytestmark = pytest.mark.usefixtures("nothing_left")

GET_FEATURES, SET_FEATURES, SET_MEM_TABLE = 1, 2, 5


class FrontEnd:
    """A front-end that goes as far as it is told."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))

    def say(self, request, body=b"", fds=()):
        message = struct.pack("<III", request, 1, len(body)) + body
        socket.send_fds(self.socket, [message], list(fds))

    def features(self):
        self.say(GET_FEATURES)
        return struct.unpack("<12xQ", self.socket.recv(20))[0]

    def memory(self):
        with os.fdopen(os.memfd_create("guest"), "wb") as file:
            file.truncate(1 << 20)
            region = struct.pack("<QQQQ", 0, 1 << 20, 0x7000_0000, 0)
            self.say(SET_MEM_TABLE, struct.pack("<II", 1, 0) + region, [file.fileno()])


def explained(port, words):
    assert eventually(lambda: words in port.explain().state), str(port.explain())
    return port.explain()


def test_every_step_of_a_front_end_is_told(sockets):
    with vn.VhostUserPort(sockets / "a") as port:
        told = explained(port, f"Nobody has connected to {sockets / 'a'} yet")
        assert "qemu_args()" in told.remedy
        front = FrontEnd(sockets / "a")
        told = explained(port, "has not agreed on features")
        assert str(os.getpid()) in told.state
        word = front.features() & ~(1 << 30)
        front.say(SET_FEATURES, struct.pack("<Q", word & ~(1 << 34)))
        told = explained(port, "has not handed over its memory")
        assert "share=on" in told.remedy
        assert any("not taken" in fact and "ring_packed" in fact for fact in told.facts)
        front.memory()
        told = explained(port, "its driver has not started")
        assert "virtio" in told.remedy
        front.socket.close()
        told = explained(port, "the last one left before its driver started")
        assert "one session" in told.facts[0]


@pytest.mark.parametrize(
    ("steps", "left", "remedy"),
    [
        (0, "before agreeing on features", "virtnet probe"),
        (1, "after agreeing on features and before handing over its memory", "share=on"),
    ],
)
def test_where_a_front_end_left_is_remembered(sockets, steps, left, remedy):
    with vn.Net() as net:
        port = net.vhost_user(sockets / "a")
        front = FrontEnd(sockets / "a")
        if steps:
            word = front.features()
            front.say(SET_FEATURES, struct.pack("<Q", word & ~(1 << 30)))
            front.features()
        front.socket.close()
        told = explained(port, left)
        assert remedy in told.remedy
        assert remedy in str(told)
        assert "<ul>" in told._repr_html_()


def test_a_port_that_works_says_what_was_agreed_on(sockets):
    with vn.Net() as net:
        device = net.vhost_user(sockets / "a", queue_pairs=2)
        with vn.VirtioUserPort(sockets / "a", ring="packed") as driver:
            driver.wait_connected(5)
            told = explained(device, "packets can flow")
            assert told.remedy is None
            assert any("packed rings, 1 queue pair;" in fact for fact in told.facts)
            assert "packets can flow" in driver.explain().state
            driver.tx([b"\xff" * 60])
            assert eventually(lambda: any("1 no_cable" in fact for fact in device.explain().facts))
        assert "when it had worked" in explained(device, "any more").state
    assert "is not open" in device.explain().state
    assert driver.explain().remedy


def test_ports_that_find_nobody_say_where_they_look(sockets):
    with (
        vn.VhostUserPort(sockets / "none", client=True) as client,
        vn.VirtioUserPort(sockets / "none2") as driver,
        vn.VirtioUserPort(sockets / "here", server=True) as server,
    ):
        assert "must listen" in explained(client, "Nobody listens").remedy
        assert eventually(lambda: "Last try: nobody listens on" in str(client.explain()))
        assert explained(driver, "No back-end serves").remedy
        assert explained(server, "No back-end has connected").remedy
    a, b = vn.memory_pair()
    with a, b:
        assert "nothing to agree on" in a.explain().state
