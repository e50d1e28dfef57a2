"""Virtual networks in Python at Rust speed.

Three doors, one engine; each lower door is what the upper one is made of::

    Net                       networks: describe, run, change while they run
    VhostUserPort, ...        ports: bursts by hand, packets as numpy columns
    GuestMemory, queue_pair   rings: memory and virtqueues, a descriptor at a time

Everything public is here. ``_virtnet`` is the compiled half and private.
"""

import importlib
from typing import TYPE_CHECKING, Any

from virtnet._virtnet import __version__, build_info, line_cost_ns

if TYPE_CHECKING:
    from virtnet.analysing import AnalyserReport, Latency, StreamReport
    from virtnet.burst import Burst, Columns, Frames, View
    from virtnet.capturing import Capture, ColumnsCapture
    from virtnet.checking import CheckReport, CheckResult, check_back_end
    from virtnet.description import FunctionSpec, Plan, Spec, schema
    from virtnet.elements import Element, Table, element
    from virtnet.errors import ConfigError, GuestError, PeerError, PeerGone, PortError, StateError, VirtnetError
    from virtnet.events import Event, Events
    from virtnet.explaining import Explanation
    from virtnet.features import HashType, NetFeature, ProtocolFeature, RingFeature
    from virtnet.feeding import IterablePort
    from virtnet.generating import Analyser, Generator
    from virtnet.handlers import BurstHandler
    from virtnet.impairing import Impairment, ImpairmentReport, LineReport
    from virtnet.net import Net
    from virtnet.nodes import Firewall, Function, Node, PortNode, QemuArgs, Router, Switch
    from virtnet.ports import (
        AfPacketPort,
        AfXdpPort,
        DgramPort,
        MemoryPort,
        PcapPort,
        Port,
        StreamPort,
        TapPort,
        UserNetPort,
        VhostUserPort,
        VirtioUserPort,
        VxlanPort,
        memory_pair,
        open_port,
    )
    from virtnet.probing import Offer, probe
    from virtnet.remote import AttachedCapture, AttachedColumns, AttachedNet, attach, networks
    from virtnet.rings import Chain, DeviceQueue, DriverQueue, GuestMemory, Used, queue_pair
    from virtnet.searching import Path, Throughput, Trial, throughput_search
    from virtnet.spec import PortSpec
    from virtnet.stats import (
        Balance,
        DeviceStats,
        FunctionStats,
        Lease,
        NetStats,
        PortStats,
        QueueStats,
        RingState,
        RuleStats,
        UserNetStats,
        WorkerStats,
    )
    from virtnet.streams import Counter, Random, Stream

__all__ = [
    "AfPacketPort",
    "AfXdpPort",
    "Analyser",
    "AnalyserReport",
    "AttachedCapture",
    "AttachedColumns",
    "AttachedNet",
    "Balance",
    "Burst",
    "BurstHandler",
    "Capture",
    "Chain",
    "CheckReport",
    "CheckResult",
    "Columns",
    "ColumnsCapture",
    "ConfigError",
    "Counter",
    "DeviceQueue",
    "DeviceStats",
    "DgramPort",
    "DriverQueue",
    "Element",
    "Event",
    "Events",
    "Explanation",
    "Firewall",
    "Frames",
    "Function",
    "FunctionSpec",
    "FunctionStats",
    "Generator",
    "GuestError",
    "GuestMemory",
    "HashType",
    "Impairment",
    "ImpairmentReport",
    "IterablePort",
    "Latency",
    "Lease",
    "LineReport",
    "MemoryPort",
    "Net",
    "NetFeature",
    "NetStats",
    "Node",
    "Offer",
    "Path",
    "PcapPort",
    "PeerError",
    "PeerGone",
    "Plan",
    "Port",
    "PortError",
    "PortNode",
    "PortSpec",
    "PortStats",
    "ProtocolFeature",
    "QemuArgs",
    "QueueStats",
    "Random",
    "RingFeature",
    "RingState",
    "Router",
    "RuleStats",
    "Spec",
    "StateError",
    "Stream",
    "StreamPort",
    "StreamReport",
    "Switch",
    "Table",
    "TapPort",
    "Throughput",
    "Trial",
    "Used",
    "UserNetPort",
    "UserNetStats",
    "VhostUserPort",
    "View",
    "VirtioUserPort",
    "VirtnetError",
    "VxlanPort",
    "WorkerStats",
    "__version__",
    "attach",
    "build_info",
    "check_back_end",
    "element",
    "line_cost_ns",
    "memory_pair",
    "networks",
    "open_port",
    "probe",
    "queue_pair",
    "schema",
    "throughput_search",
]

#: Where the public names are. A module is imported when one of its names is asked for, so that a command starts at once
#: and a network takes half the memory where nobody needs numpy.
_HOMES = {
    "analysing": ["AnalyserReport", "Latency", "StreamReport"],
    "burst": ["Burst", "Columns", "Frames", "View"],
    "capturing": ["Capture", "ColumnsCapture"],
    "checking": ["CheckReport", "CheckResult", "check_back_end"],
    "description": ["FunctionSpec", "Plan", "Spec", "schema"],
    "elements": ["Element", "Table", "element"],
    "errors": ["ConfigError", "GuestError", "PeerError", "PeerGone", "PortError", "StateError", "VirtnetError"],
    "events": ["Event", "Events"],
    "explaining": ["Explanation"],
    "features": ["HashType", "NetFeature", "ProtocolFeature", "RingFeature"],
    "feeding": ["IterablePort"],
    "generating": ["Analyser", "Generator"],
    "handlers": ["BurstHandler"],
    "impairing": ["Impairment", "ImpairmentReport", "LineReport"],
    "net": ["Net"],
    "nodes": ["Firewall", "Function", "Node", "PortNode", "QemuArgs", "Router", "Switch"],
    "ports": [
        "AfPacketPort",
        "AfXdpPort",
        "DgramPort",
        "MemoryPort",
        "PcapPort",
        "Port",
        "StreamPort",
        "TapPort",
        "UserNetPort",
        "VhostUserPort",
        "VirtioUserPort",
        "VxlanPort",
        "memory_pair",
        "open_port",
    ],
    "probing": ["Offer", "probe"],
    "remote": ["AttachedCapture", "AttachedColumns", "AttachedNet", "attach", "networks"],
    "rings": ["Chain", "DeviceQueue", "DriverQueue", "GuestMemory", "Used", "queue_pair"],
    "searching": ["Path", "Throughput", "Trial", "throughput_search"],
    "spec": ["PortSpec"],
    "stats": [
        "Balance",
        "DeviceStats",
        "FunctionStats",
        "Lease",
        "NetStats",
        "PortStats",
        "QueueStats",
        "RingState",
        "RuleStats",
        "UserNetStats",
        "WorkerStats",
    ],
    "streams": ["Counter", "Random", "Stream"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, from where it is."""
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(f"virtnet.{module}"), name))


def __dir__() -> list[str]:
    return __all__
