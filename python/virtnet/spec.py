"""What a port is to be, as text and as a value: ``KIND:WHERE[,option=value...]``.

One form serves the command line, :class:`~virtnet.Net` and files alike::

    vhost-user:vm1.sock
    vhost-user:vm1.sock,client=on,queue_pairs=2
    virtio-user:vm1.sock,ring=packed
    tap:tap0
    af-packet:eth0
    af-xdp:eth0
    user-net:10.0.2.0/24,forward=8080/10.0.2.15:80
    pcap:out.pcap

A comma that belongs to a name is written twice. Every option has a default, and what is written back leaves defaults
out. A mistake is answered with what would have been right.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from virtnet import usernet
from virtnet.errors import ConfigError
from virtnet.features import NetFeature, RingFeature
from virtnet.options import Option, no

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["PortSpec"]

#: What a socket address can hold, less the closing zero.
SOCKET_PATH_MAX = 107
#: What Linux takes for the name of an interface, less the closing zero.
INTERFACE_NAME_MAX = 15
#: How many copies of a packet a VXLAN port sends at most.
REMOTES_MAX = 64
PORT_MAX = 65535
IPV6 = 6


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of port: what stands behind the colon, and its options."""

    name: str
    where: str
    check_where: Callable[[str], None]
    options: tuple[Option, ...]

    def option(self, name: str) -> Option:
        """The option of that name."""
        found = next((option for option in self.options if option.name == name), None)
        if found is None:
            names = [option.name for option in self.options]
            takes = f"it takes {_listed(names)}" if names else "it takes none"
            raise ConfigError(f"a {self.name} port has no option {name!r}: {takes}{meant(name, names)}")
        return found


@dataclass(frozen=True)
class PortSpec:
    """What a port is to be. Make one with :meth:`parse` or :meth:`of`, which check it; ``str()`` writes it back.

    Attributes:
        kind: ``vhost-user``, ``tap``, ``vxlan``, ``pcap``, ...
        where: the socket, address, interface, file or network.
        options: every option of the kind with its value, defaults included.

    Example:
        >>> spec = PortSpec.parse("vhost-user:vm1.sock,queue_pairs=2")
        >>> spec.where, spec.options["queue_pairs"], spec.options["client"]
        ('vm1.sock', 2, False)
        >>> str(spec)
        'vhost-user:vm1.sock,queue_pairs=2'
    """

    kind: str
    where: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> PortSpec:
        """Reads the textual form.

        Raises:
            ConfigError: the text is none; the message says what was expected.
        """
        kind, colon, rest = text.partition(":")
        if not colon:
            raise ConfigError(
                f"{text!r} is no port: expected KIND:WHERE[,option=value...], where KIND is {_listed(KINDS)}, "
                "such as vhost-user:vm1.sock"
            )
        where, *settings = [part.replace("\0", ",") for part in rest.replace(",,", "\0").split(",")]
        options: dict[str, str] = {}
        for setting in settings:
            name, equals, value = setting.partition("=")
            if not equals or not name:
                raise ConfigError(f"expected option=value after the comma in {text!r}, found {setting!r}")
            if name in options:
                raise ConfigError(f"the option {name!r} stands twice in {text!r}")
            options[name] = value
        return cls.of(kind, where, **options)

    @classmethod
    def of(cls, kind: str, where: str, **options: Any) -> PortSpec:
        """Makes a specification from values or their text; ``None`` means the default.

        Raises:
            ConfigError: there is no such kind or option, or a value is out of its range.
        """
        found = KINDS.get(kind)
        if found is None:
            raise ConfigError(f"there is no kind of port {kind!r}: expected {_listed(KINDS)}{meant(kind, KINDS)}")
        if not where or not isinstance(where, str):
            raise ConfigError(f"a {kind} port needs {found.where} after the colon, found {where!r}")
        found.check_where(where)
        values = {option.name: option.default for option in found.options}
        for name, given in options.items():
            option = found.option(name)
            if given is None:
                continue
            try:
                values[name] = option.check(given)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{kind} option {name}: expected {option.expects}, found {given!r}") from error
        for option in found.options:
            if option.required and values[option.name] is None:
                raise ConfigError(f"a {kind} port needs {option.name}=...: {option.expects}")
        return cls(kind, where, values)

    def __str__(self) -> str:
        """The textual form, without what is default."""
        kind = KINDS[self.kind]
        options = (
            f",{option.name}={option.write(self.options[option.name])}"
            for option in kind.options
            if self.options[option.name] != option.default
        )
        return f"{self.kind}:{self.where.replace(',', ',,')}{''.join(options)}"

    def __hash__(self) -> int:
        """Equal specifications read the same."""
        return hash(str(self))


def _listed(names: Iterable[str]) -> str:
    """``a, b or c``."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def meant(name: str, names: Iterable[str]) -> str:
    """A hint at the name that was probably meant."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _switch(name: str, *, default: bool = False) -> Option:
    """An option that is on or off."""

    def check(value: Any) -> bool:
        if isinstance(value, bool):
            return value
        return {"on": True, "off": False}[value] if value in {"on", "off"} else no()

    return Option(name, "on or off", check, lambda on: "on" if on else "off", default, {"type": "boolean"})


