"""The compiled half of the package: private, use what `virtnet` exports.

Everything here takes checked values and plain data: ports are described by the options of `virtnet.spec`, snapshots
are dictionaries. It raises the exceptions of `virtnet.errors`. What waits lets other threads run and returns at least
every 100 ms to answer Ctrl-C. Objects may be used from any thread.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Self, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Checker",
    "DeviceQueue",
    "DriverQueue",
    "Engine",
    "GuestMemory",
    "Headers",
    "Packets",
    "Port",
    "Recorder",
    "__version__",
    "build_info",
    "check_router",
    "line_cost_ns",
    "memory_pair",
    "probe",
    "queue_pair",
    "read_capture",
    "try_af_xdp",
]

__version__: Final[str]

#: Name, kind and options of a port or function in a graph. A port's options hold ``where`` beside those of its kind;
#: a memory port's hold ``port``, one end of a `memory_pair`, which the engine takes over.
_Node: TypeAlias = tuple[str, str, Mapping[str, Any]]

def check_router(
    interfaces: Mapping[str, tuple[bytes, int, Sequence[tuple[str, int]]]], routes: Mapping[str, str]
) -> None:
    """Raises a `ConfigError` if a router's interfaces (address on the link, MTU, addresses) and routes cannot be."""

def build_info() -> dict[str, str]:
    """Version, profile (``release`` or ``debug``) and target of the compiled module."""

def try_af_xdp() -> None:
    """Raises ``PortError`` where there can be no AF_XDP ports, and says what is missing."""

def line_cost_ns(cpu: int, other: int) -> float:
    """How long a cache line takes from one CPU to another, in nanoseconds; a measurement of a few milliseconds.

    Two sides of a ring pay for everything they tell each other in this unit. Two CPUs that share a cache take 30 to
    70 ns, others several times as long, and a virtual CPU may be moved from near to far while it runs.

    Args:
        cpu: number of a CPU that this process may use. Its threads spin there meanwhile.
        other: number of another one.

    Raises:
        ConfigError: the same CPU twice, or one that this process may not use.
        PortError: the CPUs were too busy to tell.
    """

@final
class Headers:
    """The headers of packets, parsed."""

    def __new__(cls, packets: Packets) -> Self: ...
    def column(self, name: str) -> bytes:
        """A column of `virtnet.Columns` that is parsed, as a packed native-endian array."""

@final
class Packets:
    """The packets of a burst: bytes that Python may write, and what is known of each packet."""

    def __new__(
        cls,
        data: bytearray,
        starts: bytes,
        lengths: bytes,
        offloads: bytes | bytearray | None = None,
        times: bytes | None = None,
        wire_lengths: bytes | None = None,
        origins: bytes | None = None,
    ) -> Self:
        """Packets in ``data``: where each starts and its length as uint32, and perhaps of each ten bytes of offload
        metadata (the first ten of the virtio-net header), its time as int64, its length on the wire as uint32, and
        four bytes of where it was seen: the place as uint16, the direction, and nothing.
        """

    def __len__(self) -> int: ...
    @property
    def data(self) -> bytearray:
        """The bytes, which parts share."""

    def n_bytes(self) -> int:
        """Bytes of all packets."""

    def span(self, i: int) -> tuple[int, int]:
        """Where packet ``i`` starts, and its length."""

    def lengths(self) -> bytes:
        """The length of each as uint32."""

    def offloads(self) -> tuple[bytearray, int]:
        """The offload metadata, which may be written, and the row of the first packet."""

    def hashes(self) -> bytes:
        """Six bytes of hash each, or none at all."""

    def times(self) -> bytes:
        """When each passed as int64, or nothing."""

    def wire_lengths(self) -> bytes:
        """The length of each on the wire as uint32, or nothing."""

    def origins(self) -> bytes:
        """Four bytes each of where it was seen, or nothing."""

    def pick(self, numbers: NDArray[np.int64]) -> Packets:
        """Some of the packets, by number; negative ones count from the end."""

    def part(self, first: int, n: int) -> Packets:
        """The ``n`` packets from number ``first`` on."""

    def cut(self, length: int) -> Packets:
        """The packets cut after some bytes."""

    def usual_column(self, name: str) -> bytes | None:
        """What `Headers.column` gives, faster, if all packets are plain IPv4."""

    def edit(self, field: str, values: NDArray[np.uint64]) -> int:
        """Writes a field of packets, whose values are ``uint64[n]``, or ``uint64[2 * n]`` of an IPv6 address.

        Returns:
            How many packets have it.
        """

