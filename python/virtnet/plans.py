"""A network's description, immutable: what a change starts from and what it makes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from virtnet import _virtnet
from virtnet.kinds import FUNCTIONS
from virtnet.nodes import Function, PortNode
from virtnet.ports import MemoryPort
from virtnet.spec import PortSpec

if TYPE_CHECKING:
    from virtnet.capturing import PlannedCapture, PlannedPlace
    from virtnet.description import FunctionSpec

__all__ = ["PlannedNode", "Plans", "planned"]


@dataclass(frozen=True)
class PlannedNode:
    """One node of the description, and what a program holds of it."""

    handle: PortNode | Function
    spec: PortSpec | FunctionSpec
    #: As the engine takes them.
    options: dict[str, Any]
    #: Of a memory port, the other end.
    end: MemoryPort | None = None
    #: What the engine calls it, if not as its handle does.
    kind: str | None = None


@dataclass(frozen=True)
class Plans:
    """A network's description: immutable, so that a change that fails leaves it as it was."""

    nodes: dict[str, PlannedNode] = field(default_factory=dict)
    cables: tuple[tuple[str, str], ...] = ()
    #: What stands in cables besides, in the order in which it came.
    captures: tuple[PlannedCapture, ...] = ()

    def waits(self, name: str) -> bool:
        """Whether a node is left out until it is plugged in: a capture would be over before anybody hears it."""
        node = self.nodes[name]
        return node.handle.kind == "pcap" and node.options["mode"] == "read" and not self.cables_of(name)

    def cables_of(self, name: str) -> list[str]:
        """Who is at the other ends of a node's cables."""
        return [b if a == name else a for a, b in self.cables if name in {a, b}]

    def without(self, names: set[str]) -> Plans:
        """The same without some nodes and their cables."""
        nodes = {name: node for name, node in self.nodes.items() if name not in names}
        return Plans(nodes, tuple(cable for cable in self.cables if names.isdisjoint(cable)), self.captures)

    def capture_nodes(self) -> dict[str, PlannedNode]:
        """The ports and functions that captures are made of, by name."""
        nodes = [node for capture in self.captures for node in (capture.file, *(place.tee for place in capture.places))]
        return {node.handle.name: node for node in nodes}

    def described(self) -> tuple[list[tuple[str, str, dict[str, Any]]], tuple[tuple[str, str], ...]]:
        """Nodes and cables as the engine takes them."""
        woven, instead, sides = self._with_captures()
        nodes = []
        for name, node in woven.nodes.items():
            if woven.waits(name):
                continue
            options = woven._options(name) | woven._ends(node)  # noqa: SLF001 - another one of these
            if "gates" in options:
                gates = {instead.get((name, end), end): gate for end, gate in options["gates"].items()}
                options = options | {"gates": gates | sides.get(name, {})}
            nodes.append((name, node.kind or node.handle.kind, options))
        return nodes, woven.cables

    def _with_captures(self) -> tuple[Plans, dict[tuple[str, str], str], dict[str, dict[str, int]]]:
        """With the captures where they stand.

        Besides, who is plugged into a node instead of another one therefore; and the gates of tees by who is on either
        side of them.
        """
        cables = list(self.cables)
        instead: dict[tuple[str, str], str] = {}
        sides: dict[str, dict[str, int]] = {}
        numbers = {frozenset(cable): number for number, cable in enumerate(self.cables)}
        standing: dict[int, list[PlannedPlace]] = {}
        for capture in self.captures:
            for place in capture.places:
                cables.append((capture.file.handle.name, place.tee.handle.name))
                number = numbers.get(frozenset(place.ends))
                if number is not None:  # otherwise its cable is away for the moment
                    standing.setdefault(number, []).append(place)
        for number, places in standing.items():
            left, right = self.cables[number]
            chain = [left, *(place.tee.handle.name for place in places), right]
            cables[number], *pieces = pairwise(chain)
            cables += pieces
            instead[left, right], instead[right, left] = chain[1], chain[-2]
            for place, before, after in zip(places, chain, chain[2:], strict=False):
                first, second = (before, after) if place.ends[0] == left else (after, before)
                # The first gate of a tee is on the side that is outside.
                sides[place.tee.handle.name] = {first: 0, second: 1}
        return Plans(self.nodes | self.capture_nodes(), tuple(cables)), instead, sides

    def _ends(self, node: PlannedNode) -> dict[str, Any]:
        """Python's ends of the ports at a divert's branches, which it asks how much waits there."""
        if node.handle.kind != "divert":
            return {}
        ports = [self.nodes.get(node.options[branch]) for branch in ("forth", "back")]
        return {"ends": [port.end.native if port and port.end else None for port in ports]}

    def _options(self, name: str) -> dict[str, Any]:
        """A node's options, its tables for cables named after who is plugged in."""
        options = self.nodes[name].options
        if self.nodes[name].handle.kind == "firewall":
            return options | {"gates": self._gates(name, options["gates"])}
        tables = options.get("cables")
        if tables is None:
            return options
        named: dict[str, str] = {}
        plugged = {}
        for end in self._neighbours.get(name, ()):
            found = next((far for far in self._far_ends(name, end) if far in tables), end)
            named[found] = end
            plugged[end] = tables.get(found)
        for end, table in plugged.items():
            if isinstance(table, dict) and table["mirror"] is not None:
                # It begins when that is plugged in.
                plugged[end] = table | {"mirror": named.get(table["mirror"])}
        return options | {"cables": plugged}

    def _gates(self, name: str, gates: dict[str, int]) -> dict[str, int]:
        """Gates by who is plugged in there, not by who is past that."""
        found = {}
        for end in self._neighbours.get(name, ()):
            far = next((far for far in self._far_ends(name, end) if far in gates), None)
            if far is not None:
                found[end] = gates[far]
        return found

    @functools.cached_property
    def _neighbours(self) -> dict[str, list[str]]:
        neighbours: dict[str, list[str]] = {}
        for a, b in self.cables:
            neighbours.setdefault(a, []).append(b)
            neighbours.setdefault(b, []).append(a)
        return neighbours

    def _far_ends(self, name: str, end: str) -> list[str]:
        """Who is at the end of a cable, and past everything that stands in it."""
        ends = [end]
        before = name
        while (node := self.nodes[ends[-1]]).handle.kind in FUNCTIONS and FUNCTIONS[node.handle.kind].stands_in_cables:
            kind, at = FUNCTIONS[node.handle.kind], ends[-1]
            aside = {before, *(other for other, gate in kind.gates(node.spec.options).items() if gate > 1)}
            on = [other for other in self._neighbours.get(at, ()) if other not in aside]
            if len(on) != 1 or on[0] in ends:
                break
            before = at
            ends.append(on[0])
        return ends


def planned(handle: PortNode | Function, spec: PortSpec | FunctionSpec) -> PlannedNode:
    """A node of a description, with what the engine needs to make it."""
    if isinstance(spec, PortSpec):
        options = {**spec.options, "where": spec.where}
        if spec.kind != "memory":
            return PlannedNode(handle, spec, options)
        inner, outer = _virtnet.memory_pair(spec.options["capacity"])
        end = MemoryPort(spec, outer)
        if isinstance(handle, PortNode) and handle.end is None:
            handle.end = end
        return PlannedNode(handle, spec, options | {"port": inner}, end)
    return PlannedNode(handle, spec, FUNCTIONS[spec.kind].for_engine(spec.options))
