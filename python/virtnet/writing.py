"""Header fields that can be written, and the texts that stand for their values."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from typing import Any

from virtnet.errors import ConfigError

__all__ = ["WRITABLE", "address_number", "address_text"]

#: Bits of the fields that can be written.
WRITABLE = {
    "eth_dst": 48,
    "eth_src": 48,
    "vlan": 12,
    "ip_ttl": 8,
    "ip_src": 32,
    "ip_dst": 32,
    "ip6_src": 128,
    "ip6_dst": 128,
    "l4_src": 16,
    "l4_dst": 16,
}


def address_number(field: str, text: str) -> int:
    """The number of an address as text.

    Raises:
        ConfigError: it is no address of the field's size.
    """
    if field.startswith("eth_"):
        if re.fullmatch("[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}", text):
            return int(re.sub("[:-]", "", text), 16)
    else:
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(text)
            if address.max_prefixlen == WRITABLE[field]:
                return int(address)
    raise ConfigError(f"{field}: {text!r} is no address of {WRITABLE[field]} bits")


def address_text(field: str, value: Any) -> str:
    """How people write the value of a field: that of an address as such, of another as it is.

    Example:
        >>> address_text("ip_src", 0x0A000001), address_text("eth_dst", 2), address_text("l4_dst", 53)
        ('10.0.0.1', '00:00:00:00:00:02', '53')
    """
    if field in {"ip_src", "ip_dst"}:
        return str(ipaddress.IPv4Address(value))
    if field in {"ip6_src", "ip6_dst"}:
        high, low = value
        return str(ipaddress.IPv6Address(high << 64 | low))
    if field in {"eth_src", "eth_dst"}:
        return int(value).to_bytes(6, "big").hex(":")
    return f"{value:#06x}" if field == "eth_type" else str(value)
