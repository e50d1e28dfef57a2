"""Rules of a firewall, as people write them.

One rule a line, and the first that matches counts::

    # what            which                                              what follows
    pass  proto arp
    pass  in  proto tcp from any to <web> port 80, 443, 8000-8100        keep-state
    pass  in  proto icmp, icmp6                                          keep-state
    reject in proto tcp to any port 113
    drop  from ! 10.0.0.0/8 to 192.0.2.1
    pass  in  match "udp[8:2] == 17"
    pass  out                                                            keep-state

In words: ``pass``, ``drop`` or ``reject``; ``in`` (towards the inside) or ``out``; ``ip4`` or ``ip6``; ``proto`` and
names or numbers; ``from`` and ``to`` with addresses, prefixes and ``<sets>``, ``!`` for all but these, ``port`` and
numbers or ranges; ``match`` and a filter in the language of tcpdump; ``keep-state`` for passing what belongs to a
packet that has passed. All but the first word may be left out, and they come in this order; several of a kind are
separated by commas, and ``#`` begins a comment.
"""

from __future__ import annotations

import functools
import re
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from virtnet.errors import ConfigError
from virtnet.spec import meant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["Addresses", "check_firewall", "parse_rules", "prepare_firewall"]

ACTIONS = ("pass", "drop", "reject")

#: Numbers of protocols by what they are called; arp is none, but an EtherType.
PROTOCOLS = {
    "icmp": 1,
    "igmp": 2,
    "tcp": 6,
    "udp": 17,
    "gre": 47,
    "esp": 50,
    "ah": 51,
    "icmp6": 58,
    "ospf": 89,
    "vrrp": 112,
    "sctp": 132,
}
WITH_PORTS = {6, 17, 132}
ETHERTYPE_ARP = 0x0806

PORT_MAX = 65_535
PROTOCOL_MAX = 255

#: Seconds that flows are remembered after their last packet.
TIMEOUTS = {
    "tcp_opening": 30.0,
    "tcp": 86_400.0,
    "tcp_closing": 60.0,
    "unanswered": 30.0,
    "udp": 120.0,
    "icmp": 20.0,
    "other": 120.0,
}

#: Where packets come in that go in, and those that go out: gate 1 is the inside.
_CAME_IN_BY = {"in": 0, "out": 1}

_TOKEN = re.compile(r'\s+|#.*|"[^"\n]*"|<[^<>\s]*>|[!,]|[^\s#",!<>]+|.')


class Addresses(list[str]):
    """Addresses and prefixes that have been read.

    Attributes:
        packed: the same as the engine takes them: of IPv4, then of IPv6, each with its length in a byte behind.
    """

    def __init__(self, addresses: Iterable[str]) -> None:
        """Reads them.

        Raises:
            ConfigError: one is none.
        """
        super().__init__(sorted({str(address) for address in addresses}))
        packed: dict[int, list[bytes]] = {4: [], 16: []}
        for address in self:
            one = _packed(address)
            packed[len(one) - 1].append(one)
        self.packed = (b"".join(packed[4]), b"".join(packed[16]))

    def __repr__(self) -> str:
        """The first few."""
        few = 4
        return repr([*self]) if len(self) <= few else f"[{self[0]!r} and {len(self) - 1} more]"


def _packed(text: str) -> bytes:
    address, slash, length = text.partition("/")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        packed = socket.inet_pton(family, address)
    except (OSError, ValueError):
        raise ConfigError(f"expected an address or a prefix, such as 10.0.0.0/8, found {text!r}") from None
    bits = 8 * len(packed)
    if slash and not (length.isascii() and length.isdigit() and int(length) <= bits):
        raise ConfigError(f"the length of a prefix is a number from 0 to {bits} here, found {text!r}")
    kept = int(length) if slash else bits
    if int.from_bytes(packed, "big") & ((1 << (bits - kept)) - 1):
        raise ConfigError(f"{text!r} is an address in a prefix, not a prefix: behind {kept} bits all are to be 0")
    return packed + bytes([kept])


@dataclass
class _Ends:
    """From where, or to where."""

    negated: bool = False
    addresses: list[str] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    ports: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Rule:
    """A rule that has been read."""

    text: str
    action: str
    direction: str | None = None
    version: int | None = None
    protocols: list[int] = field(default_factory=list)
    ethertype: int | None = None
    source: _Ends = field(default_factory=_Ends)
    destination: _Ends = field(default_factory=_Ends)
    filter: str = ""
    program: list[tuple[int, int, int, int]] = field(default_factory=list)
    keep_state: bool = False


