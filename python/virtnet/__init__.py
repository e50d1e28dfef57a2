"""Virtual networks in Python at Rust speed.

Three doors, one engine; each lower door is what the upper one is made of::

    Net                       networks: describe, run, change while they run
    VhostUserPort, ...        ports: bursts by hand, packets as numpy columns
    GuestMemory, queue_pair   rings: memory and virtqueues, a descriptor at a time

Everything public is here. ``_virtnet`` is the compiled half and private.
"""

from virtnet._virtnet import __version__, build_info, line_cost_ns
from virtnet.burst import Burst, Columns, Frames, View
from virtnet.errors import ConfigError, GuestError, PeerError, PeerGone, PortError, StateError, VirtnetError
from virtnet.features import NetFeature, ProtocolFeature, RingFeature
from virtnet.net import Net
from virtnet.nodes import Function, Node, PortNode, QemuArgs
from virtnet.ports import MemoryPort, PcapPort, Port, TapPort, VhostUserPort, VirtioUserPort, memory_pair, open_port
from virtnet.probing import Offer, probe
from virtnet.rings import Chain, DeviceQueue, DriverQueue, GuestMemory, Used, queue_pair
from virtnet.spec import PortSpec
from virtnet.stats import Balance, FunctionStats, NetStats, PortStats, WorkerStats

__all__ = [
    "Balance",
    "Burst",
    "Chain",
    "Columns",
    "ConfigError",
    "DeviceQueue",
    "DriverQueue",
    "Frames",
    "Function",
    "FunctionStats",
    "GuestError",
    "GuestMemory",
    "MemoryPort",
    "Net",
    "NetFeature",
    "NetStats",
    "Node",
    "Offer",
    "PcapPort",
    "PeerError",
    "PeerGone",
    "Port",
    "PortError",
    "PortNode",
    "PortSpec",
    "PortStats",
    "ProtocolFeature",
    "QemuArgs",
    "RingFeature",
    "StateError",
    "TapPort",
    "Used",
    "VhostUserPort",
    "View",
    "VirtioUserPort",
    "VirtnetError",
    "WorkerStats",
    "__version__",
    "build_info",
    "line_cost_ns",
    "memory_pair",
    "open_port",
    "probe",
    "queue_pair",
]