def _count(name: str, low: int, high: int, default: int | None = None) -> Option:
    """An option that is a whole number in a range."""

    def check(value: Any) -> int:
        if type(value) is not int and not re.fullmatch("[0-9]+", value):
            return no()
        return int(value) if low <= int(value) <= high else no()

    schema = {"type": "integer", "minimum": low, "maximum": high}
    return Option(name, f"a whole number from {low} to {high}", check, str, default, schema)


def _power_of_two(name: str, low: int, high: int, default: int) -> Option:
    """An option that is a power of two in a range."""

    def check(value: Any) -> int:
        number: int = whole.check(value)
        return no() if number & (number - 1) else number

    whole = _count(name, low, high, default)
    powers = [1 << bit for bit in range(low.bit_length() - 1, high.bit_length())]
    return Option(name, f"a power of two from {low} to {high}", check, str, default, {"enum": powers})


def _choice(name: str, choices: tuple[str, ...], default: str) -> Option:
    """An option that is one of a few words."""
    schema = {"enum": list(choices)}
    return Option(name, _listed(choices), lambda value: value if value in choices else no(), str, default, schema)


def _mac(name: str) -> Option:
    """An option that is the MAC address of one station."""

    def check(value: Any) -> str:
        octets = re.fullmatch("([0-9a-fA-F]{2})" + "[:-]([0-9a-fA-F]{2})" * 5, value) or no()
        mac = ":".join(octets.groups()).lower()
        return no() if int(octets[1], 16) & 1 or mac == "00:00:00:00:00:00" else mac

    return Option(name, "the MAC address of one station, such as 02:00:00:00:00:01", check)


