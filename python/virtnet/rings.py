"""Memory and virtqueues by hand: the third door, down to a single descriptor.

For teaching, for tests, and for doing what no well-behaved driver does. Both sides of one queue, in one process::

    >>> memory = GuestMemory(1 << 20)
    >>> driver, device = queue_pair(memory, size=8, ring="packed")
    >>> addr = memory.alloc(64)
    >>> memory.write(addr, b"hello")
    >>> driver.add(readable=[(addr, 5)])
    0
    >>> driver.publish()  # is the device to be kicked?
    True
    >>> [chain] = device.take()
    >>> memory.read(*chain.buffers[0])
    b'hello'
    >>> device.give()
    >>> device.publish()  # is the driver to be called?
    True
    >>> driver.reap()
    [Used(id=0, length=0)]

Packets move through the same queues in Rust; here every step is a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from virtnet import _virtnet
from virtnet.errors import ConfigError
from virtnet.features import RingFeature

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Chain", "DeviceQueue", "DriverQueue", "GuestMemory", "Used", "queue_pair"]

#: The most descriptors of a ring, in either format.
QUEUE_SIZE_MAX = 32_768

#: The most chains that a device takes before it gives them back.
CHAINS_MAX = 64


class Used(NamedTuple):
    """A chain that the device has returned.

    Attributes:
        id: what :meth:`DriverQueue.add` answered for it.
        length: bytes that the device wrote, at most what was writable.
    """

    id: int
    length: int


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain that the device has taken.

    Attributes:
        buffers: guest address and length in bytes of each buffer, in order; a buffer over two regions is two.
        error: what is wrong with the chain, ``None`` for a good one. It has no buffers then and is to be given back.
    """

    buffers: tuple[tuple[int, int], ...]
    error: str | None = None

    def __len__(self) -> int:
        """Bytes of all buffers."""
        return sum(length for _, length in self.buffers)


class GuestMemory:
    """Memory that both sides of a queue see, one region of it.

    Args:
        size: bytes, at least 1.

    Raises:
        ConfigError: there is no such size.
    """

    def __init__(self, size: int) -> None:
        """Maps it, filled with zeros."""
        if size < 1:
            raise ConfigError(f"memory has at least one byte, found {size}")
        self._native = _virtnet.GuestMemory(size)

    @property
    def start(self) -> int:
        """Guest-physical address of the first byte."""
        return self._native.start

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return self._native.size

    def alloc(self, size: int) -> int:
        """Sets ``size`` bytes aside and gives their address, a multiple of 64. Nothing is ever given back.

        Raises:
            ConfigError: there are not so many left.
        """
        return self._native.alloc(size)

    def read(self, addr: int, length: int) -> bytes:
        """Copies bytes out.

        Raises:
            ConfigError: they are not all inside.
        """
        return bytes(self._native.read(addr, length))

    def write(self, addr: int, data: bytes) -> None:
        """Copies bytes in: buffers, or the rings themselves, to see what the other side makes of it.

        Raises:
            ConfigError: they would not all be inside; nothing was written.
        """
        self._native.write(addr, bytes(data))

    def __repr__(self) -> str:
        """Where it is."""
        return f"<GuestMemory {self.start:#x} to {self.start + self.size:#x}>"


