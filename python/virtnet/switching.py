"""What a switch does about its cables: VLANs, cables kept apart, limits, mirrors, bonds.

Every cable has a table of options, named after the node at its far end (past wires, tees and firewalls, which stand in
a cable). The same table is what files have::

    [functions.sw]
    kind = "switch"

    [functions.sw.cables.vm1]
    access = 10

    [functions.sw.cables.uplink]
    trunk = [10, "20-29"]
    native = 1
    broadcast_pps = 1000
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from virtnet.errors import ConfigError
from virtnet.spec import meant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["CABLES", "CABLE_OPTIONS", "check_cables", "prepare_switch"]

VLAN_MIN, VLAN_MAX = 1, 4094

#: What a cable is in where VLANs are told apart and nothing is said of it.
VLAN_USUAL = 1

_VLAN = {
    "type": "integer",
    "minimum": VLAN_MIN,
    "maximum": VLAN_MAX,
    "description": f"a VLAN from {VLAN_MIN} to {VLAN_MAX}",
}
_PPS = {"type": "integer", "minimum": 0, "maximum": 10**9, "description": "packets per second from 0 to 1000000000"}
_NAME = {"type": "string", "minLength": 1, "description": "a name"}
_STATION = "^(([1-9][0-9]{0,3})/)?([0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5})$"

#: The options of a cable, as JSON Schema.
CABLE_OPTIONS: dict[str, dict[str, Any]] = {
    "access": _VLAN,
    "trunk": {
        "type": "array",
        "items": {"anyOf": [_VLAN, {"type": "string", "pattern": "^([0-9]+-[0-9]+|all)$"}]},
        "description": 'a list of VLANs and ranges of them, such as [10, "20-29"], or ["all"]',
    },
    "native": _VLAN,
    "isolated": {"type": "boolean", "description": "true or false"},
    "group": _NAME,
    "learning": {"type": "boolean", "description": "true or false"},
    "broadcast_pps": _PPS,
    "multicast_pps": _PPS,
    "unknown_pps": _PPS,
    "bond": _NAME,
    "mirror": _NAME,
    "stations": {
        "type": "array",
        "items": {"type": "string", "pattern": _STATION},
        "description": 'a list of MAC addresses of single stations, such as "02:00:00:00:00:01", or of "VLAN/ADDRESS"',
    },
}

#: The table of all cables of a switch, as JSON Schema.
CABLES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": "object", "properties": CABLE_OPTIONS, "additionalProperties": False},
}

#: What makes a switch tell VLANs apart.
_VLAN_OPTIONS = frozenset({"access", "trunk", "native"})


def check_cables(options: dict[str, Any]) -> dict[str, Any]:
    """A switch's options in the form in which they are compared.

    Raises:
        ConfigError: a cable's options make no sense; the message begins with their place.
    """
    cables = {name: dict(table) for name, table in sorted(options["cables"].items())}
    aware = is_aware(cables)
    for name, table in cables.items():
        for option, value in table.items():
            try:
                _check_option(option, value, aware=aware)
            except ConfigError as error:
                raise ConfigError(f"cables.{name}.{option}: {error}") from None
        if "access" in table and table.keys() & {"trunk", "native"}:
            raise ConfigError(f"cables.{name}: a cable has an access VLAN, or is a trunk; found both")
        if "native" in table and "trunk" not in table:
            raise ConfigError(f"cables.{name}.native: a trunk has a native VLAN, and nothing says trunk here")
        if table.get("mirror") == name:
            raise ConfigError(f"cables.{name}.mirror: expected another cable of this switch, found {name!r}")
    return options | {"cables": {name: table for name, table in cables.items() if table}}


def is_aware(cables: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether VLANs are told apart."""
    return any(table.keys() & _VLAN_OPTIONS for table in cables.values())


