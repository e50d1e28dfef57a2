"""What a vhost-user back-end offers, asked as a front-end would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from virtnet import _virtnet
from virtnet.errors import ConfigError
from virtnet.features import NetFeature, ProtocolFeature, RingFeature
from virtnet.spec import PortSpec

if TYPE_CHECKING:
    import os

__all__ = ["Offer", "probe"]


@dataclass(frozen=True, slots=True)
class Offer:
    """What a back-end offers.

    Attributes:
        features: the word of features, before negotiation.
        protocol_features: the word of vhost-user's own features, ``None`` when it has none.
        queue_pairs: how many pairs of queues it takes, ``None`` when it does not tell.
        memory_slots: how many regions of memory it takes, ``None`` when it does not tell.
        config: the beginning of its configuration space, ``None`` when it does not tell.
        status: the device status, ``None`` when it does not tell.
    """

    features: int
    protocol_features: int | None = None
    queue_pairs: int | None = None
    memory_slots: int | None = None
    config: bytes | None = None
    status: int | None = None

    @property
    def net_features(self) -> NetFeature:
        """The features of the network device."""
        return NetFeature.within(self.features)

    @property
    def ring_features(self) -> RingFeature:
        """The features of rings and transport."""
        return RingFeature.within(self.features)

    @property
    def protocol(self) -> ProtocolFeature:
        """The features of the vhost-user protocol."""
        return ProtocolFeature(self.protocol_features or 0)

    @property
    def config_space(self) -> dict[str, int | str]:
        """The fields of the configuration space that exist with the features offered. Spec: virtio 1.4, 5.1.4."""
        if self.config is None:
            return {}
        space, net = self.config.ljust(24, b"\0"), self.net_features
        pairs = NetFeature.MQ | NetFeature.RSS
        hashes = NetFeature.RSS | NetFeature.HASH_REPORT

        def number(at: int, size: int) -> int:
            return int.from_bytes(space[at : at + size], "little")

        fields: dict[str, tuple[NetFeature, int | str]] = {
            "mac": (NetFeature.MAC, space[:6].hex(":")),
            "status": (NetFeature.STATUS, number(6, 2)),
            "max_virtqueue_pairs": (pairs, number(8, 2)),
            "mtu": (NetFeature.MTU, number(10, 2)),
            "speed": (NetFeature.SPEED_DUPLEX, number(12, 4)),
            "duplex": (NetFeature.SPEED_DUPLEX, number(16, 1)),
            "rss_max_key_size": (hashes, number(17, 1)),
            "rss_max_indirection_table_length": (NetFeature.RSS, number(18, 2)),
            "supported_hash_types": (hashes, number(20, 4)),
        }
        return {name: value for name, (needs, value) in fields.items() if net & needs}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; features by name."""
        return {
            "features": [*self.net_features.names(), *self.ring_features.names()],
            "features_word": self.features,
            "protocol_features": self.protocol.names(),
            "protocol_features_word": self.protocol_features,
            "queue_pairs": self.queue_pairs,
            "memory_slots": self.memory_slots,
            "config": None if self.config is None else self.config_space,
            "status": self.status,
        }


def probe(path: str | os.PathLike[str], *, timeout_s: float = 5.0) -> Offer:
    """Attaches to a back-end's socket, asks what it offers, and leaves without starting a ring.

    A back-end that serves one front-end at a time takes this for one that came and went.

    Args:
        path: the socket on which the back-end listens.
        timeout_s: how long to wait for its answers.

    Raises:
        PortError: nobody listens there.
        PeerError: it answered something else than vhost-user, or not in time.
    """
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s is a number of seconds above 0, found {timeout_s!r}")
    spec = PortSpec.of("virtio-user", str(path))
    return Offer(**_virtnet.probe(spec.where, timeout_s))
