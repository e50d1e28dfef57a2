"""Routers: what their options may be, and how the engine takes them.

Interfaces are a table by the node at the far end of the cable, routes one by prefix::

    [functions.gw]
    kind = "router"
    interfaces = {lan = "10.0.0.1/24", wan = {addresses = ["192.0.2.2/24", "2001:db8::2/64"], mtu = 1400}}
    routes = {"0.0.0.0/0" = "192.0.2.1", "10.9.0.0/16" = "lan"}
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Network, ip_interface
from typing import TYPE_CHECKING, Any

from virtnet import _virtnet
from virtnet.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BALANCER_OPTIONS",
    "NAT_OPTIONS",
    "ROUTER_OPTIONS",
    "check_balancer",
    "check_nat",
    "check_router",
    "prepare_balancer",
    "prepare_nat",
    "prepare_router",
]

#: An interface's MTU where nothing is said of it.
MTU_USUAL = 1500
MTU_MIN, MTU_MAX = 68, 65_535
#: The least where there is IPv6.
MTU6_MIN = 1280

PORT_MAX = 65_535
#: Of prefixes that are translated: behind them is a station's own part of an address.
PREFIX6_MAX = 64

_ADDRESSES = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_MAC = "^[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}$"

#: The table of a router's interfaces, as JSON Schema.
INTERFACES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {
        "description": 'an address with its prefix, such as "10.0.0.1/24", several, or a table with more about them',
        "anyOf": [
            {"type": "string"},
            _ADDRESSES,
            {
                "type": "object",
                "properties": {
                    "addresses": {"anyOf": [{"type": "string"}, _ADDRESSES]},
                    "mac": {"type": "string", "pattern": _MAC},
                    "mtu": {"type": "integer", "minimum": MTU_MIN, "maximum": MTU_MAX},
                },
                "required": ["addresses"],
                "additionalProperties": False,
            },
        ],
    },
}

#: The table of its routes. What is in it is checked when it is made into one that is looked up: there may be a million.
ROUTES: dict[str, Any] = {
    "type": "object",
    "description": 'a table of prefixes, such as "10.0.0.0/8", each with the next router\'s address, the node '
    "whose link it is, or ADDRESS%NODE",
}

#: ICMP errors per second.
ERRORS: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 10**9}

_NAMES = {"type": "array", "items": {"type": "string"}}
_FLOWS: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 1 << 24}
FLOWS_USUAL = 65_536

_PROTOCOLS = {"tcp": 6, "udp": 17}

Options = dict[str, tuple[dict[str, Any], Any]]

#: The options of routers, with their defaults.
ROUTER_OPTIONS: Options = {
    "interfaces": (INTERFACES, {}),
    "routes": (ROUTES, {}),
    "errors_pps": (ERRORS, 1000),
}

#: Those of routers that translate, beside them.
NAT_OPTIONS: Options = {
    **ROUTER_OPTIONS,
    "outside": (_NAMES, []),
    "pool": (_NAMES, []),
    "forward": (
        {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": 'a table of services, such as "tcp:192.0.2.2:8080" or "tcp:8080", each with ADDRESS:PORT',
        },
        {},
    ),
    "prefixes": (
        {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": 'a table of IPv6 prefixes inside, such as "fd00:1::/48", each with the one it is outside',
        },
        {},
    ),
    "flows_max": (_FLOWS, FLOWS_USUAL),
}

#: Those of load balancers, likewise.
BALANCER_OPTIONS: Options = {
    **ROUTER_OPTIONS,
    "services": ({**_NAMES, "description": 'services, such as ["tcp:192.0.2.10:80"]'}, []),
    "backends": ({**_NAMES, "description": 'who serves them, such as ["10.0.0.5:80"]'}, []),
    "flows_max": (_FLOWS, FLOWS_USUAL),
}


def check_router(options: dict[str, Any]) -> dict[str, Any]:
    """A router's options in the form in which they are compared.

    Raises:
        ConfigError: they make no sense; the message begins with their place.
    """
    for option, example in (("interfaces", 'node: "10.0.0.1/24"'), ("routes", '"0.0.0.0/0": "10.0.0.254"')):
        if not isinstance(options[option], dict):
            raise ConfigError(f"{option}: expected a table such as {{{example}}}, found {options[option]!r}")
    interfaces = {name: _interface(name, given) for name, given in sorted(options["interfaces"].items())}
    routes = dict(options["routes"])
    if type(options["errors_pps"]) is not int or options["errors_pps"] < 1:
        raise ConfigError(
            f"errors_pps: expected a number of ICMP errors per second from 1, found {options['errors_pps']!r}"
        )
    for prefix, hop in routes.items():
        if not isinstance(prefix, str) or not isinstance(hop, str):
            raise ConfigError(f"routes: expected text for prefix and next router, found {prefix!r}: {hop!r}")
    _virtnet.check_router(_stations(interfaces), routes)
    return options | {"interfaces": interfaces, "routes": routes}


def _interface(name: str, given: Any) -> dict[str, Any]:
    table = dict(given) if isinstance(given, dict) else {"addresses": given}
    place = f"interfaces.{name}"
    if unknown := table.keys() - {"addresses", "mac", "mtu"}:
        raise ConfigError(f"{place}: an interface has addresses, mac and mtu, found {min(unknown)!r}")
    addresses = table.get("addresses", ())
    table["addresses"] = list(addresses) if isinstance(addresses, list | tuple) else [addresses]
    if not table["addresses"]:
        raise ConfigError(f"{place}: expected an address with its prefix, such as 10.0.0.1/24, found none")
    for address in table["addresses"]:
        try:
            fits = isinstance(address, str) and "/" in address and ip_interface(address)
        except ValueError:
            fits = False
        if not fits:
            raise ConfigError(f"{place}: expected an address with its prefix, such as 10.0.0.1/24, found {address!r}")
    if "mac" in table:
        if not isinstance(table["mac"], str) or not re.match(_MAC, table["mac"]):
            raise ConfigError(f"{place}.mac: expected the MAC address of one station, found {table['mac']!r}")
        table["mac"] = table["mac"].lower()
    mtu = table.pop("mtu", MTU_USUAL)
    least = MTU6_MIN if any(":" in address for address in table["addresses"]) else MTU_MIN
    if type(mtu) is not int or not least <= mtu <= MTU_MAX:
        raise ConfigError(f"{place}.mtu: expected {least} to {MTU_MAX} bytes, found {mtu!r}")
    return table | ({} if mtu == MTU_USUAL else {"mtu": mtu})


def _stations(interfaces: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[bytes, int, list[tuple[str, int]]]]:
    """Interfaces as the engine takes them."""
    stations = {}
    for name, table in interfaces.items():
        addresses = [ip_interface(address) for address in table["addresses"]]
        pairs = [(str(address.ip), address.network.prefixlen) for address in addresses]
        mac = bytes.fromhex(table["mac"].replace(":", "")) if "mac" in table else _mac(pairs[0][0])
        stations[name] = (mac, table.get("mtu", MTU_USUAL), pairs)
    return stations


def _mac(address: str) -> bytes:
    """A MAC address of its own for who has an address: the same every time."""
    from hashlib import blake2b

    return b"\x02" + blake2b(address.encode(), digest_size=5).digest()


def prepare_router(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the engine takes them: ``cables`` has the interface of each."""
    interfaces = options.pop("interfaces")
    return options | {"stations": _stations(interfaces), "cables": {name: name for name in interfaces}}


