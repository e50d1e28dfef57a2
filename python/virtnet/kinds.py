"""The kinds of function there are: their options, how many cables they take, what can change while they run.

Every kind is one entry of :data:`FUNCTIONS`; files, :class:`~virtnet.Spec` and the engine follow it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from virtnet.errors import ConfigError
from virtnet.firewalling import ACTIONS, TIMEOUTS, check_firewall, prepare_firewall
from virtnet.routing import (
    BALANCER_OPTIONS,
    NAT_OPTIONS,
    ROUTER_OPTIONS,
    check_balancer,
    check_nat,
    check_router,
    prepare_balancer,
    prepare_nat,
    prepare_router,
)
from virtnet.streams import STREAM_IDS, STREAMS, STREAMS_MAX, prepare_streams
from virtnet.switching import CABLES, check_cables, prepare_switch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["FUNCTIONS", "FunctionKind"]

#: The shortest and the longest frame there is, without Ethernet's checksum.
FRAME_MIN = 14
FRAME_MAX = 65_535

#: What a frame is filled up to where nothing is said: the shortest that a cable of copper carries.
FRAME_USUAL = 60

#: Ends of datagrams that nobody answers, with addresses that are kept for benchmarks (RFC 2544, C.2.2).
NOBODY = bytes([0x02, 0, 0, 0, 0, 1, 198, 18, 0, 1])
EVERYBODY = bytes([*[0xFF] * 6, 198, 18, 0, 2])

#: A source holds a burst.
SOURCE_PACKETS_MAX = 64

#: Packets that may wait for Python: a burst of a worker at least, and what a memory port holds less some bursts that
#: several workers may send at once.
QUEUE_MIN = 64
QUEUE_SPARE = 1024
QUEUE_MAX = 65536 - QUEUE_SPARE

#: The offload metadata of a packet with nothing left to do.
PLAIN = bytes(10)

#: The most flows that a firewall remembers.
STATES_MAX = 1 << 24

#: Values that a quantity has over time, and numbers in the table of a distribution.
TRACK_MAX = 1_000_000

MANY = (4096, "many")


@dataclass(frozen=True)
class FunctionKind:
    """One kind of function.

    Attributes:
        cables: how many it takes at most, as a number and in words.
        options: JSON Schema and default of each.
        changeable: options, and what is made of them, that can change while it runs, without losing its state.
        branches: options that name a node, and the gate that its cable goes to, or several, and the gate of the
            first; others take the gates below. Gates 0 and 1 of what stands in a cable are its ends.
        check: options in the form in which they are compared, or an error that begins with the place of what is wrong.
        checked: options that ``check`` leaves nothing to be said about.
        prepare: options as the engine takes them.
        by_far_end: the option that is a table of its cables, by who is at their far end.
        stands_in_cables: it has two ends and is no end of a cable to those who name cables by who is at their far end.
    """

    cables: tuple[int, str]
    options: Mapping[str, tuple[dict[str, Any], Any]] = field(default_factory=dict)
    changeable: frozenset[str] = frozenset()
    branches: Mapping[str, int] = field(default_factory=dict)
    check: Callable[[dict[str, Any]], dict[str, Any]] = dict
    checked: frozenset[str] = frozenset()
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict
    by_far_end: str = ""
    stands_in_cables: bool = False

    def for_engine(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options as the engine takes them."""
        prepared = self.prepare(dict(options))
        gates = self.gates(options)
        # What was made of options that can change changes with them.
        changeable = self.changeable | (prepared.keys() - options.keys())
        return prepared | {"gates": gates, "changeable": sorted(changeable)}

    def gates(self, options: Mapping[str, Any]) -> dict[str, int]:
        """The gates of those nodes that have one of their own."""
        gates: dict[str, int] = {}
        for option, first in self.branches.items():
            names = options[option]
            for gate, name in enumerate([names] if isinstance(names, str) else names, first):
                gates |= {name: gate} if name else {}
        return gates


