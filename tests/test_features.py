"""The table of features is true: its tests exist, it names every feature, and what it says of the device is offered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import virtnet as vn

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "features.md"
LINK = re.compile(r"\[(yes|part)\]\(\.\./([\w./-]+)#(\w+)\)")
WORDS = {"yes", "part", "opt", "no", "–", "?"}


def rows(title):
    """The rows of the table below a title, as lists of cells."""
    section = DOCUMENT.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    table = re.search(r"^\| feature \| bit \| device .*?(?=\n\n)", section, re.MULTILINE | re.DOTALL)
    assert table, title
    lines = table[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


TABLES = {
    "Network device": vn.NetFeature,
    "Rings and transport": vn.RingFeature,
    "vhost-user protocol": vn.ProtocolFeature,
}


@pytest.mark.parametrize("title", TABLES)
def test_every_feature_has_a_row_with_its_bit(title):
    named = [(f"`{feature.name}`", str(feature.value.bit_length() - 1)) for feature in TABLES[title]]
    assert [(name, bit) for name, bit, *_ in rows(title)] == named


@pytest.mark.parametrize("title", TABLES)
def test_every_cell_is_a_word_or_leads_to_a_test_that_exists(title):
    for name, _bit, *cells in rows(title):
        for place, cell in enumerate(cells):
            found = LINK.fullmatch(cell)
            # Of our own two columns nothing is claimed without a test, and of the others none can be shown.
            assert bool(found) == (place < 2 and cell not in {"no", "?"}), (name, cell)
            assert found or cell in WORDS, (name, cell)
            if found:
                source = (ROOT / found[2]).read_text()
                assert re.search(rf"^\s*(def|fn) {found[3]}\(", source, re.MULTILINE), (name, cell)


def test_what_the_device_is_said_to_do_is_offered(sockets):
    with vn.Net() as net:
        net.vhost_user(sockets / "a", queue_pairs=2, mac="02:00:00:00:00:01", speed_mbps=1000) >> net.echo()
        offer = vn.probe(sockets / "a")
    offered = {
        "Network device": offer.net_features,
        "Rings and transport": offer.ring_features,
        "vhost-user protocol": offer.protocol,
    }
    for title, words in offered.items():
        told = {name.strip("`").lower() for name, _bit, device, *_ in rows(title) if device.startswith("[yes]")}
        assert told <= set(words.names()), title