class DriverQueue:
    """The driver's side of a virtqueue; made by :func:`queue_pair`. Spec: virtio 1.4, 2.7 and 2.8."""

    def __init__(self, native: _virtnet.DriverQueue) -> None:
        """Wraps the compiled queue."""
        self._native = native

    @property
    def free(self) -> int:
        """Descriptors that are free."""
        return self._native.free

    @property
    def areas(self) -> tuple[int, int, int]:
        """Addresses of the Descriptor Area, the Driver Area and the Device Area."""
        desc, driver, device = self._native.areas
        return desc, driver, device

    def add(self, readable: Iterable[tuple[int, int]] = (), writable: Iterable[tuple[int, int]] = ()) -> int | None:
        """Makes one chain available; the device sees it after :meth:`publish`.

        Args:
            readable: address and length of each buffer that the device reads.
            writable: and of each that it writes; they come behind.

        Returns:
            The chain's id, or ``None`` when there are not enough free descriptors.

        Raises:
            ConfigError: there is no buffer at all. Addresses are not checked: that is for the device to do.
        """
        return self._native.add(list(readable), list(writable))

    def publish(self) -> bool:
        """Lets the device see everything added; whether it is to be kicked."""
        return self._native.publish()

    def reap(self, max_chains: int = 64) -> list[Used]:
        """Takes back what the device has returned.

        Raises:
            GuestError: the device returned what it does not hold, or more than fits.
        """
        return [Used(*used) for used in self._native.reap(max_chains)]

    def arm(self) -> bool:
        """Asks for a call with the next chain returned; whether some have been returned already."""
        return self._native.arm()

    def disarm(self) -> None:
        """Says that calls are not needed."""
        self._native.disarm()

    def __repr__(self) -> str:
        """How much is free."""
        return f"<DriverQueue {self.free} descriptors free>"


class DeviceQueue:
    """The device's side of a virtqueue; made by :func:`queue_pair`. Spec: virtio 1.4, 2.7 and 2.8."""

    def __init__(self, native: _virtnet.DeviceQueue) -> None:
        """Wraps the compiled queue."""
        self._native = native

    @property
    def areas(self) -> tuple[int, int, int]:
        """Addresses of the Descriptor Area, the Driver Area and the Device Area."""
        desc, driver, device = self._native.areas
        return desc, driver, device

    @property
    def base(self) -> int:
        """Where it stands, as vhost-user's GET_VRING_BASE tells it."""
        return self._native.base

    def take(self, max_chains: int = CHAINS_MAX, *, writable: bool = False) -> list[Chain]:
        """Takes chains that the driver has made available, 64 at most before they are given back.

        Args:
            max_chains: how many at most.
            writable: expect buffers that the device writes (a receiveq) instead of reads (a transmitq).

        Raises:
            GuestError: the driver broke the ring; it can only be made anew.
        """
        return [Chain(tuple(buffers), error) for buffers, error in self._native.take(max_chains, writable)]

    def give(self, lengths: Iterable[int] | None = None) -> None:
        """Gives all chains that were taken back as used, in order; the driver sees it after :meth:`publish`.

        Args:
            lengths: bytes written to each; nothing to any by default.

        Raises:
            StateError: there is not one length for each chain.
        """
        self._native.give([0] * self._native.taken if lengths is None else list(lengths))

    def publish(self) -> bool:
        """Lets the driver see everything given; whether it is to be called."""
        return self._native.publish()

    def arm(self) -> bool:
        """Asks for a kick with the next chain; whether chains are waiting already."""
        return self._native.arm()

    def disarm(self) -> None:
        """Says that kicks are not needed."""
        self._native.disarm()

    def __repr__(self) -> str:
        """What it holds."""
        return f"<DeviceQueue {self._native.taken} chains taken>"


def queue_pair(
    memory: GuestMemory,
    size: int = 256,
    ring: Literal["split", "packed"] = "split",
    features: RingFeature = RingFeature(0),
) -> tuple[DriverQueue, DeviceQueue]:
    """Lays out a queue in ``memory`` and gives both its sides.

    Args:
        memory: where rings and buffers lie.
        size: descriptors, 1 to 32768; a power of two for split rings.
        ring: the format.
        features: ``EVENT_IDX``, ``INDIRECT_DESC``, ``IN_ORDER``; the format's own bit is set by ``ring``.

    Raises:
        ConfigError: no such format or size, or too little memory left.
    """
    if ring not in {"split", "packed"}:
        raise ConfigError(f"a ring is split or packed, found {ring!r}")
    if not 1 <= size <= QUEUE_SIZE_MAX:
        raise ConfigError(f"a ring has 1 to {QUEUE_SIZE_MAX} descriptors, found {size}")
    driver, device = _virtnet.queue_pair(memory._native, size, ring, features.value)  # noqa: SLF001 - one module
    return DriverQueue(driver), DeviceQueue(device)