def check_nat(options: dict[str, Any]) -> dict[str, Any]:
    """The same of a router that translates.

    Raises:
        ConfigError: they make no sense; the message begins with their place.
    """
    options = check_router(options)
    _check_flows(options)
    outside = _list(options, "outside")
    for name in outside:
        if name not in options["interfaces"]:
            raise ConfigError(f"outside: expected a node that has an interface, found {name!r}")
    pool = [str(_ipv4("pool", address)) for address in _list(options, "pool")]
    forward = options["forward"]
    if not isinstance(forward, dict):
        raise ConfigError(f"forward: expected a table of services, found {forward!r}")
    for service, end in forward.items():
        _service(f"forward.{service}", service)
        _end(f"forward.{service}", end)
    prefixes = _prefixes(options["prefixes"])
    return options | {"outside": outside, "pool": pool, "forward": dict(forward), "prefixes": prefixes}


def _prefixes(given: Any) -> dict[str, str]:
    """Pairs of prefixes as they are compared: each as long as the longer of the two, no two that overlap."""
    if not isinstance(given, dict):
        raise ConfigError(f"prefixes: expected a table of prefixes inside and outside, found {given!r}")
    found: dict[IPv6Network, IPv6Network] = {}
    for inside, outside in given.items():
        place = f"prefixes.{inside}"
        pair = _prefix("prefixes", inside), _prefix(place, outside)
        length = max(one.prefixlen for one in pair)
        inner, outer = (IPv6Network((one.network_address, length)) for one in pair)
        for others, mine in ((found.keys(), inner), (found.values(), outer)):
            if other := next((one for one in others if one.overlaps(mine)), None):
                raise ConfigError(f"{place}: expected prefixes that do not overlap, found {mine} and {other}")
        if inner.overlaps(outer):
            raise ConfigError(f"{place}: expected another prefix outside than inside, found {inner} and {outer}")
        found[inner] = outer
    return {str(inner): str(outer) for inner, outer in sorted(found.items())}


