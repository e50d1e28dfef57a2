"""Whether a vhost-user back-end keeps the rules: each demand of the specifications tried out in a session of its own.

::

    report = vn.check_back_end("vhost.sock")
    print(report)
    assert report.ok, report.failed
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from virtnet import _virtnet
from virtnet.errors import ConfigError
from virtnet.spec import PortSpec

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

__all__ = ["CheckReport", "CheckResult", "check_back_end"]

#: A mark for each outcome.
MARKS = {"passed": "✓", "failed": "✗", "not applicable": "·"}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check has found.

    Attributes:
        id: the check's name.
        demand: what is demanded of a back-end.
        source: the specification and the section that demands it.
        level: ``must``, or ``should`` where a specification only recommends it.
        hostile: whether the check sends what no correct front-end or driver sends.
        outcome: ``passed``, ``failed``, or ``not applicable`` where the back-end does not offer it.
        found: what was seen, or why there was nothing to see.
        seconds: how long it took.
    """

    id: str
    demand: str
    source: str
    level: Literal["must", "should"]
    hostile: bool
    outcome: Literal["passed", "failed", "not applicable"]
    found: str
    seconds: float

    def __str__(self) -> str:
        """The outcome in a line, with what was expected and found where it failed."""
        if self.outcome != "failed":
            return f"{MARKS[self.outcome]} {self.id}: {self.found}"
        return f"✗ {self.id}: expected: {self.demand} ({self.level}; {self.source}); found: {self.found}"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What all checks have found.

    Attributes:
        path: the socket of the back-end.
        results: one for each check, in the order in which they ran.
    """

    path: str
    results: tuple[CheckResult, ...]

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        """What a back-end must do and this one does not."""
        return tuple(one for one in self.results if one.outcome == "failed" and one.level == "must")

    @property
    def warned(self) -> tuple[CheckResult, ...]:
        """What a back-end should do and this one does not."""
        return tuple(one for one in self.results if one.outcome == "failed" and one.level == "should")

    @property
    def ok(self) -> bool:
        """Whether nothing that a back-end must do has failed."""
        return not self.failed

    def count(self, outcome: str) -> int:
        """How many checks ended so."""
        return sum(one.outcome == outcome for one in self.results)

    def summary(self) -> str:
        """How many passed, failed and did not apply, in a sentence."""
        warned = f", {len(self.warned)} of what it should do" if self.warned else ""
        return (
            f"{self.path}: {self.count('passed')} passed, {len(self.failed)} failed{warned}, "
            f"{self.count('not applicable')} not applicable"
        )

    def __str__(self) -> str:
        """The summary and a line for each check."""
        return "\n".join([self.summary(), *map(str, self.results)])

    def _repr_html_(self) -> str:
        """The same as a table for notebooks."""
        from virtnet.showing import escape, table

        rows = [(MARKS[one.outcome], one.id, one.demand, one.found, one.source) for one in self.results]
        return f"<p><b>{escape(self.summary())}</b></p>{table(['', 'check', 'expected', 'found', 'source'], rows)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "socket": self.path,
            "ok": self.ok,
            "passed": self.count("passed"),
            "failed": len(self.failed),
            "warned": len(self.warned),
            "not_applicable": self.count("not applicable"),
            "checks": [asdict(one) for one in self.results],
        }


def check_back_end(
    path: str | os.PathLike[str],
    *,
    timeout_s: float = 3.0,
    only: Iterable[str] = (),
    hostile: bool = True,
    each: Callable[[CheckResult], object] | None = None,
) -> CheckReport:
    """Tries out whether a vhost-user back-end does what the specifications demand.

    Every check is a session or a few, as a front-end with a driver; the back-end serves them one after the other and
    nobody else meanwhile. What it receives can only be checked where frames come back to who sent them: put an echo
    behind it. Hostile checks send what no guest should; a back-end that does not survive one is told of, and is gone.

    Args:
        path: the socket on which the back-end listens.
        timeout_s: the longest time to wait for any one thing. All checks take some 10 s, and more where many fail.
        only: names of the checks to run; all of them if there are none.
        hostile: whether to run those that send what no correct front-end or driver sends.
        each: called with each result as it is there.

    Returns:
        All results.

    Raises:
        PortError: nobody listens there.
        ConfigError: there is no check of that name, or no time to wait.
    """
    import difflib

    if not timeout_s > 0:
        raise ConfigError(f"timeout_s is a number of seconds above 0, found {timeout_s!r}")
    where = PortSpec.of("virtio-user", str(path)).where
    wanted = [only] if isinstance(only, str) else list(only)
    checker = _virtnet.Checker(where, timeout_s)
    checks = checker.checks()
    names = [name for name, *_ in checks]
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise ConfigError(f"there is no check {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    results = []
    for number, (name, demand, source, level, is_hostile) in enumerate(checks):
        if (wanted and name not in wanted) or (is_hostile and not hostile):
            continue
        outcome, found, seconds = checker.run(number)
        results.append(CheckResult(name, demand, source, level, is_hostile, outcome, found, seconds))
        if each:
            each(results[-1])
    return CheckReport(where, tuple(results))
