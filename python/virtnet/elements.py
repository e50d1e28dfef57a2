"""Elements: small Python functions on packets that workers run without Python.

::

    @vn.element
    def guard(packets):
        telnet = (packets.ip_proto == 6) & (packets.l4_dst == 23)
        packets.ip_ttl = np.where(packets.ip_ttl > 32, 32, packets.ip_ttl)
        return np.where(telnet, "drop", "pass")

    vm1 >> net.element(guard) >> switch

When it is defined, the function is called once with columns that stand for those of any burst, and what it does with
them is written down as a program: comparisons, whole numbers, ``np.where``, ``np.isin``, look-ups in a :class:`Table`,
fields that are assigned, and what is returned. A worker runs that program on bursts, without Python. What does not
depend on packets is computed once, at the definition; what cannot be written down is refused there, with its line.

The same function works on real columns: ``guard(burst)`` runs it under numpy, with the same result to the last bit, in
tests or as the function of :meth:`virtnet.Net.on_burst`.
"""

from __future__ import annotations

import inspect
import json
import linecache
import traceback
from collections.abc import Mapping
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from virtnet import writing
from virtnet.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import DTypeLike

    from virtnet.burst import Burst

__all__ = ["Element", "Table", "element"]

#: What of a packet an element sees: as much as is moved at once.
HEAD_MAX = 192

#: The columns there are for elements, with their types.
COLUMNS = {
    "length": "uint32",
    "eth_dst": "uint64",
    "eth_src": "uint64",
    "eth_type": "uint16",
    "vlan": "int16",
    "ip_version": "uint8",
    "ip_proto": "uint8",
    "ip_ttl": "uint8",
    "ip_src": "uint32",
    "ip_dst": "uint32",
    "l4_src": "uint16",
    "l4_dst": "uint16",
    "tcp_flags": "uint8",
    "payload": "uint32",
}

#: Those of two numbers a packet: ``packets.ip6_src[:, 0]`` is the network's half of the address.
HALVES = ("ip6_src", "ip6_dst")

#: Those that can be assigned, with how many of their bits are written.
WRITABLE = {field: bits for field, bits in writing.WRITABLE.items() if field not in HALVES}

BINARY = {
    "add",
    "subtract",
    "multiply",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
    "left_shift",
    "right_shift",
    "floor_divide",
    "remainder",
    "minimum",
    "maximum",
}
COMPARISONS = {"equal", "not_equal", "less", "less_equal", "greater", "greater_equal"}
LOGICAL = {"logical_and": "bitwise_and", "logical_or": "bitwise_or", "logical_not": "invert"}

#: numpy's arithmetic of truth values.
OF_BOOLS = {"add": "bitwise_or", "multiply": "bitwise_and", "minimum": "bitwise_and", "maximum": "bitwise_or"}

#: The answers there always are, in the order of their numbers.
WAYS = ("drop", "pass")


def element(function: Callable[[Any], Any]) -> Element:
    """Makes an element of a function; a decorator.

    Raises:
        ConfigError: the function does what cannot be done without Python; the message has the line.

    Example:
        >>> import virtnet as vn
        >>> @vn.element
        ... def web_only(packets):
        ...     return (packets.l4_dst == 80) | (packets.l4_src == 80)
        >>> web_only
        <element 'web_only': 8 steps>
        >>> web_only(vn.Burst([bytes(60)]))
        array([False])
    """
    return Element(function)


