r"""Packets that move together, as arrays.

A :class:`Burst` owns one run of bytes with its packets end to end. ``burst.columns`` are the fields of the headers,
parsed once, one array a field; ``burst.frames`` are the packets' bytes. Both are views: they show the burst's memory
and can be written where that means something, and they raise :class:`~virtnet.StateError` once the burst is released.
What numpy computes from a view, and ``np.asarray(view)``, is an array of its own that stays.

A part of a burst, chosen by a mask, by numbers or by a slice, is a burst that shares the memory.

Example:
    >>> import virtnet as vn
    >>> burst = vn.Burst([bytes(12) + b"\x08\x06" + bytes(46)] * 3)
    >>> burst.columns.eth_type == 0x0806
    array([ True,  True,  True])
    >>> len(burst[[0, 2]])
    2
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, SupportsBytes, overload

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from virtnet import _virtnet
from virtnet.errors import ConfigError, StateError
from virtnet.writing import WRITABLE, address_number, address_text

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = ["Burst", "Columns", "Frames", "View"]

#: Packets of a table in a notebook.
_SHOWN_MAX = 20

#: The longest frame: headers and tags before 65,535 bytes of IPv6 payload.
FRAME_MAX = 65_589

#: What the sender of a packet left to be done; the first ten bytes of the virtio-net header.
#: Spec: virtio 1.4, 5.1.9, Device Operation.
OFFLOAD = np.dtype(
    [
        ("flags", "u1"),
        ("gso_type", "u1"),
        ("hdr_len", "<u2"),
        ("gso_size", "<u2"),
        ("csum_start", "<u2"),
        ("csum_offset", "<u2"),
    ]
)

#: The hash that a device has told of a packet, and what of it was hashed: 0 for nothing.
#: Spec: virtio 1.4, 5.1.9.4.4, Hash reporting for incoming packets.
HASH = np.dtype([("value", "u4"), ("report", "u2")])

#: Where a capture has seen a packet, and which way it was going.
#: Spec: draft-ietf-opsawg-pcapng, 4.3.1, epb_flags.
ORIGIN = np.dtype([("place", "<u2"), ("direction", "u1"), ("unused", "u1")])

#: Anything that has a packet's bytes: ``bytes``, an array, a packet of Scapy's.
Frame = bytes | bytearray | memoryview | SupportsBytes


@dataclass(slots=True)
class _Lease:
    """Whether the memory of a burst may still be looked at; shared by its parts and views."""

    held: bool = True

    def check(self) -> None:
        if not self.held:
            raise StateError("the burst is released: copy what you keep with np.array(view) before that")


class View(NDArrayOperatorsMixin):
    """An array that shows the memory of a burst and raises once that is released.

    It computes and indexes like a numpy array. ``np.asarray(view)`` and :meth:`copy` are arrays of their own.

    Raises:
        StateError: by every use after the burst was released.
    """

    __slots__ = ("_array", "_lease")

    def __init__(self, array: NDArray[Any], lease: _Lease) -> None:
        """Used by bursts; there is no reason to make one by hand."""
        self._array = array
        self._lease = lease

    def _checked(self) -> NDArray[Any]:
        self._lease.check()
        return self._array

    def __array__(self, dtype: DTypeLike | None = None, *, copy: bool | None = None) -> NDArray[Any]:
        """A copy, for numpy."""
        if copy is False:
            raise ValueError("a view of a burst becomes an array by being copied")
        return np.array(self._checked(), dtype=dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Computes with the memory itself, without a copy."""
        given = [_plain(one) for one in inputs]
        if out := kwargs.get("out"):
            kwargs["out"] = tuple(_plain(one) for one in out)
            getattr(ufunc, method)(*given, **kwargs)
            return out[0] if len(out) == 1 else out
        return getattr(ufunc, method)(*given, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        """A number, an array of its own (chosen by mask or numbers), or a view again (a slice)."""
        found = self._checked()[key]
        if isinstance(found, np.ndarray) and found.base is not None and np.may_share_memory(found, self._array):
            return View(found, self._lease)
        return found

    def __setitem__(self, key: Any, value: ArrayLike) -> None:
        """Writes into the burst; columns are read-only."""
        array = self._checked()
        if not array.flags.writeable:
            raise ValueError("columns are what was parsed: write to burst.frames to change a packet")
        array[key] = value

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._checked())

    def __iter__(self) -> Iterator[Any]:
        """The rows."""
        return (self[i] for i in range(len(self)))

    def __bytes__(self) -> bytes:
        """The bytes, copied."""
        return self._checked().tobytes()

    # What programs do most, without the detour over numpy's dispatch.

    def __eq__(self, other: object) -> Any:
        """Item by item, as numpy does; the other comparisons likewise."""
        return self._checked() == _plain(other)

    def __ne__(self, other: object) -> Any:  # noqa: D105
        return self._checked() != _plain(other)

    def __lt__(self, other: Any) -> Any:  # noqa: D105
        return self._checked() < _plain(other)

    def __le__(self, other: Any) -> Any:  # noqa: D105
        return self._checked() <= _plain(other)

    def __gt__(self, other: Any) -> Any:  # noqa: D105
        return self._checked() > _plain(other)

    def __ge__(self, other: Any) -> Any:  # noqa: D105
        return self._checked() >= _plain(other)

    def __repr__(self) -> str:
        """What an array shows, or that the burst is gone."""
        return f"View({self._array!r})" if self._lease.held else "<View of a released burst>"

    __hash__ = None  # type: ignore[assignment] # compares item by item, like an array

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the items."""
        return self._array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and columns where a row has several items."""
        return self._array.shape

    @property
    def size(self) -> int:
        """Number of items."""
        return self._array.size

    def copy(self) -> NDArray[Any]:
        """An array of its own."""
        return self._checked().copy()

    def tolist(self) -> list[Any]:
        """Python's own numbers."""
        return self._checked().tolist()  # type: ignore[no-any-return] # numpy cannot say how deep the list is

    def sum(self) -> Any:
        """All items added up."""
        return self._checked().sum()

    def mean(self) -> Any:
        """The average item."""
        return self._checked().mean()

    def min(self) -> Any:
        """The smallest item."""
        return self._checked().min()

    def max(self) -> Any:
        """The largest item."""
        return self._checked().max()

    def any(self) -> bool:
        """Whether some item is not zero."""
        return bool(self._checked().any())

    def all(self) -> bool:
        """Whether no item is zero."""
        return bool(self._checked().all())


