"""Header fields that can be written, and the texts that stand for their values."""

from __future__ import annotations

import contextlib
import ipaddress
import re

from virtnet.errors import ConfigError

__all__ = ["WRITABLE", "address_number"]

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
