"""The textual form of a port: read, checked, written back, and mistakes answered with what would be right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import virtnet as vn


@pytest.mark.parametrize(
    ("text", "kind", "where", "options"),
    [
        ("vhost-user:vm1.sock", "vhost-user", "vm1.sock", {"client": False, "queue_pairs": 1}),
        ("vhost-user:vm1.sock,client=on,queue_pairs=2", "vhost-user", "vm1.sock", {"client": True, "queue_pairs": 2}),
        ("virtio-user:/run/vm1.sock,ring=packed", "virtio-user", "/run/vm1.sock", {"ring": "packed"}),
        ("tap:tap0", "tap", "tap0", {}),
        ("af-packet:eth0", "af-packet", "eth0", {"queues": 1, "promiscuous": True}),
        ("af-packet:eth0,queues=4,promiscuous=off", "af-packet", "eth0", {"queues": 4, "promiscuous": False}),
        ("af-xdp:eth0", "af-xdp", "eth0", {"queues": None, "ring_size": 2048, "mode": "auto", "promiscuous": True}),
        ("af-xdp:eth0,queues=2,mode=zero-copy", "af-xdp", "eth0", {"queues": 2, "mode": "zero-copy"}),
        ("pcap:out.pcap", "pcap", "out.pcap", {"mode": "write"}),
        ("pcap:a:b,,c.pcap,mode=read", "pcap", "a:b,c.pcap", {"mode": "read"}),
        ("vhost-user:x,without=mrg_rxbuf+event_idx", "vhost-user", "x", {"without": 1 << 15 | 1 << 29}),
    ],
)
def test_a_port_is_read(text, kind, where, options):
    spec = vn.PortSpec.parse(text)
    assert (spec.kind, spec.where) == (kind, where)
    assert {name: spec.options[name] for name in options} == options
    assert vn.PortSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vm1.sock", "expected KIND:WHERE"),
        ("vhostuser:vm1.sock", "did you mean vhost-user?"),
        ("ethernet:eth0", "af-packet, af-xdp, vxlan, stream, dgram, pcap, user-net or memory"),
        ("tap:", "needs an interface's name after the colon"),
        ("vhost-user:vm1.sock,queues=2", "did you mean queue_pairs?"),
        ("tap:tap0,ring=packed", "it takes mtu"),
        ("vhost-user:vm1.sock,client", "expected option=value"),
        ("vhost-user:vm1.sock,client=yes", "expected on or off, found 'yes'"),
        ("vhost-user:vm1.sock,client=on,client=off", "stands twice"),
        ("vhost-user:vm1.sock,queue_pairs=0", "a whole number from 1 to 128, found '0'"),
        ("vhost-user:vm1.sock,queue_pairs=two", "a whole number from 1 to 128, found 'two'"),
        ("virtio-user:vm1.sock,ring=round", "expected split or packed"),
        ("vhost-user:vm1.sock,queue_pairs=1_0", "a whole number from 1 to 128, found '1_0'"),
        ("vhost-user:vm1.sock,without=turbo", "names of features"),
        ("vhost-user:" + "x" * 108, "at most 107 bytes"),
        ("tap:an_interface_name", "at most 15 bytes"),
        ("tap:a b", "neither spaces"),
        ("af-packet:eth0,queues=0", "af-packet option queues: expected a whole number from 1 to 128, found '0'"),
        ("af-packet:eth0,queues=129", "a whole number from 1 to 128, found '129'"),
        ("af-packet:eth0,queue_pairs=2", "did you mean queues?"),
        ("af-xdp:eth0,ring_size=100", "a power of two from 8 to 32768, found '100'"),
        ("af-xdp:eth0,mode=fast", "expected auto, copy or zero-copy"),
    ],
)
def test_a_mistake_is_answered_with_what_was_expected(text, says):
    with pytest.raises(vn.ConfigError, match=r".") as caught:
        vn.PortSpec.parse(text)
    assert says in str(caught.value)


def test_values_are_checked_like_text():
    assert vn.PortSpec.of("vhost-user", "x", queue_pairs=2) == vn.PortSpec.parse("vhost-user:x,queue_pairs=2")
    assert vn.PortSpec.of("vhost-user", "x", mtu=None) == vn.PortSpec.parse("vhost-user:x")
    flags = vn.NetFeature.CSUM | vn.NetFeature.MQ
    assert vn.PortSpec.of("vhost-user", "x", without=flags) == vn.PortSpec.parse("vhost-user:x,without=csum+mq")
    for wrong in (True, 2.0, "2.0", -1, [2]):
        with pytest.raises(vn.ConfigError, match="queue_pairs"):
            vn.PortSpec.of("vhost-user", "x", queue_pairs=wrong)


def test_equal_ports_are_one_key():
    texts = ["vhost-user:x", "vhost-user:x,client=off", "vhost-user:x,queue_pairs=1"]
    assert len({vn.PortSpec.parse(text) for text in texts}) == 1


@given(st.text(max_size=40))
def test_any_text_is_a_port_or_a_config_error(text):
    try:
        spec = vn.PortSpec.parse(text)
    except vn.ConfigError:
        return
    assert vn.PortSpec.parse(str(spec)) == spec


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20),
    st.sampled_from(["read", "write"]),
    st.booleans(),
)
def test_what_is_written_is_read_back(where, mode, overwrite):
    spec = vn.PortSpec.of("pcap", where, mode=mode, overwrite=overwrite)
    assert vn.PortSpec.parse(str(spec)) == spec