def _plain(value: Any) -> Any:
    """The array that a view shows; anything else as it is."""
    return value._checked() if isinstance(value, View) else value  # noqa: SLF001 - a method of View but for its place


class Columns:
    """The header fields of a burst, one array each, parsed when first asked for.

    A field that a packet does not have is 0; ``vlan`` is -1 without a tag. Addresses are numbers: Ethernet's of 48
    bits, IPv4's of 32 bits, IPv6's two of 64 bits.

    Attributes:
        length: ``uint32[n]``, bytes of each frame.
        eth_dst, eth_src: ``uint64[n]``.
        eth_type: ``uint16[n]``, behind any VLAN tags.
        vlan: ``int16[n]``, number of the outer VLAN.
        ip_version: ``uint8[n]``, 4, 6 or 0.
        ip_proto: ``uint8[n]``, the transport protocol, behind IPv6 extension headers.
        ip_ttl: ``uint8[n]``, or hop limit.
        ip_src, ip_dst: ``uint32[n]``, IPv4's.
        ip6_src, ip6_dst: ``uint64[n, 2]``, IPv6's.
        l4_src, l4_dst: ``uint16[n]``, ports of TCP, UDP and SCTP; 0 in a fragment that does not have them.
        tcp_flags: ``uint8[n]``.
        payload: ``uint32[n]``, where the bytes behind the parsed headers begin.
        offload: structured, what the sender left to be done (checksum, segmentation); can be written.
        time_ns: ``int64[n]``, when it passed, in nanoseconds since 1970; 0 where nobody has noted it: captures do.
        wire_length: ``uint32[n]``, bytes that the frame had; ``length`` unless a capture has cut it.
        direction: ``uint8[n]``, which way it was going where it was captured: 1 inbound, into the network; 2 outbound;
            0 where nobody has noted it.
        place: ``uint16[n]``, where it was captured, as a position in ``burst.places``.
        hash: structured, the ``value`` that the device has computed and what it has hashed (``report``); 0 where it
            tells none, see :meth:`VirtioUserPort.set_rss`.
    """

    NAMES = (
        "length",
        "eth_dst",
        "eth_src",
        "eth_type",
        "vlan",
        "ip_version",
        "ip_proto",
        "ip_ttl",
        "ip_src",
        "ip_dst",
        "ip6_src",
        "ip6_dst",
        "l4_src",
        "l4_dst",
        "tcp_flags",
        "payload",
        "offload",
        "time_ns",
        "wire_length",
        "direction",
        "place",
        "hash",
    )

    length: View
    eth_dst: View
    eth_src: View
    eth_type: View
    vlan: View
    ip_version: View
    ip_proto: View
    ip_ttl: View
    ip_src: View
    ip_dst: View
    ip6_src: View
    ip6_dst: View
    l4_src: View
    l4_dst: View
    tcp_flags: View
    payload: View
    offload: View
    time_ns: View
    wire_length: View
    direction: View
    place: View
    hash: View

    _DTYPES: ClassVar[dict[str, np.dtype[Any]]] = {
        "eth_dst": np.dtype("u8"),
        "eth_src": np.dtype("u8"),
        "eth_type": np.dtype("u2"),
        "vlan": np.dtype("i2"),
        "ip_version": np.dtype("u1"),
        "ip_proto": np.dtype("u1"),
        "ip_ttl": np.dtype("u1"),
        "ip_src": np.dtype("u4"),
        "ip_dst": np.dtype("u4"),
        "ip6_src": np.dtype("(2,)u8"),
        "ip6_dst": np.dtype("(2,)u8"),
        "l4_src": np.dtype("u2"),
        "l4_dst": np.dtype("u2"),
        "tcp_flags": np.dtype("u1"),
        "payload": np.dtype("u4"),
    }

    __slots__ = ("_headers", "_lease", "_packets", "_parsed")

    def __init__(self, packets: _virtnet.Packets, lease: _Lease) -> None:
        """Used by bursts."""
        self._packets = packets
        self._lease = lease
        self._headers: _virtnet.Headers | None = None
        self._parsed: dict[str, NDArray[Any]] = {}

    def __getattr__(self, name: str) -> View:
        """The column of that name."""
        self._lease.check()
        array = self._parsed.get(name)
        if array is None:
            array = self._column(name)
        return View(array, self._lease)

    def _column(self, name: str) -> NDArray[Any]:
        packets = self._packets
        if name in self._DTYPES:
            # Each by itself where packets are usual ones, all of a packet at once where they are not.
            found = packets.usual_column(name) if self._headers is None else None
            if found is None:
                self._headers = self._headers or _virtnet.Headers(packets)
                found = self._headers.column(name)
            self._parsed[name] = np.frombuffer(found, self._DTYPES[name])
            return self._parsed[name]
        if name == "offload":
            data, first = packets.offloads()
            return np.frombuffer(data, OFFLOAD, len(packets), first * OFFLOAD.itemsize)
        if name == "time_ns":
            return np.frombuffer(packets.times() or bytes(8 * len(packets)), np.int64)
        if name in {"direction", "place"}:
            return np.frombuffer(packets.origins() or bytes(ORIGIN.itemsize * len(packets)), ORIGIN)[name]
        if name == "hash":
            return np.frombuffer(packets.hashes() or bytes(HASH.itemsize * len(packets)), HASH)
        if name in {"length", "wire_length"}:
            lengths = packets.wire_lengths() if name == "wire_length" else b""
            return np.frombuffer(lengths or packets.lengths(), np.uint32)
        raise AttributeError(f"there is no column {name!r}: there are {', '.join(self.NAMES)}")

    def __getitem__(self, name: str) -> View:
        """The column of that name, as an attribute gives it."""
        try:
            return getattr(self, name)  # type: ignore[no-any-return] # always a View, see __getattr__
        except AttributeError as error:
            raise KeyError(str(error)) from error

    def __iter__(self) -> Iterator[str]:
        """The columns' names."""
        return iter(self.NAMES)

    def __len__(self) -> int:
        """Number of columns."""
        return len(self.NAMES)

    def __dir__(self) -> list[str]:
        """The columns and nothing else of interest."""
        return list(self.NAMES)

    def __repr__(self) -> str:
        """Names of the columns."""
        return f"Columns({', '.join(self.NAMES)})"

    def _repr_html_(self) -> str:
        """The first packets and those of the usual columns that say something of them, for notebooks."""
        from virtnet.showing import table

        n = min(len(self._packets), _SHOWN_MAX)
        shown = {name: self[name][:n].tolist() for name in self.NAMES if name not in {"offload", "hash", "payload"}}
        nothing: dict[str, Any] = {"vlan": -1, "ip6_src": [0, 0], "ip6_dst": [0, 0], "wire_length": None}
        shown["wire_length"] = [
            None if a == b else a for a, b in zip(shown["wire_length"], shown["length"], strict=True)
        ]
        names = [name for name in shown if any(value != nothing.get(name, 0) for value in shown[name])]
        rows = zip(range(n), *([address_text(name, value) for value in shown[name]] for name in names), strict=True)
        more = f"<p>and {len(self._packets) - n} more</p>" if n < len(self._packets) else ""
        return table(["", *names], rows) + more

    def to_dict(self) -> dict[str, NDArray[Any]]:
        """Every column as an array of its own, for a table: ``pandas.DataFrame(burst.columns.to_dict())``.

        Columns with several numbers a row become several: ``ip6_src_0``, ``offload_flags``.
        """
        table: dict[str, NDArray[Any]] = {}
        for name in self.NAMES:
            array = self[name].copy()
            if array.dtype.names:
                table |= {f"{name}_{part}": array[part].copy() for part in array.dtype.names}
            elif array.ndim > 1:
                table |= {f"{name}_{i}": array[:, i].copy() for i in range(array.shape[1])}
            else:
                table[name] = array
        return table