def _element(options: dict[str, Any]) -> dict[str, Any]:
    """Checks nothing: the engine does."""
    import json

    try:
        program = json.loads(options["program"])
        steps = [(str(op), str(dtype), list(args)) for op, dtype, args in program["steps"]]
        tables = [(list(keys), list(values), default) for keys, values, default in program["tables"]]
        names = list(program["to"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"program: this is no element's: {error!r}") from None
    # Ways are numbers in a program: those of the first cables there are.
    if names != options["to"][: len(names)]:
        raise ConfigError(f"program: it sends to {names}, and the element has cables to {options['to']}")
    return options | {"steps": steps, "tables": tables}


def _filtered(options: dict[str, Any]) -> dict[str, Any]:
    from virtnet.filters import compile_filter

    return options | {"program": compile_filter(options["filter"])}


def _source(options: dict[str, Any]) -> dict[str, Any]:
    size = options["size"]
    packets = []
    for text in options["frames"] or [discard_frame(size or FRAME_USUAL).hex()]:
        packet, _, offload = text.partition("/")
        frame = bytes.fromhex(packet)
        packets.append((frame if size is None else frame[:size].ljust(size, b"\0"), bytes.fromhex(offload) or PLAIN))
    return options | {"packets": packets}


def _generator(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"orders": prepare_streams(options, discard_frame)}


def _over_time(maximum: float | None = None) -> dict[str, Any]:
    """The schema of a number from 0, or of several that take turns."""
    number = {"type": "number", "minimum": 0} | ({} if maximum is None else {"maximum": maximum})
    return {"anyOf": [number, {"type": "array", "items": number, "minItems": 1, "maxItems": TRACK_MAX}]}


_CHANCE = {"type": "number", "minimum": 0, "maximum": 1}


def _impaired(options: dict[str, Any]) -> dict[str, Any]:
    tracks = {}
    for name in ("delay_ms", "jitter_ms", "loss", "rate_bps", "rate_pps"):
        if (value := options[name]) is not None:
            tracks[name] = list(map(float, value)) if isinstance(value, list | tuple) else [float(value)]
    shape = options["distribution"]
    named = isinstance(shape, str)
    return options | {
        "tracks": tracks,
        "shape": shape if named else None,
        "table": None if named else list(map(float, shape)),
    }


FUNCTIONS: dict[str, FunctionKind] = {
    "switch": FunctionKind(
        MANY,
        {
            "ageing_s": ({"type": "number", "exclusiveMinimum": 0}, 300.0),
            "cables": (CABLES, {}),
            "loop_guard": ({"type": "integer", "minimum": 1, "maximum": 10**6}, None),
        },
        changeable=frozenset({"ageing_s", "cables", "loop_guard"}),
        check=check_cables,
        checked=frozenset({"cables"}),
        prepare=prepare_switch,
        by_far_end="cables",
    ),
    "wire": FunctionKind((2, "two"), stands_in_cables=True),
    "tee": FunctionKind(
        (3, "three"),
        {"branch": ({"type": "string"}, ""), "filter": ({"type": "string"}, "")},
        branches={"branch": 2},
        prepare=_filtered,
        stands_in_cables=True,
    ),
    "divert": FunctionKind(
        (4, "four"),
        {
            "filter": ({"type": "string"}, ""),
            "late": ({"enum": ["pass", "drop", "hold"]}, "pass"),
            "queue": ({"type": "integer", "minimum": QUEUE_MIN, "maximum": QUEUE_MAX}, 1024),
            "enabled": ({"type": "boolean"}, True),
            # The node whose packets leave by the first branch, and the memory ports at the branches.
            "a": ({"type": "string"}, ""),
            "forth": ({"type": "string"}, ""),
            "back": ({"type": "string"}, ""),
        },
        changeable=frozenset({"filter", "late", "enabled"}),
        branches={"a": 0, "forth": 2, "back": 3},
        prepare=_filtered,
        stands_in_cables=True,
    ),
    "element": FunctionKind(
        MANY,
        {
            "program": ({"type": "string"}, '{"steps":[],"tables":[],"to":[]}'),
            "to": ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, []),
        },
        changeable=frozenset({"program"}),
        branches={"to": 2},
        prepare=_element,
        stands_in_cables=True,
    ),
    "firewall": FunctionKind(
        (2, "two"),
        {
            "rules": ({"type": "string", "description": "rules, one a line"}, ""),
            "sets": (
                {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
                {},
            ),
            "inside": ({"type": "string"}, ""),
            "default": ({"enum": list(ACTIONS)}, "drop"),
            "fragments": ({"enum": ["follow", "drop"]}, "follow"),
            "states": ({"type": "integer", "minimum": 1, "maximum": STATES_MAX}, 100_000),
            "timeouts": (
                {
                    "type": "object",
                    "properties": {key: {"type": "number", "exclusiveMinimum": 0} for key in TIMEOUTS},
                    "additionalProperties": False,
                },
                {},
            ),
        },
        # Its inside is named by who is past what stands in the cable, where a capture may come and go.
        changeable=frozenset({"rules", "sets", "default", "fragments", "timeouts", "gates"}),
        branches={"inside": 1},
        check=check_firewall,
        checked=frozenset({"rules", "sets", "timeouts"}),
        prepare=prepare_firewall,
        stands_in_cables=True,
    ),
    "sink": FunctionKind(MANY, {"copy": ({"type": "boolean"}, False)}),
    "source": FunctionKind(
        (1, "one"),
        {
            "frames": (
                {
                    "type": "array",
                    "items": {
                        "type": "string",
                        "pattern": "^([0-9a-fA-F]{2}){14,65535}(/([0-9a-fA-F]{2}){10})?$",
                        "description": "a frame in hexadecimal, a slash and its offload metadata behind if it has some",
                    },
                    "minItems": 1,
                    "maxItems": SOURCE_PACKETS_MAX,
                },
                None,
            ),
            "size": ({"type": "integer", "minimum": FRAME_MIN, "maximum": FRAME_MAX}, None),
            "rate_pps": ({"type": "number", "exclusiveMinimum": 0}, None),
            "count": ({"type": "integer", "minimum": 0}, None),
        },
        changeable=frozenset({"rate_pps", "count"}),
        prepare=_source,
    ),
    "generator": FunctionKind(
        (2, "two"),
        {
            "streams": (STREAMS, [{}]),
            "first_id": ({"type": "integer", "minimum": 0, "maximum": STREAM_IDS - STREAMS_MAX}, 0),
            # The node that packets are sent to, where there are two.
            "to": ({"type": "string"}, ""),
            # How often it was told to begin anew.
            "run": ({"type": "integer", "minimum": 0}, 0),
        },
        changeable=frozenset({"streams", "first_id", "run"}),
        branches={"to": 0},
        prepare=_generator,
    ),
    "analyser": FunctionKind(
        MANY,
        {
            "check": ({"type": "boolean"}, False),
            # How often it was reset.
            "resets": ({"type": "integer", "minimum": 0}, 0),
        },
        changeable=frozenset({"check", "resets"}),
    ),
    "echo": FunctionKind(MANY),
    "impairment": FunctionKind(
        (2, "two"),
        {
            "delay_ms": (_over_time(3_600_000), 0.0),
            "jitter_ms": (_over_time(3_600_000), 0.0),
            "distribution": (
                {
                    "anyOf": [
                        {"enum": ["uniform", "normal", "pareto"]},
                        {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": TRACK_MAX},
                    ]
                },
                "uniform",
            ),
            "keep_order": ({"type": "boolean"}, False),
            "loss": (_over_time(1), 0.0),
            "gemodel": ({"type": "array", "items": _CHANCE, "minItems": 4, "maxItems": 4}, None),
            "duplicate": (_CHANCE, 0.0),
            "reorder": (_CHANCE, 0.0),
            "corrupt": (_CHANCE, 0.0),
            "rate_bps": (_over_time(), None),
            "rate_pps": (_over_time(), None),
            "burst_bytes": ({"type": "number", "minimum": 0}, 0.0),
            "burst_packets": ({"type": "number", "minimum": 0}, 0.0),
            "queue_packets": ({"type": "integer", "minimum": 0, "maximum": 10_000_000}, 1000),
            "queue_bytes": ({"type": "integer", "minimum": 0, "maximum": 2**40}, None),
            "step_s": ({"type": "number", "exclusiveMinimum": 0}, 1.0),
            "direction": ({"enum": ["both", "from", "to"]}, "both"),
            "seed": ({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, 0),
            # The node whose packets are those of the direction "from".
            "a": ({"type": "string"}, ""),
        },
        changeable=frozenset(
            {
                *("delay_ms", "jitter_ms", "distribution", "keep_order", "loss", "gemodel", "duplicate", "reorder"),
                *("corrupt", "rate_bps", "rate_pps", "burst_bytes", "burst_packets", "queue_packets", "queue_bytes"),
                "step_s",
            }
        ),
        branches={"a": 0},
        prepare=_impaired,
    ),
    "router": FunctionKind(
        MANY,
        ROUTER_OPTIONS,
        changeable=frozenset(ROUTER_OPTIONS),
        check=check_router,
        checked=frozenset(ROUTER_OPTIONS),
        prepare=prepare_router,
        by_far_end="interfaces",
    ),
    "nat": FunctionKind(
        MANY,
        NAT_OPTIONS,
        changeable=frozenset(NAT_OPTIONS),
        check=check_nat,
        checked=frozenset(NAT_OPTIONS),
        prepare=prepare_nat,
        by_far_end="interfaces",
    ),
    "load_balancer": FunctionKind(
        MANY,
        BALANCER_OPTIONS,
        changeable=frozenset(BALANCER_OPTIONS),
        check=check_balancer,
        checked=frozenset(BALANCER_OPTIONS),
        prepare=prepare_balancer,
        by_far_end="interfaces",
    ),
}


def discard_frame(size: int, sender: bytes = NOBODY, to: bytes = EVERYBODY) -> bytes:
    """A UDP datagram to the discard port, in a frame of ``size`` bytes at least; ends are a MAC and an IPv4 address."""
    ip_len = max(size, FRAME_USUAL) - FRAME_MIN
    udp = b"".join(n.to_bytes(2, "big") for n in (9, 9, ip_len - 20, 0))
    header = bytearray.fromhex("4500000000000000401100000000000000000000")
    header[2:4] = ip_len.to_bytes(2, "big")
    header[12:20] = sender[6:] + to[6:]
    header[10:12] = _checksum(header).to_bytes(2, "big")
    ethernet = to[:6] + sender[:6] + b"\x08\x00"
    return (ethernet + header + udp).ljust(size, b"\0")


def _checksum(data: bytes | bytearray) -> int:
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
