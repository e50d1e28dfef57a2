"""Functions make of known packets what they have always made of them: captures in golden/, byte for byte."""

from __future__ import annotations

from collections import Counter

import pytest

import virtnet as vn
from golden_captures import GOLDEN, GOLDENS, frames, path, read, written
from helpers import receive
from virtnet.kinds import FUNCTIONS

pytestmark = pytest.mark.usefixtures("nothing_left")

#: Nothing comes out of a sink or an analyser, nothing goes into a source or a generator, and what a divert does is up
#: to a program.
WITHOUT = {"sink", "analyser", "source", "generator", "divert"}


#: Of ports those that make or change packets themselves.
PORTS = {"user_net", "vxlan"}


@pytest.mark.parametrize("kind", GOLDENS)
def test_a_function_makes_of_packets_what_it_has_always_made_of_them(kind):
    golden = GOLDENS[kind]
    sent = list(read(path(kind, "in").read_bytes()))
    expected = path(kind, "out").read_bytes()
    counts = Counter(n for n, _, _ in read(expected))
    found = golden.play([(port, frame) for _, port, frame in sent], counts)
    anew = f"if that is meant: python tests/golden_captures.py {kind}"
    assert [(n, port, frame.hex()) for n, port, frame in found] == [
        (n, port, frame.hex()) for n, port, frame in read(expected)
    ], anew
    assert written(golden.ports, found) == expected, anew


def test_every_kind_has_captures_and_they_are_those_of_the_packets_here():
    assert set(GOLDENS) == FUNCTIONS.keys() - WITHOUT | PORTS
    assert {file.name for file in GOLDEN.iterdir()} == {
        path(kind, side).name for kind in GOLDENS for side in ("in", "out")
    }
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 200_000
    for kind, golden in GOLDENS.items():
        assert [(port, frame) for _, port, frame in read(path(kind, "in").read_bytes())] == frames(golden.sent), kind


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("kind", GOLDENS)
def test_ports_read_captures_of_several_interfaces(kind, side):
    wanted = [frame for _, _, frame in read(path(kind, side).read_bytes())]
    with vn.PcapPort(path(kind, side), mode="read") as port:
        assert receive(port, len(wanted)) == wanted
