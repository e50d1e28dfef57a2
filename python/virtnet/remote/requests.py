"""What a network can be asked for from beside, by name: each request is a function of the network and its arguments."""

from __future__ import annotations

import os
import re
import select
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeAlias

from virtnet.description import Spec
from virtnet.errors import ConfigError
from virtnet.nodes import PortNode
from virtnet.remote.lines import read_line

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from virtnet.capturing import Place
    from virtnet.net import Net
    from virtnet.nodes import Device

    #: The network, the arguments, descriptors that came with them, what says a first answer, and the caller.
    Request: TypeAlias = Callable[[Net, dict[str, Any], list[int], Callable[[Any], None], socket.socket], Any]

__all__ = ["REQUESTS"]

#: How often it is looked whether a capture has ended without telling.
LOOK_MS = 500

#: The longest line that asks for packets, and how many bytes of them are to be taken within the time for an answer.
ASKED_MAX = 1024
PIECE = 4 << 20

#: Bytes that say where a packet begins.
START_LEN = 4

#: Seconds that such a line may take to be whole.
ASKED_S = 5.0


def _about(net: Net, *_rest: object) -> dict[str, Any]:
    from virtnet import __version__

    try:
        directory = os.getcwd()  # noqa: PTH109 - a text
    except FileNotFoundError:  # it was removed
        directory = ""
    return {"pid": os.getpid(), "version": __version__, "directory": directory, "name": net.name}


def _spec(net: Net, *_rest: object) -> dict[str, Any]:
    return net.spec.to_dict()


def _stats(net: Net, *_rest: object) -> dict[str, Any]:
    return asdict(net.stats())


def _events(net: Net, arguments: dict[str, Any], *_rest: object) -> list[Any]:
    port, first = _port(net, arguments), arguments.get("first", 0)
    if type(first) is not int or first < 0:
        raise ConfigError(f"first is the number of an event, found {first!r}")
    return list(port._read_events(first))  # noqa: SLF001 - a part of the network


def _rings(net: Net, arguments: dict[str, Any], *_rest: object) -> list[dict[str, Any]]:
    return [ring.to_dict() for ring in _port(net, arguments).rings]


def _set_link(net: Net, arguments: dict[str, Any], *_rest: object) -> None:
    up = arguments.get("up")
    if not isinstance(up, bool):
        raise ConfigError(f"up is true or false, found {up!r}")
    _port(net, arguments).set_link(up)


def _command(net: Net, arguments: dict[str, Any], *_rest: object) -> None:
    command, values = arguments.get("command"), arguments.get("arguments")
    if not isinstance(command, str) or not isinstance(values, dict):
        raise ConfigError("a command of a control queue and its arguments were expected")
    _asked_of(net, arguments)._command(command, **values)  # noqa: SLF001 - a part of the network


def _device_stats(net: Net, arguments: dict[str, Any], *_rest: object) -> list[tuple[int, list[int]]]:
    asked = arguments.get("asked")
    if not isinstance(asked, list):
        raise ConfigError(f"asked is a list of queues and kinds, found {asked!r}")
    pairs = [(queue, kinds) for queue, kinds in asked]
    return _asked_of(net, arguments)._ask_stats(pairs)  # noqa: SLF001 - a part of the network


def _device_state(net: Net, arguments: dict[str, Any], *_rest: object) -> str:
    state = arguments.get("state")
    if state is not None and not (isinstance(state, str) and re.fullmatch("([0-9a-f]{2})*", state)):
        raise ConfigError("a state as hexadecimal digits, or null, was expected")
    saved = _asked_of(net, arguments)._device_state(None if state is None else bytes.fromhex(state))  # noqa: SLF001
    return saved.hex()


def _asked_of(net: Net, arguments: dict[str, Any]) -> Device:
    return _port(net, arguments).device


def _apply(net: Net, arguments: dict[str, Any], *_rest: object) -> list[dict[str, Any]]:
    document = arguments.get("spec")
    if not isinstance(document, dict):
        raise ConfigError("a description of a network was expected as spec")
    plan = net.apply(Spec.from_dict(document))
    return [plan.before.to_dict(), plan.after.to_dict()]


