"""``switch``, ``wire``, ``sink``, ``source`` and ``echo``: one function between ports, until Ctrl-C."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from virtnet.cli.options import Cpu, Events, Json, Poll, PortText, PortTexts, Seconds, parse_cpus
from virtnet.cli.running import run
from virtnet.errors import ConfigError
from virtnet.net import Net

if TYPE_CHECKING:
    from virtnet.nodes import Function

__all__ = ["echo", "sink", "source", "switch", "wire"]


def switch(
    ports: PortTexts,
    ageing: Annotated[
        float, typer.Option("--ageing", help="Seconds after which a silent station is forgotten.")
    ] = 300.0,
    cpu: Cpu = "",
    poll: Poll = "adaptive",
    seconds: Seconds = None,
    events: Events = False,
    json: Json = False,
) -> None:
    """Join ports by a switch, which learns who is where."""
    net = _net(cpu, poll)
    _plug(net, net.switch(ageing_s=ageing), ports)
    run("switch", net, seconds=seconds, events=events, as_json=json)


def wire(
    port_a: PortText,
    port_b: PortText,
    cpu: Cpu = "",
    poll: Poll = "adaptive",
    seconds: Seconds = None,
    events: Events = False,
    json: Json = False,
) -> None:
    """Join two ports: what comes in by one goes out by the other."""
    net = _net(cpu, poll)
    _plug(net, net.wire(), [port_a, port_b])
    run("wire", net, seconds=seconds, events=events, as_json=json)


def sink(
    port: PortText,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy whole packets out, as a program that keeps them would.")
    ] = False,
    cpu: Cpu = "",
    poll: Poll = "adaptive",
    seconds: Seconds = None,
    events: Events = False,
    json: Json = False,
) -> None:
    """Take and count all packets of a port."""
    net = _net(cpu, poll)
    _plug(net, net.sink(copy=copy), [port])
    run("sink", net, seconds=seconds, events=events, as_json=json)


def source(
    port: PortText,
    size: Annotated[int, typer.Option("--size", metavar="BYTES", help="Bytes of each frame, without checksum.")] = 60,
    rate: Annotated[
        float | None, typer.Option("--rate", metavar="PPS", help="Packets a second; no limit if not given.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", help="Packets in all; no end if not given.")] = None,
    cpu: Cpu = "",
    poll: Poll = "adaptive",
    seconds: Seconds = None,
    events: Events = False,
    json: Json = False,
) -> None:
    """Send the same packet again and again."""
    net = _net(cpu, poll)
    _plug(net, net.source(size=size, rate_pps=rate, count=count), [port])
    run("source", net, seconds=seconds, events=events, as_json=json)


def echo(
    port: PortText,
    cpu: Cpu = "",
    poll: Poll = "adaptive",
    seconds: Seconds = None,
    events: Events = False,
    json: Json = False,
) -> None:
    """Send every packet back with its MAC addresses swapped."""
    net = _net(cpu, poll)
    _plug(net, net.echo(), [port])
    run("echo", net, seconds=seconds, events=events, as_json=json)


def _net(cpu: str, poll: Poll) -> Net:
    return Net(cpus=parse_cpus(cpu), poll=poll)


def _plug(net: Net, function: Function, ports: list[str]) -> None:
    for text in ports:
        port = net.port(text)
        if port.kind == "memory":
            raise ConfigError(f"{text} has its other end in a Python program: the command line has no use for it")
        net.cable(port, function)
