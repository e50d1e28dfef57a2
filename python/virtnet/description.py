"""A network as a value: what there is to be, written down, compared, and read from a file.

A :class:`Spec` says which ports, functions and cables a network has. It is made by hand, taken from a
:class:`~virtnet.Net` (``net.spec``), or read from TOML::

    [net]
    poll = "adaptive"

    [ports.vm1]
    kind = "vhost-user"
    where = "vm1.sock"
    queue_pairs = 2

    [ports.uplink]
    port = "tap:uplink0"              # the same as the command line takes it

    [functions.sw]
    kind = "switch"
    ageing_s = 300

    cables = [["vm1", "sw"], ["sw", "uplink"]]   # above the first table

:func:`schema` is the file's JSON Schema. What does not fit is refused with its place, such as
``ports.vm1.queue_pairs``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from virtnet.errors import ConfigError
from virtnet.kinds import FUNCTIONS
from virtnet.spec import KINDS, PortSpec, meant

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from jsonschema.exceptions import ValidationError

    from virtnet.options import Option

__all__ = ["FunctionSpec", "Plan", "Spec", "schema"]

Poll = Literal["adaptive", "busy", "interrupt"]

#: Names need to be told apart in tables and texts.
NAME_MAX = 64


@dataclass(frozen=True)
class FunctionSpec:
    """What a function is to be.

    Attributes:
        kind: ``switch``, ``wire``, ``tee``, ``sink``, ``source``, ``firewall``, ``router``, ``nat`` and others.
        options: as the method of :class:`~virtnet.Net` of that name takes them.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        """By its text."""
        return hash(str(self))

    def __str__(self) -> str:
        """Its kind, and what is not default."""
        options = ",".join(f"{name}={value}" for name, value in sorted(self.chosen().items()))
        return f"{self.kind}:{options}" if options else self.kind

    def chosen(self) -> dict[str, Any]:
        """The options that are not default."""
        defaults = FUNCTIONS[self.kind].options
        return {name: value for name, value in self.options.items() if value != defaults[name][1]}