def _features(name: str) -> Option:
    """An option that is a set of negotiable features, as names joined by ``+`` or as flags; its value is a word."""
    by_name = {str(member.name).lower(): member.value for word in (NetFeature, RingFeature) for member in word}

    def check(value: Any) -> int:
        if isinstance(value, NetFeature | RingFeature):
            return int(value.value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value if 0 <= value < 1 << 64 else no()
        if not isinstance(value, str):
            return sum({check(one) for one in value})
        word = 0
        for one in value.lower().split("+"):
            word |= by_name[one] if one in by_name else no()
        return word

    def write(word: int) -> str:
        return "+".join([*NetFeature.within(word).names(), *RingFeature.within(word).names()])

    pattern = f"^({'|'.join(by_name)})(\\+({'|'.join(by_name)}))*$"
    schema = {"type": "string", "pattern": pattern}
    return Option(name, "names of features joined by +, such as mrg_rxbuf+event_idx", check, write, 0, schema)


def _namespace() -> Option:
    """An option that is a network namespace of the host."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"pid:[0-9]{1,10}|[^\0:/]+|[^\0:]*/[^\0]*", value):
            return no()
        return value if value not in {".", ".."} else no()

    expects = "a network namespace: a name of `ip netns`, a path with a slash in it, or pid:NUMBER"
    return Option("netns", expects, check, str, None, {"type": "string", "minLength": 1})


def _remotes() -> Option:
    """An option that is a list of IP addresses, each with a UDP port or not."""

    def check(value: Any) -> tuple[str, ...]:
        given = value.split("+") if isinstance(value, str) else list(value)
        return tuple(_address(one) for one in given) if len(given) <= REMOTES_MAX else no()

    expects = f"at most {REMOTES_MAX} IP addresses joined by +, such as 192.0.2.2+192.0.2.3:4790"
    schema = {"type": "array", "items": {"type": "string"}, "maxItems": REMOTES_MAX}
    return Option("remotes", expects, check, "+".join, (), schema)


def _endpoint(name: str) -> Option:
    """An option that is where another socket is."""

    def check(value: Any) -> str:
        try:
            _socket(value)
        except ConfigError:
            return no()
        return str(value) if value else no()

    expects = "a socket's path, or an IP address and a port"
    return Option(name, expects, check, str, None, {"type": "string", "minLength": 1}, required=True)


def _socket_path(where: str) -> None:
    length = len(where.encode())
    if length > SOCKET_PATH_MAX or "\0" in where:
        raise ConfigError(
            f"a socket's path has at most {SOCKET_PATH_MAX} bytes, {where!r} has {length}: "
            "use a path relative to the working directory or a shorter one"
        )


def _interface_name(where: str) -> None:
    if len(where.encode()) > INTERFACE_NAME_MAX or where in {".", ".."} or re.search(r"[\s/:\0]", where):
        raise ConfigError(
            f"an interface's name has at most {INTERFACE_NAME_MAX} bytes and neither spaces, colons nor slashes, "
            f"found {where!r}"
        )


def _address(text: Any) -> str:
    """An IP address, with a port behind it or without."""
    host, port = str(text), None
    if found := re.fullmatch(r"\[([0-9a-fA-F:.]+)\]:([0-9]{1,5})|([0-9.]+):([0-9]{1,5})", host):
        host, port = found[1] or found[3], int(found[2] or found[4])
    if (port is not None and not 1 <= port <= PORT_MAX) or "%" in host:
        raise ValueError
    ip = ipaddress.ip_address(host)
    if port is None:
        return str(ip)
    return f"[{ip}]:{port}" if ip.version == IPV6 else f"{ip}:{port}"


def _local_address(where: str) -> None:
    try:
        _address(where)
    except ValueError:
        raise ConfigError(
            f"an IP address of this host was expected, 0.0.0.0 or :: for all, with a port behind it or not "
            f"(192.0.2.1:4789, [2001:db8::1]:4789), found {where!r}"
        ) from None


def is_path(where: str) -> bool:
    """Whether a socket is a path, rather than an address and a port."""
    return "/" in where or not re.search(r"[^:]:[0-9]+$", where)


def _socket(where: Any) -> None:
    """A path, or an IP address with a port: what stands before a colon and a number and is neither is a mistake."""
    where = str(where)
    if is_path(where):
        _socket_path(where)
        return
    try:
        _address(where)
    except ValueError:
        raise ConfigError(
            f"names are not looked up: an IP address and a port (127.0.0.1:5000, [::1]:5000) or a path was expected, "
            f"found {where!r}"
        ) from None


def _anything(where: str) -> None:
    if "\0" in where:
        raise ConfigError(f"a name without zero bytes was expected, found {where!r}")


_QUEUE_PAIRS = _count("queue_pairs", 1, 128, 1)
_WITHOUT = _features("without")
_NETNS = _namespace()

#: The kinds of port, by name. What these tables let through is what Rust reads.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "vhost-user",
            "a socket's path",
            _socket_path,
            (
                _switch("client"),
                _QUEUE_PAIRS,
                _count("mtu", 68, 65535),
                _mac("mac"),
                _count("speed_mbps", 1, 0x7FFFFFFF),
                _switch("rss"),
                _switch("postcopy"),
                _switch("in_band"),
                _WITHOUT,
            ),
        ),
        Kind(
            "virtio-user",
            "a socket's path",
            _socket_path,
            (
                _switch("server"),
                _QUEUE_PAIRS,
                _count("queue_size", 1, 32768, 256),
                _choice("ring", ("split", "packed"), "split"),
                _switch("in_order", default=True),
                _switch("control"),
                _switch("hash_report"),
                _switch("iommu"),
                _switch("in_flight", default=True),
                _switch("in_band"),
                _WITHOUT,
            ),
        ),
        Kind("tap", "an interface's name", _interface_name, (_count("mtu", 68, 65535), _QUEUE_PAIRS, _NETNS)),
        Kind(
            "af-packet",
            "an interface's name",
            _interface_name,
            (_count("queues", 1, 128, 1), _switch("promiscuous", default=True), _NETNS),
        ),
        Kind(
            "af-xdp",
            "an interface's name",
            _interface_name,
            (
                _count("queues", 1, 256),
                _power_of_two("ring_size", 8, 32768, 2048),
                _choice("mode", ("auto", "copy", "zero-copy"), "auto"),
                _choice("attach", ("auto", "native", "generic"), "auto"),
                _switch("promiscuous", default=True),
                _NETNS,
            ),
        ),
        Kind(
            "vxlan",
            "an address of this host",
            _local_address,
            (
                replace(_count("vni", 0, 0xFFFFFF), required=True),
                _remotes(),
                _switch("learn", default=True),
                _count("ageing_s", 1, 1_000_000, 300),
                _switch("anyone"),
                _count("source_ports", 0, 64, 16),
                _NETNS,
            ),
        ),
        Kind("stream", "a socket's path, or an address and a port", _socket, (_switch("client"), _NETNS)),
        Kind("dgram", "a socket's path, or an address and a port", _socket, (_endpoint("remote"), _NETNS)),
        Kind(
            "pcap",
            "a file's path",
            _anything,
            (_choice("mode", ("write", "read"), "write"), _switch("overwrite"), _switch("loop"), _switch("timed")),
        ),
        Kind(
            "user-net",
            "the addresses of a network",
            usernet.check_network,
            (
                usernet.address("gateway"),
                usernet.address("first"),
                usernet.prefix6("ipv6"),
                _mac("mac"),
                _count("mtu", 576, 65535, 1500),
                _count("lease_s", 10, 0xFFFFFFFF, 86400),
                _switch("outside", default=True),
                _switch("host_loopback"),
                usernet.resolver("resolver"),
                usernet.domain("domain"),
                usernet.names("names"),
                usernet.leases("leases"),
                usernet.forward("forward"),
                _count("tcp_idle_s", 1, 0xFFFFFFFF, 7200),
                _count("udp_idle_s", 1, 0xFFFFFFFF, 60),
            ),
        ),
        Kind("memory", "a name", _anything, (_count("capacity", 1, 65536, 1024),)),
    )
}
