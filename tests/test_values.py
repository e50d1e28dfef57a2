"""Errors, features and statistics: plain values that tell what they mean."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest

import virtnet as vn
from virtnet.explaining import explain


@pytest.mark.parametrize(
    ("error", "builtin", "fault"),
    [
        (vn.ConfigError, ValueError, "caller"),
        (vn.StateError, RuntimeError, "caller"),
        (vn.GuestError, Exception, "guest"),
        (vn.PeerError, Exception, "peer"),
        (vn.PeerGone, vn.PeerError, "nobody"),
        (vn.PortError, OSError, "host"),
    ],
)
def test_an_error_tells_whose_fault_it_is(error, builtin, fault):
    assert issubclass(error, vn.VirtnetError)
    assert issubclass(error, builtin)
    assert error.fault == fault


def test_a_port_error_keeps_errno_and_reads_as_a_sentence():
    error = vn.PortError(errno.EADDRINUSE, "vm1.sock is in use: another process is listening on it")
    assert error.errno == errno.EADDRINUSE
    assert str(error) == "vm1.sock is in use: another process is listening on it"


@pytest.mark.parametrize(
    ("feature", "bit"),
    [
        (vn.NetFeature.MRG_RXBUF, 15),
        (vn.NetFeature.MQ, 22),
        (vn.NetFeature.RSS, 60),
        (vn.RingFeature.EVENT_IDX, 29),
        (vn.RingFeature.RING_PACKED, 34),
        (vn.ProtocolFeature.REPLY_ACK, 3),
        (vn.ProtocolFeature.CONFIGURE_MEM_SLOTS, 15),
    ],
)
def test_features_have_the_bits_of_the_specifications(feature, bit):
    assert feature.value == 1 << bit


def test_no_bit_belongs_to_device_and_ring_at_once():
    net = sum(feature.value for feature in vn.NetFeature)
    ring = sum(feature.value for feature in vn.RingFeature)
    assert net & ring == 0


def test_unknown_bits_are_kept_and_shown():
    features = vn.ProtocolFeature(1 << 3 | 1 << 40)
    assert features.names() == ["reply_ack", "bit 40"]
    assert features.value == 1 << 3 | 1 << 40


def test_a_word_is_told_apart_by_what_it_is_about():
    stats = vn.PortStats(features=1 << 15 | 1 << 34 | 1 << 32, protocol_features=1)
    assert stats.net_features == vn.NetFeature.MRG_RXBUF
    assert stats.ring_features == vn.RingFeature.VERSION_1 | vn.RingFeature.RING_PACKED
    assert stats.to_dict()["features"] == ["mrg_rxbuf", "version_1", "ring_packed"]


def test_a_port_whose_guest_is_about_to_move_says_so():
    spec = vn.PortSpec.parse("vhost-user:vm1.sock")
    stats = vn.PortStats("vhost-user", features=1 << 32, ring="split", state="running", step="running")
    moving = replace(stats, features=1 << 32 | 1 << 26)
    assert (stats.logging, moving.logging) == (False, True)
    assert moving.to_dict()["logging"] is True
    assert not any("logged" in fact for fact in explain(stats, spec).facts)
    assert any("the guest is being moved" in fact for fact in explain(moving, spec).facts)


def test_a_balance_adds_up_every_way_a_packet_can_go():
    stats = vn.NetStats(
        ports={
            "vm1": vn.PortStats(received=10, sent=4, rx_drops={"malformed": 1}),
            "vm2": vn.PortStats(received=2, sent=9, tx_drops={"no_room": 3, "malformed": 1}),
        },
        functions={
            "switch": vn.FunctionStats(copied=5, drops={"same_port": 1}),
            "source": vn.FunctionStats("source", generated=2),
            "sink": vn.FunctionStats("sink", consumed=1),
        },
        gone=vn.Balance(received=7, sent=6),
    )
    balance = stats.balance()
    assert stats.drops == {"malformed": 2, "no_room": 3, "same_port": 1}
    assert (balance.received, balance.sent, balance.dropped) == (19, 19, 6)
    assert balance.missing == 0
    assert balance.exact
    assert not vn.NetStats(ports={"vm1": vn.PortStats(received=1)}).balance().exact


def test_statistics_are_json():
    stats = vn.NetStats({"vm1": vn.PortStats("vhost-user", features=1)}, {"sink": vn.FunctionStats("sink")})
    again = json.loads(json.dumps(stats.to_dict()))
    assert again["ports"]["vm1"]["features"] == ["csum"]
    assert again["balance"]["exact"] is True


def test_statistics_are_a_table_that_takes_nothing_for_html():
    stats = vn.NetStats(
        {"<b>": vn.PortStats("tap", received=3, rx_drops={"no_room": 1})}, {"s": vn.FunctionStats(copied=2)}
    )
    shown = stats._repr_html_()
    assert "<td>&lt;b&gt;</td><td>tap</td><td>3</td><td>0</td><td>1 no_room</td>" in shown
    assert "<td>s</td><td>switch</td><td>0</td><td>0</td><td>2</td><td>0</td>" in shown