@dataclass(frozen=True)
class Spec:
    """A network as a value. Equal networks are equal, whatever the order in which they were written down.

    Attributes:
        ports: what each port is to be, by name.
        functions: what each function is to be, by name.
        cables: pairs of names. Between two ports a cable is a wire of its own, ``a-b``.
        cpus: processors of the workers, as for :class:`~virtnet.Net`.
        poll: as for :class:`~virtnet.Net`.

    Raises:
        ConfigError: something does not fit together; the message begins with its place.

    Example:
        >>> import virtnet as vn
        >>> spec = vn.Spec.from_toml('''
        ... cables = [["vm1", "sw"], ["vm2", "sw"]]
        ... ports.vm1.port = "vhost-user:vm1.sock"
        ... ports.vm2.port = "vhost-user:vm2.sock"
        ... functions.sw.kind = "switch"
        ... ''')
        >>> sorted(spec.ports), spec.functions["sw"].options["ageing_s"]
        (['vm1', 'vm2'], 300.0)
    """

    ports: Mapping[str, PortSpec] = field(default_factory=dict)
    functions: Mapping[str, FunctionSpec] = field(default_factory=dict)
    cables: frozenset[tuple[str, str]] = frozenset()
    cpus: tuple[int, ...] = ()
    poll: Poll = "adaptive"

    def __post_init__(self) -> None:
        """Puts it into the form in which it is compared, and checks what its parts are to each other."""
        ports, functions = dict(self.ports), {name: _whole(name, spec) for name, spec in self.functions.items()}
        for name in (*ports, *functions):
            if not name or len(name) > NAME_MAX or not name.isprintable():
                raise ConfigError(f"a name has 1 to {NAME_MAX} printable characters, found {name!r}")
        for name in ports.keys() & functions.keys():
            raise ConfigError(f"functions.{name}: a port has that name already")
        cables = set()
        for a, b in self.cables:
            _check_ends(a, b, ports | functions)
            if a in ports and b in ports:
                wire = "-".join(sorted((a, b)))
                functions.setdefault(wire, FunctionSpec("wire"))
                cables |= {(min(a, wire), max(a, wire)), (min(b, wire), max(b, wire))}
            else:
                cables.add((min(a, b), max(a, b)))
        _check_room(ports, functions, cables)
        _check_named(functions, ports | functions)
        object.__setattr__(self, "ports", MappingProxyType(ports))
        object.__setattr__(self, "functions", MappingProxyType(functions))
        object.__setattr__(self, "cables", frozenset(cables))
        object.__setattr__(self, "cpus", tuple(self.cpus))

    def __hash__(self) -> int:
        """Equal networks have the same."""
        return hash((frozenset(self.ports.items()), frozenset(self.functions.items()), self.cables))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Spec:
        """Reads the form that TOML and JSON files have.

        Raises:
            ConfigError: it does not fit the schema, or not together; the message begins with the place.
        """
        _validate(document)
        ports = {}
        for name, table in document.get("ports", {}).items():
            options = dict(table)
            try:
                if "port" in options:
                    ports[name] = PortSpec.parse(options["port"])
                else:
                    ports[name] = PortSpec.of(options.pop("kind"), options.pop("where"), **options)
            except ConfigError as error:
                raise ConfigError(f"ports.{name}: {error}") from None
        functions = {}
        for name, table in document.get("functions", {}).items():
            options = dict(table)
            functions[name] = FunctionSpec(options.pop("kind"), options)
        cables = frozenset((a, b) for a, b in document.get("cables", ()))
        net = document.get("net", {})
        return cls(ports, functions, cables, tuple(net.get("cpus", ())), net.get("poll", "adaptive"))

    @classmethod
    def from_toml(cls, text: str) -> Spec:
        """Reads TOML.

        Raises:
            ConfigError: it is no TOML, or as for :meth:`from_dict`.
        """
        import tomllib

        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"this is no TOML: {error}") from None
        return cls.from_dict(document)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Spec:
        """Reads a TOML file.

        Raises:
            ConfigError: it cannot be read, or as for :meth:`from_toml`.
        """
        try:
            return cls.from_toml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The form that files have; what is default is left out. :meth:`from_dict` reads it."""
        document: dict[str, Any] = {"cables": [list(cable) for cable in sorted(self.cables)]}
        net = {"cpus": list(self.cpus)} if self.cpus else {}
        document["net"] = net | ({"poll": self.poll} if self.poll != "adaptive" else {})
        document["ports"] = {name: {"port": str(spec)} for name, spec in self.ports.items()}
        document["functions"] = {name: {"kind": spec.kind} | spec.chosen() for name, spec in self.functions.items()}
        return {key: value for key, value in document.items() if value}

    def to_toml(self) -> str:
        """The same as TOML."""
        document = self.to_dict()
        lines = [f"{key} = {_toml(value)}" for key, value in document.items() if key == "cables"]
        if net := document.get("net"):
            lines += ["", "[net]", *(f"{key} = {_toml(value)}" for key, value in net.items())]
        for group in ("ports", "functions"):
            for name, table in document.get(group, {}).items():
                lines += ["", f"[{group}.{_key(name)}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
        return "\n".join(lines).strip() + "\n"

    def neighbours(self, name: str) -> list[str]:
        """Who is at the other ends of a node's cables, in order."""
        return sorted(b if a == name else a for a, b in self.cables if name in {a, b})