def _check_option(option: str, value: Any, *, aware: bool) -> None:
    if option not in CABLE_OPTIONS:
        raise ConfigError(f"a cable has no such option{meant(option, CABLE_OPTIONS)}")
    kind = CABLE_OPTIONS[option]
    fits: dict[str, Callable[[], Any]] = {
        "integer": lambda: type(value) is int and kind["minimum"] <= value <= kind["maximum"],
        "boolean": lambda: isinstance(value, bool),
        "string": lambda: isinstance(value, str) and value,
        "array": lambda: isinstance(value, list | tuple),
    }
    if not fits[kind["type"]]():
        raise ConfigError(f"expected {kind['description']}, found {value!r}")
    if option == "trunk":
        vlans(value)
    if option == "stations":
        for station in value:
            _check_station(station, aware=aware)


def _check_station(text: Any, *, aware: bool) -> None:
    vlan, mac = _station(text)
    if mac[0] & 1 or not any(mac):
        raise ConfigError(f"{text!r} is not the address of one station")
    if aware != bool(vlan):
        wanted = "with its VLAN, VLAN/ADDRESS" if aware else "without a VLAN, since no cable has one"
        raise ConfigError(f"expected a station {wanted}, found {text!r}")


def vlans(parts: Iterable[int | str]) -> list[int]:
    """The VLANs that a trunk's list names, in order.

    Example:
        >>> vlans([30, "10-12"])
        [10, 11, 12, 30]
    """
    found: set[int] = set()
    for part in parts:
        text = f"{VLAN_MIN}-{VLAN_MAX}" if part == "all" else str(part)
        first, _, last = text.partition("-")
        if isinstance(part, bool) or not re.fullmatch("[0-9]+(-[0-9]+)?", text):
            raise ConfigError(f"expected a VLAN, a range such as '20-29', or 'all', found {part!r}")
        low, high = int(first), int(last or first)
        if not VLAN_MIN <= low <= high <= VLAN_MAX:
            raise ConfigError(f"VLANs are {VLAN_MIN} to {VLAN_MAX}, the lower first, found {part!r}")
        found.update(range(low, high + 1))
    return sorted(found)


def _station(text: Any) -> tuple[int, bytes]:
    found = re.fullmatch(_STATION, text) if isinstance(text, str) else None
    if not found or int(found[2] or 0) > VLAN_MAX:
        raise ConfigError(f"expected ADDRESS or VLAN/ADDRESS, such as 10/02:00:00:00:00:01, found {text!r}")
    return int(found[2] or 0), bytes.fromhex(found[3].replace(":", ""))


def prepare_switch(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the engine takes them: for each cable a table without names."""
    cables: dict[str, dict[str, Any]] = options.pop("cables")
    guard = options.pop("loop_guard")
    if not cables and guard is None:
        return options | {"aware": False, "loop_guard": 0, "cables": None}
    groups = {name: number for number, name in enumerate(_named(cables, "group"), 1)}
    bonds = {name: number for number, name in enumerate(_named(cables, "bond"), 1)}
    aware = is_aware(cables)
    prepared = {name: _prepare_cable(table, groups, bonds) for name, table in cables.items()}
    return options | {"aware": aware, "loop_guard": guard or 0, "cables": prepared}


def _named(cables: Mapping[str, Mapping[str, Any]], option: str) -> list[str]:
    return sorted({table[option] for table in cables.values() if option in table})


def _prepare_cable(table: Mapping[str, Any], groups: dict[str, int], bonds: dict[str, int]) -> dict[str, Any]:
    untagged = table.get("access", 0 if "trunk" in table else VLAN_USUAL)
    untagged = table.get("native", untagged)
    carried = set(vlans(table.get("trunk", ()))) | ({untagged} - {0})
    return {
        "untagged": untagged,
        "vlans": sorted(carried),
        "isolated": table.get("isolated", False),
        "horizon": groups.get(table.get("group", ""), 0),
        "learning": table.get("learning", True),
        "broadcast": table.get("broadcast_pps"),
        "multicast": table.get("multicast_pps"),
        "unknown": table.get("unknown_pps"),
        "bond": bonds.get(table.get("bond", ""), 0),
        "mirror": table.get("mirror"),
        "stations": [_station(station) for station in table.get("stations", ())],
    }