def _rollback(net: Net, *_rest: object) -> list[dict[str, Any]]:
    plan = net.rollback()
    return [plan.before.to_dict(), plan.after.to_dict()]


def _capture(
    net: Net, arguments: dict[str, Any], passed: list[int], begun: Callable[[Any], None], caller: socket.socket
) -> dict[str, Any]:
    """Captures until the caller has closed its side, or until it ends by itself."""
    if len(passed) != 1:
        raise ConfigError("a capture needs the descriptor that is written to, passed with the request")
    where, chosen = _places(arguments), _filter(arguments)
    capture = net.capture(where, passed[0], filter=chosen, pcap=arguments.get("pcap") is True)
    with capture:
        begun({"name": capture.file.name, "places": capture.places})
        poll = select.poll()
        poll.register(caller, select.POLLIN)
        poll.register(passed[0], 0)  # a pipe whose reader has left says so unasked
        while not poll.poll(LOOK_MS) and capture.running and net.running:
            pass
    return {"packets": capture.packets, "dropped": capture.dropped, "why": capture.why}


def _columns(
    net: Net, arguments: dict[str, Any], _passed: list[int], begun: Callable[[Any], None], caller: socket.socket
) -> dict[str, Any]:
    """Captures into memory, and gives what there is for each line, until the caller has closed its side."""
    where, chosen = _places(arguments), _filter(arguments)
    room = {name: arguments[name] for name in ("snap", "memory") if name in arguments}
    capture = net.capture(where, filter=chosen, **room)

    given = 0

    def give(*, last: bool) -> None:
        nonlocal given
        parts = capture._take()  # noqa: SLF001 - a part of the network
        given += len(parts[1]) // START_LEN
        sizes = [len(part) for part in parts]
        begun({"sizes": sizes, "packets": given, "dropped": capture.dropped, "last": last})
        for part in parts:
            for at in range(0, len(part), PIECE):
                caller.sendall(memoryview(part)[at : at + PIECE])  # each of them in time

    with capture:
        begun({"name": capture.file.name, "places": capture.places})
        poll = select.poll()
        poll.register(caller, select.POLLIN)
        rest = bytearray()
        while capture.running and net.running:
            if not poll.poll(LOOK_MS):
                continue
            if read_line(caller, rest, ASKED_MAX, ASKED_S) is None:
                break
            give(last=False)
    give(last=True)
    return {"packets": given, "dropped": capture.dropped, "why": capture.why}


def _places(arguments: dict[str, Any]) -> list[Place]:
    """One place by the names of its nodes, or a list of such places."""
    where = arguments.get("where")
    places = where if isinstance(where, list) and where and isinstance(where[0], list) else [where]
    return [_place(place) for place in places]


def _place(place: object) -> Place:
    names = [place] if isinstance(place, str) else place
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) not in {1, 2}:
        raise ConfigError(f"where is the name of a node, or of those at the ends of a cable, found {place!r}")
    return names[0] if len(names) == 1 else (names[0], names[1])


def _filter(arguments: dict[str, Any]) -> str | list[str]:
    chosen = arguments.get("filter", "")
    if not isinstance(chosen, str | list):
        raise ConfigError(f"filter is a text, found {chosen!r}")
    return chosen


def _port(net: Net, arguments: dict[str, Any]) -> PortNode:
    name = arguments.get("port")
    if not isinstance(name, str):
        raise ConfigError(f"port is the name of one, found {name!r}")
    node = net[name]
    if not isinstance(node, PortNode):
        raise ConfigError(f"{name!r} is a {node.kind} and no port")
    return node


REQUESTS: dict[str, Request] = {
    "about": _about,
    "spec": _spec,
    "stats": _stats,
    "events": _events,
    "rings": _rings,
    "set_link": _set_link,
    "command": _command,
    "device_stats": _device_stats,
    "device_state": _device_state,
    "apply": _apply,
    "rollback": _rollback,
    "capture": _capture,
    "columns": _columns,
}
