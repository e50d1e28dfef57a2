"""The options of user-mode networks: addresses, names, leases and forwarded ports.

Whatever has several parts is a tuple of texts, each with slashes in it; on a command line they are joined by ``+``::

    names=web/10.0.2.20+db/10.0.2.21
    leases=52:54:00:00:00:01/10.0.2.20/web
    forward=8080/10.0.2.15:80+udp/5353/10.0.2.15:53
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any

from virtnet.errors import ConfigError
from virtnet.options import Option, no

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["address", "check_network", "domain", "forward", "leases", "names", "prefix6", "resolver"]

#: The shortest and the longest prefix that a network may have.
PREFIX_MIN, PREFIX_MAX = 8, 29
PORT_MAX = 0xFFFF
#: The most names, leases and forwarded ports.
PARTS_MAX = 1024
IPV6_USUAL = "fd76:6e00::/64"

LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"


def check_network(where: str) -> None:
    """Checks what stands behind the colon."""
    try:
        found = ip_network(where)
    except ValueError:
        found = None
    if not isinstance(found, IPv4Network) or not PREFIX_MIN <= found.prefixlen <= PREFIX_MAX or "/" not in where:
        raise ConfigError(
            f"a user-net port needs the first address of an IPv4 network and a prefix of {PREFIX_MIN} to {PREFIX_MAX} "
            f"bits, such as 10.0.2.0/24, found {where!r}"
        )


def address(name: str) -> Option:
    """An option that is an IPv4 address."""
    expects = "an IPv4 address of the network, such as 10.0.2.2"
    return Option(name, expects, lambda value: _ip(str(value), 4), str, None, {"type": "string"})


def prefix6(name: str) -> Option:
    """An option that is an IPv6 network of 64 bits, or off."""

    def check(value: Any) -> str:
        if value in {"off", False}:
            return "off"
        network = IPv6Network(str(value))
        return str(network) if network.prefixlen == 64 else no()  # noqa: PLR2004 - what addresses are made with

    return Option(name, f"an IPv6 network of 64 bits, such as {IPV6_USUAL}, or off", check, str, IPV6_USUAL)


def resolver(name: str) -> Option:
    """An option that is the address of a name server, perhaps with its port."""

    def check(value: Any) -> str:
        try:
            return _end(str(value))
        except ValueError:
            return _joined(_ip(str(value)), 53)

    expects = "a name server's address, such as 192.0.2.53 or [2001:db8::53]:53"
    return Option(name, expects, check, str, None, {"type": "string"})


def domain(name: str) -> Option:
    """An option that is a domain's name."""

    def check(value: Any) -> str:
        return str(value).lower() if re.fullmatch(rf"{LABEL}(\.{LABEL})*", str(value)) else no()

    return Option(name, "a domain, such as lab.example", check, str, None, {"type": "string"})


def names(name: str) -> Option:
    """An option that is a table of names and their addresses."""

    def check_one(text: str) -> str:
        host, _, ip = text.partition("/")
        return f"{host.lower()}/{_ip(ip)}" if re.fullmatch(rf"{LABEL}(\.{LABEL})*", host) else no()

    return _several(name, "NAME/ADDRESS, such as web/10.0.2.20", check_one, _flat)


def leases(name: str) -> Option:
    """An option that is a table of MAC addresses and what their stations get: an address, and perhaps a name."""

    def check_one(text: str) -> str:
        mac, ip, *host = text.split("/")
        octets = re.fullmatch("([0-9a-fA-F]{2})" + "[:-]([0-9a-fA-F]{2})" * 5, mac) or no()
        named = len(host) <= 1 and all(re.fullmatch(LABEL, one) for one in host)
        return (
            "/".join([":".join(octets.groups()).lower(), _ip(ip, 4), *(one.lower() for one in host)]) if named else no()
        )

    return _several(name, "MAC/ADDRESS[/NAME], such as 52:54:00:00:00:01/10.0.2.20/web", check_one, _flat)


def forward(name: str) -> Option:
    """An option that is a table of ports of the host, and the ports of guests that they lead to."""

    def check_one(text: str) -> str:
        *kind, host, guest = text.split("/")
        transport = kind[0] if len(kind) == 1 and kind[0] in {"tcp", "udp"} else (no() if kind else "tcp")
        if re.fullmatch("[0-9]+", host):
            host = f"127.0.0.1:{host}"
        return f"{transport}/{_end(host, 0)}/{_end(guest)}"

    def pair(host: Any, guest: Any) -> str:
        return f"{host}/{_joined(*guest)}" if isinstance(guest, tuple | list) else f"{host}/{guest}"

    def short(text: str) -> str:
        return text.removeprefix("tcp/").replace("127.0.0.1:", "", 1 if re.match("(tcp|udp)/127", text) else 0)

    expects = "[udp/][ADDRESS:]PORT/ADDRESS:PORT, host first, such as 8080/10.0.2.15:80"
    return _several(name, expects, check_one, pair, short)


def _flat(key: Any, value: Any) -> str:
    parts = value if isinstance(value, tuple | list) else [value]
    return "/".join(str(part) for part in (key, *parts))


def _several(
    name: str,
    expects: str,
    check_one: Callable[[str], str],
    pair: Callable[[Any, Any], str],
    short: Callable[[str], str] = str,
) -> Option:
    """An option of several parts: text joined by ``+``, texts, or a mapping."""

    def check(value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            value = value.split("+") if value else []
        parts = [pair(*item) for item in value.items()] if isinstance(value, Mapping) else [str(one) for one in value]
        return tuple(check_one(part) for part in parts) if len(parts) <= PARTS_MAX else no()

    schema = {
        "anyOf": [
            {"type": "array", "items": {"type": "string"}, "maxItems": PARTS_MAX},
            {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": PARTS_MAX},
        ]
    }
    return Option(name, expects, check, lambda value: "+".join(short(one) for one in value), (), schema)


def _ip(text: str, version: int | None = None) -> str:
    """An address in its usual form."""
    found = ip_address(text)
    return str(found) if version in {None, found.version} else no()


def _end(text: str, port_min: int = 1) -> str:
    """An address and a port."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})", text) or no()
    port = int(found[3])
    return _joined(_ip(found[1], 6) if found[1] else _ip(found[2], 4), port) if port_min <= port <= PORT_MAX else no()


def _joined(ip: Any, port: Any) -> str:
    return f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}"