class Table:
    """Numbers by number, for elements and for numpy: ``table[packets.ip_src]``, ``table.has(packets.ip_src)``.

    Args:
        entries: what is found for each key, or only the keys, for each of which 1 is found.
        default: what is found for every other key.
        dtype: the type of what is found, a whole number's.

    Raises:
        ConfigError: a key or a value is no whole number, or does not fit.
    """

    def __init__(
        self, entries: Mapping[int, int] | Iterable[int], *, default: int = 0, dtype: DTypeLike = "uint32"
    ) -> None:
        """Copies the entries."""
        pairs = entries if isinstance(entries, Mapping) else dict.fromkeys(entries, 1)
        self.dtype = np.dtype(dtype)
        if self.dtype.kind not in "biu":
            raise ConfigError(f"a table holds whole numbers, found {self.dtype}")
        try:
            self._entries = {index(key): int(self.dtype.type(index(value))) for key, value in pairs.items()}
            self.default = int(self.dtype.type(index(default)))
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"a table has whole numbers as keys, and values that fit {self.dtype}: {error}") from None
        if any(not -(1 << 63) <= key < 1 << 64 for key in self._entries):
            raise ConfigError("the keys of a table have 64 bits")

    def __len__(self) -> int:
        """Number of keys."""
        return len(self._entries)

    def __getitem__(self, keys: Any) -> Any:
        """What is found for each key."""
        if isinstance(keys, Symbol):
            return keys.looked_up(self)
        array = np.asarray(keys)
        flat = (self._entries.get(key, self.default) for key in array.ravel().tolist())
        return np.fromiter(flat, self.dtype, array.size).reshape(array.shape)

    def has(self, keys: Any) -> Any:
        """Which of the keys are in it."""
        if isinstance(keys, Symbol):
            return keys.is_in(self._entries)
        array = np.asarray(keys)
        flat = (key in self._entries for key in array.ravel().tolist())
        return np.fromiter(flat, bool, array.size).reshape(array.shape)

    def items_for(self, dtype: np.dtype[Any]) -> tuple[list[int], list[int]]:
        """Keys that a column of that type can have, and their values."""
        lowest, highest = _bounds(dtype)
        pairs = [(key, value) for key, value in self._entries.items() if lowest <= key <= highest]
        return [key for key, _ in pairs], [value for _, value in pairs]


class Element:
    """A function on packets with the program that it was written down as; made by :func:`element`.

    Attributes:
        function: the function.
        name: its name.
        to: the names that it sends packets to, beside ``"pass"`` and ``"drop"``, in the order it names them.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        """Writes the function down."""
        self.function = function
        self.name = getattr(function, "__name__", "element")
        tracer = _Tracer()
        try:
            with np.errstate(all="ignore"):
                tracer.answer(function(SymbolicColumns(tracer)))
        except Exception as error:
            raise ConfigError(f"element {self.name!r}{_place(function, error)}: {error}") from error
        self.to = tuple(tracer.ways[len(WAYS) :])
        self._steps, self._tables = tracer.steps, tracer.tables

    @property
    def program(self) -> str:
        """The program as JSON: what a network's specification has of it."""
        return json.dumps({"steps": self._steps, "tables": self._tables, "to": self.to}, separators=(",", ":"))

    def __call__(self, burst: Burst) -> Any:
        """Runs the function on a burst under numpy: fields that it assigns are written; returns what it returns.

        Like a worker, it sees the first 192 bytes of each packet.
        """
        with np.errstate(all="ignore"):
            return self.function(_RealColumns(burst))

    def __repr__(self) -> str:
        """Its name and size."""
        return f"<element {self.name!r}: {len(self._steps)} steps>"


