"""What a network is drawn with: nodes, cables between them, changes that belong together."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, cast

from virtnet.description import NAME_MAX, FunctionSpec, check_options, whole
from virtnet.errors import ConfigError
from virtnet.generating import Analyser, Generator
from virtnet.impairing import Impairment
from virtnet.kinds import FUNCTIONS
from virtnet.nodes import Firewall, Function, Node, PortNode, Router, Switch
from virtnet.observing import Observing
from virtnet.plans import PlannedNode, Plans, planned
from virtnet.spec import PortSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from virtnet.net import Net

__all__ = ["Drawing"]

#: What a program holds of functions that can be asked for more than others.
HANDLES: dict[str, type[Function]] = {
    "analyser": Analyser,
    "firewall": Firewall,
    "generator": Generator,
    "impairment": Impairment,
    "switch": Switch,
    "router": Router,
    "nat": Router,
    "load_balancer": Router,
}


def check_node(given: Any) -> None:
    """Refuses what is no node where one is asked for."""
    if not isinstance(given, Node):
        what = f" (net[{given!r}] is the one of that name, if there is one)" if isinstance(given, str) else ""
        raise ConfigError(f"expected a node of the network, found {given!r}{what}")


class Drawing(Observing):
    """Nodes by name and the cables between them."""

    def __init__(self) -> None:
        """Begins with nothing."""
        self._lock = threading.RLock()
        self._plan = Plans()
        self._before_change: Plans | None = None

    def _changed(self, before: Plans) -> None:
        """Makes what runs follow the description; what cannot be done raises, and then nothing has changed."""
        raise NotImplementedError

    def _cable_at(self, where: Node | tuple[Node, Node]) -> tuple[Node, Node]:
        """The ends of the cable that is meant."""
        for node in where if isinstance(where, tuple) else (where,):
            check_node(node)
        if isinstance(where, Node):
            others = self._plan.cables_of(self._known(where.name).handle.name)
            if len(others) != 1:
                raise ConfigError(
                    f"{where.name!r} has {len(others)} cables: say which one by the nodes at its ends, (a, b)"
                )
            return where, self[others[0]]
        a, b = where
        if b.name not in self._plan.cables_of(self._known(a.name).handle.name):
            raise ConfigError(f"there is no cable between {a.name!r} and {b.name!r}")
        return a, b

    def _take_out(self, function: Function) -> None:
        """Takes a function out of a cable, which is whole again."""
        gates = FUNCTIONS[function.kind].gates(function.spec.options)
        ends = [name for name in self._plan.cables_of(function.name) if gates.get(name, 0) < 2]  # noqa: PLR2004 - both
        self.remove(function)
        if len(ends) == 2:  # noqa: PLR2004 - the ends of a cable
            self.cable(self[ends[0]], self[ends[1]])

    def cable(self, a: Node, b: Node) -> None:
        """Plugs a cable between two nodes, as ``a >> b`` does. Between two ports it is a wire of its own.

        Raises:
            ConfigError: a node is of another network, or has no free end for a cable.
        """
        with self.change():
            for node in (a, b):
                check_node(node)
                if node.net is not self:
                    raise ConfigError(f"a cable joins nodes of one network, {node.name!r} belongs to another")
                self._known(node.name)
            if a.name == b.name:
                raise ConfigError(f"a cable joins two nodes, found {a.name!r} at both ends")
            if isinstance(a, PortNode) and isinstance(b, PortNode):
                wire = self._function(f"{a.name}-{b.name}", FunctionSpec("wire"))
                self.cable(a, wire)
                self.cable(b, wire)
                return
            if a.name in self._plan.cables_of(b.name):
                raise ConfigError(f"{a.name!r} and {b.name!r} are joined already")
            for node in (a, b):
                most, words = FUNCTIONS[node.kind].cables if isinstance(node, Function) else (1, "one")
                plugged = self._plan.cables_of(node.name)
                if len(plugged) >= most:
                    raise ConfigError(
                        f"a {node.kind} takes {words} cable{'s' if most > 1 else ''}, and {node.name!r} is joined to "
                        f"{' and '.join(map(repr, plugged))} already: put a switch between, or unplug it first"
                    )
            self._plan = replace(self._plan, cables=(*self._plan.cables, (a.name, b.name)))

    def unplug(self, a: Node, b: Node) -> None:
        """Takes the cable between two nodes away; between two ports, the wire that it is.

        Raises:
            ConfigError: there is none.
        """
        with self.change():
            ends = {a.name, b.name}
            if isinstance(a, PortNode) and isinstance(b, PortNode):
                between = set(self._plan.cables_of(a.name)) & set(self._plan.cables_of(b.name))
                wires = [name for name in between if self[name].kind == "wire"]
                for wire in wires:
                    self.remove(wire)
                if wires:
                    return
            cables = tuple(cable for cable in self._plan.cables if set(cable) != ends)
            if len(cables) == len(self._plan.cables):
                raise ConfigError(f"there is no cable between {a.name!r} and {b.name!r}")
            self._plan = replace(self._plan, cables=cables)

    def remove(self, node: Node | str) -> None:
        """Takes a node and its cables away; a port is closed. Its packets stay in the balance of :meth:`stats`.

        Raises:
            ConfigError: there is no such node.
        """
        name = node if isinstance(node, str) else node.name
        with self.change():
            self._known(name)
            nodes = {other: _forgetting(node, name) for other, node in self._plan.nodes.items() if other != name}
            cables = tuple(cable for cable in self._plan.cables if name not in cable)
            self._plan = replace(self._plan, nodes=nodes, cables=cables)

    @contextmanager
    def change(self) -> Iterator[Self]:
        """Makes what is done in the block one change: it takes effect at the end, whole or not at all.

        Raises:
            VirtnetError: it cannot be done; the network is and runs as before.
        """
        with self._lock:
            if self._before_change is not None:
                yield self  # part of a larger change
                return
            self._before_change = before = self._plan
            try:
                yield self
                followed = [capture.follow(self._plan) for capture in self._plan.captures]
                self._plan = replace(self._plan, captures=tuple(filter(None, followed)))
                if self._plan != before:
                    self._changed(before)
            except BaseException:
                self._plan = before
                raise
            finally:
                self._before_change = None
                for node in self._plan.nodes.values():
                    node.handle.spec = node.spec

    def __getitem__(self, name: str) -> Node:
        """The node of that name."""
        with self._lock:
            of_captures = self._plan.capture_nodes()
            return of_captures[name].handle if name in of_captures else self._known(name).handle

    def _name(self, given: str | None, base: str, besides: Sequence[str] = ()) -> str:
        """The name given, or one made from ``base`` that is free, and none of some others."""
        if given is not None:
            return given
        base = base[: NAME_MAX - 8]
        taken = {*self._plan.nodes, *self._plan.capture_nodes(), *besides}
        names = [base, *(f"{base}-{i}" for i in range(2, len(taken) + 3))]
        return next(name for name in names if name not in taken)

    def _function(self, name: str | None, spec: FunctionSpec) -> Function:
        spec = whole(spec)
        handle = self._handle(self._name(name, spec.kind), spec)
        self._add(planned(handle, spec))
        return cast("Function", handle)

    def _add(self, node: PlannedNode) -> None:
        name = node.handle.name
        with self.change():
            self._check_name(name)
            self._plan = replace(self._plan, nodes={**self._plan.nodes, name: node})

    def _check_name(self, name: str) -> None:
        if not name or len(name) > NAME_MAX or not name.isprintable():
            raise ConfigError(f"a name has 1 to {NAME_MAX} printable characters, found {name!r}")
        taken = (self._plan.nodes | self._plan.capture_nodes()).get(name)
        if taken is not None:
            raise ConfigError(f"the name {name!r} is taken by a {taken.handle.kind}: give another with name=")

    def _known(self, name: str) -> PlannedNode:
        if name not in self._plan.nodes:
            there = ", ".join(self._plan.nodes) or "nothing yet"
            raise ConfigError(f"there is no node {name!r} in the network: there is {there}")
        return self._plan.nodes[name]

    def _set(self, function: Function, options: Mapping[str, Any]) -> None:
        """Changes options of a function."""
        with self.change():
            node = self._known(function.name)
            spec = whole(FunctionSpec(function.kind, {**function.spec.options, **options}))
            check_options(spec)
            self._plan = replace(self._plan, nodes={**self._plan.nodes, function.name: planned(node.handle, spec)})
        function.spec = spec

    def _handle(self, name: str, spec: PortSpec | FunctionSpec) -> PortNode | Function:
        """What a program holds of a node."""
        net = cast("Net", self)
        if isinstance(spec, PortSpec):
            return PortNode(net, name, spec)
        return HANDLES.get(spec.kind, Function)(net, name, spec)


def _forgetting(node: PlannedNode, name: str) -> PlannedNode:
    """A node without what its options say of another one that goes."""
    if isinstance(node.spec, PortSpec) or not (option := FUNCTIONS[node.spec.kind].by_far_end):
        return node
    tables = node.spec.options[option]
    kept = {
        end: {option: value for option, value in table.items() if (option, value) != ("mirror", name)}
        for end, table in tables.items()
        if end != name
    }
    if kept == tables:
        return node
    return planned(node.handle, whole(FunctionSpec(node.spec.kind, {**node.spec.options, option: kept})))