@dataclass(frozen=True)
class Plan:
    """What a change does. It is false if that is nothing, and its text has a line for each thing.

    Attributes:
        before, after: the network before and after.
        added: nodes that are new.
        removed: nodes that go.
        changed: functions that take new options and keep their state.
        restarted: nodes that are closed and made anew: their sessions and tables are lost.
        plugged, unplugged: cables.
        touched: ports of both networks whose packets are held up, dropped or sent elsewhere for a moment; no other
            port loses one.

    Example:
        >>> import virtnet as vn
        >>> net = vn.Net()
        >>> _ = net.memory("a") >> net.switch(name="sw")
        >>> faster = vn.FunctionSpec("switch", {"ageing_s": 5})
        >>> print(net.plan(vn.Spec(net.spec.ports, {"sw": faster}, net.spec.cables)))
        ~ sw: switch becomes switch:ageing_s=5.0
    """

    before: Spec
    after: Spec

    @property
    def added(self) -> tuple[str, ...]:
        """Nodes that are new."""
        return _only(self._nodes(self.after), self._nodes(self.before))

    @property
    def removed(self) -> tuple[str, ...]:
        """Nodes that go."""
        return _only(self._nodes(self.before), self._nodes(self.after))

    @property
    def changed(self) -> tuple[str, ...]:
        """Functions that take new options and keep their state."""
        return tuple(name for name in self._other() if self._in_place(name))

    @property
    def restarted(self) -> tuple[str, ...]:
        """Nodes that are closed and made anew."""
        return tuple(name for name in self._other() if not self._in_place(name))

    @property
    def plugged(self) -> tuple[tuple[str, str], ...]:
        """Cables that are new."""
        return tuple(sorted(self.after.cables - self.before.cables))

    @property
    def unplugged(self) -> tuple[tuple[str, str], ...]:
        """Cables that go."""
        return tuple(sorted(self.before.cables - self.after.cables))

    @property
    def touched(self) -> tuple[str, ...]:
        """Ports of both networks whose packets are held up, dropped or sent elsewhere for a moment."""
        gone = {*self.removed, *self.restarted}
        ends = {end for cable in self.unplugged for end in cable}
        # A wire hands on to its other end what happens at one of its ends.
        wires = {name for name, spec in self.before.functions.items() if spec.kind == "wire"}
        ends |= {far for wire in wires & (ends | gone) for far in self.before.neighbours(wire)}
        ends |= {far for name in gone - set(self.before.ports) for far in self.before.neighbours(name)}
        ends |= {
            far for wire in wires if gone & set(self.before.neighbours(wire)) for far in self.before.neighbours(wire)
        }
        return tuple(sorted((ends | gone) & set(self.before.ports) & set(self.after.ports)))

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self.before != self.after

    def __str__(self) -> str:
        """A line for each thing that is done."""
        before, after = self._nodes(self.before), self._nodes(self.after)
        lines = [f"- {name}: {before[name]}" for name in self.removed]
        lines += [f"+ {name}: {after[name]}" for name in self.added]
        lines += [f"~ {name}: {before[name]} becomes {after[name]}" for name in self.changed]
        lines += [f"! {name}: {before[name]} is restarted as {after[name]}" for name in self.restarted]
        lines += [f"- cable {a} to {b}" for a, b in self.unplugged]
        lines += [f"+ cable {a} to {b}" for a, b in self.plugged]
        lines += [f"touches {', '.join(self.touched)}"] if self.touched else []
        return "\n".join(lines) or "nothing changes"

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        from virtnet.showing import text

        return text(self)

    @staticmethod
    def _nodes(spec: Spec) -> dict[str, PortSpec | FunctionSpec]:
        return {**spec.ports, **spec.functions}

    def _other(self) -> list[str]:
        before, after = self._nodes(self.before), self._nodes(self.after)
        return sorted(name for name in before.keys() & after.keys() if before[name] != after[name])

    def _in_place(self, name: str) -> bool:
        before, after = self._nodes(self.before)[name], self._nodes(self.after)[name]
        if not isinstance(before, FunctionSpec) or not isinstance(after, FunctionSpec) or before.kind != after.kind:
            return False
        differing = {key for key in before.options if before.options[key] != after.options.get(key)}
        return differing <= FUNCTIONS[before.kind].changeable


def _check_ends(a: str, b: str, known: Mapping[str, Any]) -> None:
    for end in (a, b):
        if end not in known:
            raise ConfigError(f"cables: {a!r} to {b!r}: there is no {end!r}{meant(end, known)}")
    if a == b:
        raise ConfigError(f"cables: a cable joins two nodes, found {a!r} at both ends")


def _check_room(ports: Iterable[str], functions: Mapping[str, FunctionSpec], cables: Iterable[tuple[str, str]]) -> None:
    """Checks that no node has more cables than it takes."""
    plugged: dict[str, list[str]] = {name: [] for name in (*ports, *functions)}
    for a, b in sorted(cables):
        plugged[a].append(b)
        plugged[b].append(a)
    for name, others in plugged.items():
        kind = functions[name].kind if name in functions else "port"
        most, words = FUNCTIONS[kind].cables if name in functions else (1, "one")
        if len(others) > most:
            raise ConfigError(
                f"cables: a {kind} takes {words} cable{'s' if most > 1 else ''}, and {name!r} is joined to "
                f"{' and '.join(map(repr, others))}: put a switch between"
            )


def _check_named(functions: Mapping[str, FunctionSpec], known: Mapping[str, Any]) -> None:
    """Checks that the far ends by which cables are named are there."""
    for name, spec in functions.items():
        option = FUNCTIONS[spec.kind].by_far_end
        for end, table in (spec.options[option] if option else {}).items():
            for place, wanted in (("", end), (".mirror", table.get("mirror", end))):
                if wanted not in known:
                    raise ConfigError(
                        f"functions.{name}.{option}.{end}{place}: there is no {wanted!r}{meant(wanted, known)}"
                    )