class _Tracer:
    """Writes down what is done to symbols."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, str, list[int]]] = []
        self.tables: list[tuple[list[int], list[int], int]] = []
        self.ways = list(WAYS)

    def step(self, op: str, dtype: np.dtype[Any], *args: int) -> Symbol:
        if dtype.kind not in "biu":
            raise ConfigError(f"{op} gives {dtype}: an element computes with whole numbers (// divides)")
        self.steps.append((op, dtype.name, [int(arg) for arg in args]))
        return Symbol(self, len(self.steps) - 1, dtype)

    def symbol(self, value: Any, dtype: np.dtype[Any]) -> Symbol:
        """A number, or a symbol as it is."""
        return value if isinstance(value, Symbol) else self.step("number", dtype, int(value))

    def way(self, name: str) -> int:
        if name not in self.ways:
            self.ways.append(name)
        return self.ways.index(name)

    def answer(self, given: Any) -> None:
        if given is None:
            return
        given = self.named(given)
        if not isinstance(given, Symbol):
            if not isinstance(given, bool | np.bool_):
                raise ConfigError(f"it returns None, True or False, or names of ways for all packets, found {given!r}")
            given = self.symbol(given, np.dtype(bool))
        if given.dtype.kind != "b" and not given.is_way:
            raise ConfigError(f"it returns truth values or names of ways, found numbers ({given.dtype})")
        self.step("answer", given.dtype, given.number)

    def named(self, value: Any) -> Any:
        """The number of a way instead of its name."""
        if not isinstance(value, str):
            return value
        symbol = self.symbol(self.way(value), np.dtype(np.int64))
        symbol.is_way = True
        return symbol


class Symbol(NDArrayOperatorsMixin):
    """What stands for a column, or for what was computed of some, while an element is written down."""

    __array_priority__ = 1000

    def __init__(self, tracer: _Tracer, number: int, dtype: np.dtype[Any]) -> None:
        """The result of step ``number``."""
        self._tracer = tracer
        self.number = number
        self.dtype = dtype
        #: It is the number of a way, not one to compute with.
        self.is_way = False

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Symbol:
        """Writes down what numpy would compute."""
        name = ufunc.__name__
        if method != "__call__" or kwargs or ufunc.nout != 1:
            raise ConfigError(f"np.{name}.{method} and its options are nothing an element can do")
        for value in inputs:
            if isinstance(value, Symbol):
                _computable(value)
            elif not isinstance(value, int | np.integer | np.bool_):
                raise ConfigError(f"an element computes with whole numbers, found {value!r}")
        # numpy itself says which type comes out, and whether a number fits.
        samples = [np.ones(1, one.dtype) if isinstance(one, Symbol) else one for one in inputs]
        dtype = np.asarray(ufunc(*samples)).dtype
        tracer = self._tracer
        if name in LOGICAL:
            if any(isinstance(one, Symbol) and one.dtype.kind != "b" for one in inputs):
                raise ConfigError(f"np.{name} takes truth values here: compare with 0")
            name = LOGICAL[name]
        if name in COMPARISONS:
            operands = [tracer.symbol(one, _type_of_number(one)) for one in inputs]
            return tracer.step(name, dtype, *(one.number for one in operands))
        if name in BINARY or name in {"invert", "negative"}:
            operands = [tracer.symbol(one, dtype) for one in inputs]
            if dtype.kind == "b":
                name = OF_BOOLS.get(name, name)
            return tracer.step(name, dtype, *(one.number for one in operands))
        raise ConfigError(f"np.{name} is nothing an element can do")

    def __array_function__(self, func: Callable[..., Any], _types: Any, args: Any, kwargs: Any) -> Any:
        """Writes down the few functions of numpy that are for elements."""
        if func is np.where and len(args) == 3 and not kwargs:  # noqa: PLR2004 - condition and both sides
            return self._where(*args)
        if func is np.isin and len(args) == 2 and isinstance(args[0], Symbol):  # noqa: PLR2004
            keys = np.asarray(args[1])
            if keys.dtype.kind not in "biu" or kwargs.keys() - {"invert"}:
                raise ConfigError("np.isin looks for a column in whole numbers")
            found = args[0].is_in(keys.ravel().tolist())
            return ~found if kwargs.get("invert") else found
        raise ConfigError(f"np.{func.__name__} is nothing an element can do: there are np.where and np.isin")

    def _where(self, condition: Any, a: Any, b: Any) -> Any:
        tracer = self._tracer
        if not isinstance(condition, Symbol):
            return a if condition else b
        if condition.dtype.kind != "b":
            raise ConfigError("np.where takes a truth value first: compare with 0")
        a, b = tracer.named(a), tracer.named(b)
        ways = [isinstance(one, Symbol) and one.is_way for one in (a, b)]
        if any(ways) != all(ways):
            raise ConfigError("np.where has names of ways on both sides or on none")
        sides = [np.ones(1, one.dtype) if isinstance(one, Symbol) else one for one in (a, b)]
        dtype = np.where(np.ones(1, bool), *sides).dtype
        a, b = (tracer.symbol(one, dtype) for one in (a, b))
        result = tracer.step("where", dtype, condition.number, a.number, b.number)
        result.is_way = all(ways)
        return result

    def astype(self, dtype: DTypeLike) -> Symbol:
        """The number in another type, as numpy casts it."""
        _computable(self)
        return self._tracer.step("cast", np.dtype(dtype), self.number)

    def is_in(self, keys: Iterable[int]) -> Symbol:
        """Whether it is one of the keys."""
        return self._table("member", Table(keys), np.dtype(bool))

    def looked_up(self, table: Table) -> Symbol:
        """What is found for it in a table."""
        return self._table("lookup", table, table.dtype)

    def _table(self, op: str, table: Table, dtype: np.dtype[Any]) -> Symbol:
        _computable(self)
        self._tracer.tables.append((*table.items_for(self.dtype), table.default))
        return self._tracer.step(op, dtype, self.number, len(self._tracer.tables) - 1)

    def _refuse(self, *_: object) -> Any:
        raise ConfigError(
            "an element decides on all packets at once: np.where, & and | instead of if, and, or; no loops over packets"
        )

    __bool__ = __iter__ = __len__ = __int__ = __index__ = __float__ = __getitem__ = __array__ = _refuse
    __hash__ = None  # type: ignore[assignment] # compares packet by packet, like an array


class SymbolicColumns:
    """The columns that an element is written down with."""

    def __init__(self, tracer: _Tracer) -> None:
        """Of no burst."""
        # Past __setattr__, which is for fields of packets.
        self.__dict__.update(_tracer=tracer, _known={})

    def __getattr__(self, name: str) -> Any:
        """The column of that name."""
        if name in HALVES:
            return _Halves(self._tracer, name)
        if name not in COLUMNS:
            raise ConfigError(f"there is no column {name!r} for elements: there are {', '.join([*COLUMNS, *HALVES])}")
        if name not in self._known:
            self._known[name] = self._tracer.step(f"column:{name}", np.dtype(COLUMNS[name]))
        return self._known[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """Has a field written."""
        dtype = _check_assigned(name, value)
        symbol = self._tracer.symbol(value, dtype)
        symbol = symbol if symbol.dtype == dtype else symbol.astype(dtype)
        self._known[name] = symbol
        mask = self._tracer.symbol((1 << WRITABLE[name]) - 1, dtype)
        written = self._tracer.step("bitwise_and", dtype, symbol.number, mask.number)
        self._tracer.step(f"write:{name}", dtype, written.number)


class _Halves:
    """A column of two numbers a packet, of which one is to be chosen."""

    def __init__(self, tracer: _Tracer, name: str) -> None:
        self._tracer, self._name = tracer, name

    def __getitem__(self, key: Any) -> Symbol:
        if key not in ((slice(None), 0), (slice(None), 1)):
            raise ConfigError(f"packets.{self._name}[:, 0] or [:, 1] is one half of the address")
        return self._tracer.step(f"column:{self._name}.{key[1]}", np.dtype(np.uint64))


class _RealColumns:
    """The columns of a burst, as elements see them."""

    def __init__(self, burst: Burst) -> None:
        # Past __setattr__, which is for fields of packets.
        self.__dict__.update(_burst=burst, _columns=burst.heads(HEAD_MAX).columns, _assigned={})

    def __getattr__(self, name: str) -> Any:
        if name in self._assigned:
            return self._assigned[name]
        if name == "length":
            return np.asarray(self._burst.columns.length)
        return np.asarray(self._columns[name])

    def __setattr__(self, name: str, value: Any) -> None:
        dtype = _check_assigned(name, value)
        values = np.broadcast_to(np.asarray(value).astype(dtype), (len(self._burst),))
        self._assigned[name] = values
        self._burst.heads(HEAD_MAX).edit(**{name: values & dtype.type((1 << WRITABLE[name]) - 1)})


def _check_assigned(name: str, value: Any) -> np.dtype[Any]:
    """The type in which a field is written."""
    if name not in WRITABLE:
        raise ConfigError(f"the field {name!r} cannot be written: there are {', '.join(WRITABLE)}")
    dtype = np.dtype(COLUMNS[name])
    if isinstance(value, int) and not isinstance(value, bool):
        lowest, highest = _bounds(dtype)
        if not lowest <= value <= highest:
            raise ConfigError(f"{name} = {value}: {dtype} holds {lowest} to {highest}")
    elif getattr(value, "is_way", False) or getattr(getattr(value, "dtype", None), "kind", "?") not in "biu":
        raise ConfigError(f"{name} is assigned whole numbers, found {value!r}")
    return dtype


def _computable(symbol: Symbol) -> None:
    if symbol.is_way:
        raise ConfigError("names of ways can be chosen and returned, and nothing else")


def _type_of_number(value: Any) -> np.dtype[Any]:
    """A type for a number that is compared, whatever the other side's."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not -(1 << 63) <= value < 1 << 64:
            raise ConfigError(f"numbers have 64 bits, found {value}")
        return np.dtype(np.int64 if value < 1 << 63 else np.uint64)
    return np.asarray(value).dtype if not isinstance(value, Symbol) else value.dtype


def _bounds(dtype: np.dtype[Any]) -> tuple[int, int]:
    if dtype.kind == "b":
        return 0, 1
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _place(function: Callable[..., Any], error: BaseException) -> str:
    """The line of the function where an error came from."""
    code = inspect.unwrap(function).__code__ if hasattr(inspect.unwrap(function), "__code__") else None
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if code is not None and frame.filename == code.co_filename:
            text = linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f", line {frame.lineno} ({text})" if text else f", line {frame.lineno}"
    return ""
