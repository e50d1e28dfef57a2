"""What a driver asks of its network device through the control queue.

::

    with VirtioUserPort("vm1.sock", control=True) as port:
        port.set_receive_mode("promiscuous", on=False)
        port.set_vlan(5)

The same methods are those of a port of a network: ``net["vm1"].device.set_vlan(5)``.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from virtnet.errors import ConfigError
from virtnet.features import HashType

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from virtnet.features import NetFeature
    from virtnet.spec import PortSpec
    from virtnet.stats import DeviceStats, PortStats

__all__ = ["DeviceCommands", "ReceiveMode"]

#: Ways of receiving, in the order of their numbers in the specification.
ReceiveMode = Literal["promiscuous", "all_multicast", "all_unicast", "no_multicast", "no_unicast", "no_broadcast"]
_RECEIVE_MODES: tuple[ReceiveMode, ...] = (
    "promiscuous",
    "all_multicast",
    "all_unicast",
    "no_multicast",
    "no_unicast",
    "no_broadcast",
)


class DeviceCommands(ABC):
    """What can be asked of the device at the other end of a virtio-user port that was opened with ``control=True``.

    What is asked for holds as long as the session. Every method waits for the device's answer, and raises:

    * ``StateError``: nobody is at the other end, there is no control queue, or the device does not know the command;
    * ``PeerError``: the device refuses, and has changed nothing, or does not answer within two seconds;
    * ``ConfigError``: a value can not be.

    Spec: virtio 1.4, 5.1.9.5, Control Virtqueue.
    """

    spec: PortSpec

    @abstractmethod
    def stats(self) -> PortStats:
        """What has passed the port so far."""

    @abstractmethod
    def _command(self, name: str, **arguments: Any) -> None:
        """Has a command carried out."""

    @abstractmethod
    def _ask_stats(self, asked: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
        """Asks for statistics of queues."""

    @abstractmethod
    def _device_state(self, state: bytes | None) -> bytes:
        """Loads a state, or saves it."""

    @property
    def _pairs(self) -> int:
        return int(self.spec.options["queue_pairs"])

    def set_receive_mode(self, mode: ReceiveMode, on: bool = True) -> None:
        """Switches a way of receiving. In the beginning a device is ``"promiscuous"``: it hands over everything.

        Args:
            mode: ``promiscuous``, ``all_multicast``, ``all_unicast``, ``no_multicast``, ``no_unicast`` or
                ``no_broadcast``. What is switched off by a ``no_`` beats what is switched on by an ``all_``.
            on: on or off.
        """
        if mode not in _RECEIVE_MODES:
            raise ConfigError(f"a receive mode is one of {', '.join(_RECEIVE_MODES)}, found {mode!r}")
        self._command("receive_mode", mode=_RECEIVE_MODES.index(mode), on=on)

    def set_mac(self, mac: str) -> None:
        """Gives the device another address: unless it is promiscuous, what is sent to others is not received."""
        self._command("mac", mac=_mac(mac))

    def set_mac_table(self, unicast: Iterable[str] = (), multicast: Iterable[str] = ()) -> None:
        """Receives what is sent to these addresses too, instead of those that were set before."""
        self._command("mac_table", unicast=[_mac(mac) for mac in unicast], multicast=[_mac(mac) for mac in multicast])

    def set_vlan(self, vlan: int, receive: bool = True) -> None:
        """Receives packets of a VLAN, 0 to 4095, or does not; in the beginning, unless promiscuous, of none."""
        self._command("vlan", vlan=_within("vlan", vlan, 0, 4095), receive=receive)

    def set_queue_pairs(self, n: int) -> None:
        """Uses the first ``n`` pairs of queues, of those that the port was opened with, and lets the device steer.

        A flow that comes in is received where the port sends of it. This ends what :meth:`set_rss` has begun.
        """
        self._command("queue_pairs", n=_within("n", n, 1, self._pairs))

    def set_rss(
        self,
        table: Sequence[int],
        *,
        types: HashType = HashType.ALL,
        key: bytes | None = None,
        unclassified: int = 0,
    ) -> bytes:
        """Has packets received where a table says, by the hash of their addresses and ports.

        Args:
            table: numbers of queue pairs from 0, a power of two of them: the low bits of the hash choose one.
            types: what to hash, the most that a packet has.
            key: at most 40 bytes; random ones if not given.
            unclassified: the pair of packets that have no hash.

        Returns:
            The key.

        Spec: virtio 1.4, 5.1.9.5.7, Receive-side scaling.
        """
        key = os.urandom(40) if key is None else bytes(key)
        pairs = self._pairs
        self._command(
            "rss",
            table=[_within("table", pair, 0, pairs - 1) for pair in table],
            types=types.value,
            key=key,
            unclassified=_within("unclassified", unclassified, 0, pairs - 1),
            transmitqs=max(1, self.stats().queue_pairs),
        )
        return key

    def set_hash(self, *, types: HashType = HashType.ALL, key: bytes | None = None) -> bytes:
        """Has hashes told (``hash_report=True``) that nothing else depends on; the key, random if not given."""
        key = os.urandom(40) if key is None else bytes(key)
        self._command("hash", types=types.value, key=key)
        return key

    def set_coalescing(self, *, receive: bool, max_packets: int, max_usecs: int, queue: int | None = None) -> None:
        """Has the device tell of buffers that it has used not each time, but of several at once.

        It tells when ``max_packets`` have passed since the last time, or ``max_usecs`` after it would have told,
        whatever comes first. With either of them 0, or one packet, it tells at once, as in the beginning.

        Args:
            receive: of receiveqs, or of transmitqs.
            max_packets: packets, 0 to 2³² - 1.
            max_usecs: microseconds, 0 to 2³² - 1.
            queue: the number of the pair whose queue is meant; all if not given.

        Spec: virtio 1.4, 5.1.9.5.9, Notifications Coalescing.
        """
        if queue is not None:
            queue = 2 * _within("queue", queue, 0, self._pairs - 1) + (not receive)
        self._command(
            "coalescing",
            receive=receive,
            max_packets=_within("max_packets", max_packets, 0, 2**32 - 1),
            max_usecs=_within("max_usecs", max_usecs, 0, 2**32 - 1),
            queue=queue,
        )

    def set_offloads(self, offloads: NetFeature) -> None:
        """Takes only these of the offloads that were negotiated: ``GUEST_CSUM``, ``GUEST_TSO4``, ..."""
        self._command("offloads", offloads=offloads.value)

    def save_state(self) -> bytes:
        """What the device has to know beside rings, memory and features: what was asked of it, in a form of its own.

        The back-end must offer DEVICE_STATE; a control queue is not needed. Its rings stand still meanwhile, and go on
        where they stopped; nothing in them is lost.

        Raises:
            StateError: nobody is at the other end, or it does not offer DEVICE_STATE.
            PeerError: it refuses, or does not come to an end within ten seconds.

        Spec: vhost-user, Migrating back-end state.
        """
        return self._device_state(None)

    def load_state(self, state: bytes) -> None:
        """Has the device go on with a state that was saved, of this device or of another one like it.

        Args:
            state: what :meth:`save_state` has returned, 65536 bytes at most. The features have to be the same.

        Raises:
            StateError: as of :meth:`save_state`; it is too long.
            PeerError: the back-end refuses it: it is no state of such a device, or it was saved under other features.
        """
        self._device_state(bytes(state))

    def device_stats(self) -> DeviceStats:
        """What the device has counted at each of its queues."""
        from virtnet.stats import DeviceStats, QueueStats

        pairs = self._pairs
        kinds = [(2 * pair, 1 << 0) for pair in range(pairs)] + [(2 * pair + 1, 1 << 16) for pair in range(pairs)]
        answers = self._ask_stats(kinds)
        queues = {queue: QueueStats(*counts) for queue, counts in answers}
        return DeviceStats(
            tuple(queues[2 * pair] for pair in range(pairs)),
            tuple(queues[2 * pair + 1] for pair in range(pairs)),
        )


def _mac(text: str) -> bytes:
    """The six bytes of an address."""
    if not re.fullmatch("[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text):
        raise ConfigError(f"a MAC address such as 02:00:00:00:00:01 was expected, found {text!r}")
    return bytes.fromhex(text.replace(":", ""))


def _within(name: str, value: int, low: int, high: int) -> int:
    """A number in its range."""
    if not low <= value <= high:
        raise ConfigError(f"{name} is a number from {low} to {high} here, found {value!r}")
    return value