def probe(path: str, timeout_s: float) -> dict[str, Any]:
    """Attaches to a back-end as a front-end and tells what it offers, then leaves.

    Returns:
        ``features`` and ``protocol_features`` as words, ``queue_pairs``, ``memory_slots`` and ``status`` as numbers,
        ``config`` as bytes, ``None`` where the back-end does not tell.
    """

@final
class Checker:
    """Tries a back-end out, one check after the other."""

    def __new__(cls, path: str, timeout_s: float) -> Self: ...
    def checks(self) -> list[tuple[str, str, str, Literal["must", "should"], bool]]:
        """All checks: id, demand, source, level, whether it is hostile."""
    def run(self, number: int) -> tuple[Literal["passed", "failed", "not applicable"], str, float]:
        """Runs the check with this number: outcome, what was found, seconds."""

def memory_pair(capacity: int) -> tuple[Port, Port]:
    """Two ports back to back, each holding up to ``capacity`` packets that the other has not taken."""

def read_capture(path: str) -> tuple[tuple[bytearray, bytes, bytes, bytearray, bytes, bytes, bytes], list[str]]:
    """The packets of a capture file as ``Recorder.take`` gives them, and the names of the places."""

@final
class Recorder:
    """A port that keeps what is sent to it, for `virtnet.Net` to open, and what it has kept."""

    def __new__(cls, places: int, snap: int, memory: int) -> Self:
        """Takes copies from so many places, each by a gate of its own (0: it takes packets).

        It keeps the first ``snap`` bytes of each packet, in ``memory`` bytes at most.
        """

    def take(self) -> tuple[bytearray, bytes, bytes, bytearray, bytes, bytes, bytes]:
        """What has come since the last time: bytes, starts, lengths, offload metadata, times, lengths on the wire,
        origins.
        """

    def is_empty(self) -> bool:
        """Whether there is nothing to take."""

    def is_over(self) -> bool:
        """Whether nothing more comes."""

@final
class Port:
    """One port, used by hand."""

    def __new__(cls, kind: str, where: str, options: Mapping[str, Any]) -> Port:
        """Opens it: binds or connects the socket, attaches the interface, opens the file."""

    def rx(self, max_packets: int, timeout_s: float | None) -> Packets:
        """Waits until packets are there, for ``timeout_s`` at most (``None``: for ever), and takes them."""

    def tx(self, packets: Packets) -> int:
        """Sends packets; how many were accepted, counted from the front."""

    def wait_connected(self, timeout_s: float | None) -> bool:
        """Waits until somebody is at the other end and ready for packets; whether that happened in time."""

    def set_link(self, up: bool) -> None:
        """Takes the link of a vhost-user port down, or up."""

    def command(self, name: str, arguments: dict[str, Any]) -> None:
        """Has the device at the other end carry out a command of its control queue."""

    def device_stats(self, arguments: dict[str, Any]) -> list[tuple[int, list[int]]]:
        """What the device at the other end has counted: of each queue in ``asked``, its number and its counters."""

    def device_state(self, state: bytes | None) -> bytes:
        """Loads a state into the device at the other end, or saves its state (``None``); what was saved."""

    def stats(self) -> dict[str, Any]:
        """The fields of `virtnet.PortStats`."""

    def events(self, first: int) -> tuple[list[dict[str, Any]], int]:
        """Events from number ``first`` on, with the fields of `virtnet.Event`, and how many of all are not kept."""
    def rings(self) -> list[dict[str, Any]]:
        """The rings, with the fields of `virtnet.RingState`; none where there are no rings."""
    def close(self) -> None:
        """Gives everything back. Whatever is called afterwards raises ``StateError``, but for this and ``stats``."""