def _prefix(place: str, text: Any) -> IPv6Network:
    try:
        prefix = IPv6Network(text) if isinstance(text, str) and "/" in text else None
    except ValueError:
        prefix = None
    if prefix is None or not 0 < prefix.prefixlen <= PREFIX6_MAX:
        raise ConfigError(
            f"{place}: expected an IPv6 prefix of 1 to {PREFIX6_MAX} bits and nothing behind it, such as "
            f"fd00:1::/48, found {text!r}"
        )
    return prefix


def check_balancer(options: dict[str, Any]) -> dict[str, Any]:
    """The same of a load balancer.

    Raises:
        ConfigError: they make no sense; the message begins with their place.
    """
    options = check_router(options)
    _check_flows(options)
    services, backends = _list(options, "services"), _list(options, "backends")
    for service in services:
        if _service("services", service)[1] is None:
            raise ConfigError(f"services: expected PROTOCOL:ADDRESS:PORT, such as tcp:192.0.2.10:80, found {service!r}")
    for end in backends:
        _end("backends", end)
    return options | {"services": services, "backends": backends}


def _list(options: Mapping[str, Any], option: str) -> list[str]:
    given = options[option]
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
        raise ConfigError(f"{option}: expected a list of text, found {given!r}")
    return list(found)


def _check_flows(options: Mapping[str, Any]) -> None:
    flows = options["flows_max"]
    if type(flows) is not int or not _FLOWS["minimum"] <= flows <= _FLOWS["maximum"]:
        raise ConfigError(f"flows_max: expected a number of flows from 1 to {_FLOWS['maximum']}, found {flows!r}")


def _ipv4(place: str, text: Any) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise ConfigError(f"{place}: expected an IPv4 address, found {text!r}") from None


def _port(place: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) <= PORT_MAX:
        raise ConfigError(f"{place}: expected a port from 1 to 65535, found {text!r}")
    return int(text)


def _end(place: str, text: Any) -> tuple[bytes, int]:
    """``ADDRESS:PORT``."""
    address, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not colon:
        raise ConfigError(f"{place}: expected ADDRESS:PORT, such as 10.0.0.5:80, found {text!r}")
    return _ipv4(place, address).packed, _port(place, port)


def _service(place: str, text: Any) -> tuple[int, bytes | None, int]:
    """``PROTOCOL:ADDRESS:PORT``, or without the address."""
    protocol, _, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    if protocol not in _PROTOCOLS or not rest:
        raise ConfigError(f"{place}: expected tcp or udp and a port, such as tcp:192.0.2.2:8080, found {text!r}")
    address, colon, port = rest.rpartition(":")
    return _PROTOCOLS[protocol], _ipv4(place, address).packed if colon else None, _port(place, port)


def prepare_nat(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the engine takes them."""
    outside, forward, pool = options.pop("outside"), options.pop("forward"), options.pop("pool")
    own = [
        ip_interface(address).ip.packed
        for name in outside
        for address in options["interfaces"][name]["addresses"]
        if ":" not in address
    ]
    services = []
    for text, end in forward.items():
        protocol, address, port = _service("forward", text)
        services += [(protocol, at, port, [_end("forward", end)]) for at in ([address] if address else own)]
    addresses = [IPv4Address(address).packed for address in pool]
    pairs = [(IPv6Network(inner), IPv6Network(outer)) for inner, outer in options.pop("prefixes").items()]
    prepared = _translating(options, services, outside_of=outside, addresses=addresses)
    return prepared | {
        "pairs": [(a.network_address.packed, b.network_address.packed, a.prefixlen) for a, b in pairs],
    }


def prepare_balancer(options: dict[str, Any]) -> dict[str, Any]:
    """The same of a load balancer."""
    backends = [_end("backends", end) for end in options.pop("backends")]
    services = [(*_service("services", text), backends) for text in options.pop("services")]
    return _translating(options, services, outside_of=[], addresses=[]) | {"pairs": []}


def _translating(
    options: dict[str, Any], services: list[Any], *, outside_of: list[str], addresses: list[bytes]
) -> dict[str, Any]:
    """Has the router answer for its services and its pool, on the links where they are."""
    stations = _stations(options["interfaces"])
    known = {ip_interface(address).ip for table in options["interfaces"].values() for address in table["addresses"]}
    for ip in sorted({IPv4Address(at) for _, at, *_ in services} | {IPv4Address(one) for one in addresses}):
        if ip in known or not stations:
            continue
        covering = (
            name
            for name, table in options["interfaces"].items()
            if any(ip in ip_interface(address).network for address in table["addresses"])
        )
        stations[next(covering, (*outside_of, *stations)[0])][2].append((str(ip), 32))
    prepared = prepare_router(options)
    extra = {"services": services, "outside_of": outside_of, "addresses": addresses}
    return prepared | {"stations": stations} | extra
