"""What people get wrong in a notebook is told by the option, with what was expected and what was found."""

from __future__ import annotations

import pytest

import virtnet as vn

LAN = {"lan": "10.0.0.1/24"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net: net.switch(ageing_s="long"), "ageing_s .*found 'long'"),
        (lambda net: net.switch(cables=["a"]), "cables: expected a table"),
        (lambda net: net.wire("a", "b"), r"expected a node .*'a' \(net\['a'\]"),
        (lambda net: net.wire(1), "expected a node of the network, found 1"),
        (lambda net: net.tee("a"), "expected a node"),
        (lambda net: net.tee(net.memory("copies"), filter=80), "filter: expected text"),
        (lambda net: net.impair("a", "b"), "expected a node"),
        (lambda net: net.impair(loss="3%"), "loss: expected a number from 0 to 1, or a list, found '3%'"),
        (lambda net: net.impair(delay_ms=1, distribution="gauss"), "expected 'uniform' or 'normal'"),
        (lambda net: net.source(rate_pps="fast"), "rate_pps .*found 'fast'"),
        (lambda net: net.firewall("pass", at="vm"), "expected a node"),
        (lambda net: net.firewall("pass", sets=["10.0.0.0/8"]), "sets: expected a table"),
        (lambda net: net.firewall("pass", sets={"a": "10.0.0.0/33"}), r"sets\.a: .*found '10\.0\.0\.0/33'"),
        (lambda net: net.router("10.0.0.1/24"), "interfaces: expected a table"),
        (lambda net: net.router({"lan": 3}), r"interfaces\.lan: .*found 3"),
        (lambda net: net.router(LAN, ["0.0.0.0/0"]), "routes: expected a table"),
        (lambda net: net.nat(LAN, outside=3), "outside: .*found 3"),
        (lambda net: net.nat(LAN, pool="10.0.0.0/30"), "pool: .*found '10"),
        (lambda net: net.nat(LAN, pool=3), "pool: .*found 3"),
        (lambda net: net.nat(LAN, forward=["tcp:80"]), "forward: expected a table"),
        (lambda net: net.nat(LAN, forward={80: "10.0.0.5:80"}), r"forward\.80: .*found 80"),
        (lambda net: net.nat(LAN, prefixes="fd00::/48"), "prefixes: expected a table"),
        (lambda net: net.tap(3), "a tap port needs .*found 3"),
        (lambda net: net.af_packet(3), "a af-packet port needs .*found 3"),
        (lambda net: net.source("udp"), "expected a frame: bytes.*found 'udp'"),
        (lambda net: net.source(3), "expected a frame: bytes.*found 3"),
        (lambda net: net.generator("udp"), "expected a frame: bytes.*found 'udp'"),
        (lambda net: net.generator(3), "expected a frame: bytes.*found 3"),
        (lambda net: net.generator([b"frame"]), "expected a frame: bytes.*found \\["),
        (lambda net: net.on_burst(3), "expected a node of the network, found 3"),
        (lambda net: net.firewall(3), "rules: .*found 3"),
        (lambda net: net.element(3), "element.*not callable"),
        (lambda net: net.load_balancer(LAN, services=80), "services: .*found 80"),
        (lambda net: net.load_balancer(LAN, services="tcp:10.0.0.1:80", backends="10.0.0.5"), "found '10.0.0.5'"),
    ],
)
def test_what_is_wrong_is_told_by_its_place(make, words):
    with pytest.raises(vn.ConfigError, match=words):
        make(vn.Net())