class Frames(Sequence[View]):
    """The packets of a burst as bytes: ``frames[i]`` is ``uint8[length]`` and can be written."""

    def __init__(self, packets: _virtnet.Packets, lease: _Lease) -> None:
        """Used by bursts."""
        self._packets = packets
        self._lease = lease

    def __len__(self) -> int:
        """Number of packets."""
        self._lease.check()
        return len(self._packets)

    @overload
    def __getitem__(self, key: int) -> View: ...
    @overload
    def __getitem__(self, key: slice) -> list[View]: ...
    def __getitem__(self, key: int | slice) -> View | list[View]:
        """The bytes of a packet, or of some."""
        self._lease.check()
        packets = self._packets
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(packets)))]
        number = int(key)
        if not -len(packets) <= number < len(packets):
            raise IndexError(f"there is no packet {number} in a burst of {len(packets)}")
        start, length = packets.span(number % len(packets))
        return View(np.frombuffer(packets.data, np.uint8, length, start), self._lease)

    def __repr__(self) -> str:
        """How many there are."""
        return f"Frames({len(self)} packets)"


class Burst:
    """Packets that arrived together or are to be sent together.

    Args:
        frames: the packets, each 1 to 65_589 bytes; copied.

    Attributes:
        came_from: of packets that :meth:`Net.on_burst` led to Python, the name of the node they come from.
        places: of packets that were captured, the names of the places that ``columns.place`` counts.

    Raises:
        ConfigError: a frame is empty or longer than any network carries.
    """

    came_from = ""
    places: tuple[str, ...] = ()

    def __init__(self, frames: Iterable[Frame] = ()) -> None:
        """Makes a burst of packets that you have."""
        parts = [bytes(frame) for frame in frames]
        for i, part in enumerate(parts):
            if not 1 <= len(part) <= FRAME_MAX:
                raise ConfigError(f"a frame has 1 to {FRAME_MAX} bytes, frame {i} has {len(part)}")
        lengths = np.array([len(part) for part in parts], np.uint32)
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.uint32) if parts else lengths
        self._packets = _virtnet.Packets(bytearray(b"".join(parts)), starts.tobytes(), lengths.tobytes())
        self._lease = _Lease()
        self._columns: Columns | None = None

    @classmethod
    def from_capture(cls, path: str | os.PathLike[str]) -> Burst:
        """Reads a capture file whole: pcap or pcapng, of Ethernet, with up to 4 GiB of packets.

        Its columns have what the file says besides: ``time_ns``, ``wire_length``, ``direction`` and ``place``.

        Raises:
            PortError: it cannot be read, or is cut or malformed; the message says where.

        Example:
            >>> import virtnet as vn
            >>> with vn.PcapPort("/tmp/virtnet-doc-read.pcapng", mode="write", overwrite=True) as port:
            ...     _ = port.tx([bytes(60), bytes(1500)])
            >>> vn.Burst.from_capture("/tmp/virtnet-doc-read.pcapng").columns.length
            View(array([  60, 1500], dtype=uint32))
        """
        recorded, places = _virtnet.read_capture(os.fspath(path))
        return cls._recorded(recorded, tuple(places))

    @classmethod
    def _of(cls, packets: _virtnet.Packets, lease: _Lease, places: tuple[str, ...] = ()) -> Burst:
        burst = cls.__new__(cls)
        burst.places = places
        burst._packets = packets  # noqa: SLF001 - a constructor
        burst._lease = lease  # noqa: SLF001
        burst._columns = None  # noqa: SLF001
        return burst

    @property
    def columns(self) -> Columns:
        """The header fields, one array each."""
        self._lease.check()
        if self._columns is None:
            self._columns = Columns(self._packets, self._lease)
        return self._columns

    @property
    def frames(self) -> Frames:
        """The packets' bytes."""
        self._lease.check()
        return Frames(self._packets, self._lease)

    @property
    def n_bytes(self) -> int:
        """Bytes of all packets."""
        self._lease.check()
        return self._packets.n_bytes()

    @overload
    def __getitem__(self, key: int) -> View: ...
    @overload
    def __getitem__(self, key: slice | ArrayLike | View) -> Burst: ...
    def __getitem__(self, key: Any) -> View | Burst:
        """One packet's bytes (a number), or a burst of some (a slice, a mask, numbers) that shares the memory."""
        self._lease.check()
        if isinstance(key, int | np.integer):
            return self.frames[int(key)]
        return self._of(self._part(key), self._lease, self.places)

    def _part(self, key: Any) -> _virtnet.Packets:
        packets = self._packets
        if isinstance(key, slice):
            numbers = range(*key.indices(len(packets)))
            if numbers.step == 1:
                return packets.part(numbers.start, len(numbers))
            return packets.pick(np.array(numbers, np.int64))
        picks = np.asarray(key)
        if picks.size == 0:
            return packets.part(0, 0)  # an empty list has no type to tell masks from numbers by
        if picks.ndim != 1 or picks.dtype.kind not in "biu":
            raise IndexError(
                f"packets are chosen by a mask, by numbers or by a slice, found {picks.dtype}{picks.shape}"
            )
        if picks.dtype == bool:
            if len(picks) != len(packets):
                raise IndexError(f"a mask for {len(packets)} packets was expected, found one for {len(picks)}")
            return packets.pick(picks.nonzero()[0])
        return packets.pick(picks.astype(np.int64, copy=False))

    def heads(self, length: int) -> Burst:
        """The packets cut after some bytes; shares the memory."""
        self._lease.check()
        return self._of(self._packets.cut(length), self._lease, self.places)

    def edit(self, where: ArrayLike | View | None = None, /, **fields: Any) -> int:
        """Writes header fields of all packets, or of those chosen by a mask or by numbers, and keeps checksums right.

        Only packets that have the field are changed. Columns that were asked for before show what was there before.

        Args:
            where: as in ``burst[where]``; all packets if not given.
            fields: ``eth_dst``, ``eth_src``, ``vlan`` (of the outer tag there is), ``ip_ttl``, ``ip_src``, ``ip_dst``,
                ``ip6_src``, ``ip6_dst``, and of TCP and UDP ``l4_src``, ``l4_dst``: a number or the text of an address
                for all of them, or an array with a number for each (two numbers of an IPv6 address, as in the columns).

        Returns:
            How many times a field was written.

        Raises:
            ConfigError: there is no such field that can be written, or a value does not fit into it.
            StateError: the burst is released.

        Source:
            RFC 1624, for checksums: they are changed by the difference.

        Example:
            >>> import virtnet as vn
            >>> burst = vn.Burst([bytes(60)] * 3)
            >>> burst.edit([0, 2], eth_dst="02:00:00:00:00:01")
            2
            >>> burst.columns.eth_dst.tolist()
            [2199023255553, 0, 2199023255553]
        """
        self._lease.check()
        packets = self._packets if where is None else self._part(np.atleast_1d(np.asarray(where)))
        written = 0
        for field, value in fields.items():
            written += packets.edit(field, _field_values(field, value, len(packets)))
        self._columns = None
        return written

    def __len__(self) -> int:
        """Number of packets."""
        self._lease.check()
        return len(self._packets)

    def __iter__(self) -> Iterator[View]:
        """The packets' bytes."""
        return iter(self.frames)

    def release(self) -> None:
        """Lets go of the memory: from now on the burst, its parts and their views raise. Again does nothing."""
        self._lease.held = False
        self._packets = _NOTHING
        self._columns = None

    def __enter__(self) -> Self:
        """The burst, released at the end of the block."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Releases it."""
        self.release()

    def __repr__(self) -> str:
        """How many packets of how many bytes."""
        if not self._lease.held:
            return "<Burst, released>"
        return f"<Burst of {len(self)} packets, {self.n_bytes} bytes>"

    @classmethod
    def _rx(cls, port: _virtnet.Port, max_packets: int, timeout_s: float | None) -> Burst:
        """What has arrived at a port."""
        return cls._of(port.rx(max_packets, timeout_s), _Lease())

    @classmethod
    def _recorded(
        cls, recorded: tuple[bytearray, bytes, bytes, bytearray, bytes, bytes, bytes], places: tuple[str, ...]
    ) -> Burst:
        """What a capture has kept."""
        data, starts, lengths, offloads, times, wire_lengths, origins = recorded
        packets = _virtnet.Packets(data, starts, lengths, bytes(offloads), times, wire_lengths, origins)
        return cls._of(packets, _Lease(), places)

    def _tx(self, port: _virtnet.Port) -> int:
        """Gives the packets to a port; how many it took."""
        self._lease.check()
        return port.tx(self._packets)