class _Line:
    """The words of a line, taken one after the other."""

    def __init__(self, number: int, text: str) -> None:
        self.number = number
        self.words = [
            (found.start() + 1, found.group())
            for found in _TOKEN.finditer(text)
            if not found.group().isspace() and not found.group().startswith("#")
        ]
        self.at = 0
        self.end = len(text.rstrip()) + 1

    def peek(self) -> str:
        return self.words[self.at][1] if self.at < len(self.words) else ""

    def take(self) -> str:
        word = self.peek()
        self.at += 1
        return word

    def takes(self, *words: str) -> str | None:
        """The next word if it is one of these."""
        return self.take() if self.peek() in words else None

    def fail(self, expected: str, *, back: int = 0) -> NoReturn:
        at = self.at - back
        column, found = self.words[at] if at < len(self.words) else (self.end, "the end of the line")
        raise ConfigError(f"line {self.number}, column {column}: expected {expected}, found {found!r}")

    def listed(self, one: Any) -> Iterator[Any]:
        """One or more of something, with commas between."""
        yield one()
        while self.takes(","):
            yield one()


def parse_rules(text: str, sets: Iterable[str] = (), *, has_inside: bool = True) -> list[_Rule]:
    r"""Reads rules.

    Args:
        text: the rules, one a line.
        sets: names of the sets there are.
        has_inside: whether a rule may say ``in`` and ``out``.

    Raises:
        ConfigError: a rule makes no sense; the message names line and column, and what was expected.

    Example:
        >>> [rule.text for rule in parse_rules("pass out   keep-state # all\n\ndrop")]
        ['pass out keep-state', 'drop']
    """
    return list(_parsed(text, frozenset(sets), has_inside))


@functools.lru_cache(maxsize=64)
def _parsed(text: str, sets: frozenset[str], has_inside: bool) -> tuple[_Rule, ...]:
    """The same, remembered: a description is looked at again with every change."""
    lines = [_Line(number, content) for number, content in enumerate(text.splitlines(), 1)]
    return tuple(_rule(line, set(sets), has_inside=has_inside) for line in lines if line.words)


def _rule(line: _Line, sets: set[str], *, has_inside: bool) -> _Rule:
    action = line.takes(*ACTIONS) or line.fail("pass, drop or reject" + meant(line.peek(), ACTIONS))
    rule = _Rule(" ".join(word for _, word in line.words).replace(" ,", ","), action)
    if line.peek() in _CAME_IN_BY and not has_inside:
        line.fail("no direction, since nothing says which side is the inside (inside=)")
    rule.direction = line.takes("in", "out")
    if version := line.takes("ip4", "ip6"):
        rule.version = int(version[-1])
    parts: dict[str, Callable[[], None]] = {
        "proto": lambda: _protocols(line, rule),
        "from": lambda: _ends(line, sets, rule, rule.source),
        "to": lambda: _ends(line, sets, rule, rule.destination),
        "match": lambda: _match(line, rule),
        "keep-state": lambda: _keep_state(line, rule),
    }
    for word, read in parts.items():
        if line.takes(word):
            read()
    if line.peek():
        words = ("in", "out", "ip4", "ip6", "proto", "from", "to", "port", "match", "keep-state")
        line.fail(f"the end of the rule, or what may follow in its order{meant(line.peek(), words)}")
    return rule


def _protocols(line: _Line, rule: _Rule) -> None:
    for name in line.listed(lambda: _protocol(line)):
        if name == "arp":
            rule.ethertype = ETHERTYPE_ARP
        else:
            rule.protocols.append(name)
    if rule.ethertype and (rule.protocols or rule.version):
        line.fail("arp alone, since it is no protocol above IP", back=1)


def _keep_state(line: _Line, rule: _Rule) -> None:
    if rule.action != "pass" or rule.ethertype:
        line.fail("keep-state with pass and IP only", back=1)
    rule.keep_state = True


def _protocol(line: _Line) -> int | str:
    word = line.take()
    if word == "arp":
        return word
    if word.isascii() and word.isdigit() and int(word) <= PROTOCOL_MAX:
        return int(word)
    return PROTOCOLS.get(word) or line.fail(
        f"a protocol ({', '.join(PROTOCOLS)}, arp or a number up to {PROTOCOL_MAX}){meant(word, PROTOCOLS)}", back=1
    )


def _ends(line: _Line, sets: set[str], rule: _Rule, ends: _Ends) -> None:
    if rule.ethertype:
        line.fail("no addresses, since arp is not IP", back=1)
    ends.negated = line.takes("!") is not None
    if line.takes("any"):
        if ends.negated:
            line.fail("addresses behind !", back=1)
    elif ends.negated or line.peek() != "port":
        for word in line.listed(lambda: _address(line, sets)):
            (ends.sets if word.startswith("<") else ends.addresses).append(word.strip("<>"))
    if line.takes("port"):
        ends.ports = list(line.listed(lambda: _ports(line)))
        _check_ports(line, rule)


