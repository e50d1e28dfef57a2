"""Feature bits of virtio and vhost-user as flags, by the names of the specifications.

The bits that a device and a driver negotiate are one word of 64 bits; :class:`NetFeature` names those of a network
device and :class:`RingFeature` those that belong to rings and transport. :class:`ProtocolFeature` is vhost-user's own
word, between front-end and back-end, which a guest never sees. Bits without a name are kept and shown as numbers.

Spec: virtio 1.4, 5.1.3, Feature bits; 6, Reserved Feature Bits; vhost-user, Protocol features.
"""

from __future__ import annotations

from enum import KEEP, Flag
from typing import Self

__all__ = ["HashType", "NetFeature", "ProtocolFeature", "RingFeature"]


class _Word(Flag, boundary=KEEP):
    """A set of bits of one 64-bit word."""

    def names(self) -> list[str]:
        """The bits by name in lower case, unknown ones as ``bit N``, in the order of the bits."""
        cls = type(self)
        named = {member.value: str(member.name).lower() for member in cls}
        bits = (1 << number for number in range(self.value.bit_length()))
        return [named.get(bit, f"bit {bit.bit_length() - 1}") for bit in bits if self.value & bit]

    @classmethod
    def within(cls, word: int) -> Self:
        """Those bits of ``word`` that have a name here."""
        return cls(word & sum(member.value for member in cls))


class NetFeature(_Word):
    """What a network device and its driver can agree on."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    CTRL_GUEST_OFFLOADS = 1 << 2
    MTU = 1 << 3
    MAC = 1 << 5
    GSO = 1 << 6
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_VLAN = 1 << 19
    CTRL_RX_EXTRA = 1 << 20
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23
    DEVICE_STATS = 1 << 50
    HASH_TUNNEL = 1 << 51
    VQ_NOTF_COAL = 1 << 52
    NOTF_COAL = 1 << 53
    GUEST_USO4 = 1 << 54
    GUEST_USO6 = 1 << 55
    HOST_USO = 1 << 56
    HASH_REPORT = 1 << 57
    GUEST_HDRLEN = 1 << 59
    RSS = 1 << 60
    RSC_EXT = 1 << 61
    STANDBY = 1 << 62
    SPEED_DUPLEX = 1 << 63


class HashType(_Word):
    """What of a packet a device can hash. Spec: virtio 1.4, 5.1.9.4.3.1, Supported/enabled hash types."""

    IPV4 = 1 << 0
    TCPV4 = 1 << 1
    UDPV4 = 1 << 2
    IPV6 = 1 << 3
    TCPV6 = 1 << 4
    UDPV6 = 1 << 5
    ALL = IPV4 | TCPV4 | UDPV4 | IPV6 | TCPV6 | UDPV6


class RingFeature(_Word):
    """What rings and transport can agree on, whatever the device is."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40
    ADMIN_VQ = 1 << 41
    SUSPEND = 1 << 43


class ProtocolFeature(_Word):
    """What a vhost-user front-end and back-end can agree on."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23
