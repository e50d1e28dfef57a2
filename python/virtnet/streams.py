"""Streams of a generator as values: what packets are, what differs from one to the next, how fast they are sent."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsBytes, TypeAlias

from virtnet.errors import ConfigError
from virtnet.spec import meant
from virtnet.writing import WRITABLE, address_number

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Counter", "Random", "Stream"]

#: The shortest frame that a generator makes.
STREAM_FRAME_MIN = 60
STREAM_FRAME_MAX = 65_535

#: Streams that one generator makes, and numbers that streams have.
STREAMS_MAX = 64
STREAM_IDS = 1 << 16

#: Values in a list, and packets that leave together.
VALUES_MAX = 100_000
BURST_MAX = 1_000_000

#: Bytes that a number has at most.
WIDTH_MAX = 16


@dataclass(frozen=True)
class Counter:
    """Values that count: ``start``, ``start + step`` and so on, ``count`` of them, then again from the first.

    Attributes:
        start: the first, a number or the text of an address.
        step: from one to the next, also below 0.
        count: how many there are, from 1.
    """

    start: int | str = 0
    step: int = 1
    count: int = 1 << 32


@dataclass(frozen=True)
class Random:
    """Random values, each as likely as any other; the same for the same seed.

    Attributes:
        low: the smallest, a number or the text of an address.
        high: the largest.
        seed: what they are made of; from the field's name and the stream's number if not given.
    """

    low: int | str
    high: int | str
    seed: int | None = None


#: What a field has: one value, or some in turn, or those of a counter or of chance.
Varying: TypeAlias = "int | str | range | list[int | str] | tuple[int | str, ...] | Counter | Random"


@dataclass(frozen=True)
class Stream:
    """One stream of packets, for :meth:`Net.generator`.

    Attributes:
        frame: what each packet is but for what differs: bytes, or what makes bytes of itself, as Scapy's packets do;
            60 to 65_535 bytes, with room for the 18 bytes of the signature behind its headers and within the first 192
            bytes. A UDP datagram to port 9 (discard) if not given.
        vary: what differs from packet to packet, by where it is: a field that :meth:`Burst.edit` writes (``ip_src``,
            ``l4_dst`` ...), or ``(offset, width)`` in bytes, within the first 192 of the frame. Values are numbers, or
            texts of addresses: a list or a :class:`range` in turn, a :class:`Counter`, or :class:`Random`. Checksums
            of IPv4, TCP, UDP and ICMP follow.
        rate_pps: packets a second; without a rate as many as the receiver takes.
        rate_bps: instead, bits of frames a second, without preamble and checksum.
        burst: packets that leave together, where there is a rate.
        count: packets in all; without end if not given.
        size: bytes of the frame, without Ethernet's checksum, where none is given.
        name: what reports call it.

    Example:
        >>> import virtnet as vn
        >>> vn.Stream(size=128, rate_pps=1000, vary={"ip_src": vn.Counter("10.0.0.1", count=254), "l4_src": [7, 8]})
        Stream(size=128, rate_pps=1000, vary=ip_src, l4_src)
    """

    frame: bytes | bytearray | memoryview | SupportsBytes | None = None
    vary: Mapping[str | tuple[int, int], Varying] = field(default_factory=dict)
    rate_pps: float | None = None
    rate_bps: float | None = None
    burst: int = 1
    count: int | None = None
    size: int | None = None
    name: str = ""

    def __repr__(self) -> str:
        """What was chosen."""
        chosen = {
            "name": self.name or None,
            "frame": None if self.frame is None else f"{len(frame_bytes(self.frame))} bytes",
            "size": self.size,
            "rate_pps": self.rate_pps,
            "rate_bps": self.rate_bps,
            "burst": self.burst if self.burst > 1 else None,
            "count": self.count,
            "vary": ", ".join(map(str, self.vary)) or None,
        }
        return f"Stream({', '.join(f'{name}={value}' for name, value in chosen.items() if value is not None)})"

    def to_dict(self) -> dict[str, Any]:
        """The form that files have; what is default is left out.

        Raises:
            ConfigError: the frame is none, or what varies makes no sense.
        """
        table: dict[str, Any] = {} if self.frame is None else {"frame": frame_bytes(self.frame).hex()}
        if self.vary:
            table["vary"] = [_vary_dict(at, values) for at, values in self.vary.items()]
        for name in ("rate_pps", "rate_bps"):
            if (rate := getattr(self, name)) is not None:
                table[name] = float(rate)
        for name, default in (("burst", 1), ("count", None), ("size", None), ("name", "")):
            if (value := getattr(self, name)) != default:
                table[name] = value
        return table


def frame_bytes(frame: Any) -> bytes:
    """The bytes of a frame: bytes, or what makes bytes of itself, as Scapy's packets do.

    Raises:
        ConfigError: it is something else.
    """
    try:
        return bytes(memoryview(frame))
    except TypeError:
        if isinstance(frame, SupportsBytes):
            return bytes(frame)
        raise ConfigError(f"expected a frame: bytes, or a packet that becomes bytes, found {frame!r}") from None


def _vary_dict(at: str | tuple[int, int], values: Any) -> dict[str, Any]:
    place = at if isinstance(at, str) else ":".join(map(str, at))
    if isinstance(values, range):
        values = Counter(values.start, values.step, len(values))
    if isinstance(values, Counter):
        return {"at": place, "start": values.start, "step": values.step, "count": values.count}
    if isinstance(values, Random):
        table: dict[str, Any] = {"at": place, "low": values.low, "high": values.high}
        return table if values.seed is None else table | {"seed": values.seed}
    if hasattr(values, "tolist"):
        values = values.tolist()
    return {"at": place, "values": list(values) if isinstance(values, list | tuple) else [values]}


_VALUE = {"type": ["integer", "string"]}
_RATE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1e12}
_VARY = {
    "type": "object",
    "required": ["at"],
    "properties": {
        "at": {"type": "string"},
        "start": _VALUE,
        "step": {"type": "integer"},
        "count": {"type": "integer", "minimum": 1, "maximum": (1 << 64) - 1},
        "low": _VALUE,
        "high": _VALUE,
        "seed": {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1},
        "values": {"type": "array", "items": _VALUE, "minItems": 1, "maxItems": VALUES_MAX},
    },
    "additionalProperties": False,
}

#: The schema of streams.
STREAMS = {
    "type": "array",
    "minItems": 1,
    "maxItems": STREAMS_MAX,
    "items": {
        "type": "object",
        "properties": {
            "frame": {
                "type": "string",
                "pattern": "^([0-9a-fA-F]{2}){60,65535}$",
                "description": "a frame of 60 to 65535 bytes in hexadecimal",
            },
            "vary": {"type": "array", "items": _VARY},
            "rate_pps": _RATE,
            "rate_bps": _RATE,
            "burst": {"type": "integer", "minimum": 1, "maximum": BURST_MAX},
            "count": {"type": "integer", "minimum": 0},
            "size": {"type": "integer", "minimum": STREAM_FRAME_MIN, "maximum": STREAM_FRAME_MAX},
            "name": {"type": "string"},
        },
        "additionalProperties": False,
    },
}


def prepare_streams(options: Mapping[str, Any], default_frame: Any) -> list[dict[str, Any]]:
    """Streams as the engine takes them; ``default_frame`` makes one of a size.

    Raises:
        ConfigError: one makes no sense; the message says which.
    """
    orders = []
    for k, table in enumerate(options["streams"]):
        place = f"streams[{k}]"
        frame = (
            bytes.fromhex(table["frame"]) if "frame" in table else default_frame(table.get("size", STREAM_FRAME_MIN))
        )
        if "frame" in table and "size" in table:
            raise ConfigError(f"{place}: size is for streams without a frame, which has its own")
        rate = None
        if "rate_pps" in table and "rate_bps" in table:
            raise ConfigError(f"{place}: a rate is in packets (rate_pps) or in bits (rate_bps) a second, not both")
        # In packets for a thousand seconds.
        if "rate_pps" in table:
            rate = max(1, round(table["rate_pps"] * 1000))
        elif "rate_bps" in table:
            rate = max(1, round(table["rate_bps"] * 1000 / (8 * len(frame))))
        orders.append(
            {
                "id": options["first_id"] + k,
                "frame": frame,
                "vary": [_prepared(one, options["first_id"] + k, place) for one in table.get("vary", ())],
                "rate": rate,
                "burst": table.get("burst", 1),
                "count": table.get("count"),
            }
        )
    return orders


def _prepared(vary: Mapping[str, Any], stream: int, place: str) -> dict[str, Any]:
    at = vary["at"]
    prepared: dict[str, Any] = {"field": None, "offset": 0, "width": 0}
    if found := re.fullmatch(r"([0-9]{1,5}):([0-9]{1,2})", at):
        offset, width = map(int, found.groups())
        if not 1 <= width <= WIDTH_MAX:
            raise ConfigError(f"{place}: {at}: a number has 1 to {WIDTH_MAX} bytes, found {width}")
        prepared |= {"offset": offset, "width": width}
        bits = 8 * width
    elif at in WRITABLE:
        prepared["field"] = at
        bits = WRITABLE[at]
    else:
        raise ConfigError(f"{place}: what varies is a field or offset:width, and {at!r} is none{meant(at, WRITABLE)}")

    def number(value: int | str) -> int:
        found = address_number(at, value) if isinstance(value, str) and at in WRITABLE else value
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 1 << bits:
            raise ConfigError(f"{place}: {at}: expected a number of {bits} bits, found {value!r}")
        return found

    ways = {"start": "counter", "low": "random", "high": "random", "values": "list"}
    how = {way for key, way in ways.items() if key in vary}
    if len(how) != 1 or (("low" in vary) != ("high" in vary)):
        raise ConfigError(f"{place}: {at}: give values, or start (with step and count), or low and high (with a seed)")
    if how == {"counter"}:
        step, count = vary.get("step", 1), vary.get("count", 1 << 32)
        # Fields shorter than the numbers wrap around.
        return prepared | {"how": "counter", "start": number(vary["start"]), "step": step, "count": count}
    if how == {"random"}:
        low, high = number(vary["low"]), number(vary["high"])
        if low > high:
            raise ConfigError(f"{place}: {at}: low is above high")
        seed = vary.get("seed", zlib.crc32(f"{stream}/{at}".encode()))
        return prepared | {"how": "random", "low": low, "high": high, "seed": seed}
    return prepared | {"how": "list", "values": [number(value) for value in vary["values"]]}