@final
class Engine:
    """Workers, and the graph they run."""

    def __new__(cls, cpus: Sequence[int], poll: Literal["adaptive", "busy", "interrupt"]) -> Engine:
        """Starts the workers, on the given processors (empty: anywhere), with nothing to do."""

    def apply(self, nodes: Sequence[_Node], cables: Sequence[tuple[str, str]]) -> None:
        """Makes the graph the one described, whole or not at all.

        A node that was there under the same name, kind and options goes on as it was; ports that are new are opened,
        those that are no longer there are closed.

        Functions are ``switch`` (``ageing_s: float``), ``wire``, ``sink`` (``copy: bool``), ``source``
        (``frame: bytes``, ``rate_pps: float | None``, ``count: int | None``) and ``echo``.
        """

    def stats(self) -> dict[str, Any]:
        """``ports`` and ``functions`` by name with the fields of `virtnet.PortStats` and `virtnet.FunctionStats`, and
        ``gone``, the fields of `virtnet.Balance` for what was removed; ``worker``, those of `virtnet.WorkerStats`.
        """

    def passed(self) -> int:
        """How many packets ports have received and sent so far; workers are asked, and no port how it is."""

    def events(self, name: str, first: int) -> tuple[list[dict[str, Any]], int]:
        """As `Port.events`, of the port of this name; readable also after the end."""
    def rings(self, name: str) -> list[dict[str, Any]]:
        """As `Port.rings`, of the port of this name."""

    def set_link(self, name: str, up: bool) -> None:
        """Takes the link of a vhost-user port down, or up."""

    def command(self, name: str, command: str, arguments: dict[str, Any]) -> None:
        """As `Port.command`, of the port of this name."""

    def device_stats(self, name: str, arguments: dict[str, Any]) -> list[tuple[int, list[int]]]:
        """As `Port.device_stats`, of the port of this name."""

    def device_state(self, name: str, state: bytes | None) -> bytes:
        """As `Port.device_state`, of the port of this name."""

    def stop(self) -> None:
        """Stops the workers and closes the ports. Counters stay readable; again does nothing."""

@final
class GuestMemory:
    """Memory that both sides of a queue see; see `virtnet.GuestMemory`."""

    def __new__(cls, size: int) -> GuestMemory: ...
    @property
    def start(self) -> int: ...
    @property
    def size(self) -> int: ...
    def alloc(self, size: int) -> int: ...
    def read(self, addr: int, len: int) -> bytes: ...
    def write(self, addr: int, data: bytes) -> None: ...

def queue_pair(memory: GuestMemory, size: int, ring: str, features: int) -> tuple[DriverQueue, DeviceQueue]:
    """Both sides of a queue that is laid out in ``memory``."""

@final
class DriverQueue:
    """The driver's side; see `virtnet.DriverQueue`."""

    @property
    def free(self) -> int: ...
    @property
    def areas(self) -> list[int]: ...
    def add(self, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]) -> int | None: ...
    def publish(self) -> bool: ...
    def reap(self, max: int) -> list[tuple[int, int]]: ...
    def arm(self) -> bool: ...
    def disarm(self) -> None: ...

@final
class DeviceQueue:
    """The device's side; see `virtnet.DeviceQueue`."""

    @property
    def areas(self) -> list[int]: ...
    @property
    def base(self) -> int: ...
    @property
    def taken(self) -> int: ...
    def take(self, max: int, writable: bool) -> list[tuple[list[tuple[int, int]], str | None]]: ...
    def give(self, lengths: Sequence[int]) -> None: ...
    def publish(self) -> bool: ...
    def arm(self) -> bool: ...
    def disarm(self) -> None: ...