def _check_ports(line: _Line, rule: _Rule) -> None:
    if not rule.protocols or not set(rule.protocols) <= WITH_PORTS:
        line.fail("ports with proto tcp, udp or sctp only", back=1)


def _address(line: _Line, sets: set[str]) -> str:
    word = line.take()
    if word.startswith("<"):
        if word.strip("<>") not in sets:
            line.fail(f"the name of a set{meant(word.strip('<>'), sets)}", back=1)
        return word
    try:
        _packed(word)
    except ConfigError as error:
        line.fail(f"any, <set>, or an address ({error})" if word else "any, <set>, or an address", back=1)
    return word


def _ports(line: _Line) -> tuple[int, int]:
    word = line.take()
    first, dash, last = word.partition("-")
    if not re.fullmatch("[0-9]{1,5}(-[0-9]{1,5})?", word):
        line.fail("a port or a range such as 8000-8100", back=1)
    low, high = int(first), int(last if dash else first)
    if not low <= high <= PORT_MAX:
        line.fail(f"ports up to {PORT_MAX}, the lower first", back=1)
    return low, high


def _match(line: _Line, rule: _Rule) -> None:
    from virtnet.filters import compile_filter

    word = line.take()
    if not (len(word) > len('""') and word.startswith('"') and word.endswith('"')):
        line.fail('a filter in quotation marks, such as "tcp[13] & 2 != 0"', back=1)
    rule.filter = word.strip('"')
    try:
        rule.program = compile_filter(rule.filter)
    except ConfigError as error:
        line.fail(f"a packet filter ({error})", back=1)


def check_firewall(options: dict[str, Any]) -> dict[str, Any]:
    """A firewall's options in the form in which they are compared.

    Raises:
        ConfigError: one makes no sense; the message begins with its place.
    """
    sets = {}
    if not isinstance(options["rules"], str):
        raise ConfigError(f'rules: expected lines such as "pass proto tcp", found {options["rules"]!r}')
    if not isinstance(options["sets"], dict):
        raise ConfigError(f'sets: expected a table such as {{"servers": ["10.0.0.0/24"]}}, found {options["sets"]!r}')
    for name, addresses in sorted(options["sets"].items()):
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_.-]*", name):
            raise ConfigError(f"sets: a name has letters, digits, '_', '.' and '-', found {name!r}")
        try:
            one = isinstance(addresses, str)
            sets[name] = addresses if isinstance(addresses, Addresses) else Addresses([addresses] if one else addresses)
        except ConfigError as error:
            raise ConfigError(f"sets.{name}: {error}") from None
    try:
        parse_rules(options["rules"], sets, has_inside=bool(options["inside"]))
    except ConfigError as error:
        raise ConfigError(f"rules: {error}") from None
    for name, seconds in options["timeouts"].items():
        if name not in TIMEOUTS:
            raise ConfigError(f"timeouts: there is none called {name!r}{meant(name, TIMEOUTS)}")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
            raise ConfigError(f"timeouts.{name}: expected a number of seconds above 0, found {seconds!r}")
    timeouts = {name: float(seconds) for name, seconds in sorted(options["timeouts"].items())}
    return options | {"sets": sets, "timeouts": timeouts}


def prepare_firewall(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the engine takes them."""
    sets = options["sets"]
    rules = parse_rules(options["rules"], sets, has_inside=bool(options["inside"]))
    number = {name: at for at, name in enumerate(sets)}
    return options | {
        "rules": [_prepared(rule, number) for rule in rules],
        "sets": [addresses.packed for addresses in sets.values()],
        "timeouts": TIMEOUTS | options["timeouts"],
    }


def _prepared(rule: _Rule, number: dict[str, int]) -> dict[str, Any]:
    def ends(ends: _Ends) -> tuple[bool, tuple[bytes, bytes], Sequence[int], list[tuple[int, int]]]:
        return ends.negated, Addresses(ends.addresses).packed, [number[name] for name in ends.sets], ends.ports

    return {
        "action": rule.action,
        "came_in_by": _CAME_IN_BY.get(rule.direction or ""),
        "version": rule.version,
        "protocols": rule.protocols,
        "ethertype": rule.ethertype,
        "source": ends(rule.source),
        "destination": ends(rule.destination),
        "program": rule.program if rule.filter else None,
        "keep_state": rule.keep_state,
        "text": rule.text,
    }