#: What a burst has that was released.
_NOTHING = _virtnet.Packets(bytearray(), b"", b"")


def _field_values(field: str, value: Any, n: int) -> NDArray[np.uint64]:
    """A number for each packet, two of IPv6 addresses."""
    if field not in WRITABLE:
        raise ConfigError(f"the field {field!r} cannot be written: there are {', '.join(WRITABLE)}")
    bits = WRITABLE[field]
    if isinstance(value, str):
        value = address_number(field, value)
    if isinstance(value, int) and bits > 64:  # noqa: PLR2004 - of a number of numpy's
        if not 0 <= value < 1 << bits:
            raise ConfigError(f"{field}: expected a number of {bits} bits, found {value}")
        value = np.array([value >> 64, value & (1 << 64) - 1], np.uint64)
    per_packet = (2,) if bits > 64 else ()  # noqa: PLR2004
    given = np.asarray(value)
    if given.dtype.kind not in "biu" or given.shape not in {per_packet, (n, *per_packet)}:
        found = f"{given.dtype}{given.shape}"
        raise ConfigError(f"{field}: expected a number, or one for each of {n} packets, found {found}")
    largest = (1 << min(bits, 64)) - 1
    if given.size and (int(given.min()) < 0 or int(given.max()) > largest):
        raise ConfigError(f"{field}: expected numbers from 0 to {largest}, found {given.min()} to {given.max()}")
    return np.ascontiguousarray(np.broadcast_to(given, (n, *per_packet)), np.uint64).reshape(-1)