def schema() -> dict[str, Any]:
    """The JSON Schema of the form that :meth:`Spec.from_dict` reads, draft 2020-12."""
    name = {"type": "string", "minLength": 1, "maxLength": NAME_MAX}
    ports = {kind.name: {option.name: _option_schema(option) for option in kind.options} for kind in KINDS.values()}
    functions = {name: {key: one for key, (one, _) in kind.options.items()} for name, kind in FUNCTIONS.items()}
    where = {"where": {"type": "string", "minLength": 1}}
    needed = {kind.name: [option.name for option in kind.options if option.required] for kind in KINDS.values()}
    by_kind = [_of_kind(kind, where | options, ["kind", "where", *needed[kind]]) for kind, options in ports.items()]
    text = {
        "if": {"required": ["port"]},
        "then": {"properties": {"port": {"type": "string", "pattern": ":"}}, "additionalProperties": False},
        "else": {"required": ["kind"], "properties": {"kind": {"enum": list(KINDS)}}},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A virtnet network",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "net": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "cpus": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "poll": {"enum": ["adaptive", "busy", "interrupt"]},
                },
            },
            "ports": {
                "type": "object",
                "propertyNames": name,
                "additionalProperties": {"type": "object", **text, "allOf": by_kind},
            },
            "functions": {
                "type": "object",
                "propertyNames": name,
                "additionalProperties": {
                    "type": "object",
                    "required": ["kind"],
                    "properties": {"kind": {"enum": list(FUNCTIONS)}},
                    "allOf": [_of_kind(kind, options, ["kind"]) for kind, options in functions.items()],
                },
            },
            "cables": {
                "type": "array",
                "items": {"type": "array", "items": name, "minItems": 2, "maxItems": 2},
                "uniqueItems": True,
            },
        },
    }


def _of_kind(kind: str, options: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
        "then": {
            "properties": {"kind": {"const": kind}, **options},
            "required": required,
            "additionalProperties": False,
        },
    }


def _option_schema(option: Option) -> dict[str, Any]:
    """What an option takes in a file: values, where there is one, not their text."""
    described = {"description": option.expects, **option.schema}
    return described | ({"default": option.default} if option.default else {})


def _validate(document: Mapping[str, Any]) -> None:
    # Half as long to load as all of virtnet, and only files need it.
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema()).iter_errors(document))
    if error is None:
        return
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")
    expected = error.schema.get("description") if isinstance(error.schema, dict) else None
    message = f"expected {expected}, found {error.instance!r}" if expected else error.message
    raise ConfigError(f"{place}: {message}" if place else message)


def check_options(spec: FunctionSpec) -> None:
    """Checks the values of a function's options.

    Raises:
        ConfigError: one does not fit; the message names it.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    kind = FUNCTIONS[spec.kind]
    for name, value in spec.options.items():
        described, default = kind.options[name]
        if (
            name not in kind.checked
            and value != default
            and (error := best_match(Draft202012Validator(described).iter_errors(value)))
        ):
            raise ConfigError(f"{spec.kind} option {name}: {_told(error)}")


def _told(error: ValidationError) -> str:
    """What was expected where there were several forms to choose from; else what the error says by itself."""
    forms = error.schema.get("anyOf") if isinstance(error.schema, dict) else None
    return f"expected {', or '.join(map(_form, forms))}, found {error.instance!r}" if forms else error.message


def _form(schema: Mapping[str, Any]) -> str:
    """A form of values in words."""
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    bounds = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"))
    words = [f"{word} {schema[key]}" for key, word in bounds if key in schema]
    names = {"number": "a number", "integer": "a whole number", "string": "text", "array": "a list", "null": "None"}
    return " ".join([names.get(schema.get("type", ""), "another form"), *words])


def _whole(name: str, spec: FunctionSpec) -> FunctionSpec:
    try:
        return whole(spec)
    except ConfigError as error:
        raise ConfigError(f"functions.{name}.{error}" if re.match("[a-z_]+[.:]", str(error)) else str(error)) from None


def whole(spec: FunctionSpec) -> FunctionSpec:
    """With its defaults, and numbers as they are used."""
    if spec.kind not in FUNCTIONS:
        raise ConfigError(f"there is no function {spec.kind!r}{meant(spec.kind, FUNCTIONS)}")
    options = {name: default for name, (_, default) in FUNCTIONS[spec.kind].options.items()}
    for name, value in spec.options.items():
        if name not in options:
            raise ConfigError(f"a {spec.kind} has no option {name!r}{meant(name, options)}")
        is_number = FUNCTIONS[spec.kind].options[name][0].get("type") == "number"
        options[name] = float(value) if is_number and value is not None else value
    return FunctionSpec(spec.kind, MappingProxyType(FUNCTIONS[spec.kind].check(options)))


def _only(these: Iterable[str], not_those: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(sorted(name for name in these if name not in not_those))


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    """A value as TOML; there is no writer in the standard library, and this is all that is needed."""
    import json

    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A basic string of TOML is one of JSON.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(key)} = {_toml(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
